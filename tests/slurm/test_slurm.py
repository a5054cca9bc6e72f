"""launch/slurm.sbatch under a real scheduler: 2 nodes x 2 ranks, stopped in every way that slurm knows.

The program is the stand-in, which counts steps. Every promise is read from what the program recorded and from what
slurm says about the job, never from the script's own messages alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job, events

pytestmark = pytest.mark.slurm

SIGUSR1, SIGTERM = 10, 15
ENDLESS = "steps=1000000"
"""For a job that something is to happen to: it must not be done before."""
AWKWARD = ["note=two words", "quoted=a \"b\" 'c'", "glob=*", "dollar=$HOME", "empty=", "list=[1, 2]"]


def wait_for_start(cluster: Cluster, job: Job, run_dir: Path, attempt: int = 1) -> None:
    """Until the given attempt has joined all ranks and counts."""

    def started() -> bool:
        return sum(event["event"] == "start" for event in events(run_dir)) >= attempt

    cluster.wait_until(started, job)


def assert_went_on(run_dir: Path, more: int, stop_signal: int) -> None:
    """Two attempts, the second from where the first stopped, to its own end."""
    first, stopped, second, last = events(run_dir)
    assert (stopped["code"], stopped["signal"]) == (85, stop_signal), "the ranks did not get slurm's signal in time"
    assert 0 == first["step"] < stopped["step"]
    assert second["step"] == stopped["step"], "the second attempt did not continue from the saved state"
    assert (last["step"], last["code"]) == (second["step"] + more, 0)
    assert second["arguments"] == first["arguments"], "the requeued job got another command line"


def test_ranks_rendezvous_and_arguments(cluster: Cluster, tmp_path: Path) -> None:
    arguments = [f"train.run_dir={tmp_path}", "steps=2", *AWKWARD]
    stale = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    job = cluster.submit(arguments, variables=stale)
    assert job.wait() == "COMPLETED", job.log
    start = events(tmp_path)[0]
    assert start["world"] == 4
    assert start["hosts"][0] == start["hosts"][1] != start["hosts"][2] == start["hosts"][3], (
        "neighbouring ranks are not on one node: tensor parallelism would cross the network"
    )
    assert start["master"] == start["hosts"][0], "the submitting shell's MASTER_ADDR reached the ranks"
    assert start["arguments"] == arguments, "an argument was split, expanded or lost its quotes"


def test_scontrol_requeue(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit([f"train.run_dir={tmp_path}", ENDLESS, "more=10", "slow_exit=2"])
    wait_for_start(cluster, job, tmp_path)
    cluster.command("scontrol", "requeue", job.number)
    assert job.wait() == "COMPLETED", job.log
    assert_went_on(tmp_path, 10, SIGTERM)


def test_signal_before_the_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    """USR1 30 s before a limit of 2 min. Slurm looks every 30 s, so it comes 60 to 90 s after the start: a busy host
    needs most of that to start four ranks, and a signal before they are ready would end them."""
    arguments = [f"train.run_dir={tmp_path}", ENDLESS, "more=10"]
    job = cluster.submit(arguments, options=["--time=2", "--signal=USR1@30"])
    assert job.wait() == "COMPLETED", job.log
    assert_went_on(tmp_path, 10, SIGUSR1)
    assert job.field("Restarts") == "1"


def test_preemption(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit([f"train.run_dir={tmp_path / 'low'}", ENDLESS, "more=10", "slow_exit=2"])
    wait_for_start(cluster, job, tmp_path / "low")
    urgent = cluster.submit([f"train.run_dir={tmp_path / 'high'}", "steps=3"], options=["--partition=high"])
    assert urgent.wait() == "COMPLETED", urgent.log
    assert job.wait() == "COMPLETED", job.log
    assert_went_on(tmp_path / "low", 10, SIGTERM)


def test_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """The program leaves with 85 here too; requeueing on 85 alone would bring a cancelled job back."""
    job = cluster.submit([f"train.run_dir={tmp_path}", ENDLESS])
    wait_for_start(cluster, job, tmp_path)
    cluster.command("scancel", job.number)
    cluster.wait_until(lambda: cluster.command("squeue", "-h", "-j", job.number).strip() == "", job)
    assert job.field("JobState") == "CANCELLED"
    assert events(tmp_path)[-1]["code"] == 85, "the state was not saved on scancel"
    assert job.field("Restarts") == "0"


def test_wrong_world_size_is_refused_and_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit([f"train.run_dir={tmp_path}"], variables={"MEGATRON_FP4_EXPECTED_WORLD_SIZE": "8"})
    assert job.wait() == "FAILED", job.log
    assert (job.field("ExitCode"), job.field("Restarts")) == ("2:0", "0")
    assert "MEGATRON_FP4_EXPECTED_WORLD_SIZE = 8, but the launcher (srun) started 4 process(es)" in job.log
    assert events(tmp_path) == [], "the program trained with another world size than announced"


def test_crash_of_one_rank_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit([f"train.run_dir={tmp_path}", ENDLESS, "crash_at=3"])
    assert job.wait() == "FAILED", job.log
    assert job.field("ExitCode") != "85:0"
    assert job.field("Restarts") == "0", "a failure was requeued: a broken run would loop"
