"""`megatron-fp4 status`: whether a run lives, on this host or another, and where it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest

from megatron_fp4.cli.operate.status import main
from megatron_fp4.pretrain import main as pretrain
from megatron_fp4.storage.lock import RunLock
from megatron_fp4.storage.owner import start_of
from megatron_fp4.train.telemetry.operator.events import Events
from tests.helpers.tiny_run import TinyRun, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Stopped on request after the first step of 40."""
    run = tiny_run(
        tmp_path_factory.mktemp("status"), "precision=bf16", "model.num_layers=1", "train.exit_after_seconds=0.001"
    )
    assert pretrain(run.overrides) == 85
    return run


def status(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = main([str(run.run_dir), "--json"])
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return code, value


def hold(run: TinyRun, *, host: str, pid: int, age_seconds: float = 0.0) -> None:
    """A lock as a launch writes it."""
    lock = run.run_dir / "run.lock"
    body = {"host": host, "pid": pid, "start": start_of(pid), "since": "2026-01-01 00:00:00 UTC", "nonce": "x"}
    lock.write_text(json.dumps(body))
    touched = time.time() - age_seconds
    os.utime(lock, (touched, touched))


def test_a_stopped_run(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    code, value = status(run, capsys)
    assert (code, value["state"], value["step"], value["last_step"]) == (1, "stopped", 1, 40)
    assert value["save_step"] == 1
    assert isinstance(value["event"], dict)
    assert value["event"]["event"] == "stop"
    assert value["eta_seconds"] is None, "a run that stands still has no ETA"
    assert main([str(run.run_dir)]) == 1
    out = capsys.readouterr().out
    assert ": stopped, stopped on request (train.exit_after_seconds) after step 1\n" in out
    assert "step 1 of 40   loss " in out
    assert "last save: step 1, " in out


def test_a_run_that_lives_on_this_host(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(run.run_dir)
    lock.acquire()
    try:
        code, value = status(run, capsys)
    finally:
        lock.release()
    assert (code, value["state"]) == (0, "running")
    assert f"pid {os.getpid()} on host" in str(value["why"])


@pytest.mark.parametrize(
    ("age", "code", "state"), [(40.0, 0, "running"), (400.0, 1, "failed")], ids=["it beats", "its node died"]
)
def test_a_run_on_another_host_is_known_by_its_heartbeat(
    age: float, code: int, state: str, run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(run, host="n7", pid=1, age_seconds=age)
    try:
        assert main([str(run.run_dir)]) == code
    finally:
        (run.run_dir / "run.lock").unlink()
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert f" pid 1 on host n7 (since 2026-01-01 00:00:00 UTC, last sign of life {age:.0f} s ago)" in first
    assert f": {state}, " in first
    assert re.search(r"last metric \d+ s ago on host n7$", second)


def test_a_killed_run_left_its_lock(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    hold(run, host=socket.gethostname(), pid=2**22 + 1)
    try:
        code, value = status(run, capsys)
    finally:
        (run.run_dir / "run.lock").unlink()
    assert (code, value["state"]) == (1, "failed")
    assert "is gone and said nothing: killed, or its node died" in str(value["why"])


def test_by_the_last_event_and_metric(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = TinyRun(tmp_path / "copy", ())
    shutil.copytree(run.run_dir, copy.run_dir)
    Events(copy.run_dir).add("fail", 7, "out of patience")
    code, value = status(copy, capsys)
    assert (code, value["state"], value["why"]) == (1, "failed", "out of patience")
    Events(copy.run_dir).add("finish", 40, "")
    with open(copy.run_dir / "metrics.jsonl", "a") as file:
        values = {
            "consumed_tokens": 40 * 128.0,
            "tokens_per_second": 1e3,
            "wall_seconds": 0.1,
            "wall_time": time.time(),
        }
        file.write(json.dumps({"step": 40, "loss": "nan", **values}) + "\n" + '{"step": 41, "lo')
    code, value = status(copy, capsys)
    assert (code, value["state"], value["step"], value["loss"]) == (0, "finished", 40, "nan")
    assert main([str(copy.run_dir), "--watch", "0.01"]) == 0, "it watches a run that has ended"


def test_a_run_that_makes_no_step_is_still_starting_or_silent(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = TinyRun(tmp_path / "copy", ())
    shutil.copytree(run.run_dir, copy.run_dir)
    hold(copy, host="n7", pid=1)
    Events(copy.run_dir).add("resume", 1, "")
    assert status(copy, capsys)[1]["state"] == "starting"
    with open(copy.run_dir / "metrics.jsonl", "a") as file:
        for step in (2, 3):
            values = {"consumed_tokens": step * 128.0, "wall_seconds": 2.0, "wall_time": time.time() + 100 * step - 400}
            file.write(json.dumps({"step": step, "loss": 2.0, **values}) + "\n")
    os.truncate(copy.run_dir / "events.jsonl", 0)
    value = status(copy, capsys)[1]
    assert "no step for 100 s, where one takes" in str(value["why"])


def test_a_run_that_has_stored_no_settings_yet_is_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = TinyRun(tmp_path, ())
    hold(run, host="n7", pid=1)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ": starting, held by pid 1 on host n7" in out
    assert "\n  no metric yet\n" in out
    hold(run, host="n7", pid=1, age_seconds=400)
    assert status(run, capsys)[1]["state"] == "failed"


def test_no_age_is_negative(run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that ends while this looks, or on a host whose clock is ahead."""
    copy = TinyRun(tmp_path / "copy", ())
    shutil.copytree(run.run_dir, copy.run_dir)
    with open(copy.run_dir / "metrics.jsonl", "a") as file:
        values = {"consumed_tokens": 256.0, "wall_seconds": 2.0, "wall_time": time.time() + 30}
        file.write(json.dumps({"step": 2, "loss": 2.0, **values}) + "\n")
    assert status(copy, capsys)[1]["last_metric_age_seconds"] == 0.0
    main([str(copy.run_dir)])
    assert "last metric 0 s ago" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    assert main([str(tmp_path), "--watch", "0"]) == 2
