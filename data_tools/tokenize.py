"""Text to token shards: many workers, bounded memory, resumable, the same bytes whatever the number of workers.

Every document ends with one EOS. With --heldout-fraction, a hash of a document's text decides its split, so equal
texts never lie on both sides. Output: <output>/ (or <output>/train and <output>/heldout), each a committed shard set.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from data_tools.documents import expand_inputs, read_batches, texts_of
from data_tools.policies import Policies, Report, add_policy_arguments, policies_of, print_counts
from data_tools.pool import ordered_map
from data_tools.progress import ProgressBar
from data_tools.records import RawBatch
from data_tools.shard_set import SplitWriter, check_not_nested, finished, remove_sets
from megatron_fp4.data.shards.shard import token_dtype
from megatron_fp4.data.text.special import SpecialChoice, choice_of
from megatron_fp4.data.text.tokenizer import Tokenizer, eos_of, load_tokenizer
from megatron_fp4.storage.local import local_path, local_text


class Encoded(NamedTuple):
    """A batch as ids: per split, flat tokens and document lengths; and what was counted."""

    splits: dict[str, tuple[NDArray, NDArray]]
    counts: Counter[str]


class Encoder:
    """Lives in a worker: raw records -> ids."""

    def __init__(self, tokenizer: Tokenizer, text_key: str, policies: Policies, heldout_fraction: float) -> None:
        self.tokenizer = tokenizer
        self.eos = np.array([eos_of(tokenizer)], np.int32)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.text_key = text_key
        self.policies = policies
        self.heldout = heldout_fraction

    def encode(self, batch: RawBatch) -> Encoded:
        report = Report()
        texts = texts_of(batch, self.text_key, self.policies, report)
        parts: dict[str, list[str]] = {"train": [], "heldout": []} if self.heldout else {"all": texts}
        for text in texts if self.heldout else []:
            parts["heldout" if _unit_hash(text) < self.heldout else "train"].append(text)
        try:
            return Encoded({name: self._ids(part, report.counts) for name, part in parts.items()}, report.counts)
        except ValueError as error:
            raise ValueError(f"{batch.where}: {error}") from None

    def _ids(self, texts: list[str], counts: Counter[str]) -> tuple[NDArray, NDArray]:
        if not texts:
            return np.zeros(0, self.dtype), np.zeros(0, np.int64)
        documents = self.tokenizer.encode_batch(texts)
        self._count_losses(texts, documents, counts)
        lengths = np.array([len(ids) + 1 for ids in documents], np.int64)
        parts = chain.from_iterable((ids, self.eos) for ids in documents)
        return np.concatenate(list(parts)).astype(self.dtype), lengths

    def _count_losses(self, texts: list[str], documents: list[NDArray], counts: Counter[str]) -> None:
        """Count the tokens that stand for what the vocabulary lacks; and, of a sample, documents not restored."""
        unknown = self.tokenizer.special.unk
        if unknown is not None:
            counts["unknown tokens"] += sum(int((ids == unknown).sum()) for ids in documents)
        for text, ids in zip(texts, documents, strict=True):
            if zlib.crc32(text.encode()) % RESTORED_ONE_IN == 0:
                counts[f"documents decoded again (one in {RESTORED_ONE_IN})"] += 1
                counts["decoded again to another text"] += self.tokenizer.decode(ids.tolist()) != text


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


RESTORED_ONE_IN = 64
"""Documents, chosen by a hash of their text, that are decoded again: what the vocabulary changes is counted."""

_ENCODER: list[Encoder] = []  # one per worker process: a pool gives its functions no other place for state


def _start_encoder(
    tokenizer: str, choice: SpecialChoice, text_key: str, policies: Policies, heldout_fraction: float
) -> None:
    _ENCODER[:] = [Encoder(load_tokenizer(tokenizer, choice), text_key, policies, heldout_fraction)]


def _encode(batch: RawBatch) -> Encoded:
    return _ENCODER[0].encode(batch)


def tokenize(args: argparse.Namespace, policies: Policies) -> dict[str, dict[str, Any]]:
    """Run the job that the arguments describe, or finish it. Returns the manifests by split."""
    files = expand_inputs(args.inputs)
    tokenizer = load_tokenizer(args.tokenizer, choice_of(args))
    eos = eos_of(tokenizer)  # refused here, before there is an output folder or a worker
    said_by = tokenizer.special.said_by.get("eos")
    print(f"documents end with {eos} {tokenizer.piece(eos)!r}" + (f", says {said_by}" if said_by else ""))
    folders = {"all": args.output}
    if args.heldout_fraction:
        folders = {"train": args.output / "train", "heldout": args.output / "heldout"}
    check_not_nested(folders)
    job = _job(args, files, tokenizer, policies)
    if args.restart:
        remove_sets(args.output, folders)
    manifests = finished(args.output, folders, job)
    if manifests is not None:
        return manifests
    with SplitWriter(args.output, folders, token_dtype(tokenizer.vocab_size), job) as writer:
        if any(writer.position):
            print(f"resuming at file {writer.position.file}, offset {writer.position.offset}")
        _fill(writer, files, args, policies)
        return writer.finish(_facts(tokenizer, files))


def _fill(writer: SplitWriter, files: list[Path], args: argparse.Namespace, policies: Policies) -> None:
    """Encode what is left of the input."""
    batches = read_batches(files, policies, text_key=args.text_key, start=writer.position)
    initargs = (str(args.tokenizer), choice_of(args), args.text_key, policies, args.heldout_fraction)
    with ProgressBar(sum(path.stat().st_size for path in files), resumed=any(writer.position)) as bar:
        results = ordered_map(_encode, batches, workers=args.workers, initializer=_start_encoder, initargs=initargs)
        for batch, encoded in results:
            for name, (tokens, lengths) in encoded.splits.items():
                writer.add(name, tokens, lengths)
            writer.counters += encoded.counts
            writer.end_batch(batch.end, args.shard_tokens)
            bar.update(batch.file_bytes)


def _facts(tokenizer: Tokenizer, files: list[Path]) -> dict[str, Any]:
    return {
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "special_tokens": {**tokenizer.special.ids(), "policy": "one eos after every document, no bos"},
        "sources": [{"name": path.name, "bytes": path.stat().st_size} for path in files],
    }


def _job(args: argparse.Namespace, files: list[Path], tokenizer: Tokenizer, policies: Policies) -> dict[str, Any]:
    """What decides the output, as JSON: a resumed run must agree in all of it."""
    return {
        "inputs": [[path.name, path.stat().st_size, _ends_digest(path)] for path in files],
        "tokenizer": tokenizer.fingerprint,
        "special_tokens": tokenizer.special.ids(),
        "text_key": args.text_key,
        "heldout_fraction": args.heldout_fraction,
        "shard_tokens": args.shard_tokens,
        **dataclasses.asdict(policies),
    }


def _ends_digest(path: Path) -> str:
    with open(path, "rb") as file:
        content = hashlib.blake2b(file.read(1 << 16), digest_size=8)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        content.update(file.read())
    return content.hexdigest()


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Policies]:
    parser = tool_parser("tokenize", __doc__)
    parser.add_argument(
        "inputs", nargs="+", type=local_text, help="files or globs: .jsonl .txt .parquet, also .gz .zst"
    )
    parser.add_argument("--output", type=local_path, required=True, help="directory of the shard set(s)")
    parser.add_argument("--tokenizer", type=local_path, required=True, help=".model, tokenizer.json or .tiktoken")
    for role, meaning in (("eos", "ends"), ("bos", "begins"), ("pad", "pads")):
        parser.add_argument(f"--{role}", metavar="TOKEN_OR_ID", help=f"the token that {meaning} a document")
    parser.add_argument("--text-key", default="text", help="JSON key or Parquet column")
    parser.add_argument("--heldout-fraction", type=float, default=0.0, help="of the documents, by hash of the text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=512 << 20,
        help="a shard is closed once it has this many (looked at after every batch of about 1 MiB of text)",
    )
    parser.add_argument("--restart", action="store_true", help="delete earlier output instead of going on")
    add_policy_arguments(parser)
    args = parser.parse_args(argv)
    if args.workers < 1 or args.shard_tokens < 1 or not 0 <= args.heldout_fraction < 1:
        parser.error("--workers and --shard-tokens must be at least 1, --heldout-fraction in [0, 1)")
    return args, policies_of(args)


def main(argv: list[str] | None = None) -> int:
    args, policies = parse(argv)
    manifests = tokenize(args, policies)
    for name, manifest in manifests.items():
        print(
            f"{name:8} {manifest['num_documents']:10,d} documents {manifest['num_tokens']:14,d} tokens "
            f"{len(manifest['shards'])} shard(s) of {manifest['dtype']}"
        )
    print_counts(next(iter(manifests.values()))["counters"])
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("tokenize", None))
