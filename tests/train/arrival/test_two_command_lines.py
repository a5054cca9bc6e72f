"""Two processes of one job that were not started alike, as two nodes with a stale command line or environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from megatron_fp4.checkpoint.offline import resolve
from megatron_fp4.comm.local import free_port
from megatron_fp4.train.faults.signals import EXIT_CONFIG
from tests.helpers.tiny_run import ROOT, tiny_run


def run_ranks(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> list[tuple[int, str]]:
    """Exit code and output of each rank, all on this host without a launcher."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_fp4.pretrain", *command],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "WORLD_SIZE": str(len(commands)), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (command, environment) in enumerate(zip(commands, environments, strict=True))
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def test_a_different_layout_learning_rate_and_directory_are_refused_by_all(tmp_path: Path) -> None:
    """Each of the first two trained to the end or hung."""
    run = tiny_run(tmp_path, "precision=bf16", "train.stop_after_steps=1")
    other = run.with_overrides("parallel.tp=2", "optim.lr=0.5", run_dir=tmp_path / "other")
    (code, printed), (other_code, other_said) = run_ranks([run.overrides, other.overrides], [{}, {}])
    assert (code, other_code) == (EXIT_CONFIG, EXIT_CONFIG), printed + other_said
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    for key in ("parallel.tp = 1 on rank 0", "optim.lr = 0.003 on rank 0", f"{tmp_path}/other on rank 1"):
        assert key in line
    assert "error" not in other_said, "one rank speaks"
    assert not run.run_dir.exists()


def test_an_override_that_only_one_rank_refuses_ends_all(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "precision=bf16", "train.stop_after_steps=1")
    (code, printed), (other_code, _) = run_ranks([run.overrides, [*run.overrides, "parallel.tp=3"]], [{}, {}])
    assert (code, other_code) == (EXIT_CONFIG, EXIT_CONFIG), printed
    assert "parallel.tp = 1 on rank 0" in printed
    assert "layout does not fit the world size" in printed, "and why rank 1 refused"


def test_interpolations_are_rank_0s_on_all_ranks(tmp_path: Path) -> None:
    """A directory by the clock was another one on each rank, and no checkpoint was ever complete."""
    run = tiny_run(
        tmp_path, "precision=bf16", "train.stop_after_steps=1", "optim.lr=${oc.env:MYLR}", "optim.warmup_tokens=0",
        f"train.run_dir={tmp_path}/${{oc.env:WHEN}}",
    )  # fmt: skip
    outcomes = run_ranks([run.overrides] * 2, [{"MYLR": "0.25", "WHEN": "now"}, {"WHEN": "later"}])
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    stored = yaml.safe_load((tmp_path / "now/config.yaml").read_text())
    assert (stored["optim"]["lr"], stored["train"]["run_dir"]) == (0.25, f"{tmp_path}/now")
    assert resolve(tmp_path / "now/checkpoints").name == "step_00000001"
    assert not (tmp_path / "later").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interpolation_of_one_rank_only_is_a_difference_of_settings(tmp_path: Path, rank: int) -> None:
    """The ranks took each other's words for answers to other questions: one left without a word, the other waited."""
    run = tiny_run(tmp_path, "precision=bf16", "train.stop_after_steps=1")
    commands: list[Sequence[str]] = [run.overrides, run.overrides]
    commands[rank] = [*run.overrides, "optim.lr=${oc.env:MYLR}"]
    (code, printed), (other_code, _) = run_ranks(commands, [{"MYLR": "0.003"}] * 2)
    assert (code, other_code) == (EXIT_CONFIG, EXIT_CONFIG), printed
    assert "the ranks differ in settings: optim.lr = " in printed
    assert f"${{oc.env:MYLR}} on rank {rank}" in printed
    assert f"0.003 on rank {1 - rank}" in printed


def test_a_rank_that_dies_after_it_agreed_is_missed_within_the_time_out(tmp_path: Path) -> None:
    """Rank 0 waited for its next word for as long as a look at all data may take, an hour."""
    lines = (
        "import os, megatron_fp4.train.arrival.agreement as agreement",
        "agree = agreement.agree_on",
        "agreement.agree_on = lambda *_: (agree(*_), os._exit(9))",
    )
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    run = tiny_run(tmp_path, "precision=bf16", "train.stop_after_steps=1", "parallel.init_timeout_seconds=8")
    (code, printed), (other_code, _) = run_ranks(
        [run.overrides] * 2, [{}, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}]
    )
    assert (code, other_code) == (1, 9), printed
    assert "no word from rank(s) 1 about the start within 8 s" in printed
