"""What of a run is computed without the kernels that its device could have: said loudly, for nothing else says it.

Losses are right and the run is several times too slow, which nobody sees who has nothing to compare it with.
"""

from __future__ import annotations

import torch

from megatron_fp4.layers.mamba.kernels import MambaKernel
from megatron_fp4.optim.kept.config import MomentFormat
from megatron_fp4.precision.backends.choose import eager_reason
from megatron_fp4.precision.backends.emulated import compile_obstacle
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train.config import RunConfig

FP4_CAPABILITY = 10
"""From this compute capability on GPUs have FP4 tensor cores."""


def slow_paths(config: RunConfig, plan: PrecisionPlan, *, fp4: bool) -> list[str]:
    """One sentence each, with the remedy, for a run on GPUs. fp4: they have FP4 tensor cores."""
    backend = config.precision.backend
    count = max(table.num_quantized_gemms for _, table in plan.phases)
    lines = []
    if fp4 and count and backend in (BackendName.emulated, BackendName.reference):
        lines.append(
            f"precision.backend={backend.name} on GPUs with FP4 tensor cores: all {count} quantized GEMMs are emulated,"
            " that is quantized by torch and multiplied in BF16, slower than without quantization; set"
            " precision.backend=auto, triton or transformer_engine"
        )
    mamba = config.model.blocks.count("M")
    if mamba and config.model.mamba_kernel is MambaKernel.torch:
        remedy = "set model.mamba_kernel=mamba_ssm (pip install causal-conv1d mamba-ssm --no-build-isolation)"
        if config.parallel.cp > 1:
            remedy = f"mamba_ssm has no kernels for parallel.cp={config.parallel.cp}: set parallel.cp=1 and " + remedy
        lines.append(
            f"model.mamba_kernel=torch on GPUs: the scan of {mamba} Mamba blocks is a loop of torch's operations,"
            f" hundreds of launches a block; {remedy}"
        )
    return lines


def slow_paths_on(config: RunConfig, plan: PrecisionPlan, device: torch.device) -> list[str]:
    """`slow_paths` of a run on the kind of this device; none on a CPU."""
    if device.type != "cuda":
        return []
    return slow_paths(config, plan, fp4=torch.cuda.get_device_capability(device)[0] >= FP4_CAPABILITY)


def eager_paths_on(config: RunConfig, device: torch.device) -> list[str]:
    """One sentence for each thing that was to be compiled and is not, on the kind of this device; same numbers."""
    lines = []
    if reason := eager_reason(config.precision):
        lines.append(f"precision.compile is on, but {reason}: the quantizer runs eagerly (same numbers, slower)")
    compact = any(format is not MomentFormat.fp32 for format in config.optim.moments.by_kind.values())
    if config.optim.compile and compact and device.type == "cpu" and (reason := compile_obstacle()):
        lines.append(f"optim.compile is on, but {reason}: moments are converted eagerly (same numbers, slower)")
    return lines
