"""A sweep: one run for each combination, in directories named by what differs; one that fails does not end it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from megatron_fp4.cli import pretrain
from megatron_fp4.cli.sweep.point import PointTask
from tests.helpers.tiny_run import tiny_run

STARTED = """
import pathlib, re, signal, sys, time
words = sys.argv[1:]
with open({log!r}, "a") as log:
    print("\\t".join(words), file=log)
text = " ".join(words)
if "beta1=0.7" in text:
    sys.exit(7)
if "beta1=0.85" in text:
    sys.exit(85)
if "beta1=0.6" in text:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    pathlib.Path({log!r} + ".ready").touch()
    time.sleep(60)
"""
"""What stands for a run: writes its arguments down and ends as a value of optim.beta1 says."""


class Launcher:
    """A command for --launch, and what was started by it."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        script = folder / "started.py"
        script.write_text(STARTED.format(log=str(self.log)))
        self.option = f"--launch='{sys.executable}' '{script}'"

    def runs(self) -> list[list[str]]:
        return [line.split("\t") for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def swept(tmp_path: Path, *arguments: str) -> int:
    return pretrain.main(["model.vocab_size=96", f"train.run_dir='{tmp_path}/sweep'", *arguments])


def test_each_combination_is_a_run_and_they_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "train.total_tokens=256")
    assert pretrain.main([*run.overrides, "--multirun", "precision=bf16,nvfp4", "optim.beta1=0.9"]) == 0
    names = ["precision=bf16", "precision=nvfp4"]
    for name in names:
        assert (run.run_dir / name / "metrics.jsonl").is_file()
    printed = capfd.readouterr().out
    assert "sweep of 2 runs in" in printed
    assert "precision=nvfp4 step      2" in printed.rpartition("sweep of 2 runs")[2], "the comparison"
    assert (run.run_dir / "report.html").is_file()


def test_combinations_and_their_arguments(tmp_path: Path, launcher: Launcher) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.yaml").write_text("# @package _global_\noptim: {beta2: 0.5}\n")
    code = swept(
        tmp_path, "-m", launcher.option, "optim.lr=1e-3", "train.global_batch=1e1,2e1", f"--config-dir={own}",
        f"experiment={own}/a.yaml,quickstart", "parallel.tp=1", "logging.wandb_name=20_1",
    )  # fmt: skip
    assert code == 2, "nothing has metrics, so nothing can be compared"
    assert len(launcher.runs()) == 4
    for words in launcher.runs():
        assert words[-1] == f"--config-dir={own}", "behind the overrides, where no launcher takes it for its own"
        assert "logging.wandb_name='20_1'" in words, "text stays text"
        assert sum(word.startswith("train.run_dir=") for word in words) == 1
    first = "train.global_batch=10,experiment="
    assert f"train.run_dir='{tmp_path}/sweep/{first}" in launcher.runs()[0][-2]


def test_a_run_that_fails_does_not_end_the_sweep(
    tmp_path: Path, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path, "-m", launcher.option, "optim.beta1=0.7,0.8") == 1
    assert len(launcher.runs()) == 2
    printed = capsys.readouterr().out
    assert "optim.beta1=0.7: FAILED with exit code 7\n  optim.beta1=0.8: done" in printed


def test_a_run_that_was_stopped_ends_the_sweep(
    tmp_path: Path, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(tmp_path, "-m", launcher.option, "optim.beta1=0.8,0.85,0.9") == 85
    assert len(launcher.runs()) == 2
    assert "0.85: stopped, state saved\n  optim.beta1=0.9: not started" in capsys.readouterr().out


def test_a_request_to_stop_goes_on_to_the_run(tmp_path: Path, launcher: Launcher) -> None:
    def stop() -> None:
        ready = Path(f"{launcher.log}.ready")
        while not ready.exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert swept(tmp_path, "-m", launcher.option, "optim.beta1=0.6,0.8") == 85
    assert len(launcher.runs()) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_launcher_of_hydras(tmp_path: Path, launcher: Launcher) -> None:
    """The task goes to other processes, and what it returns comes back."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}/elsewhere"]
    assert swept(tmp_path, "-m", launcher.option, "optim.beta1=0.7,0.8", *joblib) == 1
    assert {words[-1] for words in launcher.runs()} == {
        f"train.run_dir='{tmp_path}/elsewhere/optim.beta1={beta}'" for beta in (0.7, 0.8)
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optim.lr=1e-3,-1"], "optim.lr=-1: optim.lr = -1"),
        (["optim.lrr=1e-3,3e-3"], "did you mean 'optim.lr'"),
        (["model=gpt_tiny,gpt_tinny"], "did you mean 'gpt_tiny'"),
        (["optim.lr=1e-3"], "no setting has several values"),
        (["parallel.tp=1,2", "--launch="], "launch/torchrun.sh --nproc-per-node 2 --multirun"),
        (["optim.lr=1e-3,1e-3"], "leave out what stands twice"),
        (["optim.lr=1e-3,3e-3", "hydra.run.dir=x"], "hydra.run.dir=x has no effect in a sweep"),
        (["optim.lr=1e-3,3e-3", "hydra/sweeper=other"], "hydra/sweeper=other has no effect in a sweep"),
        (["optim.lr=1e-3,3e-3", "hydra/launcher=nothing"], "Could not find 'hydra/launcher/nothing'"),
        (["optim.lr=interval(0.1,0.2)"], "does not support sweep type"),
    ],
)
def test_what_is_refused_is_refused_before_anything_starts(
    tmp_path: Path, launcher: Launcher, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert swept(tmp_path, "--multirun", launcher.option, *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert expected in printed
    assert launcher.runs() == []
    assert not (tmp_path / "sweep").exists()


def test_every_rank_cannot_be_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert swept(tmp_path, "-m", "optim.lr=1e-3,3e-3") == 2
    assert "would start as many sweeps" in capsys.readouterr().err


def test_names_are_file_names() -> None:
    task = PointTask("runs/s", ["experiment", "precision.rules", "optim.lr"], ["true"])
    name, run_dir = task.place(["experiment='../../own/my run.yaml'", "optim.lr=0.001", "precision.rules=[]", "a=1"])
    assert name == "experiment=own_my_run,optim.lr=0.001,precision.rules=_"
    assert run_dir == f"runs/s/{name}"
    assert PointTask("runs/s", ["train.run_dir"], ["true"]).place(["train.run_dir=runs/a"]) == ("runs/a", "runs/a")
