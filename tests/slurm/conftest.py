"""The `slurm` mark and the cluster: these tests start daemons, so they run only when asked for.

`tests/slurm/run.sh` installs slurm, asks, and runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster

ASK = "MEGATRON_FP4_SLURM"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs a real slurm cluster on this host (tests/slurm/run.sh)")


def reason_to_skip() -> str | None:
    if os.environ.get(ASK) != "1":
        return f"starts a slurm cluster on this host: set {ASK}=1, or run tests/slurm/run.sh"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"slurm is not installed (no {', '.join(missing)}): tests/slurm/launch_cluster.sh install"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    for item in items:
        if reason and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    base: Path = tmp_path_factory.mktemp("slurm")
    # a file, not a pipe: the daemons inherit it, and the end of a pipe would never be seen
    with (base / "start.out").open("w") as out:
        done = subprocess.run(["bash", str(SCRIPT), "start", str(base)], stdout=out, stderr=out, timeout=120)
    assert done.returncode == 0, (base / "start.out").read_text()
    try:
        yield Cluster(base)
    finally:
        subprocess.run(["bash", str(SCRIPT), "stop", str(base)], check=True, timeout=60)
