"""Rows with a gradient of unusual size: what the model has not fitted moves it most when it goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor

from expunge.core.errors import Misuse
from expunge.screen.asked import Asked
from expunge.screen.scene import Scene, inner
from expunge.screen.sieve import Measure, Reader, Sieve


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Sieve):
    """The norm of each requested row's gradient; of a replacement, that of the difference of two.

    A baseline of the field: norms with an interquartile rule, as others say that FedMUA has them. Blind to who acts
    together: large rows are often just hard ones. The request's score is the mean norm.

    Attributes:
        layers: ``all`` parameters, or the ``last`` layer's.
        fence: a row is flagged above the third quartile of all rows by so many interquartile ranges.
        quantile: flag above this quantile of all rows instead; None: by the fence.

    Cost: one forward and one backward pass over all rows, no gradient is kept.
    """

    layers: Literal["all", "last"] = "all"
    fence: float = 1.5
    quantile: float | None = None

    def __post_init__(self) -> None:
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise Misuse(f"quantile must lie between 0 and 1, got {self.quantile}")
        if self.layers not in ("all", "last"):
            raise Misuse(f'layers must be "all" or "last", got "{self.layers}"')

    def prepare(self, scene: Scene, *, rng: Generator) -> Reader:
        """The norms of all rows, and where the unusual ones begin."""
        squares = scene.squares if self.layers == "all" else scene.whole.squares().double().cpu()
        norms = squares.sqrt()
        return partial(self._measure, scene, norms, self._limit(norms))

    def _limit(self, norms: Tensor) -> float:
        if self.quantile is not None:
            return _quantile(norms, self.quantile)
        low, high = _quantile(norms, 0.25), _quantile(norms, 0.75)
        return high + self.fence * (high - low)

    def _measure(self, scene: Scene, norms: Tensor, limit: float, asked: Asked) -> Measure:
        found = norms[scene.index(asked)]
        if asked.new is not None:
            found = self._differences(scene, asked)
        if asked.strangers is not None:
            found = torch.cat([found, self._of(scene, asked)])

        def reason(row: int) -> str:
            return f"gradient norm {float(found[row]):.3g}, unusual above {limit:.3g}"

        return Measure(rows=found, whole=float(found.mean()), flagged=found > limit, reason=reason)

    def _of(self, scene: Scene, asked: Asked) -> Tensor:
        rows = asked.strangers
        if rows is None:
            return torch.zeros(0, dtype=torch.float64)
        squares = scene.squares_of(rows) if self.layers == "all" else scene.last(rows).squares().double().cpu()
        return squares.sqrt()

    def _differences(self, scene: Scene, asked: Asked) -> Tensor:
        if self.layers == "last" or asked.new is None:
            return scene.of(asked).squares().double().cpu().sqrt()
        old = scene.records.select(asked.places)
        parts = [
            inner(a, a) + inner(b, b) - 2 * inner(a, b)
            for a, b in zip(scene.pieces(asked.new), scene.pieces(old), strict=True)
        ]
        return torch.cat(parts).clamp_min(0).sqrt()


def _quantile(values: Tensor, at: float) -> float:
    ordered = values.sort().values  # torch.quantile refuses more than 16 million values
    return float(ordered[min(int(at * len(ordered)), len(ordered) - 1)])
