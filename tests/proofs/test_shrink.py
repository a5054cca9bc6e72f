"""A shrunken configuration keeps what a layout can break."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.data.ramp import BatchRampConfig, steps_from
from megatron_fp4.layers.moe.config import Drop
from megatron_fp4.models.layout import check_model_layout
from megatron_fp4.optim import Overlap
from megatron_fp4.pipeline.schedules import check_pipeline
from megatron_fp4.proofs.layouts import parse_layout, parse_layouts
from megatron_fp4.proofs.routing import draw_choices, with_drawn_choices
from megatron_fp4.proofs.shrink import shrink

LAYOUTS = parse_layouts("tp2 pp2 dp2, tp4, pp4:zbv, cp2 dp2, dp3")
ODD = parse_layouts("tp3, cp3 tp2")


@pytest.mark.parametrize("model", ["gpt_tiny", "gpt_1_2b", "hybrid_tiny", "nemotron_h_12b"])
def test_structure_is_kept(model: str) -> None:
    full = to_run_config(compose_config([f"model={model}", "model.vocab_size=1000"]))
    cases = {case.name: case for case in shrink(full, LAYOUTS)}
    small = cases["recipe"].config
    assert set(small.model.blocks) == set(full.model.blocks), "a kind of block was lost"
    assert len(small.model.blocks) >= 8, "pp4:zbv needs eight stages"
    assert small.model.tied_embeddings == full.model.tied_embeddings
    assert small.model.activation == full.model.activation
    grouped = full.model.num_heads > full.model.num_kv_heads
    assert (small.model.num_heads > small.model.num_kv_heads) == grouped, "grouped heads were lost"
    kinds = {row.precision for row in cases["recipe"].table.rows}
    assert len(kinds) == 2, "the quantized linears or those in high precision were lost"
    assert cases["fp32"].table.num_quantized_gemms == cases["bf16"].table.num_quantized_gemms == 0
    assert small.train.global_batch % 6 == 0, "dp2, dp3 and pp4 must fit one global batch"
    for layout in LAYOUTS:
        tokens = small.data.seq_length // layout.parallel.cp
        check_model_layout(small.model, layout.parallel, seq_length=small.data.seq_length, tokens=tokens)


@pytest.mark.parametrize("model", ["gpt_tiny", "hybrid_tiny"])
def test_odd_layouts_get_sizes_that_divide(model: str) -> None:
    """Tokens as well as heads and widths: tensor-parallel ranks hold equal numbers of rows."""
    small = shrink(to_run_config(compose_config([f"model={model}", "model.vocab_size=1000"])), ODD)[0].config
    assert small.data.seq_length % (2 * 3 * 16) == 0
    assert small.data.seq_length // 3 % 6 == 0


def test_overlap_is_that_of_gpus() -> None:
    full = to_run_config(compose_config(["model=gpt_tiny", "model.vocab_size=1000", "optim.overlap_gather=never"]))
    optim = shrink(full, LAYOUTS)[0].config.optim
    assert (optim.overlap_reduce, optim.overlap_gather) == (Overlap.always, Overlap.never)


def test_tied_embeddings_and_dropout_are_kept() -> None:
    full = to_run_config(compose_config(["model=gpt_tiny", "model.vocab_size=1000"]))
    full = replace(full, model=replace(full.model, tied_embeddings=True, dropout=0.1))
    model = shrink(full, LAYOUTS)[0].config.model
    assert (model.tied_embeddings, model.dropout) == (True, 0.1)


def test_rounding_decides_nothing_about_experts() -> None:
    """In BF16 neither their choice nor which rows a full one gives up; in FP32 compute both are the model's own."""
    full = to_run_config(compose_config(["model=nemotron3_tiny", "model.vocab_size=1000", "train.total_tokens=1e6"]))
    full = replace(full, model=replace(full.model, moe=replace(full.model.moe, capacity_factor=1.0)))
    cases = {case.name: with_drawn_choices(case) for case in shrink(full, parse_layouts("tp2 ep2"))}
    drawn = {name for name, case in cases.items() if case.prepare is draw_choices}
    latest = {name for name, case in cases.items() if case.config.model.moe.drop is Drop.address}
    assert drawn == latest == {"bf16"}


def test_a_batch_ramp_is_kept() -> None:
    """Every size of its steps must suit every layout, and the sizes change within a few steps."""
    full = to_run_config(compose_config(["model=gpt_tiny", "model.vocab_size=1000"]))
    ramp = BatchRampConfig(start_samples=2, increment_samples=2, ramp_samples=1000)
    small = shrink(replace(full, train=replace(full.train, batch_ramp=ramp)), LAYOUTS)[0].config.train
    sizes = [small.global_batch // 4 * factor for factor in (1, 1, 2, 3, 4)]
    assert [size for _, size in itertools.islice(steps_from(0, small.batch_ramp, small.global_batch), 5)] == sizes
    for layout in LAYOUTS:
        for size in small.batch_sizes:
            check_pipeline(layout.parallel, small.gradient_accumulation(layout.parallel.dp, size))


def test_layouts_as_text() -> None:
    layout = parse_layout("tp2  pp2v3:interleaved_1f1b")
    assert (layout.parallel.tp, layout.parallel.pp, layout.parallel.virtual_stages) == (2, 2, 3)
    assert (layout.world_size, layout.num_stages) == (4, 6)
    sizes = [(each.parallel.dp, each.world_size) for each in parse_layouts("ep2, tp2 ep2, pp2 ep2, cp2 ep4, dp4 ep2")]
    assert sizes == [(2, 2), (1, 2), (2, 4), (2, 4), (4, 4)], "without a dp the smallest that ep fits"
    assert [entry.name for entry in parse_layouts("tp2 pp2 dp2, pp4:zbv")] == ["tp2 pp2 dp2", "pp4:zbv"]


@pytest.mark.parametrize(
    "text", ["", "tp2,", "tp0", "tp2 tp4", "sp2", "dp3 ep2", "tp2v2", "pp4:zigzag", "pp2v3:zbv", "dp2:zbv"]
)
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"layout|parallel\."):
        parse_layouts(text)
