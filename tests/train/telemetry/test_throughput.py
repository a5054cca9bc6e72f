"""Rates by hand: a GEMM runs as fast as its slower operand, and a step's seconds are shared by its devices."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.models.count import Flops
from megatron_fp4.precision.operand import Format, Operand
from megatron_fp4.precision.recipes import nvfp4_paper
from megatron_fp4.precision.spec import Fprop, LinearPrecision
from megatron_fp4.precision.table import PrecisionTable, Row
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.telemetry.peaks import GPUS, find_gpu, flops_by_rate, rate_of
from megatron_fp4.train.telemetry.throughput import Throughput

NVFP4 = nvfp4_paper(rht=False, stochastic=False)
MIXED = LinearPrecision(Fprop(Operand(Format.mxfp8), Operand(Format.nvfp4)), NVFP4.dgrad, LinearPrecision().wgrad)
"""Fprop mxfp8 x nvfp4, Dgrad nvfp4, Wgrad bf16."""
TABLE = PrecisionTable((Row("a", NVFP4, ""), Row("b", MIXED, ""), Row("c", LinearPrecision(), "")))
FLOPS = Flops({"a": 100.0, "b": 10.0, "c": 1.0}, attention=0.5, scan=0.25)


@pytest.mark.parametrize(
    ("formats", "rate"),
    [
        ("nvfp4", "fp4"),
        ("nvfp4/bf16", "bf16"),
        ("bf16/nvfp4", "bf16"),
        ("mxfp8/nvfp4", "fp8"),
        ("nvfp4/mxfp8", "fp8"),
        ("mxfp4/nvfp4", "fp4"),
        ("fp8_block/bf16", "bf16"),
    ],
)
def test_a_mixed_gemm_runs_at_the_slower_rate(formats: str, rate: str) -> None:
    assert rate_of(formats) == rate


def test_block_scales_are_applied_by_blackwell_only() -> None:
    assert [rate_of("mxfp8", GPUS[name]) for name in ("H100", "B200")] == ["bf16", "fp8"]
    assert [rate_of("fp8_block", GPUS[name]) for name in ("H100", "B200")] == ["fp8", "fp8"]
    assert flops_by_rate(FLOPS, TABLE, GPUS["H100"]) == {"fp4": 0.0, "fp8": 0.0, "bf16": FLOPS.training}


def test_flops_by_rate() -> None:
    """FP4: the three GEMMs of a and Dgrad of b. FP8: Fprop of b. BF16: Wgrad of b, all of c, thrice what is no GEMM."""
    expected = {"fp4": 3 * 100.0 + 10.0, "fp8": 10.0, "bf16": 10.0 + 3 * 1.0 + 3 * 0.75}
    assert flops_by_rate(FLOPS, TABLE) == expected
    assert sum(expected.values()) == FLOPS.training


def test_rates_of_a_step() -> None:
    """1000 tokens in 4 s on 2 devices: 125 tokens/s each. One token is 335.25 FLOPs (3 * 111.75)."""
    throughput = Throughput(to_run_config(compose_config(["model=gpt_tiny"])), 2, torch.device("cpu"))
    assert "mfu" not in throughput.metrics(phases_of_a_step(), TABLE, 1000), "the peak of a CPU is not known"
    throughput.gpu, throughput._flops = GPUS["GB300"], FLOPS
    rates = throughput.metrics(phases_of_a_step(), TABLE, 1000)
    assert rates["tokens_per_second"] == pytest.approx(250.0)
    assert rates["step_seconds"] == pytest.approx(4.0)
    assert rates["data_wait_seconds"] == pytest.approx(0.5)
    assert rates["tflops"] == pytest.approx(125 * 335.25 / 1e12)
    assert rates["mfu"] == pytest.approx(125 * 335.25 / 2500e12)
    assert rates["mfu_mixed"] == pytest.approx(125 * (310 / 15000e12 + 10 / 5000e12 + 15.25 / 2500e12))


def test_rates_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 s of steps within 5 s: 200 tokens a second, four fifths of the time; a lap is never shorter than its step."""
    throughput = Throughput(to_run_config(compose_config(["model=gpt_tiny"])), 2, torch.device("cpu"))
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    for lap, wall_seconds in ((5.0, 5.0), (3.0, 4.0)):
        phases = phases_of_a_step()
        monkeypatch.setattr(phases, "lap", lambda lap=lap: lap)
        rates = throughput.metrics(phases, TABLE, 1000)
        assert rates["wall_time"] == 1.7e9
        assert rates["wall_seconds"] == pytest.approx(wall_seconds)
        assert rates["wall_tokens_per_second"] == pytest.approx(1000 / wall_seconds)
        assert rates["goodput"] == pytest.approx(4 / wall_seconds)


def phases_of_a_step() -> Phases:
    """4 s of a step, and 7 s beside it that are none of its own."""
    phases = Phases(torch.device("cpu"))
    phases._seconds = {"data": 0.5, "forward_backward": 3.0, "update": 0.5, "log": 5.0, "between": 2.0}
    return phases


def test_a_gpu_is_known_by_its_drivers_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA B200": "B200", "NVIDIA GB200": "GB200", "H100-SXM5-80GB": "H100"}
    assert {name: find_gpu(name) for name in names} == {name: GPUS[key] for name, key in names.items()}
    assert find_gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition") is GPUS["RTX_PRO_6000"]
    assert find_gpu("NVIDIA GeForce RTX 5090") is GPUS["RTX_5090"]
    assert find_gpu("NVIDIA GeForce RTX 4090") is None


def test_the_peaks_are_said_with_their_source() -> None:
    config, cuda = to_run_config(compose_config(["model=gpt_tiny"])), torch.device("cuda", 3)
    with mock.patch("torch.cuda.get_device_name", lambda device: "NVIDIA B200" if device == cuda else "other"):
        throughput = Throughput(config, 2, cuda)
    assert throughput.gpu is GPUS["B200"]
    assert (
        throughput.describe()
        == "MFU against B200: bf16 2250, fp8 4500, fp4 9000 TFLOP/s dense (NVIDIA DGX B200 data sheet / 8)"
    )
    unknown = Throughput(config, 2, torch.device("cpu"))
    unknown._flops = FLOPS
    assert unknown.describe() == "model FLOPs per token: 335.2; no peak is known for this device, so no MFU"


def test_fp4_operands_run_as_bf16_where_there_is_no_fp4_unit() -> None:
    assert GPUS["H100"].rate("fp4") == GPUS["H100"].rate("bf16") == 989e12
