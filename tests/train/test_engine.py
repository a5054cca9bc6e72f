"""The loss of a microbatch: smoothed labels in training only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.loss import IGNORE
from megatron_fp4.train.engine import TokenLoss


def test_labels_are_smoothed_where_gradients_are_recorded() -> None:
    logits, labels = torch.randn(6, 11, requires_grad=True), torch.tensor([[0, 3, IGNORE], [10, 5, 3]])
    loss = TokenLoss(11, Group.single(), smoothing=0.1)
    smoothed, plain = (
        F.cross_entropy(logits.double(), labels.reshape(-1), reduction="sum", label_smoothing=s) for s in (0.1, 0.0)
    )
    torch.testing.assert_close(loss(logits, labels, 0.25).double(), 0.25 * smoothed)
    with torch.no_grad():
        torch.testing.assert_close(loss(logits, labels, 1.0).double(), plain)
