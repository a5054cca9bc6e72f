"""Every shell script of the repository passes shellcheck, is executable, and fails on the first error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT
from tests.launch.tools import linter

FOLDERS = ("launch", "tests", ".ci", "benchmarks", "data_tools")
BATCH = {"launch/slurm.sbatch"}  # slurm reads it: needs no execute permission


def scripts() -> list[str]:
    """Names of all shell scripts, by suffix or first line."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    shell = [path for path in paths if path.suffix in (".sh", ".sbatch") or is_bash(path)]
    return [str(path.relative_to(ROOT)) for path in shell]


def programs() -> list[str]:
    """The scripts that are run; one without a first line `#!` is sourced by another and sets no options of its own."""
    return [name for name in scripts() if is_bash(ROOT / name)]


def is_bash(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(64)
    return line.startswith(b"#!") and line.rstrip().endswith((b"/bash", b" bash", b"/sh"))


def test_the_scripts_are_found() -> None:
    assert {"launch/torchrun.sh", "launch/slurm.sbatch", "launch/env.sh"} <= set(scripts())


@pytest.mark.parametrize("name", scripts())
def test_shellcheck(name: str) -> None:
    done = subprocess.run(
        [linter("shellcheck"), "--external-sources", name], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", programs())
def test_script_stops_at_the_first_error(name: str) -> None:
    assert "set -euo pipefail" in (ROOT / name).read_text(), "a failed step would go unnoticed"
    if name not in BATCH:
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} is not executable"
