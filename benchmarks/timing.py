"""Paired timing: run the candidates in turns, so that a busy machine slows all of them alike, and report ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def paired_seconds(candidates: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, list[float]]:
    """Wall seconds of each candidate in each of `rounds` rounds, after one untimed call of each (compilation)."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def print_table(title: str, seconds: dict[str, list[float]], baseline: str) -> None:
    """Median milliseconds of each candidate, and the median of its ratios to the baseline of the same round."""
    print(f"\n{title}\n{'':44s} {'median ms':>10s} {'min ms':>9s} {'ratio':>8s}")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[baseline], strict=True))
        print(f"{name:44s} {statistics.median(values) * 1e3:10.2f} {min(values) * 1e3:9.2f} {ratio:7.2f}x")
