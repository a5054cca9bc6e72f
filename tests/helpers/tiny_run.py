"""A training run small enough for a test: shards of a toy language, and the overrides of a run on them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_fp4.checkpoint.offline import list_tensors, read_tensors, resolve
from megatron_fp4.data.shards.shard import token_dtype
from megatron_fp4.data.shards.writer import ShardWriter

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 96


def write_toy_shard(prefix: Path, *, num_documents: int = 200, seed: int = 0) -> Path:
    """A Megatron shard of documents in which each token mostly follows from the one before."""
    random = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(prefix, token_dtype(VOCABULARY))
    for _ in range(num_documents):
        length = int(random.integers(20, 120))
        tokens = [int(random.integers(2, VOCABULARY))]
        for _ in range(length):
            follow = (tokens[-1] * 7 + 3) % VOCABULARY
            tokens.append(follow if random.random() < 0.8 else int(random.integers(2, VOCABULARY)))
        writer.add_document(np.array([*tokens, 1]))
    writer.close()
    return prefix


@dataclass(frozen=True)
class TinyRun:
    """A run directory and the overrides that define its run."""

    run_dir: Path
    overrides: tuple[str, ...]

    def with_overrides(self, *overrides: str, run_dir: Path | None = None) -> TinyRun:
        directory = run_dir or self.run_dir
        return TinyRun(directory, (*self.overrides, f"train.run_dir='{directory}'", *overrides))

    def command(self, num_ranks: int) -> list[str]:
        """The command line that a user would type."""
        if num_ranks == 1:
            return [sys.executable, "-m", "megatron_fp4.pretrain", *self.overrides]
        return [str(ROOT / "launch/torchrun.sh"), "--nproc-per-node", str(num_ranks), *self.overrides]

    def start(self, num_ranks: int = 1) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(num_ranks),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_FP4_PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, num_ranks: int = 1, *, expect: int = 0) -> str:
        """Run to the end; returns the output. Fails if the exit code is another one."""
        process = self.start(num_ranks)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}:\n{output[-4000:]}"
        return output

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint, by key."""
        directory = resolve(self.run_dir / "checkpoints" / f"step_{step:08}")
        return read_tensors(directory, [info.key for info in list_tensors(directory)])


def tiny_run(folder: Path, *overrides: str) -> TinyRun:
    """A run of 40 steps of gpt_tiny on a toy shard under `folder`."""
    shard = folder / "shards" / "toy"
    if not shard.with_suffix(".idx").exists():
        write_toy_shard(shard)
    run_dir = folder / "run"
    base = (
        "model=gpt_tiny",
        "model.num_layers=2",
        f"model.vocab_size={VOCABULARY}",
        "precision.compile=false",
        "data.seq_length=32",
        f"data.sources=[{{name: toy, paths: ['{shard}'], max_epochs: 0}}]",
        "train.device=cpu",
        "train.micro_batch=2",
        "train.global_batch=4",
        f"train.total_tokens={40 * 4 * 32}",
        "train.log_interval_steps=1",
        "optim.lr=3e-3",
        "logging.tensorboard=false",
    )
    return TinyRun(run_dir, (*base, f"train.run_dir='{run_dir}'", *overrides))
