"""Numbers that were estimated, with the interval and the count that make them mean something."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy import special

from expunge.core.errors import Misuse


@dataclass(frozen=True)
class Estimate:
    """A value with a two-sided interval.

    Attributes:
        value: the point estimate.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of independent units behind it (rows, seeds or models: `interval` says which).
        level: coverage that the interval aims at.
        interval: how the interval was made, e.g. ``clopper-pearson over rows``.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    interval: str = "clopper-pearson over rows"

    def __post_init__(self) -> None:
        if not (self.low <= self.value <= self.high or math.isnan(self.value)):
            raise Misuse(f"an interval must hold its value, got {self.value} outside [{self.low}, {self.high}]")

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Estimate:
        """The estimate that `to_json` wrote."""
        return cls(**data)

    def __format__(self, spec: str) -> str:
        """``f"{e:.1%}"`` gives ``96.4 (95.9 to 96.8)`` in percent; other specs apply to all three figures."""
        if spec.endswith("%"):
            inner = spec[:-1] + "f"
            value, low, high = (format(100 * v, inner) for v in (self.value, self.low, self.high))
        else:
            value, low, high = (format(v, spec or ".3g") for v in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"

    def __str__(self) -> str:
        return format(self, "")


def proportion(successes: int, n: int, level: float = 0.95) -> Estimate:
    """Exact binomial (Clopper-Pearson) interval for a share of `n` independent rows.

    What it does not cover: the variation between trainings. One model scored on many rows says how that model
    does on such rows, not how another seed would do.

    Raises:
        Misuse: if n < 1 or successes lies outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise Misuse(f"a share needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    low, high = _clopper_pearson(successes, n, level)
    return Estimate(successes / n, low, high, n, level)


def share(total: float, n: int, level: float = 0.95) -> Estimate:
    """Mean of `n` independent numbers from 0 to 1 that sum to `total`, such as shares of several trainings each.

    The interval is Clopper and Pearson's, continued to broken counts: numbers within [0, 1] vary at most as much as
    zeros and ones of the same mean do. Of zeros and ones it is `proportion`.

    Raises:
        Misuse: if n < 1 or `total` lies outside 0..n.
    """
    if n < 1 or not -1e-9 <= total <= n + 1e-9:
        raise Misuse(f"a share needs 0 <= total <= n and n >= 1, got {total} of {n}")
    total = min(max(total, 0.0), float(n))
    low, high = _clopper_pearson(total, n, level)
    return Estimate(total / n, low, high, n, level, "clopper-pearson over units, each a mean")


def _clopper_pearson(successes: float, n: int, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(special.betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def mean(values: Sequence[float], level: float = 0.95, unit: str = "seeds") -> Estimate:
    """Mean of independent values with Student's t interval (assumes them roughly normal).

    With a single value the interval is infinite: one seed says nothing about the spread.
    """
    n = len(values)
    if n == 0:
        raise Misuse("a mean needs at least one value, got none")
    centre = math.fsum(values) / n
    if n == 1:
        return Estimate(centre, -math.inf, math.inf, 1, level, f"student t over {unit}")
    spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n)
    half = float(special.stdtrit(n - 1, 1 - (1 - level) / 2)) * spread
    return Estimate(centre, centre - half, centre + half, n, level, f"student t over {unit}")
