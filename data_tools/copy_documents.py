"""Documents of existing shards into new shard sets: what merge and split have in common."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.records import Position
from data_tools.shard_set import SplitWriter, check_not_nested, finished, remove_sets
from megatron_fp4.data.checks import check_ends
from megatron_fp4.data.shards.documents import ShardedDocuments, open_documents
from megatron_fp4.data.shards.manifest import read_manifest
from megatron_fp4.storage.local import local_path

_DOCUMENTS_AT_ONCE = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=local_path, required=True)
    parser.add_argument("--shard-tokens", type=int, default=512 << 20, help="a shard is closed at this many tokens")
    parser.add_argument("--restart", action="store_true", help="delete earlier output instead of going on")


def copy_documents(
    args: argparse.Namespace, folders: dict[str, Path], choose: Callable[[NDArray], str], options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Copy every document of `args.paths` to the split that `choose(tokens)` names. Returns the manifests."""
    source = open_documents("copy", args.paths)
    if not source.num_documents or args.shard_tokens < 1:
        raise ValueError(
            f"{source.num_documents} documents in {args.paths}, --shard-tokens {args.shard_tokens}: need >= 1"
        )
    facts = _common_facts(args.paths, source)
    inputs = {shard.prefix.parent.resolve() for shard in source.shards}
    for folder in folders.values():
        if folder.resolve() in inputs:
            raise ValueError(f"{folder} is an input and would be overwritten; choose another --output")
    check_not_nested(folders)
    job = {"content": source.fingerprint, "shard_tokens": args.shard_tokens, **options}
    if args.restart:
        remove_sets(args.output, folders)
    manifests = finished(args.output, folders, job)
    if manifests is not None:
        return manifests
    dtype = max((shard.dtype for shard in source.shards), key=lambda d: np.iinfo(d).max)
    with SplitWriter(args.output, folders, dtype, job) as writer:
        for first in range(writer.position.offset, source.num_documents, _DOCUMENTS_AT_ONCE):
            last = min(first + _DOCUMENTS_AT_ONCE, source.num_documents)
            for document in _documents(source, first, last):
                writer.add(choose(document), document, np.array([len(document)]))
            writer.end_batch(Position(0, last), args.shard_tokens)
        return writer.finish(facts)


def _documents(source: ShardedDocuments, first: int, last: int) -> Iterator[NDArray]:
    for number in range(first, last):
        yield source.document(number)


def _common_facts(paths: list[str], source: ShardedDocuments) -> dict[str, Any]:
    """Tokenizer and special-token policy of the inputs; ValueError if they do not agree."""
    if len(source.tokenizers) > 1:
        raise ValueError(f"the inputs were written with different tokenizers: {source.tokenizers}")
    check_ends([source])
    manifests = [read_manifest(path) for path in paths if Path(path).is_dir()]
    known = manifests[0] if manifests else {"tokenizer": None, "special_tokens": None}
    names = [{"name": shard.prefix.name, "bytes": shard.bin_path.stat().st_size} for shard in source.shards]
    return {"tokenizer": known["tokenizer"], "special_tokens": known.get("special_tokens"), "sources": names}


def unit_hash(tokens: NDArray) -> float:
    """A number in [0, 1) from a document's ids: equal documents get the same."""
    data = np.ascontiguousarray(tokens, "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2**64


def report(manifests: dict[str, dict[str, Any]], folders: dict[str, Path]) -> None:
    for name, manifest in manifests.items():
        print(
            f"{manifest['num_documents']:12,d} documents {manifest['num_tokens']:14,d} tokens "
            f"{len(manifest['shards'])} shard(s) -> {folders[name]}"
        )
