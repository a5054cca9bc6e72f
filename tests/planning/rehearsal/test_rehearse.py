"""A step on the fake device does what the step does: what it copies, what it refuses."""

from __future__ import annotations

import subprocess
import sys
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
    settings = [*TINY, "precision.compile=false", "precision.keep_bf16.last=0", "model.num_layers=2"]
    settings += ["parallel.tp=2", "train.recompute=full", "train.label_smoothing=0.1", "model.dropout=0.1"]
    hybrid = ["model=hybrid_tiny", "model.pattern='M*-'", "model.num_layers=3", "parallel.tp=1", "parallel.cp=2"]
    hybrid += ["data.reset_documents=true", "precision/recipe=nvfp4_signs_per_step", "train.nonfinite=stop"]
    configs = [to_run_config(compose_config([*settings, *more])) for more in ([], hybrid)]
    for report in rehearse_all([(config, 4, "0,3") for config in configs]):
        for rank in report["ranks"]:
            (copied, copies), (read, reads) = *rank["copies_in"].items(), *rank["read_backs"].items()
            assert copied.startswith("train/inputs.py:"), "the batch is a copy by itself"
            assert read.startswith("train/message.py:"), "something is read beside the message"
            assert copies == reads == 1
