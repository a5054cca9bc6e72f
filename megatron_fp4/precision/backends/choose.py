"""The backend that a configuration names, and the shapes that it refuses before anything is built.

Not here: what the machine must have for it (each backend's constructor says that).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fp4.precision.backends import Backend, NonFiniteWatch
from megatron_fp4.precision.backends.centred import CentredBackend
from megatron_fp4.precision.backends.emulated import EmulatedBackend, compile_obstacle
from megatron_fp4.precision.backends.native_fp8 import REMEDY, NativeFp8Backend
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.backends.triton_limits import MOST_LINES, check_triton_device, check_triton_machine
from megatron_fp4.precision.backends.triton_limits import REMEDY as TRITON_REMEDY
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend
from megatron_fp4.precision.plan import Linear, PrecisionPlan
from megatron_fp4.precision.te.refusals import LEAST_ROWS, check_te_linear


def make_backend(config: PrecisionConfig, watch: NonFiniteWatch | None = None) -> Backend:
    """The backend that `precision.backend` names. watch: records NaN and Inf instead of raising."""
    backend = _named_backend(config, watch)
    return CentredBackend(backend) if any(recipe.centred for recipe in config.recipes.values()) else backend


def eager_emulation(*, centred: bool) -> Backend:
    """The emulation with nothing to compile. centred: an operand is quantized without its mean."""
    backend = EmulatedBackend(compile=False)
    return CentredBackend(backend) if centred else backend


def _named_backend(config: PrecisionConfig, watch: NonFiniteWatch | None) -> Backend:
    if config.backend is BackendName.auto:
        raise ValueError(
            "precision.backend=auto is settled by a run, which tries the backends on its GPUs"
            " (train/arrival/backend.py); name one here, such as emulated"
        )
    if config.backend is BackendName.reference:
        return ReferenceBackend(watch)
    if config.backend is BackendName.emulated:
        return SegmentedEmulatedBackend(config.compile and not eager_reason(config), watch)
    if config.backend is BackendName.native_fp8:
        return NativeFp8Backend(config, watch)
    if config.backend is BackendName.triton:
        check_triton_machine()
        from megatron_fp4.precision.backends.triton import TritonBackend  # it imports triton, an extra

        return TritonBackend(config, watch)
    return TransformerEngineBackend(config, watch)


def check_backend_device(name: BackendName, device: torch.device) -> None:
    """Raises ValueError with the remedy for a backend that needs a GPU, on a rank that has none."""
    if name is BackendName.native_fp8 and device.type != "cuda":
        raise ValueError(f"precision.backend=native_fp8 needs a Hopper GPU, but this run is on {device}{REMEDY}")
    if name is BackendName.triton:
        check_triton_device(device)


def eager_reason(config: PrecisionConfig) -> str:
    """Why the emulated backend runs eagerly although `precision.compile` is on; empty if it does not. Same numbers."""
    on_cpu = not torch.cuda.is_available()
    return compile_obstacle() if config.compile and config.backend is BackendName.emulated and on_cpu else ""


def check_backend_shapes(plan: PrecisionPlan, linears: Sequence[Linear], *, tp: int, tokens: int) -> None:
    """Raises ValueError for a local shape that the backend's kernels do not take, in any table of the plan.

    tp: tensor-parallel size. tokens: rows of one microbatch on a rank.
    """
    if plan.config.backend is BackendName.transformer_engine:
        for label, table in plan.labelled_tables():
            for info in linears:
                # segments of experts are extended
                rows = LEAST_ROWS if info.num_experts else info.local_rows(tokens, tp)
                check_te_linear(f"{label}{info.name}", table[info.name], info.local_shape(tp), rows)
    if plan.config.backend is BackendName.triton and tokens > MOST_LINES:
        raise ValueError(
            f"precision.backend=triton quantizes at most {MOST_LINES:,} rows at once, and a microbatch has {tokens:,}"
            f" tokens on a rank; use a smaller train.micro_batch or a larger parallel.cp, or {TRITON_REMEDY}"
        )
