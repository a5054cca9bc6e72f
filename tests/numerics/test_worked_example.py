"""The worked example of docs/numerics.md, recomputed from its first column."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_fp4.numerics import quantize_nvfp4
from megatron_fp4.numerics.formats import decode_e2m1, unpack

PAGE = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
ROWS = [line.strip("| \n").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and line[2].isdigit()]


def test_every_number_of_the_table() -> None:
    """The page teaches the arithmetic: a wrong digit in it is a bug."""
    assert len(ROWS) == 16
    x = torch.tensor([[float(row[1]) for row in ROWS]]).bfloat16()
    quantized = quantize_nvfp4(x, amax=torch.tensor(12.0))
    scale = quantized.scales.float()[0, 0]
    assert scale == 176
    multiplier = 1 / (scale * (1 / torch.tensor(224.0)))
    assert f"m_b = {multiplier.item():.8f}" in PAGE
    codes = unpack(quantized.codes)[0]
    for i, row in enumerate(ROWS):
        assert row == [
            str(i),
            f"{x[0, i].item():g}",
            f"{(x[0, i].float() * multiplier).item():.4f}",
            f"{decode_e2m1(codes[i : i + 1]).item():g}",
            f"{int(codes[i]):X}",
            f"{quantized.operand()[0, i].item():g}",
            f"{quantized.dequantize()[0, i].item():.6f}",
        ]
    assert " ".join(f"{byte:02X}" for byte in quantized.codes[0].tolist()) in PAGE
    paper = quantize_nvfp4(x, amax=torch.tensor(12.0), scale_order="paper")
    assert paper.scales.float()[0, 0] == 160
