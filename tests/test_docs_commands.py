"""Every command that README and docs show runs in a test, or carries the reason why not; its settings exist today."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_fp4.cli import main
from megatron_fp4.cli.compose import compose_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    ((?:launch/|megatron-fp4 ).*)$", re.MULTILINE)
PROGRAMS = re.compile(
    r"(\$ |([A-Z_]+=\S+ )*(megatron-fp4 |launch/\S+\.sh |\./|tests/\S+\.sh|benchmarks/\S+\.sh|python\S* -m |pip |git "
    r"|source \S+$|source \S+ +#|docker |sbatch |srun |kubectl |curl ))"
)
OWN = ("experiment=first", "experiment=mine", "experiment=toy", "experiment=runs/")
"""YAML that the pages write themselves."""
PLACEHOLDER = re.compile(r"\.\.\.|\bNAME\b|\bKEY\b|\bRUN\b|[<>*]")

WHERE = {
    r"git clone|source \.venv": "makes and enters the checkout, which the tests are run in",
    r"\./launch/quickstart\.sh": "nine minutes of both cores; its output stands in docs/quickstart.md",
    r"\./tests/run\.sh|tests/kernels/run\.sh|tests/slurm/run\.sh": "is what CI runs",
    r"tests/versions/run\.sh": "downloads 5 GB a version; run by hand (docs/testing.md)",
    r"benchmarks/|python -m benchmarks": "measures a machine; run by hand (docs/performance.md)",
    r"pip |python3? -m venv|echo .*mutation|.*mutmut": "changes an environment; by hand",
    r"docker |kubectl ": "needs a daemon or a cluster; the files are checked by tests/launch/test_dockerfile.py",
    r"sbatch |srun ": "tests/slurm/test_slurm.py",
    r".*launch/torchrun\.sh": "tests/launch/test_torchrun.py",
    r"python -m data_tools ": "tests/data_tools/test_tools.py",
    r"megatron-fp4 data ": "tests/data_tools/test_tools.py",
    r"megatron-fp4 pretrain": "tests/journeys/test_researcher.py",
    r"megatron-fp4 report": "tests/cli/test_report.py",
    r"megatron-fp4 status": "tests/cli/test_status.py",
    r"megatron-fp4 study": "tests/cli/study/test_study.py",
    r"megatron-fp4 explain": "tests/test_settings.py",
    r"megatron-fp4 plan": "tests/journeys/test_lead.py",
    r"megatron-fp4 rehearse": "tests/journeys/test_lead.py",
    r"megatron-fp4 verify-parallel": "tests/cli/test_verify_parallel.py",
    r"megatron-fp4 verify-resume": "tests/cli/test_verify_resume.py",
    r"megatron-fp4 preflight": "tests/cli/test_preflight.py",
    r"megatron-fp4 selftest": "tests/cli/test_selftest.py",
    r"megatron-fp4 crosscheck": "tests/cli/test_crosscheck.py",
    r"megatron-fp4 env": "tests/cli/test_env.py",
    r"megatron-fp4 checkpoint import": "tests/interop/test_import.py",
    r"megatron-fp4 checkpoint": "tests/cli/test_checkpoint.py",
    r"megatron-fp4 evaluate": "tests/cli/test_evaluate.py",
    r"megatron-fp4 eval-harness": "tests/inference/test_harness.py",
    r"megatron-fp4 generate": "tests/inference/test_generate.py",
    r"megatron-fp4 replay": "tests/train/faults",
    r"python -m tests\.precision\.te": "needs Transformer Engine, which takes hours to build; by hand",
}
"""A command, by how it begins -> the test that runs it, or why none does. The first that fits counts."""


class Command(NamedTuple):
    """What is typed, and what the page shows of its answer."""

    page: str
    text: str
    answer: str


def commands() -> Iterator[Command]:
    for page in PAGES:
        text = page.read_text()
        for language, block in FENCE.findall(text):
            lines = block.replace("\\\n", " ").splitlines()
            starts = [number for number, line in enumerate(lines) if PROGRAMS.match(line) and language != "yaml"]
            for number, following in itertools.pairwise([*starts, len(lines)]):
                typed = re.sub(r"\s+#\s.*$", "", lines[number].removeprefix("$ ")).strip()
                typed = re.sub(r"^([A-Z_]+=\S+ +)+", "", typed)
                yield Command(page.name, typed, " ".join(lines[number + 1 : following]))
        for line in INDENTED.findall(text):
            yield Command(page.name, line.strip(), "")


ALL = list(commands())


def name(command: Command) -> str:
    return f"{command.page}: {command.text[:70]}"


def test_there_are_commands() -> None:
    assert len(ALL) > 60


@pytest.mark.parametrize("command", ALL, ids=name)
def test_a_command_runs_in_a_test_or_says_why_not(command: Command) -> None:
    where = next((where for begin, where in WHERE.items() if re.match(begin, command.text)), None)
    assert where is not None, f"say in WHERE which test runs this, or why none does: {command.text}"
    if where.startswith("tests/"):
        assert (ROOT / where).exists(), f"{where}, which is to run {command.text}"


def overrides_of(text: str) -> list[str]:
    """The settings among the words of a command that composes a configuration."""
    words = shlex.split(text)
    return [word for word in words if re.match(r"[~+]*[a-z][\w./]*=", word) and not word.startswith("--")]


COMPOSED = [
    one for one in ALL if re.search(r"megatron-fp4 (pretrain|plan|rehearse|verify|preflight)|torchrun\.sh", one.text)
]


@pytest.mark.parametrize("command", [one for one in COMPOSED if "error:" not in one.answer], ids=name)
def test_the_settings_of_a_command_exist(command: Command) -> None:
    overrides = [one for one in overrides_of(command.text) if not PLACEHOLDER.search(one) and not one.startswith(OWN)]
    if "--multirun" in command.text:
        overrides = [one.partition(",")[0] for one in overrides]
    compose_config(overrides)


ELSEWHERE = "precision.backend=triton"
"""What refuses depends on whether Triton is installed; tests/precision/backends runs both."""
REFUSED = [
    one
    for one in COMPOSED
    if one.answer.startswith("error:") and not PLACEHOLDER.search(one.text) and ELSEWHERE not in one.text
]


@pytest.mark.parametrize("command", REFUSED, ids=name)
def test_a_refusal_is_the_one_that_is_shown(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(shlex.split(command.text)[1:]) == 2
    printed = capsys.readouterr().err.split()
    shown = command.answer.partition(" ...")[0].split()
    assert printed[: len(shown)] == shown
