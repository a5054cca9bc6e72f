"""The precision section of a run's configuration: recipes by name, where they apply, switches in time.

Two questions, two groups of options: how a GEMM computes (configs/precision/recipe: `recipes`, `use`) and where
(configs/precision/rules: `keep_bf16`, `rules`). Not here: what that comes to, linear by linear (plan.py).
(No `from __future__ import annotations`: omegaconf reads the annotations.)
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

import torch

from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.settings import Bound, Count, Size, check_bounds

GEMMS = ("fprop", "dgrad", "wgrad")
HIGH = "bf16"
"""Name of the built-in recipe in which nothing is quantized."""
SAME = "same"
"""What names no recipe of its own: an evaluation that computes as training does, a rule that takes that of `use`."""


class BackendName(Enum):
    """Who quantizes operands and multiplies them."""

    auto = "auto"  # the best of the others that passes its self-test on every GPU of the run
    emulated = "emulated"  # the same operands on any device, multiplied exactly in BF16
    reference = "reference"  # the definition, slow
    transformer_engine = "transformer_engine"  # NVIDIA's kernels on the tensor cores of Blackwell
    triton = "triton"  # our own kernels: the emulated operands as codes, on any GPU of NVIDIA's since Ampere
    native_fp8 = "native_fp8"  # emulated, but fp8_block GEMMs on the FP8 tensor cores of a Hopper GPU


class ComputeDtype(Enum):
    """Type of weights, activations and of every GEMM that is not quantized.

    fp32 is the proof mode: values in FP32, sums in FP64 rounded once, so that no order of summation, and therefore no
    parallel layout, shows in the numbers (layers.layer_context.widen).
    """

    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self is ComputeDtype.bf16 else torch.float32

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type in which gradients are added up."""
        return torch.float32 if self is ComputeDtype.bf16 else torch.float64


@dataclass(frozen=True)
class KeepBf16:
    """What stays in BF16 before any rule is asked: the head and whole blocks. Holds where use names a recipe."""

    head: bool = True
    """Keep the output layer, which belongs to no block."""
    first: Count = 0
    """Blocks at the start of the model."""
    last: Count = 0
    """Blocks at the end of the model."""

    def __post_init__(self) -> None:
        check_bounds(self, "precision.keep_bf16")


def regular_expression(match: str) -> str | None:
    """What stands between the slashes of a rule's match; None for a glob."""
    return match[1:-1] if len(match) > 1 and match[0] == match[-1] == "/" else None


def check_pattern(match: str, key: str) -> None:
    """Raise ValueError for a broken regular expression between slashes."""
    try:
        re.compile(regular_expression(match) or "")
    except re.error as error:
        raise ValueError(f"{key}: match = {match!r} is no regular expression: {error}") from None


@dataclass(frozen=True)
class Rule:
    """Which linears use which recipe; the first rule that matches a linear decides."""

    match: str = "*"
    """Glob on the logical name of a linear, such as *.mlp.*, or a regular expression between slashes."""
    blocks: str = ""
    """Blocks of the model as a Python slice (-8:, 2:6), first:2 or last:8; empty = all linears, the head included."""
    use: str = HIGH
    """Recipe of the three GEMMs; bf16 quantizes nothing, same = that of precision.use."""
    fprop: str = ""
    """Recipe of Fprop alone; empty = that of use."""
    dgrad: str = ""
    """Recipe of Dgrad alone; empty = that of use."""
    wgrad: str = ""
    """Recipe of Wgrad alone; empty = that of use."""

    def __post_init__(self) -> None:
        check_pattern(self.match, "precision.rules")


@dataclass(frozen=True)
class Switch:
    """Another recipe from a point of the run on, which exactly one of at_tokens, at_fraction and at_decay names."""

    at_tokens: Annotated[float, Bound(least=0)] = 0.0
    """Consumed tokens from which the switch holds; 0 = another setting says it."""
    at_fraction: Annotated[float, Bound(least=0, most=1)] = 0.0
    """Part of the run's tokens after which the switch holds; 0 = another setting says it."""
    at_decay: bool = False
    """Switch where the decay of the learning rate begins."""
    match: str = "*"
    """Linears that switch: a glob on the logical name, or a regular expression between slashes."""
    gemms: list[str] = field(default_factory=lambda: list(GEMMS))
    """GEMMs that switch, of fprop, dgrad and wgrad."""
    use: str = HIGH
    """Recipe that they switch to; bf16 quantizes nothing."""

    def __post_init__(self) -> None:
        check_bounds(self, "precision.switch[]")
        check_pattern(self.match, "precision.switch")
        if (self.at_tokens > 0) + (self.at_fraction > 0) + self.at_decay != 1:
            raise ValueError(
                "precision.switch: set exactly one of at_tokens, at_fraction, at_decay; got"
                f" at_tokens={self.at_tokens:g}, at_fraction={self.at_fraction:g}, at_decay={self.at_decay}"
            )
        unknown = sorted(set(self.gemms) - set(GEMMS))
        if unknown or not self.gemms:
            raise ValueError(f"precision.switch: gemms = {list(self.gemms)}; choose from {', '.join(GEMMS)}")

    def starts_at(self, total_tokens: int, decay_start: int) -> int:
        """Consumed tokens from which the switch holds."""
        if self.at_decay:
            return decay_start
        return int(self.at_tokens) if self.at_tokens else int(self.at_fraction * total_tokens)


@dataclass(frozen=True)
class PrecisionConfig:
    """In which format each GEMM of each linear multiplies, from when on, and who computes it."""

    backend: BackendName = BackendName.emulated
    """Who quantizes operands and multiplies them."""
    compute_dtype: ComputeDtype = ComputeDtype.bf16
    """Type of weights, activations and of every GEMM that is not quantized."""
    compile: bool = True
    """Compile the emulated quantizers, where this machine has a compiler for them."""
    recipes: dict[str, LinearPrecision] = field(default_factory=dict)
    """Recipes by name, for use, rules and switches; bf16, in which nothing is quantized, is built in."""
    use: str = ""
    """Recipe of the linears that neither keep_bf16 nor a rule names; empty = rules name all, keep_bf16 is unused."""
    keep_bf16: KeepBf16 = field(default_factory=KeepBf16)
    rules: list[Rule] = field(default_factory=list)
    """Exceptions from use, behind keep_bf16; the first that matches a linear decides."""
    switch: list[Switch] = field(default_factory=list)
    """Changes of precision in the course of the run, such as BF16 for the end."""
    calibration_batches: Size = 8
    """Global batches of the run that are read before its first step where inputs have a static scale
    (amax_scope=static), which is then that of the largest magnitude in them."""
    evaluation: str = HIGH
    """Recipe of every GEMM in an evaluation; same = as in training."""

    def __post_init__(self) -> None:
        check_bounds(self, "precision")
        for name, meaning in {
            HIGH: "is built in (nothing quantized)",
            SAME: "is what precision.evaluation and rules say",
        }.items():
            if name in self.recipes:
                raise ValueError(f"precision.recipes.{name} {meaning}; choose another name")
        if not self.use and any(SAME in (rule.use, rule.fprop, rule.dgrad, rule.wgrad) for rule in self.rules):
            raise ValueError("precision.rules: `same` is the recipe of precision.use, which is not set; set it")
        if not self.use and self.keep_bf16 != KeepBf16():
            raise ValueError(
                "precision.keep_bf16 would have no effect: without precision.use the rules name every linear; set"
                " precision.use to the recipe of the others"
            )

    def recipe(self, name: str) -> LinearPrecision:
        """The recipe `name`. Raises ValueError with the known names."""
        if name == HIGH:
            return LinearPrecision()
        if name not in self.recipes:
            raise ValueError(
                f"precision recipe {name!r} does not exist; known: {', '.join([HIGH, *self.recipes])}. precision=NAME"
                " decides over an experiment's precision.use, and a rule with `use: same` follows it"
            )
        return self.recipes[name]

    def name_in(self, rule: Rule, gemm: str) -> str:
        """Name of the recipe in which `rule` computes `gemm`."""
        name: str = getattr(rule, gemm) or rule.use
        return self.use if name == SAME else name
