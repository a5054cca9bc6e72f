"""Folders of transformers as checkpoints: right values, nothing too much in memory, refusals by name."""

from __future__ import annotations

import gc
import json
import math
import shlex
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.checkpoint import offline
from megatron_fp4.cli.checkpoint import main
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.rect import Rectangle
from megatron_fp4.interop.export.weights import Masters
from megatron_fp4.interop.logical import write_logical
from megatron_fp4.models.foreign import tensor_files
from megatron_fp4.models.foreign.families import from_transformers
from megatron_fp4.models.foreign.weights import ForeignWeights
from megatron_fp4.storage import local
from megatron_fp4.train.resume.same_model import FREE
from tests.interop.test_families import MODELS, TOKENS, our_logits, theirs
from tests.models.test_count import make_decoder


def save_foreign(folder: Path, name: str, **state: Tensor | None) -> Any:
    """A model of transformers with random weights, in several files. state: tensors to add, or to take away (None)."""
    torch.manual_seed(4)
    other = theirs(MODELS[name])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    if state:
        add_tensors(folder, {key.replace("__", "."): tensor for key, tensor in state.items()})
    return other


def add_tensors(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    from safetensors.torch import load_file, save_file

    index_path = folder / tensor_files.INDEX
    index = json.loads(index_path.read_text())
    for name, tensor in tensors.items():
        file = index["weight_map"].pop(name, "extra.safetensors")
        held = load_file(folder / file) if (folder / file).exists() else {}
        held.pop(name, None)
        if tensor is not None:
            held[name] = tensor
            index["weight_map"][name] = file
        save_file(held, folder / file)
    index_path.write_text(json.dumps(index))


def masters(root: Path) -> dict[str, Tensor]:
    directory = offline.resolve(root)
    read = offline.read_tensors(directory, [info.key for info in offline.list_tensors(directory)])
    return {key.removeprefix("master/"): tensor for key, tensor in read.items()}


@pytest.mark.parametrize("name", ["llama 3.1", "llama tied", "qwen2", "olmo2", "phi3", "nemotron_h"])
def test_import_export_import(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The imported model has the logits of theirs; exported and imported second, not one bit is another."""
    other = save_foreign(tmp_path / "hf", name)
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]) == 0
    assert "a run on it: train.init_from=" in capsys.readouterr().out
    logical = masters(tmp_path / "one")
    model = make_decoder(MODELS[name], "cpu")
    write_logical(model, logical)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(model, TOKENS), other(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert main(["export", str(tmp_path / "one"), "--to", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert main(["import", str(tmp_path / "out"), "--to", str(tmp_path / "two")]) == 0
    second = masters(tmp_path / "two")
    assert second.keys() == logical.keys()
    assert all(torch.equal(second[key], logical[key]) for key in logical)


@pytest.mark.parametrize("name", ["llama", "qwen3", "nemotron_h"])
def test_what_is_printed_makes_the_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a configuration of another model."""
    save_foreign(tmp_path / "hf", name)
    main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")])
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("a run on it: ")
    model = to_run_config(compose_config(["model=hybrid_tiny", *shlex.split(line)])).model
    free = {key: getattr(model, key) for key in model.__dict__ if key in FREE or key.startswith("mamba_")}
    assert free["mamba_state"] == MODELS["nemotron_h"].mamba_state or name != "nemotron_h"
    assert model == replace(MODELS[name], head_dim=model.head_dim, **free)


def test_ranks_read_their_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rectangle in the second part of a fused tensor, at an offset in both dims; bytes are counted."""
    other = save_foreign(tmp_path, "phi3")
    weights = ForeignWeights(tmp_path)
    expected = from_transformers(MODELS["phi3"], other.state_dict())["blocks.1.attention.qkv.k.weight"]
    read, original = list[int](), tensor_files._bytes_at
    monkeypatch.setattr(tensor_files, "_bytes_at", lambda *args: read.append(args[2]) or original(*args))
    where = Rectangle("blocks.1.attention.qkv.k.weight", tuple(expected.shape), (3, 5), (4, 7))
    assert torch.equal(weights.read(where), expected[where.slices])
    assert read == [4 * expected.shape[1] * 4]


def test_one_tensor_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_foreign(tmp_path / "hf", "llama")
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    original = ForeignWeights.read

    def read(self: ForeignWeights, where: Rectangle) -> Tensor:
        nonlocal most
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        tensor = original(self, where)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ForeignWeights, "read", read)
    gc.freeze()  # what other tests imported is not looked at for every tensor
    try:
        assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]) == 0
    finally:
        gc.unfreeze()
    assert len(alive) > 10
    assert most <= 1, "tensors that were written are kept"


def test_what_is_no_weight_is_skipped_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {
        "model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(6),
        "model__layers__1__mlp__up_proj___extra_state": torch.zeros(1),
    }
    save_foreign(tmp_path / "hf", "llama", **extra)
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]) == 0
    assert "skipped, no weights (2): model.layers.0.self_attn.rotary_emb.inv_freq, model.layers.1" in (
        capsys.readouterr().out
    )


HEAD = "lm_head__weight"
DOWN = "model__layers__0__mlp__down_proj__weight"


@pytest.mark.parametrize(
    ("name", "state", "refusal"),
    [
        ("llama tied", {HEAD: torch.ones(56, 48)}, "lm_head.weight is another tensor than model.embed_tokens.weight"),
        ("llama", {DOWN: None}, "lacks model.layers.0.mlp.down_proj.weight"),
        ("llama", {"mtp__weight": torch.ones(2)}, "has, and the model has no place for, mtp.weight"),
        ("llama", {DOWN: torch.ones(48, 81)}, "down_proj.weight has shape (48, 81)"),
        ("llama", {DOWN: torch.ones(48, 80, dtype=torch.int8)}, "down_proj.weight is I8; weights are F64, F32"),
    ],
)
def test_refusals(
    name: str, state: dict[str, Tensor | None], refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_foreign(tmp_path / "hf", name, **state)
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]) == 2
    error = capsys.readouterr().err
    assert refusal in error
    if "81" in refusal:
        assert "config.json says (48, 80)" in error, "both shapes must be named"
    assert not (tmp_path / "one" / "step_00000000").exists()


def test_the_same_head_under_tied_embeddings(tmp_path: Path) -> None:
    other = save_foreign(tmp_path / "hf", "llama tied")
    add_tensors(tmp_path / "hf", {"lm_head.weight": other.state_dict()["model.embed_tokens.weight"].clone()})
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]) == 0


def test_damaged_and_strange_files(tmp_path: Path) -> None:
    save_foreign(tmp_path, "llama")
    file = next(tmp_path.glob("model-*.safetensors"))
    whole = file.read_bytes()
    for data, text in (
        (whole[:-8], "is damaged"),
        (b"\xff" * 64, "is no safetensors file"),
        (b"", "is no safetensors"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=text):
            ForeignWeights(tmp_path)
    index = tmp_path / tensor_files.INDEX
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="names no files of its folder"):
        ForeignWeights(tmp_path)
    index.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is pickled, which is not read"):
        ForeignWeights(tmp_path)


def _edited_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _shared_bytes(header: dict[str, Any]) -> None:
    first, second = (header[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    first["data_offsets"] = second["data_offsets"]


def test_folders_that_another_reader_reads_otherwise(tmp_path: Path) -> None:
    """What `transformers` or safetensors refuse, or read as other weights, is no model for us either."""
    from safetensors.torch import load_file, save_file

    save_foreign(tmp_path, "llama")
    tensors = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    index = (tmp_path / tensor_files.INDEX).read_text()
    single = tmp_path / tensor_files.SINGLE
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, single)
    with pytest.raises(ValueError, match=r"has both model\.safetensors, which transformers reads, and"):
        ForeignWeights(tmp_path)
    (tmp_path / tensor_files.INDEX).unlink()
    _edited_header(single, _shared_bytes)
    with pytest.raises(ValueError, match=r"is damaged.*the one before it ends at"):
        ForeignWeights(tmp_path)
    save_file(tensors, single)
    single.write_bytes(single.read_bytes() + bytes(8))
    with pytest.raises(ValueError, match=r"is damaged.*tensors end at byte"):
        ForeignWeights(tmp_path)
    save_file(tensors, single)
    _edited_header(single, lambda header: header["lm_head.weight"].update(data_offsets=[0, math.inf]))
    with pytest.raises(ValueError, match="is damaged"):
        ForeignWeights(tmp_path)
    save_file({**tensors, "backbone.norm.weight": torch.ones(48)}, single)
    with pytest.raises(ValueError, match=r"backbone\.norm\.weight.*are one tensor of the model"):
        ForeignWeights(tmp_path)
    single.unlink()
    (tmp_path / tensor_files.INDEX).write_text(index)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-\d+\.safetensors, which is not there"):
        ForeignWeights(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_values_that_are_not_finite(value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_foreign(tmp_path / "hf", "llama", model__norm__weight=torch.full((48,), value, dtype=torch.float64))
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]) == 2
    assert "model.norm.weight is not finite in FP32" in capsys.readouterr().err
    assert not (tmp_path / "one" / "step_00000000").exists()


def test_a_type_that_is_no_weight_is_seen_before_any_value(tmp_path: Path) -> None:
    save_foreign(tmp_path, "llama", **{DOWN: torch.ones(48, 80).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match="is F8_E4M3; weights are"):
        ForeignWeights(tmp_path)


def test_what_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the place of the directory, a checkpoint of ours, no folder of anybody; no weights are read."""
    save_foreign(tmp_path / "hf", "llama")
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]) == 0
    monkeypatch.setattr(tensor_files, "_bytes_at", lambda *_: pytest.fail("a file was read"))
    (tmp_path / "file").write_text("kept")

    def error_of(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    for inside in ("file", "file/inside"):
        refusal = f"{tmp_path / 'file'} is no directory; choose another output directory"
        assert refusal in error_of("import", str(tmp_path / "hf"), "--to", str(tmp_path / inside))
        assert refusal in error_of("extract", str(tmp_path / "one"), "--to", str(tmp_path / inside))
        monkeypatch.setattr(offline, "verify", lambda _: pytest.fail("a checkpoint was hashed"))
        file = tmp_path / "file"
        assert f"{file} is a file" in error_of("export", str(tmp_path / "one"), "--to", str(tmp_path / inside))
    assert "exists already" in error_of("import", str(tmp_path / "hf"), "--to", str(tmp_path / "one"))
    error = error_of("import", str(tmp_path / "one"), "--to", str(tmp_path / "two"))
    assert f"step_00000000, which needs no import: train.init_from={tmp_path / 'one'} begins" in error
    assert "neither a folder of transformers (config.json) nor a torch_dist checkpoint" in error_of(
        "import", str(tmp_path), "--to", str(tmp_path / "two")
    )
    assert "is no folder" in error_of("import", str(tmp_path / "file"), "--to", str(tmp_path / "two"))
    assert "says what model it is; take it away" in error_of(
        "import", str(tmp_path / "hf"), "model.hidden=3", "--to", str(tmp_path / "two")
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "metadata.json").write_text("{}")
    assert "a torch_dist checkpoint of Megatron-LM; import it by --from megatron" in error_of(
        "import", str(tmp_path / "theirs"), "--from", "transformers", "--to", str(tmp_path / "two")
    )
    assert not (tmp_path / "two").exists()


def test_a_failed_import_promises_no_retry(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Damaged values, and a disk that is too small: refused with both sizes before a value is read."""
    save_foreign(tmp_path / "hf", "llama", model__norm__weight=torch.full((48,), math.nan))
    command = ["import", str(tmp_path / "hf"), "--to", str(tmp_path / "one")]
    assert main(command) == 2
    assert "not finite" in capsys.readouterr().err
    assert "retry" not in caplog.text
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    monkeypatch.setattr(ForeignWeights, "read", lambda *_: pytest.fail("a value was read"))
    assert main(command) == 2
    assert "has room for 2e-06 GB" in capsys.readouterr().err


def test_a_checkpoint_that_its_run_removes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is exported: said, with the remedy, and no folder is left."""
    save_foreign(tmp_path / "hf", "llama")
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "run" / "checkpoints")]) == 0
    step, chunks = tmp_path / "run" / "checkpoints" / "step_00000000", Masters.chunks

    def chunks_of_the_last(self: Masters, part: str) -> Iterator[tuple[int, Tensor]]:
        if part == "final_norm.weight":
            shutil.rmtree(step)
        return chunks(self, part)

    monkeypatch.setattr(Masters, "chunks", chunks_of_the_last)
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 2
    assert f"{step} was removed while it was read (checkpoint.keep_last): name a newer one" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
