"""A checkpoint in one process: found, listed, verified, read whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.checkpoint import offline
from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.storage import patience
from megatron_fp4.storage.patience import UnreadableFile
from tests.checkpoint.synthetic import Layout, logical_shapes, save_one, shards_of, two_pieces, whole


def test_list_and_read_whole(tmp_path: Path) -> None:
    path = save_one(tmp_path, 3, [*two_pieces(1.0), *shards_of(Layout(), 0, filled=True)])
    infos = {info.key: info for info in offline.list_tensors(offline.resolve(tmp_path))}
    assert len(infos) == 3 * len(logical_shapes()) + 1
    assert infos["master/w"].num_pieces == 2
    assert (infos["master/w"].shape, infos["master/w"].num_bytes) == ((5, 3), 60)
    name = "blocks.3.q"
    assert torch.equal(offline.read_tensor(path, f"exp_avg/{name}"), whole("exp_avg", name, logical_shapes()[name]))
    with pytest.raises(ValueError, match="has no tensor master/nothing; it has"):
        offline.read_tensor(path, "master/nothing")
    assert read_state(path) == {"step": 3, "tokens": 3, "score": 1.5, "meta": {"tokens": 3}}


def test_resolve(tmp_path: Path) -> None:
    path = save_one(tmp_path / "run", 3, two_pieces(1.0))
    assert offline.resolve(tmp_path / "run") == path == offline.resolve(path)
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor"):
        offline.resolve(tmp_path)


def test_verify(tmp_path: Path) -> None:
    path = save_one(tmp_path, 3, two_pieces(1.0))
    assert offline.verify(path) == []
    (path / "state.json").write_text("{}")
    (path / "layout.bin").unlink()
    problems = offline.verify(path)
    assert len(problems) == 2
    assert "layout.bin is missing, expected" in problems[0]
    assert "state.json has 2 bytes, expected" in problems[1]
    with pytest.raises(ValueError, match=r"layout\.bin is missing"):
        offline.list_tensors(path)


def test_tensors_of_a_file_server_that_pauses_and_of_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "RETRY_SECONDS", (0.0, 0.0))
    path = save_one(tmp_path, 3, two_pieces(1.0))
    right, failures = os.preadv, iter(range(2))

    def preadv(*arguments: Any) -> Any:
        if next(failures, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return right(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    assert bool((offline.read_tensor(path, "master/w") == 1.0).any()), "it answers at the third try"
    failures = iter(range(99))
    with pytest.raises(UnreadableFile, match="Stale file handle"):
        offline.read_tensor(path, "master/w")
    monkeypatch.undo()
    os.truncate(path / "data_0000.bin", 40)
    with pytest.raises(ValueError, match="checkpoint step_00000003 is refused"):
        offline.read_tensor(path, "master/w")
