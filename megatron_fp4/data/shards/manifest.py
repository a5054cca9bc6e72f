"""A shard set: a folder of shards and the manifest.json that commits it.

The manifest is written last and atomically, so a folder with one is complete, and a folder without one is
not a shard set. It holds what a reader must be able to refuse by: counts, dtype, the tokenizer's fingerprint, the
largest id, and checksums (sha256 per file, and a digest per block so that damage has an offset).

    {"format": "megatron_fp4.shards", "version": 1, "dtype": "uint16", "tokenizer": {...}, "special_tokens": {...},
     "num_documents": .., "num_tokens": .., "max_token_id": .., "counters": {...}, "sources": [...],
     "shards": [{"name": "shard_00000", "num_documents": .., "num_tokens": .., "max_token_id": ..,
                 "files": {"bin": {"bytes": .., "sha256": "..", "blocks": [..]}, "idx": {...}}}]}
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # present while a tokenization is under way
FORMAT = "megatron_fp4.shards"
BLOCK_BYTES = 4 << 20


class FileDigest:
    """sha256 of a stream of bytes, and one 8-byte blake2b per block of BLOCK_BYTES, in one pass."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._block = hashlib.blake2b(digest_size=8)
        self._blocks: list[str] = []
        self.num_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._whole.update(view)
        while len(view):
            room = BLOCK_BYTES - self.num_bytes % BLOCK_BYTES
            self._block.update(view[:room])
            self.num_bytes += len(view[:room])
            view = view[room:]
            if self.num_bytes % BLOCK_BYTES == 0:
                self._next_block()

    def _next_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = hashlib.blake2b(digest_size=8)

    def result(self) -> dict[str, Any]:
        blocks = self._blocks + ([self._block.hexdigest()] if self.num_bytes % BLOCK_BYTES else [])
        return {"bytes": self.num_bytes, "sha256": self._whole.hexdigest(), "blocks": blocks}


def digest_file(path: Path) -> dict[str, Any]:
    digest = FileDigest()
    with open(path, "rb") as file:
        while data := file.read(BLOCK_BYTES):
            digest.update(data)
    return digest.result()


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def commit(folder: Path, shards: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Write the manifest of finished shards; from here on the folder is a shard set."""
    manifest = {
        "format": FORMAT,
        "version": 1,
        "num_documents": sum(shard["num_documents"] for shard in shards),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "max_token_id": max((shard["max_token_id"] for shard in shards), default=-1),
        "shards": shards,
        **facts,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a committed shard set; ValueError if the folder has none or another kind."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if any((place / PROGRESS).exists() for place in (Path(folder), Path(folder).parent)):
            raise ValueError(
                f"shard set {folder} is not committed: there is a {PROGRESS} but no {MANIFEST}. "
                "The tokenization was interrupted; run the same data_tools.tokenize command again to finish it."
            )
        raise ValueError(
            f"folder {folder} has no {MANIFEST}, so it is not a shard set. To open plain Megatron shards give their "
            "prefixes (the path without .bin/.idx, globs allowed)."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); tokenize again or restore the file") from None
    if manifest.get("format") != FORMAT or manifest.get("version") != 1:
        raise ValueError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r}, "
            f"expected {FORMAT!r} version 1"
        )
    return manifest
