"""What `precision.backend=triton` needs of a machine, and what its kernels leave to the emulation."""

from __future__ import annotations

import importlib.util

import torch

from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.operand import AmaxScope, Format, Operand, Signs
from megatron_fp4.precision.spec import Gemm

LEAST_CAPABILITY = (8, 0)
REMEDY = "use precision.backend=emulated, which makes the same operands"
INTERPRETING = f"set TRITON_INTERPRET=1 to interpret its kernels on the CPU, slowly, or {REMEDY}"
MOST_LINES = 65535 * 64
"""Rows or columns of a tensor that one launch takes (kernels/quantize.py:grid_of)."""
BLOCKS = {Format.nvfp4: 16, Format.mxfp4: 32, Format.mxfp8: 32}
"""Formats that the kernels know, and their block."""


def obstacle(operand: Operand) -> str:
    """Why the kernels do not make an operand; empty if they do."""
    if operand.format not in BLOCKS:
        return f"format={operand.format.name}"
    if operand.format is Format.mxfp8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "format=mxfp8, whose codes Triton reads on compute capability 8.9 and newer only"
    if operand.amax_scope in (AmaxScope.row, AmaxScope.group128):
        return f"amax_scope={operand.amax_scope.name}"
    if operand.eden:
        return "rounding=ms_eden"
    if operand.rht_signs is Signs.per_index:
        return "rht_signs=per_index"
    if operand.rht_size > BLOCKS[operand.format]:
        return f"rht_size={operand.rht_size}, more than a block of {BLOCKS[operand.format]}"
    return ""


def emulated_gemms(config: PrecisionConfig) -> list[str]:
    """What `precision.backend=triton` leaves to the emulation, one line per GEMM of a recipe; empty if nothing."""
    if config.backend is not BackendName.triton:
        return []
    gemms = [(name, gemm) for name, recipe in config.recipes.items() for gemm in recipe.gemms if gemm.quantized]
    return [f"recipe {name}, {gemm.name}: {reason}" for name, gemm in gemms if (reason := _gemm_obstacle(gemm))]


def _gemm_obstacle(gemm: Gemm) -> str:
    first, second = gemm.operands
    for tensor, operand in zip(gemm.tensors, gemm.operands, strict=True):
        if operand.quantized and (reason := obstacle(operand)):
            return f"{tensor} has {reason}"
    if first.format is not second.format:
        return f"operands in {first.format.name} and {second.format.name}"
    return ""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter; needs triton."""
    from megatron_fp4.kernels.values import INTERPRETED

    return INTERPRETED


def check_triton_device(device: torch.device) -> None:
    """Raises ValueError with the remedy for a rank that is not on a GPU."""
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"precision.backend=triton compiles for NVIDIA GPUs, and this run is on {device}: {INTERPRETING}"
        )


def check_triton_machine() -> None:
    """Raises ValueError with the remedy where no kernel can run."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"precision.backend=triton needs the package triton: pip install 'megatron-fp4[kernels]'; or {REMEDY}"
        )
    if interpreted():
        return
    if not torch.cuda.is_available():
        raise ValueError(f"precision.backend=triton compiles for NVIDIA GPUs; torch sees none: {INTERPRETING}")
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise ValueError(
            f"precision.backend=triton needs a GPU of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or"
            f" newer, this one has {capability[0]}.{capability[1]}; {REMEDY}"
        )
