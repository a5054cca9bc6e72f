"""The arguments in a checkpoint of Megatron-LM as a `ModelConfig`, or a refusal by the argument's name.

`common.pt` is a pickle that names classes of Megatron-LM. torch reads it by `weights_only`, with `argparse.Namespace`
and, for every other name, an inert object; so nothing of that program runs here. Of its hundreds of arguments those
that say what a GPT computes are read. An argument of a changed Megatron-LM is not known here: compare the loss.

Not here: the tensors (megatron_weights.py). Written for megatron-core 0.16.1, which is not imported.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.checkpoint.pieces.torch_dist import Inert
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.layers.rope import RopeScaling, RopeScalingConfig
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.values import ForeignValues
from megatron_fp4.storage.patience import read_patiently

COMMON = "common.pt"
ROPE_SCALED_LENGTH = 8192
"""Of which context `--use-rope-scaling` is an extension; its frequency factors are 1 and 4."""
TOKENIZERS_WITH_EOD = ("NullTokenizer", "NullMultimodalTokenizer")
"""Their `vocab_size` does not count the end of a document, which is their last token."""
MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "add_bias_linear": (False,),
    "apply_layernorm_1p": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "attention_output_gate": (None, False),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (None, 0),
    "heterogeneous_block_specs": (None, False),
    "heterogeneous_layers_config_encoded_json": (None,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_attention_ratio": (None, 0),
    "hybrid_layer_pattern": (None,),
    "hybrid_mlp_ratio": (None, 0),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "linear_attention_freq": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (None, False),
    "no_rope_freq": (None,),
    "normalization": ("RMSNorm",),
    "num_experts": (None, 0),
    "num_moe_experts": (None, 0),
    "qk_l2_norm": (None, False),
    "quick_geglu": (None, False),
    "rotary_interleaved": (None, False),
    "softmax_scale": (None,),
    "softmax_type": (None, "vanilla"),
    "use_legacy_models": (None, False),
    "window_attn_skip_freq": (None,),
}
"""Arguments that choose what this model does not compute, with the values that do not."""
DEFAULTS = {"add_bias_linear": True, "normalization": "LayerNorm"}
"""What it means that one of these is missing; of the others, None."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of the run that wrote a checkpoint."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class NoArguments:
    """Why a checkpoint does not say what model it is of."""

    reason: str


def read_arguments(folder: Path) -> Arguments | NoArguments:
    """What `common.pt` says. Raises UnreadableFile."""
    path = folder / COMMON
    try:
        read_patiently(path.stat, path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        readable: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]
        readable += [(Inert, name) for name in unknown if name != "argparse.Namespace"]
        with torch.serialization.safe_globals(readable):
            common = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return NoArguments(f"{path} is missing")
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, EOFError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return NoArguments(f"{path} cannot be read without running what it names ({reason})")
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, argparse.Namespace):
        return NoArguments(f"{path} holds no arguments")
    return Arguments(vars(arguments))


@dataclass(frozen=True)
class MegatronModel:
    """What arguments say. vocab_size: None where they do not, but for the tokenizer, which they only name."""

    sizes: Mapping[str, Any]
    vocab_size: int | None
    max_length: int

    def config(self, vocab_size: int) -> ModelConfig:
        """Raises ValueError for settings that contradict each other."""
        return ModelConfig(**self.sizes, vocab_size=vocab_size)


def parse_arguments(arguments: Arguments, source: str) -> MegatronModel:
    """Raises ValueError naming the argument and the value that this model does not compute."""
    reader = ForeignValues(arguments.values, source)
    for name, allowed in MUST_BE.items():
        reader.expect(name, *allowed, default=DEFAULTS.get(name))
    hidden, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    groups = reader.count("num_query_groups", heads)
    grouped = reader.take("group_query_attention", True)  # where it is false, the groups have no effect
    base, scaling, fraction = _rope(reader)
    sizes = {
        "num_layers": reader.count("num_layers"),
        "hidden": hidden,
        "ffn_hidden": reader.count("ffn_hidden_size", 4 * hidden),
        "num_heads": heads,
        "num_kv_heads": groups if grouped else heads,
        "head_dim": reader.count("kv_channels", hidden // heads),
        "activation": _activation(reader),
        "rope_base": base,
        "rope_scaling": scaling,
        "rope_fraction": fraction,
        "qk_norm": QkNorm.head if reader.take("qk_layernorm") else QkNorm.none,
        "qkv_bias": bool(reader.take("add_qkv_bias")),
        "sliding_window": _window(reader),
        "tied_embeddings": not reader.take("untie_embeddings_and_output_weights", False),
        "norm_eps": reader.number("norm_epsilon", reader.number("layernorm_epsilon", 1e-5)),
        "init_std": reader.number("init_method_std", 0.02),
    }
    vocab_size = None
    if reader.take("vocab_size") is not None:
        vocab_size = ForeignValues(arguments.values, source).count("vocab_size")
        vocab_size += reader.take("tokenizer_type") in TOKENIZERS_WITH_EOD
    return MegatronModel(sizes, vocab_size, reader.count("max_position_embeddings", reader.take("seq_length") or 2048))


def _activation(reader: ForeignValues) -> Activation:
    if reader.take("squared_relu"):
        reader.expect("swiglu", False, None)
        return Activation.squared_relu
    if not reader.take("swiglu"):
        raise reader.refused("swiglu", False, "and so is squared_relu: a GELU, which this model does not compute")
    return Activation.swiglu


def _rope(reader: ForeignValues) -> tuple[float, RopeScalingConfig, float]:
    """Base, scaling, and the part of a head that is rotated."""
    kind = reader.take("position_embedding_type", "learned_absolute")
    kind = "rope" if reader.take("use_rotary_position_embeddings") else kind
    if kind not in ("rope", "none"):
        raise reader.refused(
            "position_embedding_type", kind, "which this model does not compute; it computes rope, none"
        )
    base = reader.number("rotary_base", 10000.0)
    fraction = reader.number("rotary_percent", 1.0)
    scaled, factor = reader.take("use_rope_scaling"), reader.number("rope_scaling_factor", 8.0)
    interpolation = reader.number("rotary_seq_len_interpolation_factor", 1.0)
    if kind == "none":
        return 0.0, RopeScalingConfig(), 1.0
    if scaled and interpolation != 1:
        raise reader.refused(
            "use_rope_scaling", scaled, f"beside rotary_seq_len_interpolation_factor = {interpolation}"
        )
    scaling = RopeScalingConfig()
    if scaled:
        scaling = RopeScalingConfig(
            RopeScaling.llama3, factor=factor, original_length=ROPE_SCALED_LENGTH, low_frequency=1.0, high_frequency=4.0
        )
    elif interpolation != 1:
        scaling = RopeScalingConfig(RopeScaling.linear, factor=interpolation)
    return base, scaling, fraction


def _window(reader: ForeignValues) -> int:
    """Tokens that one attends to, itself included, which Megatron-LM does not count; 0 for all."""
    window = reader.take("window_size")
    if window is None:
        return 0
    fits = isinstance(window, tuple | list) and len(window) == 2 and all(type(one) is int for one in window)
    if fits and window[0] == -1:
        return 0
    if not fits or window[0] < 0 or window[1]:
        raise reader.refused("window_size", window, "which this model does not compute; it computes (tokens before, 0)")
    return window[0] + 1
