"""What red-teaming found, as people read it: each attack's answer, each screen's worth, and the harm that is left."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.attack.measured import Measured, Tried
from expunge.report.page import Chapter, Grid, Report
from expunge.report.redteam_plots import before_and_after, curves, success
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_response import NO_SCREEN, Response, choose, response

_NONE = ""
_ATTACK_NOTES = (
    "asked: rows that its requests ask for on average, and its controls too. hit: share of targets of which the "
    "attacker has what it wants, in percent, after the attack's requests through the unlearner and under exact "
    "retraining, and after as many random rows (through the unlearner); intervals are exact binomial over targets, or "
    "of several seeds Student's t. margin: by how much the target's margin lies above that of the control that it is "
    "nearest to (random rows, nearest neighbours, noise, the model before, the model without the attacker's rows), in "
    "units of the outputs, mean over targets with Student's t interval; above 0 with all of the interval: the attack "
    "works. no more than neighbours: it moves targets further than random rows, but not shown so of nearest "
    "neighbours. accuracy: of all other test rows, after the attack through the unlearner."
)
_SCREEN_NOTES = (
    "caught: attempts that are not carried out at once, in percent of targets. hit, gain: what is left in the end, "
    "where a flagged erasure goes to exact retraining, a flagged replacement loses both rows, a refused request "
    "changes nothing and all else goes through the unlearner; gain: the target's margin above that of the model "
    "before. at equal: the same gain where each policy alarms on exactly the stated share of requests in good faith. "
    "delayed: requests in good faith of the same sizes and kinds that raise an alarm, of {benign} that no calibration "
    "saw; of an attempt of several requests each has its chance of an alarm, and so have those. work: row gradients "
    "that such a request costs more on average, as alarms are retrained. area: below the ROC curve."
)


def attack_grid(found: Redteam) -> Grid:
    """A line for each attack and budget that came to anything."""
    return Grid(
        caption=f"Attacks on {len(found.targets)} targets; the model stands on {found.about['rows']:,} rows",
        headers=("attack", "budget", "is it", "asked", "hit", "retrained", "random", "margin", "retrained", "accuracy"),
        rows=tuple(_attack_row(name, rows, at) for (name, rows), at in found.measured.items() if at.done),
        words=3,
        notes=_ATTACK_NOTES,
    )


def _attack_row(name: str, rows: int, at: Measured) -> tuple[str, ...]:
    hits = [at.hits("through", "attack"), at.hits("retrain", "attack"), at.hits("through", "random")]
    least = [f"{at.least(world):.2f}" for world in ("through", "retrain")]
    return (
        name,
        f"{rows:,}",
        "no more than neighbours" if at.answer == "neither shown" and _harmed(at) else at.answer,
        f"{sum(one.rows for one in at.done) / len(at.done):,.0f}",
        *(f"{one:.0%}" for one in hits),
        *least,
        f"{at.mean('through', 'attack', 'accuracy'):.1%}",
    )


def _harmed(at: Measured) -> bool:
    return at.harms("through") or at.harms("retrain")


def transfer_grid(found: Redteam) -> tuple[Grid, ...]:
    """What each attack does through other unlearners, at the largest budget; no grid if none was named."""
    rows = [
        (name, other, f"{at.hits(other, 'attack'):.0%}", f"{at.least(other):.2f}")
        for name in found.about["attacks"]
        for other in found.about["others"]
        if (at := found.at_most(name)).done
    ]
    grid = Grid(
        caption=f"The same requests of {found.largest:,} rows through other unlearners",
        headers=("attack", "unlearner", "hit", "margin"),
        rows=tuple(rows),
        notes="The requests were made for the unlearner under attack. hit and margin as above.",
    )
    return (grid,) if rows else ()


def screen_grid(found: Redteam) -> Grid:
    """What is left of each attack at the largest budget, under every policy and under none."""
    names = [name for name in found.about["attacks"] if found.at_most(name).done]
    rows = [
        _response_row(name, response(found, policy, name, found.largest))
        for name in names
        for policy in (NO_SCREEN, *found.policies)
    ]
    return Grid(
        caption=f"What is left of each attack of {found.largest:,} rows, screens calibrated to "
        f"{100 * found.about['rate']:g} % false alarms",
        headers=("attack", "policy", "caught", "hit", "gain", "at equal", "delayed", "work", "area"),
        rows=tuple(rows),
        words=2,
        notes=_SCREEN_NOTES.format(benign=found.about["benign"]),
    )


def _response_row(attack: str, one: Response) -> tuple[str, ...]:
    shares = [_NONE if share is None else f"{share:.0%}" for share in (one.caught, one.hit)]
    delayed = _NONE if one.false_alarms is None else f"{one.false_alarms:.0%}"
    area = _NONE if one.auc is None else f"{one.auc:.2f}"
    left = (f"{one.gain:.2f}", f"{one.gain_equal:.2f}")
    return (attack, one.policy, *shares, *left, delayed, f"{one.gradients:,.0f}", area)


def untried_grid(found: Redteam) -> tuple[Grid, ...]:
    """Attacks that came to nothing, and requests that the unlearner refused; no grid if there are none."""
    rows = [(name, f"{rows:,}", why) for (name, rows), at in found.measured.items() for why in at.untried]
    refused = {
        (one.attack, f"{one.budget:,}", f"refused: {why}")
        for one in found.tried
        for out in one.outcomes
        if (out.world, out.arm) == ("through", "attack")
        for why in out.refused
    }
    every = (*rows, *sorted(refused))
    grid = Grid(caption="What was not carried out", headers=("attack", "rows", "why"), rows=every, words=3)
    return (grid,) if every else ()


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
    if found.policies:
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


def _attacks(found: Redteam, check: str) -> Chapter:
    done = [name for name in found.about["attacks"] if found.at_most(name).done]
    return Chapter(
        name="attacks",
        headline="Is it my data or my approximation?",
        text=tuple(f"{name}: {found.at_most(name).sentence}" for name in done),
        grids=(attack_grid(found), *transfer_grid(found), *untried_grid(found)),
        plots={"Attack success against budget": success(found)} if done else {},
        shows="Which attacks move targets beyond requests of the same size that need no model, and whether exact "
        "retraining would have spared the target.",
        does_not_show="That other attacks fail, or these on other targets. An attacker with more patience, or one that "
        "knows the screens, may do better.",
        check=check,
        data=found.to_json(),
    )


def _targets(found: Redteam) -> Chapter:
    shown = _striking(found)
    plots = {f"{one.attack}, target {one.target}, {one.rows} rows asked for": one for one in shown}
    return Chapter(
        name="targets",
        headline="Targets before and after",
        done=bool(shown),
        text=(
            "Probabilities of the classes. The true class is the one marked green, the model's answer orange where it "
            "is another. Shown are, of each attack, the target that moved furthest through the unlearner.",
        ),
        plots={caption: before_and_after(found, one) for caption, one in plots.items()},
        does_not_show="How often that happens: these are the most striking ones.",
    )


def _striking(found: Redteam) -> Sequence[Tried]:
    shown = []
    for name in found.about["attacks"]:
        done = found.at_most(name).done
        if done:
            shown.append(max(done, key=lambda one: one.margin("through", "attack") - one.margin("through", "nothing")))
    return shown


def _screens(found: Redteam) -> Chapter:
    names = [name for name in found.about["attacks"] if found.at_most(name).done]
    return Chapter(
        name="screens",
        headline=recommendation(found),
        text=(
            "Every policy is calibrated to the same rate of false alarms, on requests in good faith of the attack's "
            "size; the attacks' seeds are none of those. Harm, by which policies are compared, is the target's margin "
            "in the end above that of the model before, a mean over attacks, paired by target.",
            "The best single screen was chosen on these targets, which favours it in the comparison.",
        ),
        grids=(screen_grid(found),),
        plots={f"ROC of each screen against {name}": curves(found, name) for name in names},
        shows="What each screen leaves of each attack, and what it costs people who ask in good faith.",
        does_not_show="How screens do against an attacker who knows them, unless one of the attacks above is such.",
    )
