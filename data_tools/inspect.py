"""Print a document of a shard, or a sample of a run's order with the documents it is made of."""

from __future__ import annotations

import argparse
import sys

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from megatron_fp4.data.checks import check_vocabulary
from megatron_fp4.data.ledger import last_start, ledger, reopen
from megatron_fp4.data.shards.documents import open_documents
from megatron_fp4.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_fp4.storage.local import local_path, local_text


def show(ids: list[int], tokenizer: Tokenizer | None, limit: int) -> str:
    """Ids, and their text if there is a tokenizer."""
    more = f" ... {len(ids) - limit} more" if len(ids) > limit else ""
    text = "" if tokenizer is None else f"\ntext {tokenizer.decode(ids[:limit])!r}"
    return f"ids {ids[:limit]}{more}{text}"


def document(args: argparse.Namespace, tokenizer: Tokenizer | None) -> None:
    documents = open_documents("inspect", args.paths)
    check_vocabulary([documents], None, tokenizer.fingerprint if tokenizer else None)
    if not 0 <= args.document < documents.num_documents:
        raise ValueError(f"document {args.document} is not in 0..{documents.num_documents - 1}")
    ids = documents.document(args.document).tolist()
    place = documents.place(args.document)
    print(f"document {args.document}: document {place.document} of {place.shard}, {len(ids)} tokens")
    print(show(ids, tokenizer, args.limit))


def sample(args: argparse.Namespace, tokenizer: Tokenizer | None) -> None:
    """`--sample` is a sample id of the run's order, as batches and the ledger name them."""
    if args.sample < 0:
        raise ValueError(f"sample {args.sample}: ids begin with 0")
    loader = reopen(last_start(args.run), tokenizer.fingerprint if tokenizer else None)
    index = loader.plan.index_of(args.sample)
    if loader.plan.id_of(index) != args.sample:
        raise ValueError(f"sample {args.sample} was skipped (data.skip has {loader.plan.skip})")
    for row in ledger(loader, index, 1):
        print(
            f"sample {row['sample_id']}: {row['source']} epoch {row['epoch']}, document {row['document']} of "
            f"{row['shard']}, tokens {row['offset']} to {row['offset'] + row['length']}"
        )
    print(show(loader.batch(index, 1).tokens[0].tolist(), tokenizer, args.limit))


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("inspect", __doc__)
    parser.add_argument(
        "paths", nargs="*", type=local_text, help="shard-set directory, prefix or glob (with --document)"
    )
    parser.add_argument("--document", type=int, help="number of the document in the given paths")
    parser.add_argument("--run", type=local_path, help="directory of a run (with --sample)")
    parser.add_argument("--sample", type=int, help="sample id in the run's order")
    parser.add_argument("--tokenizer", type=local_path, help="print text too")
    parser.add_argument("--limit", type=int, default=200, help="ids to print")
    args = parser.parse_args(argv)
    if args.limit < 0:
        parser.error("--limit must not be negative")
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.paths and args.document is not None and args.run is None:
        document(args, tokenizer)
    elif args.run is not None and args.sample is not None and not args.paths:
        sample(args, tokenizer)
    else:
        parser.error("give PATH --document N, or --run DIR --sample ID")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("inspect", None))
