"""The precision plan: what rules and switches mean, what is refused, and what people are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision.backends.choose import check_backend_shapes
from megatron_fp4.precision.config import BackendName, KeepBf16, PrecisionConfig, Rule, Switch
from megatron_fp4.precision.operand import Format, Operand
from megatron_fp4.precision.plan import PrecisionPlan, matches, selected_blocks
from megatron_fp4.precision.recipes import nvfp4_paper
from megatron_fp4.precision.spec import Fprop, LinearPrecision
from megatron_fp4.precision.table import describe, difference, difference_to_stored, summary

MODEL = ModelConfig(num_layers=6, pattern="M-M*M-", vocab_size=96, mamba_num_heads=16, mamba_head_dim=16)
LINEARS = model_linears(MODEL)
QUANTIZED, HIGH = ("nvfp4",) * 3, ("bf16",) * 3
ALL = Rule("*", use="nvfp4")
FORWARD_AT_1000 = Switch(at_tokens=1000, gemms=["fprop"])


def plan_of(*rules: Rule, **settings: Any) -> PrecisionPlan:
    """The plan of MODEL, 10,000 tokens with the decay from 8,000 on."""
    recipes = {"nvfp4": nvfp4_paper(), "plain": nvfp4_paper(rht=False, stochastic=False)}
    config = PrecisionConfig(**{"recipes": recipes, "rules": list(rules or (ALL,)), **settings})
    return PrecisionPlan(config, LINEARS, total_tokens=10_000, decay_start=8_000)


def formats(*rules: Rule) -> dict[str, tuple[str, str, str]]:
    return plan_of(*rules).table().formats()


# -- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "head", True),
        ("*.mlp.*", "blocks.1.mlp.up", True),
        ("*.mlp", "blocks.1.mlp.up", False),
        (r"/attention\.(qkv|out)$/", "blocks.3.attention.out", True),
        (r"/attention\.(qkv|out)$/", "blocks.3.attention.output", False),
        ("blocks.1.*", "blocks.11.mlp.up", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("first:2", {0, 1}),
        ("last:2", {4, 5}),
        ("-2:", {4, 5}),
        ("2:4", {2, 3}),
        (":-4", {0, 1}),
        ("last:9", {0, 1, 2, 3, 4, 5}),
        ("last:0", set()),
    ],
)
def test_blocks(text: str, expected: set[int]) -> None:
    assert selected_blocks(text, 6) == expected


def test_first_match_wins_and_blocks_leave_the_head_out() -> None:
    shown = formats(Rule("*.attention.*"), Rule("*", blocks="last:1"), ALL)
    assert shown["blocks.3.attention.qkv"] == HIGH
    assert shown["blocks.5.mlp.down"] == HIGH
    assert shown["blocks.4.mamba.in_proj"] == QUANTIZED
    assert shown["head"] == QUANTIZED, "'blocks' selects blocks: the head is in none of them"


def test_a_rule_names_recipes_per_gemm() -> None:
    plan = plan_of(Rule("*.mlp.*", use="nvfp4", wgrad="bf16"), Rule("head"), Rule("*", dgrad="plain"))
    assert plan.table().formats()["blocks.1.mlp.up"] == ("nvfp4", "nvfp4", "bf16")
    assert plan.table().formats()["blocks.0.mamba.in_proj"] == ("bf16", "nvfp4", "bf16")
    recipe = nvfp4_paper(rht=False, stochastic=False)
    assert plan.table()["blocks.0.mamba.in_proj"] == LinearPrecision(dgrad=recipe.dgrad), "gemms of another recipe"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [Rule("*.mlp.gate", use="nvfp4"), ALL],
            r"rule 1: \*\.mlp\.gate matches no linear.*'blocks\.0\.mamba\.in_proj'",
        ),
        ([ALL, Rule("head")], "rule 2: head matches no linear that an earlier rule has not taken"),
        ([Rule("head"), Rule("*", blocks="first:3", use="nvfp4")], r"no precision rule matches blocks\.3\.attention"),
        ([Rule("*", blocks="last two"), ALL], "blocks = 'last two'; use 'first:2', 'last:8'"),
        ([Rule("*", use="nvfp5")], "'nvfp5' does not exist; known: bf16, nvfp4, plain"),
        ([Rule("*")], "nvfp4, plain are configured, but the rules leave every GEMM in bf16"),
    ],
)
def test_refused_rules(rules: list[Rule], message: str) -> None:
    """A rule that is silently without effect would leave a run in another precision than its author believes."""
    with pytest.raises(ValueError, match=message):
        plan_of(*rules)


# -- switches ---------------------------------------------------------------------------------------------------------


def test_keep_bf16_and_use_are_the_rules_that_they_stand_for() -> None:
    """The list that every configuration repeated: the head, blocks at both ends, exceptions, and the rest."""
    kept = plan_of(Rule("*.mlp.up", use="plain"), use="nvfp4", keep_bf16=KeepBf16(first=1, last=2)).table()
    written = plan_of(
        Rule("head"), Rule("*", blocks="first:1"), Rule("*", blocks="last:2"), Rule("*.mlp.up", use="plain"), ALL
    ).table()
    assert kept.by_name == written.by_name
    reasons = {row.name: row.reason for row in kept.rows}
    assert reasons["head"] == "keep_bf16 head"
    assert reasons["blocks.0.mamba.in_proj"] == "keep_bf16 first:1"
    assert reasons["blocks.1.mlp.up"] == "rule 1: *.mlp.up"
    assert reasons["blocks.3.attention.qkv"] == "use: nvfp4"
    free = plan_of(use="nvfp4", rules=[], keep_bf16=KeepBf16(head=False)).table()
    assert set(free.formats().values()) == {QUANTIZED}


def test_without_recipes_nothing_is_quantized() -> None:
    for config in (PrecisionConfig(), PrecisionConfig(use="bf16", keep_bf16=KeepBf16(first=2))):
        assert set(PrecisionPlan(config, LINEARS).table().formats().values()) == {HIGH}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_bf16": KeepBf16(last=6)}, "leave every GEMM in bf16"),
        ({"rules": [Rule("head")]}, "rule 1: head matches no linear .* keep_bf16 does not keep"),
        ({"use": "nvfp5"}, "'nvfp5' does not exist"),
        ({"use": "", "keep_bf16": KeepBf16(last=1)}, "keep_bf16 would have no effect"),
    ],
)
def test_refused_places(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(**{"use": "nvfp4", "rules": [], **settings})


@pytest.mark.parametrize(
    ("switch", "start"),
    [(Switch(at_tokens=8200), 8200), (Switch(at_fraction=0.82), 8200), (Switch(at_decay=True), 8000)],
)
def test_a_switch_holds_from_its_token_on(switch: Switch, start: int) -> None:
    plan = plan_of(switch=[switch])
    assert [plan.phase_at(tokens) for tokens in (0, start - 1, start, 10_000)] == [0, 0, 1, 1]


def test_switches_in_any_order_add_up() -> None:
    later, sooner = Switch(at_tokens=2000, match="*.mlp.*"), FORWARD_AT_1000
    plan = plan_of(switch=[later, sooner])
    assert [start for start, _ in plan.phases] == [0, 1000, 2000]
    assert plan.table(1).formats()["blocks.1.mlp.up"] == ("bf16", "nvfp4", "nvfp4")
    assert plan.table(2).formats()["blocks.1.mlp.up"] == HIGH
    assert plan.table(2).formats()["blocks.0.mamba.in_proj"] == ("bf16", "nvfp4", "nvfp4"), "the first switch is undone"


def test_a_switch_may_quantize_more() -> None:
    plan = plan_of(Rule("head"), ALL, switch=[Switch(at_tokens=1000, match="head", use="nvfp4", gemms=["wgrad"])])
    assert plan.table(1).formats()["head"] == ("bf16", "bf16", "nvfp4")


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"at_tokens": 10_000}, "10000 tokens lies beyond the end of the run, 10000"),
        ({"at_tokens": 1000, "use": "nvfp4"}, r"match '\*', use nvfp4\) changes no GEMM"),
        ({"at_tokens": 1000, "match": "*.gate"}, "changes no GEMM"),
        ({"at_tokens": 1000, "use": "fp8"}, "'fp8' does not exist"),
        ({}, "exactly one of at_tokens, at_fraction, at_decay"),
        ({"at_tokens": 5, "at_decay": True}, "exactly one of"),
        ({"at_decay": True, "gemms": ["forward"]}, "gemms = .*forward.*fprop, dgrad, wgrad"),
        ({"at_decay": True, "gemms": []}, "choose from fprop, dgrad, wgrad"),
    ],
)
def test_refused_switches(switch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(switch=[Switch(**switch)])


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", list(BackendName))
def test_an_evaluation_recipe_that_the_shapes_refuse_is_refused_at_start(backend: BackendName) -> None:
    """A head of 104 rows stays in BF16 while training, and would have died in the first evaluation."""
    linears = model_linears(replace(MODEL, vocab_size=104))
    recipes = {"nvfp4": nvfp4_paper()}
    config = PrecisionConfig(recipes=recipes, use="nvfp4", evaluation="nvfp4", backend=backend)
    plan = PrecisionPlan(config, linears, total_tokens=10_000)
    with pytest.raises(ValueError, match=r"precision\.evaluation=nvfp4, head: fprop in nvfp4 needs output features"):
        plan.check_shapes(linears, tp=1, tokens=64)
    PrecisionPlan(replace(config, evaluation="bf16"), linears).check_shapes(linears, tp=1, tokens=64)
    backward_only = LinearPrecision(dgrad=nvfp4_paper().dgrad)
    other = PrecisionConfig(recipes={**recipes, "other": backward_only}, use="nvfp4", evaluation="other")
    PrecisionPlan(other, linears).check_shapes(linears, tp=1, tokens=64)  # an evaluation has no backward pass


def test_an_evaluation_recipe_that_kernels_refuse_is_refused_at_start() -> None:
    linears = model_linears(replace(MODEL, pattern="*-*-*-", vocab_size=104))
    backend, recipes = BackendName.transformer_engine, {"nvfp4": nvfp4_paper()}
    for evaluation in ("bf16", "nvfp4"):
        plan = PrecisionPlan(PrecisionConfig(backend, recipes=recipes, use="nvfp4", evaluation=evaluation), linears)
        if evaluation == "bf16":
            check_backend_shapes(plan, linears, tp=1, tokens=64)
            continue
        with pytest.raises(ValueError, match=r"precision\.evaluation=nvfp4, head: operand w of fprop"):
            check_backend_shapes(plan, linears, tp=1, tokens=64)


def test_evaluation_has_its_own_precision() -> None:
    plan = plan_of(switch=[FORWARD_AT_1000])
    assert set(plan.evaluation_table(0).formats().values()) == {HIGH}, "bf16 is the default"
    assert plan_of(evaluation="plain").evaluation_table()["head"].fprop == nvfp4_paper().fprop
    same = plan_of(evaluation="same", switch=[FORWARD_AT_1000])
    assert same.evaluation_table(1) is same.table(1), "'same' follows the switch"
    with pytest.raises(ValueError, match="'fp8' does not exist"):
        plan_of(evaluation="fp8")


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_shapes_are_checked_before_anything_is_built() -> None:
    plan = plan_of(Rule("head"), ALL)
    plan.check_shapes(LINEARS, tp=1, tokens=64)
    with pytest.raises(ValueError, match=r"wgrad in nvfp4 needs tokens per microbatch and rank.*of 16, got 40"):
        plan.check_shapes(LINEARS, tp=1, tokens=40)
    plan.check_shapes([info for info in LINEARS if "mamba" not in info.name], tp=4, tokens=64)
    with pytest.raises(
        ValueError, match=r"mamba\.in_proj.*output features per rank to be a multiple of 16, got 8.*tp = 2"
    ):
        plan.check_shapes(LINEARS, tp=2, tokens=64)


def test_a_square_tile_divides_both_dimensions_of_its_tensor() -> None:
    """x [T, K] in 128x128 tiles: tokens and input features, and no output features."""
    square = LinearPrecision(Fprop(x=Operand(Format.fp8_block, tile=(128, 128)), w=Operand(Format.fp8_block)))
    assert square.fprop.multiples() == {"T": 128, "N": 1, "K": 128}
    plan = PrecisionPlan(PrecisionConfig(recipes={"r": square}, rules=[Rule("*", use="r")]), LINEARS)
    with pytest.raises(ValueError, match=r"fprop in fp8_block needs tokens per microbatch and rank .*128, got 64"):
        plan.check_shapes([info for info in LINEARS if info.local_shape(1)[1] % 128 == 0], tp=1, tokens=64)


def test_a_linear_in_bf16_takes_any_shape() -> None:
    plan_of(Rule("*.mamba.in_proj"), Rule("head"), ALL).check_shapes(LINEARS, tp=2, tokens=64)


def test_shapes_are_checked_in_every_phase() -> None:
    """A switch half-way through a run must not be the first to find that a shape does not fit."""
    plan = plan_of(Rule("*.mamba.*"), Rule("head"), ALL, switch=[Switch(at_tokens=1000, match="*in_proj", use="nvfp4")])
    with pytest.raises(ValueError, match="in_proj"):
        plan.check_shapes(LINEARS, tp=2, tokens=64)


# -- what people see --------------------------------------------------------------------------------------------------


def test_the_table_groups_blocks_and_gives_the_reason() -> None:
    table = plan_of(Rule("head"), Rule("*", blocks="last:1"), ALL).table()
    lines = [" ".join(line.split()) for line in describe(table).splitlines()]
    assert "blocks.{0,2,4}.mamba.in_proj nvfp4 nvfp4 nvfp4 rule 3: *" in lines
    assert "blocks.5.mlp.up bf16 bf16 bf16 rule 2: * blocks last:1" in lines
    assert "head bf16 bf16 bf16 rule 1: head" in lines
    assert len(lines) == 1 + 2 + 2 + 2 + 2 + 1 + 1, "header, mamba, mlp, attention, last mlp, head, summary"


def test_the_description_has_the_recipes_in_words() -> None:
    """Only those in use: a recipe that no rule names must not look as if it were computed with."""
    plan = plan_of(Rule("*.mlp.up", use="nvfp4"), use="bf16")
    assert f"recipe nvfp4: {nvfp4_paper()}" in plan.describe().splitlines()
    assert "recipe plain" not in plan.describe()
    switched = plan_of(switch=[Switch(at_tokens=1000, match="*.mlp.up", gemms=["dgrad"], use="plain")])
    assert "recipe plain: " in switched.describe()


def test_the_summary_counts_gemms() -> None:
    table = plan_of(Rule("head"), Rule("*.mlp.*", use="nvfp4", wgrad="bf16"), ALL).table()
    assert summary(table) == (
        "12 of 13 linears, 32 of 39 GEMMs in NVFP4; the rest BF16 because of rule 2: *.mlp.* (4"
        " GEMMs), rule 1: head (3 GEMMs)"
    )


def test_the_difference_names_what_changes() -> None:
    plan = plan_of(Rule("head"), ALL, switch=[FORWARD_AT_1000])
    start, later = plan.table(0).texts(), plan.table(1).texts()
    lines = difference(start, later)
    assert "blocks.{0,2,4}.mamba.out_proj: fprop x nvfp4, w nvfp4 16x16 -> fprop x bf16, w bf16" in lines
    assert not any("head" in line for line in lines), "the head stays as it was"
    assert difference(later, later) == []
    assert plan.describe().splitlines()[-len(lines) - 1 :] == ["from 1,000 consumed tokens on:", *lines]


def test_the_difference_shows_more_than_formats() -> None:
    """From stochastic to nearest rounding: the formats are equal, and yet the numbers change."""
    plan = plan_of(switch=[Switch(at_tokens=1000, match="*.mlp.up", gemms=["dgrad"], use="plain")])
    assert difference(plan.table(0).texts(), plan.table(1).texts()) == [
        "blocks.{1,5}.mlp.up: dgrad dy nvfp4 sr, w nvfp4 16x16 -> dgrad dy nvfp4, w nvfp4 16x16"
    ]


def test_the_difference_to_a_checkpoint() -> None:
    stored: dict[str, Any] = dict(plan_of().table().texts())
    table = plan_of(Rule("*.attention.*"), ALL).table()
    paper = stored["head"]
    assert difference_to_stored(stored, table) == [
        f"blocks.3.attention.qkv: {paper} -> bf16",
        f"blocks.3.attention.out: {paper} -> bf16",
    ]
    del stored["head"]
    assert f"head: absent -> {paper}" in difference_to_stored(stored, table)


def test_the_difference_to_an_older_checkpoint() -> None:
    """It holds formats only: those are compared, and equal ones are not reported as a change of everything."""
    stored = {name: list(row) for name, row in formats(ALL).items()}
    assert difference_to_stored(stored, plan_of().table()) == []
    table = plan_of(Rule("*.attention.*"), ALL).table()
    assert difference_to_stored(stored, table) == [
        "blocks.3.attention.qkv: nvfp4 nvfp4 nvfp4 -> bf16 bf16 bf16",
        "blocks.3.attention.out: nvfp4 nvfp4 nvfp4 -> bf16 bf16 bf16",
    ]


def test_a_gemm_of_two_formats_shows_both() -> None:
    mixed = nvfp4_paper(rht=False)
    half = LinearPrecision(Fprop(Operand(Format.mxfp8), Operand(Format.mxfp4)), mixed.dgrad, mixed.wgrad)
    config = PrecisionConfig(recipes={"half": half}, rules=[Rule("*", use="half")])
    assert PrecisionPlan(config, LINEARS).table().formats()["head"] == ("mxfp8/mxfp4", "nvfp4", "nvfp4")
