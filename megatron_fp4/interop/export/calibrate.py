"""Static scales of activations, for servers that quantize them too (W4A4): measured on a sample of the held-out set.

In training the scale of an activation is that of the batch. A server has one for all batches, so it is the largest
magnitude that the sample shows; what is larger later saturates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_fp4.precision.operand import Format
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.evaluation.inputs import INPUTS, watching_inputs
from megatron_fp4.train.inputs import make_inputs
from megatron_fp4.train.open import open_trained
from megatron_fp4.train.opened import open_data


def input_amax(config: RunConfig, step: int, max_tokens: int) -> dict[str, Tensor]:
    """The largest magnitude of the input of every linear that multiplies NVFP4 activations, FP32 scalars by name.

    The run's model after `step`, computing as in its last step, reads up to `max_tokens` tokens of its first held-out
    set. Raises ValueError or FileNotFoundError where run, data or set are not there.
    """
    trained = open_trained(config, step)
    loaders = open_data(trained.checked, dp_rank=0).evaluations
    if not loaders:
        raise ValueError("the run has no held-out set (data.evaluation) to measure activations on")
    table = trained.table("same")
    trained.assign(table)
    names = [row.name for row in table.rows if row.precision.fprop.x.format is Format.nvfp4]
    batch_tokens = config.train.micro_batch * config.data.seq_length
    with watching_inputs(trained.engine.stages, names) as largest:
        for batch in itertools.islice(loaders[0], max(1, max_tokens // batch_tokens)):
            trained.engine.evaluate(make_inputs(batch, trained.mesh.cp, trained.device))
    return largest


def source_of_scales(state: Mapping[str, Any]) -> str:
    """Whose they are, for people. state: small state of the checkpoint."""
    return "of training" if INPUTS in state["meta"] else "measured on a sample of the held-out set"


def check_inputs(linears: Mapping[str, Tensor], coded: set[str]) -> None:
    """Raise ValueError for linears whose codes would meet activations of another kind than in training."""
    if experts := sorted(name for name in coded if ".experts." in name):
        raise ValueError(
            f"--activations: training weighs what enters {experts[-1]}, servers what leaves it, so it has no scale that"
            " both share; leave --activations out"
        )
    if missing := sorted(coded - linears.keys()):
        raise ValueError(
            f"--activations: {', '.join(missing[:3])} multiplied its codes with activations that were not NVFP4;"
            " leave --activations out"
        )
    if silent := sorted(name for name in coded if not bool(linears[name] > 0)):
        raise ValueError(f"--activations: the input of {silent[0]} is zero in the whole sample; take more tokens")
