"""Forward and backward of one global batch on one rank without pipeline stages.

The loss of a batch is the sum over its target tokens divided by their number in the whole global batch, so no gradient
needs to be rescaled afterwards, however the batch is divided. An engine returns that rank's part of the sum.

With multi-token prediction each depth has a loss of its own over its own targets; what is minimized is

    loss + loss_scale / depth * (sum of the losses of the depths)

and all of them are reported as they are. With a teacher (`train.distillation`) the first loss is, in what is
minimized, that of `layers.loss.vocab_parallel_distillation`; it is reported as it is all the same, and the divergence
after all others.

Not here: the same interface over several stages (pipeline/engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.fused.loss import LossImpl, choose_cross_entropy, choose_distance
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.train.inputs import Inputs
from megatron_fp4.train.sections import DistillationConfig


class Engine(Protocol):
    """Runs this rank's part of the model over microbatches."""

    stages: list[Decoder]
    """The stages that this rank holds."""

    depth: int
    """Of multi-token prediction."""

    reports_loss: bool
    """True on the ranks that hold the last stage."""

    further_losses: Tensor
    """What the newest `train` would have returned for each depth of multi-token prediction, and then, with a teacher,
    for the divergence from its predictions; FP32 `[n]`."""

    def train(
        self, microbatches: list[Inputs], scale: float | Tensor, before_last_backward: Callable[[int], None]
    ) -> Tensor:
        """Accumulate gradients; returns sum of token losses * scale (FP32 scalar, 0 where `reports_loss` is False).

        scale: also as a scalar on the device, or as `[1 + depth]` there, one for each loss. before_last_backward is
        called once, with the number of microbatches whose backward passes follow, when all gradients will be complete
        after them.
        """

    def evaluate(self, microbatch: Inputs) -> Tensor:
        """Sums of the token losses of one microbatch, FP32 `[1]`, with `ahead` those of the depths too, `[1 + depth]`;
        0 where `reports_loss` is False."""

    def logits(self, microbatch: Inputs) -> Tensor | None:
        """Logits `[T, V/tp]` of one microbatch, without gradients; None where `reports_loss` is False."""


class TokenLoss:
    """Sum of token losses times a scale, from this rank's logits. See `choose_cross_entropy` for `impl`.

    smoothing: how far training labels are smoothed; an evaluation, which records no gradients, takes them as they are.
    mtp: depth and loss scale of multi-token prediction. distillation: how a teacher is learned from.
    """

    def __init__(
        self,
        vocab_size: int,
        tp: Group,
        impl: LossImpl = LossImpl.torch,
        smoothing: float = 0.0,
        mtp: MtpConfig | None = None,
        distillation: DistillationConfig | None = None,
    ) -> None:
        self._training = choose_cross_entropy(impl, vocab_size, tp, smoothing)
        self._held_out = choose_cross_entropy(impl, vocab_size, tp)
        self.depth = mtp.depth if mtp else 0
        self._weight = mtp.loss_scale / mtp.depth if mtp and mtp.depth else 0.0
        how = distillation or DistillationConfig()
        self._distance = choose_distance(vocab_size, tp, weight=how.weight, temperature=how.temperature)

    def __call__(self, logits_TV: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
        cross_entropy = self._training if torch.is_grad_enabled() else self._held_out
        total = cross_entropy(logits_TV, labels.reshape(-1)).sum()
        return total * (scale.to(total.dtype) if isinstance(scale, Tensor) else scale)

    def of_depths(
        self, logits: Sequence[Tensor], labels: Tensor, ahead: Tensor, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is minimized, and each loss alone, FP32 `[1 + depth]` without gradients.

        logits: those of the next token, then of each depth. ahead: as `Inputs.ahead`. scale: one, or `[1 + depth]`.
        """
        every = (labels, *ahead[..., 1].unbind(-1))
        scales = scale if isinstance(scale, Tensor) and scale.dim() else [scale] * len(every)
        losses = torch.stack([self(*one) for one in zip(logits, every, scales, strict=True)])
        return losses[0] + self._weight * losses[1:].sum(), losses.detach()

    def distilled(
        self,
        logits: Sequence[Tensor],
        teacher_TV: Tensor,
        labels: Tensor,
        ahead: Tensor | None,
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Like `of_depths`, the first of `logits` compared with those of a teacher; losses `[1 + depth + 1]`."""
        every = (labels,) if ahead is None else (labels, *ahead[..., 1].unbind(-1))
        scales = list(scale) if isinstance(scale, Tensor) and scale.dim() else [scale] * len(every)
        per_token = self._distance(logits[0], teacher_TV, labels.reshape(-1))
        minimized, loss, divergence = (part.sum() * torch.as_tensor(scales[0]).to(part.dtype) for part in per_token)
        depths = [self(*one) for one in zip(logits[1:], every[1:], scales[1:], strict=True)]
        for of_depth in depths:
            minimized = minimized + self._weight * of_depth
        return minimized, torch.stack([loss, *depths, divergence]).detach()


class LocalEngine:
    """The whole model on this rank: one forward and backward per microbatch, in order."""

    reports_loss = True

    def __init__(self, model: Decoder, loss: TokenLoss) -> None:
        self.stages = [model]
        self.depth = loss.depth
        self.further_losses = torch.zeros(loss.depth)
        self.teacher: LocalEngine | None = None
        """Of the model whose logits of the same tokens training learns."""
        self._model, self._loss = model, loss

    def _logits(self, inputs: Inputs) -> Tensor:
        logits: Tensor = self._model(inputs.tokens, inputs.address, inputs.positions, inputs.documents)
        return logits

    def _minimized(self, inputs: Inputs, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """What is minimized, and each loss alone, FP32 `[1 + depth]` without gradients."""
        return self._alone(inputs, scale) if self.teacher is None else self._distilled(inputs, scale)

    def _alone(self, inputs: Inputs, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        if inputs.ahead is None:
            loss = self._loss(self._logits(inputs), inputs.labels, scale)
            return loss, loss.detach()[None]
        logits = self._model(inputs.tokens, inputs.address, inputs.positions, inputs.documents, inputs.ahead)
        return self._loss.of_depths(logits, inputs.labels, inputs.ahead, scale)

    def _distilled(self, inputs: Inputs, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's forward pass comes first: of it only the logits are left beside the activations of this one."""
        assert self.teacher is not None
        teacher_TV = self.teacher.logits(inputs)
        if inputs.ahead is None:
            return self._loss.distilled([self._logits(inputs)], teacher_TV, inputs.labels, None, scale)
        logits = self._model(inputs.tokens, inputs.address, inputs.positions, inputs.documents, inputs.ahead)
        return self._loss.distilled(logits, teacher_TV, inputs.labels, inputs.ahead, scale)

    def train(
        self, microbatches: list[Inputs], scale: float | Tensor, before_last_backward: Callable[[int], None]
    ) -> Tensor:
        further = self._loss.depth + (self.teacher is not None)
        total = torch.zeros(1 + further, device=microbatches[0].tokens.device)
        for number, inputs in enumerate(microbatches):
            loss, losses = self._minimized(inputs, scale)
            if number == len(microbatches) - 1:
                before_last_backward(1)
            loss.backward()
            total += losses
        self.further_losses = total[1:]
        return total[0]

    @torch.no_grad()
    def evaluate(self, microbatch: Inputs) -> Tensor:
        return self._alone(microbatch, 1.0)[1]

    @torch.no_grad()
    def logits(self, microbatch: Inputs) -> Tensor:
        return self._logits(microbatch)
