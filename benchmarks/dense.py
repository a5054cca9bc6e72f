"""What experts cost a model that has none: whole runs of a dense GPT before experts were written and now.

    python -m benchmarks.dense                      against the last commit without experts
    python -m benchmarks.dense --base REVISION      against another one of this repository

Two processes run `pretrain` on the same toy tokens, one from a checkout of the revision, and take steps in turns, so
that a busy machine slows both alike. A step goes from one `zero_grad` to the next: batch, forward, backward, sums,
update, logging. Then both count what a step hands to torch: operations, collectives (of two tensor-parallel ranks) and
read-backs. Whatever else was changed between the two revisions is in the numbers too.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.timing import print_table
from megatron_fp4.data.shards.shard import token_dtype
from megatron_fp4.data.shards.writer import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
LAST_DENSE = "ce99da9"
VOCABULARY = 512
WARM_UP = 2
"""Steps before the first that is timed or counted."""
MODEL = (
    "model=gpt_tiny",
    f"model.vocab_size={VOCABULARY}",
    "data.tokenizer=",
    "data.seq_length=128",
    "train.micro_batch=4",
    "train.global_batch=8",
    "train.eval_interval_steps=0",
    "train.save_interval_steps=0",
    "train.log_interval_steps=1",
    "train.device=cpu",
    "logging.wandb=disabled",
    "logging.tensorboard=false",
    "precision.compile=false",
)
PRECISIONS = {"bf16": "precision=bf16", "nvfp4": "precision/recipe=nvfp4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=LAST_DENSE, help="the revision to compare with")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each that are timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), Path(name) / "base"
        _git("worktree", "add", "--quiet", "--detach", str(base), args.base)
        try:
            _write_tokens(folder / "toy")
            for label, precision in PRECISIONS.items():
                _compare(folder, {args.base: base, "now": ROOT}, label, precision, args.rounds)
        finally:
            _git("worktree", "remove", "--force", str(base))


def _compare(folder: Path, trees: dict[str, Path], label: str, precision: str, rounds: int) -> None:
    children = {name: _start(tree, folder, name, precision, rounds + WARM_UP) for name, tree in trees.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for number in range(rounds + WARM_UP):
        for name, child in children.items():
            assert child.stdin is not None
            print("go", file=child.stdin, flush=True)
            answer = _answer(child)
            if number >= WARM_UP:
                seconds[name].append(float(answer))
    for child in children.values():
        child.communicate("go\n")
    print_table(f"dense, {label}: a step, CPU time of the process", seconds, next(iter(trees)))
    before, now = (_count(tree, folder, name, precision) for name, tree in trees.items())
    for name, counts in zip(trees, (before, now), strict=True):
        sent = sum(count for operation, count in counts.items() if operation.startswith("c10d"))
        reads = counts["aten._local_scalar_dense.default"]
        print(f"{name:44s} {counts.total()} operations, {sent} collectives, {reads} read-backs")
    more = {name: now[name] - before[name] for name in now | before if now[name] != before[name]}
    print("what differs:", ", ".join(f"{name} {count:+}" for name, count in sorted(more.items())) or "nothing")


def _count(tree: Path, folder: Path, name: str, precision: str) -> Counter[str]:
    """What one of two tensor-parallel ranks hands to torch in a step, by name."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        _start(tree, folder, f"{name}-counted", precision, WARM_UP + 1, "parallel.tp=2", rank=rank, port=port)
        for rank in range(2)
    ]
    counts = Counter[str](json.loads(_answer(ranks[0])))
    for rank in ranks:
        rank.communicate()
    return counts


def _start(
    tree: Path, folder: Path, name: str, precision: str, steps: int, *overrides: str, rank: int = -1, port: int = 0
) -> subprocess.Popen[str]:
    """A run from `tree`; with a rank, of two that count instead of taking turns."""
    run = [
        *MODEL,
        precision,
        f"data.sources=[{{name: toy, paths: ['{folder / 'toy'}']}}]",
        f"train.total_tokens={(steps + 1) * 8 * 128}",
        f"train.run_dir='{folder / 'runs' / name / precision.replace('/', '-')}'",
        *overrides,
    ]
    settings = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "BENCHMARK_COUNTS": "1" if rank >= 0 else ""}
    if rank >= 0:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        settings |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "localhost"}
    return subprocess.Popen(
        [sys.executable, __file__, "--child", *run],
        cwd=tree,
        env=os.environ | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answer(child: subprocess.Popen[str]) -> str:
    """What comes behind the next mark in a child's output."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step: "):
            return line.removeprefix("step: ").strip()
    raise SystemExit("a run ended early; see its error above")


def _run_child(overrides: list[str]) -> None:
    """In the process of a revision: `pretrain`, whose optimizer's `zero_grad` begins a step."""
    from megatron_fp4.optim import Zero1Optimizer  # of the revision whose process this is

    counts: Counter[str] = Counter()
    begin, steps, began = Zero1Optimizer.zero_grad, 0, 0.0
    counting = bool(os.environ["BENCHMARK_COUNTS"])

    def zero_grad(optimizer: Zero1Optimizer) -> None:
        nonlocal steps, began
        if counting:
            if steps == WARM_UP + 1:
                print(f"step: {json.dumps(counts)}", flush=True)
            counts.clear()
        else:
            if steps:
                print(f"step: {time.process_time() - began}", flush=True)
            sys.stdin.readline()
            began = time.process_time()
        steps += 1
        begin(optimizer)

    mock.patch.object(Zero1Optimizer, "zero_grad", zero_grad).start()
    sys.argv = ["pretrain", *overrides]
    if not counting:
        runpy.run_module("megatron_fp4.pretrain", run_name="__main__")
        return
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        runpy.run_module("megatron_fp4.pretrain", run_name="__main__")


def _write_tokens(prefix: Path) -> None:
    random, writer = np.random.default_rng(0), ShardWriter(prefix, token_dtype(VOCABULARY))
    for _ in range(400):
        writer.add_document(random.integers(2, VOCABULARY, 200))
    writer.close()


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _run_child(sys.argv[2:])
    else:
        main()
