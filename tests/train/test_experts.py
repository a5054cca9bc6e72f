"""Runs with experts: they balance, and no microbatch, resume or skipped step changes what they do."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_fp4.cli.checkpoint import main as checkpoint
from megatron_fp4.layers.moe.balance import LoadBalance
from megatron_fp4.layers.moe.losses import MEANS
from megatron_fp4.optim import StepReport
from megatron_fp4.train.open import open_trained
from megatron_fp4.train.telemetry.metrics import read_metrics
from megatron_fp4.train.telemetry.norms import norms_by_tensor, parameter_norm
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import TrainerInProcess, make_trainer, masters

MOE = {
    "num_experts": 4,
    "top_k": 2,
    "ffn_hidden": 32,
    "shared_ffn_hidden": 32,
    "latent": 16,
    "expert_bias": "true",
    "bias_rate": 0.05,
    "sequence_loss": 0.01,
    "global_loss": 0.01,
    "z_loss": 0.001,
}
SIZES = (
    "model.hidden=32",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.mamba_num_heads=4",
    "model.mamba_head_dim=8",
    "model.mamba_state=8",
    "precision.compute_dtype=fp32",
)


def run_of(folder: Path, *overrides: str, pattern: str = "E*E", moe: dict[str, object] | None = None) -> TinyRun:
    text = ", ".join(f"{name}: {value}" for name, value in (MOE | (moe or {})).items())
    mamba = SIZES if "M" in pattern else tuple(size for size in SIZES if "mamba" not in size)
    sizes = (*mamba, f"model.num_layers={len(pattern)}", f"model.pattern={pattern}", f"model.moe={{{text}}}")
    return tiny_run(folder, *sizes, "precision=bf16", *overrides)


def balance_of(trainer: TrainerInProcess) -> LoadBalance:
    balance = trainer.run.optimizer.gradient_free
    assert isinstance(balance, LoadBalance)
    return balance


def biases(trainer: TrainerInProcess) -> list[Tensor]:
    return [state.detach().clone() for state in balance_of(trainer).parameters]


def assert_same_loads(one: LoadBalance, other: LoadBalance, *, rtol: float) -> None:
    assert one.loads.keys() == other.loads.keys()
    for name, load in one.loads.items():
        assert torch.equal(load.counts_E, other.loads[name].counts_E)
        assert torch.allclose(load.means, other.loads[name].means, rtol=rtol, atol=0)


def fitted(run: TinyRun, *overrides: str) -> TrainerInProcess:
    trainer, _ = make_trainer(run.with_overrides(*overrides).overrides)
    trainer.fit()
    return trainer


def test_a_hybrid_learns_and_its_load_balances(tmp_path: Path) -> None:
    """It begins with biases that send every token to the same expert first."""
    run = run_of(tmp_path, "train.stop_after_steps=14", pattern="MEM*EME", moe={"bias_rate": 0.01, "global_loss": 0})
    trainer, _ = make_trainer(run.overrides)
    with torch.no_grad():
        for state in balance_of(trainer).parameters:
            state[0] += 0.1
    step, fullest = trainer.run.optimizer.step, list[float]()

    def watched_step(norm: float, *, lr: float, max_norm: float) -> StepReport:
        report = step(norm, lr=lr, max_norm=max_norm)
        fullest.append(
            max(float(load.counts_E.max() / load.counts_E.mean()) for load in balance_of(trainer).loads.values())
        )
        return report

    with mock.patch.object(trainer.run.optimizer, "step", watched_step):
        trainer.fit()
    losses = [record["loss"] for record in read_metrics(run.run_dir) if "loss" in record]
    assert losses[-1] < losses[0] - 0.3
    assert fullest[0] > 1.9
    assert fullest[-1] < 1.7
    load = balance_of(trainer).loads["blocks.1.moe.router"]
    assert load.counts_E.sum() == 2 * 4 * 32
    entropy = load.means[MEANS.index("entropy")].item()
    assert entropy == pytest.approx(1.386, abs=0.02)  # log 4: scores are alike at first


def test_microbatches_change_nothing(tmp_path: Path) -> None:
    """Losses are means over the global batch; one of a microbatch would be two times as large here."""
    trainers = [
        fitted(
            run_of(tmp_path, "train.stop_after_steps=3"),
            f"train.run_dir='{tmp_path / str(size)}'",
            f"train.micro_batch={size}",
        )
        for size in (1, 4)
    ]
    for one, four in zip(*map(biases, trainers), strict=True):
        assert torch.equal(one, four)
        assert one.any()
    one, four = (masters(trainer) for trainer in trainers)
    for name in one:
        assert torch.allclose(one[name], four[name], rtol=1e-5, atol=1e-6), name
    assert_same_loads(*map(balance_of, trainers), rtol=1e-6)


def _fit_on_ranks(rank: int, world_size: int, runs: list[tuple[str, ...]]) -> None:
    for overrides in runs:
        make_trainer(overrides, rank, world_size)[0].fit()


def test_what_is_shown_of_experts_depends_on_no_layout(tmp_path: Path) -> None:
    """The main rank writes it: of all tokens, of the experts of all ranks, and of the mixtures of all stages."""
    mtp = "model.mtp={depth: 2, pattern: E, shared: true}"
    typed = ("train.stop_after_steps=2", "train.statistics_interval_steps=2", "model.num_kv_heads=2", mtp)
    run = run_of(tmp_path, *typed)
    layouts = {"one": (), "dp": ("parallel.ep=2",), "tp": ("parallel.tp=2", "parallel.ep=2"),
               "cp": ("parallel.cp=2",), "pp": ("parallel.pp=2",)}  # fmt: skip
    runs = {
        name: run.with_overrides("train.log_interval_steps=1", "train.micro_batch=2", *axes, run_dir=tmp_path / name)
        for name, axes in layouts.items()
    }
    fitted(runs["one"])
    run_distributed(_fit_on_ranks, 2, [one.overrides for name, one in runs.items() if name != "one"])
    shown = {
        name: [
            {key: value for key, value in record.items() if key.startswith(("experts/", "residual/"))}
            for record in read_metrics(one.run_dir)
        ]
        for name, one in runs.items()
    }
    expected = [values for values in shown.pop("one") if values]
    assert len(expected) == 3
    assert {"experts/max_vio/blocks.2", "experts/z_loss/mtp.0.blocks.0", "experts/dead"} <= expected[0].keys()
    table = (tmp_path / "one" / "experts" / "step_00000002.txt").read_text()
    for name, values in shown.items():
        for one, other in zip([each for each in values if each], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-6), name
        assert (tmp_path / name / "experts" / "step_00000002.txt").read_text() == table, name


def test_a_resume_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Bias, overload and what is counted; and the weights of the checkpoint alone begin another run with its biases."""
    run = run_of(tmp_path, "precision=nvfp4", "precision.compile=false", "train.save_interval_steps=1", pattern="E*")
    whole = fitted(run, "train.stop_after_steps=2", f"train.run_dir='{tmp_path / 'whole'}'")
    fitted(run, "train.stop_after_steps=1")
    resumed = fitted(run, "train.stop_after_steps=2")
    for name, value in masters(whole).items():
        assert torch.equal(value, masters(resumed)[name]), name
    names = {name.rpartition(".")[2] for name in masters(whole) if ".router." in name}
    assert names == {"weight", "bias", "overload"}

    stored, weights = run.run_dir / "checkpoints" / "step_00000002", tmp_path / "weights"
    assert checkpoint(["extract", str(stored), "--to", str(weights)]) == 0
    begun, _ = make_trainer(run.with_overrides(f"train.init_from='{weights}'", run_dir=tmp_path / "begun").overrides)
    (bias, overload), (expected, _) = biases(begun), biases(resumed)
    assert torch.equal(bias, expected)
    assert not overload.any(), "it tells of a global batch of another run"


def test_a_step_that_does_not_update_moves_no_bias(tmp_path: Path) -> None:
    trainer, _ = make_trainer(run_of(tmp_path).overrides)
    optimizer = trainer.run.optimizer
    before = biases(trainer)
    optimizer.zero_grad()
    optimizer.finish_grads()
    optimizer.step(float("inf"), lr=1e-3, max_norm=1.0)
    assert all(torch.equal(one, other) for one, other in zip(before, biases(trainer), strict=True))
    assert balance_of(trainer).loads == {}


def test_a_bias_has_no_part_in_norms(tmp_path: Path) -> None:
    """Counts move it: it would drown the weights, and the bundle of a bad step has no gradient of it."""
    trainer, _ = make_trainer(run_of(tmp_path).overrides)
    run = trainer.run
    norm = parameter_norm(run.optimizer, run.mesh.world, run.device)
    with torch.no_grad():
        for state in balance_of(trainer).parameters:
            state += 100.0
    assert parameter_norm(run.optimizer, run.mesh.world, run.device) == norm
    run.optimizer.zero_grad()
    run.optimizer.finish_grads()
    names = {name.rpartition(".")[2] for name in norms_by_tensor(run.optimizer) if ".router." in name}
    assert names == {"weight"}


def test_muon_takes_each_expert_and_no_router(tmp_path: Path) -> None:
    trainer = fitted(run_of(tmp_path, "optim=muon", "train.stop_after_steps=2"))
    kinds = {shard.name: sorted(shard.tensors) for shard in trainer.run.optimizer.state_shards()}
    assert "momentum" in kinds["blocks.0.moe.experts.3.up.weight"]
    assert "momentum" in kinds["blocks.0.moe.latent.down.weight"]
    assert "exp_avg" in kinds["blocks.0.moe.router.weight"]
    assert kinds["blocks.0.moe.router.bias"] == ["master"]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(tmp_path: Path, recompute: str) -> None:
    run = run_of(tmp_path, "train.stop_after_steps=2", "model.dropout=0.1", "data.reset_documents=true")
    once = fitted(run, f"train.run_dir='{tmp_path / 'once'}'")
    twice = fitted(run, f"train.recompute={recompute}", f"train.run_dir='{tmp_path / 'twice'}'")
    for name, value in masters(once).items():
        assert torch.equal(value, masters(twice)[name]), name
    assert_same_loads(balance_of(once), balance_of(twice), rtol=0)


def test_a_mixture_that_depths_share_is_shown_as_one_and_evaluated_without(tmp_path: Path) -> None:
    mtp = "model.mtp={depth: 2, pattern: '*E', shared: true}"
    run = run_of(tmp_path, "train.stop_after_steps=1", mtp, pattern="E*")
    trainer = fitted(run)
    opened = open_trained(trainer.run.config)
    assert not [name for name, _ in opened.engine.stages[0].named_parameters() if "mtp" in name]
    load = balance_of(trainer).loads["mtp.0.blocks.1.moe.router"]
    assert load.counts_E.sum() == 2 * 2 * 4 * 32
    assert load.means[MEANS.index("entropy")].item() == pytest.approx(1.386, abs=0.02)  # log 4
    assert load.means[MEANS.index("sequence_loss")].item() == pytest.approx(1.0, abs=0.02)
