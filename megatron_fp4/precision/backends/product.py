"""The product of two emulated operands: accumulated in FP32, scaled in FP32, rounded once.

The operands hold few significant bits, so every type at least as wide as BF16 multiplies them exactly; which GEMM is
called is a question of speed and of the last rounding. Each kind of device has one function here. The kind of CPU
decides, never a timing, so a machine repeats its own numbers.

                     BF16 x BF16 -> BF16                            -> FP32
    CUDA             in BF16; FP32, scaled and rounded with scales  in FP32; without scales added to `into` by the GEMM
    CPU with BF16    in BF16, scaled before the rounding            operands widened
    CPU without      operands widened: its BF16 GEMM rounds twice   operands widened
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.precision.operand import Operand


class GlobalScale(NamedTuple):
    """The FP32 scale of an operand `[M, K]`: amax / divisor. amax: a scalar, or one per row (M elements)."""

    amax: Tensor
    divisor: float


def outer_scale(amax: Tensor, operand: Operand) -> Tensor:
    """amax / divisor of each group, FP32: of `amax_scope=group128`, which no epilogue of a GEMM can apply."""
    return amax / torch.full_like(amax, 6.0 * operand.scale_bound)


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    *,
    out_dtype: torch.dtype,
    a_scale: GlobalScale | None = None,
    b_scale: GlobalScale | None = None,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """`(a_scale * a [M, K]) @ (b_scale * b [N, K]).T`, `[M, N]` in `out_dtype`; None: an operand without global scale.

    out_dtype: BF16, FP32, or FP64 (for the proof mode, whose sums are in FP64; operands are exact there as well).
    accumulate_into: a tensor to which the product is added in place; it is then also the result.
    """
    multiply = BY_DEVICE.get(a.device.type, multiply_widened)
    return multiply(a, b, Factors.of(a_scale, b_scale), out_dtype, accumulate_into)


@dataclass(frozen=True, eq=False)
class Factors:
    """What the sums `[M, N]` are multiplied with, FP32: alpha, a scalar; rows `[M, 1]`; columns `[1, N]`."""

    alpha: Tensor | None
    rows: Tensor | None
    columns: Tensor | None

    @staticmethod
    def of(a_scale: GlobalScale | None, b_scale: GlobalScale | None) -> Factors:
        """Two scalars make one alpha, amax_a * amax_b / (divisor_a * divisor_b), as hardware gets it."""
        alpha, divisor = None, 1.0
        rows = columns = None
        for scale in (a_scale, b_scale):
            if scale is None:
                continue
            if scale.amax.numel() == 1:
                amax = scale.amax.reshape(())
                alpha, divisor = amax if alpha is None else alpha * amax, divisor * scale.divisor
            elif scale is a_scale:
                rows = scale.amax.view(-1, 1) / scale.divisor
            else:
                columns = scale.amax.view(1, -1) / scale.divisor
        # a division of tensors: PyTorch divides by a number as it likes
        return Factors(None if alpha is None else alpha / torch.full_like(alpha, divisor), rows, columns)

    @property
    def scale(self) -> bool:
        """Whether there is anything to multiply with."""
        return any(factor is not None for factor in (self.alpha, self.rows, self.columns))

    def apply(self, sums: Tensor) -> Tensor:
        """`sums` scaled, perhaps in place, in their own type."""
        for factor in (self.rows, self.columns):
            if factor is not None:
                sums = sums * factor
        return sums if self.alpha is None else sums.mul_(self.alpha)


def multiply_on_cpu(
    a: Tensor, b: Tensor, factors: Factors, out_dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """BF16 operands for a BF16 result are multiplied as they are, on CPUs that can; all others are widened."""
    native = a.dtype == b.dtype == out_dtype == torch.bfloat16 and cpu_multiplies_bf16()
    if not native or factors.rows is not None or factors.columns is not None:
        return multiply_widened(a, b, factors, out_dtype, into)
    # oneDNN applies alpha to the FP32 accumulator. (The FP32 GEMM of MKL applies it earlier: other sums.)
    alpha = 1.0 if factors.alpha is None else factors.alpha.item()
    return _added(torch.addmm(a.new_empty(1, 1), a, b.T, beta=0, alpha=alpha), into)


def multiply_on_cuda(
    a: Tensor, b: Tensor, factors: Factors, out_dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """CUDA has GEMMs from BF16 to BF16 and to FP32. They take a scale from the host, and ours are on the device."""
    if not a.dtype == b.dtype == torch.bfloat16 or out_dtype == torch.float64:
        return multiply_widened(a, b, factors, out_dtype, into)
    if factors.scale:
        return _added(factors.apply(torch.mm(a, b.T, out_dtype=torch.float32)).to(out_dtype), into)
    if out_dtype == torch.bfloat16:
        round_once_on_cuda()
        return _added(torch.mm(a, b.T), into)
    if into is None or into.dtype != torch.float32 or not adds_bf16_products():
        return _added(torch.mm(a, b.T, out_dtype=torch.float32), into)
    summed: Tensor = torch.ops.aten.addmm.dtype_out(into, a, b.T, torch.float32, out=into)
    return summed


@cache
def round_once_on_cuda() -> None:
    """Let cuBLAS add the parts of a sum that it splits in FP32; by torch's default it may round them to BF16 first."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@cache
def adds_bf16_products() -> bool:
    """Whether this torch can add a product of BF16 operands to an FP32 tensor, without the product beside it."""
    return "dtype_out" in torch.ops.aten.addmm.overloads()


def multiply_widened(
    a: Tensor, b: Tensor, factors: Factors, out_dtype: torch.dtype, into: Tensor | None = None
) -> Tensor:
    """On any device: operands widened, which is exact, to FP32, or to FP64 for a result of that type."""
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    return _added(factors.apply(torch.mm(a.to(wide), b.to(wide).T)).to(out_dtype), into)


def _added(product: Tensor, into: Tensor | None) -> Tensor:
    return product if into is None else into.add_(product)


BY_DEVICE = {"cpu": multiply_on_cpu, "cuda": multiply_on_cuda}
"""The function of a type of device, where it has one of its own."""


def widens(device: torch.device, out_dtype: torch.dtype) -> bool:
    """Whether BF16 operands are multiplied as FP32 for a result of this type: they may as well be made in FP32.

    CPUs have no GEMM from BF16 to FP32. One without BF16 instructions widens always: torch's BF16 GEMM is several times
    slower there, and applies alpha before the sum.
    """
    if device.type != "cpu":
        return False
    return out_dtype == torch.float32 or (out_dtype == torch.bfloat16 and not cpu_multiplies_bf16())


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for BF16 products: AVX512-BF16, AMX, or those of ARMv8.6."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
