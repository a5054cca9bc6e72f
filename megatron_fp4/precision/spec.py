"""What a GEMM is: the value that says, per GEMM and per operand, in which format numbers are multiplied.

Precision is a frozen value that sits on a linear layer; each operand is called by its tensor (x, w, dy).

Not here: how an operand is quantized (operand.py), the recipes with a name (recipes.py), the GEMMs (linear_op.py).
(No `from __future__ import annotations`: omegaconf reads the annotations.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Self

from megatron_fp4.precision.operand import AmaxScope, Operand

TENSOR_DIMS = {"x": ("T", "K"), "w": ("N", "K"), "dy": ("T", "N")}
"""Tokens, output features and input features: the shape of each tensor of a linear layer."""


class WgradOutput(Enum):
    """Type of the weight gradient as the GEMM writes it; it is accumulated in FP32 in either case."""

    fp32 = "fp32"
    compute = "compute"  # rounded once to the compute dtype: cheaper on CPUs, not what the paper does


def operands_text(tensors: tuple[str, str], operands: tuple[Operand, Operand]) -> str:
    """`dy nvfp4 sr, w nvfp4 16x16`."""
    return ", ".join(f"{tensor} {operand}" for tensor, operand in zip(tensors, operands, strict=True))


@dataclass(frozen=True)
class Gemm:
    """What Fprop, Dgrad and Wgrad share: two operands, each called by its tensor, and the padding of both.

    tensors: names of the two operands, in the order of the product. contracted: the dimension that they share, of
    `TENSOR_DIMS`.
    Raises ValueError if only one operand is transformed, or differently, and for padding or transforms where nothing is
    quantized.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, str]]
    contracted: ClassVar[str]
    pad: bool = field(default=False, kw_only=True)
    """Write zeros behind the tensors where the tiles do not divide their shapes."""

    def __post_init__(self) -> None:
        if self.pad and not self.quantized:
            raise ValueError("pad: true on a GEMM in bf16, which takes any shape, would have no effect; leave it out")
        if AmaxScope.expert_call in [operand.amax_scope for operand in self.operands]:
            _check_expert_call(self)
        if AmaxScope.static in [operand.amax_scope for operand in self.operands]:
            _check_static(self)
        first, second = self.operands
        if (first.rht_size, first.rht_signs) != (second.rht_size, second.rht_signs):
            raise ValueError(
                f"{self}: the Hadamard transforms of the two operands must be equal, in size and signs, to cancel in"
                f" the product"
            )
        for tensor, operand in zip(self.tensors, self.operands, strict=True):
            if operand.center and tensor != "x":
                raise ValueError(
                    f"{self}: center of {tensor}, but the mean over tokens is that of activations; leave it out"
                )
        if first.rht_size and not self.quantized:
            raise ValueError(f"{self}: nothing is quantized, so rht_size would have no effect; leave it out")

    def __str__(self) -> str:
        """`dgrad dy nvfp4 sr, w nvfp4 16x16`."""
        return f"{self.name} {operands_text(self.tensors, self.operands)}{' padded' if self.pad else ''}"

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """The two operands, for code that does not care which tensor is which."""
        first, second = (getattr(self, tensor) for tensor in self.tensors)
        return first, second

    @property
    def quantized(self) -> bool:
        return any(operand.quantized for operand in self.operands)

    @property
    def joins_segments(self) -> bool:
        """Whether all rows of an expert are one tensor, whose amax is one: `amax_scope=expert_call`."""
        return any(operand.amax_scope is AmaxScope.expert_call for operand in self.operands)

    def multiples(self) -> dict[str, int]:
        """What T, N and K must be multiples of for the tiles and transforms of both operands; all are powers of two."""
        multiples = {"T": 1, "N": 1, "K": 1}
        for tensor, operand in zip(self.tensors, self.operands, strict=True):
            rows = operand.tile[0] if operand.tile else 1
            for dim in TENSOR_DIMS[tensor]:
                multiple = operand.contraction_multiple if dim == self.contracted else rows
                multiples[dim] = max(multiples[dim], multiple)
        return multiples

    def with_operands(self, change: Callable[[Operand], Operand]) -> Self:
        """The same GEMM with `change` applied to both operands."""
        changed: dict[str, Any] = {
            tensor: change(operand) for tensor, operand in zip(self.tensors, self.operands, strict=True)
        }
        return replace(self, **changed)


def _check_expert_call(gemm: Gemm) -> None:
    """Raises ValueError where a scale over all rows of an expert has no meaning."""
    scopes = {name: operand.amax_scope for name, operand in zip(gemm.tensors, gemm.operands, strict=True)}
    if scopes.get("w") is AmaxScope.expert_call:
        raise ValueError(
            f"{gemm}: amax_scope=expert_call of a weight, whose scale is one per expert already; leave it out there"
        )
    if gemm.name == "wgrad" and len(set(scopes.values())) > 1 and all(one.quantized for one in gemm.operands):
        raise ValueError(f"{gemm}: amax_scope=expert_call joins the segments of both operands; give it to both")


def _check_static(gemm: Gemm) -> None:
    """Raises ValueError where a scale that is measured once has no meaning."""
    for tensor, operand in zip(gemm.tensors, gemm.operands, strict=True):
        if operand.amax_scope is not AmaxScope.static:
            continue
        if (gemm.name, tensor) != ("fprop", "x"):
            raise ValueError(
                f"{gemm}: amax_scope=static of {tensor}, but it is measured of Fprop's x alone; set tensor here"
            )
        if operand.rht_size or operand.center:
            raise ValueError(
                f"{gemm}: amax_scope=static with center or a Hadamard transform, but it is measured of x before these;"
                " set tensor"
            )


@dataclass(frozen=True)
class Fprop(Gemm):
    """y = x wᵀ, from x [T, K] and w [N, K], contracted over K."""

    name: ClassVar[str] = "fprop"
    tensors: ClassVar[tuple[str, str]] = ("x", "w")
    contracted: ClassVar[str] = "K"
    x: Operand = field(default_factory=Operand)
    w: Operand = field(default_factory=Operand)


@dataclass(frozen=True)
class Dgrad(Gemm):
    """dx = dy w, from dy [T, N] and w, transposed to [K, N], contracted over N."""

    name: ClassVar[str] = "dgrad"
    tensors: ClassVar[tuple[str, str]] = ("dy", "w")
    contracted: ClassVar[str] = "N"
    dy: Operand = field(default_factory=Operand)
    w: Operand = field(default_factory=Operand)


@dataclass(frozen=True)
class Wgrad(Gemm):
    """dw = dyᵀ x, from dy, transposed to [N, T], and x, transposed to [K, T], contracted over T."""

    name: ClassVar[str] = "wgrad"
    tensors: ClassVar[tuple[str, str]] = ("dy", "x")
    contracted: ClassVar[str] = "T"
    dy: Operand = field(default_factory=Operand)
    x: Operand = field(default_factory=Operand)


@dataclass(frozen=True)
class LinearPrecision:
    """Precision of the three GEMMs of a linear layer; the default is high precision in all three."""

    fprop: Fprop = field(default_factory=Fprop)
    dgrad: Dgrad = field(default_factory=Dgrad)
    wgrad: Wgrad = field(default_factory=Wgrad)
    wgrad_output: WgradOutput = WgradOutput.fp32
    """Type of the weight gradient as the GEMM writes it; it is accumulated in FP32 in either case."""

    def __str__(self) -> str:
        """The three GEMMs in words, `bf16` for the default; two values that differ never print alike."""
        gemms = [str(gemm) for gemm in self.gemms] if self.quantized else ["bf16"]
        output = [] if self.wgrad_output is WgradOutput.fp32 else [f"wgrad_output={self.wgrad_output.name}"]
        return " | ".join(gemms + output)

    @property
    def gemms(self) -> tuple[Fprop, Dgrad, Wgrad]:
        return self.fprop, self.dgrad, self.wgrad

    @property
    def quantized(self) -> bool:
        return any(gemm.quantized for gemm in self.gemms)

    @property
    def centred(self) -> bool:
        """Whether an operand is quantized without its mean."""
        return any(operand.center for gemm in self.gemms for operand in gemm.operands)

    def with_operands(self, change: Callable[[Operand], Operand]) -> Self:
        """The same GEMMs with `change` applied to each of the six operands."""
        fprop, dgrad, wgrad = self.gemms
        return replace(
            self,
            fprop=fprop.with_operands(change),
            dgrad=dgrad.with_operands(change),
            wgrad=wgrad.with_operands(change),
        )

    @property
    def padding(self) -> tuple[int, int, int]:
        """Multiples to which GEMMs with `pad` extend T, N and K; 1: as they are."""
        padded = [gemm.multiples() for gemm in self.gemms if gemm.pad]
        t, n, k = (max([1, *(multiples[dim] for multiples in padded)]) for dim in "TNK")
        return t, n, k
