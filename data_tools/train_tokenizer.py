"""Train a sentencepiece model (BPE or unigram) on a sample of JSONL or text documents.

Lossless by construction: no normalisation, no dummy prefix, white space kept, runs of spaces are pieces, unknown
characters become bytes. Deterministic: documents are chosen by a hash of their text, not by a generator.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_tools.arguments import tool_parser
from data_tools.cli import run_tool
from data_tools.documents import read_texts
from data_tools.policies import Policies, Report, add_policy_arguments, policies_of, print_counts
from megatron_fp4.storage.local import local_path, local_text

LONGEST_LINE_BYTES = 4096  # sentencepiece drops longer lines without a word, so they are cut here


def sample_lines(files: list[Path], text_key: str, max_bytes: int, policies: Policies, report: Report) -> Iterator[str]:
    """Lines of documents that a hash selects, about `max_bytes` in total."""
    total = sum(path.stat().st_size for path in files)
    keep = min(1.0, max_bytes / max(1, total)) * 2**64
    left = max_bytes
    for text in read_texts(files, text_key, policies, report):
        if int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") > keep:
            continue
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE_BYTES // 4):
                part = line[start : start + LONGEST_LINE_BYTES // 4]
                left -= len(part.encode())
                if left < 0:
                    return
                if part.strip():
                    yield part


def train(lines: Iterator[str], output: Path, *, vocab_size: int, model_type: str, threads: int) -> None:
    """Write the model to `output` (.model), atomically."""
    import sentencepiece

    temporary = output.with_name(output.name + ".tmp")
    with open(temporary, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=threads,
            max_sentence_length=LONGEST_LINE_BYTES,
            minloglevel=2,
        )
    temporary.replace(output)


def main(argv: list[str] | None = None) -> int:
    parser = tool_parser("train-tokenizer", __doc__)
    parser.add_argument(
        "inputs", nargs="+", type=local_text, help="files or globs: .jsonl .txt .parquet, also .gz .zst"
    )
    parser.add_argument("--output", type=local_path, required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--sample-bytes", type=int, default=8_000_000, help="text to train on; more is slower")
    parser.add_argument("--threads", type=int, default=2)
    add_policy_arguments(parser)
    args = parser.parse_args(argv)
    policies = policies_of(args)
    from data_tools.documents import expand_inputs
    from megatron_fp4.data.text.tokenizer import describe_tokenizer, load_tokenizer

    started, report = time.monotonic(), Report()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = sample_lines(expand_inputs(args.inputs), args.text_key, args.sample_bytes, policies, report)
    try:
        train(lines, args.output, vocab_size=args.vocab_size, model_type=args.model_type, threads=args.threads)
    except RuntimeError as error:
        args.output.with_name(args.output.name + ".tmp").unlink(missing_ok=True)
        raise ValueError(f"sentencepiece refused: {error}. Lower --vocab-size or give more --sample-bytes") from None
    print_counts(report.counts)
    print(f"trained on a sample of at most {args.sample_bytes:,d} bytes in {time.monotonic() - started:.1f} s")
    print(describe_tokenizer(load_tokenizer(args.output)))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("train_tokenizer", None))
