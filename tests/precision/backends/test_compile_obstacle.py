"""Where torch.compile cannot work, the program says why and runs the eager kernels, which give the same bits."""

from __future__ import annotations

import pytest

from megatron_fp4.precision.backends.emulated import compile_obstacle


def test_a_path_with_a_space_and_a_missing_compiler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a path with a space (/home/a b/torch/__init__.py)" in compile_obstacle("/home/a b/torch/__init__.py")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler" in compile_obstacle("/home/ab/torch/__init__.py")
