"""Speed of the data pipeline, each number beside its floor or its rival, in one run on one machine.

    python -m benchmarks.data [--workers 2] [--repeat 3] [--run runs/quickstart/nvfp4]

Rivals: Megatron-LM's tools/preprocess_data.py design (a pool of processes, one document at a time, a Python list of
ids per document), written here with the same tokenizer; raw sentencepiece batch encoding as the tokenizer's own
floor; NumPy's permutation + cumsum as the floor of an epoch index. Wall clock and CPU seconds (of all processes; a busy
machine spoils the first, hardly the second), best of --repeat, rivals taken in turn. What a trainer consumes is read
from the metrics of a run that was made on the same machine; launch/quickstart.sh makes runs/quickstart/nvfp4.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import make_corpus, train_tokenizer
from data_tools import tokenize as ours
from megatron_fp4.data.config import DataConfig, SourceConfig
from megatron_fp4.data.shards.writer import ShardWriter
from megatron_fp4.storage.local import local_path

_MODEL: list[Any] = []  # the worker's tokenizer in Megatron's design


def _start_megatron(path: str) -> None:
    import sentencepiece

    _MODEL[:] = [sentencepiece.SentencePieceProcessor(model_file=path)]


def _encode_one(line: bytes) -> tuple[list[int], int]:
    """As Megatron's Encoder.encode: one JSON line -> a list of ids with EOS, and the bytes it came from."""
    model = _MODEL[0]
    ids = model.encode(json.loads(line)["text"])
    ids.append(model.eos_id())
    return ids, len(line)


def megatron_design(corpus: Path, model: Path, output: Path, workers: int) -> None:
    writer = ShardWriter(output / "megatron", np.dtype("<u2"))
    with multiprocessing.Pool(workers, _start_megatron, (str(model),)) as pool, open(corpus, "rb") as lines:
        for ids, _ in pool.imap(_encode_one, lines, 32):
            writer.add_document(np.array(ids, np.uint16))
    writer.close()


def our_design(corpus: Path, model: Path, output: Path, workers: int) -> None:
    argv = [str(corpus), "--tokenizer", str(model), "--output", str(output / "ours"), "--restart"]
    args, policies = ours.parse([*argv, "--workers", str(workers)])
    ours.tokenize(args, policies)


def best(functions: dict[str, Callable[[], None]], repeat: int) -> tuple[dict[str, float], dict[str, float]]:
    """Best wall and best CPU seconds of each, taken in turn so that a busy moment hits all of them."""
    wall, cpu = dict.fromkeys(functions, float("inf")), dict.fromkeys(functions, float("inf"))
    for _ in range(repeat):
        for name, function in functions.items():
            began, times = time.perf_counter(), os.times()
            function()
            wall[name] = min(wall[name], time.perf_counter() - began)
            cpu[name] = min(cpu[name], sum(os.times()[:4]) - sum(times[:4]))
    return wall, cpu


def tokenization(folder: Path, workers: int, repeat: int) -> None:
    corpus, model = folder / "corpus.jsonl", folder / "t.model"
    make_corpus.main(["--output", str(corpus)])
    train_tokenizer.main([str(corpus), "--output", str(model)])
    import sentencepiece

    texts = [json.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    size = sum(len(text.encode()) for text in texts) / 1e6
    raw = sentencepiece.SentencePieceProcessor(model_file=str(model))
    functions: dict[str, Callable[[], None]] = {"raw sentencepiece": lambda: raw.encode(texts, num_threads=1)}
    for count in sorted({1, workers}):
        functions[f"megatron {count}"] = partial(megatron_design, corpus, model, folder, count)
        functions[f"ours {count}"] = partial(our_design, corpus, model, folder, count)
    wall, cpu = best(functions, repeat)
    same = (folder / "ours/shard_00000.bin").read_bytes() == (folder / "megatron.bin").read_bytes()
    print(f"\ntokenization of {size:.1f} MB; the .bin files are {'equal' if same else 'DIFFERENT'}")
    print(f"  {'':34} {'MB/s':>8} {'MB per CPU second':>18}")
    for name in functions:
        print(f"  {name:34} {size / wall[name]:8.2f} {size / cpu[name]:18.2f}")
    for count in sorted({1, workers}):
        a, b = f"megatron {count}", f"ours {count}"
        print(f"  ratio at {count} worker(s): {wall[a] / wall[b]:.2f} in wall clock, {cpu[a] / cpu[b]:.2f} in CPU time")


_INDEX = """
import time, tracemalloc
import numpy as np
from megatron_fp4.data.order.epoch_index import build_index
from megatron_fp4.data.order.permute import digest
from megatron_fp4.storage.local import local_path
lengths = np.random.default_rng(0).integers(1, 4000, {documents}, dtype=np.int64)
tracemalloc.start()
began = time.process_time()
if {floor}:
    order = np.random.default_rng(1).permutation({documents})
    starts = np.cumsum(lengths[order])
else:
    index = build_index(lengths, digest("k"))
print(time.process_time() - began, tracemalloc.get_traced_memory()[1] / 1e6)
"""


def index(documents: int, repeat: int) -> None:
    def measure(floor: bool) -> list[float]:
        code = _INDEX.format(documents=documents, floor=floor)
        return list(map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split()))

    runs = [(measure(True), measure(False)) for _ in range(repeat)]
    floor, own = (min(run[side] for run in runs) for side in (0, 1))
    print(f"\nepoch index of {documents:,d} documents")
    print(f"  numpy permutation + cumsum {floor[0]:6.2f} CPU s, {floor[1]:6.0f} MB at the peak")
    print(f"  build_index                {own[0]:6.2f} CPU s, {own[1]:6.0f} MB at the peak")
    print(f"  ratio {own[0] / floor[0]:.2f} in time, {own[1] / floor[1]:.2f} in memory")


def _itself(hashes: Any) -> Any:
    return hashes


def heldout(documents: int, repeat: int) -> None:
    """Looking for 10,000 held-out documents among `documents`, by their stored hashes."""
    from megatron_fp4.data.overlap import common_documents

    class Hashed:
        def __init__(self, count: int, seed: int) -> None:
            self.shards = [np.random.default_rng(seed).integers(0, 2**63, count, dtype=np.uint64)]
            self.lengths = np.full(count, 100)

    small: Any = Hashed(10_000, 1)  # all that common_documents asks of a ShardedDocuments
    large: Any = Hashed(documents, 2)
    seconds = []
    for _ in range(repeat):
        began = time.process_time()
        common_documents(small, large, _itself)
        seconds.append(time.process_time() - began)
    print(
        f"\n10,000 held-out documents looked for among {documents:,d}: {min(seconds) / documents * 1e9:.1f} CPU ns each"
    )


def consumption(run: Path) -> float:
    """Median tokens per second of a run's steps."""
    from megatron_fp4.train.telemetry.metrics import read_metrics

    rates = [record["tokens_per_second"] for record in read_metrics(run) if "tokens_per_second" in record]
    if not rates:
        raise SystemExit(f"{run} has no metrics.jsonl with steps; make it first (launch/quickstart.sh)")
    return statistics.median(rates)


def loading(folder: Path, run: Path | None, consumed: float) -> None:
    from megatron_fp4.data.loader import build_loader  # torch; the spawned tokenization workers import this file

    chooser = np.random.default_rng(0)
    for number in range(100):
        writer = ShardWriter(folder / f"s_{number:03d}", np.dtype("<u2"))
        lengths = chooser.integers(1, 400, 2000)
        writer.add_documents(chooser.integers(0, 8000, int(lengths.sum())), lengths)
        writer.close()
    sources = [SourceConfig(f"s{n}", [str(folder / f"s_{n:03d}")], 0) for n in range(100)]
    for length in (256, 4096):
        config = DataConfig(sources, seq_length=length, reset_documents=True)
        began = time.perf_counter()
        loader = build_loader(config, global_batch=16, micro_batch=1, dp_rank=0, dp_size=1, total_samples=10**7)
        opened = time.perf_counter()
        loader.batch(0, 16)
        first = time.perf_counter()
        steps = 40
        for step in range(1, steps + 1):
            loader.batch(step * 16, 16)
        rate = steps * 16 * length / (time.perf_counter() - first)
        print(
            f"\nblend of 100 sources, sequences of {length}: opened in {opened - began:.3f} s, "
            f"first batch {first - opened:.3f} s\n  {rate / 1e6:.2f} M tokens/s in one thread"
        )
        if run is not None:
            print(f"  {rate / consumed:,.0f} times the {consumed:,.0f} tokens/s that {run} consumed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--run", type=local_path, help="compare the loader with what this run consumed")
    args = parser.parse_args()
    consumed = consumption(args.run) if args.run else 0.0
    with tempfile.TemporaryDirectory() as folder:
        tokenization(Path(folder), args.workers, args.repeat)
        index(args.documents, args.repeat)
        heldout(args.documents, args.repeat)
        loading(Path(folder), args.run, consumed)


if __name__ == "__main__":
    main()
