"""What the source of the kernels must not say; read as text, so that it needs no triton."""

from __future__ import annotations

import ast
from pathlib import Path

import megatron_fp4

KERNELS = Path(megatron_fp4.__file__).parent / "kernels"


def divisions(source: str) -> list[str]:
    """The expressions with `/` in device functions, that is those under `triton.jit`."""
    device = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    nodes = [node for function in device for node in ast.walk(function)]
    return [
        ast.unparse(node)
        for node in nodes
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Div)
    ]


def test_every_division_of_a_kernel_is_named() -> None:
    """`x / 6.0` becomes a multiplication by a rounded 1/6: no word in PTX shows it, and an interpreter divides."""
    assert [text for path in sorted(KERNELS.glob("*.py")) for text in divisions(path.read_text())] == []
    planted = "@triton.jit(do_not_specialize=['k'])\ndef f(x):\n    x /= 6.0\n    return x // 2 + x / 6.0\n"
    assert divisions(planted) == ["x /= 6.0", "x / 6.0"]
