"""What a run needs of its machines besides GEMMs: disk, memory, clocks, links. For `preflight`.

Each check measures, compares with what this configuration needs, and says both numbers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.collectives import all_reduce_max, all_reduce_sum, barrier
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.order.index_need import IndexNeed
from megatron_fp4.models.count import logical_shapes
from megatron_fp4.optim import state_bytes
from megatron_fp4.proofs.checks import CheckResult
from megatron_fp4.train.config import RunConfig

WRITE_BYTES = 32 * 2**20
LINK_BYTES = 64 * 2**20
MAX_CLOCK_SKEW_SECONDS = 2.0


def check_disk(config: RunConfig) -> CheckResult:
    """Free space for the checkpoints that are kept, one more being written; and the speed of writing."""
    folder = Path(config.train.run_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    each = state_bytes(logical_shapes(config.model), config.optim)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    if config.checkpoint.keep_every_tokens:
        kept += int(config.train.total_tokens // config.checkpoint.keep_every_tokens)
    free = shutil.disk_usage(folder).free
    needed = kept * each
    text = f"{kept} checkpoints of {_size(each)} need {_size(needed)}, {folder} has {_size(free)} free"
    if free < max(needed, WRITE_BYTES):
        return CheckResult("disk", False, f"{text}; free space, change train.run_dir or lower checkpoint.keep_last")
    try:
        speed = _write_speed(folder)
    except OSError as error:
        return CheckResult("disk", False, f"{folder} cannot be written: {error}")
    seconds, limit = each / speed, config.checkpoint.timeout_seconds
    text += f"; one process writes {_size(speed)}/s, a checkpoint takes it {seconds:.0f} s"
    if seconds > limit and config.parallel.tp * config.parallel.pp == 1 and config.parallel.dp <= 1:
        return CheckResult("disk", False, f"{text}, above checkpoint.timeout_seconds = {limit:g}")
    return CheckResult("disk", True, text)


def _write_speed(folder: Path) -> float:
    """Bytes per second, flushed to the device."""
    block = os.urandom(WRITE_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight_") as file:
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITE_BYTES / max(time.perf_counter() - began, 1e-6)


def check_index(config: DataConfig) -> CheckResult:
    """Where the epoch indices go, which may be of billions of documents; that the first fit was seen with the data."""
    need = IndexNeed.of(config)
    folder, text = need.folder, f"{need.documents:,} documents need {_size(need.num_bytes)} an epoch"
    if folder is None:
        return CheckResult("index", True, f"{text}, in the memory of each process")
    if not os.access(folder, os.W_OK):
        return CheckResult("index", False, f"{text}, and {folder} cannot be written; change data.index_cache")
    free = shutil.disk_usage(folder).free
    return CheckResult("index", True, f"{text}, {folder} of this node has {_size(free)} free")


def check_memory(needed: float, device: torch.device) -> CheckResult:
    """Free memory of this rank's GPU against `needed`, the planner's bytes for the fullest rank."""
    if device.type != "cuda":
        return CheckResult(
            "memory", None, f"the fullest rank will need {_size(needed)} (planned); no GPU here to compare"
        )
    free, _ = torch.cuda.mem_get_info(device)
    text = f"the fullest rank will need {_size(needed)} (planned), {_size(free)} of this GPU are free"
    return CheckResult("memory", needed < free, text)


def check_links(process: Process) -> list[CheckResult]:
    """Clocks of all ranks, and the time of an all-reduce over them. Collective over the world."""
    group = process.world
    if group.size == 1:
        return [CheckResult("ranks", None, "one process: links and clocks between ranks were not measured")]
    barrier(group)
    now = time.time()
    extremes = all_reduce_max(torch.tensor([now, -now], dtype=torch.float64, device=process.device), group)
    skew = float(extremes.sum())
    checks = [
        CheckResult("clocks", skew <= MAX_CLOCK_SKEW_SECONDS, f"clocks of {group.size} ranks agree to {skew:.2f} s")
    ]
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
    return [*checks, CheckResult("links", right, text if right else f"{text}, and the SUM IS WRONG")]


def _size(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
