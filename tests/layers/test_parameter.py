"""Parameters are filled block by block: what is drawn at once is small, whatever the table."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from megatron_fp4.comm.rect import Placement, Rectangle
from megatron_fp4.layers import lab, parameter
from megatron_fp4.layers.embedding import VocabParallelEmbedding, vocab_table
from megatron_fp4.layers.parameter import (
    constant_init,
    initialize_parameters,
    make_parameter,
    normal_init,
    uniform_init,
)
from megatron_fp4.planning.footprint import LiveBytes

CPU = torch.device("cpu")


class Parts(nn.Module):
    """Rectangles of two tensors that begin in their middle, one after the other, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        parts = (Rectangle("q", (40, 12), (10, 0), (7, 12)), Rectangle("k", (20, 12), (5, 4), (6, 8)))
        for name, where, initializer in zip("qk", parts, (normal_init(0.1), uniform_init(-1.0, 1.0)), strict=True):
            placement = Placement((where,))
            self.register_parameter(name, make_parameter(where.shape, placement, initializer, torch.float32, CPU))
        vector = Placement((Rectangle("v", (30,), (3,), (11,)),))
        self.v = make_parameter((11,), vector, constant_init(2.0), torch.bfloat16, CPU)


def test_blocks_change_no_value() -> None:
    models = []
    for block in (2**24, 30, 1):
        with mock.patch.object(parameter, "BLOCK", block):
            models.append(Parts())
            initialize_parameters(models[-1], seed=3)
    for model in models[1:]:
        for name, value in model.named_parameters():
            assert torch.equal(value, getattr(models[0], name)), name
    assert bool((models[0].v == 2.0).all())


def test_a_large_table_needs_little_beside_itself() -> None:
    """The head of the 12B at tp 1: drawn at once it took 16 GB beside its 1.3."""
    context = lab(device="meta", dtype=torch.bfloat16)
    weight = vocab_table("embedding.weight", 131_072, 5120, context, std=0.02)
    table = VocabParallelEmbedding(131_072, weight, context)
    with LiveBytes() as live:
        initialize_parameters(table, seed=0)
    assert live.peak <= 28 * parameter.BLOCK < 0.5e9
