"""Whether a model fits a parallel layout: refused with the numbers before anything is built."""

from __future__ import annotations

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.models.config import ModelConfig


def check_model_layout(model: ModelConfig, parallel: ParallelConfig, *, seq_length: int, tokens: int) -> None:
    """Raises ValueError where a dimension does not divide. tokens: per microbatch on one context-parallel rank."""
    tp, cp = parallel.tp, parallel.cp
    divided: list[tuple[str, int, str, int]] = [("tokens per microbatch and cp rank", tokens, "parallel.tp", tp)]
    if cp > 1:
        divided.append(("data.seq_length", seq_length, "2 * parallel.cp", 2 * cp))
    letters = set(model.blocks)
    if letters & set("T*"):
        divided.append(("model.num_heads", model.num_heads, "parallel.tp", tp))
        divided.append(("model.num_kv_heads", model.num_kv_heads, "parallel.tp", tp))
    if letters & set("T-"):
        divided.append(("model.ffn_hidden", model.ffn_hidden, "parallel.tp", tp))
    if "M" in letters:
        divided.append(("model.mamba_num_heads", model.mamba_num_heads, "parallel.tp", tp))
        divided.append(("model.mamba_num_groups", model.mamba_num_groups, "parallel.tp", tp))
    for what, size, by, divisor in divided:
        if size % divisor:
            raise ValueError(
                f"{what} = {size} is not divisible by {by} = {divisor}; choose a divisor of {size}, or change the model"
            )
    if model.vocab_size < tp:
        raise ValueError(f"model.vocab_size = {model.vocab_size} is smaller than parallel.tp = {tp}")
    if model.loss_impl is LossImpl.te and model.vocab_size % tp:
        raise ValueError(
            f"model.loss_impl=te needs equal parts of the vocabulary: model.vocab_size = {model.vocab_size} is not"
            f" divisible by parallel.tp = {tp}; change one of them, or set model.loss_impl=torch"
        )
