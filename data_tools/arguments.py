"""The parser of a tool: its name as it is typed, defaults, exit codes, an example."""

from __future__ import annotations

import argparse

from megatron_fp4.cli.arguments import help_page

EXAMPLES = {
    "make-corpus": "--output corpus.jsonl",
    "train-tokenizer": "text/*.jsonl.gz --output tokenizer.model --vocab-size 32000",
    "tokenize": "text/*.jsonl.gz --tokenizer tokenizer.model --output shards --heldout-fraction 0.02",
    "inspect": "shards/train --document 3 --tokenizer tokenizer.model",
    "verify": "shards/train",
    "stats": "shards/train",
    "merge": "day1/train day2/train --output shards",
    "split": "shards/train --part train=0.98 --part heldout=0.02 --output parts",
    "blend": "--plan data.yaml --tokens 1e12",
    "ledger": "--run runs/mine --step 100",
}


def tool_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """Of `megatron-fp4 data NAME`. about: its module's docstring, of which the first line is shown."""
    exits = {0: "done"} | ({1: "a shard is damaged, or not what it should be"} if name in ("verify", "ledger") else {})
    page = help_page(f"data {name}", exits, EXAMPLES[name])
    return argparse.ArgumentParser(prog=f"megatron-fp4 data {name}", description=(about or "").splitlines()[0], **page)
