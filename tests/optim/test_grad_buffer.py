"""What is received of other ranks lives for two buckets, not for all of them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import DrawnGroup, Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim import grad_buffer
from megatron_fp4.optim.layout import make_buckets


def test_received_parts_are_freed_bucket_by_bucket() -> None:
    alive = most = 0

    class Receiving:
        """Stands for a reduce-scatter under way and the memory that it receives in."""

        def __init__(self, flat: Tensor, group: Group, total: Tensor | None) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def finish(self) -> None:
            pass

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    named = [(f"w{number}", LogicalParameter.whole(f"w{number}", torch.zeros(2, 64))) for number in range(6)]
    group = DrawnGroup("dp_cp", (0, 1), 0)
    buckets = make_buckets(named, group, bucket_numel=1, sum_replicated_over_tp=False)
    buffer = grad_buffer.GradBuffer(buckets, Group.single(), overlap=False)
    with (
        mock.patch.object(grad_buffer, "PendingSum", Receiving),
        mock.patch.object(grad_buffer, "sums_in_rank_order", return_value=True),
    ):
        buffer.finish()
    assert (most, alive) == (2, 0), "received parts of every bucket stay until the end of the step"


def test_what_bf16_sums_lose_of_a_smaller_loss() -> None:
    """64 microbatches; so BF16 sums are refused with it (train/refusals/optimizer_state.py).

    Of a sum of equal scales a hundredth is lost, of a part of scale 0.05 a quarter.
    """
    generator = torch.Generator().manual_seed(0)
    lost = {}
    for scale in (1.0, 0.05):
        narrow, exact, part = torch.zeros(4096, dtype=torch.bfloat16), torch.zeros(4096), torch.zeros(4096)
        for _ in range(64):
            large, small = torch.randn(2, 4096, generator=generator)
            for gradient in (large, small * scale):
                narrow += gradient
                exact += gradient
            part += small * scale
        lost[scale] = float((narrow - exact).norm() / part.norm())
    assert lost == {1.0: pytest.approx(0.018, abs=0.003), 0.05: pytest.approx(0.26, abs=0.04)}
