"""The precision plan as a recipe of Transformer Engine's modules."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision import (
    Format,
    Fprop,
    LinearPrecision,
    Operand,
    Wgrad,
    nvfp4_paper,
    te_recipe,
    uniform,
)
from megatron_fp4.precision.config import PrecisionConfig, Rule, Switch
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.te.recipe import NOT_FROM_ENVIRONMENT
from tests.helpers.parity import MODEL
from tests.precision.te import te_double

whole = functools.partial(te_recipe, unsharded=True)


def plan(*rules: Rule, switch: Switch | None = None, **recipes: LinearPrecision) -> PrecisionPlan:
    config = PrecisionConfig(recipes=recipes, rules=list(rules), switch=[switch] if switch else [])
    return PrecisionPlan(config, model_linears(ModelConfig(**MODEL)), total_tokens=1000, decay_start=800)


class Recording(te_double.NVFP4Quantizer):
    """Takes every setting, stochastic rounding too, and remembers it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        super().__init__(**{k: v for k, v in settings.items() if k != "stochastic_rounding"})


def role(tensor_type: str, name: str = "blocks.0.attention.qkv") -> te_double.QuantizerRole:
    return te_double.QuantizerRole("linear", tensor_type, name)


@pytest.mark.parametrize("off", ["none", "rht", "stochastic", "square_weights"])
def test_uniform_plan_is_the_built_in_recipe(monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    te_double.install(monkeypatch)
    precision = nvfp4_paper(**({} if off == "none" else {off: False}))
    recipe = whole(plan(Rule("*", use="r"), r=precision))
    assert isinstance(recipe, te_double.NVFP4BlockScaling)
    assert recipe.fields == {
        "disable_rht": off == "rht",
        "disable_stochastic_rounding": off == "stochastic",
        "disable_2d_quantization": off == "square_weights",
        **NOT_FROM_ENVIRONMENT,
    }, "a field that is left out would come from an environment variable at import (trap 4)"


def test_one_object_per_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    precision = nvfp4_paper()
    changed = nvfp4_paper(stochastic=False, rht=False)
    uniform = plan(Rule("*", use="r"), switch=Switch(at_tokens=500, use="s"), r=precision, s=changed)
    mixed = plan(
        Rule("head"),
        Rule("*", use="r"),
        switch=Switch(at_tokens=500, match="blocks.0.*", use="s"),
        r=precision,
        s=changed,
    )
    for switched in (uniform, mixed):
        check_phases(switched)


def check_phases(switched: PrecisionPlan) -> None:
    first, second = whole(switched, 0), whole(switched, 1)
    for repeated in (
        whole(switched),
        whole(switched, 0),
        whole(switched, phase=0),
        whole(switched, 0, reference=False),
    ):
        assert first is repeated, "a new object each step would rebuild every quantizer"
    assert first is not second
    assert first.qfactory is not second.qfactory, "TE ignores a switch between recipes with one factory (trap 1)"


def test_factory_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch, NVFP4Quantizer=Recording)
    factory = whole(plan(Rule("head"), Rule("*", use="r"), r=nvfp4_paper())).qfactory
    x, w, dy = (factory(role(kind)).settings for kind in ("input", "weight", "grad_output"))
    flags = ("with_rht", "with_2d_quantization", "stochastic_rounding", "rowwise", "columnwise")
    assert [x[f] for f in flags] == [True, False, False, True, True]
    assert [w[f] for f in flags] == [False, True, False, True, True]
    assert [dy[f] for f in flags] == [True, False, True, True, True]
    assert isinstance(factory(role("input", "head")), te_double.IdentityQuantizer), "the head is BF16 in this plan"
    for outside in (None, te_double.QuantizerRole(), role("output")):
        assert isinstance(factory(outside), te_double.IdentityQuantizer), "an output would be quantized"
    with pytest.raises(ValueError, match="named 'qkv', which is no linear"):
        factory(role("input", "qkv"))


def test_directions_of_different_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch, NVFP4Quantizer=Recording)
    forward_bf16 = replace(nvfp4_paper(), fprop=Fprop())
    factory = whole(plan(Rule("*", use="r"), r=forward_bf16)).qfactory
    quantizer = factory(role("input"))
    assert isinstance(quantizer, te_double.HybridQuantizer)
    assert isinstance(quantizer.rowwise_quantizer, te_double.IdentityQuantizer)
    assert quantizer.columnwise_quantizer.settings["with_rht"]
    assert factory(role("input")) is not quantizer, "sub-quantizers must not be shared between modules"
    factory = whole(plan(Rule("*", use="r"), r=uniform(Operand(Format.mxfp8)))).qfactory
    assert isinstance(factory(role("weight")), te_double.MXFP8Quantizer)


def test_modules_before_2_19_compute_one_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither names for a factory nor quantizers of which one direction differs: BF16 would come out as NVFP4."""
    te_double.install(monkeypatch, "2.17.0", **te_double.BEFORE_2_19)
    uniform = plan(Rule("*", use="r"), r=nvfp4_paper())
    assert isinstance(whole(uniform), te_double.NVFP4BlockScaling), "the training image's version computes the paper"
    forward_bf16 = plan(Rule("*", use="r"), r=replace(nvfp4_paper(), fprop=Fprop()))
    for other in (plan(Rule("head"), Rule("*", use="r"), r=nvfp4_paper()), forward_bf16):
        with pytest.raises(ValueError, match=r"2\.17\.0 compute one uniform NVFP4 recipe.*install.*>=2\.19"):
            whole(other)
    with pytest.raises(ValueError, match=r"install.*>=2\.19"):
        whole(plan(Rule("*", use="r"), r=nvfp4_paper(stochastic=False)), reference=True)


def test_the_amax_groups_are_the_modules_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """amax_scope tensor would have no effect there: tp ranks of a weight would take their own scales."""
    te_double.install(monkeypatch)
    uniform = plan(Rule("*", use="r"), r=nvfp4_paper())
    with pytest.raises(ValueError, match=r"fprop.x has amax_scope tensor.*set amax_scope: shard.*unsharded=True"):
        te_recipe(uniform)
    config = to_run_config(compose_config(["precision/recipe=nvfp4_shard", "model=gpt_tiny"]))
    sharded = PrecisionPlan(config.precision, model_linears(config.model))
    assert isinstance(te_recipe(sharded), te_double.CustomRecipe), "the remedy that the message names"
    shard = config.precision.recipes["nvfp4"]
    assert isinstance(te_recipe(plan(Rule("*", use="r"), r=shard)), te_double.NVFP4BlockScaling)


def test_reference_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    nearest = nvfp4_paper(stochastic=False)
    recipe = whole(plan(Rule("*", use="r"), r=nearest), reference=True)
    assert isinstance(recipe, te_double.CustomRecipe), "a built-in recipe runs kernels"
    x, w = recipe.qfactory(role("input")), recipe.qfactory(role("weight"))
    assert type(x).__name__ == type(w).__name__ == "NVFP4QuantizerRef"
    assert [(q.with_rht, q.quant_tile_shape) for q in (x, w)] == [(True, (1, 16)), (False, (16, 16))]
    with pytest.raises(ValueError, match=r"dgrad with rounding sr.*use rne"):
        whole(plan(Rule("*", use="r"), r=nvfp4_paper()), reference=True)
    fp8 = Fprop(Operand(Format.mxfp8), Operand(Format.mxfp8))
    with pytest.raises(ValueError, match=r"fprop in mxfp8.*covers nvfp4 only"):
        whole(plan(Rule("*", use="r"), r=LinearPrecision(fp8)), reference=True)
    with pytest.raises(ValueError, match=r"its input is quantized differently.*half of a HybridQuantizer"):
        whole(plan(Rule("*", use="r"), r=replace(nearest, wgrad=Wgrad())), reference=True)
