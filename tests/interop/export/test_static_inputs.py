"""A run with static scales of its inputs leaves with them, and a reader of the file computes its logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_fp4.cli.checkpoint import main
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.train.open import open_trained
from tests.helpers.tiny_run import TinyRun
from tests.interop.export.conftest import llama_run
from tests.interop.export.test_coded import TOKENS, modules_of
from tests.train.in_process import make_trainer


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    options = ("precision=nvfp4_forward_static", "precision.calibration_batches=2")
    run = llama_run(tmp_path_factory.mktemp("static"), *options)
    run = TinyRun(run.run_dir, tuple(one for one in run.overrides if one != "precision=nvfp4"))
    make_trainer(run.overrides)[0].fit()
    return run


def test_the_scales_of_training_are_written(static: TinyRun, tmp_path: Path) -> None:
    trained = open_trained(load_run_config(static.run_dir))
    scale = {name: linear.input_amax for name, linear in linears_of(trained.engine.stages[0]).items()}
    for form, name in (("compressed-tensors", "input_global_scale"), ("modelopt", "input_scale")):
        folder = tmp_path / form
        assert main(["export", str(static.run_dir), "--to", str(folder), "--format", form, "--dtype", "fp32"]) == 0
        state = load_file(folder / "model.safetensors")
        for linear in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"):
            amax = scale[f"blocks.0.{linear}"]
            assert amax is not None
            expected = 2688 / amax if form == "compressed-tensors" else amax / 2688
            for module in modules_of(linear):
                assert state[f"{module}.{name}"].item() == pytest.approx(expected.item(), rel=1e-6)
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "compressed-tensors", dtype=torch.bfloat16)
    positions, zeros = torch.arange(TOKENS.shape[1]).expand_as(TOKENS), torch.zeros_like(TOKENS)
    with torch.no_grad():
        theirs = model(TOKENS).logits.float()
        ours = {}
        for precision in ("same", "bf16"):
            trained.assign(trained.table(precision))
            logits = trained.engine.stages[0](TOKENS, zeros, positions, zeros)
            ours[precision] = logits.view(*TOKENS.shape, -1).float()
    to_served, to_high = (float((theirs - one).square().mean().sqrt()) for one in ours.values())
    assert to_served < 0.4 * to_high, "what BF16 leaves of sums moves few codes; without the scales it is all of them"
    assert to_served < 0.04 * float(ours["same"].std())


def test_measured_anew_they_would_not_be_those_of_training(
    static: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--format", "modelopt", "--activations", "256", "--to", str(tmp_path / "m")]
    assert main(["export", str(static.run_dir), *arguments]) == 2
    assert "the run multiplied with static scales of its inputs" in capsys.readouterr().err
