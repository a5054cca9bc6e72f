"""Drive the real slurm cluster of a test: submit launch/slurm.sbatch, wait, read what happened.

A test says what it submits and what it waits for; the program is a parameter, so that the same checks run
with the stand-in (tests/slurm/standin.py) and with the trainer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "slurm" / "launch_cluster.sh"
STANDIN = "tests.slurm.standin"
COMMAND_SECONDS = 120.0
WAIT_SECONDS = 300.0
"""What a busy host may need; an idle one never waits so long."""
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Job:
    """A submitted job and the file that all its attempts write."""

    cluster: Cluster
    number: str
    log_path: Path

    def field(self, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState, ExitCode ("85:0"), Restarts."""
        text = self.cluster.command("scontrol", "show", "job", self.number)
        match = re.search(rf"\b{name}=(\S+)", text)
        assert match, f"scontrol show job has no {name}:\n{text}"
        return match[1]

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def wait(self) -> str:
        """Wait for the end; returns the final state. A requeued job has not ended."""
        self.cluster.wait_until(lambda: self.field("JobState") in FINAL_STATES, self)
        return self.field("JobState")


@dataclass(frozen=True)
class Cluster:
    """A running cluster whose files lie under `base`."""

    base: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.base / "slurm.conf")}

    def command(self, *words: str) -> str:
        """Run one slurm command; returns its output, raises with it if it fails."""
        done = subprocess.run(
            words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(
        self,
        arguments: Sequence[str],
        *,
        module: str = STANDIN,
        options: Sequence[str] = (),
        variables: dict[str, str] | None = None,
    ) -> Job:
        """Submit launch/slurm.sbatch on 2 nodes x 2 ranks; `options` for sbatch, `variables` to its shell."""
        variables = {"MEGATRON_FP4_MODULE": module, "MEGATRON_FP4_PYTHON": sys.executable, **(variables or {})}
        done = subprocess.run(
            [
                "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=20",
                f"--output={self.base}/log/job-%j.log", *options, "launch/slurm.sbatch", *arguments,
            ],
            env={**self.environment, **variables}, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"sbatch: {done.stderr}"
        number = done.stdout.strip()
        return Job(self, number, self.base / "log" / f"job-{number}.log")

    def wait_until(self, condition: Callable[[], bool], job: Job) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, (
                f"not in {WAIT_SECONDS:.0f} s; job {job.number} is {job.field('JobState')}, its log:\n{job.log}"
            )
            time.sleep(0.5)


def events(run_dir: Path) -> list[dict[str, Any]]:
    """The stand-in's record of its attempts."""
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
