"""`megatron-fp4 study`: its YAML, its runs, what is done again and what is not. A script stands for the trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_fp4.cli import main
from megatron_fp4.cli.overrides.mistakes import ConfigError
from megatron_fp4.cli.study import command
from megatron_fp4.cli.study import gradients as study_gradients
from megatron_fp4.cli.study.read import SHIPPED, read_study
from megatron_fp4.cli.study.runs import StudyRun, compose_arms, runs_of
from megatron_fp4.studies.measures import GradientError
from megatron_fp4.train.config import RunConfig

STUDY = """
name: toy
question: Does a higher rate help?
base: [model=gpt_tiny, model.vocab_size=256, train.total_tokens=40960, precision=bf16]
seeds: [1, 2, 3]
measure: {window_steps: 4}
arms:
  low: [optim.lr=1e-3]
  high: [optim.lr=2e-3]
claims:
  - {arm: high, against: low, percent: [0.5, null], because: planted}
"""
TRAINER = """
import json, os, sys, time, pathlib
given = dict(one.lstrip("+").split("=", 1) for one in sys.argv[1:] if "=" in one)
folder = pathlib.Path(given["train.run_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
seed, rate = int(given["train.seed"]), float(given["optim.lr"])
with open(folder.parent / "calls", "a") as calls:
    calls.write(f"{rate:g} {seed} {given['data.seed']}\\n")
if os.environ.get("SLOW"):
    import signal
    signal.signal(signal.SIGTERM, lambda *_: os._exit(85))
    time.sleep(60)
if os.environ.get("FAILS") == f"{rate:g} {seed}":
    sys.exit("no memory")
level = (1.01 if rate > 1.5e-3 else 1.0) + 1e-4 * (seed % 2)
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, 9):
        file.write(json.dumps({"step": step, "consumed_tokens": 512 * step, "loss": level * (3 + seed / step)}) + "\\n")
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(STUDY)
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)

    def command(run: StudyRun, root: Path) -> list[str]:
        return [sys.executable, str(script), *run.overrides, f"train.run_dir={run.folder(root)}"]

    monkeypatch.setattr(StudyRun, "command", command)
    return path


def calls(root: Path) -> list[str]:
    path = root / "runs" / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_study_runs_every_pair_once_and_judges_its_claim(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = toy.parent / "out"
    assert main.run(["study", str(toy), "--out", str(root), "--jobs", "2"]) == 0
    assert sorted(calls(root)) == sorted(f"{rate} {seed} {seed}" for rate in (0.001, 0.002) for seed in (1, 2, 3))
    printed = capsys.readouterr().out
    assert "| high against low | above 0.5 % | +1.00 %" in printed
    assert "| reproduced |" in printed
    outcome = json.loads((root / "study.json").read_text())
    assert outcome["study"]["claims"][0]["verdict"] == "reproduced"
    assert len({run["key"] for run in outcome["runs"]}) == 6
    assert "<svg" in (root / "study.html").read_text()

    assert main.run(["study", str(toy), "--out", str(root)]) == 0  # nothing is left to do
    assert len(calls(root)) == 6


def test_a_changed_arm_runs_anew_and_the_others_do_not(toy: Path) -> None:
    root = toy.parent / "out"
    assert main.run(["study", str(toy), "--out", str(root)]) == 0
    toy.write_text(STUDY.replace("2e-3", "4e-3"))
    assert main.run(["study", str(toy), "--out", str(root)]) == 0
    assert [call.split()[0] for call in calls(root)[6:]] == ["0.004"] * 3


def test_a_run_that_fails_is_named_and_made_again(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = toy.parent / "out"
    monkeypatch.setenv("FAILS", "0.002 2")
    assert main.run(["study", str(toy), "--out", str(root)]) == 1
    printed = capsys.readouterr().out
    (log,) = root.glob("runs/high-2-*.log")
    assert f"high, seed 2 FAILED with exit code 1: {log}" in printed
    assert "no memory" in log.read_text()
    assert "1 of 6 runs missing" in printed
    monkeypatch.delenv("FAILS")
    assert main.run(["study", str(toy), "--out", str(root)]) == 0
    assert len(calls(root)) == 7


def test_a_stopped_study_goes_on(toy: Path) -> None:
    """The signal goes to the run; what was done stays done. In a process of its own: signals are heard there."""
    root = toy.parent / "out"
    starter = toy.parent / "starter.py"
    starter.write_text(
        textwrap.dedent(f"""
        import sys
        from megatron_fp4.cli import main
        from megatron_fp4.cli.study.runs import StudyRun
        script = {str(toy.parent / "trainer.py")!r}
        StudyRun.command = lambda run, root: [
            sys.executable, script, *run.overrides, f"train.run_dir={{run.folder(root)}}"
        ]
        sys.exit(main.run(["study", {str(toy)!r}, "--out", {str(root)!r}]))
        """)
    )
    process = subprocess.Popen([sys.executable, str(starter)], env={**os.environ, "SLOW": "1"})
    deadline = time.monotonic() + 60
    while not calls(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # the handler of the script comes after its first line
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 85
    assert len(calls(root)) == 1
    assert main.run(["study", str(toy), "--out", str(root)]) == 0
    assert len(calls(root)) == 7


def test_missing_runs_are_listed_as_commands(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["study", str(toy), "--out", str(toy.parent / "out"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert "optim.lr=1e-3 train.seed=1 data.seed=1" in lines[0]
    assert main.run(["study", str(toy), "--out", str(toy.parent / "out"), "--show"]) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optim.lr=2e-3", "optim.learning=2", "arm high: "),
        ("optim.lr=2e-3", "optim.lr=1e-3", "arms low and high are the same run"),
        ("optim.lr=2e-3", "optim.lr=1e-3, checkpoint.keep_last=7", "arms low and high are the same run"),
        ("optim.lr=2e-3", "parallel.tp=2", "needs 2 ranks"),
        ("seeds: [1, 2, 3]", "seeds: [1]", "1 seed"),
        ("seeds: [1, 2, 3]", "seeds: 3", "give a list of whole numbers"),
        ("[0.5, null]", "0.5", "give [low, high]"),
        ("against: low", "agains: low", "a claim has no agains"),
        ("against: low,", "against: low, measure: speed,", "measure = speed of a claim; use one of loss, equal_"),
        ("against: low,", "against: low, measure: gradient_error,", "whose gradient the others are compared with"),
        ("arms:", "arm:", "a study has no arm;"),
        ("{window_steps: 4}", "{windw: 4}", "measure has no windw; it has loss, window_steps"),
        ("seeds: [1", "seeds: [1, [", "toy.yaml"),
    ],
)
def test_mistakes_are_one_sentence(
    toy: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write_text(STUDY.replace(old, new))
    assert main.run(["study", str(toy), "--out", str(toy.parent / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not calls(toy.parent / "out")


GRADIENT_CLAIMS = """
  - {arm: high, against: low, percent: [null, 0], measure: equal_weights_loss}
  - {arm: higher, against: high, percent: [40, 60], measure: gradient_error}
  - {arm: higher, against: high, percent: [0, null], measure: gradient_left}
"""


def test_claims_on_gradients_are_measured_once_and_shown_with_the_others(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write_text(STUDY.replace("  high:", "  higher: [optim.lr=4e-3]\n  high:").rstrip() + GRADIENT_CLAIMS)
    measured: list[tuple[int, list[str], int, str]] = []

    def errors(arms: Mapping[str, RunConfig], *, draws: int) -> dict[str, GradientError]:
        _, *others = arms
        config = arms[others[0]]
        measured.append((config.train.seed, others, draws, config.train.init_from))
        return {
            arm: GradientError({"high": 0.02, "higher": 0.03}[arm], 0.99, 0.5, 2.9, 3.0, draws=draws) for arm in others
        }

    monkeypatch.setattr(study_gradients, "gradient_errors", errors)
    monkeypatch.setattr(command, "check_arms", lambda trees: None)
    ask = ["study", str(toy), "--out", str(toy.parent / "out")]
    assert main.run([*ask, "--gradients", "--draws", "2", "--seeds", "1", "2"]) == 0
    assert measured == [(seed, ["higher", "high"], 2, "") for seed in (1, 2)]
    printed = capsys.readouterr().out
    assert "| high against low | above 0.5 % | fewer than two pairs | undecided |" in printed
    assert (
        "| high against low: equal_weights_loss | below 0 % | -3.33 % (-3.33 to -3.33, Student) | reproduced |"
        in printed
    )
    assert "| higher against high: gradient_error | 40 to 60 % | +50.00 %" in printed

    assert main.run([*ask, "--gradients", "--draws", "2"]) == 0  # the third seed is what is missing
    assert [seed for seed, *_ in measured] == [1, 2, 3]
    assert main.run([*ask, "--draws", "2", "--arms", "low", "high"]) == 0
    assert len(calls(toy.parent / "out")) == 6
    page = (toy.parent / "out" / "study.md").read_text()
    assert "3 of 9 runs missing" in page
    assert "| high against low: equal_weights_loss | below 0 % | -3.33 %" in page
    capsys.readouterr()

    assert main.run([*ask, "--show", "--draws", "2", "--weights", "runs/other"]) == 0  # nothing was measured there
    assert "| not measured (--gradients) | undecided |" in capsys.readouterr().out
    assert main.run([*ask, "--arms", "lower"]) == 2
    assert "--arms lower; toy has low, higher, high" in capsys.readouterr().err


def test_an_unknown_study_names_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["study", "nothing"]) == 2
    assert "paper_small" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_compose(path: Path) -> None:
    study = read_study(path)
    runs = runs_of(study, compose_arms(study))
    assert len(runs) == len(study.arms) * len(study.seeds)
    assert study.claims
    assert all(run.steps >= study.measure.window_steps for run in runs)
    with pytest.raises(ConfigError):
        compose_arms(study, [Path("nowhere")])
