"""A request to stop: all ranks agree on the step, save first of all, leave with the same code. Ctrl-C is one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_fp4.checkpoint.directory import complete_steps
from megatron_fp4.train.evaluation import heldout as evaluate_module
from megatron_fp4.train.faults import signals
from megatron_fp4.train.faults.signals import EXIT_INTERRUPTED, EXIT_REQUEUE, StopRequest
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.faults.test_faults_hang import outputs, start_ranks
from tests.train.in_process import TrainerInProcess, make_trainer

ENDLESS = ("train.total_tokens=1e8", "precision=bf16")


def saved_steps(run: TinyRun) -> list[int]:
    return [record["step"] for record in read_metrics(run.run_dir) if "save/failed" in record]


@pytest.mark.parametrize(("axis", "number"), [("tp", signal.SIGTERM), ("dp", signal.SIGUSR1)])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, axis: str, number: signal.Signals) -> None:
    run = tiny_run(tmp_path, *ENDLESS, f"parallel.{axis}=2")
    processes = start_ranks(run, 2, "")
    deadline = time.monotonic() + 120
    while not any(record["step"] >= 3 for record in read_metrics(run.run_dir)):
        assert time.monotonic() < deadline, "the run did not reach the step"
        time.sleep(0.05)
    processes[1].send_signal(number)
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [EXIT_REQUEUE] * 2, first[-2000:] + second[-2000:]
    last = max(record["step"] for record in read_metrics(run.run_dir) if "loss" in record)
    assert saved_steps(run) == [last], "all ranks must save once, at the step on which they agreed"
    assert f"stopped on request (another rank) after step {last}" in first


def test_the_time_limit_of_the_run(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, *ENDLESS, "train.exit_after_seconds=1")
    output = run.run(expect=EXIT_REQUEUE)
    (step,) = saved_steps(run)
    assert f"stopped on request (train.exit_after_seconds) after step {step}" in output
    assert f"resuming after step {step}" in run.run(expect=EXIT_REQUEUE), "the limit counts anew for each attempt"


# -- a request comes before an evaluation -----------------------------------------------------------------------------


def evaluated_run(folder: Path, *overrides: str) -> TinyRun:
    """A run of which every second step is evaluated, on some forty batches."""
    held = f"data.evaluation=[{{name: held, paths: ['{folder}/shards/toy'], max_tokens: 2600, may_overlap: true}}]"
    return tiny_run(folder, "precision=bf16", "model.num_layers=1", held, "train.eval_interval_steps=2", *overrides)


def ask_in_step(trainer: TrainerInProcess, step: int) -> None:
    right = trainer.run.phases.begin

    def begin(number: int, *, exact: bool = False) -> None:
        right(number, exact=exact)
        if number == step:
            trainer.outputs.stop._signal = "SIGTERM"

    trainer.run.phases.begin = begin  # type: ignore[method-assign]


def evaluated_batches(monkeypatch: pytest.MonkeyPatch, trainer: TrainerInProcess) -> list[list[int]]:
    """For each evaluated batch the checkpoints that are complete by then."""
    seen: list[list[int]] = []
    right = evaluate_module.make_inputs

    def make_inputs(*arguments: Any) -> Any:
        seen.append(complete_steps(trainer.run.store.root))
        return right(*arguments)

    monkeypatch.setattr(evaluate_module, "make_inputs", make_inputs)
    return seen


def test_a_stop_is_saved_and_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million held-out tokens take longer than the 30 seconds that slurm gives."""
    run = evaluated_run(tmp_path)
    trainer, console = make_trainer(run.overrides)
    ask_in_step(trainer, 2)
    batches = evaluated_batches(monkeypatch, trainer)
    assert trainer.fit() == EXIT_REQUEUE
    assert (batches, trainer.run.store.complete_steps()) == ([], [2])
    assert console.said[-1] == "step 2: not evaluated, because of the request to stop"


def test_a_stop_in_the_middle_of_an_evaluation_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = evaluated_run(tmp_path)
    trainer, _ = make_trainer(run.overrides)
    batches = evaluated_batches(monkeypatch, trainer)
    right = trainer.run.phases.beat

    def beat() -> None:
        right()
        if len(batches) == 3:
            trainer.outputs.stop._signal = "SIGTERM"

    trainer.run.phases.beat = beat  # type: ignore[method-assign]
    assert trainer.fit() == EXIT_REQUEUE
    assert len(batches) == 2 * evaluate_module.VOTE_BATCHES, "the evaluation was made to its end, or a step after it"
    assert trainer.run.store.complete_steps() == [2]
    assert not [record for record in read_metrics(run.run_dir) if "eval/held/loss" in record], "a part was logged"


def test_the_end_of_a_run_is_evaluated_after_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = evaluated_run(tmp_path, f"train.total_tokens={2 * 4 * 32}")
    trainer, _ = make_trainer(run.overrides)
    ask_in_step(trainer, 2)
    batches = evaluated_batches(monkeypatch, trainer)
    assert trainer.fit() == EXIT_REQUEUE
    assert batches
    assert batches[0] == [2], "the state was not saved first"
    assert [record["step"] for record in read_metrics(run.run_dir) if "eval/held/loss" in record] == [2]


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def wait_until(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_ctrl_c_asks_and_the_second_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    acts: list[Any] = []
    monkeypatch.setattr(signals, "exit_process", acts.append)
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        stop.last_act = lambda: acts.append("released")
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: stop.requested())
        assert (stop.reason, acts) == ("SIGINT", [])
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: len(acts) == 2)
    assert acts == ["released", EXIT_INTERRUPTED]
    assert "once more to end at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_saves_and_gives_the_lock_back(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, *ENDLESS)
    process = run.start()
    wait_until(lambda: any(record["step"] >= 3 for record in read_metrics(run.run_dir)))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, output[-2000:]
    assert "Traceback" not in output
    assert len(saved_steps(run)) == 1
    assert not (run.run_dir / "run.lock").exists()


def test_the_second_ctrl_c_ends_a_rank_that_hangs_and_gives_the_lock_back(tmp_path: Path) -> None:
    """Rank 1 hangs, and rank 0 waits for it in a collective, where Python's own handler is not called."""
    run = tiny_run(tmp_path, *ENDLESS, "parallel.dp=2")
    processes = start_ranks(run, 2, "hang,1,3,reduce")
    wait_until(lambda: any(record["step"] >= 2 for record in read_metrics(run.run_dir)))
    time.sleep(0.5)
    for _ in range(2):
        for process in processes:
            process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    text = "".join(outputs(processes))
    assert [process.returncode for process in processes] == [EXIT_INTERRUPTED] * 2, text[-2000:]
    assert "Traceback" not in text
    assert not (run.run_dir / "run.lock").exists(), "a start from another host would wait 180 s"
