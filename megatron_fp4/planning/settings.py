"""What decides the memory and the traffic of a rank besides the model, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.block import LinearInfo
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.optim.buckets import sums_in_bf16
from megatron_fp4.optim.config import MainGradFormat, OptimConfig
from megatron_fp4.pipeline.schedules import schedule_rule
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.sections import DistillationConfig


@dataclass(frozen=True)
class RoutedRows:
    """rows: copies of tokens that a rank sends to experts and, on average, receives. experts: on a rank. segments: of
    each expert's rows, every one extended to whole tiles where an operand is quantized (precision/grouped).
    """

    rows: int
    experts: int
    segments: float

    def padded(self, tile: int) -> float:
        """Rows with padding, if the last tile of a segment is filled by chance."""
        return self.rows + self.experts * self.segments * (tile - 1) / 2


@dataclass(frozen=True)
class RankSettings:
    """Sizes of the layout and of a microbatch, and the choices that change what is kept.

    dtype: of weights, activations. table: precision of every linear; None for `dtype` everywhere. on_gpu: False for
    the kernels that torch has on a CPU, which keep more. defers_wgrad: the pipeline's schedule computes weight
    gradients later. num_microbatches: per step. distillation: None where there is no
    teacher.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
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
    distillation: DistillationConfig | None = None

    @staticmethod
    def of(checked: CheckedConfig, table: PrecisionTable) -> RankSettings:
        """The settings of a run on GPUs, with the precision of one of its phases."""
        config = checked.config
        return RankSettings(
            tp=config.parallel.tp,
            cp=config.parallel.cp,
            dp=checked.dp,
            ep=config.parallel.ep,
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
            distillation=config.train.distillation if config.train.distillation.teacher else None,
        )

    @property
    def tokens(self) -> int:
        """T, the tokens of a microbatch on a context-parallel rank."""
        return self.micro_batch * self.seq_length // self.cp

    @property
    def replicas(self) -> int:
        """Ranks over which gradients are summed and optimizer state is divided."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks over which gradients of routed experts are summed and their optimizer state is divided."""
        return self.replicas * self.tp // self.ep

    def sums_in_bf16(self, *, dims: int, whole: bool = False, expert: bool = False) -> bool:
        """Whether a rank sums the gradient of a weight of the compute dtype in BF16; see `optim.buckets`."""
        replicas = self.expert_replicas if expert else self.replicas
        return sums_in_bf16(self.optim, dtype=self.dtype, dims=dims, whole=whole, replicas=replicas)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an element of a matrix, as it is summed over the replicas."""
        return 2 if self.sums_in_bf16(dims=2) else 4

    def of_sizes(self) -> RankSettings:
        """Without what the sizes of a microbatch do not depend on; two replicas stand for any number."""
        narrow = self.sums_in_bf16(dims=2)
        optim = OptimConfig(main_grads=MainGradFormat.bf16 if narrow else MainGradFormat.fp32)
        return replace(self, dp=1 + narrow, num_microbatches=1, table=None, optim=optim)

    def routed(self, moe: MoeConfig) -> RoutedRows:
        """What comes to the routed experts of a mixture on a rank in a microbatch if every expert gets the same."""
        reach = self.ep / (self.tp * self.cp)  # data-parallel ranks whose tokens come to a rank's experts
        segments = max(1.0, reach)
        if moe.segment_tokens:
            segments = max(1.0, reach * self.micro_batch * self.seq_length / moe.segment_tokens)
        return RoutedRows(self.tokens * moe.top_k // self.tp, max(1, moe.num_experts // self.ep), segments)

    def rows(self, info: LinearInfo, moe: MoeConfig) -> float:
        """Rows of a microbatch that a linear multiplies on a rank, padding included."""
        if info.num_experts:
            gemms = self.precision(info.name).gemms
            return self.routed(moe).padded(max([1, *(gemm.multiples()["T"] for gemm in gemms if gemm.quantized)]))
        return self.tokens / self.tp if info.whole else self.tokens

    def precision(self, linear: str) -> LinearPrecision:
        """The precision of the linear of this name."""
        return LinearPrecision() if self.table is None else self.table[linear]
