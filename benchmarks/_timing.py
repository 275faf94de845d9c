"""Timings that can be trusted on a busy machine: both sides in turn, several rounds, the median ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Median seconds of two pieces of work, and the median of the ratios ``slow / quick`` round by round."""

    slow_s: float
    quick_s: float
    ratio: float


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(slow: Callable[[], object], quick: Callable[[], object], rounds: int) -> Paired:
    """Time both in turn, after the caller has warmed them up."""
    pairs = [(seconds(slow), seconds(quick)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    return Paired(statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio)
