"""Real removals by each certified method, and what they show: accuracy with noise, seconds, and what is claimed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.audit import accuracy
from expunge.certify.accountant import Budget, charge
from expunge.certify.features import features
from expunge.certify.noise import secret_normal
from expunge.core.claim import Guarantee
from expunge.core.coins import child, generator
from expunge.core.errors import BudgetExhausted, Impossible, Misuse, NothingChanged, Unsupported
from expunge.core.estimate import Estimate, mean
from expunge.core.events import PrivateSteps
from expunge.core.protocols import Unlearned
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.models import head_of
from expunge.study.certified_bench import Bench
from expunge.study.certified_ways import WAYS, Started, Way, Wish

Can = Literal["yes", "current only", "no"]
SIGMAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
HALF_A_POINT = 0.005

_REFUSALS = (Unsupported, Impossible, Misuse, BudgetExhausted, NothingChanged)
_LATER_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a real removal showed.

    Attributes:
        accuracy: of the model that is given out, noise included, on the test rows: mean over draws of the noise.
        retrained: the same of a model without noise that was trained by the way's recipe on what remains; one
            training, so that its interval is over rows.
        seconds_first: of the first request.
        seconds_later: mean over the later ones that were tried; None without any.
        later: how many those are.
        early_first: accuracy of retraining by the user's recipe that stops after as long as the first request took;
            None for a model that cannot be trained anew.
        early_later: the same for a later request.
    """

    accuracy: Estimate
    retrained: Estimate
    seconds_first: float
    seconds_later: float | None
    later: int
    early_first: float | None
    early_later: float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method and the budget.

    Attributes:
        method: the way, a word of `WAYS`.
        can: whether it honours the budget; ``current only`` if nothing bounds what all its releases tell together.
        why: if it does not: the reason.
        demand: what the recipe must be from the start; empty if it is the user's as it is.
        basis: of its guarantee: proved, conditional or none; None if there was no removal.
        sigma: standard deviation of its noise, in the units in which the method adds it.
        cap: L2 distance from the reference that a release keeps to, in the same units.
        epsilon: that all `requests` releases together come to, at the budget's delta; None where that is not known.
        vacuous: whether doing nothing would have the same guarantee.
        remarks: what else must be known.
        chosen: whether sigma was chosen by looking at the test rows.
        figures: None if there was no removal.
    """

    method: str
    can: Can
    why: str = ""
    demand: str = ""
    basis: str | None = None
    sigma: float | None = None
    cap: float | None = None
    epsilon: float | None = None
    vacuous: bool = False
    remarks: tuple[str, ...] = ()
    chosen: bool = False
    figures: Figures | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {**asdict(self), "remarks": list(self.remarks)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tried:
    """The removals that were carried out in a row from one start."""

    way: Way
    start: Started
    first: Unlearned
    seconds: tuple[float, ...]


def tried_line(bench: Bench, name: str, wish: Wish, *, runs: int) -> tuple[Line, Tried | None]:
    """What this way makes of the wish, and what was carried out for it."""
    try:
        way = WAYS[name](wish)
    except _REFUSALS as error:
        return Line(method=name, can="no", why=str(error)), None
    try:
        tried = _try(bench, way, wish.budget.requests)
        figures = _figures(bench, tried, runs)
    except _REFUSALS as error:
        return Line(method=name, can="no", why=str(error), demand=way.demand), None
    return _judged(name, wish, tried, figures), tried


def _try(bench: Bench, way: Way, requests: int) -> Tried:
    start = bench.start(way)
    answers: list[Unlearned] = []
    seconds: list[float] = []
    now = start
    for number, group in enumerate(bench.groups[:requests]):
        if sum(seconds[1:]) > _LATER_WITHIN_S:
            break
        rng = child(generator(bench.setting.seed), "certified", number)
        answers.append(way.remove(now, bench.records, Request.remove(group), rng))
        seconds.append(answers[-1].cost.seconds)
        now = replace(now, trained=answers[-1].trained)
    return Tried(way=way, start=start, first=answers[0], seconds=tuple(seconds))


def _figures(bench: Bench, tried: Tried, runs: int) -> Figures:
    way, later = tried.way, tried.seconds[1:]
    if way.noise == "once":
        values = noised(bench, tried, _guarantee(tried).sigma)
    else:
        values = [bench.accuracy(tried.first.trained)]
        values += [bench.accuracy(_again(bench, tried, number)) for number in range(1, runs)]
    seconds_later = sum(later) / len(later) if later else None
    return Figures(
        accuracy=mean_of(values, "draws of the noise" if way.noise == "once" else "runs"),
        retrained=accuracy(bench.reference(way.recipe)[0], bench.test),
        seconds_first=tried.seconds[0],
        seconds_later=seconds_later,
        later=len(later),
        early_first=bench.early(tried.seconds[0]),
        early_later=bench.early(seconds_later),
    )


def _again(bench: Bench, tried: Tried, number: int) -> Trained:
    """The first removal once more, with noise drawn anew; training too where that adds it."""
    start = tried.start if tried.way.noise == "steps" else bench.start(tried.way)
    rng = child(generator(bench.setting.seed), "certified", "again", number)
    return tried.way.remove(start, bench.records, Request.remove(bench.groups[0]), rng).trained


def noised(bench: Bench, tried: Tried, sigma: float) -> list[float]:
    """Accuracies after the first removal, with noise of this size drawn anew each time; 0 is without noise.

    All ways that add noise once add it to the head alone, so that the rest of the model is asked once.
    """
    after = tried.first.trained
    name = head_of(after.module)[0]
    names = [f"{name}.{part}" if name else part for part in ("weight", "bias")]
    w = torch.cat([after.secret[names[0]].double(), after.secret[names[1]].double()[:, None]], dim=1)
    seen = features(after.module, bench.test)
    x, y = seen.x[seen.keep], seen.y[seen.keep]
    draws = bench.setting.draws if sigma else 1
    return [_share_right(x @ (w + sigma * secret_normal(w.shape).to(w.device)).T, y) for _ in range(draws)]


def _share_right(answers: Tensor, y: Tensor) -> float:
    return float((answers.argmax(1) == y).double().mean())


def chosen_sigma(bench: Bench, tried: Tried) -> float | None:
    """The largest of `SIGMAS` that, with all smaller ones, costs at most half a point of accuracy on the test rows."""
    (bare,), found = noised(bench, tried, 0.0), None
    for sigma in SIGMAS:
        values = noised(bench, tried, sigma)
        if bare - sum(values) / len(values) > HALF_A_POINT:
            break
        found = sigma
    return found


def mean_of(values: Sequence[float], unit: str) -> Estimate:
    """Mean of shares, its interval within 0 and 1; of one value without an interval."""
    if len(values) == 1:
        return Estimate(values[0], values[0], values[0], 1, interval=f"none: one of {unit}")
    one = mean(values, unit=unit)
    return replace(one, low=max(0.0, one.low), high=min(1.0, one.high))


def _guarantee(tried: Tried) -> Guarantee:
    guarantee = tried.first.guarantee
    if guarantee is None:
        raise Unsupported("the removal came with no guarantee at all; this method cannot be planned with")
    return guarantee


def _judged(name: str, wish: Wish, tried: Tried, figures: Figures) -> Line:
    guarantee = _guarantee(tried)
    can, why, epsilon = _verdict(wish.budget, guarantee, tried.first.trained)
    return Line(
        method=name,
        can=can,
        why=why,
        demand=tried.way.demand,
        basis=guarantee.basis,
        sigma=guarantee.sigma,
        cap=guarantee.sensitivity,
        epsilon=epsilon,
        vacuous=any(remark.lower().startswith("vacuous") for remark in guarantee.remarks),
        remarks=guarantee.remarks,
        figures=figures,
    )


def _verdict(budget: Budget, guarantee: Guarantee, after: Trained) -> tuple[Can, str, float | None]:
    """Whether the budget is honoured, why not, and the epsilon that all its releases come to."""
    if guarantee.basis == "none":
        told = [remark for remark in guarantee.remarks if remark.startswith("Nothing")] or guarantee.remarks
        return "no", " ".join(told) or "its guarantee has no basis", None
    if guarantee.transcript is None:
        return "current only", "nothing bounds what all its releases tell together", None
    last = after.releases[-1]
    if isinstance(last, PrivateSteps):
        return "yes", "", guarantee.epsilon  # requests change nothing: there is one release in all
    try:
        spent = charge((last,) * (budget.requests - 1), last, budget)
    except BudgetExhausted as error:
        return "no", str(error), None
    return "yes", "", spent.epsilon
