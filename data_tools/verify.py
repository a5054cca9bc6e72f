"""Are these shards what they say? Sizes, every index entry, checksums, largest token id. Reads every byte once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from data_tools.cli import run_tool
from data_tools.shards_of import Listed, list_shards
from megatron_fp4.data.shards.manifest import BLOCK_BYTES, digest_file
from megatron_fp4.data.shards.shard import TokenShard
from megatron_fp4.data.text.tokenizer import load_tokenizer

_TOKENS_AT_ONCE = 1 << 22


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
    return problems + _token_problems(shard, listed.entry, vocab_size)


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
    parser = argparse.ArgumentParser(prog="data_tools.verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="+", help="shard-set directories, prefixes or globs")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--tokenizer", type=Path, help="check ids against its vocabulary")
    vocabulary.add_argument("--vocab-size", type=int, help="check ids against this vocabulary")
    args = parser.parse_args(argv)
    vocab_size = load_tokenizer(args.tokenizer).vocab_size if args.tokenizer else args.vocab_size
    bad = 0
    for listed in list_shards(args.paths):
        problems = problems_of(listed, vocab_size)
        checked = "checksums, " if listed.entry is not None else "no manifest: no checksums, "
        print(f"{'BAD ' if problems else 'good'} {listed.prefix} ({checked}sizes, index, ids)")
        for problem in problems:
            print(f"     {problem}")
        bad += bool(problems)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_tool("verify", None))
