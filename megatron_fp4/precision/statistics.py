"""The quantization report: how well a tensor survives a format.

Pure functions of a tensor and an `Operand`: they quantize a copy with the emulated backend and compare; they
change nothing and are called by whoever monitors (every N steps), per linear and per operand. They use no collectives:
the statistics are those of the local part, with a scale from the local amax. `StatisticsProbe` calls them for every
tensor on its way to a GEMM; the backend that it wraps gets the same calls as ever, so no number of a run changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, log10

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.precision.backends.centred import as_quantized
from megatron_fp4.precision.backends.finite import NonFiniteError, NonFiniteWatch
from megatron_fp4.precision.backends.product import GlobalScale
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin
from megatron_fp4.precision.backends.randomness import signs_for, with_signs
from megatron_fp4.precision.backends.reference import ReferenceBackend, decode
from megatron_fp4.precision.operand import OUTER_BLOCK, AmaxScope, Format, Operand
from megatron_fp4.precision.spec import LinearPrecision

HISTOGRAM_EDGES = (0.0, 2.0**-6, 2.0**-3, 1.0, 8.0, 64.0, 448.0)


@dataclass(frozen=True)
class QuantizationStats:
    """What one tensor loses as one operand."""

    snr_db: float
    """10 log10 of signal over error energy."""
    relative_mse: float
    """Error over signal energy."""
    underflow: float
    """Share of non-zero elements that became zero."""
    saturation: float
    """Share of elements above the largest code before clipping."""
    scale_histogram: tuple[float, ...]
    """Share of block scales in (edge[i-1], edge[i]] of HISTOGRAM_EDGES, the first being scales of exactly zero; empty
    for power-of-two scales."""
    amax: float
    """Largest magnitude of the tensor, after its transform if it has one."""


def quantization_stats(x: Tensor, operand: Operand, *, along: int = 1, step: int = 0) -> QuantizationStats:
    """Quantize `x [R, C]` as `operand`, contracted along `along`, and compare with x (after its transform, if any).

    Raises ValueError for an operand in high precision, or a shape that the tile does not divide, NonFiniteError for NaN
    and Inf.
    """
    if not operand.quantized:
        raise ValueError("quantization_stats: the operand is not quantized (format=bf16)")
    sums = sums_of(x, operand, along, step).tolist()
    if not isfinite(sums[AMAX]):
        raise NonFiniteError(_origin(x, step), sums[AMAX])
    return stats_of(sums, operand)


def _origin(x: Tensor, step: int) -> OperandOrigin:
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape)
    return OperandOrigin("report", "x", rows, cols, Group.single(), seed=0, step=step)


def sums_of(x: Tensor, operand: Operand, along: int, step: int, amax: Tensor | None = None) -> Tensor:
    """What `stats_of` is made of, FP64 on the device of `x`: nothing is read back. Without a meaning if x has NaN."""
    origin = replace(_origin(x, step), amax=amax)
    x, operand = as_quantized(x, origin, operand)
    copy = Copy("report", operand, along)
    (prepared,) = ReferenceBackend(NonFiniteWatch()).quantize(x, origin, [copy])
    values, scale = decode(prepared)
    exact = x if along == 1 else x.T.contiguous()
    if operand.rht_size:
        signed = with_signs(x, origin, copy)
        exact = hadamard(signed if along == 1 else signed.T, operand.rht_size, signs_for(origin, operand, x.device), 1)
    wanted = exact.double()
    of_codes = scale
    if operand.amax_scope is AmaxScope.group128:
        of_codes = GlobalScale(prepared.tensors[2].repeat_interleave(OUTER_BLOCK // 16, 1), 6.0 * operand.scale_bound)
    got = values.double() if scale is None else values.double() * (scale[0].double() / scale[1])
    of_elements = (
        exact.abs().max(),
        (wanted**2).sum(),
        ((got - wanted) ** 2).sum(),
        (wanted != 0).sum(),
        ((got == 0) & (wanted != 0)).sum(),
        _num_saturated(wanted, prepared.tensors[1], of_codes, operand),
        wanted.new_full((), wanted.numel()),
    )
    return torch.cat([torch.stack([one.double() for one in of_elements]), _histogram(prepared.tensors[1]).double()])


AMAX = 0
"""Where `sums_of` has the largest magnitude, which is NaN or Inf if any element is; all behind it may be added."""
NUM_ELEMENTS, ZERO_SCALES = 6, 7
"""Where it has the number of elements, and that of block scales of zero."""


def stats_of(sums: Sequence[float], operand: Operand) -> QuantizationStats:
    amax, signal, error, num_nonzero, num_lost, num_saturated, numel, *histogram = sums
    relative = error / signal if signal else 0.0
    return QuantizationStats(
        snr_db=-10 * log10(relative) if relative else inf,
        relative_mse=relative,
        underflow=num_lost / num_nonzero if num_nonzero else 0.0,
        saturation=num_saturated / numel,
        scale_histogram=_shares(histogram) if operand.format is Format.nvfp4 else (),
        amax=amax,
    )


def linear_report(
    name: str, x: Tensor, weight: Tensor, dy: Tensor | None, precision: LinearPrecision, step: int = 0
) -> dict[str, QuantizationStats]:
    """Statistics of every quantized operand of one linear: keys `<name>/fprop.x`, `<name>/wgrad.dy` and so on.

    x `[T, K]`, weight `[N, K]`, dy `[T, N]` (None leaves the gradients out).
    """
    operands = {
        "fprop.x": (x, precision.fprop.x, 1),
        "fprop.w": (weight, precision.fprop.w, 1),
        "dgrad.w": (weight, precision.dgrad.w, 0),
        "wgrad.x": (x, precision.wgrad.x, 0),
    }
    if dy is not None:
        operands |= {"dgrad.dy": (dy, precision.dgrad.dy, 1), "wgrad.dy": (dy, precision.wgrad.dy, 0)}
    return {
        f"{name}/{role}": quantization_stats(tensor.detach(), operand, along=along, step=step)
        for role, (tensor, operand, along) in operands.items()
        if operand.quantized
    }


def report_table(stats: Iterable[tuple[str, QuantizationStats]]) -> str:
    """The report as text, one line per operand; the last columns are the histogram of the block scales, in percent."""
    edges = ["scale = 0", *(f"<= {edge:g}" for edge in HISTOGRAM_EDGES[1:])]
    lines = [
        f"{'operand':48s} {'SNR dB':>7s} {'rel. MSE':>9s} {'underflow':>9s} {'saturated':>9s} {'amax':>10s} "
        + " ".join(f"{edge:>11s}" for edge in edges)
    ]
    for name, s in stats:
        numbers = f"{s.snr_db:7.2f} {s.relative_mse:9.5f} {s.underflow:9.4%} {s.saturation:9.4%} {s.amax:10.4g}"
        lines.append(f"{name:48s} {numbers} " + " ".join(f"{share:11.2%}" for share in s.scale_histogram))
    return "\n".join(line.rstrip() for line in lines)


Report = dict[str, QuantizationStats]
"""`blocks.3.mlp.up/fprop.x` -> statistics."""


def _num_saturated(wanted: Tensor, scales: Tensor, scale: tuple[Tensor, float] | None, operand: Operand) -> Tensor:
    """Number of elements whose magnitude, in code units, is above the largest code."""
    largest = 6.0 if operand.format in (Format.nvfp4, Format.mxfp4) else 448.0
    unit = scales.double()[..., None]
    if scale is not None:
        factor = scale[0].double() / scale[1]
        unit = unit * (factor[..., None] if factor.dim() else factor)
    blocked = wanted.abs().view(wanted.shape[0], scales.shape[1], -1)
    return (blocked > largest * unit * (1 + 2.0**-20)).sum()


def _histogram(scales: Tensor) -> Tensor:
    """Number of the block scales in each interval; see `QuantizationStats.scale_histogram`."""
    values = scales.float()
    up_to = torch.stack([(values <= edge).sum() for edge in HISTOGRAM_EDGES])  # edges as arguments: no copy of a list
    return up_to.diff(prepend=torch.zeros_like(up_to[:1]))


def _shares(counts: Sequence[float]) -> tuple[float, ...]:
    total = sum(counts)
    return tuple(count / total for count in counts)
