"""Whether a layout could run: what a run would refuse, memory, shapes, and what is far from good.

A warning has three texts: about (memory, shapes, backend, kernels, saves, failures), severity (error, tight, slow) and
text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_fp4.planning.alignment import alignment_warnings
from megatron_fp4.planning.backend import forecast_backend
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.whole_run import failure_warnings, save_warnings
from megatron_fp4.planning.stand_ins import DEQUANTIZING
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.operand import Format
from megatron_fp4.precision.table import gemm_formats
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.peaks import Gpu
from megatron_fp4.train.telemetry.slow_paths import slow_paths


@dataclass(frozen=True)
class Admission:
    """A checked configuration. choice: what `precision.backend=auto` would come to, "" where a backend is named.

    objection: why its backend cannot quantize it; the plan goes on as if it could.
    """

    checked: CheckedConfig
    choice: str = ""
    objection: str = ""


def admit(config: RunConfig, num_gpus: int, gpu: Gpu) -> Admission:
    """Raises ValueError for everything that a run would refuse, but for what only Transformer Engine does."""
    config, choice = forecast_backend(config, gpu, num_gpus)
    try:
        return Admission(check_config(config, num_gpus), str(choice or ""))
    except ValueError as error:
        if config.precision.backend is not BackendName.transformer_engine:
            raise
        emulated = replace(config, precision=replace(config.precision, backend=BackendName.emulated))
        checked = check_config(emulated, num_gpus)
        as_asked = replace(checked.config, precision=config.precision)
        return Admission(replace(checked, config=as_asked), str(choice or ""), str(error))


def warnings_of(
    admission: Admission, memory: Mapping[str, Any], whole_run: dict[str, Any], tokens: int, site: Site
) -> list[dict[str, str]]:
    """memory, whole_run: sections of the report. tokens: rows of a microbatch."""
    checked = admission.checked
    warnings = _memory_warnings(memory, site.assumptions.memory_share)
    if admission.objection:
        warnings.append({"about": "shapes", "severity": "error", "text": admission.objection})
    shapes = alignment_warnings(checked.linears, checked.plan.table(), tp=checked.config.parallel.tp, tokens=tokens)
    warnings += [{"about": "shapes", **shape} for shape in shapes]
    warnings += _backend_warnings(checked, site.machine.gpu)
    loops = slow_paths(checked.config, checked.plan, fp4=False)  # of emulated products the line above speaks
    return [
        *warnings,
        *({"about": "kernels", "severity": "slow", "text": one} for one in loops),
        *save_warnings(whole_run),
        *failure_warnings(whole_run),
    ]


def _memory_warnings(memory: Mapping[str, Any], share: float) -> list[dict[str, str]]:
    largest, gpu = memory["largest"], memory["gpu_bytes"]
    if largest > gpu:
        sizes = f"{largest / 1e9:.0f} GB are {largest / gpu:.2f} x the {gpu / 1e9:.0f} GB of the GPU"
        text = f"{sizes}; raise tp, pp, cp or dp, or recompute, or see --search"
        return [{"about": "memory", "severity": "error", "text": text}]
    if largest > share * gpu:
        sizes = f"{largest / 1e9:.0f} GB are {largest / gpu:.0%} of the {gpu / 1e9:.0f} GB of the GPU"
        text = (
            f"{sizes}, without the allocator's fragmentation, CUDA and NCCL; --memory-share {share:g} would stop there"
        )
        return [{"about": "memory", "severity": "tight", "text": text}]
    return []


def _backend_warnings(checked: CheckedConfig, gpu: Gpu) -> list[dict[str, str]]:
    """Where the products that are quantized will not run at the rates of their formats."""
    table, backend = checked.plan.table(), checked.config.precision.backend
    formats = {name for row in table.rows for text in gemm_formats(row.precision) for name in text.split("/")}
    formats.discard(Format.bf16.name)
    emulated = sorted(name for name in formats if not gpu.multiplies(name))
    text = ""
    if checked.config.precision.compute_dtype.torch_dtype is torch.float32:
        text = (
            "precision.compute_dtype=fp32 multiplies in FP32, which takes many times as long as the rates counted here"
        )
    elif emulated:
        text = f"this GPU has no FP4 unit: GEMMs in {', '.join(emulated)} are counted at the BF16 rate (emulation)"
    elif formats and backend in DEQUANTIZING:
        text = f"backend {backend.name} multiplies in BF16: these rates need backend transformer_engine or triton"
    return [{"about": "backend", "severity": "slow", "text": text}] if text else []


def obstacles(warnings: Sequence[Mapping[str, str]], backend: BackendName) -> list[str]:
    """Why a run could not start: memory, and shapes that the backend cannot quantize; none if it fits."""
    fatal = {"memory"} | ({"shapes"} if backend is BackendName.transformer_engine else set())
    return [one["text"] for one in warnings if one["severity"] == "error" and one["about"] in fatal]
