"""What a user can set about the optimizer and its schedule.

One idea: values only, checked with their numbers when they are made. Enum members are in lower case because omegaconf
matches them by name. No `from __future__ import annotations` here: omegaconf reads the annotations.
"""

from dataclasses import dataclass
from enum import Enum

from megatron_fp4.comm.mesh import Overlap


class Schedule(Enum):
    """Shape of the learning rate after the warm-up."""

    wsd = "wsd"  # stable, then a decay over the last `decay_fraction` of the tokens
    cosine = "cosine"  # half a cosine from the end of the warm-up to the end of training
    constant = "constant"


class DecayStyle(Enum):
    """Shape of the last phase of `wsd`; x is the consumed part of the phase, 0 to 1."""

    linear = "linear"  # 1 - x
    cosine = "cosine"  # (1 + cos(pi x)) / 2
    minus_sqrt = "minus_sqrt"  # 1 - sqrt(x)
    exponential = "exponential"  # 2 * 0.5^x - 1, which reaches 0 at x = 1


class Impl(Enum):
    """Who computes the AdamW update."""

    torch = "torch"
    apex = "apex"
    te = "te"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate as a function of consumed tokens, clipping, and how gradients travel.

    lr: peak learning rate; min_lr: the rate at the last token. warmup_tokens: linear from 0 to `lr`.
    decay_fraction: part of all tokens that `wsd` decays over. clip_norm: maximum global gradient norm, 0 = off.
    bucket_mib: FP32 gradient bytes per collective, in MiB. Raise it when dp is in the hundreds, so that every rank's
    part of a bucket stays above about 1 MiB.
    """

    lr: float = 3e-4
    min_lr: float = 0.0
    schedule: Schedule = Schedule.wsd
    warmup_tokens: int = 0
    decay_fraction: float = 0.2
    decay_style: DecayStyle = DecayStyle.linear
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    impl: Impl = Impl.torch
    bucket_mib: float = 128.0
    overlap_reduce: Overlap = Overlap.auto
    overlap_gather: Overlap = Overlap.auto

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr = {self.lr}, must be positive")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr = {self.min_lr}, must lie between 0 and optim.lr = {self.lr}")
        if self.schedule is Schedule.constant and self.min_lr:
            raise ValueError(
                f"optim.min_lr = {self.min_lr} has no effect with optim.schedule=constant; set optim.min_lr=0, or"
                " choose schedule wsd or cosine"
            )
        if self.warmup_tokens < 0:
            raise ValueError(f"optim.warmup_tokens = {self.warmup_tokens}, must not be negative")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"optim.decay_fraction = {self.decay_fraction}, must lie between 0 and 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} = {getattr(self, name)}, must be at least 0 and below 1")
        if not self.eps > 0:
            raise ValueError(f"optim.eps = {self.eps}, must be positive")
        for name in ("weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} = {getattr(self, name)}, must not be negative (0 turns it off)")
        if not self.bucket_mib > 0:
            raise ValueError(f"optim.bucket_mib = {self.bucket_mib}, must be positive")
