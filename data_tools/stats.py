"""How much is in these shards: documents, tokens, lengths."""

from __future__ import annotations

import sys

import numpy as np

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from data_tools.shards_of import list_shards
from megatron_fp4.data.shards.shard import TokenShard
from megatron_fp4.storage.local import local_text


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("stats", __doc__)
    parser.add_argument("paths", nargs="+", type=local_text, help="shard-set directories, prefixes or globs")
    args = parser.parse_args(argv)
    print(f"{'documents':>12} {'tokens':>16} {'dtype':>7}  shard")
    every = []
    for listed in list_shards(args.paths):
        shard = TokenShard(listed.prefix)
        every.append(shard.document_lengths())
        print(f"{shard.num_documents:12,d} {shard.num_tokens:16,d} {shard.dtype!s:>7}  {shard.prefix}")
    lengths = np.concatenate([np.zeros(0, np.int64), *every])
    print(f"{len(lengths):12,d} {int(lengths.sum()):16,d} {'':7}  total")
    if len(lengths):
        low, middle, high = (int(np.percentile(lengths, p)) for p in (5, 50, 95))
        print(
            f"tokens per document: shortest {lengths.min()}, 5% {low}, median {middle}, mean {lengths.mean():.1f}, "
            f"95% {high}, longest {lengths.max()}; empty {int((lengths == 0).sum())}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("stats", None))
