"""Sign vectors are made once, not once per transform."""

from __future__ import annotations

from unittest import mock

import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.precision import EmulatedBackend, Format, Operand, Signs
from megatron_fp4.precision.backends import Copy, OperandOrigin, randomness
from megatron_fp4.precision.backends.randomness import SignVectors, signs_for

CPU = torch.device("cpu")


def origin(name: str, step: int, seed: int = 1) -> OperandOrigin:
    index = torch.arange(32)
    return OperandOrigin(name, "x", index, index, Group.single(), seed=seed, step=step)


def test_signs_are_made_once() -> None:
    """Two microbatches of two linears in two steps; the fixed ones once in all, those of a step once per linear."""
    x = torch.randn(32, 32)
    for signs, expected in ((Signs.fixed, 1), (Signs.per_step, 2 * 2)):
        backend, operand = EmulatedBackend(), Operand(Format.nvfp4, rht_size=16, rht_signs=signs)
        with mock.patch.object(randomness, "signs_for", wraps=signs_for) as computed:
            for step in range(2):
                for name in 2 * ("up", "down"):
                    backend.quantize(x, origin(name, step), [Copy("wgrad", operand, 0)])
        assert computed.call_count == expected, signs


def test_signs_of_a_step_are_those_of_that_step() -> None:
    """A step that is made again after another one, as in a replay, has its own; other seeds have others."""
    operand, vectors = Operand(Format.nvfp4, rht_size=64, rht_signs=Signs.per_step), SignVectors()
    for step, seed in ((0, 1), (1, 1), (0, 1), (0, 2)):
        for name in ("up", "down"):
            at = origin(name, step, seed)
            kept, expected = vectors.of(at, operand, CPU), signs_for(at, operand, CPU)
            assert kept is not None
            assert expected is not None
            assert torch.equal(kept, expected)
