"""Properties of whole-tensor quantization: measured error levels, the clipping of stochastic rounding, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fp4.numerics import key_of, normal, quantize_nvfp4, quantize_power_of_two, uniform


def gauss(rows: int = 1024, cols: int = 1024) -> Tensor:
    return normal(key_of("test"), torch.arange(rows), torch.arange(cols)).bfloat16()


def relative_mse(x: Tensor, y: Tensor) -> float:
    return float(((x.double() - y.double()) ** 2).sum() / (x.double() ** 2).sum())


def test_error_levels() -> None:
    """Levels measured by an independent emulation; a wrong scale or grid moves them by far more than 3%."""
    x, noise = gauss(), uniform(key_of("noise"), torch.arange(1024), torch.arange(1024))
    measured = {
        "1x16": relative_mse(x, quantize_nvfp4(x).dequantize()),
        "16x16": relative_mse(x, quantize_nvfp4(x, tile=(16, 16)).dequantize()),
        "sr": relative_mse(x, quantize_nvfp4(x, noise=noise).dequantize()),
        "sr_headroom": relative_mse(x, quantize_nvfp4(x, noise=noise, headroom=True, bound=416.0).dequantize()),
        "mxfp4": relative_mse(x, quantize_power_of_two(x, element="e2m1", tile=(1, 32)).dequantize()),
    }
    expected = {"1x16": 0.0090, "16x16": 0.0124, "sr": 0.0188, "sr_headroom": 0.0235, "mxfp4": 0.0133}
    for name, value in measured.items():
        assert abs(value / expected[name] - 1) < 0.03, f"{name}: {value}, expected {expected[name]}"
    better = relative_mse(x, quantize_nvfp4(x, four_over_six="mse", bound=256.0).dequantize())
    assert better < 0.95 * measured["1x16"], "four-over-six must lower the error"


def test_stochastic_rounding_clips_block_maxima_and_headroom_does_not() -> None:
    """Transformer Engine's scales leave about half of the block maxima above 6, where they are clipped: bias -1.2%."""
    x = gauss(512, 512)
    blocks = x.float().view(-1, 16)
    largest = blocks.abs().argmax(1, keepdim=True)

    def mean_ratio(headroom: bool) -> float:
        total = torch.zeros_like(blocks, dtype=torch.float64)
        for draw in range(8):
            noise = uniform(key_of("draw", draw), torch.arange(512), torch.arange(512))
            bound = 416.0 if headroom else 448.0
            total += quantize_nvfp4(x, noise=noise, headroom=headroom, bound=bound).dequantize().view(-1, 16).double()
        ratio = (total / 8).gather(1, largest) / blocks.double().gather(1, largest)
        return float(ratio.mean())

    assert abs(mean_ratio(headroom=False) - 0.988) < 0.003
    assert abs(mean_ratio(headroom=True) - 1.0) < 0.002


def test_shapes_and_types() -> None:
    quantized = quantize_nvfp4(gauss(32, 64))
    assert (quantized.codes.shape, quantized.codes.dtype) == ((32, 32), torch.uint8)
    assert (quantized.scales.shape, quantized.scales.dtype) == ((32, 4), torch.float8_e4m3fn)
    assert quantized.operand().dtype == torch.bfloat16
    assert torch.equal(quantized.operand().float(), quantized.operand(torch.float32)), "BF16 must hold code * scale"


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(32, 60\) is not a multiple of the tile 1x16"):
        quantize_nvfp4(torch.zeros(32, 60))
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_nvfp4(torch.full((16, 16), float("nan")))
