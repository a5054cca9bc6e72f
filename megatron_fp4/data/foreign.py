"""Shards that do not say whose tokenizer made them, beside a tokenizer: a wrong one trains without any sign.

Shards of other tools have no manifest, so nothing can be compared. What can be done is to decode a document and let a
person look; ids that the tokenizer does not have prove that it is another one.

Not here: shards that name their tokenizer (checks.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_fp4.data.evaluation import EvalLoader
from megatron_fp4.data.loader import Loader
from megatron_fp4.data.shards.documents import ShardedDocuments
from megatron_fp4.data.shards.shard import TokenShard
from megatron_fp4.data.text.tokenizer import Tokenizer

READ_TOKENS = 1 << 20
"""Tokens at the start of each shard that are looked at for ids beyond the vocabulary: a millisecond or two."""
BEGINNING, END = 48, 8
"""Tokens of the decoded document that are shown."""


def check_unnamed(loader: Loader, evaluations: Sequence[EvalLoader], tokenizer: Tokenizer | None) -> list[str]:
    """A warning with a decoded document for each source and set of unknown tokenizer; none without a tokenizer.

    Raises ValueError for ids that the tokenizer does not have.
    """
    opened = [stream.documents for stream in loader.streams.values()]
    opened += [evaluation.documents for evaluation in evaluations]
    return [
        _warning(documents, tokenizer)
        for documents in opened
        if tokenizer is not None
        and isinstance(documents, ShardedDocuments)
        and any(shard.num_tokens for shard in documents.unnamed)
    ]


def _warning(documents: ShardedDocuments, tokenizer: Tokenizer) -> str:
    for shard in documents.unnamed:
        highest = int(shard.tokens[:READ_TOKENS].max(initial=0))
        if highest >= tokenizer.vocab_size:
            raise ValueError(
                f"shard {shard.prefix} of {documents.name!r} holds token id {highest}, which the tokenizer"
                f" {tokenizer.path} does not have (0 to {tokenizer.vocab_size - 1}): it was made with another one; name"
                " that in data.tokenizer, or leave data.tokenizer empty and set model.vocab_size"
            )
    shard = next(shard for shard in documents.unnamed if shard.num_tokens)
    return (
        f"nothing says which tokenizer made the shards of {documents.name!r} ({shard.prefix}); if this is not the text"
        f" of a document, data.tokenizer = {tokenizer.path} is the wrong one:\n    {_shown(shard, tokenizer)}"
    )


def _shown(shard: TokenShard, tokenizer: Tokenizer) -> str:
    """The first document that has tokens, of a long one beginning and end, and the token that ends it."""
    number = int(np.argmax(shard.document_lengths() > 0))
    ids = shard.document(number).tolist()
    parts = [ids] if len(ids) <= BEGINNING + END else [ids[:BEGINNING], ids[-END:]]
    text = " ... ".join(repr(tokenizer.decode(part)) for part in parts)
    return f"{text}, ended by token {ids[-1]} {tokenizer.piece(ids[-1])!r}"
