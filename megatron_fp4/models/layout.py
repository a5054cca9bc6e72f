"""Whether a model fits a parallel layout: refused with the numbers before anything is built."""

from __future__ import annotations

from megatron_fp4.comm.mesh import ParallelConfig
from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.models.block import MIXERS
from megatron_fp4.models.config import ModelConfig


def check_model_layout(model: ModelConfig, parallel: ParallelConfig, *, seq_length: int, tokens: int) -> None:
    """Raises ValueError where a dimension does not divide. tokens: per microbatch on one context-parallel rank."""
    tp, cp = parallel.tp, parallel.cp
    if parallel.ep > 1 and "E" not in model.letters:
        raise ValueError(
            f"parallel.ep = {parallel.ep} has no effect: no block of the model has experts (model.pattern has no E);"
            " leave it at 1"
        )
    if "E" in model.letters:
        _check_divides("model.moe.num_experts", model.moe.num_experts, "parallel.ep", parallel.ep)
    _check_divides("tokens per microbatch and cp rank", tokens, "parallel.tp", tp)
    if model.mtp.depth >= seq_length:
        raise ValueError(
            f"model.mtp.depth = {model.mtp.depth} looks beyond every sample of data.seq_length = {seq_length}; lower it"
        )
    if cp > 1:
        _check_divides("data.seq_length", seq_length, "2 * parallel.cp", 2 * cp)
    sizes_by_kind = {
        "attention": {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads},
        "mlp": {"ffn_hidden": model.ffn_hidden},
        "moe": {"moe.shared_ffn_hidden": model.moe.shared_ffn_hidden},
        "mamba": {"mamba_num_heads": model.mamba_num_heads, "mamba_num_groups": model.mamba_num_groups},
    }
    used = {kind for letter in model.letters for kind in MIXERS[letter]}
    for kind, sizes in sizes_by_kind.items():
        for setting, size in sizes.items() if kind in used else ():
            _check_divides(f"model.{setting}", size, "parallel.tp", tp)
    if model.vocab_size < tp:
        raise ValueError(f"model.vocab_size = {model.vocab_size} is smaller than parallel.tp = {tp}; lower that")
    if model.loss_impl is LossImpl.te and model.vocab_size % tp:
        raise ValueError(
            f"model.loss_impl=te needs equal parts of the vocabulary: model.vocab_size = {model.vocab_size} is not"
            f" divisible by parallel.tp = {tp}; change one of them, or set model.loss_impl=torch"
        )


def _check_divides(what: str, size: int, divisor_name: str, divisor: int) -> None:
    if size % divisor:
        raise ValueError(
            f"{what} = {size} is not divisible by {divisor_name} = {divisor}; choose a divisor of {size}, or change"
            " the model"
        )
