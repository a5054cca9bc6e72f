"""One shard: a pair of files in Megatron's format, `<prefix>.bin` (token ids) and `<prefix>.idx` (where documents are).

The .idx is a header and three arrays, so both files are memory-mapped and nothing is parsed.

    .idx = b"MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 sequences | u64 documents + 1
         | i32 length of each sequence, in tokens | i64 byte offset of each sequence in .bin
         | i64 first sequence of each document, and one past the last                 (all little-endian)

`<prefix>.hashes`, which is ours alone, has a u64 for each document: XXH3 of its ids as i32, so that equal documents are
found without reading tokens (data/overlap.py).

Byte-compatible with Megatron-LM both ways (megatron/core/datasets/indexed_dataset.py). A Megatron document may be
several sequences (sentence splitting); they are contiguous in .bin, so a document here is one run of tokens.
All offsets are int64. Not here: writing (writer.py), checksums (manifest.py), order (data/order/samples.py).
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPES: dict[int, np.dtype] = {  # Megatron's codes; float shards exist in the format but cannot hold token ids
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest dtype Megatron would choose for ids below `vocab_size` (uint16 under 65500, else int32)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def hash_of(tokens: NDArray) -> int:
    """XXH3 of a document's token ids as little-endian int32, whatever dtype they are stored in."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, "<i4").tobytes())


def map_file(path: Path) -> memoryview:
    """Read-only mapping of a whole file as bytes; an empty file gives an empty view (mmap refuses those)."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        # Python's mmap keeps a descriptor per mapping, so a shard holds two.
        raise ValueError(f"too many open files at {path}: raise the limit (ulimit -n), or merge shards") from None


class ShardFiles(NamedTuple):
    """Both files of a shard, mapped: each is opened once, and its size is the mapping's."""

    idx: memoryview
    bin: memoryview

    @staticmethod
    def map(prefix: Path, missing: str = "does not exist; a shard is a .bin and an .idx side by side") -> ShardFiles:
        """Raises FileNotFoundError: the file, and what `missing` says of it."""
        views = []
        for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
            try:
                views.append(map_file(path))
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise FileNotFoundError(f"shard file {path} {missing}") from None
        return ShardFiles(*views)


class TokenShard:
    """A memory-mapped shard. `prefix` is the path without .bin/.idx. files: its own, where they are mapped already.

    `tokens` is flat [num_tokens] of the stored dtype; nothing of the size of the index is ever copied to memory.
    Raises FileNotFoundError or ValueError naming file, expected and actual.
    """

    def __init__(self, prefix: str | Path, files: ShardFiles | None = None) -> None:
        self.prefix = Path(str(prefix).removesuffix(".bin").removesuffix(".idx"))
        self.bin_path = Path(f"{self.prefix}.bin")
        self.idx_path = Path(f"{self.prefix}.idx")
        self.files = files or ShardFiles.map(self.prefix)
        self.dtype, self.lengths, self._pointers, self._documents = _read_index(self.idx_path, self.files.idx)
        self._check_sizes()
        self.tokens: NDArray = np.frombuffer(self.files.bin, dtype=self.dtype, count=self.num_tokens)

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        if not len(self.lengths):
            return 0
        return int(self._pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def start_of(self, index: int) -> int:
        """Token at which document `index` begins; for `num_documents`, where the last one ends."""
        sequence = int(self._documents[index])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document(self, index: int) -> NDArray:
        """Token ids of one document, a view [length]."""
        return self.tokens[self.start_of(index) : self.start_of(index + 1)]

    def document_lengths(self) -> NDArray:
        """Tokens of each document, int32 or int64 [num_documents]; a view where every document is one sequence."""
        if self.num_documents == self.num_sequences:
            return self.lengths
        ends = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        return np.diff(ends[self._documents])

    def document_hashes(self) -> NDArray[np.uint64] | None:
        """The stored hash of each document, uint64 [num_documents]; None where there are none, or of another index."""
        path = Path(f"{self.prefix}.hashes")
        if not path.is_file() or path.stat().st_size != 8 * self.num_documents:
            return None
        return np.frombuffer(map_file(path), "<u8")

    def hash_documents(self) -> NDArray[np.uint64]:
        """What `document_hashes` should be, made of the tokens."""
        return np.fromiter((hash_of(self.document(n)) for n in range(self.num_documents)), "<u8", self.num_documents)

    def _check_sizes(self) -> None:
        """O(1) agreement of the two files; `check_index` below reads every entry."""
        expected, actual = self.num_tokens * self.dtype.itemsize, len(self.files.bin)
        if expected != actual:
            raise ValueError(
                f"shard {self.bin_path}: its .idx says {expected} bytes ({self.num_tokens} tokens of {self.dtype}), "
                f"the file has {actual} bytes; it differs from byte offset {min(expected, actual)} on. "
                "Copy or tokenize the shard again."
            )
        if self.num_documents < 0 or int(self._documents[0]) != 0 or int(self._documents[-1]) != self.num_sequences:
            raise ValueError(
                f"shard {self.idx_path}: the documents must cover sequences 0 to {self.num_sequences}, but run "
                f"from {self._documents[:1].tolist()} to {self._documents[-1:].tolist()}; the .idx is damaged"
            )

    def check_index(self) -> None:
        """Every length, pointer and document bound: ValueError with the first entry that is wrong."""
        lengths = self.lengths.astype(np.int64)
        expected = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1] * self.dtype.itemsize, out=expected[1:])
        for name, bad, want, have in (
            ("length", lengths < 0, np.zeros_like(lengths), lengths),
            ("byte offset", expected != self._pointers, expected, self._pointers),
        ):
            if bad.any():
                at = int(np.argmax(bad))
                raise ValueError(
                    f"shard {self.idx_path}: {name} of sequence {at} is {int(have[at])}, expected {int(want[at])}"
                )
        steps = np.diff(self._documents)
        if (steps < 0).any():
            at = int(np.argmax(steps < 0))
            raise ValueError(f"shard {self.idx_path}: document {at} ends before it begins ({int(steps[at])} sequences)")


def num_documents_of(path: Path) -> int:
    """What the header of an .idx says. Raises OSError; ValueError for a file that is too short."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"shard {path}: {len(header)} bytes, shorter than the {HEADER.size}-byte header")
    return int(HEADER.unpack(header)[4]) - 1


def _read_index(
    path: Path, view: memoryview
) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    if len(view) < HEADER.size:
        raise ValueError(f"shard {path}: {len(view)} bytes, shorter than the {HEADER.size}-byte header")
    magic, version, code, sequences, documents = HEADER.unpack_from(view)
    if magic != MAGIC or version != 1:
        raise ValueError(f"shard {path}: starts with {magic!r} version {version}, expected {MAGIC!r} version 1")
    if code not in DTYPES:
        raise ValueError(f"shard {path}: dtype code {code} is not one of the integer codes {sorted(DTYPES)}")
    expected = HEADER.size + sequences * 12 + documents * 8
    # Megatron appends one mode byte per sequence to multimodal indexes; their extra length is legal and unused here.
    if len(view) not in (expected, expected + sequences):
        raise ValueError(
            f"shard {path}: {len(view)} bytes, but its header ({sequences} sequences, {documents} bounds) needs "
            f"{expected}; the file is truncated or damaged from byte {min(len(view), expected)} on"
        )
    at = HEADER.size
    lengths = np.frombuffer(view, "<i4", sequences, at)
    pointers = np.frombuffer(view, "<i8", sequences, at + 4 * sequences)
    bounds = np.frombuffer(view, "<i8", documents, at + 12 * sequences)
    return DTYPES[code], lengths, pointers, bounds
