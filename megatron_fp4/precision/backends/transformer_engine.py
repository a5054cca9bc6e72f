"""The Transformer Engine backend: FP4 and FP8 tensor cores, through TE's quantizers and its one GEMM function.

TE as functions, not modules: a quantizer makes the copies of a tensor, `general_gemm` multiplies two of them. A
`TeOperand` holds the plain tensors of one copy and what is needed to make TE's storage object of them again; so Wgrad
keeps 4-bit codes, not BF16, and nothing of TE's module state (recipe contexts, cached workspaces: traps 1, 2, 5, 11, 12
of docs/transformer_engine.md) exists here. Stochastic rounding draws from CUDA's default generator (trap 7): it is
seeded once per step, so a resumed run draws the same bits, but another layout draws others.

Not here: what TE cannot do (`te.refusals`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics.random import key_of
from megatron_fp4.precision.backends.finite import NonFiniteWatch, check_finite
from megatron_fp4.precision.backends.product import scaled_matmul
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin, QuantizedOperand, check_shape, copies_of
from megatron_fp4.precision.config import ComputeDtype, PrecisionConfig
from megatron_fp4.precision.operand import AmaxScope, Format, Operand
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.te.api import load_api
from megatron_fp4.precision.te.quantizers import make_quantizer, one_quantizer
from megatron_fp4.precision.te.refusals import LEAST_ROWS, check_capability, check_recipe, check_te_shape


@dataclass(frozen=True, eq=False)
class _Exact(QuantizedOperand):
    """tensors = (x,): in high precision."""

    along: int


@dataclass(frozen=True, eq=False)
class TeOperand(QuantizedOperand):
    """tensors: those of one direction, in the order of `names`; storage(**names and tensors, **rest) is TE's object."""

    along: int
    storage: type
    names: tuple[str, ...]
    rest: Mapping[str, Any]

    def as_te(self) -> Any:
        """TE's own object."""
        return self.storage(**dict(zip(self.names, self.tensors, strict=True)), **self.rest)

    def stored(self) -> dict[str, Tensor]:
        """The tensors under `data`, `scale_inv` and (nvfp4) `amax`: for checks and reports."""
        short = [name.replace("rowwise", "").replace("columnwise", "").strip("_") for name in self.names]
        return dict(zip(short, self.tensors, strict=True))


class TransformerEngineBackend:
    """See `Backend`. Refuses at construction every recipe that the installed version cannot compute as it says.

    Experts are GEMMs one by one, with the segments of `grouped`, not one grouped GEMM.
    """

    least_rows = LEAST_ROWS

    def __init__(self, config: PrecisionConfig, watch: NonFiniteWatch | None = None) -> None:
        self.api = load_api()
        if config.compute_dtype is not ComputeDtype.bf16:
            raise ValueError(
                f"precision.compute_dtype = {config.compute_dtype.name} with precision.backend=transformer_engine,"
                f" whose quantizers are used with BF16 only; use bf16, or precision.backend=emulated"
            )
        for name, recipe in config.recipes.items():
            check_recipe(name, recipe, self.api.version, self.api.features)
        if torch.cuda.is_available():
            check_capability(torch.cuda.get_device_capability(), _formats(config.recipes))
        self._watch = watch
        self._quantizers: dict[tuple[Operand | None, Operand | None], Any] = {}
        self._seeded: tuple[int, int] | None = None
        for recipe in config.recipes.values():  # what a constructor refuses (no GPU) is refused before training
            for copies in copies_of(recipe).values():
                for row, column in _calls([copy for copy in copies if copy.operand.quantized]):
                    self._quantizer(row, column, Group.single())

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`. Deferred copies are made at once: as codes they are smaller than the tensor."""
        quantized = [copy for copy in copies if copy.operand.quantized]
        for copy in quantized:
            check_shape(x, origin, copy)
            check_te_shape(f"{origin.name}: operand {origin.operand} of {copy.gemm}", copy.operand, x.shape, copy.along)
            if x.dtype != torch.bfloat16:
                raise ValueError(
                    f"{origin.name}: operand {origin.operand} is {x.dtype}, but Transformer Engine's quantizers are"
                    f" used with BF16 only; set precision.compute_dtype=bf16, or precision.backend=emulated"
                )
        operands: dict[Copy, QuantizedOperand] = {}
        for row, column in _calls(quantized):
            if any(copy is not None and copy.operand.stochastic for copy in (row, column)):
                self._seed(origin, x.device)
            stored = self._quantizer(row, column, origin.group)(x)
            operands.update({copy: _take(stored, copy) for copy in (row, column) if copy is not None})
        if quantized:
            self._check_finite(x, origin)  # after TE's collectives: no rank waits for one that has raised
        return tuple(operands[copy] if copy in operands else _Exact((x,), copy.along) for copy in copies)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`. The accumulation into a tensor of the output's type happens inside the GEMM."""
        if isinstance(a, _Exact) and isinstance(b, _Exact):
            left, right = _oriented(a), _oriented(b)
            return scaled_matmul(left, right, out_dtype=out_dtype, accumulate_into=accumulate_into)
        both = "one operand quantized and the other not: check_recipe refuses it"
        assert isinstance(a, TeOperand), both
        assert isinstance(b, TeOperand), both
        # TE computes B @ A.T of its arguments; N: the operand is contracted along the rows of its tensor
        layout = ("T" if b.along == 1 else "N") + ("N" if a.along == 1 else "T")
        settings: dict[str, Any] = {
            "out_dtype": out_dtype,
            "layout": layout,
            "grad": layout != "TN",
            "use_split_accumulator": True,
        }
        fused = accumulate_into is not None and accumulate_into.dtype == out_dtype
        if fused:
            settings.update(out=accumulate_into, accumulate=True)
        out: Tensor = self.api.symbols["general_gemm"](b.as_te(), a.as_te(), **settings)[0]
        if accumulate_into is None:
            return out
        return accumulate_into if fused else accumulate_into.add_(out)

    def _quantizer(self, row: Copy | None, column: Copy | None, group: Group) -> Any:
        """The quantizer for these copies, made once."""
        operands = (row.operand if row else None, column.operand if column else None)
        if operands not in self._quantizers:
            try:
                self._quantizers[operands] = make_quantizer(self.api, *operands)
            except (RuntimeError, AssertionError) as error:  # torch's, from torch.cuda.current_device()
                if torch.cuda.is_available():
                    raise
                raise ValueError(
                    f"Transformer Engine {self.api.version} needs a CUDA GPU, and torch sees none"
                    f" ({type(error).__name__}: {error}); use precision.backend=emulated on this machine"
                ) from error
            self._quantizers[operands].internal = True  # plain storage, not tensor subclasses, as te.Linear asks for
        quantizer = self._quantizers[operands]
        if any(operand and operand.format is Format.nvfp4 for operand in operands):
            # before each use, as te.Linear does: 2.20 takes the group off a result's quantizer
            shared = any(operand and operand.amax_scope is AmaxScope.tensor for operand in operands)
            quantizer.amax_reduction_group = group.process_group if shared else None
            quantizer.with_amax_reduction = quantizer.amax_reduction_group is not None
        return quantizer

    def _seed(self, origin: OperandOrigin, device: torch.device) -> None:
        """Once per step: the default generator is the one that TE's stochastic rounding draws from (trap 7)."""
        if device.type == "cuda" and self._seeded != (origin.seed, origin.step):
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(
                key_of(origin.seed, origin.step, "te_rounding", origin.rank) & (2**63 - 1)
            )
            self._seeded = (origin.seed, origin.step)

    def _check_finite(self, x: Tensor, origin: OperandOrigin) -> None:
        """TE's own amax ignores NaN, so it is measured here."""
        check_finite([torch.stack(torch.aminmax(x)).abs().amax().float()], origin, self._watch)


def _formats(recipes: Mapping[str, LinearPrecision]) -> set[Format]:
    gemms = [gemm for recipe in recipes.values() for gemm in recipe.gemms]
    return {operand.format for gemm in gemms for operand in gemm.operands if operand.quantized}


def _calls(copies: Sequence[Copy]) -> list[tuple[Copy | None, Copy | None]]:
    """(row-wise, column-wise) copies that one quantizer call makes together."""
    rows = [copy for copy in copies if copy.along == 1]
    columns = [copy for copy in copies if copy.along == 0]
    if len(rows) == len(columns) == 1 and one_quantizer(rows[0].operand, columns[0].operand):
        return [(rows[0], columns[0])]
    return [(copy, None) for copy in rows] + [(None, copy) for copy in columns]


def _take(stored: Any, copy: Copy) -> TeOperand:
    """One direction of a TE storage object, without the other's memory."""
    metadata = stored.get_metadata()
    direction, other = ("columnwise", "rowwise") if copy.along == 0 else ("rowwise", "columnwise")
    # "row_scaled_nvfp4" and the like are settings, not tensors
    names = tuple(name for name, value in metadata.items() if direction in name and isinstance(value, Tensor))
    if f"{direction}_data" not in names:
        raise RuntimeError(
            f"Transformer Engine made no {direction} copy (it made {', '.join(metadata)}); please report this"
        )
    rest = {name: None if other in name else value for name, value in metadata.items() if name not in names}
    return TeOperand(tuple(metadata[name] for name in names), copy.along, type(stored), names, rest)


def _oriented(operand: _Exact) -> Tensor:
    (x,) = operand.tensors
    return x if operand.along == 1 else x.T
