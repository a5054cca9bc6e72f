"""Bytes that a rank sends, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_fp4.models.decoder import Recompute, whole_model
from megatron_fp4.models.partition import split_stages
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.traffic import bytes_sent
from tests.models.test_count import load


def test_traffic() -> None:
    """Each axis sends nothing at size 1, and the data axis 6 bytes a parameter (FP32 gradients, BF16 weights)."""
    config = load("gpt_1_2b")
    alone = bytes_sent(config, [whole_model(config)], RankSettings(num_microbatches=4))
    assert set(alone.values()) == {0.0}
    data = bytes_sent(config, [whole_model(config)], RankSettings(dp=2, num_microbatches=4))["data"]
    assert data == pytest.approx(6 * 1.2918e9 / 2, rel=1e-3)
    tensor = bytes_sent(config, [whole_model(config)], RankSettings(tp=2))["tensor"]
    assert tensor == (20 * 2 * 4 + 4) * 8192 * 2048 * 2 / 2 + 8192 * 28 + 41 * 2048 * 4  # rows, loss, norm weights


def test_traffic_of_a_pipeline() -> None:
    """Activations cross what lies between ranks, and nothing else: not the point of a V, not the ends of the model."""
    config = load("gpt_1_2b")
    stages, row_bytes = split_stages(config, 4), 8192 * 2048 * 2

    def sent(*numbers: int) -> float:
        return bytes_sent(config, [stages[number] for number in numbers], RankSettings(num_microbatches=3))["pipeline"]

    assert sent(0) == sent(3) == 3 * row_bytes  # one neighbour: activations or gradients
    assert sent(1) == 2 * 3 * row_bytes
    assert sent(0, 2) == sent(1, 3) == 3 * 3 * row_bytes  # looped: every border lies between ranks
    assert sent(0, 3) == 2 * 3 * row_bytes  # outer rank of a V
    assert sent(1, 2) == 2 * 3 * row_bytes  # at the point of the V: 1 -> 2 stays here


def test_recomputed_attention_gathers_its_keys_again() -> None:
    """A core that is computed twice sends twice; the linears around it do not."""
    config, settings = load("gpt_1_2b"), RankSettings(tp=2, cp=2)
    sent = {mode: bytes_sent(config, [whole_model(config)], replace(settings, recompute=mode)) for mode in Recompute}
    context = {mode.name: sent[mode]["context"] for mode in Recompute}
    assert context["selective"] == context["full"] == pytest.approx(1.5 * context["none"])
    tensor = {mode.name: sent[mode]["tensor"] for mode in Recompute}
    assert tensor["none"] == tensor["selective"] < tensor["full"]
