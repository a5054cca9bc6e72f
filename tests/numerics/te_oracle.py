"""Transformer Engine's own NVFP4 reference quantizer, run without Transformer Engine.

The pure-Python wheel (about 1.2 MB) is downloaded once into a cache directory and its `reference_nvfp4.py` is loaded
with two empty base classes in place of the compiled parts. It is used by tests only and never copied.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import types
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

VERSION = "2.20.2"
_FOLDER = "transformer_engine/pytorch/custom_recipes"


def _wheel() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path(tempfile.gettempdir()))) / "megatron_fp4_test_oracle"
    folder.mkdir(parents=True, exist_ok=True)
    wheels = sorted(folder.glob(f"transformer_engine-{VERSION}-*.whl"))
    if wheels:
        return wheels[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    done = subprocess.run([*command, f"transformer-engine=={VERSION}"], capture_output=True, text=True, timeout=120)
    wheels = sorted(folder.glob(f"transformer_engine-{VERSION}-*.whl"))
    if done.returncode or not wheels:
        raise OSError(f"pip download of transformer-engine=={VERSION} failed:\n{done.stderr[-600:]}")
    return wheels[0]


def _module(name: str, source: str, **stubs: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(stubs)
    sys.modules[name] = module  # dataclasses look their module up while the class body runs
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def _load() -> types.ModuleType:
    with zipfile.ZipFile(_wheel()) as wheel:
        text = {name: wheel.read(f"{_FOLDER}/{name}.py").decode() for name in ("reference_nvfp4", "reference_utils")}

    class Quantizer:
        def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "transformer_engine"}
    base = "transformer_engine.pytorch"
    try:
        for name in ("transformer_engine", base, f"{base}.custom_recipes"):
            _module(name, "").__path__ = []
        _module(f"{base}.quantized_tensor", "", Quantizer=Quantizer, QuantizedTensorStorage=object)
        packages = sys.modules[f"{base}.custom_recipes"]
        packages.__dict__["gemm"] = _module(f"{base}.custom_recipes.gemm", "", GEMMType=types.SimpleNamespace(FPROP=0))
        packages.__dict__["reference_utils"] = _module(
            f"{base}.custom_recipes.reference_utils", text["reference_utils"]
        )
        return _module(f"{base}.custom_recipes.reference_nvfp4", text["reference_nvfp4"])
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules.update(saved)


@cache
def load_reference() -> types.ModuleType:
    """The module `reference_nvfp4`. Without network: a skip with the reason, or a failure where CI is set."""
    try:
        return _load()
    except (OSError, subprocess.SubprocessError) as error:
        if os.environ.get("CI"):
            pytest.fail(f"the independent oracle is required in CI: {error}")
        pytest.skip(f"Transformer Engine's reference is not available: {error}")


def reference_quantizer(**settings: Any) -> Any:
    """An `NVFP4QuantizerRef`, for E2M1."""
    return load_reference().NVFP4QuantizerRef(load_reference().reference_utils.Fp4Formats.E2M1, **settings)
