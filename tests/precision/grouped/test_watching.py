"""What watches GEMMs sees the experts of a linear as one: ledger and statistics."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_fp4.precision import LinearPrecision, nvfp4_paper
from megatron_fp4.precision.grouped import Segments
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend
from megatron_fp4.precision.ledger import GemmLedger, differences
from megatron_fp4.precision.statistics import quantization_stats
from megatron_fp4.precision.statistics_probe import StatisticsProbe
from tests.precision.grouped.test_grouped_linear import COUNTS, E, Experts, N, routed


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_ledger_counts_each_gemm_once(counts: list[list[int]]) -> None:
    """However many experts have rows; a GEMM of another precision, or one that is missing, shows."""
    ledger = GemmLedger(SegmentedEmulatedBackend())
    ledger.recording = True
    Experts(nvfp4_paper(), ledger).run(*routed(counts))
    executed = ledger.take()
    assert differences(executed, {"experts.up": nvfp4_paper()}, num_microbatches=1) == []
    assert len(differences(executed, {"experts.up": LinearPrecision()}, num_microbatches=1)) == 6
    assert len(differences(Counter(), {"experts.up": nvfp4_paper()}, num_microbatches=1)) == 3


def test_statistics_are_those_of_the_segments() -> None:
    """Each with its own scale, and no share of what is padding."""
    x, dy, rows, segments = routed([[16, 3], [0, 0], [1, 0], [40, 5]])
    x[segments.parts[1].rows] *= 1000
    probe = StatisticsProbe(SegmentedEmulatedBackend())
    probe.recording = True
    experts = Experts(nvfp4_paper(), probe)
    result = experts.run(x, dy, rows, segments)
    report = probe.take()
    assert {name.removeprefix("experts.up/") for name in report} == {
        *("fprop.x", "fprop.w", "wgrad.x", "dgrad.dy", "wgrad.dy")
    }
    stats = report["experts.up/fprop.x"]
    each = [quantization_stats(x[part.rows], nvfp4_paper().fprop.x) for part in segments.parts]
    energy = [x[part.rows].double().square().sum() for part in segments.parts]
    error = sum(one.relative_mse * signal for one, signal in zip(each, energy, strict=True))
    assert stats.relative_mse == pytest.approx(float(error / sum(energy)))
    assert stats.amax == max(one.amax for one in each)
    assert stats.scale_histogram[0] == 0.0, "the zeros behind a segment were counted as blocks without scale"
    assert report["experts.up/wgrad.x"].scale_histogram[0] == 0.0
    weights = [quantization_stats(w, nvfp4_paper().fprop.w) for w in experts.weight.detach().view(E, N, -1)]
    saturation = report["experts.up/fprop.w"].saturation
    assert saturation == pytest.approx(sum(one.saturation for one in weights) / E)
    for watched, alone in zip(result, Experts(nvfp4_paper()).run(x, dy, rows, segments), strict=True):
        assert torch.equal(watched, alone)


def test_nothing_is_measured_where_nothing_came() -> None:
    probe = StatisticsProbe(SegmentedEmulatedBackend())
    probe.recording = True
    x, dy, rows, _ = routed([[0], [0], [0], [0]])
    Experts(nvfp4_paper(), probe).run(x, dy, rows, Segments((), 0))
    assert set(probe.take()) == {"experts.up/fprop.w"}
