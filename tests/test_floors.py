"""Rules of the architecture that import-linter cannot see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_fp4"


def sources(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ["optim", "pipeline", "checkpoint", "models", "data"])
def test_these_floors_do_not_know_what_fp4_is(folder: str) -> None:
    for path in sources(folder):
        text = re.sub(r"megatron[_-]fp4", "", path.read_text(), flags=re.IGNORECASE)
        word = re.search(r"nvfp4|fp4|amax", text, flags=re.IGNORECASE)
        assert word is None, f"{path.relative_to(PACKAGE)} speaks of {word.group()}" if word else ""


def test_the_environment_is_read_in_one_file() -> None:
    reads = r"os\.environ(\.get\(|\[)|= os\.environ\b|os\.environ if|getenv"
    readers = [path for path in sources(".") if re.search(reads, path.read_text())]
    assert [path.relative_to(PACKAGE).as_posix() for path in readers] == ["comm/launch.py"]


def test_every_module_says_what_it_is_for() -> None:
    for path in sources("."):
        assert path.read_text().lstrip().startswith('"""'), f"{path.relative_to(PACKAGE)} has no docstring"


GPU_PACKAGES = {
    "transformer_engine": ("precision/te/", "precision/backends/", "layers/fused/", "optim/fused_adam.py"),
    "apex": ("layers/fused/", "optim/fused_adam.py"),
    "mamba_ssm": ("layers/mamba/",),
    "causal_conv1d": ("layers/mamba/",),
    "flash_attn": ("layers/fused/",),
    "triton": ("kernels/",),
}
"""Packages that need a GPU, and who may import them; import-linter does not see `import_module`."""


@pytest.mark.parametrize("package", GPU_PACKAGES)
def test_packages_for_gpus_are_imported_in_their_rooms(package: str) -> None:
    imports = re.compile(rf"^\s*(from|import) {package}|import_module\(\s*f?[\"']{package}", re.MULTILINE)
    importers = {path.relative_to(PACKAGE).as_posix() for path in sources(".") if imports.search(path.read_text())}
    assert [path for path in importers if not path.startswith(GPU_PACKAGES[package])] == []


def test_no_global_statements() -> None:
    for path in sources("."):
        assert not re.search(r"^\s+global ", path.read_text(), flags=re.MULTILINE), path


def test_a_run_starts_without_what_few_runs_need() -> None:
    """torch's compiler, sympy (of torch's checkpoints) and loggers take longer to import than all that a rank needs."""
    late = {"torch._dynamo", "sympy", "torch.distributed.checkpoint", "matplotlib", "wandb", "transformers"}
    source = (
        f"import sys, megatron_fp4.cli.pretrain, megatron_fp4.train.job; print({late} & set(sys.modules) or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "none\n"
