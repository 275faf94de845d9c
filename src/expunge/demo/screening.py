"""The chapter `screen`: owners who ask in good faith, and somebody whose request is an attack."""

from __future__ import annotations

from collections.abc import Mapping

from expunge.attack import SelectRequests, White
from expunge.attack.aim import margin, pick_targets
from expunge.core.coins import child, generator, order
from expunge.core.protocols import Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.demo.story import Story, counted
from expunge.learn.predict import outputs
from expunge.report import Chapter, Grid
from expunge.screen import Decision, Desk, default_screens, defend
from expunge.unlearn import Retrain

RATE = 0.05
_ROWS = 300
_DRAWS = 100


def tell_screen(story: Story) -> Chapter:
    """Every owner's request and one attack go through the same screens, and the attack is measured."""
    data, model = story.data, story.plain
    if data.test is None:
        raise AssertionError("MNIST brings test rows")
    story.step("screen requests for attacks")
    coins = generator(story.settings.seed)
    target = pick_targets(model, data.test, 1, rng=child(coins, "screen"))[0]
    attack = SelectRequests(count=_ROWS, how="one-shot", knowledge=White(curvature_rows=1024))
    bad = attack.requests(model, data.train, target, through=Retrain(), rng=child(coins, "attack"))[0]
    chance = order(data.train.keys, story.settings.seed, "as many rows")[:_ROWS]
    random = Request.remove([data.train.ids[place] for place in chance.tolist()])
    requests = {owner: Request.remove_owner(owner) for owner in story.askers}
    requests |= {"as many rows at random": random, "an attack": bad}
    desk = Desk(default_screens(), model, data.train, seed=child(coins, "desk").initial_seed())
    said = {
        name: defend(model, data.train, request, rng=child(coins, "calibration"), rate=RATE, draws=_DRAWS, desk=desk)
        for name, request in requests.items()
    }
    story.step("carry the attack out by exact retraining")
    before = _margin(model, target)
    hurt = {
        name: _margin(Retrain()(model, data.train, requests[name], rng=child(coins, "retrain")).trained, target)
        for name in ("as many rows at random", "an attack")
    }
    held = [name for name in story.askers if said[name].flagged]
    return Chapter(
        name="screen",
        headline=f"{counted(len(requests), 'request')} screened at {RATE:.0%} false alarms: the attack is "
        f"{'held' if said['an attack'].flagged else 'NOT FOUND'}, of {counted(len(story.askers), 'owner')} "
        f"{len(held)} held",
        text=(
            f"One request is an attack: {_ROWS} real training rows, picked by their influence on one test image, so "
            "that the model without them errs there. It is a valid erasure all the same, so it is not refused: it goes "
            "to exact retraining, and the release waits for a person.",
            f"What it does under exact retraining: the margin by which the image's true class leads goes from "
            f"{-before:.2f} to {-hurt['an attack']:.2f}; without as many random rows it is "
            f"{-hurt['as many rows at random']:.2f}. Below zero the model errs.",
            *(f"Why: {reason}." for reason in said["an attack"].reasons[:4]),
        ),
        grids=(_grid(said, requests, data.train),),
        shows="That a request which is picked to hurt looks unlike those of its size, and what follows from it.",
        does_not_show="That attacks are found in general: one row at a time passes, and who knows the screens can "
        "hide; see: expunge redteam.",
        check="expunge redteam MODEL --data mnist --method retrain --attacks select --targets 5 --out redteam",
        data={
            "decisions": {name: one.to_json() | {"judgements": {}} for name, one in said.items()},
            "margin_before": -before,
            "margins_after": {name: -value for name, value in hurt.items()},
            "attack_held": said["an attack"].flagged,
        },
    )


def _margin(model: Trained, target: Target) -> float:
    """The attacker's margin: above 0 it has what it wants."""
    rows = Records(target.x, target.y, classes=model.recipe.model_args["outputs"])
    return float(margin(outputs(model.module, rows), target).mean())


def _grid(said: Mapping[str, Decision], requests: Mapping[str, Request], records: Records) -> Grid:
    names = list(next(iter(said.values())).p_values)
    rows = tuple(
        (
            who,
            f"{len(requests[who].named(records)):,}",
            *(f"{one.p_values[name]:.3f}" for name in names),
            "" if one.p is None else f"{one.p:.3f}",
            one.action + (", held" if one.hold else ""),
        )
        for who, one in said.items()
    )
    return Grid(
        caption="Requests and what the screens say of each",
        headers=("request", "rows", *names, "together", "what is done"),
        rows=rows,
        notes=f"p-values among {_DRAWS} benign requests of the same size; flagged at {RATE:g} or less, of all screens "
        "together.",
        words=1,
    )
