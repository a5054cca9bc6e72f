"""Refusals at start-up. Every message names both values and what to do; only `check_ids` reads tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.documents import Documents
from megatron_fp4.data.shards.documents import ShardedDocuments

if TYPE_CHECKING:
    from megatron_fp4.data.order.plan import Plan
    from megatron_fp4.data.order.samples import SampleStream

BLOCK = 2**24
"""Tokens whose ids are looked at in one piece."""


def check_vocabulary(
    sources: Sequence[ShardedDocuments], vocab_size: int | None, tokenizer_fingerprint: str | None
) -> None:
    """The shards' tokenizer is the one in use, and every stored id has a row in the embedding."""
    for source in sources:
        for fingerprint in source.tokenizers:
            if tokenizer_fingerprint is not None and fingerprint != tokenizer_fingerprint:
                raise ValueError(
                    f"data source {source.name!r} was tokenized with tokenizer {fingerprint}, but "
                    f"{tokenizer_fingerprint} is used here; name the same model file, or tokenize again"
                )
        highest = source.max_token_id
        if vocab_size is not None and highest is not None and highest >= vocab_size:
            raise ValueError(
                f"data source {source.name!r} holds token id {highest}, but the model's vocabulary is {vocab_size}; "
                f"it must be at least {highest + 1}"
            )


def check_ends(opened: Sequence[ShardedDocuments]) -> None:
    """One token ends the documents of all sets: with two, equal texts differ, and a model learns both."""
    ends: dict[int, str] = {}
    for documents in opened:
        for token in documents.ends:
            ends.setdefault(token, documents.name)
    if len(ends) > 1:
        (first, name), (second, other) = list(ends.items())[:2]
        raise ValueError(
            f"documents of {name!r} end with token {first}, those of {other!r} with {second}: tokenize one of the two"
            " again, with the --eos of the other"
        )


def check_ids(source: ShardedDocuments, num_tokens: int, vocab_size: int) -> None:
    """The first `num_tokens` tokens of a source have rows in the embedding; reads them, for sets without a manifest."""
    left = num_tokens
    for shard in source.shards:
        for start in range(0, min(left, shard.num_tokens), BLOCK):
            tokens = shard.tokens[start : start + min(BLOCK, left - start)]
            lowest, highest = int(tokens.min()), int(tokens.max())
            if lowest < 0 or highest >= vocab_size:
                raise ValueError(
                    f"data source {source.name!r} holds token id {lowest if lowest < 0 else highest} in shard"
                    f" {shard.prefix}, but the model's vocabulary is {vocab_size}; the shard was written with another"
                    " tokenizer, or is damaged"
                )
        left -= min(left, shard.num_tokens)


def check_state(state: dict[str, Any], version: int, config: DataConfig, sources: dict[str, Documents]) -> None:
    """A checkpoint's data state fits this config and these files (by content, wherever they lie)."""
    for name, expected, actual in (
        ("state version", version, state["version"]),
        ("data.seq_length", config.seq_length, state["seq_length"]),
        ("data.seed", config.seed, state["seed"]),
    ):
        if expected != actual:
            raise ValueError(
                f"the checkpoint was written with {name}={actual}, this run has {expected}; the sample order would "
                "change under it. Use the checkpoint's value, or choose another train.run_dir."
            )
    for name, saved in state["sources"].items():
        documents = sources.get(name)
        if documents is not None and documents.fingerprint != saved["fingerprint"]:
            raise ValueError(
                f"data source {name!r} changed since the checkpoint: its content was {saved['fingerprint']}, now it is "
                f"{documents.fingerprint}. Restore the shards, or give the source another name with "
                "'train.resume_allow=[data.sources*,data.phases*]': it is then read from its beginning."
            )


def check_enough_data(config: DataConfig, streams: dict[str, SampleStream], plan: Plan, total_samples: int) -> None:
    """The phases last for `total_samples` delivered samples, and no source runs out of its permitted epochs."""
    end = plan.id_of(total_samples - 1) + 1 if total_samples else 0
    phases = config.phases
    length = sum(phase.tokens for phase in phases)
    if phases and phases[-1].tokens and length < end * config.seq_length:
        raise ValueError(
            f"data.phases end at token {length}, but the run reads {end * config.seq_length} (skipped ones included); "
            f"set tokens of the last phase, {phases[-1].name!r}, to 0 (to the end of the run), or lengthen the phases"
        )
    limits = {s.name: streams[s.name].available(s.max_epochs) for s in config.sources if s.max_epochs}
    bounds = plan.most_cursors_at(end)
    if all(bounds.get(name, 0) <= limit for name, limit in limits.items()):
        return  # the exact numbers of a blend of large sources take seconds
    needed = plan.cursors_at(end)
    for source in config.sources:
        if source.max_epochs and needed.get(source.name, 0) > limits[source.name]:
            what, epochs = f"{total_samples} samples", source.max_epochs
            raise out_of_data(source.name, needed[source.name], limits[source.name], epochs, what)


def out_of_data(name: str, needed: int, available: int, epochs: int, what: str) -> ValueError:
    return ValueError(
        f"data source {name!r} is too small: {what} needs {needed} of its samples, {epochs} epoch(s) give {available}. "
        f"Lower the run's tokens or the source's weight, or set max_epochs of the source to more than {epochs} "
        "(0 = no limit)."
    )
