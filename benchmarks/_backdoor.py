"""Does sparsity help to remove a backdoor? Full MNIST, LeNet, an equal search for every sparsity, then fresh seeds.

    python benchmarks/_backdoor.py --folder F            # about 30 CPU minutes of one core; can be resumed
    python benchmarks/_backdoor.py --folder F --quick    # a trial of the machinery, no evidence: about 2 minutes

1. Search: at each sparsity one model (seed 0) with a backdoor in 5 % of the rows of other classes, and 200 trials: 50
   of each of four methods, their settings drawn log-uniformly from named coins, trial k the same at every sparsity.
   Score: test accuracy - attack success, both on the first half of the test images. All trials are recorded.
2. Confirmation: the best settings of each method at each sparsity, on models of other seeds, measured on the second
   half of the test images, beside exact retraining.

Models are trained and retrained on all rows, and all test rows are used, half for each step. Unlearning methods are
quick ones: they see all poisoned rows, but only `READS` of the retained ones, drawn at random, for one or two passes.
`RANGES` were set after a pilot of 40 trials on a dense model, so they rather suit that one. The last line is one
JSON: for each sparsity the winner of the search, its confirmed figures and its score against the dense winner's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expunge import FineTune, GradientAscent, NegGradPlus, Recipe, Records, datasets, load
from expunge.core.coins import child, generator
from expunge.core.errors import Misuse, NothingChanged
from expunge.core.estimate import Estimate, mean
from expunge.learn.predict import outputs
from expunge.learn.triggers import poison, stamped
from expunge.study.backdoor import (
    SPARSITIES,
    Backdoor,
    Cell,
    Cleansing,
    Infected,
    at_sparsity,
    cleanse_once,
    infect,
    read,
)
from expunge.study.store import Cells, opened
from expunge.unlearn.l1_sparse import L1Sparse
from expunge.unlearn.method import Method

READS = 6_000
BATCH = 128
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "fine-tune": {"lr": (5e-3, 0.5)},
    "l1-sparse": {"lr": (5e-3, 0.5), "pull": (1e-3, 0.5)},
    "gradient-ascent": {"lr": (1e-4, 3e-2)},
    "neg-grad-plus": {"lr": (5e-3, 0.5), "climb": (1e-4, 0.5)},
}
METHODS = tuple(RANGES)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the figures depend on."""

    sparsities: tuple[float, ...]
    trials: int
    seeds: tuple[int, ...]
    epochs: int
    reads: int
    by: str

    def recipe(self, sparsity: float) -> Recipe:
        """LeNet as it is trained here."""
        dense = Recipe(
            model="lenet",
            epochs=self.epochs,
            batch_size=BATCH,
            optimiser_args={"lr": 0.05, "momentum": 0.9},
            schedule={"kind": "cosine"},
        )
        return at_sparsity(dense, sparsity, self.by)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """All fields, and what is fixed."""
        return {
            "sparsities": list(self.sparsities),
            "trials": self.trials,
            "seeds": list(self.seeds),
            "epochs": self.epochs,
            "reads": self.reads,
            "by": self.by,
            "ranges": {
                method: {name: list(ends) for name, ends in ranges.items()} for method, ranges in RANGES.items()
            },
            "batch_size": BATCH,
        }


PLAN = Plan(sparsities=SPARSITIES, trials=200, seeds=(1, 2, 3), epochs=3, reads=READS, by="synflow")


def main() -> None:
    """Search, confirm, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="new, or that of a run to go on with")
    parser.add_argument("--quick", action="store_true", help="few trials, two sparsities, no evidence")
    parser.add_argument("--by", default="synflow", choices=("magnitude", "synflow", "random"), help="how to prune")
    words = parser.parse_args()
    plan = replace(PLAN, by=words.by)
    if words.quick:
        plan = replace(plan, sparsities=(0.0, 0.95), trials=8, seeds=(1, 2), epochs=1, reads=2_000)
    print(json.dumps(run(words.folder, plan)))


def run(folder: Path, plan: Plan = PLAN) -> dict[str, Any]:
    """Go on with what is in the folder; what came out."""
    torch.set_num_threads(1)
    data = datasets.mnist()
    half = torch.randperm(len(data.test), generator=child(generator(0), "halves"))
    first, second = (data.test.select(part.sort().values) for part in half.chunk(2))
    with opened(folder / "cells", plan.to_json()) as cells:
        for sparsity in plan.sparsities:
            search(cells, plan, sparsity, data.train, first, folder)
        for sparsity in plan.sparsities:
            confirm(cells, plan, sparsity, data.train, second)
        return conclude(cells, plan)


def drawn(method: str, number: int, steps: int) -> dict[str, float]:
    """Settings of a method's trial, the same at every sparsity; l1's price is drawn as its pull on a weight."""
    ranges = RANGES[method]
    coins = torch.rand(1 + len(ranges), generator=child(generator(0), "trial", method, number), dtype=torch.float64)
    settings: dict[str, float] = {"epochs": 1 + int(2 * coins[0])}
    for (name, (low, high)), share in zip(ranges.items(), coins[1:].tolist(), strict=True):
        settings[name] = low * (high / low) ** share
    if "climb" in settings:
        settings["weight"] = 1 - settings.pop("climb")
    if "pull" in settings:
        pull = settings.pop("pull")
        settings["gamma"] = pull / L1Sparse(gamma=1.0, **settings).pull(steps)  # type: ignore[arg-type]
    return settings


def made(method: str, settings: dict[str, Any]) -> Method:
    """The method with these settings."""
    kinds: dict[str, Callable[..., Method]] = {
        "fine-tune": FineTune,
        "l1-sparse": L1Sparse,
        "gradient-ascent": GradientAscent,
        "neg-grad-plus": NegGradPlus,
    }
    return kinds[method](**settings)


def search(cells: Cells, plan: Plan, sparsity: float, rows: Records, test: Records, folder: Path) -> None:
    """All trials at one sparsity that are not recorded yet."""
    wanted = [(method, number) for number in range(plan.trials // len(METHODS)) for method in METHODS]
    missing = [pair for pair in wanted if ("trial", sparsity, *pair) not in cells]
    if not missing:
        return
    infected = _kept(plan, sparsity, rows, folder / "models" / f"{sparsity:g}")
    hard = test.select((test.y != infected.backdoor.target).nonzero().flatten())
    judge = (test, stamped(hard, infected.backdoor.trigger), infected.backdoor.target)
    before = judged(infected.trained.module, *judge)
    print(f"sparsity {sparsity:g}: before {_said(before)}; {len(missing)} trials to go", flush=True)
    for method, number in missing:
        settings = drawn(method, number, math.ceil(plan.reads / BATCH))
        line: dict[str, Any] = {"settings": settings, "before": before}
        started = time.process_time()
        try:
            after, _ = infected.unlearn(
                made(method, settings), rng=child(generator(0), "trial", number), reads=plan.reads
            )
            line |= judged(after.module, *judge)
        except (Misuse, NothingChanged) as error:  # steps so long that nothing finite is left, or so short that
            line |= {"failed": str(error), "score": -1.0}  # nothing moved: a trial all the same
        cells.add(("trial", sparsity, method, number), {**line, "cpu_seconds": time.process_time() - started})
    for method in METHODS:
        best = winner(cells, plan, sparsity, method)
        print(f"  best {method} {_said(best)} with {best['settings']}", flush=True)


def _kept(plan: Plan, sparsity: float, rows: Records, folder: Path) -> Infected:
    """The model to search on: trained once, then read from the folder."""
    if not folder.exists():
        infected = infect(plan.recipe(sparsity), rows, Backdoor(), seed=0)
        folder.parent.mkdir(parents=True, exist_ok=True)
        infected.trained.save(folder)
        return infected
    planted = Backdoor()
    changed, poisoned = poison(
        rows, planted.trigger, planted.target, planted.share, child(generator(0), "backdoor")
    )  # as `infect` does it
    changed.digests()  # once, for all selections of a trial
    return Infected(trained=load(folder), records=changed, poisoned=poisoned, backdoor=planted, seconds=0.0)


def judged(module: torch.nn.Module, test: Records, marked: Records, target: int) -> dict[str, float]:
    """Accuracy on test rows, attack success on the stamped ones, and the score."""
    accuracy = float((outputs(module, test).argmax(1) == test.y).double().mean())
    attack = float((outputs(module, marked).argmax(1) == target).double().mean())
    return {"test": accuracy, "attack": attack, "score": accuracy - attack}


def winner(cells: Cells, plan: Plan, sparsity: float, method: str) -> dict[str, Any]:
    """The method's best trial at this sparsity."""
    trials = [cells[("trial", sparsity, method, number)] for number in range(plan.trials // len(METHODS))]
    return max(trials, key=lambda line: float(line["score"]))


def confirm(cells: Cells, plan: Plan, sparsity: float, rows: Records, test: Records) -> None:
    """The winners on models of other seeds and on the other half of the test rows."""
    methods = {method: made(method, winner(cells, plan, sparsity, method)["settings"]) for method in METHODS}
    for seed in plan.seeds:
        if ("confirm", sparsity, seed) in cells:
            continue
        cell, failed = confirmed(infect(plan.recipe(sparsity), rows, Backdoor(), seed=seed), test, methods, plan.reads)
        cells.add(("confirm", sparsity, seed), {"cell": cell.to_json(), "failed": failed})
        said = "; ".join(f"{r.model} {r.test.value:.4f} / {r.attack.value:.4f}" for r in cell.readings)
        print(f"sparsity {sparsity:g} seed {seed}: test / attack: {said}", flush=True)


def confirmed(infected: Infected, test: Records, methods: dict[str, Method], reads: int) -> tuple[Cell, dict[str, str]]:
    """One cell, and why methods failed; one that did leaves its user with the model before, and is read as that."""
    cell, failed = cleanse_once(infected, test, {}), {}
    readings = list(cell.readings)
    for name, method in methods.items():
        try:
            after, seconds = infected.unlearn(
                method, rng=child(generator(infected.trained.recipe.seed), name), reads=reads
            )
            readings.append(read(after, test, infected.backdoor, model=name, seconds=seconds))
        except (Misuse, NothingChanged) as error:
            failed[name] = str(error)
            readings.append(replace(cell["before"], model=name, seconds=0.0))
    return replace(cell, readings=tuple(readings)), failed


def conclude(cells: Cells, plan: Plan) -> dict[str, Any]:
    """The table, and for each sparsity the winner's score against the dense winner's, paired by seed."""
    found = [
        Cell.from_json(cells[("confirm", sparsity, seed)]["cell"])
        for sparsity in plan.sparsities
        for seed in plan.seeds
    ]
    table = Cleansing(backdoor=Backdoor(), cells=tuple(found)).summary()
    for line in table:
        print(
            f"{line['sparsity']:5g} {line['model']:16} test {line['test']:.2%}  attack {line['attack']:.2%}  "
            f"floor {line['floor']:.2%}  attack gap {line['attack_gap']:.2%}  seconds {line['seconds']:.1f}"
        )
    scores = {sparsity: _confirmed(cells, plan, sparsity, found) for sparsity in plan.sparsities}
    level = 1 - 0.05 / max(1, len(plan.sparsities) - 1)  # so that all comparisons together hold with 95 %
    answer = {}
    for sparsity, (method, values) in scores.items():
        gain = mean([a - b for a, b in zip(values, scores[0.0][1], strict=True)], level)
        verdict = "helps" if gain.low > 0 else "harms" if gain.high < 0 else "not told apart"
        answer[f"{sparsity:g}"] = {
            "winner": method,
            "settings": winner(cells, plan, sparsity, method)["settings"],
            "score": mean(values).to_json(),
            "against_dense": gain.to_json() if sparsity else None,
            "verdict": verdict if sparsity else "reference",
        }
    told = [{name: one.to_json() if isinstance(one, Estimate) else one for name, one in line.items()} for line in table]
    common = {"trials_per_sparsity": plan.trials, "reads": plan.reads, "by": plan.by}
    return {**common, "sparsities": answer, "table": told}


def _confirmed(cells: Cells, plan: Plan, sparsity: float, found: list[Cell]) -> tuple[str, list[float]]:
    """The method that won the search at this sparsity, and its scores on the confirming seeds."""
    best = max(METHODS, key=lambda method: float(winner(cells, plan, sparsity, method)["score"]))
    readings = [cell[best] for cell in found if cell.sparsity == sparsity]
    return best, [one.test.value - one.attack.value for one in readings]


def _said(line: dict[str, Any]) -> str:
    return "failed" if "failed" in line else f"test {line['test']:.4f}, attack {line['attack']:.4f}"


if __name__ == "__main__":
    main()
