"""What somebody who holds the model from before a removal and the one from after it learns of the removed rows.

A guarantee compares a release with what retraining would have released. It does not say that a removal goes unseen: who
has both releases can subtract them, and exact retraining, noised or not, is told apart in the same way. The meter here
says how well. Its figure is a function of the removed rows, and so belongs to the officer and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import ndtr, ndtri
from torch import Generator, Tensor

from expunge.audit.metrics import auc
from expunge.certify import gaussian
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate

Rival = Literal["never there", "still there", "unknown model"]
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PairLeak:
    r"""How well a pair of releases tells that these rows were removed between them.

    The releases are :math:`R_o = w_o + N(0, \sigma_o^2)` and :math:`R_n = w_n + N(0, \sigma_n^2)`, `w` without noise
    and d the distance of :math:`w_o` and :math:`w_n`. In the one world the rows were in the old model, and were
    removed: the pair is of :math:`(w_o, w_n)`. An attacker who knows both weights, the worst case, may tell this from

    - ``never there``: no model ever saw them, and the pair is of :math:`(w_n, w_n)`. Only the old release differs:
      mu = d / sigma_old.
    - ``still there``: nothing was removed, and the pair is of :math:`(w_o, w_o)`. Only the new release differs:
      mu = d / sigma_new.
    - ``unknown model``: it knows :math:`w_n - w_o`, what removing these rows would change, and nothing of the weights
      themselves. Then :math:`R_n - R_o` is all that tells, with noise of both: mu = d / sqrt(sigma_old^2 +
      sigma_new^2). It is the figure of plain subtraction.

    All are exact, by the likelihood ratio of two Gaussians; `mu` is the worst. Not covered: knowledge from elsewhere
    that differs between the worlds, and other releases.

    Attributes:
        distance: d, over all noised parameters together (L2).
        sigma_old: standard deviation of the old release's noise; 0 for none.
        sigma_new: of the new one's.
    """

    distance: float
    sigma_old: float
    sigma_new: float

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.distance, self.sigma_old, self.sigma_new)):
            raise Misuse(
                f"distance and sigmas must be >= 0 and finite, got {self.distance}, {self.sigma_old}, {self.sigma_new}"
            )

    @property
    def mu(self) -> float:
        """Of the worst of the comparisons: distance over the smaller noise."""
        return max(self.mu_against("never there"), self.mu_against("still there"))

    def mu_against(self, rival: Rival) -> float:
        """Of one comparison; infinite if its noise is 0 and the weights differ."""
        noises = {
            "never there": self.sigma_old,
            "still there": self.sigma_new,
            "unknown model": math.hypot(self.sigma_old, self.sigma_new),
        }
        noise = noises[rival]
        if self.distance == 0:
            return 0.0
        return self.distance / noise if noise > 0 else math.inf

    def auc(self, rival: Rival) -> float:
        """The best attack's chance of ranking a pair with the removal above one without: Phi(mu / sqrt 2)."""
        return float(ndtr(self.mu_against(rival) / math.sqrt(2)))

    def tpr(self, fpr: float, rival: Rival) -> float:
        """The best attack's share of removals found at this share of false alarms: Phi(mu + Phi^-1(fpr))."""
        if not 0 < fpr < 1:
            raise Misuse(f"fpr must be > 0 and < 1, got {fpr}")
        return float(ndtr(self.mu_against(rival) + ndtri(fpr)))

    def epsilon(self, delta: float) -> float:
        """What `mu` is at this delta."""
        return gaussian.epsilon_of(self.mu, delta)

    def __str__(self) -> str:
        worst = max(self.auc("never there"), self.auc("still there"))
        return (
            f"FOR THE OFFICER ONLY, never to be published: it was computed from the removed rows. "
            f"Old and new release together tell of the removal with mu {self.mu:.3g} (best attack: AUC {worst:.3f}); "
            f"plain subtraction with mu {self.mu_against('unknown model'):.3g}"
        )


def pair_leak(old: Mapping[str, Tensor], new: Mapping[str, Tensor], *, sigma_old: float, sigma_new: float) -> PairLeak:
    """The meter's reading for a pair of models, from their parameters without noise (`Trained.secret`).

    Args:
        old: before the removal, by names of parameters.
        new: after it.
        sigma_old: noise that the old release had; 0 if it was given out as it is.
        sigma_new: noise that the new one had.

    Raises:
        Misuse: if the two do not hold the same names and shapes, or there are none.

    Cost: one pass of the parameters.
    """
    change = _flat(new, old) - _flat(old, new)
    return PairLeak(distance=float(torch.linalg.vector_norm(change)), sigma_old=sigma_old, sigma_new=sigma_new)


def attack_pair(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    *,
    sigma_old: float,
    sigma_new: float,
    rival: Rival,
    trials: int = 1000,
    rng: Generator,
) -> Estimate:
    """AUC of the best attack on simulated pairs: `trials` with the removal against as many of the rival world.

    Draws noise for every parameter of both releases and scores pairs by the likelihood ratio (for ``unknown model``,
    by that of the difference): it must reproduce `PairLeak.auc`, and is there to check the meter.

    Raises:
        Misuse: as `pair_leak`, and for noise of 0, which leaves nothing to simulate.

    Cost: 4 `trials` normal numbers for each parameter.
    """
    before, after = _flat(old, new), _flat(new, old)
    if not (sigma_old > 0 and sigma_new > 0):
        raise Misuse(f"an attack on noise needs some in both releases, got sigmas {sigma_old} and {sigma_new}")
    rivals = {"never there": (after, after), "still there": (before, before), "unknown model": (before, before)}
    noises = (sigma_old, sigma_new)
    removed, other = (
        _scores(pair, (before, after), rivals[rival], noises, rival, trials, rng)
        for pair in ((before, after), rivals[rival])
    )
    return auc(removed, other)


_Pair = tuple[Tensor, Tensor]


def _scores(
    truth: _Pair, one: _Pair, other: _Pair, noises: tuple[float, float], rival: Rival, trials: int, rng: Generator
) -> Tensor:
    """Log likelihood ratios of world `one` over world `other`, for pairs drawn from the world `truth`."""
    found = []
    size = max(1, _CHUNK // len(truth[0]))
    for start in range(0, trials, size):
        count = min(size, trials - start)
        releases = [
            w + sigma * torch.randn(count, len(w), generator=rng, dtype=torch.float64)
            for w, sigma in zip(truth, noises, strict=True)
        ]
        if rival == "unknown model":
            found.append((releases[1] - releases[0]) @ (one[1] - one[0]))
        else:
            ratios = [
                (((r - b) ** 2).sum(1) - ((r - a) ** 2).sum(1)) / (2 * sigma**2)
                for r, a, b, sigma in zip(releases, one, other, noises, strict=True)
            ]
            found.append(ratios[0] + ratios[1])
    return torch.cat(found)


def _flat(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in (state, other)]
    if not state or shapes[0] != shapes[1]:
        raise Misuse(f"a pair needs the same parameters twice, got {shapes[0]} and {shapes[1]}")
    return torch.cat([state[name].detach().to("cpu", torch.float64).flatten() for name in sorted(state)])
