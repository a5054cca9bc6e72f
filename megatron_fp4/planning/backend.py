"""What `precision.backend=auto` would come to on GPUs that are not at hand."""

from __future__ import annotations

from typing import NamedTuple

from megatron_fp4.planning.cost.hardware import DEFAULT_GPU
from megatron_fp4.planning.cost.machines import MACHINES
from megatron_fp4.precision.auto import NOTHING_QUANTIZED, BackendChoice, Capability, expected_choice, quantizes
from megatron_fp4.precision.config import BackendName
from megatron_fp4.train.arrival.backend import with_backend
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.peaks import Gpu


class Forecast(NamedTuple):
    """A configuration that names a backend, and how it was chosen; None where it named one before."""

    config: RunConfig
    choice: BackendChoice | None


def forecast_backend(config: RunConfig, gpu: Gpu | None = None, num_gpus: int = 0) -> Forecast:
    """`auto` on these GPUs, if everything is installed there and passes its self-test.

    gpu: None for that of a plan that names none. num_gpus: for the layout of the configuration; 0: of layouts nothing
    is asked. Raises ValueError for what a run would refuse with any backend.
    """
    if config.precision.backend is not BackendName.auto:
        return Forecast(config, None)
    recipes = config.precision.recipes.values()
    if not (quantizes(check_config(config, num_gpus).plan) if num_gpus else any(r.quantized for r in recipes)):
        return Forecast(with_backend(config, NOTHING_QUANTIZED.name), NOTHING_QUANTIZED)

    def objection(name: BackendName) -> str:
        try:
            if num_gpus:
                check_config(with_backend(config, name), num_gpus)
        except ValueError as error:
            return str(error)
        return ""

    choice = expected_choice(config.precision, capability_of(gpu or MACHINES[DEFAULT_GPU].gpu), objection)
    return Forecast(with_backend(config, choice.name), choice)


def capability_of(gpu: Gpu) -> Capability:
    """The compute capability of a GPU of the table, as far as a choice of kernels depends on it."""
    if "fp4" not in gpu.tflops:
        return (9, 0)
    return (12, 0) if gpu.name.startswith("RTX") else (10, 0)
