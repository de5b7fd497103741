"""What the benchmarks share: pairs of runs side by side, their ratio, and the name of the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], object]


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(ours: str, ways: dict[str, Run], rounds: int) -> dict[str, tuple[float, float]]:
    """
    Median seconds of each way, and the median over rounds of the time of ``ours`` over the way's, run side by side.

    Each round runs ``ours`` next to each peer, in changing order, so that a machine that slows down slows both.
    """
    for run in ways.values():
        run()
    all_ours: list[float] = []
    results = {ours: (0.0, 1.0)}
    for name, run in ways.items():
        if name == ours:
            continue
        times, ratios = [], []
        for number in range(rounds):
            if number % 2 == 0:
                mine, theirs = seconds(ways[ours]), seconds(run)
            else:
                theirs, mine = seconds(run), seconds(ways[ours])
            times.append(theirs)
            ratios.append(mine / theirs)
            all_ours.append(mine)
        results[name] = statistics.median(times), statistics.median(ratios)
    results[ours] = statistics.median(all_ours), 1.0
    return results


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
