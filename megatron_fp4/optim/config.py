"""What a user can set about the optimizer and its schedule, as values.

Members of enums are in lower case because omegaconf matches them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated

from megatron_fp4.comm.config import Overlap
from megatron_fp4.optim.kept.config import MasterFormat, MomentsConfig
from megatron_fp4.optim.muon.config import MuonConfig
from megatron_fp4.settings import FP32_LEAST, FP32_MOST, Bound, Count, check_bounds

FP32_PER_MIB = 2**18


class Schedule(Enum):
    """Shape of the learning rate after the warm-up."""

    wsd = "wsd"  # stable, then a decay over the last `decay_fraction` of the tokens
    cosine = "cosine"  # half a cosine from the end of the warm-up to the end of training
    power = "power"  # falls with a power of the tokens, then the last phase of wsd (arXiv 2408.13359)
    constant = "constant"

    @property
    def has_last_phase(self) -> bool:
        """Whether it ends with a decay over `decay_fraction`."""
        return self in (Schedule.wsd, Schedule.power)


class DecayStyle(Enum):
    """Shape of the last phase of `wsd` and `power`; x is the consumed part of the phase, 0 to 1."""

    linear = "linear"  # 1 - x
    cosine = "cosine"  # (1 + cos(pi x)) / 2
    minus_sqrt = "minus_sqrt"  # 1 - sqrt(x)
    exponential = "exponential"  # 2 * 0.5^x - 1, which reaches 0 at x = 1


class Algorithm(Enum):
    """Who updates the weights."""

    adamw = "adamw"  # AdamW, all of them
    muon = "muon"  # Muon the matrices inside the blocks, AdamW embeddings, head, norms, convolutions and scalars


class MainGradFormat(Enum):
    """What gradients are summed in over microbatches, and sent in; the sum over ranks is FP32 either way."""

    fp32 = "fp32"
    bf16 = "bf16"  # matrices whose weights are BF16 and which several ranks share; all else stays FP32


class Impl(Enum):
    """Who computes the AdamW update."""

    torch = "torch"
    apex = "apex"
    te = "te"


@dataclass(frozen=True)
class QkClipConfig:
    """Queries and keys of attention heads are scaled down after a step in which a logit of theirs was too large."""

    threshold: Annotated[float, Bound(least=0)] = 0.0
    """Largest logit, as the softmax sees it, that a head may have; 0 = off. Kimi K2 has 100."""
    alpha: Annotated[float, Bound(least=0, most=1)] = 0.5
    """Part of the correction, as a power, that queries take; keys take the rest."""

    def __post_init__(self) -> None:
        check_bounds(self, "optim.qk_clip")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its learning rate as a function of consumed tokens, clipping, and how gradients travel."""

    algorithm: Algorithm = Algorithm.adamw
    """Who updates the weights."""
    lr: Annotated[float, Bound(above=0, most=FP32_MOST)] = 3e-4
    """Peak learning rate, which the warm-up ends at."""
    min_lr: Annotated[float, Bound(least=0)] = 0.0
    """Learning rate at the last token; at most lr, and without effect in a constant schedule."""
    schedule: Schedule = Schedule.wsd
    """Shape of the learning rate after the warm-up."""
    warmup_tokens: Count = 0
    """Consumed tokens over which the learning rate rises from 0 to lr, in a straight line."""
    decay_fraction: Annotated[float, Bound(least=0, most=1)] = 0.2
    """Part of the run's tokens, the last one, over which schedules wsd and power decay."""
    decay_style: DecayStyle = DecayStyle.linear
    """Shape of the decay of schedules wsd and power."""
    power_exponent: Annotated[float, Bound(above=0, most=1)] = 0.51
    """How fast schedule power falls: lr (tokens / power_from_tokens)^-power_exponent."""
    power_from_tokens: Count = 0
    """Consumed tokens from which on schedule power falls; 0 = the end of the warm-up."""
    beta1: Annotated[float, Bound(least=0, below=1)] = 0.9
    """Decay of the mean of the gradients, per step."""
    beta2: Annotated[float, Bound(least=0, below=1)] = 0.95
    """Decay of the mean of the squared gradients, per step."""
    eps: Annotated[float, Bound(least=FP32_LEAST, most=FP32_MOST)] = 1e-8
    """What is added to the root of the mean square, so that nothing is divided by 0."""
    weight_decay: Annotated[float, Bound(least=0, most=FP32_MOST)] = 0.1
    """Part of a weight that a step takes away, times the learning rate; norms, biases and state-space scalars have
    none; 0 = off."""
    cautious_decay: bool = False
    """Take weight decay only from weights that the update does not move away from 0 (arXiv 2510.12402)."""
    clip_norm: Annotated[float, Bound(least=0)] = 1.0
    """Largest norm of all gradients together; a larger one is scaled down to it; 0 = off."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Muon, where it is the algorithm."""
    qk_clip: QkClipConfig = field(default_factory=QkClipConfig)
    """A limit of attention logits, whatever the algorithm."""
    main_grads: MainGradFormat = MainGradFormat.fp32
    """What gradients of BF16 matrices are summed in over the microbatches of a rank, and sent in."""
    master: MasterFormat = MasterFormat.fp32
    """How FP32 master weights are kept where weights are BF16; the same numbers either way."""
    moments: MomentsConfig = field(default_factory=MomentsConfig)
    """How moments are kept between two steps."""
    compile: bool = True
    """Compile the conversions of moments that are not kept in FP32, where this machine has a compiler for them."""
    impl: Impl = Impl.torch
    """Who computes the update of AdamW."""
    bucket_mib: Annotated[float, Bound(above=0)] = 128.0
    """FP32 gradients that are reduced in one collective, in MiB; more where dp is in the hundreds, so that a rank's
    part of a bucket stays above 1 MiB."""
    overlap_reduce: Overlap = Overlap.auto
    """Reduce full buckets of gradients while the backward pass of the last microbatch goes on."""
    overlap_gather: Overlap = Overlap.auto
    """Gather updated parameters while the next forward pass begins."""

    @property
    def bucket_numel(self) -> int:
        """Elements from which on a bucket is full."""
        return max(1, int(self.bucket_mib * FP32_PER_MIB))

    @property
    def least_gradient_bytes(self) -> int:
        """Bytes of an element that is summed over ranks."""
        return 4 if self.main_grads is MainGradFormat.fp32 else 2

    @property
    def power_from(self) -> int:
        """Consumed tokens at which schedule power leaves `lr`."""
        return self.power_from_tokens or self.warmup_tokens

    @property
    def keeps_compact(self) -> bool:
        """Whether some state is kept in fewer bytes than FP32."""
        return self.master is not MasterFormat.fp32 or self.moments != MomentsConfig()

    def with_fp32_moments(self) -> OptimConfig:
        """The same optimizer, whose moments are not rounded."""
        return replace(self, moments=MomentsConfig())

    def adamw_lr(self, lr: float) -> float:
        """The rate of what AdamW updates where the schedule says `lr`."""
        own = self.algorithm is Algorithm.muon and self.muon.adamw_lr
        return lr * (self.muon.adamw_lr / self.lr) if own else lr

    def __post_init__(self) -> None:
        check_bounds(self, "optim")
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr = {self.min_lr}, must not be above optim.lr = {self.lr}")
        if self.schedule is Schedule.power and not self.power_from:
            raise ValueError(
                "optim.schedule=power falls from optim.power_from_tokens or the end of the warm-up on, and both are 0;"
                " set optim.power_from_tokens or optim.warmup_tokens"
            )
        if self.schedule is Schedule.power and 0 < self.power_from_tokens < self.warmup_tokens:
            raise ValueError(
                f"optim.power_from_tokens = {self.power_from_tokens} is before the end of the warm-up"
                f" (optim.warmup_tokens = {self.warmup_tokens}), where the rate still rises; set it to"
                f" {self.warmup_tokens} or more, or to 0 for the end of the warm-up"
            )
        if self.schedule is Schedule.constant and self.min_lr:
            raise ValueError(
                f"optim.min_lr = {self.min_lr} has no effect with optim.schedule=constant; set optim.min_lr=0, or"
                " choose schedule wsd or cosine"
            )
