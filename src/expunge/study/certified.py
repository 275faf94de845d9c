"""Which certified method can honour a budget, at what accuracy and cost, before any request arrives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from expunge.audit import accuracy
from expunge.certify.accountant import Budget
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, mean
from expunge.core.records import Records
from expunge.learn.loop import Report
from expunge.study.certified_bench import Bench, Setting
from expunge.study.certified_tries import Can, Line, chosen_sigma, mean_of, tried_line
from expunge.study.certified_ways import FREE_SIGMA


@dataclass(frozen=True, kw_only=True)
class CertifiedPlan:
    """What each method makes of a budget.

    Attributes:
        budget: of all requests together.
        about: what was measured on, as plain JSON values.
        retrained: accuracy of exact retraining by the user's recipe, one training.
        seconds_retrain: what it took.
        lines: one a method, and one more where sigma could be chosen.
    """

    budget: Budget
    about: Mapping[str, Any]
    retrained: Estimate
    seconds_retrain: float
    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        """All as plain JSON values."""
        return {
            "budget": asdict(self.budget),
            **self.about,
            "retrained": self.retrained.to_json(),
            "seconds_retrain": self.seconds_retrain,
            "lines": [line.to_json() for line in self.lines],
        }


def plan_certified(
    setting: Setting, budget: Budget, records: Records, test: Records, *, report: Report | None = None
) -> CertifiedPlan:
    """Try each method on real removals of random rows, and say whether it honours the budget.

    Args:
        setting: what is trained, and what a request is.
        budget: of all requests together.
        records: the rows to train on.
        test: rows that accuracy is measured on.
        report: told (what, methods done, methods in all).

    Returns:
        A line for each method. Where sigma is free a second line is for the largest of `SIGMAS` that, with all smaller
        ones, costs at most half a point on the test rows: a choice that depends on the data, which no guarantee covers.

    Raises:
        Misuse: if the requests would leave no row, or the model given is of other records.
        BadRecipe, BadRecords: if the recipe cannot be trained.

    Cost: a training for each recipe that a method needs, up to six removals a method, and ten trainings or removals
    more for those that add noise on their way.
    """
    tell = report or (lambda *_: None)
    bench = Bench(setting, records, test)
    wish = bench.wish(budget)  # refuses what no method can do before anything is trained
    lines: list[Line] = []
    for number, name in enumerate(setting.methods):
        tell(name, number, len(setting.methods))
        line, tried = tried_line(bench, name, wish, runs=setting.draws)
        lines.append(line)
        sigma = chosen_sigma(bench, tried) if name in FREE_SIGMA and tried is not None else None
        if sigma is not None and sigma != line.sigma:
            other, _ = tried_line(bench, name, bench.wish(budget, sigma), runs=setting.draws)
            lines.append(replace(other, chosen=True))
    full, seconds = bench.reference(bench.recipe)
    return CertifiedPlan(
        budget=budget,
        about=_about(bench, wish.length),
        retrained=accuracy(full, test),
        seconds_retrain=seconds,
        lines=tuple(lines),
    )


def _about(bench: Bench, radius: float) -> dict[str, Any]:
    return {
        "model": bench.recipe.model,
        "records": len(bench.records),
        "test_rows": len(bench.test),
        "rows_per_request": bench.setting.rows,
        "draws": bench.setting.draws,
        "seed": bench.setting.seed,
        "threads": torch.get_num_threads(),
        "radius": radius,
    }


@dataclass(frozen=True, kw_only=True)
class SweptLine:
    """One method at one epsilon.

    Attributes:
        method: the way.
        epsilon: of the budget of all requests.
        can: what it makes of the budget; the weakest answer over the seeds.
        why: the reason, if it does not honour it.
        vacuous: whether doing nothing would have the same guarantee.
        seeds: those with figures.
        accuracy: of models with noise, over seeds; of one seed over draws; None without figures, as all below.
        seconds_first: of the first request, over seeds.
        seconds_later: of a later one.
        gain_first: accuracy minus that of retraining for as long as the first request takes; below zero the method is
            not worth its cost but for its guarantee.
        gain_later: the same for a later request.
    """

    method: str
    epsilon: float
    can: Can
    why: str = ""
    vacuous: bool = False
    seeds: int = 0
    accuracy: Estimate | None = None
    seconds_first: float | None = None
    seconds_later: float | None = None
    gain_first: Estimate | None = None
    gain_later: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CertifiedSweep:
    """Accuracy and seconds of each method against epsilon.

    Attributes:
        about: what was measured on, as plain JSON values.
        retrained: accuracy of exact retraining by the user's recipe, over seeds.
        seconds_retrain: mean over seeds.
        lines: for each epsilon, in rising order, one a method.
    """

    about: Mapping[str, Any]
    retrained: Estimate
    seconds_retrain: float
    lines: tuple[SweptLine, ...]

    def to_json(self) -> dict[str, Any]:
        """All as plain JSON values."""
        return {
            **self.about,
            "retrained": self.retrained.to_json(),
            "seconds_retrain": self.seconds_retrain,
            "lines": [line.to_json() for line in self.lines],
        }


def sweep_certified(
    setting: Setting,
    budget: Budget,
    epsilons: Sequence[float],
    records: Records,
    test: Records,
    *,
    seeds: int = 1,
    report: Report | None = None,
) -> CertifiedSweep:
    """Try each method at each epsilon, for several trainings.

    Args:
        setting: as for `plan_certified`; its seed and those above it are used, and replace the recipe's.
        budget: of all requests; its epsilon is replaced by each of `epsilons`.
        epsilons: each > 0.
        records: the rows to train on.
        test: rows that accuracy is measured on.
        seeds: trainings; one gives intervals over draws of the noise, which say nothing of other trainings.
        report: told (what, cells done, cells in all).

    Raises:
        Misuse: for no epsilon, one given twice, or less than one seed; and as `plan_certified` does.

    Cost: for each seed and epsilon that of a plan, with one run instead of ten where there are several seeds.
    """
    wanted = sorted(epsilons)
    if not wanted or len(set(wanted)) < len(wanted) or seeds < 1:
        raise Misuse(f"give different epsilons, and seeds >= 1, got {list(epsilons)} and {seeds}")
    if setting.trained is not None:
        raise Misuse("a sweep trains its own models; leave the given one out")
    budgets = [replace(budget, epsilon=epsilon) for epsilon in wanted]
    benches = [Bench(_of_seed(setting, setting.seed + k), records, test) for k in range(seeds)]
    tell, done, found = report or (lambda *_: None), 0, dict[tuple[float, str], list[Line]]()
    total = seeds * len(wanted) * len(setting.methods)
    for bench in benches:
        for one in budgets:
            for name in setting.methods:
                tell(f"seed {bench.setting.seed}, epsilon {one.epsilon:g}: {name}", done, total)
                runs = setting.draws if seeds == 1 else 1
                line, _ = tried_line(bench, name, bench.wish(one), runs=runs)
                found.setdefault((one.epsilon, name), []).append(line)
                done += 1
    full = [bench.reference(bench.recipe) for bench in benches]
    about = {**_about(benches[0], benches[0].wish(budget).length), "seeds": seeds, "epsilons": wanted}
    about |= {"delta": budget.delta, "requests": budget.requests}
    return CertifiedSweep(
        about=about,
        retrained=mean_of([bench.accuracy(one) for bench, (one, _) in zip(benches, full, strict=True)], "seeds"),
        seconds_retrain=sum(seconds for _, seconds in full) / seeds,
        lines=tuple(_swept(name, epsilon, lines) for (epsilon, name), lines in found.items()),
    )


def _of_seed(setting: Setting, seed: int) -> Setting:
    return replace(setting, seed=seed, recipe=replace(setting.recipe, seed=seed))


_WEAKEST: tuple[Can, ...] = ("no", "current only", "yes")


def _swept(name: str, epsilon: float, lines: Sequence[Line]) -> SweptLine:
    weakest = min(lines, key=lambda line: _WEAKEST.index(line.can))
    known = [line.figures for line in lines if line.figures is not None]
    swept = SweptLine(
        method=name,
        epsilon=epsilon,
        can=weakest.can,
        why=weakest.why,
        vacuous=any(line.vacuous for line in lines),
        seeds=len(known),
    )
    if not known:
        return swept
    later = [one.seconds_later for one in known if one.seconds_later is not None]
    return replace(
        swept,
        accuracy=known[0].accuracy if len(lines) == 1 else mean_of([one.accuracy.value for one in known], "seeds"),
        seconds_first=sum(one.seconds_first for one in known) / len(known),
        seconds_later=sum(later) / len(later) if later else None,
        gain_first=_gain([(one.accuracy, one.early_first) for one in known], seeds=len(lines)),
        gain_later=_gain([(one.accuracy, one.early_later) for one in known], seeds=len(lines)),
    )


def _gain(pairs: Sequence[tuple[Estimate, float | None]], seeds: int) -> Estimate | None:
    """Mean difference of the pairs over seeds; of one seed with the interval that its accuracy has."""
    known = [(accuracy, early) for accuracy, early in pairs if early is not None]
    if not known:
        return None
    if len(known) > 1:
        return mean([accuracy.value - early for accuracy, early in known])
    one, early = known[0]
    if seeds > 1:
        one = mean_of([one.value], "seeds")
    return replace(one, value=one.value - early, low=one.low - early, high=one.high - early)
