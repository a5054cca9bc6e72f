"""The roofline: a product and its quantizers by hand, what limits which, and what the whole step gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_fp4.cli.planning.plan import main
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.planning.cost.overheads import quantizers
from megatron_fp4.planning.cost.roofline import OTHERS
from megatron_fp4.planning.report import run_plan
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.config import BackendName
from tests.planning.test_report import PIPELINE, twelve_billion


def section(gpu: str = "GB200") -> dict[str, Any]:
    config = replace(twelve_billion(), parallel=ParallelConfig(tp=4, pp=16, cp=2, schedule="interleaved_zero_bubble"))
    value: dict[str, Any] = run_plan(config, 4096, gpu, roofline=True)["roofline"]
    return value


def test_a_product_by_hand() -> None:
    """mlp.up of the 12B, 4,096 tokens, 5,120 x 5,120 of it on a rank: docs/planning.md goes through it."""
    roofline = section()
    assert roofline["tokens"] == 4096
    (up,) = [one for one in roofline["linears"] if one["linear"] == "mlp.up" and one["count"] == 23]
    fprop, dgrad, wgrad = up["products"]
    x, w, y = 4096 * 5120, 5120 * 5120, 4096 * 5120
    assert fprop["flops"] == 2 * 4096 * 5120 * 5120
    assert fprop["product_seconds"] == pytest.approx(fprop["flops"] / 10e15)
    assert fprop["moved"] == (x + w) * 0.5625 + 2 * y
    readings = 2 + 2  # for the largest magnitude, and for the copies
    assert fprop["quantized"] == pytest.approx(x * (readings / 2 + 0.5625) + w * (readings / 2 + 0.5625) / 23)
    assert wgrad["quantized"] == pytest.approx((x + y) * (readings / 2 + 0.5625))
    assert fprop["quantizer_seconds"] == pytest.approx(fprop["quantized"] / 8e12)
    assert fprop["share"] == pytest.approx(0.248, abs=1e-3)
    assert not fprop["by_memory"]
    assert not dgrad["by_memory"]
    assert wgrad["by_memory"], "FP32 gradients of a weight are read and written"
    assert wgrad["product_seconds"] == pytest.approx(((x + y) * 0.5625 + 8 * w) / 8e12)


def test_nothing_is_counted_twice_or_left_out() -> None:
    """FLOPs are those of the plan, bytes those of its term `quantizers`."""
    report = run_plan(replace(twelve_billion(tp=4), parallel=ParallelConfig(tp=4)), 4 * 92, roofline=True)
    products = [(one["count"], product) for one in report["roofline"]["linears"] for product in one["products"]]
    flops = sum(count * product["flops"] for count, product in products)
    kinds = report["flops"]["forward_per_token_by_kind"]
    linears = sum(value for kind, value in kinds.items() if kind in ("attention", "mlp", "mamba", "head"))
    assert flops == pytest.approx(3 * linears * 8192 / 4)
    microbatches = report["run"]["microbatches_per_step"]
    seconds = sum(count * product["quantizer_seconds"] for count, product in products) * microbatches / 0.5
    assert seconds == pytest.approx(report["time"]["terms"]["quantizers"])
    (here, *others) = report["roofline"]["machines"]
    assert here["gpu"] == "GB200"
    assert tuple(one["gpu"] for one in others) == OTHERS
    assert here["reached"]["quantizer_seconds"] * microbatches == pytest.approx(seconds)
    assert here["over_bf16"] > here["over_mxfp8"] > 1


def test_without_fp4_units_a_quantizer_gains_nothing() -> None:
    (h100, *_) = section("H100")["machines"]
    assert h100["over_bf16"] < 1


def test_kernels_that_make_each_copy_alone_read_more() -> None:
    """The Triton backend reads x once for each of its two copies; a weight's two copies are one."""
    fused = RankSettings(seq_length=128, backend=BackendName.transformer_engine)
    alone = replace(fused, backend=BackendName.triton)
    ours, theirs = (quantizers(256, 512, nvfp4_paper(), one) for one in (alone, fused))
    assert ours["x"].read - theirs["x"].read == 128 * 512 * 2
    assert ours["w"] == theirs["w"]
    assert all(ours[tensor].written == theirs[tensor].written for tensor in ("x", "dy", "w"))


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*PIPELINE, "train.global_batch=8", "train.total_tokens=1e6"]
    assert main([*run, "--roofline", "precision/recipe=nvfp4", "--gpu", "B200"]) == 0
    text = capsys.readouterr().out
    assert "Roofline of the linears on B200, a microbatch of 256 tokens on a rank" in text
    totals = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and "%" in line]
    assert totals == ["B200", "H100", "RTX_5090"]
    assert main([*run, "--roofline", "precision=bf16"]) == 0
    assert "fprop   bf16" in capsys.readouterr().out
    assert main([*run, "--search", "--roofline"]) == 2
