"""The largest logits are those that the softmax sees, whatever is masked and however the pass is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.context_parallel import zigzag_index
from megatron_fp4.layers.qk_clip import maxima as maxima_module
from megatron_fp4.layers.qk_clip.factors import head_factors, row_factors
from megatron_fp4.layers.qk_clip.maxima import LogitMaxima
from tests.layers.test_attention import RINGS, B, E, G, H, S, documents, masks_of, qkv


def written_out(q: Tensor, k: Tensor, docs: Tensor | None, window: int) -> Tensor:
    """The largest logit of each head, one query at a time."""
    largest = torch.full((H,), -torch.inf, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for s in range(S):
                near = range(max(0, s + 1 - window), s + 1)
                allowed = [j for j in near if docs is None or docs[b, j] == docs[b, s]]
                largest[h] = max(largest[h], (k[b, allowed, h // (H // G)] @ q[b, s, h]).max() / math.sqrt(E))
    return largest


@pytest.mark.parametrize("logits", [2**24, 3 * B * H * S, 1])
def test_masked_pairs_do_not_count_and_rows_may_be_cut(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxima_module, "LOGITS", logits)
    q, k, _ = qkv()
    k[:, S - 1] *= 100.0  # the last key is the last query's only; documents and window hide others
    for apart, window in RINGS:
        seen = LogitMaxima(H, torch.device("cpu"))
        seen.observe(q, k, masks_of(slice(None), Group.single(), apart, window), Group.single())
        expected = written_out(q, k, documents() if apart else None, window or S)
        torch.testing.assert_close(seen.values, expected.float())


@pytest.mark.parametrize("window", [0, 5])
def test_context_parallel_ranks_see_the_same_pairs_together(window: int) -> None:
    q, k, _ = qkv()
    ranks = []
    for rank in range(2):
        cp = Group("cp", (0, 1), rank, object())  # type: ignore[arg-type]
        seen = LogitMaxima(H, torch.device("cpu"))
        seen.observe(q[:, zigzag_index(S, cp)], k, masks_of(zigzag_index(S, cp), cp, False, window), cp)
        ranks.append(seen.values)
    torch.testing.assert_close(torch.stack(ranks).amax(0), written_out(q, k, None, window or S).float())


def test_microbatches_add_up_until_it_forgets_and_bf16_is_multiplied_in_fp32() -> None:
    q, k, _ = (x.bfloat16() for x in qkv())
    seen, alone = LogitMaxima(H, torch.device("cpu")), Group.single()
    seen.observe(q * 4, k, (None,), alone)
    seen.observe(q, k, (None,), alone)
    torch.testing.assert_close(seen.values, written_out(q.double() * 4, k.double(), None, S).float(), rtol=1e-6, atol=0)
    seen.forget()
    assert seen.values.tolist() == [-math.inf] * H


def test_a_group_is_scaled_by_its_largest_head_and_nothing_that_is_not_finite_clips() -> None:
    maxima = torch.tensor([[10.0, 400.0, 99.0, 100.0], [math.nan, 400.0, math.inf, 400.0]])
    queries, keys, clipped = head_factors(maxima, 2, threshold=100.0, alpha=0.25)
    torch.testing.assert_close(keys[0], torch.tensor([0.25**0.75, 1.0]))
    torch.testing.assert_close(queries[0], torch.tensor([0.25**0.25, 0.25**0.25, 1.0, 1.0]))
    assert queries[1].tolist() == [1.0] * 4
    assert keys[1].tolist() == [1.0] * 2
    assert clipped.tolist() == [[True, True, False, False], [False] * 4]
    rows = row_factors(torch.tensor([2.0, 3.0]), torch.tensor([5.0]), 2)
    assert rows.tolist() == [2, 2, 3, 3, 5, 5, 1, 1]


def test_powers_do_not_depend_on_the_place_in_a_vector() -> None:
    maxima = torch.linspace(101.0, 4000.0, 37)
    whole = head_factors(maxima, 37, threshold=100.0, alpha=0.3)
    for head in range(37):
        one = head_factors(maxima[head : head + 1], 1, threshold=100.0, alpha=0.3)
        assert (one.queries[0], one.keys[0]) == (whole.queries[head], whole.keys[head])
