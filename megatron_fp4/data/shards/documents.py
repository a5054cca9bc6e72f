"""Shards opened as one numbered list of documents, with a fingerprint of its content.

A source is what its bytes are, not where they lie. The fingerprint is made of the shards' checksums (from the manifest)
or, for plain Megatron shards, of the sizes and sampled blocks of both files, so a moved data set is the same and a
changed one is not.

Not here: order (data/order/samples.py), what the order needs of a source (data/documents.py).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.documents import DocumentPlace
from megatron_fp4.data.shards.manifest import read_manifest
from megatron_fp4.data.shards.shard import ShardFiles, TokenShard, num_documents_of

_SAMPLED_BLOCKS, _SAMPLED_BYTES = 64, 4096


class ShardedDocuments:
    """The documents of several shards in order; a `Documents` (data/documents.py).

    `tokenizers` are the fingerprints that the manifests name (none for plain Megatron shards), `max_token_id` is the
    largest id that they name, or None without a manifest. `unnamed` are the shards of which nothing names a tokenizer.
    `ends` are the ids that end their documents, as the manifests say.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[TokenShard],
        fingerprint: str,
        manifests: Sequence[dict[str, Any]] = (),
        unnamed: Sequence[TokenShard] = (),
    ):
        self.name = name
        self.shards = list(shards)
        self.fingerprint = fingerprint
        self.unnamed = list(unnamed)
        self.tokenizers = sorted({m["tokenizer"]["fingerprint"] for m in manifests if m["tokenizer"]})
        special = [m.get("special_tokens") or {} for m in manifests]
        self.ends = sorted({int(tokens["eos"]) for tokens in special if tokens.get("eos") is not None})
        known = [int(m["max_token_id"]) for m in manifests]
        self.max_token_id = max(known) if known else None
        self._first = np.zeros(len(self.shards) + 1, np.int64)  # number of each shard's first document
        np.cumsum([shard.num_documents for shard in self.shards], out=self._first[1:])
        self.num_documents = int(self._first[-1])
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)

    @property
    def lengths(self) -> NDArray[np.int64]:
        parts = [shard.document_lengths() for shard in self.shards]
        return np.concatenate(parts, dtype=np.int64) if parts else np.zeros(0, np.int64)

    def place(self, document: int) -> DocumentPlace:
        shard, local = self._shard_of(document)
        return DocumentPlace(str(shard.prefix), local)

    def read(self, document: int, offset: int, length: int) -> NDArray:
        """Token ids [offset, offset + length) of a document, a view in the stored dtype."""
        shard, local = self._shard_of(document)
        start = shard.start_of(local) + offset
        return shard.tokens[start : start + length]

    def document(self, number: int) -> NDArray:
        """Token ids of a whole document, a view in the stored dtype."""
        shard, local = self._shard_of(number)
        return shard.document(local)

    def _shard_of(self, document: int) -> tuple[TokenShard, int]:
        """The shard that holds the document, and the document's number inside it."""
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.shards[number], document - int(self._first[number])


def open_documents(name: str, paths: Sequence[str]) -> ShardedDocuments:
    """Open shard-set directories, prefixes and globs of prefixes as one source, in the given order."""
    shards: list[TokenShard] = []
    manifests: list[dict[str, Any]] = []
    unnamed: list[TokenShard] = []
    content = hashlib.blake2b(digest_size=16)
    if not paths:
        raise ValueError(f"data source {name!r} has no paths")
    for path in paths:
        if Path(path).is_dir():
            manifest = read_manifest(path)
            manifests.append(manifest)
            for entry in manifest["shards"]:
                shards.append(_open_listed(Path(path), entry))
                unnamed += [] if manifest["tokenizer"] else shards[-1:]
                content.update(entry["files"]["bin"]["sha256"].encode() + entry["files"]["idx"]["sha256"].encode())
            continue
        for prefix in _prefixes(name, path):
            shards.append(TokenShard(prefix))
            unnamed.append(shards[-1])
            content.update(_sampled_digest(shards[-1]))
    _check_once(name, shards)
    return ShardedDocuments(name, shards, content.hexdigest(), manifests, unnamed)


def count_documents(paths: Sequence[str]) -> int:
    """Documents of a source, from manifests and headers alone. Raises as `open_documents` for what is not there."""
    count = 0
    for path in paths:
        if Path(path).is_dir():
            count += sum(int(entry["num_documents"]) for entry in read_manifest(path)["shards"])
        else:
            count += sum(num_documents_of(Path(f"{prefix}.idx")) for prefix in _prefixes(path, path))
    return count


def _check_once(name: str, shards: Sequence[TokenShard]) -> None:
    """No file is named by two paths: its documents would count twice, and nothing in the order would show it."""
    seen: set[str] = set()
    folder = functools.cache(os.path.realpath)  # it asks for each part of a path
    for shard in shards:
        path = shard.bin_path
        file = os.path.realpath(path) if path.is_symlink() else os.path.join(folder(path.parent), path.name)
        if file in seen:
            raise ValueError(
                f"data source {name!r} names shard {shard.prefix} twice, so each epoch would read its documents twice;"
                " name it once, and read more of a source by its weight or max_epochs"
            )
        seen.add(file)


def _open_listed(folder: Path, entry: dict[str, Any]) -> TokenShard:
    prefix = folder / entry["name"]
    files = ShardFiles.map(prefix, "is listed in the manifest but does not exist; copy it again")
    for end, view in (("bin", files.bin), ("idx", files.idx)):
        expected, actual = entry["files"][end]["bytes"], len(view)
        if actual != expected:
            raise ValueError(
                f"shard {prefix}.{end}: the manifest says {expected} bytes, the file has {actual}; it differs from byte"
                f" offset {min(actual, expected)} on. Copy the file again, or tokenize again."
            )
    shard = TokenShard(prefix, files)
    if (shard.num_documents, shard.num_tokens) != (entry["num_documents"], entry["num_tokens"]):
        raise ValueError(
            f"shard {shard.prefix}: the manifest says {entry['num_documents']} documents and {entry['num_tokens']} "
            f"tokens, the .idx says {shard.num_documents} and {shard.num_tokens}"
        )
    return shard


def _prefixes(name: str, path: str) -> list[str]:
    bare = path.removesuffix(".bin").removesuffix(".idx")
    if not glob.has_magic(bare):
        return [bare]
    prefixes = sorted(match.removesuffix(".idx") for match in glob.glob(f"{bare}.idx"))
    if not prefixes:
        raise FileNotFoundError(f"data source {name!r}: no shard matches {bare}.idx")
    return prefixes


def _sampled_digest(shard: TokenShard) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for data in shard.files:
        content.update(len(data).to_bytes(8, "little"))
        for start in range(0, len(data), max(_SAMPLED_BYTES, len(data) // _SAMPLED_BLOCKS)):
            content.update(data[start : start + _SAMPLED_BYTES])
        content.update(data[-_SAMPLED_BYTES:])
    return content.digest()
