"""How fast a step was, against what the hardware can do.

Model FLOPs per token are arithmetic (models/count.py), so throughput is tokens per second times a constant, and
utilization is its ratio to a peak: BF16's, or that of the mix of rates at which the GEMMs of the present precision
could run (peaks.py). On a device that is not in that table there is no utilization.

These are of the step alone. What the clock says is beside them: since the end of the step before, evaluations, saves
and logging included, and in the first step of a launch its start-up. A whole run, with the time between its launches,
is goodput.py's.
"""

from __future__ import annotations

import time

import torch

from megatron_fp4.models.count import count_flops
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.telemetry.peaks import Gpu, find_gpu, flops_by_rate


class Throughput:
    """Turns the seconds of a step into rates per device of the job. gpu: None where the peak is not known."""

    def __init__(self, config: RunConfig, num_devices: int, device: torch.device) -> None:
        self.gpu: Gpu | None = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._flops = count_flops(config.model, config.data.seq_length)
        self._num_devices = num_devices

    def metrics(self, phases: Phases, table: PrecisionTable, tokens: int) -> dict[str, float]:
        """The rates of the last step, which had `tokens` tokens.

        tflops: TFLOP/s of the model (no recomputation) per device. mfu, mfu_mixed: 0 to 1, against BF16's peak and
        against that of the precisions in `table`. wall_seconds: since this was called last. goodput: the step's part
        of them, 0 to 1. wall_time: now, in seconds since 1970.
        """
        seconds, tokens_per_device = phases.step_seconds(), tokens / self._num_devices
        wall_seconds = max(phases.lap(), seconds)
        flops_per_second = self._flops.training * tokens_per_device / seconds
        rates = {
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": phases.seconds("data"),
            "wall_time": time.time(),
            "wall_seconds": wall_seconds,
            "wall_tokens_per_second": tokens / wall_seconds,
            "goodput": seconds / wall_seconds,
            "tflops": flops_per_second / 1e12,
        }
        if self.gpu:
            gpu = self.gpu
            by_rate = flops_by_rate(self._flops, table, gpu)
            seconds_at_peak = sum(value / gpu.rate(rate) for rate, value in by_rate.items())
            rates["mfu"] = flops_per_second / gpu.rate("bf16")
            rates["mfu_mixed"] = seconds_at_peak * tokens_per_device / seconds
        return rates

    def describe(self) -> str:
        """The peaks and their source, for the start of a log."""
        if self.gpu is None:
            return f"model FLOPs per token: {self._flops.training:.4g}; no peak is known for this device, so no MFU"
        peaks = ", ".join(f"{rate} {value:g}" for rate, value in self.gpu.tflops.items())
        return f"MFU against {self.gpu.name}: {peaks} TFLOP/s dense ({self.gpu.source})"
