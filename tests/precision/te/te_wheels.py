"""The sources of several versions of Transformer Engine, from its pure-Python wheels; read, never copied.

A wheel (about 1 MB) is downloaded once into a cache directory. Without network: a skip, or a failure where CI is set.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

WHEELS = ("2.10.0", "2.14.0", "2.17.0", "2.19.0", "2.20.2")
"""The oldest version that is taken, those in which something changed (2.17 is the training image's), and the newest."""


@cache
def wheel(version: str) -> Path:
    """The wheel of a full version such as "2.20.2"."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path(tempfile.gettempdir()))) / "megatron_fp4_test_oracle"
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"transformer_engine-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
        try:
            done = subprocess.run(
                [*command, f"transformer-engine=={version}"], capture_output=True, text=True, timeout=120
            )
            reason = done.stderr[-400:] if done.returncode else ""
        except subprocess.SubprocessError as error:
            reason = str(error)
        if not list(folder.glob(pattern)):
            message = f"the sources of Transformer Engine {version} could not be downloaded: {reason}"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return next(folder.glob(pattern))


@cache
def source(version: str, module: str) -> str | None:
    """The text of `transformer_engine.<module>`, None if this version has no such module."""
    path = "transformer_engine/" + module.replace(".", "/")
    with zipfile.ZipFile(wheel(version)) as archive:
        names = set(archive.namelist())
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in names:
                return archive.read(name).decode()
    return None


@cache
def tree(version: str, module: str) -> ast.Module | None:
    text = source(version, module)
    return None if text is None else ast.parse(text)


def find(version: str, module: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """The top-level class or function `name` of a module."""
    parsed = tree(version, module)
    for node in parsed.body if parsed else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name), None)


def parameters(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str | None]:
    """Name -> default (as source text, None if there is none), of a function or of what a class is called with."""
    if isinstance(node, ast.ClassDef):
        init = method(node, "__init__") or method(node, "__new__")
        if init is None:  # a dataclass: its annotated fields
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return {ast.unparse(f.target): ast.unparse(f.value) if f.value else None for f in fields}
        taken = parameters(init)
        return {name: default for name, default in taken.items() if name not in ("self", "cls")}
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(args.defaults)), *args.defaults]
    pairs = [*zip(positional, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return {arg.arg: ast.unparse(default) if default is not None else None for arg, default in pairs}


SYMBOLS_OF_DOUBLE = {
    "NVFP4Quantizer": "pytorch.tensor.nvfp4_tensor",
    "MXFP8Quantizer": "pytorch.tensor.mxfp8_tensor",
    "Float8BlockQuantizer": "pytorch.tensor.float8_blockwise_tensor",
    "HybridQuantizer": "pytorch.tensor.hybrid_tensor",
    "IdentityQuantizer": "pytorch.tensor.identity_tensor",
    "QuantizerRole": "pytorch.quantization",
    "CustomRecipe": "common.recipe",
    "NVFP4BlockScaling": "common.recipe",
    "general_gemm": "pytorch.cpp_extensions.gemm",
}
