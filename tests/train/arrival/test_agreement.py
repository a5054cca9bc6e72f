"""Ranks that were given different settings, programs, data or variables refuse to train, and say who has what."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_fp4.cli.compose import as_written, compose_config, to_run_config
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.rendezvous import Rendezvous
from megatron_fp4.train.arrival import agreement
from megatron_fp4.train.arrival.agreement import Part, agree_on, parts_of_run, parts_of_start
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.opened import open_data
from tests.helpers.tiny_run import tiny_run, write_toy_shard


def outcomes(parts: Sequence[dict[str, Part]], refusals: Sequence[str | None] = ()) -> list[str]:
    """What `agree_on` says on each of as many ranks as there are `parts`; "" = agreed. One thread is a rank."""
    store, printed = dist.HashStore(), ["nothing"] * len(parts)
    refused = [*refusals, *[None] * len(parts)]

    def be(rank: int) -> None:
        try:
            agree_on(parts[rank], Rendezvous(Launch(rank, len(parts), 0, 1), store), 20.0, refused[rank])
            printed[rank] = ""
        except ValueError as error:
            printed[rank] = str(error)

    ranks = [threading.Thread(target=be, args=(rank,)) for rank in range(len(parts))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30.0)
    return printed


def parts_with(folder: Path, *overrides: str) -> dict[str, Part]:
    """What one of two ranks has."""
    tree = compose_config([*tiny_run(folder).overrides, *overrides])
    checked = check_config(to_run_config(tree), 2)
    return parts_of_start(as_written(tree)) | parts_of_run(checked, open_data(checked, 0), "cpu")


def refused(parts: Sequence[dict[str, Part]], refusals: Sequence[str | None] = ()) -> str:
    """The sentence, which all ranks must say."""
    printed = outcomes(parts, refusals)
    assert len(set(printed)) == 1, printed
    assert printed[0], "the ranks agreed"
    assert "\n" not in printed[0], "one sentence"
    return printed[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=0.5", "settings: optim.lr = 0.003 on rank 0 (HOST), 0.5 on rank 1 (HOST)"),
        ("precision=bf16", "on rank 1 (HOST)"),
        ("train.seed=7", "settings: train.seed = 1234 on rank 0 (HOST), 7 on rank 1 (HOST)"),
        ("optim.clip_norm=0.25", "settings: optim.clip_norm = 1.0 on rank 0 (HOST), 0.25 on rank 1 (HOST)"),
        ("parallel.tp=2", "settings: parallel.tp = 1 on rank 0 (HOST), 2 on rank 1 (HOST)"),
        ("train.run_dir=elsewhere", "/elsewhere on rank 1 (HOST)"),
    ],
)
def test_every_setting_of_the_two_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, expected: str
) -> None:
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: "HOST")
    printed = refused([parts_with(tmp_path), parts_with(tmp_path, override)])
    assert expected in printed
    assert printed.startswith("the ranks differ in settings: ")
    assert printed.endswith("start every rank with the same command, checkout, environment and data")


def test_a_relative_run_directory_is_another_one_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint was ever complete: each rank wrote its part below its own working directory."""
    parts = []
    folder = tmp_path / ("long" * 20)  # of a long path the part that differs is shown
    for name in ("one", "other", "one"):
        (folder / name).mkdir(exist_ok=True, parents=True)
        monkeypatch.chdir(folder / name)
        parts.append(parts_of_start({"train": {"run_dir": "runs/a"}}))
    assert outcomes([parts[0], parts[2]]) == ["", ""]
    printed = refused(parts[:2])
    assert re.search(r"train\.run_dir = \.\.\.\w+/one/runs/a on rank 0", printed)
    assert re.search(r", \.\.\.\w+/other/runs/a on rank 1", printed)


def test_equal_ranks_agree_wherever_their_data_lie(tmp_path: Path) -> None:
    write_toy_shard(tmp_path / "copy" / "toy")
    own_copy = f"data.sources=[{{name: toy, paths: ['{tmp_path}/copy/toy'], max_epochs: 0}}]"
    one, other = parts_with(tmp_path), parts_with(tmp_path, own_copy, f"data.index_cache={tmp_path}/cache")
    assert outcomes([one, other, one]) == ["", "", ""]


def test_data_are_compared_by_content(tmp_path: Path) -> None:
    write_toy_shard(tmp_path / "copy" / "toy", seed=1)
    stale = f"data.sources=[{{name: toy, paths: ['{tmp_path}/copy/toy'], max_epochs: 0}}]"
    printed = refused([parts_with(tmp_path), parts_with(tmp_path), parts_with(tmp_path, stale)])
    assert printed.startswith("the ranks differ in data: toy = ")
    assert "on ranks 0-1 (" in printed


@pytest.mark.parametrize(
    ("part", "value"),
    [("program", {"source": "0" * 16}), ("versions", {"torch": "2.12.0"}), ("tokenizer", {"fingerprint": "0"})],
)
def test_programs_versions_and_tokenizers_are_compared(tmp_path: Path, part: str, value: Part) -> None:
    parts = parts_with(tmp_path)
    printed = refused([parts, {**parts, part: {**parts[part], **value}}])
    (name,) = value
    assert printed.startswith(f"the ranks differ in {part}: {name} = {parts[part][name]} on rank 0 (")
    assert f"{value[name]} on rank 1 (" in printed


def test_a_variable_that_changes_numbers_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_with(tmp_path)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    printed = refused([parts, parts_with(tmp_path)])
    assert "environment: NVIDIA_TF32_OVERRIDE = absent on rank 0" in printed
    assert "eth7" not in printed, "a node may have its own"


def test_who_refuses_alone_is_heard(tmp_path: Path) -> None:
    """Such as a rank whose node does not see the data; it has fewer parts, and those are equal."""
    parts = parts_with(tmp_path)
    printed = refused([parts, parts, parts_of_start_only(parts)], [None, None, "shard X does not exist"])
    assert printed.startswith("rank 2 (")
    assert printed.endswith("): shard X does not exist")


def parts_of_start_only(parts: dict[str, Part]) -> dict[str, Part]:
    return {name: parts[name] for name in ("settings", "program", "versions", "environment")}


def test_many_kinds_are_counted_not_listed(tmp_path: Path) -> None:
    parts = parts_with(tmp_path)
    printed = refused([{**parts, "settings": {"train.seed": str(rank)}} for rank in range(8)])
    assert printed.count(" on rank ") == agreement.MAX_KINDS
