"""The real trainer under a real scheduler: requeued in mid-run, it ends with the losses of an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.slurm.cluster import Cluster, Job
from tests.train.resume.test_resume import losses

pytestmark = pytest.mark.slurm

STEPS = 40
PAUSE = {"TEST_FAULT": "pause,0,12,data"}
"""Rank 0 pauses in step 12, so that the requeue meets a run that is not done, however fast the host is."""


def submit(cluster: Cluster, run: TinyRun, variables: dict[str, str] | None = None) -> Job:
    return cluster.submit(list(run.overrides), module="tests.train.faults.faulty", variables=variables)


def test_requeue_resumes_to_the_same_losses(cluster: Cluster, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "parallel.tp=2", "train.save_interval_steps=50")
    job = submit(cluster, run, PAUSE)
    cluster.wait_until(lambda: max(losses(run.run_dir), default=0) >= 10, job)
    cluster.command("scontrol", "requeue", job.number)
    assert job.wait() == "COMPLETED", job.log
    assert job.field("Restarts") == "1"
    assert "stopped on request (" in job.log, "the ranks did not get slurm's signal"
    assert "resuming after step" in job.log, "the second attempt began anew"

    alone = run.with_overrides(run_dir=tmp_path / "alone")
    other = submit(cluster, alone)
    assert other.wait() == "COMPLETED", other.log
    expected, actual = losses(alone.run_dir), losses(run.run_dir)
    assert sorted(actual) == list(range(1, STEPS + 1))
    assert actual == expected, "the requeued run is another run"
