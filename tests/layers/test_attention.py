"""Attention: grouped heads, documents kept apart, the zig-zag split over context-parallel ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.attention import attend, attention_masks
from megatron_fp4.layers.context_parallel import (
    context_parallel_attention,
    gather_sequence,
    in_sequence_order,
    zigzag_index,
)
from megatron_fp4.layers.layer_context import Tokens
from megatron_fp4.layers.rope import RopeScalingConfig, apply_rope, rope_angles, rope_frequencies
from tests.helpers.distributed import run_distributed, world_group

B, S, H, G, E = 2, 16, 4, 2, 8


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, S, heads, E, generator=random, dtype=torch.float64) for heads in (H, G, G))  # type: ignore[return-value]


def documents() -> Tensor:
    return torch.tensor([[0] * 5 + [1] * 11, [0] * 16])


WINDOW = 5


def oracle(q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, window: int = S) -> Tensor:
    """Softmax attention written out, one query at a time."""
    out = torch.zeros(B, S, H, E, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for s in range(S):
                near = range(max(0, s + 1 - window), s + 1)
                allowed = [j for j in near if docs is None or docs[b, j] == docs[b, s]]
                weights = (k[b, allowed, g] @ q[b, s, h] / math.sqrt(E)).softmax(0)
                out[b, s, h] = weights @ v[b, allowed, g]
    return out


def test_causal_and_documents_against_the_written_out_sum() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, None), oracle(q, k, v, None))
    for apart, window in RINGS:
        (mask,) = masks_of(slice(None), Group.single(), apart, window)
        expected = oracle(q, k, v, documents() if apart else None, window or S)
        torch.testing.assert_close(attend(q, k, v, mask), expected)


def masks_of(columns: Tensor | slice, cp: Group, apart: bool, window: int) -> tuple[Tensor | None, ...]:
    ids = documents()[:, columns]
    return attention_masks(Tokens(ids, ids, ids), cp, keep_documents_apart=apart, window=window, dtype=torch.float64)


def test_masks_are_numbers_as_torch_makes_them_of_booleans() -> None:
    """So that they are made once and kept once, not in every layer; a mask that says "causal" is none."""
    booleans = (documents()[:, :, None] == documents()[:, None, :])[:, None] & torch.ones(S, S).tril().bool()
    (mask,) = masks_of(slice(None), Group.single(), True, 0)
    assert mask is not None
    assert torch.equal(mask == 0, booleans)
    assert torch.equal(mask == -torch.inf, ~booleans)
    assert masks_of(slice(None), Group.single(), False, 0) == (None,)
    assert masks_of(slice(None), Group.single(), False, S) == (None,)
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in qkv())
        assert torch.equal(attend(q, k, v, booleans), attend(q, k, v, mask.to(dtype)))


def _rings(rank: int, world_size: int) -> list[tuple[Tensor, list[Tensor]]]:
    cp = world_group(rank, world_size)
    return [_ring(cp, *case) for case in RINGS]


RINGS = [(False, 0), (True, 0), (False, WINDOW), (True, WINDOW)]
"""Documents kept apart, and a sliding window, 0 for none."""


def _ring(cp: Group, apart: bool, window: int) -> tuple[Tensor, list[Tensor]]:
    columns = zigzag_index(S, cp)
    q, k, v = (x[:, columns].clone().requires_grad_() for x in qkv())
    keys, values = gather_sequence(k, cp), gather_sequence(v, cp)
    out = context_parallel_attention(q, keys, values, masks_of(columns, cp, apart, window), cp)
    (out * torch.arange(S, dtype=torch.float64)[columns][None, :, None, None]).sum().backward()
    return out.detach(), [x.grad for x in (q, k, v) if x.grad is not None]


def test_context_parallel_equals_one_rank() -> None:
    ranks = run_distributed(_rings, 2)
    for number, (apart, window) in enumerate(RINGS):
        q, k, v = (x.requires_grad_() for x in qkv())
        expected = oracle(q, k, v, documents() if apart else None, window or S)
        (expected * torch.arange(S, dtype=torch.float64)[None, :, None, None]).sum().backward()
        for rank, results in enumerate(ranks):
            out, grads = results[number]
            columns = zigzag_index(S, Group("cp", (0, 1), rank, object()))  # type: ignore[arg-type]
            torch.testing.assert_close(out, expected[:, columns].detach())
            for name, grad, whole in zip("qkv", grads, (q, k, v), strict=True):
                assert whole.grad is not None
                torch.testing.assert_close(grad, whole.grad[:, columns], msg=f"gradient of {name} on rank {rank}")


def test_zigzag_gives_every_rank_the_same_causal_work() -> None:
    groups = [Group("cp", (0, 1, 2, 3), rank, object()) for rank in range(4)]  # type: ignore[arg-type]
    indices = [zigzag_index(64, group) for group in groups]
    assert {int(index.sum()) for index in indices} == {int(torch.arange(64).sum()) // 4}, "unequal causal work"
    gathered = torch.stack(indices)
    assert torch.equal(in_sequence_order(gathered, groups[0]), torch.arange(64))
    with pytest.raises(ValueError, match="60 is not divisible by 2 \\* cp = 8"):
        zigzag_index(60, groups[0])


def test_rope_turns_by_position_only() -> None:
    positions = torch.arange(S)[None]
    x = torch.randn(1, S, 1, E, generator=torch.Generator().manual_seed(2))
    turned = apply_rope(x, *rope_angles(positions, rope_frequencies(E, 10000.0, RopeScalingConfig())))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    same = apply_rope(
        x[:, :1].expand(-1, S, -1, -1), *rope_angles(positions, rope_frequencies(E, 10000.0, RopeScalingConfig()))
    )[0, :, 0]
    products = same @ same.T
    torch.testing.assert_close(products.diagonal(1), products.diagonal(1)[:1].expand(S - 1), rtol=1e-4, atol=1e-4)
