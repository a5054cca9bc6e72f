"""One shard set to several: a hash of a document's ids decides, so equal documents stay together."""

from __future__ import annotations

import itertools
import re
import sys

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from data_tools.copy_documents import add_arguments, copy_documents, report, unit_hash
from megatron_fp4.storage.local import local_text


def parse_parts(texts: list[str]) -> dict[str, float]:
    """['train=0.98', 'test=0.02'] -> shares that sum to 1."""
    parts: dict[str, float] = {}
    for text in texts:
        part = re.fullmatch(r"([\w.-]*\w)=(\d*\.?\d+)", text)
        if part is None or part[1] in parts:
            raise ValueError(f"part {text!r} must look like name=share, for example heldout=0.02, each name once")
        parts[part[1]] = float(part[2])
    if not sum(parts.values()) > 0:
        raise ValueError(f"the shares {parts} must not all be zero")
    total = sum(parts.values())
    return {name: share / total for name, share in parts.items()}


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("split", __doc__)
    parser.add_argument("paths", nargs="+", type=local_text, help="shard-set directories, prefixes or globs")
    parser.add_argument("--part", action="append", required=True, metavar="NAME=SHARE", help="one per split")
    add_arguments(parser)
    args = parser.parse_args(argv)
    parts = parse_parts(args.part)
    ends = list(zip(parts, itertools.accumulate(parts.values()), strict=True))
    folders = {name: args.output / name for name in parts}

    def choose(tokens) -> str:  # type: ignore[no-untyped-def]
        value = unit_hash(tokens)
        return next((name for name, end in ends if value < end), ends[-1][0])

    report(copy_documents(args, folders, choose, {"tool": "split", "parts": parts}), folders)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("split", None))
