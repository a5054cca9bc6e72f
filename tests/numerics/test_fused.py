"""The fused quantize-dequantize against the spelled-out codes and scales, and its invariants."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fp4.numerics import compiled, key_of, quantize_nvfp4, quantize_power_of_two, random_bits
from megatron_fp4.numerics.fused import Passes
from megatron_fp4.numerics.stages import Noise, address_words, apply_e2m1_stochastic

KEY = key_of(3, "noise")
PASSES = Passes(compile=False)


def tensor(kind: str, dtype: torch.dtype, shape: tuple[int, int] = (128, 256)) -> Tensor:
    gen = torch.Generator().manual_seed(11)
    x = torch.randn(shape, generator=gen)
    if kind == "heavy":
        x = x / torch.randn(shape, generator=gen).abs().clamp(min=1e-3) ** 2
    if kind == "holes":
        x[:, 32:160] = 0
        x[5] = 1e-38
    return x.to(dtype)


def noise(shape: tuple[int, int], bits: int) -> tuple[Noise, Tensor]:
    """The noise for the fused form, and in FP32 for the spelled-out form, of the same addresses."""
    rows, cols = torch.arange(shape[0]) + 1000, torch.arange(shape[1]) + 7
    word = random_bits(KEY, rows, cols)
    value = ((word >> (32 - bits)) & ((1 << bits) - 1)).float() / 2**bits
    return Noise.at(KEY, rows, cols, bits), value


def two_level(
    x: Tensor,
    amax: Tensor,
    *,
    tile: tuple[int, int],
    along: int,
    noise: Noise | None = None,
    four_over_six: str = "off",
    **options: Any,
) -> Tensor:
    """The passes that lead to an NVFP4 operand, in x's shape."""
    maxima = PASSES.block_maxima(x, tile)
    if four_over_six == "off":
        scales = PASSES.two_level_scales(maxima, amax, **options)
    else:
        scales = PASSES.four_over_six_scales(x, maxima, amax, tile=tile, along=along, measure=four_over_six, **options)
    return PASSES.rounded(x, scales, tile=tile, noise=noise)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale_order": "paper"},
    {"headroom": True, "bound": 416.0},
    {"four_over_six": "mae", "bound": 256.0},
    {"four_over_six": "mse", "bound": 448.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["gauss", "heavy", "holes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tile", [(1, 16), (16, 16)])
@pytest.mark.parametrize("bits", [0, 8, 20])
def test_fused_equals_codes_times_scales(
    options: dict[str, Any], kind: str, dtype: torch.dtype, tile: tuple[int, int], bits: int
) -> None:
    """Both orientations. A difference: the arithmetic rounding is not the rounding by decision points."""
    x = tensor(kind, dtype)
    addressed, value = noise(tuple(x.shape), bits) if bits else (None, None)
    amax = x.abs().amax().float()
    expected = quantize_nvfp4(x, tile=tile, noise=value, **options).operand(dtype)
    got = two_level(x, amax, tile=tile, along=1, noise=addressed, **options)
    assert torch.equal(got, expected), "contracted along the columns"
    expected = quantize_nvfp4(
        x.T.contiguous(), tile=tile, noise=None if value is None else value.T.contiguous(), **options
    ).operand(dtype)
    storage_tile = (tile[1], tile[0])
    got = two_level(x, amax, tile=storage_tile, along=0, noise=addressed, **options)
    assert torch.equal(got.T, expected), "contracted along the rows"


@pytest.mark.parametrize(
    ("element", "tile", "bits"),
    [("e2m1", (1, 32), 0), ("e2m1", (1, 32), 8), ("e4m3", (1, 32), 0), ("e4m3", (1, 128), 0), ("e4m3", (128, 128), 0)],
)
@pytest.mark.parametrize("kind", ["gauss", "heavy", "holes"])
def test_fused_power_of_two_formats(element: str, tile: tuple[int, int], bits: int, kind: str) -> None:
    """A difference: the E8M0 scale made from exponent bits is not the smallest power of two that is large enough."""
    x = tensor(kind, torch.bfloat16)
    addressed, value = noise(tuple(x.shape), bits) if bits else (None, None)
    expected = quantize_power_of_two(x, element=element, tile=tile, noise=value).operand()
    scales = PASSES.power_of_two_scales(PASSES.block_maxima(x, tile), element)
    assert torch.equal(PASSES.rounded(x, scales, tile=tile, element=element, noise=addressed), expected)


def stochastic(x: Tensor, words: Tensor, bits: int, *, centred: bool) -> Tensor:
    """Elements in code units, rounded with the given random integers."""
    ones = torch.ones(x.numel() // 16, 1)
    unit = 2.0**-bits
    rounded = apply_e2m1_stochastic(x, ones, ones, words, unit, centred=centred, lanes=16, dtype=torch.float32)
    return rounded.view(x.shape)


@pytest.mark.parametrize(("low", "step"), [(0.5, 0.5), (2.0, 1.0), (4.0, 2.0)])
@pytest.mark.parametrize(("centred", "bias"), [(False, -1 / 512), (True, 0.0)])
def test_bias_of_stochastic_rounding(low: float, step: float, centred: bool, bias: float) -> None:
    """2048 elements between two codes, each with all 256 bytes: Transformer Engine's noise is half a unit too low."""
    x = low + step * (torch.arange(2048) + 0.5).repeat_interleave(256) / 2048
    rounded = stochastic(x, torch.arange(256).repeat(2048), 8, centred=centred)
    assert float((rounded.double() - x.double()).mean()) / step == pytest.approx(bias, abs=1e-9)


@pytest.mark.parametrize("bits", [8, 20])
def test_the_largest_noise_moves_no_element_that_is_a_code(bits: int) -> None:
    codes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).repeat(2)
    assert torch.equal(stochastic(codes, torch.full((16,), 2**bits - 1), bits, centred=True), codes)


@pytest.mark.parametrize("scope_dim", [0, 1])
def test_fused_row_scales(scope_dim: int) -> None:
    """A difference: with one scale per row of the operand, the wrong dimension was reduced or broadcast."""
    x = tensor("heavy", torch.bfloat16)
    oriented = x if scope_dim == 1 else x.T.contiguous()
    expected = quantize_nvfp4(oriented, amax=oriented.abs().amax(1, keepdim=True).float()).operand()
    tile = (1, 16) if scope_dim == 1 else (16, 1)
    got = two_level(x, x.abs().amax(scope_dim, keepdim=True).float(), tile=tile, along=scope_dim)
    assert torch.equal(got if scope_dim == 1 else got.T, expected)


@given(st.integers(-40, 40), st.integers(0, 2**31), st.sampled_from([(1, 16), (16, 16)]))
@settings(max_examples=30, deadline=None)
def test_a_power_of_two_changes_no_code(exponent: int, seed: int, tile: tuple[int, int]) -> None:
    """If it does, an absolute threshold or an inexact global scale has crept in."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    one, other = quantize_nvfp4(x, tile=tile), quantize_nvfp4(x * 2.0**exponent, tile=tile)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales.view(torch.uint8), other.scales.view(torch.uint8))


@given(st.integers(0, 2**31), st.sampled_from([(1, 16), (16, 16)]))
@settings(max_examples=30, deadline=None)
def test_quantizing_what_was_dequantized_changes_nothing(seed: int, tile: tuple[int, int]) -> None:
    """Values that lie on the grid must stay there: amax is kept, so the same grid is chosen again."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    first = quantize_nvfp4(x, tile=tile)
    second = quantize_nvfp4(first.dequantize(torch.float32), tile=tile, amax=first.amax)
    assert torch.equal(second.dequantize(torch.float64), first.dequantize(torch.float64))


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_square_tiles_have_one_set_of_codes_for_both_directions(seed: int) -> None:
    """If not, forward and backward would use different weights (the chain rule the paper's 2-D scaling protects)."""
    w = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)).bfloat16()
    direct = quantize_nvfp4(w, tile=(16, 16)).operand()
    transposed = quantize_nvfp4(w.T.contiguous(), tile=(16, 16)).operand()
    assert torch.equal(direct, transposed.T)
    assert torch.equal(two_level(w, w.abs().amax().float(), tile=(16, 16), along=1), direct)


def test_one_compiled_kernel_hashes_the_addresses_of_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a constant, each tensor and step would compile a kernel of its own; eagerly it is some 60 launches."""
    compiled_stages: list[Any] = []

    def not_really(stage: Any, constants: dict[str, Any]) -> Any:
        compiled_stages.append(stage)
        return partial(stage, **constants)

    monkeypatch.setattr(compiled, "_compiled", not_really)
    passes = Passes(compile=True)
    rows, cols = torch.arange(64) + 1000, torch.arange(32) + 7
    for key in (key_of(0, "x"), key_of(1, "x"), key_of(1, "dy")):
        noise, expected = passes.noise(key, rows, cols, 8, centred=False), Noise.at(key, rows, cols)
        assert all(torch.equal(*pair) for pair in zip(noise[:3], expected[:3], strict=True))
        assert noise[3:] == expected[3:]
    assert compiled_stages == [address_words]


def test_every_kernel_is_compiled_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo counts recompilations per code object: two dozen kernels of one code would spend the limit of each other.

    torch 2.11, which benchmarks/gpu.sh bears, knows these arguments only.
    """
    codes: list[Any] = []

    def not_really(kernel: Any, *, fullgraph: bool, dynamic: bool) -> Any:
        codes.append(kernel.__code__)
        return kernel

    monkeypatch.setattr(torch, "compile", not_really)
    monkeypatch.setattr(compiled, "_LIMIT", {})
    passes, x = Passes(compile=True), torch.randn(32, 64)
    for kind in (x, x.bfloat16()):
        passes.block_maxima(kind, (1, 16))
    assert len({id(code) for code in codes}) == len(codes) == 2
    assert torch.equal(passes.block_maxima(x, (1, 16)), PASSES.block_maxima(x, (1, 16)))
