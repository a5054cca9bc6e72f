"""`env` reports what is there and fails on nothing."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from megatron_fp4.cli import env
from megatron_fp4.cli.main import COMMANDS
from tests.precision.te import te_double

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = (ROOT / "tests/constraints.txt").read_text()


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    code = env.main([])
    text = capsys.readouterr().out
    assert code == ("REQUIRED" in text)
    assert torch.__version__ in text
    for name in ("python", "nccl", "gpu", "te backend", "c++ compiler", "launcher", "scheduler", "machine"):
        assert any(line.startswith(name) for line in text.splitlines()), f"{name} is missing from the report"


def test_transformer_engine_features(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    env.main([])
    text = capsys.readouterr().out
    assert "Transformer Engine 2.20.2" in text
    assert "te scale_order" in text


def test_a_wrong_version_is_marked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch==1.0.0", "numpy>=1.26", 'x==1.2; extra == "test"'])
    assert env.main([]) == 1
    assert "REQUIRED ==1.0.0" in capsys.readouterr().out


def test_an_images_torch_is_within_the_range() -> None:
    """NVIDIA's containers have a pre-release, which pip keeps and which is no mistake."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = next(one for one in map(Requirement, project["dependencies"]) if one.name == "torch")
    assert required.specifier.contains("2.13.0a0+cafe", prereleases=True)
    assert all(required.specifier.contains(version) for version in env.TESTED)
    assert {"2.10.0", "2.15.0"} == {version for version in ("2.10.0", "2.15.0") if version not in required.specifier}


def test_the_versions_that_are_said_to_be_tested_are() -> None:
    whole = [version for version, what in env.TESTED.items() if what == "all tests"]
    assert [f"torch=={version}" for version in whole] == re.findall(r"^torch==.*", CONSTRAINTS, re.MULTILINE)
    script = (ROOT / "tests/versions/run.sh").read_text()
    smoke = re.findall(r"\|\| set -- (.*)", script)[0].split()
    assert smoke == [version for version, what in env.TESTED.items() if what == "tests/versions"]


@pytest.mark.parametrize(
    ("version", "text"), [("2.13.0+cpu", "all tests, yes ("), ("2.12.0", "no (all tests on 2.13.0;")]
)
def test_whether_the_present_torch_is_tested(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, version: str, text: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    env.main([])
    assert re.search(rf"^torch, tested +{re.escape(text)}", capsys.readouterr().out, re.MULTILINE)


def test_constraints_fit_what_the_package_asks_for() -> None:
    """Every requirement that the exact set names, of every extra that the tests have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    exact = {
        name.lower().replace("_", "-"): version for name, version in re.findall(r"^(\S+?)==(\S+)$", CONSTRAINTS, re.M)
    }
    lines = project["dependencies"] + project["optional-dependencies"]["test"]
    for requirement in map(Requirement, lines):
        version = exact[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement}: {version} in tests/constraints.txt"


def test_variables_that_change_a_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"NVTE_USE_FAST_MATH": "1", "NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "x:y", "OMP_NUM_THREADS": "3"}
    for name, value in {**wanted, "WANDB_API_KEY": "secret", "SLURM_JOB_ID": "17"}.items():
        monkeypatch.setenv(name, value)
    env.main([])
    text = capsys.readouterr().out
    versions = {line.split()[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 1}
    for name, value in wanted.items():
        assert versions[name] == value
    assert "secret" not in text
    assert "in a job of slurm" in text
    for name in [name for name in os.environ if name.startswith(env.VARIABLES)]:
        monkeypatch.delenv(name)
    env.main([])
    assert "no variable NVTE_*" in capsys.readouterr().out


def test_versions_are_compared_with_the_image(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).resolve().parents[2] / "Dockerfile").read_text()
    named = re.search(r"whose torch \((\S+), CUDA (\S+), Python", text)
    engine = re.search(r"Transformer Engine (\S+) and Apex", text)
    assert named is not None
    assert engine is not None
    assert {"torch": named[1], "cuda": named[2], "transformer-engine": engine[1]} == env.IMAGE
    plain = metadata.version
    installed = {"transformer-engine": "2.17.1", "apex": "0.1"}
    monkeypatch.setattr(metadata, "version", lambda name: installed.get(name) or plain(name))
    env.main([])
    assert "image has 2.17" not in capsys.readouterr().out, "2.17.1 is a 2.17"
    installed["transformer-engine"] = "2.1"
    env.main([])
    printed = capsys.readouterr().out
    assert "2.1   (the Dockerfile's image has 2.17)" in printed
    assert re.search(r"^apex +0\.1$", printed, re.MULTILINE)


def test_commands_are_listed() -> None:
    assert {"env", "preflight", "crosscheck"} <= set(COMMANDS)
