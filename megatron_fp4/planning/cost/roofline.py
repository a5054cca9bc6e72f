"""Each linear's three products against what quantizing their operands costs: where FP4 is limited by memory.

A product takes the longer of its FLOPs at the peak of its format and its bytes at the bandwidth of memory: both
operands read as codes, the result written in BF16 (Wgrad: added to FP32 gradients). A quantizer takes its bytes: the
readings of its tensor, divided over the products that the copies are for, and the copy itself (overheads.py); a weight
is quantized once a step, so a microbatch bears its part.

Not here: what the whole step gains (gains.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.block import LinearInfo
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.machines import MACHINES, Machine
from megatron_fp4.planning.cost.overheads import linear_quantizers, tensor_sizes
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.stand_ins import STORED_BYTES
from megatron_fp4.precision.spec import Gemm, LinearPrecision
from megatron_fp4.precision.table import gemm_format
from megatron_fp4.train.telemetry.peaks import rate_of

OTHERS = ("B200", "H100", "RTX_5090")
"""GPUs whose totals stand beside those of the plan's."""
FP32 = 4
BF16 = 2


@dataclass(frozen=True)
class RoofProduct:
    """One product of a microbatch on a rank. moved: bytes of its operands and result. quantized: see the top."""

    gemm: str
    format: str
    flops: float
    moved: float
    quantized: float

    def at_peak(self, machine: Machine) -> float:
        """Seconds, by the longer of FLOPs and bytes."""
        return max(self.flops / self._rate(machine), self.moved / (1e9 * machine.memory_gb_per_second))

    def by_memory(self, machine: Machine) -> bool:
        """Whether its bytes take longer than its FLOPs."""
        return self.at_peak(machine) > self.flops / self._rate(machine)

    def _rate(self, machine: Machine) -> float:
        return machine.gpu.rate(rate_of(self.format, machine.gpu))


@dataclass(frozen=True)
class LinearRoof:
    """Linears of one kind, shape and precision. count: how many the model has. tokens: rows of x on a rank. rows,
    columns: of a rank's weight, of one expert where there are some.
    """

    linear: str
    count: int
    tokens: float
    rows: int
    columns: int
    products: tuple[RoofProduct, ...]


def linear_roofs(linears: Sequence[LinearInfo], moe: MoeConfig, settings: RankSettings) -> list[LinearRoof]:
    """In the order of the model."""
    alike: dict[tuple[str, int, int, LinearPrecision], list[LinearInfo]] = {}
    for info in linears:
        kind = re.sub(r"^blocks\.\d+\.", "", info.name)
        key = (kind, *info.local_shape(settings.tp), settings.precision(info.name))
        alike.setdefault(key, []).append(info)
    return [
        LinearRoof(kind, len(infos), settings.rows(infos[0], moe), rows, columns, _products(infos[0], moe, settings))
        for (kind, rows, columns, _), infos in alike.items()
    ]


def _products(info: LinearInfo, moe: MoeConfig, settings: RankSettings) -> tuple[RoofProduct, ...]:
    tensors = linear_quantizers(info, moe, settings)
    numels = tensor_sizes(info, moe, settings)
    rows, columns = info.local_shape(settings.tp)
    precision = settings.precision(info.name)
    results = {"fprop": "dy", "dgrad": "x", "wgrad": "w"}  # each has the shape of one of the tensors

    def product(gemm: Gemm) -> RoofProduct:
        quantized = 0.0
        for tensor in gemm.tensors:
            one = tensors[tensor]
            if gemm.name in one.written:
                times = 1 / settings.num_microbatches if tensor == "w" else 1.0
                quantized += times * (one.written[gemm.name] + one.read / len(one.written))
        stored = [STORED_BYTES.get(operand.format, settings.dtype.itemsize) for operand in gemm.operands]
        read = sum(numels[tensor] * each for tensor, each in zip(gemm.tensors, stored, strict=True))
        narrow = settings.sums_in_bf16(dims=2, whole=info.whole, expert=bool(info.num_experts))
        result = 2 * (BF16 if narrow else FP32) if gemm.name == "wgrad" else settings.dtype.itemsize  # read and written
        flops = 2.0 * settings.rows(info, moe) * rows * columns
        return RoofProduct(gemm.name, gemm_format(gemm), flops, read + numels[results[gemm.name]] * result, quantized)

    return tuple(product(gemm) for gemm in precision.gemms)


def roofline_section(
    linears: Sequence[LinearInfo],
    moe: MoeConfig,
    settings: RankSettings,
    site: Site,
    gains: Callable[[Site], dict[str, float]],
) -> dict[str, Any]:
    """One entry per kind of linear; the totals of this GPU and of `OTHERS`. gains: of the whole step, on a site."""
    roofs = linear_roofs(linears, moe, settings)
    others = [name for name in OTHERS if name != site.machine.gpu.name]
    return {
        "gpu": site.machine.gpu.name,
        "tokens": settings.tokens,
        "linears": [_entry(roof, site.machine) for roof in roofs],
        "machines": [
            {"gpu": one.machine.gpu.name, **_totals(roofs, one), **gains(one)}
            for one in (site, *(replace(site, machine=MACHINES[name]) for name in others))
        ],
    }


def _entry(roof: LinearRoof, machine: Machine) -> dict[str, Any]:
    products = []
    for product in roof.products:
        seconds, quantizing = product.at_peak(machine), product.quantized / (1e9 * machine.memory_gb_per_second)
        times = {
            "product_seconds": seconds,
            "quantizer_seconds": quantizing,
            "share": quantizing / (seconds + quantizing),
        }
        products.append({**asdict(product), **times, "by_memory": product.by_memory(machine)})
    return {**asdict(roof), "products": products}


def _totals(roofs: Sequence[LinearRoof], site: Site) -> dict[str, Any]:
    """Seconds of all linears of the model for a microbatch, on the ranks that hold them: at peak, and as reached."""
    machine, assumptions = site.machine, site.assumptions
    at_peak = reached = quantizing = 0.0
    for roof in roofs:
        for product in roof.products:
            seconds = roof.count * product.at_peak(machine)
            is_fp4 = rate_of(product.format, machine.gpu) == "fp4"
            at_peak += seconds
            reached += seconds / assumptions.efficiency / (machine.fp4_share if is_fp4 else 1.0)
            quantizing += roof.count * product.quantized / (1e9 * machine.memory_gb_per_second)
    slow = quantizing / assumptions.quantizer_efficiency
    pairs = {"at_peak": (at_peak, quantizing), "reached": (reached, slow)}
    return {
        name: {"product_seconds": first, "quantizer_seconds": second, "share": second / (first + second)}
        for name, (first, second) in pairs.items()
    }
