"""Data-parallel optimization: FP32 main gradients, divided AdamW and Muon, clipping, learning-rate schedules (floor 4).

This floor knows parameters, their placements and groups of ranks. It does not know how a layer computed a gradient.
"""

from megatron_fp4.comm.config import Overlap
from megatron_fp4.optim.config import Algorithm, DecayStyle, Impl, OptimConfig, Schedule
from megatron_fp4.optim.lr import check_schedule, describe_schedule, learning_rate
from megatron_fp4.optim.muon.choice import choice_table, state_bytes
from megatron_fp4.optim.state import StepReport
from megatron_fp4.optim.zero1 import Zero1Optimizer

__all__ = [
    "Algorithm",
    "DecayStyle",
    "Impl",
    "OptimConfig",
    "Overlap",
    "Schedule",
    "StepReport",
    "Zero1Optimizer",
    "check_schedule",
    "choice_table",
    "describe_schedule",
    "learning_rate",
    "state_bytes",
]
