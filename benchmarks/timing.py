"""What the benchmarks share: pairs of runs side by side, their ratio, and the name of the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], object]


def seconds(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def measure(
    ours: str, ways: dict[str, Run], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, tuple[float, float]]:
    """
    Median seconds of each way, and the median over rounds of the time of ``ours`` over the way's, run side by side.

    Each round runs ``ours`` next to each peer, in changing order, so that a machine that slows down slows both.  With
    ``time.process_time`` for a clock the seconds are this process's own, which others hardly change.
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
                mine, theirs = seconds(ways[ours], clock), seconds(run, clock)
            else:
                theirs, mine = seconds(run, clock), seconds(ways[ours], clock)
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
