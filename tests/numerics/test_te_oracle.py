"""Codes, scales and amax against Transformer Engine's reference quantizer, byte for byte, on 46 million elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fp4.numerics import quantize_nvfp4, random_hadamard
from tests.numerics.te_oracle import load_reference, reference_quantizer

SHAPES = [(16, 16), (32, 64), (48, 272), (128, 128), (256, 512), (1024, 4096)]


def _ties() -> Tensor:
    """A tensor that scales by exactly 1, with a value at every decision point and one ulp to each side."""
    points = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0])
    up, down = torch.nextafter(points, points + 9), torch.nextafter(points, points - 9)
    values = torch.cat([points, up, down, points.bfloat16().float() * (1 + 2**-7), points * (1 - 2**-8)])
    values = torch.cat([values, -values]).clamp(-6, 6)
    rows = torch.zeros(len(values), 16)
    rows[:, 0], rows[:, 7] = 6.0, values  # the block maximum is 6: its scale is 448 when the tensor's maximum is 6
    rows = torch.cat([rows, rows.flip(1)])[: len(values) // 16 * 16]
    return rows


def _tensors(shape: tuple[int, int]) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(shape[0] * 7919 + shape[1])
    gauss = torch.randn(shape, generator=gen)
    heavy = gauss / torch.randn(shape, generator=gen).abs().clamp(min=1e-4) ** 1.5
    outlier = gauss.clone()
    outlier[shape[0] // 2, shape[1] // 3] = 1e6
    holes = gauss.clone()
    holes[:, : shape[1] // 2] = 0
    wide = gauss * torch.exp2(torch.randint(-30, 30, shape, generator=gen).float())
    return {"gauss": gauss, "heavy": heavy, "outlier": outlier, "zero_blocks": holes, "wide": wide}


def _special() -> dict[str, Tensor]:
    tiny = torch.full((32, 32), 2.0**-133)
    tiny[::3] = 2.0**-140
    mixed = torch.full((32, 32), 2.0**-130)
    mixed[0, 0] = 1.0
    huge = torch.full((32, 32), torch.finfo(torch.bfloat16).max)
    huge[:, 1::2] *= -0.3
    signed_zero = torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    signed_zero[::2, ::2] = -0.0
    return {
        "zeros": torch.zeros(32, 32),
        "constant": torch.full((32, 32), 1.7),
        "denormals": tiny,
        "one_and_denormals": mixed,
        "bf16_max": huge,
        "negative_zero": signed_zero,
        "ties": _ties(),
    }


def _canonical(packed: Tensor) -> Tensor:
    """-0 as +0: TE's reference drops the sign of zero, its kernels keep it (they agree on every other code)."""
    low, high = packed & 0xF, packed >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


def _assert_same(ours, codes: Tensor, scales: Tensor, amax: Tensor, what: str) -> int:  # type: ignore[no-untyped-def]
    assert torch.equal(ours.amax.view(-1), amax.view(-1)), f"{what}: amax"
    assert torch.equal(ours.scales.view(torch.uint8), scales.view(torch.uint8)), f"{what}: E4M3 block scales"
    wrong = (_canonical(ours.codes) != _canonical(codes)).sum().item()
    assert wrong == 0, f"{what}: {wrong} bytes of codes differ"
    return 2 * codes.numel()


def _compare(x: Tensor, tile: tuple[int, int], rht: bool, what: str) -> int:
    """Row-wise and column-wise copies against TE. Returns the number of elements compared."""
    oracle = reference_quantizer(quant_tile_shape=tile, with_rht=rht).quantize(x)
    compared = 0
    if not rht:
        ours = quantize_nvfp4(x, tile=tile)
        compared += _assert_same(ours, oracle.data, oracle.scale, oracle.global_amax_row, f"{what} row-wise")
    transposed = x.T.contiguous()
    ours = quantize_nvfp4(random_hadamard(transposed) if rht else transposed, tile=tile)
    return compared + _assert_same(ours, oracle.data_t, oracle.scale_t, oracle.global_amax_col, f"{what} column-wise")


def test_codes_scales_and_amax_equal_transformer_engine() -> None:
    """Any difference: our arithmetic, its order, a tie or the packing is not what the hardware library does."""
    load_reference()
    compared = 0
    for shape in SHAPES:
        for name, x in _tensors(shape).items():
            if shape == (1024, 4096) and name not in ("gauss", "heavy"):
                continue
            for tile, rht in (((1, 16), False), ((1, 16), True), ((16, 16), False)):
                what = f"{name} {shape} tile {tile} rht {rht}"
                compared += _compare(x.bfloat16(), tile, rht, what)
    assert compared > 45_000_000, compared


@pytest.mark.parametrize("name", list(_special()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tile", "rht"), [((1, 16), False), ((1, 16), True), ((16, 16), False)])
def test_special_values_equal_transformer_engine(
    name: str, dtype: torch.dtype, tile: tuple[int, int], rht: bool
) -> None:
    """A difference here only: a corner (zero blocks, denormals, saturation, ties) is treated in another way."""
    x = _special()[name].to(dtype)
    x = x[: x.shape[0] // 16 * 16]
    if rht and (dtype != torch.bfloat16 or not torch.isfinite(random_hadamard(x)).all()):
        pytest.skip("Transformer Engine transforms BF16 only, and this tensor overflows in the transform")
    if rht and "denormals" in name:  # a CPU's BF16 matmul, with which the oracle transforms, flushes denormals to zero
        x, rht = random_hadamard(x.T.contiguous()).T.contiguous(), False
    _compare(x, tile, rht, f"{name} {dtype}")


@pytest.mark.parametrize("tile", [(1, 16), (16, 16)])
@pytest.mark.parametrize("bound", [256, 448])
@pytest.mark.parametrize("measure", ["mae", "mse"])
def test_four_over_six_equals_transformer_engine(tile: tuple[int, int], bound: int, measure: str) -> None:
    """A difference: the candidates, their errors, the order of the sum or the choice in a tie are not TE's."""
    quantizer = reference_quantizer(
        quant_tile_shape=tile, nvfp4_use_4over6=True, nvfp4_e4m3_max=bound, nvfp4_4over6_err_mode=measure
    )
    for name, x in {**_tensors((256, 512)), "zeros": torch.zeros(32, 32)}.items():
        x = x.bfloat16()
        oracle = quantizer.quantize(x)
        ours = quantize_nvfp4(x, tile=tile, four_over_six=measure, bound=bound)
        _assert_same(ours, oracle.data, oracle.scale, oracle.global_amax_row, f"4/6 {name} {tile} {bound} {measure}")


def test_row_scaled_equals_transformer_engine() -> None:
    """A difference: with one global scale per row, the scale is taken over the wrong elements."""
    quantizer = reference_quantizer(row_scaled_nvfp4=True, columnwise=False)
    for name, x in _tensors((128, 256)).items():
        x = x.bfloat16()
        oracle = quantizer.quantize(x)
        ours = quantize_nvfp4(x, amax=x.abs().amax(1, keepdim=True).float())
        _assert_same(ours, oracle.data, oracle.scale, oracle.global_amax_row, f"row-scaled {name}")
