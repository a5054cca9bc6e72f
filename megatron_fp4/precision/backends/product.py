"""The product of two emulated operands: accumulated in FP32, scaled in FP32, rounded once.

One idea: the operands hold few significant bits, so every type at least as wide as BF16 multiplies them exactly; which
GEMM is called is a question of speed and of the last rounding. CPUs have no GEMM from BF16 to FP32, so operands are
widened for an FP32 result. On a CPU without BF16 instructions they are widened always: torch's BF16 GEMM is several
times slower there, and it applies alpha before the sum. The kind of CPU decides, never a timing, so a machine repeats
its own numbers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Scale = tuple[Tensor, float]  # a global scale is amax / divisor


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for BF16 products: AVX512-BF16, AMX, or those of ARMv8.6."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def widens(device: torch.device, out_dtype: torch.dtype) -> bool:
    """Whether BF16 operands are multiplied as FP32 for a result of this type."""
    if device.type != "cpu":
        return False
    return out_dtype == torch.float32 or (out_dtype == torch.bfloat16 and not cpu_multiplies_bf16())


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Scale | None,
    b_scale: Scale | None,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    """`alpha * (a @ b.T)` with alpha = amax_a * amax_b / (divisor_a * divisor_b), in FP32, before the rounding."""
    scalars = [scale for scale in (a_scale, b_scale) if scale is not None and scale[0].numel() == 1]
    alpha = None
    if scalars:
        alpha, divisor = scalars[0][0].reshape(()), scalars[0][1]
        if len(scalars) == 2:
            alpha, divisor = alpha * scalars[1][0].reshape(()), divisor * scalars[1][1]
        alpha = alpha / torch.full_like(alpha, divisor)
    if out_dtype == torch.float64:  # sums of the proof mode: the operands are exact in FP64 as well
        a, b = a.double(), b.double()
    per_row = len(scalars) < sum(scale is not None for scale in (a_scale, b_scale))
    if a.device.type == "cpu" and out_dtype == torch.bfloat16 and not per_row and cpu_multiplies_bf16():
        # oneDNN applies alpha to the FP32 accumulator. (The FP32 GEMM of MKL applies it earlier: other sums.)
        out = torch.addmm(a.new_empty(1, 1), a, b.T, beta=0, alpha=1.0 if alpha is None else alpha.item())
    else:
        out = torch.mm(a, b.T) if out_dtype == torch.float64 else _matmul_fp32(a, b)
        for scale, shape in ((a_scale, (-1, 1)), (b_scale, (1, -1))):
            if scale is not None and scale[0].numel() > 1:
                out = out * (scale[0].view(shape) / scale[1])
        out = out if alpha is None else out.mul_(alpha)
        out = out.to(out_dtype)
    return out if accumulate_into is None else accumulate_into.add_(out)


def _matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in FP32. CUDA has a GEMM from BF16 to FP32; elsewhere the operands are widened, which is exact."""
    if a.device.type == "cuda" and a.dtype == torch.bfloat16:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float().T)
