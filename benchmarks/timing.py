"""Paired timing: run the candidates in turns, so that a busy machine slows all of them alike, and report ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Wall seconds, or seconds of all cores of this process: steadier where other programs share the machine."""


def paired_seconds(
    candidates: dict[str, Callable[[], object]], rounds: int = 9, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each candidate in each of `rounds` rounds, after one untimed call of each (compilation)."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def print_table(title: str, seconds: dict[str, list[float]], baseline: str) -> None:
    """Milliseconds of each candidate, the median ratio to the baseline of the same round, and the ratio of minima."""
    print(f"\n{title}\n{'':44s} {'median ms':>10s} {'min ms':>9s} {'ratio':>8s} {'of min':>8s}")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[baseline], strict=True))
        median, least = statistics.median(values) * 1e3, min(values) * 1e3
        print(f"{name:44s} {median:10.2f} {least:9.2f} {ratio:7.2f}x {least / min(seconds[baseline]) / 1e3:7.2f}x")
