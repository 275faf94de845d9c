"""Requested rows that act together: gradients that pull one way, and near-copies in gradient space."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor

from expunge.core.errors import Misuse
from expunge.screen.asked import Asked
from expunge.screen.scene import Scene
from expunge.screen.sieve import Measure, Reader, Sieve


@dataclass(frozen=True, kw_only=True)
class Coalition(Sieve):
    """How many requested rows have gradients that agree. What isolation leaves open, and our own addition.

    ``agreement``: the largest eigenvalue of the matrix of the rows' cosines, negative ones set to 0: between 1, where
    no two agree, and k, where all k rows are copies in gradient space; among strangers a group of m copies alone makes
    it m. Lengths do not count, so that a few hard rows do not drown a group. ``pull``: the norm of the summed
    gradient, which is how hard the request pulls, hard rows and all.

    Rows with a cosine above `alike` are linked, and chains of links are a group (single linkage); rows of large groups
    are flagged.

    Attributes:
        by: ``agreement`` or ``pull``.
        alike: the cosine from which two rows are linked.
        smallest: rows of a group of so many are flagged.

    Cost: k squared inner products of the last layer's factors for k rows; one forward pass over all rows beforehand.
    Not guaranteed: rows of one class agree more than others do. Where benign requests are of one class, calibrate on
    such (`by="owners"` or ``"classes"``).
    """

    by: Literal["agreement", "pull"] = "agreement"
    alike: float = 0.95
    smallest: int = 3

    def __post_init__(self) -> None:
        if self.by not in ("agreement", "pull"):
            raise Misuse(f'by must be "agreement" or "pull", got "{self.by}"')
        if not 0 < self.alike <= 1 or self.smallest < 2:
            raise Misuse(f"alike must lie in (0, 1] and smallest be >= 2, got {self.alike} and {self.smallest}")

    def prepare(self, scene: Scene, *, rng: Generator) -> Reader:
        """One forward pass over all rows."""
        scene.whole  # noqa: B018  it is computed here once, and not at the first request
        return partial(self._measure, scene)

    def _measure(self, scene: Scene, asked: Asked) -> Measure:
        given = scene.of(asked)
        gram = given.cross(given).double().cpu()
        norms = gram.diagonal().clamp_min(0).sqrt()
        cosines = gram / (norms[:, None] * norms[None]).clamp_min(1e-30)
        cosines.fill_diagonal_(1)
        group = linked(cosines, self.alike)
        sizes = torch.bincount(group)[group]
        rows = (cosines.sum(1) - 1) / max(len(gram) - 1, 1)
        whole = largest(cosines) if self.by == "agreement" else float(gram.sum().clamp_min(0).sqrt())

        def reason(row: int) -> str:
            return f"mean cosine {float(rows[row]):.2f} with the rest of the request, one of {int(sizes[row])} alike"

        return Measure(rows=rows, whole=whole, flagged=sizes >= self.smallest, reason=reason)


def largest(cosines: Tensor) -> float:
    """Largest eigenvalue of the matrix with its negative entries set to 0; by power iteration past 128 rows.

    From a positive start it converges to the Perron root; what 64 steps reach is a lower bound.
    """
    matrix = cosines.clamp_min(0)
    if len(matrix) <= 128:
        return float(torch.linalg.eigvalsh(matrix)[-1])
    v = matrix.sum(1)
    for _ in range(64):
        v = matrix @ (v / v.norm())
    return float(v.norm())


def linked(cosines: Tensor, alike: float) -> Tensor:
    """(k,) the number of each row's group: rows joined by chains of cosines above `alike`. Cost: k^2 a round."""
    near = cosines >= alike
    group, before = torch.arange(len(cosines)), torch.tensor([])
    while not torch.equal(group, before):
        group, before = torch.where(near, group[None], len(group)).min(1).values, group
    numbers: Tensor = group.unique(return_inverse=True)[1]
    return numbers
