"""Training by the interpreted kernels on a CPU: the run that a user would start on a GPU, three steps of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer

STEPS = 3
SETTINGS = (
    "model.num_layers=1",
    "train.micro_batch=4",
    f"train.stop_after_steps={STEPS}",
    "precision.keep_bf16.last=0",
)


def losses(run: TinyRun) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step, in this process."""
    trainer, _ = make_trainer(run.overrides)
    trainer.fit()
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run.run_dir) if "loss" in record]


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_losses_are_those_of_the_emulation(compute_dtype: str, tmp_path: Path) -> None:
    """fp32: the proof mode, whose sums have no order, so that equal operands give equal losses to the last bit.

    bf16: products by the kernels' own sums. gpt_tiny's linears are all quantized, Wgrad with transform and noise.
    """
    runs = {}
    for backend in ("emulated", "triton"):
        settings = (*SETTINGS, f"precision.backend={backend}", f"precision.compute_dtype={compute_dtype}")
        base = tiny_run(tmp_path, "precision/recipe=nvfp4", "precision.use=nvfp4", "train.check_gemms=true")
        runs[backend] = losses(base.with_overrides(*settings, run_dir=tmp_path / backend))
    assert len(runs["triton"]) == STEPS
    if compute_dtype == "fp32":
        assert runs["triton"] == runs["emulated"]
    else:
        for ours, expected in zip(runs["triton"], runs["emulated"], strict=True):
            assert ours == pytest.approx(expected, rel=2e-3)
