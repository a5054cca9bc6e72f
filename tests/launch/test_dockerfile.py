"""The Dockerfile: linted by hadolint, and the promises that a linter does not know.

No image is built here: the base image has tens of gigabytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests.launch.scripts import ROOT
from tests.launch.tools import linter

TEXT = (ROOT / "Dockerfile").read_text()
# one instruction a line: comments out, continuation lines joined
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", TEXT)).splitlines()


def instructions(name: str) -> list[str]:
    return [line.removeprefix(name).strip() for line in INSTRUCTIONS if line.startswith(name + " ")]


def test_hadolint() -> None:
    done = subprocess.run(
        [linter("hadolint"), "--failure-threshold", "info", "Dockerfile"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_base_image_is_a_fixed_ngc_release() -> None:
    (argument,) = instructions("ARG")
    assert re.fullmatch(r"BASE_IMAGE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", argument), "not a fixed release"
    assert instructions("FROM") == ["${BASE_IMAGE}"]


def test_pip_cannot_replace_torch() -> None:
    printed = subprocess.run(
        [sys.executable, "launch/image_requirements.py", "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = [line for line in listed if re.match(r"torch\b", line)]
    assert torch, "torch is no longer in pyproject.toml: image_requirements.py leaves it out for nothing"
    assert not set(torch) & set(printed), "pip would install torch over the image's"
    assert set(listed) - set(torch) <= set(printed), "a dependency would be missing in the image"
    installs = [part for line in instructions("RUN") for part in line.split("&&") if "pip install" in part]
    for install in installs:
        assert "--no-deps" in install or "PIP_CONSTRAINT=/tmp/build/constraints.txt" in install, install
    package = [install for install in installs if "--editable ." in install]
    assert len(package) == 1
    assert "--no-deps" in package[0], "torch==... of pyproject.toml would be fetched over the image's"


def test_the_image_has_what_the_extras_ask_for() -> None:
    """Its torch and Transformer Engine lie in the ranges of pyproject.toml; Mamba's kernels are named by version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["te"]])
    }
    torch = re.search(r"whose torch \((\S+), CUDA", TEXT)
    engine = re.search(r"Transformer Engine (\S+) and Apex", TEXT)
    assert torch is not None
    assert engine is not None
    assert asked["torch"].contains(Version(torch[1]).base_version)
    assert asked["transformer-engine"].contains(engine[1])
    kernels = [line for line in instructions("RUN") if "mamba-ssm==" in line]
    assert len(kernels) == 1
    assert "causal-conv1d==" in kernels[0]
    assert {"--no-deps", "--no-build-isolation"} <= set(kernels[0].split()), "another torch would be fetched"
    assert "arm64" in TEXT, "GB200's CPUs are arm64"


def test_not_root_and_no_healthcheck() -> None:
    (user,) = instructions("USER")
    assert user.isdigit(), "Kubernetes' runAsNonRoot cannot check a name"
    assert user != "0"
    assert instructions("HEALTHCHECK") == ["NONE"]


def test_every_copied_path_exists_and_passes_dockerignore() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), f"COPY {source}: no such file"
            assert source.split("/")[0] in allowed, f"COPY {source}: held back by .dockerignore"
