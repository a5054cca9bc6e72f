"""Layers of the models: parallel linears, embedding, norm, attention, MLP, Mamba-2, loss (floor 4).

To try one, see laboratory.py. The names below are for that; the package's own files import from the modules.
"""

from megatron_fp4.layers.attention import Attention
from megatron_fp4.layers.embedding import VocabParallelEmbedding
from megatron_fp4.layers.laboratory import lab
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_fp4.layers.mamba.mixer import Mamba2
from megatron_fp4.layers.mlp import MLP
from megatron_fp4.layers.norm import RMSNorm
from megatron_fp4.layers.parameter import initialize_parameters

__all__ = [
    "MLP",
    "Attention",
    "ColumnParallelLinear",
    "LayerContext",
    "Mamba2",
    "RMSNorm",
    "RowParallelLinear",
    "Tokens",
    "VocabParallelEmbedding",
    "initialize_parameters",
    "lab",
]
