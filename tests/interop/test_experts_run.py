"""A run with experts leaves for transformers, and another begins with what it left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_fp4.cli.checkpoint import main
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.train.open import open_trained
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import VOCABULARY, tiny_run
from tests.interop.test_families import our_logits
from tests.train.in_process import make_trainer

EXPERTS = (
    "model=hybrid_tiny", "model.pattern='ME*E'", "model.num_layers=4", "model.moe.num_experts=8", "model.moe.top_k=2",
    "model.moe.ffn_hidden=32", "model.moe.shared_ffn_hidden=64", "model.moe.latent=32", "model.moe.scaling_factor=2.5",
    "model.moe.expert_bias=true", "model.moe.bias_rate=0.001", "precision.compute_dtype=fp32",
)  # fmt: skip


def test_out_to_transformers_and_in_again(tmp_path: Path) -> None:
    """The load of the global batch before is no weight: the second run begins without one."""
    run = tiny_run(tmp_path, *EXPERTS, "train.stop_after_steps=2", "train.log_interval_steps=2")
    make_trainer(run.overrides)[0].fit()
    assert {"experts/max_vio/blocks.1", "experts/entropy/blocks.3", "experts/dead"} <= {
        key for record in read_metrics(run.run_dir) for key in record
    }
    folder = tmp_path / "out"
    assert main(["export", str(run.run_dir), "--to", str(folder), "--dtype", "fp32"]) == 0
    transformers = pytest.importorskip("transformers")
    other, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    bias = other.model.layers[1].mixer.gate.e_score_correction_bias
    assert bias.abs().max() == pytest.approx(0.002), "two steps of bias_rate"
    tokens = torch.arange(2 * 21).view(2, 21) * 5 % VOCABULARY
    (model,) = open_trained(load_run_config(run.run_dir)).engine.stages
    assert isinstance(model, Decoder)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model, tokens), other(tokens).logits, rtol=1e-5, atol=1e-5)

    second = run.with_overrides(
        f"train.init_from={folder}", "model.moe.global_loss=0.001", "train.stop_after_steps=1", run_dir=tmp_path / "two"
    )
    trainer, _ = make_trainer(second.overrides)
    trained = run.state(2)
    for shard in trainer.run.optimizer.state_shards():
        expected = trained.get(f"master/{shard.name}", torch.zeros(8))
        assert torch.equal(shard.tensors["master"], expected[shard.where.slices]), shard.name
    trainer.fit()
