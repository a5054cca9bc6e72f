"""A rank that hangs is named, with step, phase and stack, and the job ends within its time-out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_fp4.comm.local import free_port
from megatron_fp4.comm.mesh import Group
from megatron_fp4.train.faults.signals import EXIT_HUNG
from megatron_fp4.train.faults.watchdog import Notice, Watchdog, by_place, late_ranks, summary
from megatron_fp4.train.phases import Phases
from tests.helpers.tiny_run import ROOT, TinyRun, tiny_run
from tests.train.in_process import make_trainer

TIMEOUT = "train.hang_timeout_seconds=4"


def start_ranks(run: TinyRun, num_ranks: int, fault: str) -> list[subprocess.Popen[str]]:
    """Without a launcher, so that every rank's exit code is seen and nothing else ends them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.faults.faulty", *run.overrides],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1", "TEST_FAULT": fault},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    try:
        return [process.communicate(timeout=60)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        raise


def test_a_hanging_rank_is_named_with_its_stack(tmp_path: Path) -> None:
    """Rank 1 hangs in its forward pass at tp 2; rank 0 waits for it in a collective of the same phase."""
    run = tiny_run(tmp_path, "parallel.tp=2", TIMEOUT, f"logging.on_event='cat >> {tmp_path}/pager'")
    processes = start_ranks(run, 2, "hang,1,3,forward_backward")
    waiting, hanging = outputs(processes)
    codes = [process.returncode for process in processes]
    assert codes == [EXIT_HUNG, EXIT_HUNG], f"the job must end by the watchdog:\n{waiting[-2000:]}\n{hanging[-2000:]}"
    named = waiting + hanging
    assert named.count("no progress for") == 1, "the log must have one summary"
    assert "rank 1 hangs: step 3, phase forward_backward" in named, "the log must name rank, step and phase"
    assert "1 other rank(s): step 3, phase forward_backward, waiting in the collective" in named
    assert "stack of the main thread of rank 1" in hanging
    assert not (run.run_dir / "run.lock").exists(), "a start from another host would wait 180 s"
    assert "in hang\n    time.sleep" in hanging, "the stack must show the line that hangs"
    assert "stack of" not in waiting, "the stack of a rank that only waits would hide the cause"
    assert (
        '"event": "hang", "text": "no progress in phase forward_backward of step 3' in (tmp_path / "pager").read_text()
    )


def test_a_stopped_process_is_named_by_the_others(tmp_path: Path) -> None:
    processes = start_ranks(tiny_run(tmp_path, "parallel.dp=2", TIMEOUT), 2, "stopped,1,3,reduce")
    (waiting,) = outputs(processes[:1])
    assert processes[0].returncode == EXIT_HUNG, waiting[-2000:]
    assert processes[1].poll() is None, "the test itself is wrong: the process was not stopped"
    processes[1].kill()
    processes[1].communicate()
    assert "rank 1 gives no sign of life" in waiting


def test_a_hang_in_native_code_ends_too(tmp_path: Path) -> None:
    """Python's lock is held, so that no Python thread runs: only faulthandler's own timer can end the process."""
    (process,) = start_ranks(
        tiny_run(tmp_path, TIMEOUT, "checkpoint.timeout_seconds=1"), 1, "hang_in_native_code,0,2,update"
    )
    (output,) = outputs([process])
    assert process.returncode == 1
    assert "in hang_in_native_code" in output, "all stacks must be printed before the end"


def test_under_the_launcher_the_job_ends_with_the_watchdogs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_FP4_MODULE", "tests.train.faults.faulty")
    monkeypatch.setenv("TEST_FAULT", "hang,1,2,reduce")
    began = time.monotonic()
    output = tiny_run(tmp_path, "parallel.dp=2", TIMEOUT).run(2, expect=EXIT_HUNG)
    assert "rank 1 hangs: step 2, phase reduce" in output
    assert time.monotonic() - began < 50, "the launcher waited for its own time-out instead"


@pytest.mark.parametrize(("phase", "step"), [("load_checkpoint", 0), ("evaluate", 2), ("save", 2)])
def test_a_hang_outside_the_steps(tmp_path: Path, phase: str, step: int) -> None:
    """Before the first step, between two, and in the last save: the same names and the same end."""
    data = f"data.evaluation=[{{name: held, paths: ['{tmp_path / 'shards' / 'toy'}'], may_overlap: true}}]"
    settings = ("train.stop_after_steps=2", data, "train.eval_interval_steps=2", "checkpoint.timeout_seconds=1")
    run = tiny_run(tmp_path, *settings, TIMEOUT)
    if phase == "load_checkpoint":
        make_trainer(run.overrides)[0].fit()
    processes = start_ranks(run.with_overrides("parallel.dp=2"), 2, f"hang,1,{step},{phase}")
    waiting, hanging = outputs(processes)
    codes = [process.returncode for process in processes]
    # Evaluating needs the other rank only now and then: it may not have been late yet, and ends as a victim.
    assert codes[1] == EXIT_HUNG, hanging[-2000:]
    assert codes[0] == EXIT_HUNG or (codes[0] == 1 and phase == "evaluate"), waiting[-2000:]
    assert f"rank 1 hangs: step {step}, phase {phase}, at " in waiting + hanging
    assert "in hang\n    time.sleep" in hanging, "the stack must show the line that hangs"


def test_a_hang_before_the_ranks_have_met(tmp_path: Path) -> None:
    """There is no board yet: the rank tells of itself, and does not keep its node until somebody looks."""
    (process,) = start_ranks(tiny_run(tmp_path, "train.hang_timeout_seconds=1"), 1, "hang,0,0,prepare")
    (output,) = outputs([process])
    assert process.returncode == EXIT_HUNG, output[-2000:]
    assert "rank 0 hangs: step 0, phase prepare, at " in output
    assert "in hang\n    time.sleep" in output


def test_a_slow_evaluation_or_save_is_no_hang() -> None:
    """Covered by what ends a phase: every evaluation batch beats, and a save has its own time-out on top."""
    phases = Phases(torch.device("cpu"))
    with Watchdog(phases, 0, 0.4, {"save": 5.0}) as watchdog:
        watchdog.meet(Group.single("world"))
        phases.enter("evaluate")
        for _ in range(4):
            time.sleep(0.2)
            phases.beat()
        phases.enter("save")
        time.sleep(0.8)  # a watchdog that is wrong ends this process


def notice(step: int, collective: str = "") -> Notice:
    return Notice(step, "reduce", collective, "file.py:1 f", "host")


@pytest.mark.parametrize(
    ("notices", "expected"),
    [
        ({0: notice(5, "all_reduce"), 1: notice(5)}, [1]),
        ({0: notice(5, "all_reduce"), 2: notice(5, "all_reduce")}, [1]),
        ({0: notice(5, "all_reduce"), 1: notice(4, "broadcast"), 2: notice(5, "all_reduce")}, [1]),
        ({0: notice(4), 1: notice(5), 2: notice(5, "all_reduce")}, [0]),
    ],
    ids=["in no collective", "silent", "an earlier step", "the earliest of several"],
)
def test_who_is_late(notices: dict[int, Notice], expected: list[int]) -> None:
    late = late_ranks(notices, range(1 + max(notices)))
    assert late == expected
    assert f"rank {expected[0]} " in summary(notices, late, 3.0)


def test_ranks_at_the_same_place_are_one_line() -> None:
    """All wait for each other (a dead link): 8,192 lines and as many stacks would say no more."""
    notices = {rank: Notice(5, "reduce", "all_reduce", "file.py:1 f", f"host{rank // 8}") for rank in range(8192)}
    del notices[77]
    late = late_ranks(notices, range(8192))
    assert summary(notices, late, 3.0).splitlines()[1:] == [
        "  rank 77 gives no sign of life (stopped, or the node is gone)",
        "  8191 other rank(s): step 5, phase reduce, waiting in the collective all_reduce (host host0)",
    ]
    notices[77] = Notice(5, "reduce", "broadcast", "file.py:2 g", "host9")
    late = late_ranks(notices, range(8192))
    assert summary(notices, late, 3.0).splitlines()[1:] == [
        "  8191 ranks hang, 0-76,78-8191: step 5, phase reduce, waiting in the collective all_reduce (host host0)",
        "  rank 77 hangs: step 5, phase reduce, waiting in the collective broadcast (host host9)",
    ]
    assert [kind[0] for kind in by_place(notices, late)] == [0, 77], "two stacks, and not 8,192"
