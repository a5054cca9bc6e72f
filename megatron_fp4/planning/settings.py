"""What decides the memory and the traffic of a rank besides the model, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_fp4.models.decoder import Recompute
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.pipeline.schedules import schedule_rule
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.checked import CheckedConfig


@dataclass(frozen=True)
class RankSettings:
    """Sizes of the layout and of a microbatch, and the choices that change what is kept.

    dtype: of weights, activations. table: precision of every linear; None for `dtype` everywhere. on_gpu: False for
    the kernels that torch has on a CPU, which keep more. defers_wgrad: the pipeline's schedule computes weight
    gradients later. num_microbatches: per step.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    micro_batch: int = 1
    seq_length: int = 8192
    recompute: Recompute = Recompute.none
    dtype: torch.dtype = torch.bfloat16
    keep_documents_apart: bool = False
    backend: BackendName = BackendName.emulated
    table: PrecisionTable | None = None
    on_gpu: bool = True
    defers_wgrad: bool = False
    num_microbatches: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)

    @staticmethod
    def of(checked: CheckedConfig, table: PrecisionTable) -> RankSettings:
        """The settings of a run on GPUs, with the precision of one of its phases."""
        config = checked.config
        return RankSettings(
            tp=config.parallel.tp,
            cp=config.parallel.cp,
            dp=checked.dp,
            micro_batch=config.train.micro_batch,
            seq_length=config.data.seq_length,
            recompute=config.train.recompute,
            dtype=config.precision.compute_dtype.torch_dtype,
            keep_documents_apart=config.data.reset_documents,
            backend=config.precision.backend,
            table=table,
            defers_wgrad=schedule_rule(config.parallel.schedule).defers_wgrad and config.parallel.pp > 1,
            num_microbatches=config.train.gradient_accumulation(checked.dp, config.train.global_batch),
            optim=config.optim,
        )

    @property
    def tokens(self) -> int:
        """T, the tokens of a microbatch on a context-parallel rank."""
        return self.micro_batch * self.seq_length // self.cp

    @property
    def replicas(self) -> int:
        """Ranks over which gradients are summed and optimizer state is divided."""
        return self.dp * self.cp

    def precision(self, linear: str) -> LinearPrecision:
        """The precision of the linear of this name."""
        return LinearPrecision() if self.table is None else self.table[linear]
