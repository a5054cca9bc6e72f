"""A wheel works away from the checkout: the configurations are in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_an_unpacked_wheel_composes_in_another_folder(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    for name in ("megatron_fp4", "data_tools", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    packed = unpacked / "megatron_fp4/configs"
    assert {path.relative_to(packed) for path in packed.rglob("*.yaml")} == shipped
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    composed = subprocess.run(
        [sys.executable, "-c", "import runpy, megatron_fp4; print(megatron_fp4.__file__)\n"
         "runpy.run_module('megatron_fp4', run_name='__main__')", "pretrain", "--cfg", "experiment=quickstart"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert composed.returncode == 0, composed.stderr
    file, _, yaml = composed.stdout.partition("\n")
    assert file == str(unpacked / "megatron_fp4/__init__.py")
    assert "run_dir: runs/quickstart/nvfp4" in yaml
