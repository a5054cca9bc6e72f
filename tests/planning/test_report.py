"""The planner: schedules, shapes, and the report of the paper's 12B."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.cli.planning import rehearse
from megatron_fp4.cli.planning.plan import main
from megatron_fp4.cli.render.plan import render
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.ramp import BatchRampConfig
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.count import count_flops
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.optim import OptimConfig
from megatron_fp4.pipeline.schedules import SCHEDULES
from megatron_fp4.planning.alignment import alignment_warnings
from megatron_fp4.planning.cost.hardware import Assumptions
from megatron_fp4.planning.idle import BUBBLES, PipelineShape, imbalance
from megatron_fp4.planning.report import run_plan
from megatron_fp4.planning.scaling import strong_scaling
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.config import BackendName, ComputeDtype, PrecisionConfig, Rule, Switch
from megatron_fp4.precision.plan import base_table
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.telemetry.peaks import GPUS, flops_by_rate
from tests.models.test_count import load

PAPER = PrecisionConfig(
    backend=BackendName.emulated,
    recipes={"nvfp4": nvfp4_paper()},
    rules=[
        Rule(match="head"),
        Rule(blocks="first:2"),
        Rule(blocks="last:8"),
        Rule(use="nvfp4"),
    ],
)


def test_schedules() -> None:
    """Bubbles by the literature's formulas; and every schedule that the engine has can be planned."""
    assert set(BUBBLES) == set(SCHEDULES)
    assert PipelineShape("1f1b", 4, 12).bubble == pytest.approx(3 / 15)
    assert PipelineShape("interleaved_1f1b", 4, 12, 2).bubble == pytest.approx(3 / 27)
    assert PipelineShape("zbv", 4, 8, 2).bubble == 0.0
    assert all(PipelineShape(name, 1, 7).bubble == 0.0 for name in SCHEDULES)
    assert imbalance([1.0, 1.0, 2.0]) == pytest.approx(1.5)


def test_alignment_of_the_12b_at_tp_8() -> None:
    """22656 / 8 = 177 * 16: Transformer Engine cannot contract it; at tp 4 it can, outside the fast path."""
    linears = model_linears(load("nemotron_h_12b"))
    table = base_table(PAPER, linears)
    by_tp = {tp: alignment_warnings(linears, table, tp=tp, tokens=8192) for tp in (1, 4, 8)}
    assert by_tp[1] == []
    assert [(w["severity"], "5664" in w["text"]) for w in by_tp[4]] == [("slow", True)]
    assert [(w["severity"], "2832" in w["text"]) for w in by_tp[8]] == [("error", True)]
    assert "22656 / tp 8" in by_tp[8][0]["text"]
    assert "dgrad" in by_tp[8][0]["text"]
    odd_tokens = alignment_warnings(linears, table, tp=1, tokens=8200)
    assert {w["severity"] for w in odd_tokens} == {"error"}


def twelve_billion(**parallel: int) -> RunConfig:
    return RunConfig(
        model=load("nemotron_h_12b"),
        precision=PAPER,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(seq_length=8192),
        train=TrainConfig(global_batch=736, total_tokens=1e13),
        optim=OptimConfig(),
    )


def test_plan_of_the_12b() -> None:
    report = run_plan(twelve_billion(tp=8, pp=2), num_gpus=1472, gpu="GB200", assumptions=Assumptions(efficiency=0.4))
    assert report["run"]["dp"] == 92
    assert report["run"]["tokens_per_step"] == 6_029_312
    assert report["parameters"]["total"] == 12_310_001_152
    assert report["parameters"]["quantized"] / 1e9 == pytest.approx(9.07, abs=0.01)
    time = report["time"]
    assert time["compute"]["step_seconds"] > time["compute"]["step_seconds_at_peak"]
    assert 1.0 < time["speed_up_over_bf16"] < time["speed_up_limit"]
    share = report["precision"][0]["quantized_share_of_flops"]
    assert time["speed_up_over_bf16"] == pytest.approx(1 / (1 - share + share / 4))  # Amdahl, FP4 = 4 x BF16
    assert len(report["memory_per_rank"]["pipeline_ranks"]) == 2
    text = render(report)
    assert "12,310,001,152" in text
    assert "22656 / tp 8" in text
    assert json.loads(json.dumps(report))["run"]["gpus"] == 1472


def test_gpus_without_fp4_are_not_faster() -> None:
    report = run_plan(twelve_billion(tp=8), num_gpus=8 * 46, gpu="H100")
    assert report["time"]["speed_up_over_bf16"] == pytest.approx(1.0)
    assert "no FP4 unit" in render(report)


def test_settings_without_effect_are_noted() -> None:
    config = twelve_billion(tp=8)
    config = replace(config, train=replace(config.train, statistics_interval_steps=10))
    report = run_plan(replace(config, precision=PrecisionConfig(use="bf16")), num_gpus=8 * 92)
    assert (
        "\nnote: train.statistics_interval_steps measures residual stream and zero gradients only: no GEMM of this run"
        in render(report)
    )
    assert run_plan(config, num_gpus=8 * 92)["notes"] == []


def test_time_follows_the_phases() -> None:
    """A forward switch to BF16 at 82% costs what its GEMMs cost at the slower rate, for the rest of the run only."""
    config = twelve_billion(tp=8)
    plain = run_plan(config, num_gpus=8 * 92)
    switch = Switch(at_fraction=0.82, gemms=["fprop"])
    switched = run_plan(replace(config, precision=replace(PAPER, switch=[switch])), num_gpus=8 * 92)
    assert len(switched["precision"]) == 2
    assert switched["time"]["step_seconds"] == plain["time"]["step_seconds"], "of the first phase"
    share = plain["precision"][0]["quantized_share_of_flops"]
    slower = share / 3 * (1 - 1 / 4) * plain["time"]["speed_up_over_bf16"]  # relative to a plain step
    assert switched["time"]["compute"]["days"] / plain["time"]["compute"]["days"] == pytest.approx(
        1 + 0.18 * slower, rel=0.02
    )
    recomputed = run_plan(replace(config, train=replace(config.train, recompute=Recompute.full)), num_gpus=8 * 92)
    assert 1.25 < recomputed["time"]["compute"]["step_seconds"] / plain["time"]["compute"]["step_seconds"] < 1.34


def test_a_batch_ramp_is_planned() -> None:
    """Small steps have fewer microbatches, so more of their time is idle; the steps and tokens are those of the run."""
    config = twelve_billion(tp=8, pp=2)
    ramp = BatchRampConfig(start_samples=184, increment_samples=184, ramp_samples=600_000_000)
    ramped = replace(config, train=replace(config.train, batch_ramp=ramp))
    plain, report = (run_plan(one, num_gpus=1472) for one in (config, ramped))
    assert plain["batch_ramp"] == []
    assert [stage["samples"] for stage in report["batch_ramp"]] == [184, 368, 552, 736]
    assert [stage["microbatches"] for stage in report["batch_ramp"]] == [2, 4, 6, 8]
    assert [round(stage["bubble"], 3) for stage in report["batch_ramp"]] == [0.333, 0.2, 0.143, 0.111]
    assert report["batch_ramp"][1]["from_tokens"] == 8192 * 200_000_000 + 8192 * (-200_000_000 % 184)
    assert report["run"]["steps"] == sum(stage["steps"] for stage in report["batch_ramp"]) == ramped.total_steps
    assert report["time"]["step_seconds"] == plain["time"]["step_seconds"], "of the last stage"
    idle = [(1 - 1 / 9) / (1 - stage["bubble"]) for stage in report["batch_ramp"]]
    parts = [stage["steps"] * stage["samples"] for stage in report["batch_ramp"]]
    mean = sum(part * factor for part, factor in zip(parts, idle, strict=True)) / sum(parts)
    assert report["time"]["compute"]["days"] / plain["time"]["compute"]["days"] == pytest.approx(mean, rel=1e-3)
    assert "steps of 368 samples, 4 microbatch(es), idle 20.0%" in render(report)


def test_flops_by_rate_add_up() -> None:
    config = load("nemotron_h_12b")
    flops = count_flops(config, 8192)
    rates = flops_by_rate(flops, base_table(PAPER, model_linears(config)))
    assert sum(rates.values()) == pytest.approx(flops.training)
    assert GPUS["GB200"].rate("fp4") == 4 * GPUS["GB200"].rate("bf16")  # table 1 of the paper
    assert GPUS["GB300"].rate("fp4") == 6 * GPUS["GB300"].rate("bf16")


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"tp \* pp \* cp \* dp"):
        run_plan(twelve_billion(tp=8, pp=2), num_gpus=100)
    with pytest.raises(ValueError, match="known: H100"):
        run_plan(twelve_billion(), gpu="GB2OO")


@pytest.mark.parametrize(("schedule", "order", "formula"), [("zbv", 3 / 51, 0.0), ("dualpipev", 1 / 9, 1 / 9)])
def test_idle_time_is_that_of_the_order(schedule: str, order: float, formula: float) -> None:
    """The papers' formula for ZB-V is not that of the order that torch runs."""
    config = replace(twelve_billion(tp=4, pp=4), parallel=ParallelConfig(tp=4, pp=4, schedule=schedule))
    section = run_plan(config, num_gpus=16 * 92)["pipeline"]
    assert section["bubble"] == pytest.approx(order)
    assert section["bubble_by_formula"] == pytest.approx(formula)
    assert "timeline" not in section, "thousands of entries in a report that did not ask for them"


PIPELINE = ["model=gpt_tiny", "model.vocab_size=1024", "data.seq_length=256", "train.micro_batch=1"]


def test_drawn_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """1F1B by hand: a cell in the wrong slot, or microbatches numbered from 1 on the last stage."""
    overrides = [*PIPELINE, "train.global_batch=3", "parallel.pp=2", "--schedule"]
    assert main(overrides) == 0
    text = capsys.readouterr().out
    assert "  rank 0 stage 0 F0 F1 .  .  B0 -- F2 B1 -- .  B2 --\n" in text
    assert "  rank 1 stage 1 .  F0 B0 -- F1 B1 -- F2 B2 -- .  .\n" in text
    assert "idle 25.0% by the order of actions; 25.0% by the formula (p - 1) / (m + p - 1)" in text
    assert "F forward; B -- backward; . idle" in text
    assert main([*overrides, "--json"]) == 0
    timeline = json.loads(capsys.readouterr().out)["pipeline"]["timeline"]
    assert timeline[1][0] == {"kind": "F", "stage": 1, "microbatch": 0, "units": 1, "begin": 1, "end": 2}
    assert main([*PIPELINE, "--schedule"]) == 2
    assert "no effect with parallel.pp = 1" in capsys.readouterr().err


def test_wide_schedule_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Letters for the stages of a rank; lines as long as a page, and the note that there is more."""
    assert main([*PIPELINE, "train.global_batch=8", "parallel.pp=2", "parallel.schedule=zbv", "--schedule"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("  rank ")]
    assert [row[:18] for row in rows] == ["  rank 0 a=0 b=3 F", "  rank 1 a=1 b=2 ."]
    assert all(len(row) <= 120 for row in rows)
    assert any(line.startswith("  slots 1 to 25 of 49;") for line in lines)
    assert any("W: of weights" in line for line in lines)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=hybrid_tiny", "model.vocab_size=1024", "data.seq_length=256", "train.global_batch=8"]
    assert main([*overrides, "--json", "--gpus", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["dp"] == 2
    assert main([*overrides, "--gpu", "B200"]) == 0
    assert "Memory per rank" in capsys.readouterr().out
    assert main([*overrides, "--gpus", "three"]) == 2
    assert main(["model=hybrid_tinny"]) == 2
    assert "did you mean 'hybrid_tiny'" in capsys.readouterr().err


def test_exit_codes_and_first_message(capsys: pytest.CaptureFixture[str]) -> None:
    """0 fits, 1 does not (and the first lines name layouts that do), 2 refused; JSON has the same facts."""
    paper = ["experiment=paper_12b_10t", "precision.backend=emulated"]
    assert main(paper) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("THIS LAYOUT CANNOT RUN: 297 GB are 1.60 x the 186 GB of the GPU")
    sizes = [f"{gpu}_12b_{num_gpus}" for gpu in ("b200", "gb200", "h100") for num_gpus in (2944, 4096)]
    assert [line.split()[0] for line in lines[2:8]] == [f"parallel={size}" for size in sizes]
    assert main([*paper, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False
    assert [warning["about"] for warning in report["warnings"]] == ["memory", "backend", "kernels"]
    assert len(report["shipped_layouts"]) == 6
    assert set(report["assumptions"]) > {"gpu", "sources", "efficiency", "restart_seconds"}
    native = ["precision.backend=transformer_engine", "parallel.tp=8", "--gpus", "736"]
    assert main([*paper[:1], *native]) == 1
    assert "must be a multiple of 32 for Transformer Engine's kernels" in capsys.readouterr().out.splitlines()[0]
    for refused in (["--gpus", "0"], ["--assume", "rails=x"], ["--memory-share", "2"], ["--plot", "x.txt"], ["--gpu"]):
        assert main([*paper, *refused]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main([*paper, "--search", "--schedule", "--gpus", "8"]) == 2
    for number in ("0", "-3", "8.5"):
        with pytest.raises(SystemExit, match="2"):
            rehearse.main([*paper, f"--gpus={number}"])
        assert main([*paper, f"--gpus={number}"]) == 2
        assert capsys.readouterr().err.count(f"argument --gpus: '{number}' is not a whole number above 0") == 2


def test_only_what_stops_a_run_is_a_reason_against_it() -> None:
    """Saves that take longer than their interval, and shapes that another backend refuses, are warnings."""
    config = twelve_billion(tp=8)
    config = replace(config, train=replace(config.train, save_interval_steps=1, micro_batch=8))
    report = run_plan(config, 8 * 92, "H100", Assumptions(storage_gb_per_second=1.0))
    assert {one["about"] for one in report["warnings"] if one["severity"] == "error"} == {"memory", "shapes", "saves"}
    assert [text.split("; ")[1] for text in report["obstacles"]] == [
        "raise tp, pp, cp or dp, or recompute, or see --search"
    ]
    assert not report["fits"]


def test_what_hardly_fits_is_said() -> None:
    config = twelve_billion(tp=8)
    needed = run_plan(config, 8 * 92)["memory_per_rank"]["largest"]
    share = 0.99 * needed / 186e9
    (tight,) = [
        one
        for one in run_plan(config, 8 * 92, assumptions=Assumptions(memory_share=share))["warnings"]
        if one["about"] == "memory"
    ]
    assert tight["severity"] == "tight"
    assert f"--memory-share {share:g} would stop there" in tight["text"]
    assert run_plan(config, 8 * 92, assumptions=Assumptions(memory_share=share))["fits"]


def test_rates_that_the_backend_does_not_reach_are_a_warning() -> None:
    def about_backend(config: RunConfig, gpu: str) -> list[str]:
        return [one["text"] for one in run_plan(config, 8 * 92, gpu)["warnings"] if one["about"] == "backend"]

    config = twelve_billion(tp=8)
    native = replace(config, precision=replace(PAPER, backend=BackendName.triton))
    assert about_backend(config, "GB200")[0].startswith("backend emulated multiplies in BF16")
    assert about_backend(native, "GB200") == []
    assert "no FP4 unit: GEMMs in nvfp4" in about_backend(native, "H100")[0]
    assert about_backend(replace(config, precision=PrecisionConfig(use="bf16")), "GB200") == []
    wide = replace(config, precision=replace(PAPER, compute_dtype=ComputeDtype.fp32))
    assert "multiplies in FP32" in about_backend(wide, "GB200")[0]


def test_search_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*PIPELINE, "train.global_batch=8", "--search", "--gpus", "4"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "Batch: 8 = 2^3, so dp may be 1, 2, 4" in text
    assert text.splitlines()[-1].startswith("  parallel.tp=")
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["fitting"][0]["overrides"][0].startswith("parallel.tp=")
    assert main([*command, "--memory-share", "1e-6"]) == 1


def test_a_plan_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing outside is needed; black is the ink of the screen; and what is drawn is in the JSON."""
    run = [*PIPELINE, "train.global_batch=8", "train.total_tokens=1e6", "parallel.pp=2", "parallel.schedule=zbv"]
    assert main([*run, "--plot", str(tmp_path / "plan.html"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    page = (tmp_path / "plan.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page.replace("rdf:resource", ""))
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "minmax(min(100%, 480px), 1fr)" in page
    assert "#000000" not in page
    assert "currentColor" in page
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(plots) == 4
    assert "rank 0" in page, "the text of the plan stands below"
    assert {work["kind"] for work in report["plot"]["timeline"][0]} == {"F", "B", "W"}
    assert [point["gpus"] for point in report["plot"]["scaling"]] == [2, 4, 8, 16]
    assert "timeline" not in report["pipeline"]


def test_a_plan_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strong scaling is over every dp that the batch takes."""
    run = [*PIPELINE, "train.global_batch=8", "train.total_tokens=1e6", "parallel.pp=2"]
    assert main([*run, "--plot", str(tmp_path / "folder" / "plan.png")]) == 0
    assert (tmp_path / "folder" / "plan.png").read_bytes().startswith(b"\x89PNG")
    config = to_run_config(compose_config(run))
    points = strong_scaling(config, "GB200", Assumptions())
    assert [point["gpus"] for point in points] == [2, 4, 8], "with one microbatch two stages have no 1F1B"
    for point in points:
        assert point["days"] == run_plan(config, point["gpus"])["time"]["days"], "as a plan of that world"
    capsys.readouterr()
    assert main([*run, "--plot", "plan.svg"]) == 2
    (tmp_path / "file").touch()
    assert main([*run, "--plot", str(tmp_path / "file" / "plan.png")]) == 2, "a folder that cannot be made"
    assert capsys.readouterr().err.count("error: ") == 2
    assert main([*run, "--micro-batch", "1"]) == 2
    assert "--micro-batch belongs to --search" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_exist_is_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=quickstart", "data.tokenizer=nowhere/tokenizer.model"]) == 2
    assert "error: tokenizer nowhere/tokenizer.model does not exist" in capsys.readouterr().err
