"""`megatron-fp4 checkpoint`: what a user sees, and that an exported model is the trained one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_fp4.checkpoint import offline
from megatron_fp4.cli.checkpoint import main
from tests.checkpoint.synthetic import save_one, two_pieces
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Checkpoints 2 and 4 of a small Llama-like model."""
    run = tiny_run(
        tmp_path_factory.mktemp("checkpoint-cli"),
        "precision=bf16", "model.activation=swiglu", "train.stop_after_steps=4", "train.save_interval_steps=2",
        "model.rope_base=10000",
    )  # fmt: skip
    make_trainer(run.overrides)[0].fit()
    return run


def test_inspect(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run.run_dir), "--names", "master/embedding"]) == 0
    out = capsys.readouterr().out
    assert "step_00000004" in out, "a run means its newest checkpoint"
    assert "step 4, tokens 512" in out
    assert "master/embedding.weight  96x64" in out
    assert "exp_avg/" not in out, "--names must leave the others out"
    assert "exp_avg: " in out


def test_verify_finds_a_flipped_byte(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run.run_dir / "checkpoints" / "step_00000002"
    copy = tmp_path / "step_00000002"
    copy.mkdir()
    for file in good.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damaged = next(copy.glob("data_*.bin"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert main(["verify", str(good)]) == 0
    assert main(["verify", str(good), str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"{copy}: DAMAGED" in out
    assert damaged.name in out, "the damaged file must be named"
    for action in ("average", "extract", "export"):
        assert main([action, str(copy), "--to", str(tmp_path / action)]) == 2, "it made another one of the damaged one"
        assert f"error: a damaged checkpoint makes no other: {damaged}" in capsys.readouterr().err


def test_average_and_extract(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two, four = (run.run_dir / "checkpoints" / f"step_0000000{step}" for step in (2, 4))
    assert main(["average", str(two), str(four), "--weights", "1", "3", "--to", str(tmp_path / "mean")]) == 0
    key = "master/head.weight"
    mean = offline.read_tensor(offline.resolve(tmp_path / "mean"), key)
    expected = (offline.read_tensor(two, key).double() + 3 * offline.read_tensor(four, key).double()) / 4
    assert torch.equal(mean, expected.float())
    merge = ["average", str(run.run_dir), "--window", "2", "4", "--to", str(tmp_path / "decayed"), "--weights"]
    assert main([*merge, "minus_sqrt"]) == 0
    first, last = (offline.read_tensor(path, key).double() for path in (two, four))
    decayed = offline.read_tensor(offline.resolve(tmp_path / "decayed"), key)
    torch.testing.assert_close(decayed, ((2 * first + last) / 3).float(), atol=1e-7, rtol=1e-6)
    merge[6] = str(tmp_path / "other")
    assert main([*merge, "minus-sqrt"]) == 2
    assert "one number per checkpoint, or minus_sqrt alone" in capsys.readouterr().err
    assert main(["extract", str(four), "--to", str(tmp_path / "weights")]) == 0
    assert {info.kind for info in offline.list_tensors(offline.resolve(tmp_path / "weights"))} == {"master"}
    assert main(["extract", str(four), "--to", str(tmp_path / "weights")]) == 2, "must not overwrite"
    assert "exists already" in capsys.readouterr().err


def test_export_is_read_by_transformers(run: TinyRun, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(run.run_dir), "--to", str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    newest = offline.resolve(run.run_dir / "checkpoints")
    weight = offline.read_tensor(newest, "master/blocks.1.mlp.down.weight")
    assert torch.equal(model.state_dict()["model.layers.1.mlp.down_proj.weight"], weight)


def test_a_checkpoint_without_settings_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_one(tmp_path, 3, two_pieces(1.0))
    assert main(["inspect", str(directory)]) == 0
    assert main(["export", str(directory), "--to", str(tmp_path / "model")]) == 2
    assert "has no settings of a model" in capsys.readouterr().err


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "neither a checkpoint nor a directory" in capsys.readouterr().err
