"""What is around a run fails: loggers, the disk, a second launch. Training goes on, or is refused in one sentence."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fp4 import pretrain
from megatron_fp4.checkpoint import SaveFailed, commit
from megatron_fp4.data.ledger import read_step
from megatron_fp4.storage import append
from megatron_fp4.storage.lock import RunLock
from megatron_fp4.train import job
from megatron_fp4.train.sections import LoggingConfig, WandbMode
from megatron_fp4.train.telemetry import sinks
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import make_trainer

SHORT = ("train.stop_after_steps=6", "precision=bf16")


class FakeRun:
    def __init__(self, fail: bool) -> None:
        self.fail, self.seen = fail, []  # type: ignore[var-annotated]

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
        if self.fail and values["step"] == 3:
            raise ConnectionError("no network")
        self.seen.append(values["step"])

    def finish(self) -> None:
        pass


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]


def raise_no_key(**_: Any) -> None:
    raise RuntimeError("no API key configured")


def hang(**_: Any) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("init", "warning"),
    [
        (raise_no_key, "wandb logging is off from here on: RuntimeError: no API key configured"),
        (hang, "wandb logging is off from here on: it did not finish within"),
        (lambda **_: FakeRun(fail=True), "wandb logging is off from here on: ConnectionError: no network"),
    ],
    ids=["init raises", "init hangs", "log raises"],
)
def test_a_failing_logger_never_stops_or_delays_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], init: Any, warning: str
) -> None:
    fake_wandb(monkeypatch, init)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.5)
    run = tiny_run(tmp_path, *SHORT, "logging.wandb=online")
    began = time.monotonic()
    trainer, _ = make_trainer(run.overrides)
    assert trainer.fit() == 0
    trainer.outputs.metrics.close()
    assert time.monotonic() - began < 30, "training waited for the logger"
    steps = [record["step"] for record in read_metrics(run.run_dir) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6], "the local file must be complete"
    errors = capsys.readouterr().err
    assert errors.count("wandb logging is off") == 1, "it must be said once"
    assert warning in errors


def test_a_healthy_logger_gets_everything_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRun(fail=False)
    fake_wandb(monkeypatch, lambda **_: fake)
    trainer, _ = make_trainer(tiny_run(tmp_path, *SHORT, "logging.wandb=online").overrides)
    trainer.fit()
    trainer.outputs.metrics.close()
    assert list(dict.fromkeys(fake.seen)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("key", "mode"), [(True, "online"), (False, "offline")])
def test_wandb_goes_online_where_there_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bool, mode: str
) -> None:
    modes: list[str] = []
    fake_wandb(monkeypatch, lambda **settings: modes.append(settings["mode"]) or FakeRun(fail=False))
    asked: list[dict[str, Any]] = []
    sys.modules["wandb"].login = lambda **how: asked.append(how) or key
    sinks.WandbSink(LoggingConfig(wandb=WandbMode.auto), tmp_path, "id", {})
    assert modes == [mode]
    assert asked == [{"prompt": False}], "a job without a terminal must not be asked for a key"


def test_a_full_queue_turns_a_logger_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sinks, "MAX_WAITING", 3)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.1)
    sink = sinks.BackgroundSink("slow", lambda: time.sleep(60))  # type: ignore[arg-type, return-value]
    for step in range(10):
        sink.write(step, {})
    sink.close()
    assert capsys.readouterr().err.count("slow logging is off from here on: 3 records wait") == 1


def test_a_full_disk_costs_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save after step 2 fails; training goes on, the one after step 4 is the retry."""
    right = commit.write_part

    def full(directory: Path, *args: Any) -> Any:
        if directory.name.startswith("step_00000002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(directory, *args)

    monkeypatch.setattr(commit, "write_part", full)
    run = tiny_run(tmp_path, *SHORT, "train.save_interval_steps=2")
    trainer, console = make_trainer(run.overrides)
    assert trainer.fit() == 0
    assert any("checkpoint 2: failed" in text and "No space left" in text for text in console.said)
    saves = {record["step"]: record["save/failed"] for record in read_metrics(run.run_dir) if "save/failed" in record}
    assert saves == {2: 1.0, 4: 0.0, 6: 0.0}
    assert sorted(path.name for path in (run.run_dir / "checkpoints").glob("step_*")) == [
        "step_00000004",
        "step_00000006",
    ], "what the failed save had written must be gone"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_is_not_done_before_its_last_state_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """The last save fails and is made again; if that fails too, neither 0 nor the code for a requeue may be given."""
    right, room = commit.write_part, iter([False, True, False, False])

    def full(directory: Path, *args: Any) -> Any:
        if directory.name.startswith("step_00000004") or next(room):
            return right(directory, *args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit, "write_part", full)
    settings = (*SHORT, "train.save_interval_steps=4", f"checkpoint.asynchronous={asynchronous}")
    run = tiny_run(tmp_path, *settings)
    trainer, _ = make_trainer(run.overrides)
    assert trainer.fit() == 0
    assert trainer.run.store.complete_steps() == [4, 6]
    trainer, _ = make_trainer(tiny_run(tmp_path, *settings).with_overrides(run_dir=tmp_path / "full").overrides)
    with pytest.raises(SaveFailed, match=r"after step 6, .* was not saved: .*No space left.* that of step 4"):
        trainer.fit()


def test_a_disk_without_room_for_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics and the ledger of steps 2 to 4 are refused, the first of them in the middle of a line."""
    run, right = tiny_run(tmp_path, *SHORT), os.write
    trainer, _ = make_trainer(run.overrides)

    def write(file: int, data: bytes) -> int:
        if not 2 <= trainer.position.step <= 4:
            return right(file, data)
        if trainer.position.step == 2 and len(data) > 20:
            return right(file, bytes(data[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(append.os, "write", write)
    assert trainer.fit() == 0, "a full disk must not end the run"
    monkeypatch.undo()
    trainer.outputs.metrics.close()
    assert [r["step"] for r in read_metrics(run.run_dir) if "loss" in r] == [1, 2, 3, 4, 5, 6], (
        "a line was lost or torn"
    )
    assert read_step(run.run_dir, 3).first_sample == 8, "the ledger lost a step"


def test_a_second_launch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, *SHORT)
    lock = RunLock(run.run_dir)
    lock.acquire()
    try:
        assert pretrain.main(run.overrides) == 2
    finally:
        lock.release()
    assert "is in use by" in capsys.readouterr().err
    assert not (run.run_dir / "metrics.jsonl").exists(), "the refused launch wrote into the other's run"


def test_a_refused_start_leaves_no_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, *SHORT, "train.resume=required")
    assert pretrain.main(run.overrides) == 2
    assert "train.resume=required, but" in capsys.readouterr().err
    assert not (run.run_dir / "run.lock").exists(), "a start from another host would wait 180 s"


def test_a_run_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot be there at all; or the disk is full after the lock was written."""
    run = tiny_run(tmp_path, *SHORT)
    (tmp_path / "file").write_text("")
    assert pretrain.main(run.with_overrides(run_dir=tmp_path / "file" / "run").overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the run directory {tmp_path}/file/run cannot be written (")
    assert error.count("\n") == 1

    (run.run_dir / "checkpoints").mkdir(parents=True)
    (run.run_dir / "ledger.jsonl").mkdir()
    assert pretrain.main(run.overrides) == 2
    assert "ledger.jsonl" in capsys.readouterr().err, "it would have been a traceback in the first step"
    (run.run_dir / "ledger.jsonl").rmdir()
    (run.run_dir / "checkpoints").rmdir()
    (run.run_dir / "checkpoints").write_text("")
    assert pretrain.main(run.overrides) == 2
    assert "checkpoints" in capsys.readouterr().err, "a run would find out at its first save"
    (run.run_dir / "checkpoints").unlink()
    (run.run_dir / "checkpoints").symlink_to(tmp_path / "unmounted")
    assert pretrain.main(run.overrides) == 2
    assert "checkpoints" in capsys.readouterr().err, "the run began at step 1, and would have saved nothing"
    (run.run_dir / "checkpoints").unlink()

    def full(path: Path, *_: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(job, "write_durably", full)
    assert pretrain.main(run.overrides) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (run.run_dir / "run.lock").exists()


def test_metrics_that_a_power_cut_has_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Blocks that were never written read as zeros. The run goes on, says so, and loses no good line."""
    run = tiny_run(tmp_path, *SHORT, "train.save_interval_steps=3")
    make_trainer(run.overrides)[0].fit()
    metrics = run.run_dir / "metrics.jsonl"
    first, second, *others = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([first, b"\0" * 4096, second, b'{"step": 2, "lo', b"\0" * 99, b"\n", *others]))
    with caplog.at_level("WARNING"):
        trainer, _ = make_trainer((*run.overrides, "train.stop_after_steps=7"))
    assert "metrics.jsonl: 2 damaged line(s) were set aside in metrics.jsonl.damaged" in caplog.text
    trainer.fit()
    steps = [record["step"] for record in read_metrics(run.run_dir) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6, 7], "a good line was lost"
    assert (run.run_dir / "metrics.jsonl.damaged").read_bytes() == b'\n{"step": 2, "lo\n'
