"""Data-parallel optimization: FP32 main gradients, divided AdamW, clipping and learning-rate schedules (floor 4).

This floor knows parameters, their placements and groups of ranks. It does not know how a layer computed a gradient.
"""

from megatron_fp4.comm.config import Overlap
from megatron_fp4.optim.config import DecayStyle, Impl, OptimConfig, Schedule
from megatron_fp4.optim.lr import check_schedule, learning_rate
from megatron_fp4.optim.state import StepReport
from megatron_fp4.optim.zero1 import Zero1AdamW

__all__ = [
    "DecayStyle",
    "Impl",
    "OptimConfig",
    "Overlap",
    "Schedule",
    "StepReport",
    "Zero1AdamW",
    "check_schedule",
    "learning_rate",
]
