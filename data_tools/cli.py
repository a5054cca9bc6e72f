"""`megatron-fp4 data <tool>`, also `python -m data_tools <tool>`: one table of tools, one way to report an error."""

from __future__ import annotations

import importlib
import sys

TOOLS = {
    "make-corpus": ("make_corpus", "real text that every machine has, as JSONL"),
    "train-tokenizer": ("train_tokenizer", "train a sentencepiece model"),
    "tokenize": ("tokenize", "text to token shards"),
    "inspect": ("inspect", "print a document, or a sample of a run's order, as ids and text"),
    "verify": ("verify", "sizes, index, checksums and largest id of shards"),
    "stats": ("stats", "documents, tokens and lengths of shards"),
    "merge": ("merge", "several shards to one shard set"),
    "split": ("split", "one shard set to several, by documents"),
    "blend": ("blend", "tokens and epochs per source and phase, before a run"),
    "ledger": ("ledger", "which documents a step saw, checked against the run's hash"),
}


HEAD = "usage: megatron-fp4 data <tool> [options]   (<tool> --help for its options)"
FOOT = """
exit codes:
  0    done
  1    the data is damaged or not what it should be
  2    refused; nothing was started

example:
  megatron-fp4 data tokenize text/*.jsonl.gz --tokenizer tokenizer.json --output shards"""


def usage() -> str:
    lines = [f"  {name:16} {about}" for name, (_, about) in TOOLS.items()]
    return "\n".join([HEAD, "", *lines, FOOT])


def main(argv: list[str] | None = None) -> int:
    """Run one tool. 0 = good, 1 = the data is not, 2 = the command is not."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in TOOLS:
        print(f"unknown tool {argv[0]!r}\n{usage()}", file=sys.stderr)
        return 2
    return run_tool(TOOLS[argv[0]][0], argv[1:])


def run_tool(module: str, argv: list[str] | None) -> int:
    """main(argv) of a tool, with refusals as one line instead of a traceback."""
    try:
        return importlib.import_module(f"data_tools.{module}").main(argv)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
