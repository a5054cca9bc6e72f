"""A step on the fake device does what the step does: what it copies, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.parity import parity_case
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


def test_what_crosses_is_counted() -> None:
    """The five tensors of a batch go up; every crossing has its file and line."""
    case = parity_case(seq_length=64, train={"global_batch": 8})
    (report,) = rehearse_all([(case.config, 4, "0,3")])
    for rank in report["ranks"]:
        assert rank["copies_in"]["train/inputs.py:40"] == 5
        assert all(":" in place for place in (*rank["copies_in"], *rank["read_backs"]))
