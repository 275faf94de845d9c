"""The chapter `unlearn`: every method on every request, beside exact retraining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expunge.audit import Row, Table, measure, summarise
from expunge.core.coins import child, generator
from expunge.core.estimate import Estimate
from expunge.core.protocols import Unlearned
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.demo.story import Story
from expunge.demo.tables import grid_of, ratio
from expunge.report import Chapter, Point, accuracy_against_seconds
from expunge.unlearn import FineTune, GradientAscent, Method, NegGradPlus, RandomLabels, Retrain, RetrainBriefly, Sisa

METHODS: tuple[Method, ...] = (FineTune(), GradientAscent(), NegGradPlus(), RandomLabels())
STEPS_OF_A_SEED = 2 * (len(METHODS) + 4)  # two removals, each by all methods, the yardstick, Sisa and two retrainings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All methods on one removal from one training: a table for each kind of model."""

    plain: Table
    sharded: Table
    equals_scratch: bool


def _outcome(story: Story, name: str, request: Request) -> Outcome:
    split, rng = request.split(story.data.train), child(generator(story.seed), "unlearn", name)

    def run(method: Method, trained: Trained) -> Unlearned:
        story.step(f"{name}: {method.name}")
        return method(trained, story.data.train, request, rng=rng)

    retrained = run(Retrain(), story.plain)
    rows = [_row(story, split, "original", story.plain), _row(story, split, "retrain", retrained)]
    for method in METHODS:
        answer = run(method, story.plain)
        rows.append(_row(story, split, method.name, answer))
        if isinstance(method, FineTune):
            rows.append(_same_time(story, split, run, answer, retrained))
    scratch = run(Retrain(), story.sharded)
    quick = run(Sisa(), story.sharded)
    equal = quick.trained.digest() == scratch.trained.digest()
    last = _row(story, split, "sisa", quick)
    reference = replace(last, method="retrain shards", claim=_claim(scratch), seconds=scratch.cost.seconds)
    if not equal:
        reference = _row(story, split, "retrain shards", scratch)
    shards = (_row(story, split, "original shards", story.sharded), reference, last)
    return Outcome(
        plain=Table(rows=tuple(rows)), sharded=Table(rows=shards, reference="retrain shards"), equals_scratch=equal
    )


def _same_time(
    story: Story, split: Split, run: Callable[[Method, Trained], Unlearned], answer: Unlearned, full: Unlearned
) -> Row:
    """The row "retrain for the same time" as this answer took, its steps computed from the full retraining's speed."""
    log = full.trained.log
    steps = log.steps if log is not None else 1
    affordable = max(1, round(steps * answer.cost.seconds / full.cost.seconds))
    brief = run(RetrainBriefly(steps=affordable), story.plain)
    return _row(story, split, "(retrain, same time)", brief)


def _row(story: Story, split: Split, name: str, answer: Unlearned | Trained) -> Row:
    trained = answer.trained if isinstance(answer, Unlearned) else answer
    return measure(
        trained,
        split.forget,
        split.retain,
        story.data.test,
        method=name,
        claim=_claim(answer),
        seconds=answer.cost.seconds if isinstance(answer, Unlearned) else 0.0,
        ask=story.answers,
    )


def _claim(answer: Unlearned | Trained) -> str:
    if isinstance(answer, Trained):
        return "not unlearned"
    return f"{answer.claim.value}, {answer.exactness}" if answer.exactness else answer.claim.value


def _one_owner(story: Story) -> tuple[Unlearned, Unlearned]:
    """One owner forgotten by SISA, and by training all shards anew."""
    request = Request.remove_owner(story.askers[0])
    story.step("one owner: sisa")
    answer = Sisa()(story.sharded, story.data.train, request, rng=generator(story.seed))
    story.step("one owner: retrain shards")
    full = Retrain()(story.sharded, story.data.train, request, rng=generator(story.seed))
    return answer, full


def tell_unlearn(story: Story) -> Chapter:
    """Every method on every request, from the same models, with the tables and plots."""
    stories = [story, *(story.again(story.seed + k) for k in range(1, story.settings.seeds))]
    outcomes = {name: [_outcome(told, name, request) for told in stories] for name, request in story.requests.items()}
    alone, full = _one_owner(story)
    equal = alone.trained.digest() == full.trained.digest()
    equal = equal and all(outcome.equals_scratch for told in outcomes.values() for outcome in told)
    share = alone.cost.gradients / full.cost.gradients
    grids = tuple(
        grid_of(f"Forgetting {name}", [[each.plain for each in told], [each.sharded for each in told]])
        for name, told in outcomes.items()
    )
    plots = {
        f"{name}: test accuracy against seconds": accuracy_against_seconds(_points(told[0]), "test accuracy, %")
        for name, told in outcomes.items()
    }
    bytes_said = "the same bytes as" if equal else "OTHER BYTES than"
    return Chapter(
        name="unlearn",
        headline=(
            f"one owner forgotten at {ratio(share)} of the work ({alone.cost.seconds:.2f} s, not "
            f"{full.cost.seconds:.2f} s), {bytes_said} training from scratch"
        ),
        text=(
            "Every method starts from the same trained model. The reference is retraining on what remains: of one "
            "model for what started from one model, of all shards for shards.",
            "An approximate method is worth its cost only if it comes nearer to retraining than retraining that stops "
            "after the same time does.",
        ),
        grids=grids,
        plots=plots,
        shows="Exact methods leave nothing to choose: their bytes are those of a training without the removed rows. "
        "For the others, how far accuracy and a simple membership attack are from retraining.",
        does_not_show="That any method without a claim forgot anything: a weak attack that fails proves nothing. "
        "That copies outside this process are gone.",
        check=f"expunge demo unlearn --seeds {max(3, story.settings.seeds)} --seed {story.settings.seed}",
        data={
            "sisa_equals_scratch": equal,
            "one_owner": {
                "share_of_row_gradients": share,
                "sisa_seconds": alone.cost.seconds,
                "retrain_seconds": full.cost.seconds,
            },
            "removals": {name: _data(told) for name, told in outcomes.items()},
        },
    )


def _points(outcome: Outcome) -> list[Point]:
    rows = [row for table in (outcome.plain, outcome.sharded) for row in table.rows if row.seconds]
    return [
        Point(name=row.method, claim=row.claim.split(",")[0], accuracy=row.test, seconds=row.seconds)
        for row in rows
        if row.test is not None
    ]


def _data(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A table for each seed, and with several seeds the means, as plain JSON values."""
    tables = {"single": [outcome.plain for outcome in outcomes], "shards": [outcome.sharded for outcome in outcomes]}
    data: dict[str, Any] = {name: [table.to_json() for table in told] for name, told in tables.items()}
    if len(outcomes) > 1:
        lines = [figures for told in tables.values() for figures in summarise(told)]
        data["means"] = [
            {name: value.to_json() if isinstance(value, Estimate) else value for name, value in figures.items()}
            for figures in lines
        ]
    return data
