"""`megatron-fp4 checkpoint` on URLs: what a store holds is listed, verified, and made into others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4.checkpoint import offline
from megatron_fp4.cli.checkpoint import main
from megatron_fp4.storage.remote.client import Remote
from tests.checkpoint.mirror.stand import Stand, value_of


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    stand = Stand(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        stand.save(step)
        stand.look()
    return stand


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_list_and_inspect(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest = stand.contents().complete
    lines = printed(capsys, "list", stand.url).splitlines()
    assert lines[0] == stand.url
    assert lines[1].startswith(f"  {older}  tokens 1, score None, 0.0 MiB")
    assert lines[2].startswith(f"  {newest}")
    assert lines[2].endswith("<- latest")
    assert "step_00000002  tokens 2, score None" in printed(capsys, "list", str(stand.root))
    assert "master/w  8x4" in printed(capsys, "inspect", stand.url)
    assert "step 1, tokens 1" in printed(capsys, "inspect", f"{stand.url}/{older}")
    assert "is neither a complete checkpoint nor a mirror" in printed(capsys, "inspect", f"{stand.url}/none", code=2)


def test_verify(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest = stand.contents().complete
    assert "all files are as they were written" in printed(capsys, "verify", stand.url)
    remote = Remote(stand.url)
    remote.put(f"{newest}/data_0000.bin", b"x" + remote.read(f"{newest}/data_0000.bin")[1:])
    text = printed(capsys, "verify", f"{stand.url}/{older}", stand.url, code=1)
    assert f"{stand.url}: DAMAGED" in text
    assert f"{newest}/data_0000.bin has xxh3-64" in text
    assert f"{stand.url}/{older}: all files" in text


def test_extract_and_average(stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest = stand.contents().complete
    printed(capsys, "extract", stand.url, "--to", str(tmp_path / "extracted"))
    assert value_of(offline.resolve(tmp_path / "extracted")) == 2.0
    names = [f"{stand.url}/{older}", f"{stand.url}/{newest}"]
    printed(capsys, "average", *names, "--to", str(tmp_path / "mean"))
    assert value_of(offline.resolve(tmp_path / "mean")) == 1.5
