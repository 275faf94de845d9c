"""Whether camouflage can be made to work on Adult: a recorded search, then its winner on targets that it never saw."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from expunge import datasets, generator
from expunge.attack import Camouflage, Judge, pick_targets
from expunge.attack.measured import Measured, Tried
from expunge.core.coins import child
from expunge.core.protocols import Target
from expunge.core.recipe import Recipe
from expunge.core.store import write_atomically
from expunge.learn.training import train
from expunge.unlearn import InfluenceUnlearning

SEED, SETTINGS, TARGETS, FRESH, SEEDS = 26, 40, 5, 30, 3
ROWS = 326
"""One row in a hundred, as in the other attacks' front."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "eps": (0.0625, 0.25, 0.5, 1.0, 2.0),
    "steps": (30, 100, 300),
    "surrogates": (1, 3),
    "poison": (ROWS, 2 * ROWS, 4 * ROWS),
    "own recipe": (True, False),
}


class Search:
    """Trials of settings on targets of Adult; each is kept at once, so that the same call goes on after a break."""

    def __init__(self, recipe: Recipe, kept: Path) -> None:
        """Train the model under attack, draw the targets, and read what was tried before."""
        data = datasets.adult()
        assert data.test is not None
        self.recipe, self.kept, self.rows, self.test = recipe, kept, data.train, data.test
        self.trained = train(recipe, data.train)
        self.aims = pick_targets(self.trained, self.test, TARGETS + FRESH, rng=child(generator(SEED), "targets"))
        kept.parent.mkdir(parents=True, exist_ok=True)
        trials = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        self.done = {(one["part"], one["setting"], one["target"]): one for one in trials}

    def tried(self, part: str, number: int, settings: dict[str, Any], aim: int, seeds: int) -> dict[str, Any]:
        """One setting on one target, and its gain: its margin less that of removing as many nearest neighbours."""
        key = (part, number, aim)
        if key not in self.done:
            through = InfluenceUnlearning()
            judge = Judge(trained=self.trained, records=self.rows, test=self.test, through=through, seeds=seeds)
            attack, rng = _attack(settings, self.recipe), child(generator(SEED), part, number, aim)
            found = _trial(judge, attack, self.aims[aim], aim, rng)
            gain = found.margin("retrain", "attack") - found.margin("retrain", "neighbours")
            one = {"part": part, "setting": number, "target": aim, "gain": gain, "tried": found.to_json()}
            with self.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")
            print(f"{part} {number} target {aim}: {gain:+.3f} {settings}", flush=True)
            self.done[key] = one
        return self.done[key]


def search(recipe: Recipe, kept: Path, results: Path) -> dict[str, Any]:
    """40 settings on 5 targets each, by exact retraining at one seed; the best on 30 other targets at 3 seeds."""
    trials, drawn = Search(recipe, kept), list(islice(_settings(), SETTINGS))
    scores = [
        [trials.tried("search", number, settings, aim, 1)["gain"] for aim in range(TARGETS)]
        for number, settings in enumerate(drawn)
    ]
    means = [sum(some) / TARGETS for some in scores]
    best = max(range(SETTINGS), key=lambda number: means[number])
    fresh = [trials.tried("winner", best, drawn[best], aim, SEEDS) for aim in range(TARGETS, TARGETS + FRESH)]
    measured = Measured(tried=tuple(Tried.from_json(one["tried"]) for one in fresh))
    found = {
        "rows": ROWS,
        "trials": [
            {**settings, "gains": [round(one, 4) for one in some]} for settings, some in zip(drawn, scores, strict=True)
        ],
        "best": {**drawn[best], "mean gain in the search": means[best]},
        "on fresh targets": {
            "targets": FRESH,
            "seeds": SEEDS,
            "answer": measured.answer,
            **{f"over {arm}": str(measured.difference("retrain", arm)) for arm in measured.controls("retrain")},
            **{f"hits {arm}": str(measured.hits("retrain", arm)) for arm in ("attack", "neighbours")},
        },
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(results, json.dumps(found, indent=1).encode("utf-8"))
    return found


def _settings() -> Iterator[dict[str, Any]]:
    """All different, drawn at random."""
    coins, seen = random.Random(SEED), set()
    while True:
        one = {name: coins.choice(values) for name, values in CHOICES.items()}
        key = tuple(one.values())
        if key not in seen:
            seen.add(key)
            yield one


def _attack(settings: dict[str, Any], recipe: Recipe) -> Camouflage:
    plain = {name: value for name, value in settings.items() if name != "own recipe"}
    own: dict[str, Recipe] = {"surrogate": recipe} if settings["own recipe"] else {}
    return Camouflage(**plain, camouflage=ROWS, restarts=1, **own)


def _trial(judge: Judge, attack: Camouflage, target: Target, number: int, rng: torch.Generator) -> Tried:
    attempt = judge.attempt(attack, target, rng=child(rng, "attempt"))
    outcomes = judge.measure(attempt, rng=child(rng, "measure"))
    return Tried(
        attack="camouflage",
        target=number,
        budget=ROWS,
        rows=attempt.rows,
        requests=len(attempt.requests),
        brought=len(attempt.brought),
        seconds=attempt.seconds,
        outcomes=outcomes,
    )
