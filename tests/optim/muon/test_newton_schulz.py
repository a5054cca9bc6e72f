"""The orthogonalization is torch's where it does the same, and close to the polar factor where it should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from megatron_fp4.optim.muon.config import SIMPLE, NewtonSchulz, UpdateScale
from megatron_fp4.optim.muon.newton_schulz import SMALLEST_NORM, orthogonalization_flops, orthogonalize

SHAPES = [(64, 64), (128, 48), (48, 128), (7, 5), (1, 16)]
SINGULAR_VALUES = {  # of the result, for those of a matrix between 1/30 and 1 of the largest
    NewtonSchulz.simple: (0.6, 1.3),
    NewtonSchulz.quintic: (0.65, 1.25),
    NewtonSchulz.polar_express: (0.995, 1.005),
    NewtonSchulz.deepseek_v4: (0.99, 1.01),
}


def matrix_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_torchs_bit_for_bit_with_torchs_settings(shape: tuple[int, int]) -> None:
    x = matrix_of(shape)
    ours = orthogonalize(x, NewtonSchulz.simple.triples, dtype=torch.bfloat16, norm_dtype=torch.bfloat16)
    assert torch.equal(ours, _zeropower_via_newtonschulz(x, SIMPLE, 5, SMALLEST_NORM))


@pytest.mark.parametrize("kind", NewtonSchulz)
def test_singular_values_come_close_to_one_and_vectors_stay(kind: NewtonSchulz) -> None:
    u, _, vt = torch.linalg.svd(matrix_of((48, 96)).double(), full_matrices=False)
    values = torch.logspace(0, -1.5, 48, dtype=torch.float64)
    result = orthogonalize((u * values @ vt).float(), kind.triples, dtype=torch.float32).double()
    seen = u.T @ result @ vt.T
    low, high = SINGULAR_VALUES[kind]
    assert float((seen - seen.diagonal().diag()).abs().max()) < 1e-4, "the singular vectors turned"
    assert low < float(seen.diagonal().min()) <= float(seen.diagonal().max()) < high


POLAR = {  # docs/optimizers.md: relative distance to the polar factor, in FP32 and in BF16
    NewtonSchulz.simple: (0.20, 0.20),
    NewtonSchulz.quintic: (0.05, 0.06),
    NewtonSchulz.polar_express: (1e-5, 0.03),
    NewtonSchulz.deepseek_v4: (3e-4, 0.03),
}


@pytest.mark.parametrize("kind", NewtonSchulz)
def test_the_distance_to_the_polar_factor_is_as_documented(kind: NewtonSchulz) -> None:
    """The polar factor by a singular value decomposition in FP64, of a matrix with condition 100."""
    random = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(rows, 96, generator=random, dtype=torch.float64))[0] for rows in (96, 256)
    )
    x = (left * torch.logspace(0, -2, 96, dtype=torch.float64) @ right.T).float()
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    for dtype, limit in zip((torch.float32, torch.bfloat16), POLAR[kind], strict=True):
        result = orthogonalize(x, kind.triples, dtype=dtype).double()
        distance = float((result - u @ vt).norm() / (u @ vt).norm())
        print(f"{kind.name:<14} {dtype!s:<15} {distance:.1e}")
        assert distance < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_left_alone_and_its_scale_does_not_matter(dtype: torch.dtype) -> None:
    x = matrix_of((24, 40)).to(dtype)
    before = x.clone()
    results = [
        orthogonalize(x * scale, NewtonSchulz.quintic.triples, dtype=dtype) for scale in (1.0, 2.0**40, 2.0**-40)
    ]
    assert torch.equal(x, before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_zeros_stay_zeros() -> None:
    assert not orthogonalize(torch.zeros(8, 4), NewtonSchulz.quintic.triples, dtype=torch.bfloat16).any()


def test_scales() -> None:
    assert [scale.factor(400, 100) for scale in (UpdateScale.shape, UpdateScale.spectral, UpdateScale.unit_rms)] == [
        2.0,
        20.0,
        2.0,
    ]
    assert UpdateScale.shape.factor(100, 400) == 1.0
    assert UpdateScale.unit_rms.factor(100, 400) == 0.5
    assert UpdateScale.match_adamw_rms.factor(100, 400) == pytest.approx(4.0)


def test_flops_are_those_of_the_products() -> None:
    counter = FlopCounterMode(display=False)
    with counter:
        orthogonalize(matrix_of((48, 16)), NewtonSchulz.quintic.triples, dtype=torch.float32)
    assert counter.get_total_flops() == orthogonalization_flops(48, 16, 5)
