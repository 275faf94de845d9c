"""What red-teaming found, as people read it: each attack's answer, each screen's worth, and the harm that is left."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.attack.measured import Tried
from expunge.report.page import Chapter, Grid, Report
from expunge.report.redteam_grids import (
    above_before,
    attack_grid,
    refused_grid,
    screen_grid,
    transfer_grid,
    untried_grid,
)
from expunge.report.redteam_plots import before_and_after, curves, success
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_response import NO_SCREEN, choose

_BUDGETS = "Attack success against budget, with 95 % intervals"
_HITS = "Attack success: who is hit, and how far targets are moved beyond what needs no model, with 95 % intervals"


def verdict(found: Redteam) -> str:
    """What came out, in a few sentences."""
    harmful = found.harmful
    if not found.carried_out:
        return "Nothing was measured: no attack could be carried out; the reasons are below."
    who = ", ".join(harmful) if harmful else "no attack"
    told = f"At {found.largest:,} rows, {who} moved targets through the unlearner further than requests that do not "
    told += "know them."
    if not found.policies:
        return f"{told} No screen was tried."
    if found.uncaught:
        told += f" No screen catches {', '.join(found.uncaught)} more often than requests in good faith."
    elif harmful:
        told += " Each is caught by some screen."
    return f"{told} {recommendation(found)}"


def recommendation(found: Redteam) -> str:
    """Which policy, and by what differences."""
    choice = choose(found)
    if choice.best_single is None or choice.single_less_none is None:
        return (
            "Recommended: no screen alone leaves the attacker less than no screen does, as exact retraining carries "
            "valid erasures out in full; alarms still bring people to look."
        )
    said = f"{choice.best_single} less no screen: {choice.single_less_none:+.2f} of margin left"
    if choice.combination_less_best is not None:
        said += f"; combination less {choice.best_single}: {choice.combination_less_best:+.2f}"
    what = choice.recommended
    if what == NO_SCREEN:
        what = "none is shown to leave the attacker less; alarms still bring people to look"
    return f"Recommended: {what} ({said}; below 0 it helps)."


def redteam_report(found: Redteam, check: str = "") -> Report:
    """All of it as a report; `check` is the command that made it."""
    told = verdict(found)
    chapters = [_attacks(found, check), _targets(found)]
    if found.policies and found.screened:
        chapters.append(_screens(found))
    return Report(
        title="expunge redteam: malicious requests against a model, its unlearner and its screens",
        verdict=told,
        facts=_facts(found),
        chapters=tuple(chapters),
        sound=found.carried_out and not found.uncaught,
    )


def _facts(found: Redteam) -> dict[str, str]:
    about = found.about
    return {
        "model": about["model"],
        "rows": f"{about['rows']:,}",
        "test rows": f"{about['test_rows']:,}",
        "unlearner": about["through"],
        "exact": about["retrain"],
        "targets": str(about["targets"]),
        "budgets": ", ".join(f"{rows:,} rows" for rows in about["budgets"]),
        "seeds of retraining": str(about["seeds"]),
        "screens": ", ".join(about["screens"]) or "none",
        "seed": str(about["seed"]),
    }


def sentences(found: Redteam) -> tuple[str, ...]:
    """Of each attack that came to anything, at the largest budget: is it my data or my approximation?"""
    done = [name for name in found.about["attacks"] if found.at_most(name).done]
    return tuple(f"{name}: {_sentence(found, name)}" for name in done)


def _sentence(found: Redteam, name: str) -> str:
    at = found.at_most(name)
    if (name, found.largest) not in found.refused:
        return at.sentence
    said = "Neither: the provider refused its requests, and nothing was changed."
    if any(one.of("naive", "attack") for one in at.done):
        hit = 100 * at.hits("naive", "attack").value
        said += (
            f" One that takes strangers for members would be hit on {hit:.0f} % of targets, their margins "
            f"{above_before(at):+.2f} above those before."
        )
    return said


def _attacks(found: Redteam, check: str) -> Chapter:
    return Chapter(
        name="attacks",
        headline="Is it my data or my approximation?",
        text=sentences(found),
        grids=grids(found),
        plots={_BUDGETS if len(found.about["budgets"]) > 1 else _HITS: success(found)} if found.screened else {},
        shows="Which attacks move targets beyond requests of the same size that need no model, and whether exact "
        "retraining would have spared the target.",
        does_not_show="That other attacks fail, or these on other targets. An attacker with more patience, or one that "
        "knows the screens, may do better.",
        check=check,
        data=found.to_json(),
    )


def grids(found: Redteam) -> tuple[Grid, ...]:
    """The tables of attacks."""
    measured = (attack_grid(found),) if attack_grid(found).rows else ()
    return (*measured, *transfer_grid(found), *refused_grid(found), *untried_grid(found))


def _targets(found: Redteam) -> Chapter:
    shown = _striking(found)
    plots = {f"{one.attack}, target {one.target}, {one.rows} rows asked for": one for one in shown}
    return Chapter(
        name="targets",
        headline="Targets before and after",
        done=bool(shown),
        text=(
            "Probabilities of the classes. The true class is named and green, the model's answer orange where it is "
            "another. Shown are, of each attack, the target that moved furthest through the unlearner.",
        ),
        plots={caption: before_and_after(found, one) for caption, one in plots.items()},
        does_not_show="How often that happens: these are the most striking ones.",
    )


def _striking(found: Redteam) -> Sequence[Tried]:
    shown = []
    for name in found.screened:
        done = found.at_most(name).done
        shown.append(max(done, key=lambda one: one.margin("through", "attack") - one.margin("through", "nothing")))
    return shown


def _screens(found: Redteam) -> Chapter:
    return Chapter(
        name="screens",
        headline="What each screen catches and leaves, and whom it delays",
        text=(
            "Every policy is calibrated to the same rate of false alarms, on requests in good faith of the attack's "
            "size; the attacks' seeds are none of those. Harm, by which policies are compared, is the target's margin "
            "in the end above that of the model before, a mean over attacks, paired by target.",
            "The best single screen was chosen on these targets, which favours it in the comparison.",
        ),
        grids=(screen_grid(found),),
        plots={f"ROC of each screen against {name}": curves(found, name) for name in found.screened},
        shows="What each screen leaves of each attack, and what it costs people who ask in good faith.",
        does_not_show="How screens do against an attacker who knows them, unless one of the attacks above is such.",
    )
