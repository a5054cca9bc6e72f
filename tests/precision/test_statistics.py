"""The quantization report, on tensors whose statistics are known."""

from __future__ import annotations

import pytest
import torch

from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import AmaxScope, Format, Operand, Rounding, nvfp4_paper
from megatron_fp4.precision.statistics import linear_report, quantization_stats, report_table

N4 = Format.nvfp4


def gauss(rows: int = 512, cols: int = 512) -> torch.Tensor:
    return normal(key_of("statistics"), torch.arange(rows), torch.arange(cols)).bfloat16()


def test_gaussian_levels() -> None:
    """0.0090 is the relative MSE of NVFP4 on Gaussian data; SNR is the same number in dB."""
    stats = quantization_stats(gauss(), Operand(N4))
    assert abs(stats.relative_mse / 0.0090 - 1) < 0.03
    assert abs(stats.snr_db - 20.45) < 0.15
    assert abs(sum(stats.scale_histogram) - 1) < 1e-6
    assert 0.01 < stats.saturation < 0.06, "E4M3 rounds the scale down in about half of the blocks of 16"
    headroom = quantization_stats(gauss(), Operand(N4, rounding=Rounding.sr_headroom))
    assert headroom.saturation == 0


def test_values_on_the_grid_lose_nothing() -> None:
    """6 * 448 is the largest value of a tensor whose global scale is 1: all these are representable."""
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] * 2).repeat(16, 2) * 448
    stats = quantization_stats(x, Operand(N4))
    assert (stats.relative_mse, stats.underflow, stats.saturation) == (0.0, 0.0, 0.0)
    assert stats.scale_histogram[-1] == 1.0
    assert stats.snr_db == float("inf")


def test_underflow_counts_non_zero_elements_only() -> None:
    """Half of the non-zero elements are far below the smallest code of their block."""
    x = torch.zeros(16, 16)
    x[:, 0], x[:, 1] = 6.0, 0.01
    assert quantization_stats(x, Operand(N4)).underflow == 0.5


@pytest.mark.parametrize(
    "operand",
    [Operand(N4, amax_scope=AmaxScope.row), Operand(N4, rht_size=16), Operand(Format.mxfp8), Operand(Format.mxfp4)],
    ids=["row", "rht", "mxfp8", "mxfp4"],
)
@pytest.mark.parametrize("along", [0, 1])
def test_every_kind_of_operand(operand: Operand, along: int) -> None:
    stats = quantization_stats(gauss(64, 128), operand, along=along)
    assert 0 < stats.relative_mse < 0.02
    assert stats.underflow < 0.12


def test_report_of_a_linear() -> None:
    x, w, dy = gauss(64, 128), gauss(96, 128), gauss(64, 96)
    report = linear_report("blocks.0.mlp.up", x, w, dy, nvfp4_paper())
    names = ("fprop.x", "fprop.w", "dgrad.w", "wgrad.x", "dgrad.dy", "wgrad.dy")
    assert set(report) == {f"blocks.0.mlp.up/{name}" for name in names}
    text = report_table(report.items())
    assert len(text.splitlines()) == 7
    assert "blocks.0.mlp.up/wgrad.dy" in text
    header, first, *_ = text.splitlines()
    edges = " ".join(header.split("amax")[1].split())
    assert edges == "scale = 0 <= 0.015625 <= 0.125 <= 1 <= 8 <= 64 <= 448"
    shares = [float(share.rstrip("%")) for share in first.split()[-7:]]
    assert abs(sum(shares) - 100) < 0.1, "the histogram of block scales, in percent"
    assert shares[-1] > 50, "the scales of a Gaussian tensor lie near the largest"
    with pytest.raises(ValueError, match="not quantized"):
        quantization_stats(x, Operand())
