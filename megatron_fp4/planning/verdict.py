"""Whether a layout could run: what a run would refuse, memory, shapes, and what is far from good.

A warning is a dictionary of three texts: about (memory, shapes, saves), severity (error, slow), text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_fp4.planning.alignment import alignment_warnings
from megatron_fp4.planning.cost.whole_run import save_warnings
from megatron_fp4.precision.config import BackendName
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig


@dataclass(frozen=True)
class Admission:
    """A checked configuration. objection: why its backend cannot quantize it; the plan goes on as if it could."""

    checked: CheckedConfig
    objection: str = ""


def admit(config: RunConfig, num_gpus: int) -> Admission:
    """Raises ValueError for everything that a run would refuse, but for what only Transformer Engine does."""
    try:
        return Admission(check_config(config, num_gpus))
    except ValueError as error:
        if config.precision.backend is not BackendName.transformer_engine:
            raise
        emulated = replace(config, precision=replace(config.precision, backend=BackendName.emulated))
        checked = check_config(emulated, num_gpus)
        as_asked = replace(checked.config, precision=config.precision)
        return Admission(replace(checked, config=as_asked), str(error))


def warnings_of(
    admission: Admission, memory: Mapping[str, Any], whole_run: dict[str, Any], tokens: int
) -> list[dict[str, str]]:
    """memory, whole_run: sections of the report. tokens: rows of a microbatch."""
    checked = admission.checked
    warnings = []
    if memory["largest"] > memory["gpu_bytes"]:
        largest, gpu = memory["largest"], memory["gpu_bytes"]
        sizes = f"{largest / 1e9:.0f} GB are {largest / gpu:.2f} x the {gpu / 1e9:.0f} GB of the GPU"
        text = f"{sizes}; raise tp, pp, cp or dp, or recompute, or see --search"
        warnings.append({"about": "memory", "severity": "error", "text": text})
    if admission.objection:
        warnings.append({"about": "shapes", "severity": "error", "text": admission.objection})
    shapes = alignment_warnings(checked.linears, checked.plan.table(), tp=checked.config.parallel.tp, tokens=tokens)
    return [*warnings, *({"about": "shapes", **shape} for shape in shapes), *save_warnings(whole_run)]


def fits(warnings: Sequence[Mapping[str, str]], backend: BackendName) -> bool:
    """Whether a run could start: memory, and shapes that the backend can quantize."""
    fatal = {"memory"} | ({"shapes"} if backend is BackendName.transformer_engine else set())
    return not any(warning["severity"] == "error" and warning["about"] in fatal for warning in warnings)
