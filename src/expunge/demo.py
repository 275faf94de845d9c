"""The story of a deletion request, told on real data. One function a chapter; the training is shared by all."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from expunge import datasets
from expunge.audit import Answers, Row, Table, accuracy, measure, summarise
from expunge.core.coins import child, generator
from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate
from expunge.core.protocols import Unlearned
from expunge.core.recipe import Recipe, Sharding
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.shards import shard_sizes
from expunge.learn.training import train
from expunge.report import Chapter, Grid, Point, Report, accuracy_against_seconds, rows_as_png
from expunge.unlearn import FineTune, GradientAscent, Method, NegGradPlus, RandomLabels, Retrain, RetrainBriefly, Sisa

Tell = Callable[[str, int, int], None]

METHODS: tuple[Method, ...] = (FineTune(), GradientAscent(), NegGradPlus(), RandomLabels())
NOT_BUILT = MappingProxyType(
    {
        "screen": "not done: requests are not screened for attacks in this version",
        "certify": "not done: no certified method in this version",
        "verify": "not done: no verification by the owner in this version",
        "sweep": "not done: no ledger, no certificate and no sweep of the workspace in this version",
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the story is told with.

    Attributes:
        seed: of the first training, and of the choice of who asks.
        seeds: how many trainings the unlearning chapter averages over.
        owners: artificial owners among whom MNIST is divided.
        askers: how many of them ask to be forgotten.
        label: the class that is forgotten.
        epochs: of training.
        shards: of the sharded model.
        show_removed: folder for pictures of the removed rows, outside the workspace; None draws none.
    """

    seed: int = 0
    seeds: int = 1
    owners: int = 200
    askers: int = 5
    label: int = 3
    epochs: int = 5
    shards: int = 20
    show_removed: Path | None = None


def _silent(label: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Story:
    """Data, models and requests, each made once and when it is first needed."""

    def __init__(self, settings: Settings, tell: Tell = _silent) -> None:
        """A story with these settings; `tell` hears (what, units done, units in all)."""
        self.settings, self._tell = settings, tell
        self.seed = settings.seed
        self._done = 0
        self._all = settings.seeds * (2 + 2 * (len(METHODS) + 4)) + 2

    def step(self, what: str) -> None:
        """Say that a unit of work begins."""
        self._tell(what, min(self._done, self._all), self._all)
        self._done += 1

    @cached_property
    def data(self) -> datasets.DataSet:
        """Full MNIST, its training images divided among artificial owners."""
        self.step("read MNIST")
        return datasets.mnist(owners=self.settings.owners)

    @cached_property
    def answers(self) -> Answers:
        """What each model says of all training and test images, asked once."""
        return Answers(self.data.train, self.data.test)

    @cached_property
    def recipe(self) -> Recipe:
        """A multilayer perceptron, 784-128-10."""
        return Recipe(
            model="mlp",
            model_args={"hidden": [128]},
            epochs=self.settings.epochs,
            batch_size=128,
            optimiser_args={"lr": 0.1, "momentum": 0.9},
            seed=self.seed,
        )

    @cached_property
    def plain(self) -> Trained:
        """One model."""
        self.step("train one model")
        return train(self.recipe, self.data.train)

    @cached_property
    def sharded(self) -> Trained:
        """A model in shards."""
        self.step(f"train {self.settings.shards} shards")
        return train(replace(self.recipe, sharding=Sharding(shards=self.settings.shards)), self.data.train)

    @cached_property
    def askers(self) -> tuple[str, ...]:
        """The owners who ask to be forgotten, drawn by the seed."""
        owners = sorted(set(self.data.train.owners))
        drawn = torch.randperm(len(owners), generator=child(generator(self.settings.seed), "askers"))
        return tuple(owners[i] for i in drawn[: self.settings.askers].tolist())

    @cached_property
    def requests(self) -> Mapping[str, Request]:
        """The two removals: of the owners together, and of a class."""
        theirs = self.data.train.where(lambda _, owner: owner in self.askers)
        return {
            _counted(len(self.askers), "owner"): Request.remove(theirs.ids),
            f"class {self.settings.label}": Request.remove_class(self.settings.label),
        }

    def again(self, seed: int) -> Story:
        """The same data and requests with other coins of training."""
        other = Story(self.settings, self._tell)
        other.seed, other._done = seed, self._done
        shared = {"data": self.data, "answers": self.answers, "askers": self.askers, "requests": self.requests}
        other.__dict__.update(shared)
        return other


def tell(settings: Settings, *, chapters: Sequence[str] | None = None, progress: Tell = _silent) -> Report:
    """Tell the story, or some of its chapters.

    Args:
        settings: what it is told with.
        chapters: names of `CHAPTERS`; None tells all, in order.
        progress: hears what is being done.

    Raises:
        Misuse: for an unknown chapter.
    """
    wanted = list(CHAPTERS) if chapters is None else list(chapters)
    for name in wanted:
        if name not in CHAPTERS:
            raise Misuse(f'there is no chapter "{name}"; there are {", ".join(CHAPTERS)}')
    story = Story(settings, progress)
    told = tuple(CHAPTERS[name](story) for name in wanted)
    story.step("write the report")
    off = tuple(Chapter(name=name, headline=why, done=False) for name, why in NOT_BUILT.items() if chapters is None)
    return Report(
        title="expunge demo: forgetting on MNIST",
        verdict=_verdict(told),
        facts={
            "data": story.data.about,
            "owners": f"{settings.owners}, artificial: MNIST names none",
            "trainings": f"{settings.seeds} of each, seed {settings.seed}" + (" and up" if settings.seeds > 1 else ""),
            "torch": f"{torch.__version__}, threads: {torch.get_num_threads()}, Python {platform.python_version()}",
        },
        chapters=told + off,
        sound=all(chapter.data.get("sisa_equals_scratch", True) for chapter in told),
    )


def _verdict(told: Sequence[Chapter]) -> str:
    data = next((chapter.data for chapter in told if chapter.name == "unlearn"), None)
    if data is None:
        return "Some chapters only: see each for what it shows."
    exact = "equals" if data["sisa_equals_scratch"] else "DOES NOT EQUAL"
    share = _ratio(1 / data["sisa_speedup_one_owner"])
    return (
        f"Forgetting in the sharded model {exact} training from scratch on what remains, byte for byte; for one owner "
        f"it took {share} of the time. The approximate methods claim nothing, and the tables show how far each is from "
        "retraining."
    )


def _train(story: Story) -> Chapter:
    records, test = story.data.train, story.data.test
    one, many = (accuracy(model, test, ask=story.answers) for model in (story.plain, story.sharded))
    sharding = story.sharded.recipe.sharding
    sizes = shard_sizes(records, sharding) if sharding is not None else None
    return Chapter(
        name="train",
        headline=f"one model {one:.1%} %, {story.settings.shards} shards {many:.1%} % of {len(test):,} test images",
        text=(
            f"{len(records):,} training images of {story.settings.owners} owners; a multilayer perceptron 784-128-10, "
            f"{_counted(story.settings.epochs, 'epoch')}. The same network was trained once on everything, and once as "
            f"{sizes}.",
            "An owner's shard is a keyed hash of the name, and rows are read in the order of a keyed hash of each: "
            "neither depends on which other rows are there.",
        ),
        shows="What sharding costs in accuracy before anybody asks to be forgotten.",
        does_not_show="How either model does on other data, or with other seeds: the intervals are over test images.",
        check=_command(story),
        data={"one_model": one.to_json(), "sharded": many.to_json(), "shard_rows": list(sizes.rows) if sizes else []},
    )


def _command(story: Story) -> str:
    """The command line that trains the sharded model to the same bytes."""
    settings, lr = story.settings, story.recipe.optimiser_args["lr"]
    return (
        f"expunge train --data mnist --owners {settings.owners} --model mlp --epochs {settings.epochs} "
        f"--batch-size {story.recipe.batch_size} --lr {lr} --seed {settings.seed} --shards {settings.shards} "
        "--out build/sharded"
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _requests(story: Story) -> Chapter:
    splits = {name: request.split(story.data.train) for name, request in story.requests.items()}
    rows = tuple((name, f"{len(split.forget):,}", f"{len(split.retain):,}") for name, split in splits.items())
    counts = ", ".join(f"{name} ({len(split.forget):,} records)" for name, split in splits.items())
    text = [
        f"{_counted(len(story.askers), 'owner')} of {story.settings.owners} ask to be forgotten, and somebody asks "
        "that a whole class go: two separate removals, each from the full model."
    ]
    if story.settings.show_removed is not None:
        for name, split in splits.items():
            path = story.settings.show_removed / f"{name.replace(' ', '-')}.png"
            rows_as_png(split.forget.x[:400], path)
        text.append("Pictures of removed images were written outside the workspace, as asked. Delete them yourself.")
    return Chapter(
        name="requests",
        headline=counts,
        text=tuple(text),
        grids=(
            Grid(caption="Requests", headers=("request", "records to remove", "records that stay"), rows=rows, words=1),
        ),
        shows="What each request means in records.",
        does_not_show="Whether whoever asks is who they say, or means harm: nothing is screened in this version.",
        check="expunge records --data mnist --owners",
        data={name: {"forget": len(s.forget), "retain": len(s.retain)} for name, s in splits.items()},
    )


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """All methods on one removal from one training: a table for each kind of model."""

    plain: Table
    sharded: Table
    equals_scratch: bool


def _outcome(story: Story, name: str, request: Request) -> _Outcome:
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
    return _Outcome(
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


def _one_owner(story: Story) -> tuple[bool, float]:
    """One owner forgotten by SISA and by training all shards anew: the same bytes or not, how many times faster."""
    request = Request.remove_owner(story.askers[0])
    story.step("one owner: sisa")
    answer = Sisa()(story.sharded, story.data.train, request, rng=generator(story.seed))
    story.step("one owner: retrain shards")
    full = Retrain()(story.sharded, story.data.train, request, rng=generator(story.seed))
    return answer.trained.digest() == full.trained.digest(), full.cost.seconds / answer.cost.seconds


def _unlearn(story: Story) -> Chapter:
    stories = [story, *(story.again(story.seed + k) for k in range(1, story.settings.seeds))]
    outcomes = {name: [_outcome(told, name, request) for told in stories] for name, request in story.requests.items()}
    alone, speedup = _one_owner(story)
    equal = alone and all(outcome.equals_scratch for told in outcomes.values() for outcome in told)
    grids = tuple(_grid(name, told) for name, told in outcomes.items())
    plots = {
        f"{name}: test accuracy against seconds": accuracy_against_seconds(_points(told[0]), "test accuracy, %")
        for name, told in outcomes.items()
    }
    bytes_said = "the same bytes as" if equal else "OTHER BYTES than"
    return Chapter(
        name="unlearn",
        headline=f"one owner forgotten in {_ratio(1 / speedup)} of the time, {bytes_said} training from scratch",
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
            "sisa_speedup_one_owner": speedup,
            "removals": {name: _data(told) for name, told in outcomes.items()},
        },
    )


def _points(outcome: _Outcome) -> list[Point]:
    rows = [row for table in (outcome.plain, outcome.sharded) for row in table.rows if row.seconds]
    return [
        Point(name=row.method, claim=row.claim.split(",")[0], accuracy=row.test, seconds=row.seconds)
        for row in rows
        if row.test is not None
    ]


def _data(outcomes: Sequence[_Outcome]) -> dict[str, Any]:
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


_REFERENCE = "(ref.)"
_NOTES = (
    "forget, retain, test: accuracy in percent on removed, staying and test images. attack: AUC of a loss-threshold "
    "membership attack on the removed images, 0.5 is chance. gap: mean absolute difference to the reference (ref.) "
    "over these four, in points. ratio: seconds over the reference's. "
)


def _grid(name: str, outcomes: Sequence[_Outcome]) -> Grid:
    headers = ("method", "claim", "forget", "retain", "test", "attack", "gap", "seconds", "ratio")
    tables = [[outcome.plain for outcome in outcomes], [outcome.sharded for outcome in outcomes]]
    if len(outcomes) == 1:
        lines = [_line(row, told[0][told[0].reference]) for told in tables for row in told[0].rows]
        notes = _NOTES + "Intervals (95 %) are over images of one training; times are of one run."
    else:
        means = [(summarise(told), told[0].reference) for told in tables]
        lines = [_mean_line(figures, reference, told) for told, reference in means for figures in told]
        notes = _NOTES + f"Means over {len(outcomes)} seeds with 95 % intervals (Student's t)."
    return Grid(caption=f"Forgetting {name}", headers=headers, rows=tuple(lines), notes=notes)


def _line(row: Row, reference: Row) -> tuple[str, ...]:
    timed = row.seconds > 0
    return (
        row.method,
        row.claim,
        f"{row.forget:.1%}",
        f"{row.retain:.1%}",
        f"{row.test:.1%}" if row.test is not None else "not measured",
        f"{row.attack:.2f}" if row.attack is not None else "not measured",
        _REFERENCE if row is reference else f"{100 * row.mean_gap(reference):.2f}",
        f"{row.seconds:.2f}" if timed else "",
        _ratio(row.seconds / reference.seconds) if timed else "",
    )


def _mean_line(figures: Mapping[str, Any], reference: str, lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    def cell(name: str, spec: str) -> str:
        value = figures.get(name)
        return f"{value:{spec}}" if isinstance(value, Estimate) else "not measured"

    seconds = {line["method"]: line["seconds"].value for line in lines}
    timed = seconds[figures["method"]] > 0
    return (
        figures["method"],
        figures["claim"],
        cell("forget", ".1%"),
        cell("retain", ".1%"),
        cell("test", ".1%"),
        cell("attack", ".2f"),
        _REFERENCE if figures["method"] == reference else cell("mean_gap", ".2%"),
        cell("seconds", ".2f") if timed else "",
        _ratio(seconds[figures["method"]] / seconds[reference]) if timed else "",
    )


def _ratio(value: float) -> str:
    return f"1/{1 / value:.0f}" if value < 0.67 else f"{value:.1f}"


CHAPTERS: Mapping[str, Callable[[Story], Chapter]] = MappingProxyType(
    {"train": _train, "requests": _requests, "unlearn": _unlearn}
)
