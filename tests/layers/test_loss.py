"""Vocabulary-parallel cross-entropy against torch, where real frameworks got it wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.comm.collectives import even_counts
from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers import loss as loss_module
from megatron_fp4.layers.loss import IGNORE, vocab_parallel_cross_entropy, vocab_parallel_distillation
from megatron_fp4.planning.footprint import LiveBytes
from tests.helpers.distributed import run_distributed, world_group

TOKENS, VOCABULARY = 12, 101  # 101 is divisible by neither 2 nor 4


def case(scale: float) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCABULARY, generator=random) * scale
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=random)
    labels[3] = IGNORE
    return logits, labels


CASES = [(1.0, 0.0), (1e4, 0.0), (3.0, 0.1)]  # (scale of the logits, label smoothing)


def _shards(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """Per case: loss and gradient of this rank's vocabulary rows."""
    counts = even_counts(VOCABULARY, world_size)
    first = sum(counts[:rank])
    group, shards = world_group(rank, world_size), []
    for scale, smoothing in CASES:
        logits, labels = case(scale)
        local = logits[:, first : first + counts[rank]].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(
            local, labels, first=first, vocab_size=VOCABULARY, group=group, smoothing=smoothing
        )
        loss.sum().backward()
        assert local.grad is not None
        shards.append((loss.detach(), local.grad))
    return shards


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_against_torch(world_size: int) -> None:
    ranks = [_shards(0, 1)] if world_size == 1 else run_distributed(_shards, world_size)
    for number, (scale, smoothing) in enumerate(CASES):
        logits, labels = case(scale)
        logits.requires_grad_()
        expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)
        expected.sum().backward()
        for loss, _ in (shards[number] for shards in ranks):
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-5 * scale)
            assert loss[3] == 0.0, "an ignored position has no loss"
        gradient = torch.cat([shards[number][1] for shards in ranks], dim=1)
        assert logits.grad is not None
        torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-6)
        assert bool((gradient[3] == 0).all()), "an ignored position has no gradient"


@pytest.mark.parametrize("label", [VOCABULARY, 10**6, -1])
def test_a_label_that_is_no_id_has_no_plausible_loss(label: int) -> None:
    logits, labels = case(1.0)
    labels[5] = label
    logits.requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, labels, first=0, vocab_size=VOCABULARY, group=world_group(0, 1))
    loss.sum().backward()
    assert logits.grad is not None
    assert torch.isnan(loss).nonzero().flatten().tolist() == [5]
    assert torch.isnan(logits.grad).any(dim=1).nonzero().flatten().tolist() == [5], "the step would update"


def test_a_rank_adds_what_its_rows_of_the_vocabulary_know() -> None:
    """Rows 10 to 12 of 20: a label before or behind them is another rank's, an ignored one nobody's.

    Here nobody else adds anything, so a token whose label is elsewhere has log(sum exp(z - max z)), and the softmax as
    its gradient.
    """
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 6, requires_grad=True)
    labels = torch.tensor([10, 12, 9, 13, IGNORE, 19])
    loss = vocab_parallel_cross_entropy(logits, labels, first=10, vocab_size=20, group=Group.single())
    sum_of_exp = math.exp(-2) + 1 + math.exp(-1)
    elsewhere = math.log(sum_of_exp)
    expected = [elsewhere + 2, elsewhere + 1, elsewhere, elsewhere, 0.0, elsewhere]
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.sum().backward()
    softmax = torch.tensor([math.exp(-2), 1.0, math.exp(-1)]) / sum_of_exp
    first, last = softmax - torch.tensor([1.0, 0, 0]), softmax - torch.tensor([0, 0, 1.0])
    rows = [first, last, softmax, softmax, torch.zeros(3), softmax]
    torch.testing.assert_close(logits.grad, torch.stack(rows))


def test_a_label_behind_the_vocabulary_has_no_loss_though_padded_rows_hold_it() -> None:
    """A vocabulary of 20 in 24 rows: 19 is a token, 20 is padding, -1 is none."""
    logits = torch.zeros(3, 24)
    loss = vocab_parallel_cross_entropy(
        logits, torch.tensor([19, 20, -1]), first=0, vocab_size=20, group=Group.single()
    )
    assert loss[0] == pytest.approx(math.log(24))
    assert loss.isnan().tolist() == [False, True, True]


def test_sums_of_the_vocabulary_are_in_fp64() -> None:
    """Terms of 2^-26 beside a 1 are lost one by one in FP32; 2^17 of them are 2^-9 together."""
    logits = torch.full((1, 2**17 + 1), math.log(2.0**-26))
    logits[0, 0] = 0.0
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([0]), first=0, vocab_size=2**17 + 1, group=Group.single())
    assert loss.item() == pytest.approx(math.log1p(2.0**-9), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_of_tokens_change_no_bit(dtype: torch.dtype, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (2**24, 2**10):
        monkeypatch.setattr(loss_module, "CHUNK", chunk)
        logits, labels = many_logits(dtype)
        loss = vocab_parallel_cross_entropy(
            logits, labels, first=0, vocab_size=MANY, group=Group.single(), smoothing=smoothing
        )
        (loss * torch.linspace(0.5, 2.0, len(loss))).sum().backward()
        assert logits.grad is not None
        results.append((loss.detach(), logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


MANY = 256


def many_logits(dtype: torch.dtype, tokens: int = 259) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(tokens, MANY, generator=random)).to(dtype).requires_grad_()
    labels = torch.randint(0, MANY, (tokens,), generator=random)
    labels[100] = IGNORE
    return logits, labels


def test_nothing_but_the_logits_is_as_long_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 and FP64 of a chunk and some numbers a token; all at once it was 12 bytes a logit forward, 10 backward."""
    monkeypatch.setattr(loss_module, "CHUNK", 2**13)
    logits, labels = many_logits(torch.bfloat16, tokens=4096)
    with LiveBytes() as live:
        loss = vocab_parallel_cross_entropy(logits, labels, first=0, vocab_size=MANY, group=Group.single()).sum()
        loss.backward()
    assert live.peak < 16 * loss_module.CHUNK + 100 * len(labels) < 0.3 * logits.nbytes


def test_who_kept_the_logits_is_refused_their_gradient() -> None:
    logits, labels = many_logits(torch.float32)
    squares = logits.square().sum()
    loss = vocab_parallel_cross_entropy(logits, labels, first=0, vocab_size=MANY, group=Group.single()).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + loss).backward()


HOW = [(1.0, 1.0), (0.3, 2.0)]  # (weight of the teacher, temperature)


def _distilled_shards(rank: int, world_size: int) -> list[tuple[Tensor, ...]]:
    """Per way: what is minimized, its two parts, and the gradient of this rank's vocabulary rows."""
    counts = even_counts(VOCABULARY, world_size)
    first = sum(counts[:rank])
    group, shards = world_group(rank, world_size), []
    for weight, temperature in HOW:
        logits, labels = case(3.0)
        own = slice(first, first + counts[rank])
        local = logits[:, own].clone().requires_grad_()
        parts = vocab_parallel_distillation(
            local,
            logits.flip(0)[:, own],
            labels,
            first=first,
            vocab_size=VOCABULARY,
            weight=weight,
            temperature=temperature,
            group=group,
        )
        parts.minimized.sum().backward()
        assert local.grad is not None
        shards.append((*(part.detach() for part in parts), local.grad))
    return shards


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_divergence_from_a_teacher_against_torch(world_size: int) -> None:
    ranks = [_distilled_shards(0, 1)] if world_size == 1 else run_distributed(_distilled_shards, world_size)
    for number, (weight, temperature) in enumerate(HOW):
        logits, labels = case(3.0)
        logits = logits.double().requires_grad_()
        entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        log_p, log_q = ((one / temperature).log_softmax(-1) for one in (logits.detach().flip(0), logits))
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * (labels != IGNORE)
        expected = (1 - weight) * entropy + weight * temperature**2 * divergence
        expected.sum().backward()
        for shards in ranks:
            for got, right in zip(shards[number][:3], (expected, entropy, divergence), strict=True):
                torch.testing.assert_close(got.double(), right.detach(), rtol=1e-6, atol=1e-5)
                assert got[3] == 0.0, "an ignored position has no loss"
        gradient = torch.cat([shards[number][3] for shards in ranks], dim=1)
        assert logits.grad is not None
        torch.testing.assert_close(gradient.double(), logits.grad, rtol=1e-5, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    logits, labels = case(1.0)
    student = logits.clone().requires_grad_()
    parts = vocab_parallel_distillation(
        student, logits, labels, first=0, vocab_size=VOCABULARY, weight=1.0, temperature=1.0, group=world_group(0, 1)
    )
    parts.minimized.sum().backward()
    assert not parts.divergence.any()
    assert student.grad is not None
    assert not student.grad.any()
