"""What the order asks of a source of documents, and all that it asks.

Whoever has tokens in another form than .bin/.idx (Parquet columns, a generator, a server) writes these members and
hands the object to `SampleStream`: shuffling, blends, resume and the ledger then work as with shards. What is read
twice must be the same twice: a resumed run, an audit and another data-parallel size all read by number.

Not here: shards (data/shards/documents.py).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class DocumentPlace(NamedTuple):
    """Where a document is stored, for people and for the ledger."""

    shard: str
    document: int  # number inside the shard


class Documents(Protocol):
    """Numbered documents of token ids."""

    @property
    def name(self) -> str:
        """The source's name in the configuration; the shuffle depends on it."""

    @property
    def fingerprint(self) -> str:
        """Text that is equal where the content is equal; a resume under another one is refused."""

    @property
    def num_documents(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Sum of `lengths`; asked for at start, where summing billions would take seconds."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [num_documents]; read once an epoch, 0 allowed."""

    def read(self, document: int, offset: int, length: int) -> NDArray:
        """Token ids [offset, offset + length) of a document, integers [length]."""

    def place(self, document: int) -> DocumentPlace:
        """Where the document is stored."""
