"""Moments in 8 bits: encoding again changes nothing, rounding is right in the mean, no second moment becomes 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim import OptimConfig, Zero1Optimizer
from megatron_fp4.optim.kept.codes import Codes, Fp8, Int8, RootInt8, UnsignedFp8
from megatron_fp4.optim.kept.config import BLOCK, MasterFormat, MomentFormat, MomentsConfig
from megatron_fp4.optim.kept.stores import RUNNERS, moment_store

BLOCKS = (MomentFormat.fp8, MomentFormat.int8)
CODES: dict[str, Codes] = {"int8": Int8(), "fp8": Fp8(), "int8 root": RootInt8(), "unsigned fp8": UnsignedFp8()}
LARGEST_STEP = {"int8": 1 / 64, "fp8": 1 / 7, "int8 root": 2 / 127, "unsigned fp8": 1 / 8}  # of the block's largest


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**31), 2**31, (count, BLOCK), generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def values(codes: Codes, count: int = 512) -> Tensor:
    """Blocks of every scale, of which some elements are much smaller than others, and some 0."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, BLOCK, generator=random) * 2.0 ** torch.randint(-18, 1, (count, BLOCK), generator=random)
    x *= 2.0 ** torch.randint(-40, 20, (count, 1), generator=random)
    x[torch.rand(count, BLOCK, generator=random) < 0.05] = 0.0
    x[0] = 0.0
    return x.square() if isinstance(codes, RootInt8 | UnsignedFp8) else x


@pytest.mark.parametrize("name", CODES)
def test_what_was_decoded_is_encoded_to_the_same_value(name: str) -> None:
    codes = CODES[name]
    x = values(codes)
    once = codes.decode(*codes.encode(x, words(len(x))))
    for seed in (1, 2):
        twice = codes.decode(*codes.encode(once, words(len(x), seed)))
        assert torch.equal(twice, once), "a resume would change moments"
    scale = x.abs().amax(1, keepdim=True)
    assert bool(((once - x).abs() <= LARGEST_STEP[name] * scale).all())
    assert torch.equal(once[0], x[0])


@pytest.mark.parametrize("name", CODES)
def test_the_mean_of_many_roundings_is_the_value(name: str) -> None:
    codes = CODES[name]
    row = values(codes, 2)[1:].abs().clamp(min=0) + values(codes, 2)[1:].abs().amax() / 300
    x = row.expand(4096, BLOCK).contiguous()
    rounded = codes.decode(*codes.encode(x, words(4096)))
    deviation = rounded.double().std(0) / 64
    off = (rounded.double().mean(0) - row[0]).abs()
    assert bool((off <= 5 * deviation + 1e-6 * row[0]).all()), "rounding is biased"


@pytest.mark.parametrize("name", ["int8 root", "unsigned fp8"])
def test_no_second_moment_becomes_zero(name: str) -> None:
    x = torch.ones(1, BLOCK)
    x[0, 1:] = 2.0 ** -torch.arange(1, BLOCK).float()
    x[0, -1] = 0.0
    kept = CODES[name].decode(*CODES[name].encode(x, torch.zeros(1, BLOCK, dtype=torch.int32)))
    assert bool((kept[0, :-1] > 0).all()), "a small second moment would divide by eps"
    assert kept[0, -1] == 0


def test_bf16_rounds_in_the_mean_and_keeps_what_it_holds() -> None:
    store = moment_store(MomentFormat.bf16, 2**16, torch.device("cpu"), unsigned=False)
    x = torch.full((2**16,), -1.0 - 2.0**-9)  # a quarter of the way to the next one
    store.write(0, 2**16, x, words(2**10).view(-1))
    assert abs(float((store.read(0, 2**16) != -1.0).double().mean()) - 0.25) < 0.01
    once = store.read(0, 2**16).clone()
    store.write(0, 2**16, once, words(2**10, 1).view(-1))
    assert torch.equal(store.read(0, 2**16), once)


@pytest.mark.parametrize(
    ("format", "unsigned"), [(MomentFormat.bf16, False)] + [(one, of) for one in BLOCKS for of in (False, True)]
)
def test_compiled_conversions_of_any_number_give_the_same_bits(format: MomentFormat, unsigned: bool) -> None:
    """Any bits that are a finite number, denormals, zeros of both signs, the largest, and blocks of all scales."""
    random = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (128, BLOCK), generator=random).to(torch.int32)
    some = (bits, bits & 0x7FFFFF, torch.zeros_like(bits), torch.full_like(bits, -(2**31)), bits | 0x7F7FFFFF)
    drawn = torch.cat([one.view(torch.float32) for one in some]).nan_to_num(0.0, 0.0, 0.0)
    scales = 2.0 ** torch.randint(-148, 120, (1024, 1), generator=random)
    x = torch.cat([drawn, torch.randn(1024, BLOCK, generator=random) * scales])
    noise = words(len(x))
    if unsigned:
        x = x.abs()
        root = x.double().sqrt() / 2.0 ** (x.double().sqrt().amax(1, keepdim=True) / 255).log2().ceil()
        below = root.floor()
        where = (root.square() - below.square()) / (2 * below + 1)  # words that decide by the last bit of a root
        noise = (where.nan_to_num(0.0) * 2**16).int()
    kept: list[list[Tensor]] = []
    for run in RUNNERS.values():
        store = moment_store(format, x.numel(), x.device, run, unsigned=unsigned)
        store.write(0, x.numel(), x.view(-1), noise.view(-1))
        kept.append([*(one.view(torch.uint8) for one in store.tensors), store.read(0, x.numel()).view(torch.int32)])
    assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))


def test_compiled_conversions_give_the_same_bits() -> None:
    """Whole updates, of three steps: the words, and both ways of each code."""
    kept: list[list[Tensor]] = []
    for compile in (False, True):
        weight = LogicalParameter.whole("w", torch.linspace(-1, 1, 24 * BLOCK).view(8, -1).bfloat16())
        moments = MomentsConfig(MomentFormat.int8, MomentFormat.int8)
        config = OptimConfig(master=MasterFormat.remainder, moments=moments)
        optimizer = Zero1Optimizer([("w", weight)], config, ParallelMesh.single_process(), True, compile=compile)
        for step in range(3):
            optimizer.zero_grad()
            assert weight.main_grad is not None
            weight.main_grad.normal_(generator=torch.Generator().manual_seed(step))
            optimizer.step(optimizer.finish_grads(), lr=0.1, max_norm=1.0)
        kept.append([weight.detach().clone(), *optimizer.kept_tensors()])
    eager, compiled = kept
    assert all(torch.equal(*pair) for pair in zip(eager, compiled, strict=True))
