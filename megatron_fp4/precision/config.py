"""The precision section of a run's configuration: recipes by name, rules that place them, switches in time.

Values only; `plan.py` resolves them. (No `from __future__ import annotations`: omegaconf reads the annotations.)
"""

from dataclasses import dataclass, field
from enum import Enum

import torch

from megatron_fp4.precision.spec import LinearPrecision

GEMMS = ("fprop", "dgrad", "wgrad")
HIGH = "bf16"
"""Name of the built-in recipe in which nothing is quantized."""


class BackendName(Enum):
    emulated = "emulated"
    reference = "reference"
    transformer_engine = "transformer_engine"
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


@dataclass(frozen=True)
class Rule:
    """`match`: glob on the logical name of a linear (`*.mlp.*`), or a regular expression between slashes
    (`/attention\\.(qkv|out)/`). `blocks`: "" for all linears, or blocks as a Python slice ("-8:", "2:6"), "first:2" or
    "last:8". `use`: recipe for the three GEMMs; `fprop`, `dgrad`, `wgrad` name another one for that GEMM alone.
    """

    match: str = "*"
    blocks: str = ""
    use: str = HIGH
    fprop: str = ""
    dgrad: str = ""
    wgrad: str = ""


@dataclass(frozen=True)
class Switch:
    """From a point of the run on, let `gemms` of the linears that `match` use the recipe `use`.

    Exactly one of: `at_tokens` (consumed tokens), `at_fraction` (of all tokens), `at_decay` (start of the learning rate
    decay).
    """

    at_tokens: float = 0.0
    at_fraction: float = 0.0
    at_decay: bool = False
    match: str = "*"
    gemms: list[str] = field(default_factory=lambda: list(GEMMS))
    use: str = HIGH

    def __post_init__(self) -> None:
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
    """recipes: by name; `bf16` is built in. evaluation: a recipe for every GEMM of an evaluation, or "same"."""

    backend: BackendName = BackendName.emulated
    compute_dtype: ComputeDtype = ComputeDtype.bf16
    compile: bool = True
    recipes: dict[str, LinearPrecision] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=lambda: [Rule()])
    switch: list[Switch] = field(default_factory=list)
    evaluation: str = HIGH

    def __post_init__(self) -> None:
        if HIGH in self.recipes:
            raise ValueError(f"precision.recipes.{HIGH} is built in (nothing quantized); choose another name")

    def recipe(self, name: str) -> LinearPrecision:
        """The recipe `name`. Raises ValueError with the known names."""
        if name == HIGH:
            return LinearPrecision()
        if name not in self.recipes:
            raise ValueError(f"precision recipe {name!r} does not exist; known: {', '.join([HIGH, *self.recipes])}")
        return self.recipes[name]
