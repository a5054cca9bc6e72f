"""The `slurm` mark and the cluster: these tests need a running one, so they run only when they are told where it is.

`tests/slurm/run.sh` installs slurm, starts a cluster, tells, runs them, and stops it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

BASE = "MEGATRON_FP4_SLURM"
"""Folder of the cluster that `launch_cluster.sh start` started."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs a real slurm cluster on this host (tests/slurm/run.sh)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(BASE):
        return
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=f"{BASE} names no slurm cluster: run tests/slurm/run.sh"))


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return Cluster(Path(os.environ[BASE]))
