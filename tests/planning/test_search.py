"""The search: what it finds is as good as what was found by hand, and every layout is accounted for."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megatron_fp4.cli.compose import CONFIG_DIR, compose_config, to_run_config
from megatron_fp4.cli.overrides.shipped import HEAD, shipped_layouts
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.planning.cost.hardware import Assumptions, Site
from megatron_fp4.planning.layouts.batches import batch_section, factors
from megatron_fp4.planning.layouts.choices import Choices, ChosenLayout
from megatron_fp4.planning.layouts.search import search
from megatron_fp4.planning.report import run_plan, without_tokenizer
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.train.config import RunConfig
from tests.models.test_count import load
from tests.planning.test_report import twelve_billion
from tests.planning.test_time import SIX, twelve

SHIPPED = sorted(path.stem for path in (CONFIG_DIR / "parallel").glob("*_*.yaml"))


def site(num_gpus: int, gpu: str = "GB200", **assumed: float) -> Site:
    assumptions = Assumptions(**assumed)
    return Site(assumptions.machine(gpu), assumptions, num_gpus)


def batch_of(config: RunConfig, size: int) -> RunConfig:
    return replace(config, train=replace(config.train, global_batch=size))


def test_the_search_finds_what_is_at_least_as_good_as_by_hand() -> None:
    """At the batch of the best of six, without its tp 8, which Transformer Engine could not quantize."""
    best = min(SIX, key=lambda layout: SIX[layout])
    precision = replace(twelve_billion().precision, backend=BackendName.auto)
    by_hand = run_plan(replace(twelve(*best), precision=precision), 4096)["time"]["days"]
    start = time.process_time()
    results = search(batch_of(replace(twelve_billion(), precision=precision), best[3]), site(4096))
    assert time.process_time() - start < 10
    first = results["fitting"][0]
    assert first["days"]["expected"] <= by_hand["expected"]
    assert first["tp"] <= 4
    assert results["fallen"]["alignment"] > 0
    order = [entry["days"]["expected"] for entry in results["fitting"]]
    assert order == sorted(order)
    assert results["tried"] == len(order) + results["slower"] + sum(results["fallen"].values())


def test_a_layout_of_the_search_is_what_its_plan_says() -> None:
    config = replace(load("gpt_1_2b"), num_layers=4)
    run = batch_of(replace(twelve_billion(), model=config, precision=PrecisionConfig(use="bf16")), 64)
    results = search(run, site(64), wanted=3)
    for entry in results["fitting"]:
        names = ("tp", "pp", "cp", "dp", "micro_batch", "schedule", "recompute")
        layout = ChosenLayout(**{name: entry[name] for name in names})
        report = run_plan(layout.applied_to(run), 64)
        assert report["time"]["days"] == pytest.approx(entry["days"])
        assert report["memory_per_rank"]["largest"] == entry["memory_bytes"]


def test_the_lightest_recomputation_that_fits_is_taken() -> None:
    """In a memory that one layout without recomputation does not fit, but with it does."""
    run = batch_of(replace(twelve_billion(), model=replace(load("gpt_1_2b"), num_layers=2)), 8)
    run = replace(run, precision=PrecisionConfig(use="bf16"))
    alone = Choices(run, site(1))
    assert {layout.tp * layout.pp * layout.cp * layout.dp for layout in alone.layouts()} == {1}
    sizes = {
        mode: run_plan(ChosenLayout(1, 1, 1, 1, 1, "1f1b", mode).applied_to(run))["memory_per_rank"]["largest"]
        for mode in ("none", "selective", "full")
    }
    assert sizes["none"] > sizes["selective"] > sizes["full"]
    share = (sizes["none"] + sizes["selective"]) / 2 / 186e9
    results = search(run, site(1, memory_share=share), wanted=1)
    assert [entry["recompute"] for entry in results["fitting"]] == ["selective"]
    nothing = search(run, site(1, memory_share=sizes["full"] / 186e9 / 2))
    assert nothing["fitting"] == []
    assert nothing["fallen"]["memory"] == 3, "micro batches of 1, 2 and 4"


def test_a_batch_says_which_dp_divide_it() -> None:
    assert factors(736) == "2^5 * 23"
    assert [factors(number) for number in (1, 2, 6, 97, 1024)] == ["1", "2", "2 * 3", "97", "2^10"]
    section = batch_section(twelve_billion(), 4096)
    assert section["dp"] == [1, 2, 4, 8, 16, 32]
    assert section["near"][0] == {
        "global_batch": 768,
        "factors": "2^8 * 3",
        "dp": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_layouts_fit_and_are_aligned(name: str) -> None:
    """On their GPUs, with the settings of the command that found them."""
    first, second = (CONFIG_DIR / "parallel" / f"{name}.yaml").read_text().splitlines()[:2]
    head = HEAD.match(first)
    assert head is not None
    gpu, num_gpus = name.split("_")[0].upper(), int(name.split("_")[-1])
    assert f" --gpus {num_gpus} --gpu {gpu}" in second
    overrides = [word for word in second.split() if "=" in word]
    config = without_tokenizer(to_run_config(compose_config([*overrides, f"parallel={name}"])))
    report = run_plan(config, gpu=gpu)
    assert report["fits"]
    assert report["run"]["gpus"] == num_gpus
    largest = report["memory_per_rank"]["largest"]
    assert largest < 0.9 * report["memory_per_rank"]["gpu_bytes"]
    errors = [warning for warning in report["warnings"] if warning["severity"] == "error"]
    assert [warning for warning in errors if gpu != "H100" or warning["about"] != "shapes"] == []
    assert not any("no kernels for parallel.cp" in warning["text"] for warning in report["warnings"])
    days = report["time"]["days"]
    text = f"{num_gpus} {gpu}, {largest / 1e9:.0f} GB, {days['hidden']:.2f} to {days['exposed']:.2f} days, "
    text += f"{days['expected']:.2f} expected"
    others = [word for word in overrides if word.startswith("train.")]
    text += f"; with {' '.join(others)}" if others else ""
    assert head[2] == text, f"{name}.yaml says {head[2]}, but a plan of it {text}"
    assert any(name in text for text in shipped_layouts(config.model, CONFIG_DIR))


def test_cp_of_a_model_with_mamba_is_no_choice() -> None:
    """Its time would leave out the loops that torch runs then; by hand it is planned, and warned of."""
    run = batch_of(replace(twelve_billion(), precision=PrecisionConfig(use="bf16")), 64)
    hybrid, plain = Choices(run, site(8)), Choices(replace(run, model=load("gpt_1_2b")), site(8))
    assert {layout.cp for layout in hybrid.layouts()} == {1}
    assert {layout.cp for layout in plain.layouts()} == {1, 2, 4, 8}
    assert hybrid.fallen["mamba"] > 0 == plain.fallen["mamba"]
    warnings = run_plan(replace(run, parallel=ParallelConfig(tp=4, cp=2)), 8)["warnings"]
    assert any("no kernels for parallel.cp=2" in warning["text"] for warning in warnings)


def test_the_search_lists_nothing_that_a_run_refuses() -> None:
    """FP8's tiles of 128 do not divide what tp 2 leaves of Mamba's in_proj; the emulation of NVFP4 takes tp 8."""
    fp8 = to_run_config(compose_config(["experiment=paper_12b_10t", "precision=fp8", "precision.backend=emulated"]))
    for run, sizes in ((fp8, {1}), (twelve_billion(), {1, 2, 4, 8})):
        choices = Choices(without_tokenizer(run), site(8))
        assert {layout.tp for layout in choices.layouts()} == sizes
        assert bool(choices.fallen["alignment"]) is (run is fp8)
    with pytest.raises(ValueError, match="needs output features per rank to be a multiple of 128"):
        run_plan(replace(fp8, parallel=ParallelConfig(tp=2)), 2)


def test_what_the_backend_cannot_quantize_does_not_fit() -> None:
    """tp 8 divides 22656 into 177 * 16: an error of Transformer Engine, no matter to the emulation."""
    config = replace(twelve_billion(), parallel=ParallelConfig(tp=8))
    native = replace(config, precision=replace(config.precision, backend=BackendName.transformer_engine))
    assert run_plan(config, 8 * 92)["fits"]
    assert not run_plan(native, 8 * 92)["fits"]
