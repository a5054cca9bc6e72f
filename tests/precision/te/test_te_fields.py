"""Every field of a precision recipe reaches Transformer Engine or is refused: none is silently without effect.

For each field there are pairs of values; in each GEMM and operand, either what TE is asked for differs between the
two, or the second is refused. A new field fails here until it has its pairs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision import (
    AmaxScope,
    Dgrad,
    Format,
    FourOverSix,
    Fprop,
    LinearPrecision,
    Operand,
    Rounding,
    ScaleOrder,
    Sharding,
    Signs,
    StepClock,
    WeightCache,
    Wgrad,
    WgradOutput,
    nvfp4_paper,
    quantized_linear,
    te_recipe,
)
from megatron_fp4.precision.backends import Copy
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.config import GEMMS, ComputeDtype, PrecisionConfig, Rule
from megatron_fp4.precision.operand import AmaxRounding
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.te.quantizers import TENSORS, directions
from tests.helpers.parity import MODEL
from tests.precision.te import te_double

FP4 = Operand(Format.nvfp4, amax_scope=AmaxScope.shard)
RHT = replace(FP4, rht_size=16)
SR = replace(FP4, rounding=Rounding.sr)
SIX = replace(FP4, four_over_six=FourOverSix.mae)
FP8 = Operand(Format.fp8_block)

HONOURED = ("", "")
OPERAND: dict[str, list[tuple[Operand, Operand, tuple[str, str]]]] = {
    "format": [
        (FP4, Operand(), HONOURED),
        (FP4, Operand(Format.mxfp8), HONOURED),
        (FP4, FP8, HONOURED),
        (FP4, Operand(Format.mxfp4), ("mxfp4 has no quantizer",) * 2),
    ],
    "tile": [(FP4, replace(FP4, tile=(16, 16)), HONOURED), (FP8, replace(FP8, tile=(128, 128)), HONOURED)],
    "rounding": [(FP4, SR, HONOURED), (FP4, replace(FP4, rounding=Rounding.sr_headroom), ("sr_headroom",) * 2)],
    "noise_bits": [(SR, replace(SR, noise_bits=20), ("noise_bits = 20",) * 2)],
    "rht_size": [
        (FP4, RHT, HONOURED),
        *[(FP4, replace(FP4, rht_size=size), (f"rht_size = {size}",) * 2) for size in (4, 32, 64, 128)],
    ],
    "rht_signs": [
        (RHT, replace(RHT, rht_signs=Signs.none), HONOURED),
        (RHT, replace(RHT, rht_signs=Signs.per_step), ("rht_signs per_step",) * 2),
        (RHT, replace(RHT, rht_signs=Signs.per_index), ("rht_signs per_index",) * 2),
        (RHT, replace(RHT, rht_signs=Signs.per_index, rounding=Rounding.ms_eden), ("rounding ms_eden",) * 2),
    ],
    "scale_order": [(FP4, replace(FP4, scale_order=ScaleOrder.paper), ("set scale_order: te",) * 2)],
    "amax_scope": [
        (FP4, replace(FP4, amax_scope=AmaxScope.tensor), ("", r"amax_scope tensor.*amax_scope: shard.*unsharded=True")),
        (FP4, replace(FP4, amax_scope=AmaxScope.row), ("amax_scope row",) * 2),
        (FP4, replace(FP4, amax_scope=AmaxScope.group128), ("amax_scope group128",) * 2),
    ],
    "amax_rounding": [
        (FP4, replace(FP4, amax_rounding=AmaxRounding.power_of_two), ("amax_rounding power_of_two",) * 2)
    ],
    "four_over_six": [(FP4, SIX, HONOURED), (SIX, replace(SIX, four_over_six=FourOverSix.mse), HONOURED)],
    "four_over_six_bound": [(SIX, replace(SIX, four_over_six_bound=448), HONOURED)],
    "center": [(FP4, replace(FP4, center=True), ("center, which its modules",) * 2)],
}
"""Field -> (a value, another one, what the backend and te_recipe say of the other one; nothing if it is honoured)."""
LINEAR = {"fprop": "OPERAND", "dgrad": "OPERAND", "wgrad": "OPERAND", "wgrad_output": "test_wgrad_output"}
CONFIG = {
    "backend": "names a backend of this package; te_recipe is for modules outside of it",
    "compute_dtype": "test_compute_dtype",
    "compile": "of the emulated backend's kernels; no number depends on it",
    "recipes": "OPERAND",
    "use": "as a rule for what the others leave",
    "keep_bf16": "as rules for the head and for blocks",
    "rules": "test_te_recipe.py",
    "switch": "test_te_recipe.py",
    "calibration_batches": "static scales, which are refused",
    "evaluation": "said where autocast is entered: te_recipe gives the training phases",
}
"""Where it is tested, or why it has no part in what TE computes."""


class Recorded:
    """A quantizer that remembers what was asked of it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.asked = (type(self).__name__, arguments, settings)
        self.with_amax_reduction = False


def recording(name: str) -> type[Recorded]:
    """With the signature by which versions are told apart."""
    return type(name, (Recorded,), {"__signature__": inspect.signature(getattr(te_double, name))})


class HybridQuantizer(Recorded):
    def __init__(self, *, rowwise_quantizer: Recorded, columnwise_quantizer: Recorded) -> None:
        super().__init__(rowwise_quantizer.asked, columnwise_quantizer.asked)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVFP4Quantizer", "MXFP8Quantizer", "Float8BlockQuantizer", "IdentityQuantizer")
    te_double.install(monkeypatch, HybridQuantizer=HybridQuantizer, **{name: recording(name) for name in names})


def by_backend(precision: LinearPrecision) -> list[Any]:
    """What the backend asks for, in a layout of two ranks."""
    backend = TransformerEngineBackend(PrecisionConfig(recipes={"r": precision}))
    group, asked = Group("tp", (0, 1), 0, object()), []  # type: ignore[arg-type]
    for tensor in TENSORS:
        for along, operand in enumerate(reversed(directions(precision, tensor))):
            if operand.quantized:
                copies = [None, None]
                copies[1 - along] = Copy("fprop", operand, along)  # type: ignore[call-overload]
                quantizer = backend._quantizer(*copies, group)
                asked.append((*quantizer.asked, quantizer.with_amax_reduction))
            else:
                asked.append(())
    return asked


def by_recipe(precision: LinearPrecision) -> list[Any]:
    """What te_recipe's factory gives the modules."""
    config = PrecisionConfig(recipes={"r": precision}, rules=[Rule("head"), Rule("*", use="r")])
    plan = PrecisionPlan(config, model_linears(ModelConfig(**MODEL)))
    factory = te_recipe(plan).qfactory
    roles = [te_double.QuantizerRole("linear", tensor, "blocks.1.mlp.up") for tensor in TENSORS]
    return [factory(role).asked for role in roles]


def pairs(base: Operand, changed: Operand) -> Iterator[tuple[LinearPrecision, LinearPrecision]]:
    """(base, changed) in each GEMM, for each operand alone where the two may differ, else for both."""
    different = {name for name, value in vars(base).items() if getattr(changed, name) != value}
    alone = different.isdisjoint({"format", "rht_size", "rht_signs"})
    for gemm in ("wgrad",) if changed.rht_size else GEMMS:
        for a, b in ((changed, base), (base, changed)) if alone else ((changed, changed),):
            cls = {"fprop": Fprop, "dgrad": Dgrad, "wgrad": Wgrad}[gemm]
            if any(one.center and tensor != "x" for one, tensor in zip((a, b), cls.tensors, strict=True)):
                continue
            yield LinearPrecision(**{gemm: cls(base, base)}), LinearPrecision(**{gemm: cls(a, b)})


@pytest.mark.parametrize("ask", [by_backend, by_recipe])
def test_a_static_scale_is_refused(ask: Any) -> None:
    with pytest.raises(ValueError, match="amax_scope static, but its quantizers measure every tensor"):
        ask(LinearPrecision(Fprop(replace(FP4, amax_scope=AmaxScope.static), FP4)))


def test_no_field_is_forgotten() -> None:
    for known, cls in ((OPERAND, Operand), (LINEAR, LinearPrecision), (CONFIG, PrecisionConfig)):
        names = {field.name for field in dataclasses.fields(cls)}
        assert set(known) == names, f"{cls.__name__}: say here what Transformer Engine makes of {set(known) ^ names}"


@pytest.mark.parametrize("end", [0, 1], ids=["backend", "te_recipe"])
@pytest.mark.parametrize("field", OPERAND)
def test_honoured_or_refused(field: str, end: int) -> None:
    ask = (by_backend, by_recipe)[end]
    for base, changed, printed in OPERAND[field]:
        for before, after in pairs(base, changed):
            if printed[end]:
                with pytest.raises(ValueError, match=printed[end]):
                    ask(after)
            else:
                assert ask(after) != ask(before), f"{field}: {changed} asks for the same as {base}"


def test_compute_dtype() -> None:
    plan_config = PrecisionConfig(
        recipes={"r": nvfp4_paper()}, rules=[Rule("*", use="r")], compute_dtype=ComputeDtype.fp32
    )
    plan = PrecisionPlan(plan_config, model_linears(ModelConfig(**MODEL)))
    with pytest.raises(ValueError, match="compute_dtype = fp32"):
        te_recipe(plan, unsharded=True)
    with pytest.raises(ValueError, match="compute_dtype = fp32"):
        TransformerEngineBackend(plan_config)


def test_wgrad_output(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"wgrad_output compute.*fuse_wgrad_accumulation=True"):
        by_recipe(LinearPrecision(Fprop(FP4, FP4), wgrad_output=WgradOutput.compute))
    te_double.install(monkeypatch)
    precision = nvfp4_paper(stochastic=False)
    grads = []
    for output in WgradOutput:
        torch.manual_seed(0)
        x, w = torch.randn(32, 32, dtype=torch.bfloat16), LogicalParameter.whole("w", torch.randn(32, 32).bfloat16())
        w.main_grad = torch.zeros(32, 32)
        single, index = Group.single(), torch.arange(32)
        y = quantized_linear(
            x,
            w,
            rows=index,
            sharding=Sharding("blocks.0.mlp.up", single, single, single, index, index),
            precision=replace(precision, wgrad_output=output),
            backend=TransformerEngineBackend(PrecisionConfig(recipes={"r": precision})),
            clock=StepClock(seed=1),
            cache=WeightCache(),
        )
        y.backward(torch.randn_like(y))
        grads.append(w.main_grad)
    assert torch.equal(grads[0].bfloat16().float(), grads[1]), "compute is to round once"
    assert not torch.equal(grads[0], grads[1]), "fp32 is not to be rounded"
