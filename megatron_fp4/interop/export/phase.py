"""In which precision the codes of an export are made: that of the last step, or of a step that the user names.

A run may leave its quantized formats behind at its end. Its last weights then are operands of no step, so which step's
precision makes codes of them is for the user to say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from megatron_fp4.interop.export.plan import ExportedTensor, Requantize, coded_tensors
from megatron_fp4.models.block import model_linears
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.precision_plan import make_plan


def tensors_as_trained(
    config: RunConfig, state: Mapping[str, Any], requantize: Requantize | None, precision_at: int | None
) -> tuple[list[ExportedTensor], str]:
    """The tensors of a 4-bit file, and a sentence that says what they are.

    state: the checkpoint's. precision_at: the step in whose precision codes are made, None: the last one. Raises
    ValueError with the remedy.
    """
    if "precision" not in state["meta"]:
        raise ValueError(
            "the checkpoint was imported and not trained, so no operand says what its codes are; --format hf writes it"
        )
    linears = model_linears(config.model)
    plan = make_plan(config, linears, config.train.micro_batch * config.data.seq_length // config.parallel.cp)
    phase, when = _phase(plan, config, state, precision_at)
    try:
        tensors = coded_tensors(config.model, plan.table(phase), config.parallel.tp, requantize)
    except ValueError as error:
        before = [number for number in range(phase) if _codes(plan, number)]
        if _codes(plan, phase) or not before:
            raise
        last = _last_step_of(config, plan.phases[before[-1] + 1][0])
        raise ValueError(
            f"the run had left its quantized formats behind when the checkpoint was written ({error});"
            f" --precision-at {last} makes the codes of these weights in the precision of step {last}, the last before"
            " the switch"
        ) from None
    coded = {one.coded.linear for one in tensors if one.coded is not None}
    how = "the operand that Fprop multiplied" if not requantize else f"quantized anew, {requantize.value}"
    return tensors, f"{len(coded)} of {len(linears)} linears hold NVFP4 codes ({how}, in the precision {when})."


def _codes(plan: PrecisionPlan, phase: int) -> bool:
    return any(row.precision.fprop.w.quantized for row in plan.table(phase).rows)


def _phase(
    plan: PrecisionPlan, config: RunConfig, state: Mapping[str, Any], precision_at: int | None
) -> tuple[int, str]:
    """The phase in whose precision codes are made, and its name for people."""
    if precision_at is not None:
        if not 1 <= precision_at <= config.total_steps:
            raise ValueError(f"--precision-at {precision_at}: the run has the steps 1 to {config.total_steps}")
        before = _samples_before(config, precision_at)
        return plan.phase_at(before * config.data.seq_length), f"of step {precision_at}"
    meta = state["meta"]
    phase = plan.phase_before(meta["consumed_samples"] * config.data.seq_length, meta["precision"])
    if plan.table(phase).texts() != meta["precision"]:
        raise ValueError(
            "the precision stored with the checkpoint is none that its settings give in this version of the program;"
            " --precision-at STEP takes that of the settings at a step"
        )
    return phase, f"of the last step, {state['step']}"


def _samples_before(config: RunConfig, step: int) -> int:
    """Samples that the steps before `step` consume."""
    left, samples = step - 1, 0
    for stage in config.stages():
        samples += min(left, stage.num_steps) * stage.size
        left -= min(left, stage.num_steps)
    return samples


def _last_step_of(config: RunConfig, tokens: int) -> int:
    """The last step that begins before `tokens` are consumed."""
    steps = range(1, config.total_steps + 1)
    return bisect_left(steps, tokens, key=lambda step: _samples_before(config, step) * config.data.seq_length)
