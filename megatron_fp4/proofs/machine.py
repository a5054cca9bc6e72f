"""What a run needs of its machines besides GEMMs: disk, memory, clocks, links. For `preflight`.

One idea: each check is a function that measures, compares with what this configuration needs, and returns one `Check`
with both numbers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.collectives import all_gather_object, all_reduce_sum, barrier
from megatron_fp4.models.count import by_kind, model_parameters
from megatron_fp4.train.config import RunConfig

STATE_BYTES = 12  # FP32 master weight and two moments, per parameter
WRITE_BYTES = 32 * 2**20
LINK_BYTES = 64 * 2**20
MAX_CLOCK_SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class Check:
    """ok: None where nothing could be measured here; `text` says why."""

    name: str
    ok: bool | None
    text: str


def check_disk(config: RunConfig) -> Check:
    """Free space for the checkpoints that are kept, one more being written; and the speed of writing."""
    place = Path(config.train.run_dir).resolve()
    while not place.exists():
        place = place.parent
    each = STATE_BYTES * sum(by_kind(model_parameters(config.model)).values())
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    if config.checkpoint.keep_every_tokens:
        kept += int(config.train.total_tokens // config.checkpoint.keep_every_tokens)
    free = shutil.disk_usage(place).free
    needed = kept * each
    text = f"{kept} checkpoints of {_size(each)} need {_size(needed)}, {place} has {_size(free)} free"
    if free < max(needed, WRITE_BYTES):
        return Check("disk", False, f"{text}; free space, change train.run_dir or lower checkpoint.keep_last")
    try:
        speed = _write_speed(place)
    except OSError as error:
        return Check("disk", False, f"{place} cannot be written: {error}")
    seconds, limit = each / speed, config.checkpoint.timeout_seconds
    text += f"; one process writes {_size(speed)}/s, a checkpoint takes it {seconds:.0f} s"
    if seconds > limit and config.parallel.tp * config.parallel.pp == 1 and config.parallel.dp <= 1:
        return Check("disk", False, f"{text}, above checkpoint.timeout_seconds = {limit:g}")
    return Check("disk", True, text)


def _write_speed(place: Path) -> float:
    """Bytes per second, flushed to the device."""
    block = os.urandom(WRITE_BYTES)
    with tempfile.NamedTemporaryFile(dir=place, prefix=".preflight_") as file:
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITE_BYTES / max(time.perf_counter() - began, 1e-6)


def check_memory(needed: float, device: torch.device) -> Check:
    """Free memory of this rank's GPU against `needed`, the planner's bytes for the fullest rank."""
    if device.type != "cuda":
        return Check("memory", None, f"the fullest rank will need {_size(needed)} (planned); no GPU here to compare")
    free, _ = torch.cuda.mem_get_info(device)
    text = f"the fullest rank will need {_size(needed)} (planned), {_size(free)} of this GPU are free"
    return Check("memory", needed < free, text)


def check_links(process: Process) -> list[Check]:
    """Clocks of all ranks, and the time of an all-reduce over them. Collective over the world."""
    group = process.world
    if group.size == 1:
        return [Check("ranks", None, "one process: links and clocks between ranks were not measured")]
    barrier(group)
    now = all_gather_object(time.time(), group)
    skew = max(now) - min(now)
    checks = [Check("clocks", skew <= MAX_CLOCK_SKEW_SECONDS, f"clocks of {group.size} ranks agree to {skew:.2f} s")]
    x = torch.ones(LINK_BYTES // 4, device=process.device)
    seconds = []
    for _ in range(3):
        barrier(group)
        began = time.perf_counter()
        total = all_reduce_sum(x, group)
        if process.device.type == "cuda":
            torch.cuda.synchronize(process.device)
        seconds.append(time.perf_counter() - began)
    right = bool((total == group.size).all())
    rate = 2 * (group.size - 1) / group.size * LINK_BYTES / min(seconds)
    text = f"all-reduce of {_size(LINK_BYTES)} over {group.size} ranks: {_size(rate)}/s per rank (bus bandwidth)"
    return [*checks, Check("links", right, text if right else f"{text}, and the SUM IS WRONG")]


def _size(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
