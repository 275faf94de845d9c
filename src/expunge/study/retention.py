"""What a cheat retains of the rows that it was to forget, against an honest retraining of as many steps.

A retraining adversary makes more steps than who retrains honestly for as many epochs, as it fills the places of the
forgotten rows. Who compares the two finds what longer training does. Here each model is compared with an honest one of
exactly as many steps, from the same initial weights, seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from torch import Generator, Tensor, nn

from expunge.audit.efficacy import confidence
from expunge.core.coins import child
from expunge.core.digest import sha256_hex
from expunge.core.errors import Misuse, Unsupported
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import Report
from expunge.learn.predict import outputs
from expunge.learn.training import train
from expunge.study.retention_found import Retention
from expunge.study.retention_parties import PARTIES, Answer, Party, Removal, honest_retrain
from expunge.study.retention_rows import GROUPS, Pick, Rules
from expunge.study.store import Cells, Key, Line, opened


def retention(
    records: Records,
    test: Records,
    recipe: Recipe,
    *,
    seeds: int = 10,
    parties: Mapping[str, Party] | None = None,
    groups: Mapping[str, Pick] | None = None,
    rules: Rules | None = None,
    rng: Generator,
    keep: Path | None = None,
    progress: Report | None = None,
) -> Retention:
    """Measure what each party's model still does on the rows that it was to forget.

    The rows of a group are chosen once, and are the same in every seed; a seed is that of all trainings.

    Args:
        records: rows to train on, with classes.
        test: rows that nobody trains on, for context.
        recipe: of one dense model with a constant learning rate; its seed is replaced by each run's.
        seeds: how many runs, at least two.
        parties: by name; None: all of `retention_parties.PARTIES`.
        groups: by name, how rows are chosen; None: `retention_rows.GROUPS`, random ones and atypical ones.
        rules: how many rows, and what is atypical.
        rng: names the coins; nothing is drawn from it.
        keep: folder that every model's figures are kept in as they are there. The same call goes on after a break, and
            one with more seeds, parties or groups adds to it; a name always has to stand for the same.
        progress: told (what, models done, models in all).

    Raises:
        Misuse: for fewer than two seeds, no test rows, as many rows to forget as there are, or another study's folder.
        Unsupported: for regression, shards, pruning, and learning rates that change.

    Cost: for each seed one training on all rows, and for each group one for each party and for each number of steps.
    """
    parties, groups, rules = parties or PARTIES, groups or GROUPS, rules or Rules()
    _check(records, test, recipe, seeds, rules)
    about = {
        "rows": len(records),
        "records": sha256_hex(records.digests().tobytes()),
        "test": sha256_hex(test.digests().tobytes()),
        "recipe": replace(recipe, seed=0).completed(records).to_json(),
        "rules": asdict(rules),
        "seed": rng.initial_seed(),
    }
    with opened(keep, about) as cells:
        for name, pick in groups.items():
            if ("rows", name) not in cells:
                coins = child(rng, "rows", name)
                cells.add(("rows", name), pick(records, replace(recipe, seed=0), rules, coins).to_json())
        done, whole = 0, seeds * len(groups) * len(parties)
        for seed in range(seeds):
            run = _Run(records, test, recipe, child(rng, "seed", seed), cells)
            for group in groups:
                for name, party in parties.items():
                    if progress is not None:
                        progress(f"seed {seed}, {group} rows, {name}", done, whole)
                    run.model(seed, group, name, party)
                    done += 1
        return Retention.of({**about, "groups": list(groups), "parties": list(parties)}, cells.known, seeds)


def _check(records: Records, test: Records, recipe: Recipe, seeds: int, rules: Rules) -> None:
    if seeds < 2:
        raise Misuse(f"an interval over seeds needs two seeds or more, got {seeds}")
    if records.classes is None or recipe.loss != "cross_entropy":
        raise Unsupported("what is retained is told in accuracies, and the targets are floats; give rows with classes")
    if recipe.sharding is not None or recipe.pruning is not None:
        raise Unsupported("the retraining adversary trains one dense model; leave out sharding and pruning")
    if recipe.schedule["kind"] != "constant":
        kind = recipe.schedule["kind"]
        raise Unsupported(f'steps cannot be matched under the schedule "{kind}"; use {{"kind": "constant"}}')
    if not len(test):
        raise Misuse("there are no test rows; give rows that nobody trains on")
    if rules.forgotten >= len(records):
        raise Misuse(
            f"{rules.forgotten:,} of {len(records):,} rows cannot be forgotten; give more rows, or forget fewer"
        )


class _Run:
    """One seed; its original is trained only if a model of it is missing."""

    def __init__(self, records: Records, test: Records, recipe: Recipe, rng: Generator, cells: Cells) -> None:
        self.records, self.test, self.rng, self.cells = records, test, rng, cells
        self.recipe = replace(recipe, seed=child(rng, "training").initial_seed() >> 1)

    @cached_property
    def original(self) -> Trained:
        return train(self.recipe, self.records)

    def model(self, seed: int, group: str, name: str, party: Party) -> None:
        """One party's figures, and those of the honest retraining beside it, each kept as one line."""
        key: Key = ("model", group, seed, name)
        if key not in self.cells:
            removal = self._removal(group, name)
            self.cells.add(key, self._measured(party(removal), removal.forgotten))
        steps = self.cells[key]["match"]
        if ("matched", group, seed, steps) not in self.cells:
            removal = self._removal(group, name)
            honest = honest_retrain(self.original.recipe, removal.retain, steps)
            self.cells.add(("matched", group, seed, steps), self._measured(honest, removal.forgotten))

    def _removal(self, group: str, name: str) -> Removal:
        forgotten = self.records.select(list(self.cells["rows", group]["positions"]))
        return Removal(
            records=self.records,
            retain=self.records.without(forgotten.ids),
            forgotten=forgotten,
            original=self.original,
            rng=child(self.rng, group, name),
        )

    def _measured(self, answer: Answer, forgotten: Records) -> Line:
        scores = scores_of(answer.module, forgotten)
        return {
            "steps": answer.steps,
            "match": answer.match,
            "accuracy": accuracy_of(answer.module, forgotten),
            "test": accuracy_of(answer.module, self.test),
            "scores": [round(one, 3) for one in scores.tolist()],
        }


def scores_of(module: nn.Module, rows: Records) -> Tensor:
    """(n,) log odds of each row's label, ``z_y - log sum_{c != y} exp z_c``, float64."""
    return confidence(outputs(module, rows).cpu(), rows.y.cpu())


def accuracy_of(module: nn.Module, rows: Records) -> float:
    """Share of the rows whose best class is their label."""
    return float((outputs(module, rows).argmax(1).cpu() == rows.y.cpu()).double().mean())
