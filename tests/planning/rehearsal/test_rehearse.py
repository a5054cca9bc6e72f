"""A step on the fake device does what the step does: what it copies, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from tests.helpers.rehearsed import rehearse_all

ROOT = Path(__file__).resolve().parents[3]
TINY = ["experiment=quickstart", "model.vocab_size=256", "data.seq_length=64", "train.global_batch=16"]
PLANTS = {
    "a label left on the host": (
        "from megatron_fp4.train import step, inputs\n"
        "make = step.make_inputs\n"
        "step.make_inputs = lambda batch, *rest: make(batch, *rest)._replace(labels=batch.labels)\n",
        "layers/loss.py:",
    ),
    "a gradient made on the host, in a backward pass": (
        "import torch\n"
        "from megatron_fp4.precision import linear_op\n"
        "gradient = linear_op._weight_gradient\n"
        "def planted(call, weight, dy, x):\n"
        "    weight.main_grad.add_(torch.zeros(weight.shape))\n"
        "    return gradient(call, weight, dy, x)\n"
        "linear_op._weight_gradient = planted\n",
        "precision/linear_op.py:",
    ),
}


def files(counts: dict[str, int]) -> dict[str, int]:
    """Counts by file, of counts by file and line."""
    by_file: Counter[str] = Counter()
    for place, count in counts.items():
        by_file[place.split(":")[0]] += count
    return dict(by_file)


@pytest.mark.parametrize("plant", PLANTS)
def test_devices_are_not_mixed(plant: str) -> None:
    """What a GPU would refuse is refused with one sentence, the file and the line; also where an exception would end
    the process without a word."""
    code, place = PLANTS[plant]
    arguments = ["rehearse", *TINY, "parallel.tp=2", "--ranks", "0"]
    run = f"{code}import sys\nfrom megatron_fp4.cli.main import main\nsys.argv[1:] = {arguments}\nmain()\n"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith(f"error: {place}"), done.stderr[-2000:]
    assert "two devices" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_step_copies_its_batch_and_reads_its_message() -> None:
    """Nothing else crosses between host and device: a read-back drains the queue, a copy of a constant waits for it."""
    settings = [
        *TINY,
        "train.statistics_interval_steps=1",
        "precision.compile=false",
        "precision.keep_bf16.last=0",
        "model.num_layers=2",
    ]
    settings += ["parallel.tp=2", "train.recompute=full", "train.label_smoothing=0.1", "model.dropout=0.1"]
    hybrid = ["model=hybrid_tiny", "model.pattern='M*-'", "model.num_layers=3", "parallel.tp=1", "parallel.cp=2"]
    hybrid += ["data.reset_documents=true", "precision/recipe=nvfp4_signs_per_step", "train.nonfinite=stop"]
    configs = [to_run_config(compose_config([*settings, *more])) for more in ([], hybrid)]
    for report in rehearse_all([(config, 4, "3") for config in configs], evaluated=5):
        for rank in report["ranks"]:
            assert files(rank["copies_in"]) == {"train/inputs.py": 1}, "the batch is a copy by itself"
            assert files(rank["read_backs"]) == {"train/message.py": 1}, "something is read beside the message"

            evaluation = rank["evaluation"]
            assert files(evaluation["copies_in"]) == {"train/inputs.py": 5}, "each batch is a copy by itself"
            assert files(evaluation["read_backs"]) == {"train/evaluation/heldout.py": 1}, (
                "the sums, and none in between"
            )
            assert files(evaluation["copies_out"]) == {"train/evaluation/heldout.py": 2}, (
                "a vote on the way every 4 batches"
            )

            first, later = rank["first_save"], rank["later_save"]
            assert files(first["read_backs"]) == {"checkpoint/write.py": 1}, "the host waits once for all copies"
            optimizer = rank["memory"]["kinds"]["optimizer"]["measured"]
            assert first["bytes_out"] == first["pinned_bytes"] == pytest.approx(optimizer, rel=0.02)
            assert later["pinned_bytes"] == 0, "buffers are made anew"
            assert first["peak"] < rank["memory"]["peak"], "a save takes memory of the device"

            measured = rank["measured_step"]
            assert files(measured["copies_in"]) == {"train/inputs.py": 1}
            logged = {"optim/clip.py": 1, "train/telemetry/stragglers.py": 1, "precision/statistics_probe.py": 1}
            assert files(measured["read_backs"]) == {"train/message.py": 1, **logged}, "one for all statistics"
