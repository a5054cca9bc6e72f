"""The chunked scan against the recurrence, in FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fp4.layers.mamba.convolution import causal_conv
from megatron_fp4.layers.mamba.ssd import document_starts, scan_masks, ssd_recurrence, ssd_scan


def inputs(batch: int, length: int, heads: int, groups: int, seed: int = 0) -> list[Tensor]:
    """x, dt, A, B, C in FP64 with head dim 3 and state 5."""
    torch.manual_seed(seed)
    x = torch.randn(batch, length, heads, 3, dtype=torch.float64)
    dt = torch.rand(batch, length, heads, dtype=torch.float64) + 0.01
    A = -torch.rand(heads, dtype=torch.float64) - 0.1
    B, C = torch.randn(2, batch, length, groups, 5, dtype=torch.float64)
    return [x, dt, A, B, C]


CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 8 + [1] * 3 + [2] + [3] * 25, [4] * 16 + [5] * 21])
"""Boundaries at, before and after the ends of chunks of 8; a document of one token; a long last one."""


@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("from_zero", [True, False])
def test_scan_equals_recurrence(chunk: int, documents: Tensor | None, from_zero: bool) -> None:
    args = inputs(2, 37, heads=4, groups=2)
    starts = None if documents is None else document_starts(documents)
    initial = None if from_zero else torch.randn(2, 4, 3, 5, dtype=torch.float64)
    y, final = ssd_scan(*args, chunk=chunk, masks=scan_masks(starts, chunk, CPU), initial=initial)
    expected_y, expected_final = ssd_recurrence(*args, starts_BS=starts, initial_BHPN=initial)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-12)  # a decay off by one token, or a wrong group
    torch.testing.assert_close(final, expected_final, rtol=0, atol=1e-12)  # padding that decays the state


def test_packed_documents_equal_separate_runs() -> None:
    """Independent of the recurrence's own handling of starts: each document alone gives the same outputs."""
    args = inputs(1, 37, heads=2, groups=1)
    documents = DOCUMENTS[:1]
    y, _ = ssd_scan(*args, chunk=8, masks=scan_masks(document_starts(documents), 8, CPU))
    for number in documents.unique():
        at = documents[0] == number
        alone, _ = ssd_scan(args[0][:, at], args[1][:, at], args[2], args[3][:, at], args[4][:, at], chunk=8)
        torch.testing.assert_close(y[:, at], alone, rtol=0, atol=1e-12)  # state leaks from the document before


def test_state_is_passed_on() -> None:
    """Two halves, the second from the state of the first, are one sequence; also when the state is found by a carry."""
    args = inputs(2, 30, heads=4, groups=4)
    whole, last = ssd_scan(*args, chunk=8)
    halves = [[part[:, rows] if part.dim() > 1 else part for part in args] for rows in (slice(13), slice(13, None))]
    first, state = ssd_scan(*halves[0], chunk=8)
    second, final = ssd_scan(*halves[1], chunk=8, initial=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(final, last, rtol=0, atol=1e-12)

    def carry(from_zero: Tensor, survives: Tensor) -> Tensor:
        # what the carry is told must describe the sequence, or context parallelism would be silently wrong
        torch.testing.assert_close(from_zero + survives[..., None, None] * state, last, rtol=0, atol=1e-12)
        return state

    carried, _ = ssd_scan(*halves[1], chunk=8, initial=carry)
    torch.testing.assert_close(carried, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed: bool) -> None:
    """Against finite differences; masked exponentials are where NaN gradients would come from."""
    args = [part.requires_grad_() for part in inputs(1, 11, heads=2, groups=1)]
    initial = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    starts = document_starts(torch.tensor([[0] * 4 + [1] * 7])) if packed else None

    def scan(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan(*parts[:5], chunk=4, masks=scan_masks(starts, 4, CPU), initial=parts[5])

    assert torch.autograd.gradcheck(scan, (*args, initial))


def test_strong_decay_has_finite_gradients_in_fp32() -> None:
    """exp(cumulative_i - cumulative_j) overflows above the diagonal: it must be masked before the exponential."""
    args = [part.float().requires_grad_() for part in inputs(1, 64, heads=2, groups=1)]
    y, _ = ssd_scan(args[0], args[1] * 50, args[2], args[3], args[4], chunk=64)
    y.sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in args)


def test_bf16_inputs_are_scanned_in_fp32() -> None:
    args = [part.bfloat16() for part in inputs(1, 64, heads=2, groups=1)]
    y, state = ssd_scan(*args, chunk=16)
    expected, _ = ssd_recurrence(*(part.double() for part in args))
    assert y.dtype == state.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)  # BF16 anywhere inside would give 1e-2


def test_causal_conv_is_torchs_depthwise_conv() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 10, 6), torch.randn(6, 4), torch.randn(6)
    expected = torch.nn.functional.conv1d(x.mT, weight[:, None], bias, padding=3, groups=6)[..., :10].mT
    y = causal_conv(x, torch.zeros(2, 3, 6), weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.silu(expected))  # taps in reverse order, or not causal


@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv_gradients(packed: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 6, 3), (2, 3, 3), (3, 4), (3,)]
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    documents = torch.tensor([[0] * 5 + [1] * 4, [0, 1, 2, 2, 2, 3, 3, 3, 4]]) if packed else None
    assert torch.autograd.gradcheck(lambda *args: causal_conv(*args, documents), parts)
