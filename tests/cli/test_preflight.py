"""`preflight` passes on a good run and names the cause of each planted fault."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fp4.cli import preflight
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.local import run_local
from megatron_fp4.data.config import DataConfig, SourceConfig
from megatron_fp4.layers.attention import Attention
from megatron_fp4.models.count import by_kind, model_parameters
from megatron_fp4.precision import EmulatedBackend
from megatron_fp4.proofs.machine import check_index, check_links
from megatron_fp4.proofs.shards import ModelShard, build_shards, distinct_linears, typical_ranks
from megatron_fp4.train.checked import CheckedConfig, check_config
from tests.helpers.tiny_run import tiny_run, write_toy_shard
from tests.precision.te import te_double


def printed(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str, expect: int) -> str:
    run = tiny_run(folder, *overrides)
    code = preflight.main(run.overrides)
    output = capsys.readouterr()
    assert code == expect, output.out + output.err
    assert not run.run_dir.exists(), "preflight must leave nothing behind"
    return output.out


def lines(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.split()[1:2] == [name]]


def test_an_index_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_shard(tmp_path / "toy", num_documents=3)
    config = DataConfig([SourceConfig("toy", [str(tmp_path / "toy")])], index_cache=str(tmp_path))
    assert check_index(config).ok
    monkeypatch.setattr("os.access", lambda *_: False)
    assert (
        check_index(config).text
        == f"3 documents need 56 B an epoch, and {tmp_path} cannot be written; change data.index_cache"
    )
    assert check_index(config).ok is False


def test_passes_on_a_good_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, tmp_path, expect=0)
    assert "verdict: this run can start" in text
    assert "GEMMs in NVFP4; the rest BF16 because of" in text, "the summary of the precision plan is missing"
    for name in ("configuration", "data", "index", "backend", "kernels", "precision", "model", "gemms", "disk"):
        assert lines(text, name)[0].startswith("ok"), f"{name} was not checked"
    assert "no GPU was used" in text, "a reader could think that kernels were checked"


@pytest.mark.parametrize("operand", ["dy", "w"])
def test_zeros_from_a_quantizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, operand: str
) -> None:
    plain = EmulatedBackend.quantize

    def broken(self: Any, x: Any, source: Any, copies: Any) -> Any:
        return plain(self, torch.zeros_like(x) if source.operand == operand else x, source, copies)

    monkeypatch.setattr(EmulatedBackend, "quantize", broken)
    text = printed(capsys, tmp_path, expect=1)
    cause = {"dy": "wgrad (gradient of the weight) is all zero", "w": "fprop (y) is all zero"}[operand]
    assert any(cause in line and "blocks.0." in line for line in lines(text, "gemms")), text
    assert "do not start this run (gemms)" in text


def test_nan_and_wrong_scale_from_a_gemm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = EmulatedBackend.matmul

    def broken(self: Any, a: Any, b: Any, **settings: Any) -> Any:
        return plain(self, a, b, **settings).mul_(3.0)

    monkeypatch.setattr(EmulatedBackend, "matmul", broken)
    assert "has a relative error of" in printed(capsys, tmp_path, expect=1), "a wrong alpha passes"

    def poisoned(self: Any, a: Any, b: Any, **settings: Any) -> Any:
        result = plain(self, a, b, **settings)
        result[0, 0] = float("nan")
        return result

    monkeypatch.setattr(EmulatedBackend, "matmul", poisoned)
    assert "elements that are NaN or Inf" in printed(capsys, tmp_path, expect=1)


def test_local_size_not_a_multiple_of_16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, tmp_path, "parallel.tp=2", "model.ffn_hidden=272", expect=1)
    (line,) = lines(text, "configuration")
    assert line.startswith("FAILED")
    assert "multiple of 16, got 136" in line, "the local size must be named"


def test_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, tmp_path, "data.sources=[{name: toy, paths: [/nowhere/shard]}]", expect=1)
    (line,) = lines(text, "data")
    assert line.startswith("FAILED")
    assert "/nowhere/shard" in line
    assert lines(text, "gemms")[0].startswith("ok"), "the other checks are independent of it and must still be made"


def test_too_small_a_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    text = printed(capsys, tmp_path, expect=1)
    (line,) = lines(text, "disk")
    assert line.startswith("FAILED")
    assert "3 checkpoints of" in line
    assert "10 KB free" in line


def test_transformer_engine_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    text = printed(capsys, tmp_path, "precision.backend=transformer_engine", expect=1)
    assert "install transformer-engine" in lines(text, "backend")[0]


def test_transformer_engine_is_compared_code_by_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    te_double.install(monkeypatch)
    settings = ("precision/recipe=nvfp4_no_sr", "precision.backend=transformer_engine", "precision.compile=false")
    assert "code by code" in lines(printed(capsys, tmp_path, *settings, expect=0), "gemms")[0]
    plain = te_double._padded

    def one_bit(scale: Any) -> Any:
        scale = plain(scale).clone()
        scale[5, 1] ^= 1
        return scale

    monkeypatch.setattr(te_double, "_padded", one_bit)
    text = printed(capsys, tmp_path, *settings, expect=1)
    assert any("scales[5, 1]" in line for line in lines(text, "gemms")), text


def links(process: Process) -> list[tuple[str, bool | None, str]]:
    return [(check.name, check.ok, check.text) for check in check_links(process)]


def test_clocks_and_links_of_two_ranks() -> None:
    for link in run_local(links, 2):
        assert [(name, ok) for name, ok, _ in link] == [("clocks", True), ("links", True)]
        assert "over 2 ranks" in link[1][2]


def shards_of(folder: Path, *overrides: str) -> tuple[CheckedConfig, list[ModelShard]]:
    config = to_run_config(compose_config(tiny_run(folder, *overrides).overrides))
    world_size = config.parallel.smallest_world
    checked, ranks = check_config(config, world_size), typical_ranks(config.parallel, world_size)
    backend, device = EmulatedBackend(), torch.device("cpu")
    return checked, build_shards(checked, backend, device, world_size=world_size, ranks=ranks)


def test_distinct_shapes_are_tried_once(tmp_path: Path) -> None:
    checked, shards = shards_of(tmp_path, "model.num_layers=8")
    linears = distinct_linears(checked, shards, torch.device("cpu"))
    keys = {(linear.shape, linear.precision) for linear in linears}
    assert len(keys) == len(linears) < 12, "a deep model would be probed layer by layer"
    assert sum(len(linear.names) for linear in linears) == 8 * 4 + 1, "a linear is in no probe"


def test_shapes_are_those_of_the_built_shards(tmp_path: Path) -> None:
    layout = ("parallel.tp=2", "parallel.pp=2", "model.vocab_size=97", "model.num_layers=4", "train.global_batch=8")
    checked, shards = shards_of(tmp_path, *layout)
    assert [shard.rank for shard in shards] == [0, 1, 2, 3], "first and last tensor-parallel rank of both stages"
    first, last = shards[0], shards[-1]
    assert "head" not in first.shapes
    assert "blocks.0.mlp.up" not in last.shapes
    hidden = checked.config.model.hidden
    linears = distinct_linears(checked, shards, torch.device("cpu"))
    heads = {linear.shape for linear in linears if "head" in linear.names}
    assert heads == {(49, hidden), (48, hidden)}, "an uneven vocabulary has two local shapes"
    whole = sum(by_kind(model_parameters(checked.config.model)).values())
    assert whole < sum(shard.num_parameters for shard in shards) < whole * 1.05, "only norms are on both ranks"


@pytest.mark.parametrize(("model", "layers"), [("nemotron_h_12b", 62), ("gpt_1_2b", 20)])
def test_a_large_shard_is_built_without_memory(tmp_path: Path, model: str, layers: int) -> None:
    sizes = ("data.seq_length=8192", "train.micro_batch=1", "train.global_batch=8", "train.total_tokens=1e9")
    layout = (
        f"model={model}",
        f"model.num_layers={layers}",
        "model.vocab_size=131072",
        "parallel.tp=4",
        "parallel.pp=2",
    )
    checked, shards = shards_of(tmp_path, *sizes, *layout)
    for shard in shards:
        for info in checked.linears:
            if info.name in shard.shapes:
                assert shard.shapes[info.name] == info.local_shape(4), f"the planner has another shape of {info.name}"


def test_a_constructor_that_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for head_dim 16")

    monkeypatch.setattr(Attention, "__init__", broken)
    text = printed(capsys, tmp_path, expect=1)
    assert "the shards cannot be built: RuntimeError: no kernel for head_dim 16" in lines(text, "model")[0]
    assert not lines(text, "gemms"), "there is no shape to try"


def test_a_fused_kernel_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, tmp_path, "model.norm_impl=apex", expect=1)
    (line,) = lines(text, "kernels")
    assert line.startswith("FAILED")
    assert "model.norm_impl=apex has CUDA kernels only" in line
