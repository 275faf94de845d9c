"""Guarantees, computed again by whoever doubts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from expunge.certify import gaussian
from expunge.certify.before_head import CHECKS
from expunge.certify.composition import SharedAccountant, mu_of_release
from expunge.certify.constants import CHECKED, SETTING, STANDS_ON, Derivation, derived, is_called
from expunge.core.claim import Constant, Guarantee, Spent
from expunge.core.errors import ExpungeError
from expunge.core.events import Release

_EASE = 1e-6
_BEST_FIRST = ("proved", "supplied", "estimated")
_T = TypeVar("_T")


def recheck(
    guarantee: Guarantee,
    derivations: Mapping[str, Derivation],
    settings: Mapping[str, float] | None = None,
    releases: Sequence[Release] | None = None,
    *,
    counted: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """What does not hold of a guarantee, computed again from its constants alone; empty if all does.

    Not checked: that noise was added, that nothing else was given out, and that the formulas are those of the method
    that was run, unless `derivations` holds that method's only. Nor, without `counted`, what was counted on rows (as
    that none is one of an extractor's): whoever wrote the guarantee is believed that the count was made.

    Args:
        guarantee: by whomever it was made.
        derivations: formulas by name; `expunge.certify.derivations` has all.
        settings: what the method and the recipe hold, by the names that `setting` was given (see `settings_of`); None:
            not compared.
        releases: all of the model so far, this guarantee's last (`Trained.releases`), from which its transcript is
            computed again; None: the transcript is compared with itself and the guarantee only.
        counted: what was counted on rows, counted again (`DisjointExtractor.counted`); None: not counted again.
    """
    problems = _circles(guarantee.constants, derivations)
    for name, constant in guarantee.constants.items():
        problems += _origin(name, constant, derivations)
        problems += _value(name, constant, guarantee.constants, derivations, settings)
        problems += _count(name, constant, counted)
    for name in ("sigma", "sensitivity", "mu"):
        value, known = getattr(guarantee, name), guarantee.constants.get(name)
        if value is not None and (known is None or not _same(known.value, value)):
            problems.append(f"{name} is said to be {value:.6g}, and no constant gives that")
    if not guarantee.parameters:
        problems.append("it covers no parameters")
    if not guarantee.sigma < math.inf:
        problems.append(f"sigma is said to be {guarantee.sigma:.6g}, and nobody adds such noise")
    problems += _figure(guarantee, derivations) + _outside(guarantee)
    return (*problems, *_transcript(guarantee, settings or {}, releases))


def _circles(constants: Mapping[str, Constant], derivations: Mapping[str, Derivation]) -> list[str]:
    """Constants that rest on themselves, or on such."""
    formulas = {name: derivations.get(constant.derivation) for name, constant in constants.items()}
    left = {name: set(one.of) & set(constants) for name, one in formulas.items() if one is not None}
    while free := [name for name, of in left.items() if not of & set(left)]:
        for name in free:
            del left[name]
    return [f"{', '.join(left)}: each is derived from another of these, in a circle"] if left else []


def _origin(name: str, constant: Constant, derivations: Mapping[str, Derivation]) -> list[str]:
    """Whether what is said to give this constant may give it."""
    source = constant.derivation
    if source.startswith(SETTING):
        where = source.removeprefix(SETTING)
        if name in ("mu", "epsilon"):
            return [f"{name} is called the setting {where}, and only a formula can give it"]
        fits = where == f"method.{name}" if name in STANDS_ON else is_called(name, where)
        return [] if fits else [f"{name} is called the setting {where}, which is another constant's"]
    if source.startswith(CHECKED):
        fits = any((source, name) == (CHECKED + check.name, check.gives) for check in CHECKS)
        return [] if fits else [f"{name} is called {source}, which is no count that gives it"]
    if source:
        derivation = derivations.get(source)
        fits = derivation is None or derivation.may_give(name)
        return [] if fits else [f"{name} is said to come from {source}, which does not say that it gives {name}"]
    if name in ("mu", "epsilon", "sigma"):
        return [f"{name} is {constant.value:.6g}, and nothing is said to give it"]
    return []


def _value(
    name: str,
    constant: Constant,
    constants: Mapping[str, Constant],
    derivations: Mapping[str, Derivation],
    settings: Mapping[str, float] | None,
) -> list[str]:
    """Whether what is said to give this constant gives its value, and is as good as is said."""
    if constant.derivation.startswith(SETTING):
        where = constant.derivation.removeprefix(SETTING)
        if settings is None or (where in settings and _same(settings[where], constant.value)):
            return []
        return [f"{name} is called the setting {where}, which is {settings.get(where, 'not there')}"]
    if constant.derivation.startswith(CHECKED):
        return []
    if constant.source != "proved" and not constant.derivation:
        return [f"{name} is no number"] if math.isnan(constant.value) else []
    derivation = derivations.get(constant.derivation)
    if derivation is None:
        return [f'{name} is called {constant.source} by "{constant.derivation}", which is no known formula']
    again, problems = _computed(name, lambda: derived(derivation, constants))
    if again is None:
        return problems
    if _BEST_FIRST.index(constant.source) < _BEST_FIRST.index(again.source):
        return [f"{name} is called {constant.source}, and rests on constants that are {again.source}"]
    if not _same(again.value, constant.value):
        return [f"{name} is {constant.value:.6g}, and {derivation.name} gives {again.value:.6g}"]
    return []


def _count(name: str, constant: Constant, counted: Mapping[str, float] | None) -> list[str]:
    """Whether what was counted on rows is zero, and is so again."""
    if not constant.derivation.startswith(CHECKED):
        return []
    problems = [] if constant.value == 0 else [f"{name} is said to be {constant.value:.6g}, and it must be 0"]
    found = constant.value if counted is None else counted.get(name, math.nan)
    if found != constant.value:
        problems.append(f"{name} is said to be {constant.value:.6g}, and counted again it is {found:.6g}")
    return problems


def _outside(guarantee: Guarantee) -> list[str]:
    """Whether a proved guarantee says what was made sure of what it gives out without noise."""
    missing = [check.gives for check in CHECKS if check.gives not in guarantee.constants]
    if guarantee.basis != "proved" or not guarantee.outside or not missing:
        return []
    return [f"{guarantee.outside[0]} is given out without noise, and there is no {missing[0]}: it cannot be proved"]


def _figure(guarantee: Guarantee, derivations: Mapping[str, Derivation]) -> list[str]:
    """Whether epsilon and delta follow from the constants."""
    constants = guarantee.constants
    if "mu" in constants and ("epsilon" in constants or guarantee.mu is None):
        return ["there is a constant mu, and another figure hides it"]
    if guarantee.mu is not None:
        mu, delta = guarantee.mu, guarantee.delta
        found, problems = _computed("epsilon", lambda: gaussian.epsilon_of(mu, delta))
    elif "epsilon" in constants:
        found, problems = constants["epsilon"].value, _delta(guarantee, derivations)
    else:
        found, problems = math.inf, []
    if found is not None and not guarantee.epsilon >= found * (1 - _EASE):
        problems.append(f"epsilon is said to be {guarantee.epsilon:.6g}, and it is {found:.6g}")
    return problems


def _delta(guarantee: Guarantee, derivations: Mapping[str, Derivation]) -> list[str]:
    """Whether delta is that which the formula of epsilon took: a constant, or a release's share of the budget's."""
    constants = guarantee.constants
    derivation = derivations.get(constants["epsilon"].derivation)
    of = {} if derivation is None else {name: constants[name].value for name in derivation.of if name in constants}
    if "delta" in of:
        taken = of["delta"]
    elif of.get("budget_delta") and of.get("budget_requests"):
        taken = of["budget_delta"] / of["budget_requests"]
    else:
        return ["no constant says at which delta epsilon holds"]
    if guarantee.delta >= taken * (1 - _EASE):
        return []
    return [f"delta is said to be {guarantee.delta:.6g}, and epsilon holds at {taken:.6g}"]


def _transcript(guarantee: Guarantee, settings: Mapping[str, float], releases: Sequence[Release] | None) -> list[str]:
    """Whether all releases together can have spent what is said."""
    spent = guarantee.transcript
    if spent is None:
        return ["releases were made, and no transcript is given"] if releases and guarantee.basis != "none" else []
    problems = _within(spent, guarantee.constants, settings)
    if guarantee.mu is None and spent.mu is not None:
        problems.append(f"the transcript is said to have mu {spent.mu:.6g}, and its last release has none")
    if guarantee.releases == "transcript" and not guarantee.epsilon >= spent.epsilon * (1 - _EASE):
        problems.append(f"it speaks of all releases, whose epsilon is {spent.epsilon:.6g}, not {guarantee.epsilon:.6g}")
    mus, epsilon = {"its own mu": spent.mu, "this release alone": guarantee.mu}, 0.0
    if guarantee.mu is None and "epsilon" in guarantee.constants:
        epsilon = guarantee.constants["epsilon"].value
    if releases is not None:
        each, found = _computed("the mus of all releases", lambda: [mu_of_release(one) for one in releases])
        known = [mu for mu in each or [] if mu is not None]
        problems += found + _last(guarantee, spent, releases, each or [])
        mus["all releases"] = gaussian.compose(known) if len(known) == len(releases) else None
        shared = SharedAccountant(max(spent.budget_releases, len(releases)))
        together, found = _computed("epsilon of all releases", lambda: shared.epsilon(releases, spent.delta))
        problems += found
        epsilon = max(epsilon, together or 0.0)
    for what, mu in mus.items():
        problems += _at_least(spent, what, mu)
    if not spent.epsilon >= epsilon * (1 - _EASE):
        problems.append(f"the transcript's epsilon is said to be {spent.epsilon:.6g}, and it is {epsilon:.6g}")
    return problems


def _within(spent: Spent, constants: Mapping[str, Constant], settings: Mapping[str, float]) -> list[str]:
    """Whether a transcript keeps to the budget that was agreed on."""
    problems = []
    if not 1 <= spent.releases <= spent.budget_releases:
        problems.append(f"the transcript is of {spent.releases} releases, and its budget of {spent.budget_releases}")
    if not spent.epsilon <= spent.budget_epsilon * (1 + _EASE):
        problems.append(f"the transcript's epsilon {spent.epsilon:.6g} is over its budget, {spent.budget_epsilon:.6g}")
    said = {"epsilon": spent.budget_epsilon, "delta": spent.delta, "requests": float(spent.budget_releases)}
    for name, value in said.items():
        known = constants.get(f"budget_{name}")
        agreed = settings.get(f"method.budget.{name}", value) if known is None else known.value
        if not _same(agreed, value):
            problems.append(f"the budget's {name} is said to be {value:.6g}, and it is {agreed:.6g}")
    return problems


def _last(guarantee: Guarantee, spent: Spent, releases: Sequence[Release], mus: Sequence[float | None]) -> list[str]:
    """Whether these releases are as many as is said, and the last of them is the guarantee's."""
    problems = []
    if spent.releases != len(releases):
        problems.append(f"the transcript is said to be of {spent.releases} releases, and it is of {len(releases)}")
    if not mus:
        return problems
    if None in mus and spent.mu is not None:
        problems.append(f"the transcript is said to have mu {spent.mu:.6g}, and not all of its releases have one")
    last, mu = releases[-1], mus[-1]
    sigma = getattr(last, "sigma", guarantee.sigma)
    if set(last.parameters) != set(guarantee.parameters):
        problems.append("the last release is of other parameters")
    if not _same(sigma, guarantee.sigma):
        problems.append(f"sigma is said to be {guarantee.sigma:.6g}, and that of the last release is {sigma:.6g}")
    if guarantee.mu is not None and not (mu is not None and guarantee.mu >= mu * (1 - _EASE)):
        problems.append(f"mu is said to be {guarantee.mu:.6g}, and that of the last release is {mu}")
    return problems


def _at_least(spent: Spent, what: str, mu: float | None) -> list[str]:
    """Whether a transcript tells no less than something of this mu that is part of it."""
    if mu is None:
        return []
    problems = []
    if spent.mu is not None and not spent.mu >= mu * (1 - _EASE):
        problems.append(f"the transcript's mu is said to be {spent.mu:.6g}, and that of {what} is {mu:.6g}")
    least, found = _computed("the transcript's epsilon", lambda: gaussian.epsilon_of(mu, spent.delta))
    if least is not None and not spent.epsilon >= least * (1 - _EASE):
        problems.append(
            f"the transcript's epsilon is said to be {spent.epsilon:.6g}, and that of {what} is {least:.6g}"
        )
    return problems + found


def _computed(what: str, compute: Callable[[], _T]) -> tuple[_T | None, list[str]]:
    """What this gives, or why it gives nothing: constants that somebody made up may suit no formula."""
    try:
        return compute(), []
    except (ExpungeError, ArithmeticError, ValueError, TypeError, RuntimeError) as error:
        return None, [f"{what} cannot be computed: {error}"]


def _same(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=1e-9)
