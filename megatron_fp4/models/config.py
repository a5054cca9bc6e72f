"""The architecture of a model as a value.

One idea: a model is a pattern of blocks, one letter a block, as NVIDIA writes its hybrids:

    T   transformer block: attention, then MLP, each with its own norm and residual (the classical GPT layer)
    M   Mamba-2        *   attention        -   MLP            (one mixer per block, as in Nemotron-H)

An empty pattern means `num_layers` transformer blocks. (No `from __future__ import annotations`: omegaconf reads the
annotations.)
"""

from dataclasses import dataclass

from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.mamba.kernels import MambaKernel
from megatron_fp4.layers.mlp import Activation

BLOCK_LETTERS = "TM*-"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model. Raises ValueError for sizes that contradict each other."""

    num_layers: int = 4
    pattern: str = ""
    hidden: int = 256
    ffn_hidden: int = 1024
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 0
    """0: hidden / num_heads."""
    vocab_size: int = 0
    """0: the vocabulary of the tokenizer."""
    activation: Activation = Activation.squared_relu
    rope_base: float = 10000.0
    """0: no position embedding."""
    tied_embeddings: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.0
    init_std: float = 0.02
    scale_residual_init: bool = True
    """Weights that write into the residual stream start smaller by sqrt(number of residual additions)."""
    mamba_num_heads: int = 0
    mamba_head_dim: int = 64
    mamba_num_groups: int = 1
    mamba_state: int = 128
    mamba_conv: int = 4
    mamba_chunk: int = 128
    mamba_kernel: MambaKernel = MambaKernel.torch
    """mamba_ssm: the CUDA kernels of mamba-ssm and causal-conv1d, if installed. Projections never enter them."""
    norm_impl: NormImpl = NormImpl.torch
    """te, apex: the fused RMSNorm of Transformer Engine or Apex, if installed (CUDA, BF16)."""
    loss_impl: LossImpl = LossImpl.torch
    """te: the fused cross-entropy of Transformer Engine, if installed (CUDA, BF16, tp divides the vocabulary)."""

    def __post_init__(self) -> None:
        if self.pattern:
            self._check_pattern()
        if self.num_layers < 1:
            raise ValueError(f"model.num_layers = {self.num_layers}, must be at least 1")
        if not self.head_dim and self.hidden % self.num_heads:
            raise ValueError(
                f"model.hidden = {self.hidden} is not divisible by model.num_heads = {self.num_heads};"
                " set model.head_dim, or a number of heads that divides it"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}"
            )
        if self.rope_base and self.attention_head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, got {self.attention_head_dim}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}, must be in [0, 1)")
        if "M" in self.blocks:
            self._check_mamba()

    def _check_pattern(self) -> None:
        unknown = sorted(set(self.pattern) - set(BLOCK_LETTERS))
        if unknown:
            raise ValueError(f"model.pattern holds {unknown}; the letters are {', '.join(BLOCK_LETTERS)}")
        if len(self.pattern) != self.num_layers:
            raise ValueError(
                f"model.pattern has {len(self.pattern)} blocks, model.num_layers = {self.num_layers}; set"
                f" model.num_layers={len(self.pattern)}, or give a pattern of {self.num_layers} letters"
            )

    def _check_mamba(self) -> None:
        if self.mamba_num_heads < 1:
            raise ValueError("model.pattern has Mamba-2 blocks (M), but model.mamba_num_heads is 0")
        if self.mamba_num_heads % self.mamba_num_groups:
            raise ValueError(
                f"model.mamba_num_heads = {self.mamba_num_heads} is not a multiple of model.mamba_num_groups ="
                f" {self.mamba_num_groups}"
            )

    @property
    def blocks(self) -> str:
        """One letter per block."""
        return self.pattern or "T" * self.num_layers

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden // self.num_heads

    @property
    def mamba_inner(self) -> int:
        """Width of the Mamba-2 mixer, `d_inner`."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def num_residual_additions(self) -> int:
        return sum(2 if letter == "T" else 1 for letter in self.blocks)

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of weights that write into the residual stream."""
        return self.init_std / self.num_residual_additions**0.5 if self.scale_residual_init else self.init_std
