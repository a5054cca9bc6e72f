"""Quantization statistics every N steps: where they go, and that they change nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_fp4 import pretrain
from megatron_fp4.comm.mesh import Group
from megatron_fp4.precision import EmulatedBackend, Format, Operand, nvfp4_paper
from megatron_fp4.precision.backends import Copy, NonFiniteWatch, OperandOrigin
from megatron_fp4.precision.statistics_probe import StatisticsProbe
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import falsify_loss, make_trainer


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A run in this process installs its handlers."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def train(run: TinyRun) -> TinyRun:
    assert pretrain.main([*run.overrides, "train.stop_after_steps=4"]) == 0
    return run


def test_statistics_are_written_and_change_nothing(tmp_path: Path) -> None:
    unmeasured = train(tiny_run(tmp_path, "train.recompute=full"))
    measured = unmeasured.with_overrides("train.statistics_interval_steps=2", run_dir=tmp_path / "measured")
    train(measured)
    records = [[r for r in read_metrics(run.run_dir) if "loss" in r] for run in (unmeasured, measured)]
    for left, right in zip(*records, strict=True):
        numbers = ("loss", "grad_norm")
        assert [left[n] for n in numbers] == [right[n] for n in numbers], "measuring changed the run"
    left, right = unmeasured.state(4), measured.state(4)
    assert all(torch.equal(tensor, right[key]) for key, tensor in left.items()), "measuring changed the run"
    assert not (unmeasured.run_dir / "quantization").exists()

    logged = {r["step"]: r for r in read_metrics(measured.run_dir) if any(k.startswith("quantization/") for k in r)}
    assert sorted(logged) == [2, 4]
    linears = {key.split("/")[1] for key in logged[4] if key != "step"}
    quantized = {f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}
    assert linears == quantized, "block 1 and the head are in BF16"
    operands = {key.split("/")[2] for key in logged[4] if key != "step"}
    assert operands == {"fprop.x", "fprop.w", "dgrad.dy", "wgrad.x", "wgrad.dy"}, "dgrad.w has the codes of fprop.w"
    assert len(logged[4]) == 1 + 4 * 5 * 3
    assert 15 < logged[4]["quantization/blocks.0.mlp.up/fprop.x/snr_db"] < 25, "NVFP4 on activations: about 20 dB"
    table = (measured.run_dir / "quantization" / "step_00000004.txt").read_text().splitlines()
    assert len(table) == 1 + 4 * 5
    assert table[0].split()[:3] == ["operand", "SNR", "dB"]


def test_weights_are_measured_though_their_copies_are_kept(tmp_path: Path) -> None:
    """After a skipped update, and when a bad step is computed again, kept copies would pass by the probe."""
    spikes = [f"train.spikes.{name}={value}" for name, value in {"ratio": 1.5, "min_steps": 2, "max_skips": 5}.items()]
    settings = ("train.statistics_interval_steps=4", "train.stop_after_steps=4", *spikes)
    trainer, _ = make_trainer(tiny_run(tmp_path, *settings).overrides)
    losses = iter((1.0, 1.0, 9.0))  # step 3 is a spike: it is computed again for its bundle, and nothing is updated
    falsify_loss(trainer, lambda: next(losses, 1.0))
    assert trainer.fit() == 0
    assert trainer.position.skipped_steps == 1
    run_dir = tmp_path / "run"
    for table in ("spikes/step_00000003/quantization.txt", "quantization/step_00000004.txt"):
        assert "blocks.0.mlp.up/fprop.w" in (run_dir / table).read_text(), f"{table}: no line of a weight"


def origin(name: str, rows: int = 16) -> OperandOrigin:
    return OperandOrigin(name, "x", torch.arange(rows), torch.arange(32), Group.single(), seed=1, step=3)


def test_only_the_first_microbatch_is_measured() -> None:
    probe = StatisticsProbe(EmulatedBackend())
    copies = [Copy("fprop", nvfp4_paper().fprop.x, along=1)]
    probe.quantize(torch.full((16, 32), 8.0), origin("head"), copies)
    assert probe.take() == {}, "not recording"
    probe.recording = True
    for amax in (1.0, 2.0):
        probe.quantize(torch.full((16, 32), amax), origin("head"), copies)
    report = probe.take()
    assert {name: stats.amax for name, stats in report.items()} == {"head/fprop.x": 1.0}
    probe.quantize(torch.full((16, 32), 4.0), origin("head"), copies)
    assert probe.take()["head/fprop.x"].amax == 4.0, "the next step that is due begins anew"


def test_a_tensor_with_nan_is_left_to_the_runs_own_rule() -> None:
    """With train.nonfinite=skip the step is skipped; the statistics must not end the run."""
    watch = NonFiniteWatch()
    probe = StatisticsProbe(EmulatedBackend(watch=watch))
    probe.recording = True
    probe.quantize(torch.full((16, 32), float("nan")), origin("head"), [Copy("fprop", Operand(Format.nvfp4), along=1)])
    assert probe.take() == {}
    assert [event.name for event in watch.take()] == ["head"]
