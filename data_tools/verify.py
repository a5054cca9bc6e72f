"""Are these shards what they say? Sizes, every index entry, checksums, hashes, largest token id. Reads every byte.

With --heldout: does a held-out set hold documents of these shards? Equal token for token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from data_tools.shards_of import Listed, list_shards
from megatron_fp4.data.overlap import MIN_TOKENS, any_hashes, common_documents
from megatron_fp4.data.shards.documents import open_documents
from megatron_fp4.data.shards.manifest import BLOCK_BYTES, digest_file
from megatron_fp4.data.shards.shard import TokenShard
from megatron_fp4.data.text.tokenizer import load_tokenizer
from megatron_fp4.storage.local import local_path, local_text

_TOKENS_AT_ONCE = 1 << 22
MAX_LISTED = 20


def problems_of(listed: Listed, vocab_size: int | None) -> list[str]:
    """Everything wrong with one shard, each line naming file, place, expected and actual."""
    problems: list[str] = []
    if listed.entry is not None:
        for end in ("bin", "idx"):
            problems += _checksum_problems(Path(f"{listed.prefix}.{end}"), listed.entry["files"][end])
    try:
        shard = TokenShard(listed.prefix)
        shard.check_index()
    except (ValueError, FileNotFoundError) as error:
        return [*problems, str(error)]
    return problems + _token_problems(shard, listed.entry, vocab_size) + _hash_problems(shard)


def _hash_problems(shard: TokenShard) -> list[str]:
    """Stale hashes would hide held-out text from the comparison at a start."""
    stored, path = shard.document_hashes(), Path(f"{shard.prefix}.hashes")
    if stored is None:
        count = path.stat().st_size / 8 if path.exists() else 0
        return [f"{path}: {count:g} hashes for {shard.num_documents} documents; remove the file"] if count else []
    wrong = np.flatnonzero(stored != shard.hash_documents())
    return [f"{path}: the hash of document {wrong[0]} is not that of its tokens; remove the file"] if len(wrong) else []


def _common_problems(heldout: list[str], paths: list[str]) -> list[str]:
    """Documents that both have, by name."""
    held, source = open_documents("heldout", heldout), open_documents("source", paths)
    num_long = int((held.lengths >= MIN_TOKENS).sum())
    if not num_long:
        raise ValueError(
            f"none of the {held.num_documents:,} documents of {', '.join(heldout)} has {MIN_TOKENS} tokens or more:"
            " shorter ones are equal by chance, so there is nothing to compare"
        )
    common = common_documents(held, source, any_hashes)
    assert common is not None, "any_hashes makes what is not stored"
    short = f", {held.num_documents - num_long:,} too short to tell" if num_long < held.num_documents else ""
    print(f"{num_long:,} held-out documents against {source.num_documents:,}: {len(common):,} in common{short}")
    places = [held.place(int(number)) for number in common[:MAX_LISTED]]
    return [f"document {place.document} of {place.shard} is in the source too" for place in places]


def _checksum_problems(path: Path, expected: dict[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{path} is in the manifest but does not exist"]
    actual = digest_file(path)
    if actual["sha256"] == expected["sha256"]:
        return []
    if actual["bytes"] != expected["bytes"]:
        return [f"{path}: expected {expected['bytes']} bytes, found {actual['bytes']}"]
    return [
        f"{path}: bytes {n * BLOCK_BYTES} to {min((n + 1) * BLOCK_BYTES, actual['bytes'])} differ: "
        f"expected digest {want}, found {have}"
        for n, (want, have) in enumerate(zip(expected["blocks"], actual["blocks"], strict=True))
        if want != have
    ]


def _token_problems(shard: TokenShard, entry: dict[str, Any] | None, vocab_size: int | None) -> list[str]:
    highest, lowest, at = -1, 0, 0
    for start in range(0, shard.num_tokens, _TOKENS_AT_ONCE):
        part = shard.tokens[start : start + _TOKENS_AT_ONCE]
        lowest = min(lowest, int(part.min()))
        if int(part.max()) > highest:
            highest, at = int(part.max()), start + int(part.argmax())
    place = f"{shard.bin_path}: token {at} (byte offset {at * shard.dtype.itemsize})"
    if lowest < 0:
        return [f"{shard.bin_path}: holds the negative id {lowest}"]
    if vocab_size is not None and highest >= vocab_size:
        return [f"{place} is {highest}, beyond the vocabulary of {vocab_size}"]
    if entry is not None and highest != entry["max_token_id"]:
        return [f"{place} is {highest}; the manifest says the largest id is {entry['max_token_id']}"]
    return []


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("verify", __doc__)
    parser.add_argument("paths", nargs="+", type=local_text, help="shard-set directories, prefixes or globs")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--tokenizer", type=local_path, help="check ids against its vocabulary")
    vocabulary.add_argument("--vocab-size", type=int, help="check ids against this vocabulary")
    parser.add_argument(
        "--heldout", nargs="+", type=local_text, help="shards that must have no document in common with the paths"
    )
    args = parser.parse_args(argv)
    vocab_size = load_tokenizer(args.tokenizer).vocab_size if args.tokenizer else args.vocab_size
    bad, shards = 0, list_shards(args.paths)
    if not shards:
        raise ValueError(f"{', '.join(args.paths)}: the manifest names no shard, so there is nothing to verify")
    for listed in shards:
        problems = problems_of(listed, vocab_size)
        checked = "checksums, " if listed.entry is not None else "no manifest: no checksums, "
        print(f"{'BAD ' if problems else 'good'} {listed.prefix} ({checked}sizes, index, ids)")
        for problem in problems:
            print(f"     {problem}")
        bad += bool(problems)
    for problem in _common_problems(args.heldout, args.paths) if args.heldout else []:
        print(f"BAD  {problem}")
        bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_tool("verify", None))
