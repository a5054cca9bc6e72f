"""When, on what and by which command a run was launched: `launches.jsonl` in its directory, a line for each launch.

Settings say what a run computes; months later the question is who started it, when, on which machine. A launch that
went back to an earlier step than the one before it voids what that one did from there on, as in the metrics.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megatron_fp4.models.count import model_parameters
from megatron_fp4.storage.append import AppendFile, read_values
from megatron_fp4.train.resume.provenance import git_state, versions
from megatron_fp4.train.run import Run

LAUNCHES = "launches.jsonl"


@dataclass(frozen=True)
class LaunchRecord:
    """One launch.

    step: of the checkpoint from which it went on, 0 for a new run. wall_time: seconds since 1970. command: as typed on
    rank 0. parameters: of the model. versions: of the packages that decide the numbers, and the commit.
    """

    step: int
    wall_time: float
    command: str
    ranks: int
    device: str
    parameters: int
    versions: Mapping[str, str] = field(default_factory=dict)


def record_launch(run: Run, step: int) -> None:
    """Append the present launch, which goes on after `step`. Main rank."""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    launch = LaunchRecord(
        step=step,
        wall_time=time.time(),
        command=shlex.join(sys.orig_argv),
        ranks=run.mesh.world.size,
        device=device,
        parameters=sum(one.numel for one in model_parameters(run.config.model)),
        versions=versions() | ({"commit": commit} if (commit := git_state()) else {}),
    )
    path = Path(run.config.train.run_dir) / LAUNCHES
    if step == 0:
        path.unlink(missing_ok=True)
    file = AppendFile(path)
    file.add(asdict(launch))
    file.close()


def read_launches(run_dir: Path) -> list[LaunchRecord]:
    """The launches whose steps count, in order; none of a run that kept no such file."""
    launches: list[LaunchRecord] = []
    for line in read_values(run_dir / LAUNCHES):
        try:
            launch = LaunchRecord(**line)
        except TypeError:  # of another version
            continue
        launches = [*(earlier for earlier in launches if not 0 < launch.step <= earlier.step), launch]
    return launches
