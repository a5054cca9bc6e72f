"""What a run costs from its first step to its last: hours, energy, failures, data, checkpoints, host memory.

Goodput by Young (1974) and Daly (2006): with a mean time M between failures, a restart of R seconds and a save that
stops the run for d seconds, a run that saves every t seconds loses d / t to saves and (t / 2 + R) / M to failures; the
least at t = sqrt(2 d M). A save that is written in the background stops the run only for the copy to the host, but the
next one waits until it is written: a shorter interval than that gains nothing, and stops the run for the rest.

Not here: the time of a step (time.py).
"""

from __future__ import annotations

import math
from typing import Any

from megatron_fp4.data.shards.shard import token_dtype
from megatron_fp4.models.count import Flops, logical_shapes
from megatron_fp4.optim import state_bytes
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.indices import index_section
from megatron_fp4.train.checked import CheckedConfig

HOUR, DAY = 3600.0, 86400.0
HARDLY = 0.5
"""Part of the time that should be progress."""
FAR, LITTLE = 3.0, 0.001
"""How many times shorter or longer than the best interval a save interval may be without a warning; what a longer one
may lose of the time."""


def whole_run_section(checked: CheckedConfig, flops: Flops, seconds: float, site: Site) -> dict[str, Any]:
    """seconds: of all steps, as expected."""
    config, assumptions = checked.config, site.assumptions
    evaluation = _evaluation_seconds(checked, flops, site)
    saves = _saves(checked, seconds, site)
    productive = seconds + evaluation
    wall = productive / saves["goodput"]
    gpu_hours = wall / HOUR * site.num_gpus
    dtype_bytes = token_dtype(config.model.vocab_size).itemsize
    index = index_section(config.data, config.run_tokens, assumptions.tokens_per_document)
    copy = saves["bytes_per_gpu"] if config.checkpoint.asynchronous else 0.0
    return {
        "evaluation_seconds": evaluation,
        "wall_days": wall / DAY,
        "tokens_per_day": config.run_tokens / wall * DAY,
        "gpu_hours": gpu_hours,
        "cost": gpu_hours * assumptions.price_per_gpu_hour or None,
        "megawatt_hours": gpu_hours * site.machine.kilowatts / 1000,
        "kilowatts_per_gpu": site.machine.kilowatts,
        "data_bytes": config.run_tokens * dtype_bytes,
        "bytes_per_token": dtype_bytes,
        "data_index": index,
        "host_bytes_per_gpu": copy + (0 if index["folder"] else index["bytes"]),
        "saves": saves,
    }


def _evaluation_seconds(checked: CheckedConfig, flops: Flops, site: Site) -> float:
    """Forward passes in BF16, at the same part of the peak."""
    config = checked.config
    every = config.train.eval_interval_steps
    times = 1 + config.total_steps // every if every else 0
    tokens = times * sum(item.max_tokens for item in config.data.evaluation)
    rate = site.machine.gpu.rate("bf16") * site.assumptions.efficiency * site.num_gpus
    return tokens * flops.forward / rate


def _saves(checked: CheckedConfig, seconds: float, site: Site) -> dict[str, Any]:
    """What saves and failures take, and how often a save is worth it."""
    config, assumptions = checked.config, site.assumptions
    size = float(state_bytes(logical_shapes(config.model), config.optim))
    per_gpu = size / site.num_gpus
    written = size / (1e9 * assumptions.storage_gb_per_second)
    copied = per_gpu / (1e9 * site.machine.host_link_gb_per_second) + assumptions.save_stop_seconds
    blocking = copied if config.checkpoint.asynchronous else written
    between_failures = assumptions.failure_gpu_hours / site.num_gpus * HOUR
    best = max(math.sqrt(2 * blocking * between_failures), written)
    steps = config.total_steps
    step = seconds / steps
    every = config.train.save_interval_steps or steps
    times = -(-steps // every)
    kept = min(times, _kept(checked))
    interval = every * step
    waiting = max(0.0, written - interval) if config.checkpoint.asynchronous else 0.0
    return {
        "bytes": size,
        "bytes_per_gpu": per_gpu,
        "seconds": written,
        "blocking_seconds": blocking,
        "interval_steps": every,
        "interval_seconds": interval,
        "best_interval_seconds": best,
        "best_interval_steps": max(1, min(steps, round(best / step))),
        "seconds_between_failures": between_failures,
        "expected_failures": seconds / between_failures,
        "goodput": goodput(interval, blocking + waiting, between_failures, assumptions.restart_seconds),
        "best_goodput": goodput(best, blocking, between_failures, assumptions.restart_seconds),
        "times": times,
        "written_bytes": times * size,
        "written_bytes_per_second": size / interval,
        "kept": kept,
        "kept_bytes": kept * size,
    }


def goodput(interval: float, blocking: float, between_failures: float, restart: float) -> float:
    """Part of the time that moves a run forward, by Daly's first order; all arguments in seconds."""
    return 1.0 / (1.0 + blocking / interval + (interval / 2 + restart) / between_failures)


def _kept(checked: CheckedConfig) -> int:
    """Checkpoints that stay at the end, by the rules of `checkpoint`."""
    rules = checked.config.checkpoint
    archived = checked.config.run_tokens // rules.keep_every_tokens if rules.keep_every_tokens else 0
    return rules.keep_last + rules.keep_best + archived


def failure_warnings(section: dict[str, Any]) -> list[dict[str, str]]:
    """Where failures take more than half of the time even if saves are as well placed as can be."""
    saves = section["saves"]
    if saves["best_goodput"] >= HARDLY:
        return []
    text = f"one every {saves['seconds_between_failures']:.0f} s leaves at best {saves['best_goodput']:.1%} of the time"
    remedy = "to progress; check --assume failure_gpu_hours and restart_seconds"
    return [{"about": "failures", "severity": "slow", "text": f"{text} {remedy}"}]


def save_warnings(section: dict[str, Any]) -> list[dict[str, str]]:
    """Where the save interval is far from the best one."""
    saves = section["saves"]
    interval, best = saves["interval_seconds"], saves["best_interval_seconds"]
    written = saves["seconds"]
    text = (
        f"{saves['bytes'] / 1e9:.0f} GB are saved every {interval:.0f} s (train.save_interval_steps ="
        f" {saves['interval_steps']})"
    )
    remedy = f"the best interval is {best:.0f} s, train.save_interval_steps={saves['best_interval_steps']}"
    if interval < written:
        return [{"about": "saves", "severity": "error", "text": f"{text}, but take {written:.0f} s to write; {remedy}"}]
    if saves["interval_steps"] == saves["best_interval_steps"]:  # of a run that ends before its first save was worth it
        return []
    gain = saves["best_goodput"] - saves["goodput"]
    if interval < best / FAR or (interval > best * FAR and gain > LITTLE):
        why = f"{saves['goodput']:.1%} of the time is progress, {gain:.1%} less than at best; {remedy}"
        return [{"about": "saves", "severity": "slow", "text": f"{text}; {why}"}]
    return []
