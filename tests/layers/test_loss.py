"""Vocabulary-parallel cross-entropy against torch, where real frameworks got it wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.comm.collectives import even_counts
from megatron_fp4.layers.loss import IGNORE, vocab_parallel_cross_entropy
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
