"""Forward and backward of one global batch on one rank without pipeline stages.

The loss of a batch is the sum over its target tokens divided by their number in the whole global batch, so no gradient
needs to be rescaled afterwards, however the batch is divided. An engine returns that rank's part of the sum.

Not here: the same interface over several stages (pipeline/engine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.fused.loss import LossImpl, choose_cross_entropy
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.train.inputs import Inputs


class Engine(Protocol):
    """Runs this rank's part of the model over microbatches."""

    stages: list[Decoder]
    """The stages that this rank holds."""

    reports_loss: bool
    """True on the ranks that hold the last stage."""

    def train(
        self, microbatches: list[Inputs], scale: float | Tensor, before_last_backward: Callable[[int], None]
    ) -> Tensor:
        """Accumulate gradients; returns sum of token losses * scale (FP32 scalar, 0 where `reports_loss` is False).

        scale: also as a scalar on the device. before_last_backward is called once, with the number of microbatches
        whose backward passes follow, when all gradients will be complete after them.
        """

    def evaluate(self, microbatch: Inputs) -> Tensor:
        """Sum of the token losses of one microbatch (FP32 scalar, 0 where `reports_loss` is False)."""

    def logits(self, microbatch: Inputs) -> Tensor | None:
        """Logits `[T, V/tp]` of one microbatch, without gradients; None where `reports_loss` is False."""


class TokenLoss:
    """Sum of token losses times a scale, from this rank's logits. See `choose_cross_entropy` for `impl`.

    smoothing: how far training labels are smoothed; an evaluation, which records no gradients, takes them as they are.
    """

    def __init__(self, vocab_size: int, tp: Group, impl: LossImpl = LossImpl.torch, smoothing: float = 0.0) -> None:
        self._training = choose_cross_entropy(impl, vocab_size, tp, smoothing)
        self._held_out = choose_cross_entropy(impl, vocab_size, tp)

    def __call__(self, logits_TV: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
        cross_entropy = self._training if torch.is_grad_enabled() else self._held_out
        total = cross_entropy(logits_TV, labels.reshape(-1)).sum()
        return total * (scale.to(total.dtype) if isinstance(scale, Tensor) else scale)


class LocalEngine:
    """The whole model on this rank: one forward and backward per microbatch, in order."""

    reports_loss = True

    def __init__(self, model: Decoder, loss: TokenLoss) -> None:
        self.stages = [model]
        self._model, self._loss = model, loss

    def _forward(self, inputs: Inputs, scale: float | Tensor) -> Tensor:
        return self._loss(self._logits(inputs), inputs.labels, scale)

    def _logits(self, inputs: Inputs) -> Tensor:
        logits: Tensor = self._model(inputs.tokens, inputs.address, inputs.positions, inputs.documents)
        return logits

    def train(
        self, microbatches: list[Inputs], scale: float | Tensor, before_last_backward: Callable[[int], None]
    ) -> Tensor:
        total = torch.zeros((), device=microbatches[0].tokens.device)
        for number, inputs in enumerate(microbatches):
            loss = self._forward(inputs, scale)
            if number == len(microbatches) - 1:
                before_last_backward(1)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, microbatch: Inputs) -> Tensor:
        return self._forward(microbatch, 1.0)

    @torch.no_grad()
    def logits(self, microbatch: Inputs) -> Tensor:
        return self._logits(microbatch)
