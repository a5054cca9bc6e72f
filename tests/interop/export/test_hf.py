"""`checkpoint export --format hf`: what transformers reads is the trained model, its tokenizer and its end."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_fp4.checkpoint import offline
from megatron_fp4.cli.checkpoint import main
from megatron_fp4.data.text.tokenizer import load_tokenizer
from megatron_fp4.interop.export import weights
from megatron_fp4.interop.export.assemble import two_dialects
from megatron_fp4.interop.export.folder import Export
from megatron_fp4.interop.export.plan import dense_tensors
from megatron_fp4.interop.export.quantized import ExportFormat
from megatron_fp4.models.count import model_parameters
from megatron_fp4.storage.owner import Owner
from tests.helpers.tiny_run import TinyRun
from tests.models.test_count import ODD_HYBRID

HYBRID = replace(ODD_HYBRID, pattern="M-*M-")

TEXT = "def add(first):\n\treturn first + 2  # it's naïve, 日本 \U0001f600  two  spaces\n\n"


def export(run: TinyRun, to: Path, *arguments: str) -> Path:
    assert main(["export", str(run.run_dir), "--to", str(to), *arguments]) == 0
    return to


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / name).read_text())
    return values


@pytest.fixture(scope="module")
def folder(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in FP32."""
    return export(run, tmp_path_factory.mktemp("hf") / "model", "--dtype", "fp32")


def test_small_parts_hold_every_tensor(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come in pieces of any size, parts are as large as asked, and anybody may read them."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 5000)
    to = export(run, tmp_path / "parts", "--part-gb", "6e-5", "--dtype", "fp32")
    index = read_config(to, "model.safetensors.index.json")
    parts = sorted(to.glob("model-*.safetensors"))
    assert [path.name for path in parts] == sorted(set(index["weight_map"].values()))
    assert len(parts) > 4
    assert all(path.stat().st_size < 60_000 + 4000 for path in parts if len(_keys(path)) > 1)
    assert {key: path.name for path in parts for key in _keys(path)} == index["weight_map"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in to.iterdir())
    newest = offline.resolve(run.run_dir / "checkpoints")
    with safe_open(to / index["weight_map"]["model.layers.1.mlp.up_proj.weight"], "pt") as file:
        written = file.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(written, offline.read_tensor(newest, "master/blocks.1.mlp.gate_up.up.weight"))


def _keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_transformers_reads_the_model(run: TinyRun, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.rope_parameters["rope_theta"] == 500_000
    assert model.dtype == torch.float32
    assert (model.generation_config.eos_token_id, model.config.eos_token_id) == (2, 2)


def test_generation_ends(folder: Path) -> None:
    """The class's own defaults are tokens of another vocabulary: such a model never ends a text."""
    for name in ("config.json", "generation_config.json"):
        values = read_config(folder, name)
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 3)
    values = read_config(folder)
    assert values["dtype"] == values["torch_dtype"] == "float32"
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500_000


def test_auto_tokenizer_gives_the_ids_of_training(run: TinyRun, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(run.run_dir.parent / "toy.model")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = ours.encode_batch([TEXT])[0].tolist()
    assert theirs(TEXT)["input_ids"] == ids, "also no bos, which training never saw"
    assert theirs.decode(ids) == TEXT
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)


def test_the_card_says_what_was_trained(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for part in ("LlamaForCausalLM", "step 3, 384 tokens", "toy: ", "held out: held", "training loss of the last step"):
        assert part in card
    assert "blocks.0.mlp.down: fprop x nvfp4, w nvfp4 16x16" in card, "the precision table"


def test_what_stands_there_is_kept(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "model"
    to.mkdir()
    (to / "notes.txt").write_text("mine")
    assert main(["export", str(run.run_dir), "--to", str(to)]) == 2
    assert "is not empty; choose another directory, or replace it with --force" in capsys.readouterr().err
    assert [path.name for path in to.iterdir()] == ["notes.txt"]
    export(run, to, "--force")
    assert not (to / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left beside it"


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step_00000003"])
def test_a_run_is_no_export_to_replace(
    inside: str, run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--force at the wrong folder must not remove the weights that are exported, nor those of another run."""
    other = tmp_path / "other"
    shutil.copytree(run.run_dir, other)
    before = sorted(other.rglob("*"))
    assert main(["export", str(other), "--to", str(other / inside), "--force"]) == 2
    assert "so it is no exported model, and --force does not remove it" in capsys.readouterr().err
    assert sorted(other.rglob("*")) == before


def test_links_and_what_a_killed_export_left(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link stays one, "." has a name, and leftovers of dead processes go."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    dead = tmp_path / f"disk.writing-{replace(Owner.me(), start=1).tag}"
    dead.mkdir()
    export(run, tmp_path / "model")
    export(run, tmp_path / "model", "--force")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(run, Path())
    assert (tmp_path / "here" / "config.json").is_file()


def test_a_failure_on_the_way_leaves_nothing(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("megatron_fp4.interop.export.folder.Export.write_weights", full)
    assert main(["export", str(run.run_dir), "--to", str(tmp_path / "model")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_elsewhere(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's file is not on every machine: the export says so, takes another place, or none."""
    file = run.run_dir.parent / "toy.model"
    moved = tmp_path / "moved.model"
    file.rename(moved)
    try:
        assert main(["export", str(run.run_dir), "--to", str(tmp_path / "a")]) == 2
        assert "--tokenizer FILE says where it is, --no-tokenizer leaves it out" in capsys.readouterr().err
        assert not (tmp_path / "a").exists()
        export(run, tmp_path / "b", "--tokenizer", str(moved))
        export(run, tmp_path / "c", "--no-tokenizer", "--eos", "2")
        assert "no tokenizer files are written" in capsys.readouterr().out
    finally:
        moved.rename(file)
    assert read_config(tmp_path / "b")["eos_token_id"] == read_config(tmp_path / "c")["eos_token_id"] == 2
    assert read_config(tmp_path / "c")["bos_token_id"] is None, "not the class's default"
    assert not (tmp_path / "c" / "tokenizer.json").exists()


def test_a_file_in_bf16_keeps_what_training_keeps_in_fp32() -> None:
    """In BF16 a step size softplus(dt + dt_bias) of the exported model would be off by up to 1.6 %."""
    masters = SimpleNamespace(shapes={parameter.name: parameter.shape for parameter in model_parameters(HYBRID)})
    bf16 = torch.bfloat16
    export = Export(ExportFormat.hf, dense_tensors(HYBRID), masters, bf16, bf16, {}, 1 << 30)  # type: ignore[arg-type]
    tensors = {tensor.name: tensor for tensor in export.file_tensors()}
    in_fp32 = {name for name, tensor in tensors.items() if tensor.dtype != bf16}
    assert in_fp32 == {f"model.layers.{index}.mixer.{name}" for index in (0, 3) for name in ("A_log", "dt_bias", "D")}
    assert tensors["model.layers.0.mixer.conv1d.weight"].shape[1] == 1, "transformers has a dimension for the channel"


def test_a_scaled_rotary_embedding_in_both_dialects() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    values = two_dialects({"rope_parameters": rope})
    assert values["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert values["rope_theta"] == 5e5
    assert two_dialects({"model_type": "nemotron_h"}) == {"model_type": "nemotron_h"}


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_sizes_that_no_part_has(size: str, run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run.run_dir), "--to", str(tmp_path / "parts"), "--part-gb", size]) == 2
    assert "--part-gb must be above 0" in capsys.readouterr().err
