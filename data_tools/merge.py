"""Several shards or shard sets to one shard set, documents in the order given (tokenizers must agree)."""

from __future__ import annotations

import sys

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from data_tools.copy_documents import add_arguments, copy_documents, report
from megatron_fp4.storage.local import local_text


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("merge", __doc__)
    parser.add_argument("paths", nargs="+", type=local_text, help="shard-set directories, prefixes or globs")
    add_arguments(parser)
    args = parser.parse_args(argv)
    folders = {"all": args.output}
    report(copy_documents(args, folders, lambda tokens: "all", {"tool": "merge"}), folders)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("merge", None))
