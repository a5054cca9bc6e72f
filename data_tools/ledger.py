"""Which documents did step N of a run see? Recomputed from the run's config and checked against its logged hash."""

from __future__ import annotations

import json
import sys

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from data_tools.inspect import show
from megatron_fp4.data.ledger import ledger, read_step, reopen, replay
from megatron_fp4.data.text.tokenizer import load_tokenizer
from megatron_fp4.storage.local import local_path


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("ledger", __doc__)
    parser.add_argument("--run", type=local_path, required=True, help="directory of the run")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--tokenizer", type=local_path, help="print the text of each sample")
    args = parser.parse_args(argv)
    logged = read_step(args.run, args.step)
    loader = reopen(logged.start)
    batch = replay(loader, logged)
    for row in ledger(loader, logged.first_sample, logged.num_samples):
        if args.json:
            print(json.dumps(row))
            continue
        print(
            f"sample {row['sample_id']:>8}  {row['source']} epoch {row['epoch']}  {row['shard']} "
            f"document {row['document']} tokens {row['offset']}..{row['offset'] + row['length']}"
        )
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
        for sample_id, ids in zip(batch.sample_ids.tolist(), batch.tokens.tolist(), strict=True):
            print(f"sample {sample_id}: {show(ids, tokenizer, 40)}")
    if not args.json:
        print(f"step {logged.step}: {logged.num_samples} samples, hash {logged.hash} as logged by the run")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("ledger", None))
