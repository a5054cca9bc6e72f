"""A run with a mirror at a real S3 server: killed and its disk lost, it goes on from the store with equal losses."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from megatron_fp4.checkpoint.mirror.contents import look_at_mirror
from megatron_fp4.checkpoint.mirror.state import MirrorState
from megatron_fp4.cli.main import run as run_command
from megatron_fp4.storage.remote.client import Remote
from megatron_fp4.storage.remote.lease import Lease, LeaseHeld
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.stores import BUCKET, CREDENTIALS, s3_server
from tests.helpers.tiny_run import tiny_run
from tests.train.resume.test_resume import losses

URL = f"s3://{BUCKET}/runs/killed"
SETTINGS = ("train.total_tokens=1000000", "train.save_interval_steps=4", f"checkpoint.mirror={URL}")


def test_killed_and_its_disk_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        killed = tiny_run(tmp_path, *SETTINGS)
        process = killed.start()
        mirrored, deadline = 0, time.monotonic() + 120
        while not (mirrored and max(losses(killed.run_dir)) >= mirrored + 6):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            state = MirrorState.read(killed.run_dir)
            mirrored = (state.step or 0) if state else 0
            time.sleep(0.02)
        with pytest.raises(LeaseHeld, match=r"choose another checkpoint\.mirror"):
            Lease(Remote(URL)).acquire()
        process.kill()
        output = process.communicate()[0]
        before = losses(killed.run_dir)
        assert run_command(["status", str(killed.run_dir)]) == 1
        assert f"mirror: step {mirrored}" in capsys.readouterr().out or mirrored
        shutil.copytree(killed.run_dir, tmp_path / "what_was_there")
        shutil.rmtree(killed.run_dir)

        names = look_at_mirror(Remote(URL)).order()
        last = max(names[0].step + 4, max(before))
        resumed = killed.with_overrides(f"train.stop_after_steps={last}", run_dir=tmp_path / "resumed")
        output += resumed.run()
        assert f"checkpoint {names[0].step} was brought from {URL}" in output
        assert f"resuming after step {names[0].step}" in output
        common = {step: loss for step, loss in before.items() if step > names[0].step}
        assert common, "the killed run made no step after the mirrored one: nothing is compared"
        assert {step: losses(resumed.run_dir)[step] for step in common} == common
        assert look_at_mirror(Remote(URL)).order()[0].step == last, "the end of a run waits for its mirror"
        assert any("mirror/seconds" in record for record in read_metrics(resumed.run_dir))
    for folder in (tmp_path / "what_was_there", resumed.run_dir):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert not any(secret.encode() in path.read_bytes() for secret in CREDENTIALS.values()), path
    assert not any(secret in output for secret in CREDENTIALS.values())
    assert os.path.exists(resumed.run_dir / "mirror.json")
