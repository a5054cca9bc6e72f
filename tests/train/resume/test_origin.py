"""A run that begins with weights from elsewhere: those, and nothing else; read once, and never taken for others."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.checkpoint import offline
from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.checkpoint.mirror.contents import local_name
from megatron_fp4.checkpoint.mirror.send import send_checkpoint
from megatron_fp4.cli.checkpoint import main
from megatron_fp4.data.text.files import fingerprint_of
from megatron_fp4.pretrain import main as pretrain
from megatron_fp4.storage.remote.client import Remote
from megatron_fp4.train.resume.description import describe_origin
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer, masters

LLAMA = ("precision=bf16", "model.activation=swiglu", "model.rope_base=10000", "train.save_interval_steps=2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Checkpoints 2 and 4 of a small Llama-like model, and what was made of them: hf, weights, mean."""
    folder = tmp_path_factory.mktemp("origin")
    run = tiny_run(folder, *LLAMA, "train.stop_after_steps=4")
    make_trainer(run.overrides)[0].fit()
    two, four = (run.run_dir / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
    assert main(["export", str(four), "--to", str(folder / "hf"), "--dtype", "fp32"]) == 0
    assert main(["import", str(folder / "hf"), "--to", str(folder / "imported")]) == 0
    assert main(["extract", str(four), "--to", str(folder / "weights")]) == 0
    assert main(["average", str(two), str(four), "--to", str(folder / "mean")]) == 0
    return run


def beside(source: TinyRun, name: str) -> Path:
    return source.run_dir.parent / name


def begun(source: TinyRun, folder: Path, name: str, *overrides: str) -> TinyRun:
    return source.with_overrides(f"train.init_from='{beside(source, name)}'", *overrides, run_dir=folder / "run")


def stored(root: Path) -> dict[str, Tensor]:
    directory = offline.resolve(root)
    keys = [info.key for info in offline.list_tensors(directory) if info.kind == "master"]
    return {key.split("/", 1)[1]: one for key, one in offline.read_tensors(directory, keys).items()}


@pytest.mark.parametrize("name", ["hf", "imported", "weights", "mean", "run"])
def test_weights_and_nothing_else(source: TinyRun, tmp_path: Path, name: str) -> None:
    expected = stored(beside(source, "mean" if name == "mean" else "weights"))
    trainer, _ = make_trainer(begun(source, tmp_path, name).overrides)
    got = masters(trainer)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert (trainer.start.position.step, trainer.start.position.samples, trainer.run.optimizer.step_count) == (0, 0, 0)
    moments = [one.tensors["exp_avg"] for one in trainer.run.optimizer.state_shards()]
    assert not any(bool(one.any()) for one in moments)
    weight = trainer.run.engine.stages[0].state_dict()["head.weight"]
    assert torch.equal(weight, expected["head.weight"].to(weight.dtype)), "the model computes with other weights"
    assert name in trainer.run.origin["init_from"]["from"]


def test_weights_of_a_mirror(source: TinyRun, tmp_path: Path) -> None:
    """By the URL of a mirror or of one checkpoint there; what was brought is removed, and the URL is remembered."""
    url, directory = f"file://{tmp_path}/store", source.run_dir / "checkpoints" / "step_00000004"
    name = local_name(directory)
    send_checkpoint(Remote(url), directory, name, {})
    expected = stored(beside(source, "weights"))
    for number, place in enumerate((url, f"{url}/{name}")):
        run = source.with_overrides(f"train.init_from='{place}'", run_dir=tmp_path / str(number))
        trainer, _ = make_trainer(run.overrides)
        got = masters(trainer)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        assert trainer.run.origin["init_from"]["from"] == f"{url}/{name}"
        assert not (run.run_dir / "init_from").exists()
    other = source.with_overrides(f"train.init_from='{url}'", "model.norm_eps=1e-3", run_dir=tmp_path / "other")
    with pytest.raises(ValueError, match=f"train.init_from={url} holds another model"):
        make_trainer(other.overrides)
    absent = source.with_overrides(f"train.init_from='file://{tmp_path}/absent'", run_dir=tmp_path / "absent_run")
    with pytest.raises(ValueError, match="is neither a complete checkpoint nor a mirror with some"):
        make_trainer(absent.overrides)


@pytest.mark.parametrize("master", ["fp32", "remainder"])
@pytest.mark.parametrize("name", ["hf", "weights"])
def test_multi_token_prediction_begins_with_weights_that_have_none(
    source: TinyRun, tmp_path: Path, name: str, master: str
) -> None:
    """What it adds is drawn, as in a run of the same seed that begins with nothing; the rest are the weights."""
    mtp = ("model.mtp={depth: 2, pattern: T, shared: true}", f"optim.master={master}", "precision.compute_dtype=bf16")
    trainer, _ = make_trainer(begun(source, tmp_path, name, *mtp).overrides)
    drawn, _ = make_trainer(source.with_overrides(*mtp, run_dir=tmp_path / "drawn").overrides)
    got, of_drawn = (
        {one.name: one.read("master") for one in run.optimizer.state_shards()} for run in (trainer.run, drawn.run)
    )
    expected = stored(beside(source, "weights"))
    added = {key: one for key, one in of_drawn.items() if key.startswith("mtp.")}
    assert got.keys() == expected.keys() | added.keys()
    assert all(torch.equal(got[key], one) for key, one in (expected | added).items())
    assert describe_origin(trainer.run.origin["init_from"], None)[0].endswith(
        "multi-token prediction is not in them: its weights are drawn"
    )


def test_an_experts_bias_of_multi_token_prediction_begins_at_zero(tmp_path: Path) -> None:
    """It is no parameter of the optimizer, but as little in the weights as those are."""
    moe = ("model.moe={num_experts: 4, top_k: 2, ffn_hidden: 32, expert_bias: true}", "model.pattern='*E'")
    base = tiny_run(tmp_path, "precision=bf16", *moe, "train.save_interval_steps=2", "train.stop_after_steps=2")
    make_trainer(base.overrides)[0].fit()
    mtp = "model.mtp={depth: 1, pattern: '*E', loss_scale: 1.0}"
    trainer, _ = make_trainer(
        base.with_overrides(f"train.init_from='{base.run_dir}'", mtp, run_dir=tmp_path / "mtp").overrides
    )
    got, expected = masters(trainer), stored(base.run_dir / "checkpoints")
    assert not bool(got["mtp.0.blocks.1.moe.router.bias"].any())
    assert all(torch.equal(got[key], one) for key, one in expected.items())


def test_a_resume_reads_no_origin_and_remembers_it(source: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(beside(source, "hf"), folder)
    run = source.with_overrides(f"train.init_from='{folder}'", "train.stop_after_steps=2", run_dir=tmp_path / "run")
    make_trainer(run.overrides)[0].fit()
    shutil.rmtree(folder)
    resumed, _ = make_trainer(run.with_overrides("train.stop_after_steps=4").overrides)
    assert resumed.start.position.step == 2
    resumed.fit()
    meta = read_state(offline.resolve(run.run_dir / "checkpoints"))["meta"]
    origin: dict[str, Any] = meta["init_from"]
    assert origin["from"] == str(folder)
    assert origin["format"] == "transformers, llama"
    assert [len(digest) for digest in origin["files"].values()] == [16]


def _two_ranks(rank: int, world_size: int, runs: list[tuple[str, ...]]) -> list[list[tuple[Any, Tensor]]]:
    trainers = [make_trainer(overrides, rank, world_size)[0] for overrides in runs]
    return [
        [(one.where, one.tensors["master"].clone()) for one in trainer.run.optimizer.state_shards()]
        for trainer in trainers
    ]


def test_two_ranks_read_their_rectangles(source: TinyRun, tmp_path: Path) -> None:
    """Of tensors that are cut, and of the layers of a stage."""
    expected = stored(beside(source, "weights"))
    runs = [begun(source, tmp_path, "hf", f"parallel.{axis}=2").overrides for axis in ("tp", "pp")]
    ranks = run_distributed(_two_ranks, 2, runs)
    for tensor_parallel, pipeline in ranks:
        assert any(where.shape != where.global_shape for where, _ in tensor_parallel)
        assert all(torch.equal(one, expected[where.name][where.slices]) for where, one in tensor_parallel + pipeline)
    names = [{where.name for where, _ in pipeline} for _, pipeline in ranks]
    assert names[0] | names[1] == expected.keys()
    assert not names[0] & names[1]


def test_another_tokenizer_is_said_aloud(tmp_path: Path) -> None:
    """No shape shows it, and a run on other ids trains to the end."""
    (tmp_path / "tokenizer.json").write_bytes(b"theirs")
    origin = {"from": str(tmp_path), "format": "transformers, llama"}
    for data, warnings in ((b"theirs", 0), (b"ours", 1)):
        tokenizer = SimpleNamespace(path="other.json", fingerprint=fingerprint_of(data))
        lines = describe_origin(origin, tokenizer)  # type: ignore[arg-type]
        assert sum("WARNING: data.tokenizer=other.json is another file" in line for line in lines) == warnings


def refusal(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> str:
    assert pretrain(list(run.overrides)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["hf", "weights"])
def test_weights_of_another_model(
    source: TinyRun, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that no shape shows; what does not say what the weights mean may differ."""
    run = begun(source, tmp_path, name, "model.norm_eps=1e-3", "model.rope_base=500000", "model.dropout=0.1")
    error = refusal(run, capsys)
    assert "model.norm_eps: 1e-05 in the weights, 0.001 in this run" in error
    assert "model.rope_base: 10000.0 in the weights, 500000.0 in this run" in error
    assert "dropout" not in error
    assert "Traceback" not in error


def test_no_folder(source: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is neither a checkpoint nor a directory with some" in refusal(begun(source, tmp_path, "nothing"), capsys)


def test_weights_are_no_run_to_go_on_from(source: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The remedy was: use the settings in state.json, or another checkpoint."""
    shutil.copytree(beside(source, "weights"), tmp_path / "run" / "checkpoints")
    error = refusal(source.with_overrides(run_dir=tmp_path / "run"), capsys)
    assert "has master only, without exp_avg, exp_avg_sq: no run goes on from it; begin a new one" in error
    assert "train.init_from=" in error
