"""Which cross-entropy a run computes: ours (layers/loss.py), or Transformer Engine's Triton kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from enum import Enum

from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.embedding import vocab_range
from megatron_fp4.layers.loss import IGNORE, Distilled, vocab_parallel_cross_entropy, vocab_parallel_distillation

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""(logits_TV `[T, V_local]`, labels_T int64 `[T]` of global ids) -> loss of each token in nats, FP32 `[T]`.
Both implementations write the gradient over the logits."""


Distance = Callable[[Tensor, Tensor, Tensor], Distilled]
"""(logits_TV, a teacher's, labels_T) -> how far the first are from both. Its gradient is written over them."""


class LossImpl(Enum):
    """Who computes the cross-entropy of vocabulary-parallel logits."""

    torch = "torch"
    te = "te"  # transformer_engine.pytorch.cross_entropy: Triton kernels, CUDA, equal vocabulary parts


def choose_cross_entropy(impl: LossImpl, vocab_size: int, tp: Group, smoothing: float = 0.0) -> CrossEntropy:
    """The implementation that `model.loss_impl` names. Raises ValueError with the remedy if it cannot be used."""
    if impl is LossImpl.te:
        assert not smoothing, "refused by train.refusals.requirements"
        return _te_cross_entropy(vocab_size, tp)
    first, _ = vocab_range(vocab_size, tp)

    def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(
            logits_TV, labels_T, first=first, vocab_size=vocab_size, group=tp, smoothing=smoothing
        )

    return cross_entropy


def choose_distance(vocab_size: int, tp: Group, *, weight: float, temperature: float) -> Distance:
    """What is minimized beside a teacher; see `layers.loss`. weight, temperature: those of `train.distillation`."""
    first, _ = vocab_range(vocab_size, tp)

    def distance(logits_TV: Tensor, teacher_TV: Tensor, labels_T: Tensor) -> Distilled:
        return vocab_parallel_distillation(
            logits_TV,
            teacher_TV,
            labels_T,
            first=first,
            vocab_size=vocab_size,
            weight=weight,
            temperature=temperature,
            group=tp,
        )

    return distance


def _te_cross_entropy(vocab_size: int, tp: Group) -> CrossEntropy:
    """0 where the label is IGNORE. Up to 2.16 at least, Transformer Engine writes the gradient over the logits."""
    # It takes a rank's first row to be rank * (its own number of rows); models.layout has refused other splits.
    assert vocab_size % tp.size == 0, f"{vocab_size} rows on {tp.size} ranks"
    try:
        compute = importlib.import_module("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy
    except (ImportError, OSError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model.loss_impl=te: transformer_engine.pytorch.cross_entropy cannot be used here ({error}); install"
            " transformer-engine[pytorch] on a machine with a CUDA device, or set model.loss_impl=torch"
        ) from error

    def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        # inp [1, T, V], target, label_smoothing, reduce_loss, dist_process_group, ignore_idx
        loss: Tensor = compute(logits_TV[None], labels_T[None], 0.0, False, tp.process_group, IGNORE)
        # The gradient that comes back through the mask is contiguous, as the kernel of 2.10 takes for granted.
        return loss.reshape(-1).masked_fill(labels_T == IGNORE, 0.0)

    return cross_entropy
