"""What the kernels are told: how a copy is coded, what a device can do, and the operand that comes out.

Tiles are a table by kind of device, never a timing, so that a machine repeats its own sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import knobs

from megatron_fp4.kernels.layout import row_major_scales

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, as TRITON_INTERPRET=1 says before triton is imported."""
OPTIONS = {"enable_fp_fusion": False}
"""Options of every launch: contraction changes 0.4 % of the bits of `main_grad + product`."""
Constants = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Coding:
    """How the elements of a copy become codes.

    aim: what the global scale maps amax to, 0 for power-of-two scales. paper_order, wider: of the block scale. over: 0,
    or four over six by absolute (1) or squared (2) errors. bits: of a code, 4 or 8. block: elements that share a scale,
    in 16 lines if square. noise_bits: 0 for nearest even. centred: see `stages.Noise`. rht: size of the transform.
    """

    aim: float
    block: int
    bits: int = 4
    paper_order: bool = False
    wider: bool = False
    over: int = 0
    square: bool = False
    noise_bits: int = 0
    centred: bool = False
    rht: int = 0

    @property
    def simple(self) -> bool:
        """Whether `rows_kernel` makes a copy that is contracted along the rows of its tensor."""
        return not (self.square or self.over or self.rht)


@dataclass(frozen=True, eq=False)
class PackedOperand:
    """An operand `[lines, length]` of a GEMM.

    codes: uint8 `[lines, length * bits / 8]`. scales: uint8, `[lines, length / block]`, or `[bytes]` in the 128x4
    layout. amax: FP32 scalar, None without a global scale.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor | None
    how: Coding

    @property
    def lines(self) -> int:
        return self.codes.shape[0]

    @property
    def length(self) -> int:
        return self.codes.shape[1] * 8 // self.how.bits

    def row_major_scales(self) -> Tensor:
        """uint8 `[lines, length / block]`."""
        if self.scales.dim() == 2:
            return self.scales
        return row_major_scales(self.scales, self.lines, self.length // self.how.block)


@dataclass(frozen=True)
class GemmTile:
    """rows, columns, depth: elements of a tile; warps, stages: how it is computed."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Target:
    """What a device can do.

    native: FP4 tensor cores, which take scales in the 128x4 layout. persistent: they are fed by TMA. programs: of a
    persistent GEMM. fp8: tile of GEMMs of E4M3 codes. gemm: of all others.
    """

    native: bool
    persistent: bool
    programs: int
    gemm: GemmTile
    fp8: GemmTile

    def tile(self, how: Coding) -> GemmTile:
        """The tile of a GEMM of such operands."""
        return self.gemm if how.bits == 4 else self.fp8

    @staticmethod
    def of(device: torch.device) -> Target:
        """The target that `device` is. Raises ValueError for a device without CUDA, unless kernels are interpreted."""
        if INTERPRETED:
            tile = GemmTile(128, 128, 128, 4, 1)
            return Target(native=False, persistent=False, programs=1, gemm=tile, fp8=tile)
        if device.type != "cuda":
            raise ValueError(f"Triton compiles for GPUs, and this run is on {device}")
        capability = torch.cuda.get_device_capability(device)
        return Target.of_capability(capability, torch.cuda.get_device_properties(device).multi_processor_count)

    @staticmethod
    def of_capability(capability: tuple[int, int], programs: int) -> Target:
        """programs: the number of multiprocessors."""
        if capability[0] == 10:  # B200, B300
            tile = GemmTile(128, 128, 256, 8, 4)
        elif capability[0] >= 12:  # RTX 50, RTX PRO
            tile = GemmTile(128, 128, 128, 8, 3)
        else:
            tile = GemmTile(128, 128, 64, 8, 3)
        blackwell = capability[0] >= 10
        return Target(blackwell, blackwell, programs, tile, GemmTile(128, 128, 64, 8, 3))
