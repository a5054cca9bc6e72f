"""Logical tensors of a GPT -> rows of the tensors of Megatron-LM.

    linear_qkv     of each group of queries: its query heads, its key head, its value head; one group below the other
    linear_fc1     all rows of the gate, then all of up; or a tensor for each (`weight_w`, `weight_v`)
    word_embeddings, output_layer    rows for the padding of the vocabulary at their end
    linear_qkv.layer_norm_weight, linear_fc1.layer_norm_weight    the norms before these linears

The layers of a model lie in one tensor, stacked, or each in its own, by its number. Written for megatron-core 0.16.1.

Not here: which of the names a checkpoint has (megatron_weights.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.models.config import ModelConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class StoredRows:
    """Where the rows of a logical tensor lie in a stored one: runs of `run` rows, a run every `stride` rows.

    name: within a layer, or whole where block is None. first: the first row. rows: of the stored tensor. padded: it may
    have more.
    """

    name: str
    block: int | None
    rows: int
    run: int
    stride: int
    first: int = 0
    padded: bool = False

    def at(self, first: int, stop: int) -> Tensor:
        """The stored rows of the logical rows [first, stop), int64, ascending."""
        rows = torch.arange(first, stop)
        return rows // self.run * self.stride + rows % self.run + self.first


def stored_rows(config: ModelConfig) -> Iterator[tuple[str, tuple[StoredRows, ...]]]:
    """The name of every logical tensor, and where it may lie."""
    vocab, hidden = config.vocab_size, config.hidden
    yield "embedding.weight", (StoredRows(EMBEDDING, None, vocab, vocab, vocab, padded=True),)
    for block in range(config.num_layers):
        yield from _layer_rows(config, block)
    yield "final_norm.weight", (_whole("decoder.final_layernorm.weight", None, hidden),)
    if not config.tied_embeddings:
        yield "head.weight", (StoredRows(HEAD, None, vocab, vocab, vocab, padded=True),)


def _layer_rows(config: ModelConfig, block: int) -> Iterator[tuple[str, tuple[StoredRows, ...]]]:
    ours = f"blocks.{block}"
    hidden, ffn = config.hidden, config.ffn_hidden
    for norm, fused, own in (
        ("attention_norm", "self_attention.linear_qkv", "input_layernorm"),
        ("mlp_norm", "mlp.linear_fc1", "pre_mlp_layernorm"),
    ):
        names = (f"{fused}.layer_norm_weight", f"{own}.weight")
        yield f"{ours}.{norm}.weight", tuple(_whole(name, block, hidden) for name in names)
    for leaf in ("weight", "bias") if config.qkv_bias else ("weight",):
        yield from _qkv_rows(config, block, leaf)
    yield f"{ours}.attention.out.weight", (_whole("self_attention.linear_proj.weight", block, hidden),)
    if config.qk_norm is QkNorm.head:
        for part in "qk":
            name = f"self_attention.{part}_layernorm.weight"
            yield f"{ours}.attention.{part}_norm.weight", (_whole(name, block, config.attention_head_dim),)
    fc1 = "mlp.linear_fc1.weight"
    if config.activation is Activation.swiglu:
        for index, (part, own) in enumerate((("gate", "w"), ("up", "v"))):
            joined = StoredRows(fc1, block, 2 * ffn, ffn, 2 * ffn, index * ffn)
            yield f"{ours}.mlp.gate_up.{part}.weight", (joined, _whole(f"{fc1}_{own}", block, ffn))
    else:
        yield f"{ours}.mlp.up.weight", (_whole(fc1, block, ffn),)
    yield f"{ours}.mlp.down.weight", (_whole("mlp.linear_fc2.weight", block, hidden),)


def _qkv_rows(config: ModelConfig, block: int, leaf: str) -> Iterator[tuple[str, tuple[StoredRows, ...]]]:
    head_dim, groups = config.attention_head_dim, config.num_kv_heads
    queries = config.num_heads // groups * head_dim
    stride = queries + 2 * head_dim
    for part, run, first in (("q", queries, 0), ("k", head_dim, queries), ("v", head_dim, queries + head_dim)):
        place = StoredRows(f"self_attention.linear_qkv.{leaf}", block, groups * stride, run, stride, first)
        yield f"blocks.{block}.attention.qkv.{part}.{leaf}", (place,)


def _whole(name: str, block: int | None, rows: int) -> StoredRows:
    return StoredRows(name, block, rows, rows, rows)
