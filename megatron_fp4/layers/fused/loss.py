"""Cross-entropy by `transformer_engine.pytorch.cross_entropy.parallel_cross_entropy` (Triton, CUDA)."""

from __future__ import annotations

import importlib

from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.loss import IGNORE, CrossEntropy


def make_te_cross_entropy(vocab_size: int, tp: Group) -> CrossEntropy:
    """Loss of logits_TV `[T, V/tp]` and labels_T int64 `[T]` (global ids), FP32 `[T]`; 0 where the label is IGNORE.

    Up to 2.16 at least, the function writes the gradient over the logits. Raises ValueError with the remedy if the
    package cannot be used.
    """
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
        # inp [1, T, V], target, label_smoothing, reduce_loss, dist_process_group, ignore_idx. By position: in 2.9 it is
        # the `apply` of an autograd function, which takes no keywords.
        loss: Tensor = compute(logits_TV[None], labels_T[None], 0.0, False, tp.process_group, IGNORE)
        # The gradient that comes back through the mask is contiguous, as the kernel of 2.9 takes for granted.
        return loss.reshape(-1).masked_fill(labels_T == IGNORE, 0.0)

    return cross_entropy
