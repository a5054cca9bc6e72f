"""Writes a shard (shard.py has the format). Nothing has its final name until it is whole and on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.shards.shard import CODES, HEADER, MAGIC, hash_of

MAX_DOCUMENT_TOKENS = 2**31 - 1  # the format keeps lengths in int32


class ShardWriter:
    """Writes one shard, each document one sequence. Nothing has its final name until `close`; `abort` removes it.

    on_bytes: called with every piece of the .bin in order (for checksums without a second read).
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, on_bytes: Callable[[bytes], None] | None = None) -> None:
        self.prefix = Path(prefix)
        if np.dtype(dtype) not in CODES:
            raise ValueError(f"shard dtype {dtype} is not one of {[str(d) for d in CODES]}")
        self.dtype = np.dtype(dtype)
        self.num_tokens = 0
        self.num_documents = 0
        self.max_token_id = -1
        self._on_bytes = on_bytes
        self._lengths: list[NDArray[np.int32]] = []
        self._hashes: list[int] = []
        self._temporary = {end: Path(f"{self.prefix}.{end}.tmp") for end in ("bin", "hashes", "idx")}
        self._file = open(self._temporary["bin"], "wb")  # noqa: SIM115 - closed by close() or abort()

    def add_documents(self, tokens: NDArray, lengths: NDArray) -> None:
        """Append documents: flat ids [sum(lengths)] and their lengths [documents] (0 allowed)."""
        lengths = np.asarray(lengths, np.int64)
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths sum to {int(lengths.sum())} but there are {len(tokens)} tokens")
        if len(lengths) and int(lengths.max()) > MAX_DOCUMENT_TOKENS:
            raise ValueError(f"a document of {int(lengths.max())} tokens exceeds the format's {MAX_DOCUMENT_TOKENS}")
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            limit = np.iinfo(self.dtype).max
            if low < 0 or high > limit:
                raise ValueError(f"token ids {low}..{high} do not fit {self.dtype} (0..{limit})")
            self.max_token_id = max(self.max_token_id, high)
        ends = np.cumsum(lengths).tolist()
        self._hashes += [hash_of(tokens[end - n : end]) for end, n in zip(ends, lengths.tolist(), strict=True)]
        data = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        self._file.write(data)
        if self._on_bytes is not None:
            self._on_bytes(data)
        self._lengths.append(lengths.astype("<i4"))
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    def add_document(self, tokens: NDArray) -> None:
        self.add_documents(np.asarray(tokens), np.array([len(tokens)]))

    def close(self) -> None:
        """Write the .idx, flush both to the disk, give both their names (.idx last: it makes the shard visible)."""
        _sync_close(self._file)
        with open(self._temporary["hashes"], "wb") as file:
            file.write(np.array(self._hashes, "<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        with open(self._temporary["idx"], "wb") as file:
            lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, "<i4")
            pointers = np.zeros(len(lengths), "<i8")
            np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
            file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(pointers.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        for end in self._temporary:
            os.replace(self._temporary[end], f"{self.prefix}.{end}")

    def abort(self) -> None:
        self._file.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)


def _sync_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
