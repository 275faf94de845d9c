"""Whether sparsity simplifies unlearning (Jia et al., 2023), measured: every method, dense and pruned.

    python benchmarks/sparsity.py --quick            # under a minute on two cores: seconds of each method
    python benchmarks/sparsity.py                    # hours: the whole table; stop it, and start it again
    python benchmarks/sparsity.py --only lenet       # one part of it
    python benchmarks/sparsity.py --page             # measure nothing, write docs/sparsity.md from what was measured

Parts: `lenet` and `convnet3` on full MNIST with three seeds, `resnet20` on full Fashion-MNIST with one, each 5 epochs,
at 0 and 95 % sparsity (one-shot magnitude, rewound to epoch 1), forgetting class 3 and 10 % of the rows, beside exact
retraining and retraining that stops after as many seconds as each method took; `proposition` on full MNIST: the
paper's Proposition 2; `backdoor`: 200 trials a sparsity to remove one. Finished cells are kept in
``benchmarks/results``, a line each. Intervals are 95 %, Student's t over seeds; what was not measured is shown so.

With ``--quick``, the last line is one JSON:

    influence_speedup_mlp, influence_speedup_resnet   a loop over rows / ours, seconds, the same influence step
    seconds_over_retrain                              of each method: its seconds / those of retraining; MLP, class 3
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _backdoor import run as backdoor
from _influence import speedups
from _page import write_page
from _proposition import measured as proposition

from expunge import Claim, Keep, Method, Recipe, Request, Retrain, datasets, generator, train
from expunge.cli.inputs import METHODS
from expunge.cli.output import progress
from expunge.core.store import write_atomically
from expunge.study import Study, run_study

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
EXACT = ("retrain", "retrain-briefly", "sisa")
NEEDS_A_LOG = ("amnesiac-unlearning",)  # keeps every update of training: 200 MB an epoch for LeNet on MNIST
SPARSITIES, SCENARIOS = (0.0, 0.95), ("class:3", "random:0.1")


@dataclass(frozen=True)
class Part:
    """One architecture on one data set."""

    data: str
    recipe: Recipe
    seeds: tuple[int, ...]


def _recipe(model: str, **args: Any) -> Recipe:
    return Recipe(model=model, epochs=5, batch_size=128, **args)


PARTS: Mapping[str, Part] = {
    "lenet": Part("mnist", _recipe("lenet"), (0, 1, 2)),
    "convnet3": Part("mnist", _recipe("convnet3"), (0, 1, 2)),
    "resnet20": Part("fashion-mnist", _recipe("resnet20"), (0,)),
}


OTHERS = ("proposition", "backdoor")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds only")
    parser.add_argument("--only", choices=[*PARTS, *OTHERS], help="one part")
    parser.add_argument("--page", action="store_true", help="write docs/sparsity.md from what was measured before")
    words = parser.parse_args()
    if words.quick:
        print(json.dumps(quick()))
        return
    if not words.page:
        for name in [words.only] if words.only else [*PARTS, *OTHERS]:
            part(name)
    studies = {name: (study_of(one), one.data) for name, one in PARTS.items()}
    write_page(studies, RESULTS, HERE.parent / "docs" / "sparsity.md")


def methods() -> dict[str, Method]:
    """All that change a model without claiming anything, at their defaults."""
    claimless = {word: kind for word, kind in METHODS.items() if kind.claim is Claim.NONE}
    return {word: kind() for word, kind in claimless.items() if word not in (*EXACT, *NEEDS_A_LOG)}


def study_of(part: Part) -> Study:
    """The table of one part."""
    return Study(
        recipe=part.recipe,
        methods=methods(),
        scenarios=SCENARIOS,
        sparsities=SPARSITIES,
        seeds=part.seeds,
        rewind=1,
    )


def part(name: str) -> None:
    """Measure one part, going on where it was left."""
    if name in OTHERS:
        folder = RESULTS / name
        found = backdoor(folder) if name == "backdoor" else proposition(datasets.get("mnist").train, (0, 1, 2), folder)
        write_atomically(folder / "summary.json", json.dumps(found, indent=1).encode("utf-8"))
        return
    data = datasets.get(PARTS[name].data)
    with progress(False) as show:
        run_study(study_of(PARTS[name]), data.train, data.test, folder=RESULTS / name, report=show)


def quick() -> dict[str, Any]:
    """Speed alone."""
    found = speedups(quick=True)
    data = datasets.get("mnist").train
    recipe = replace(_recipe("mlp"), seed=0)
    request = Request.remove(data.of_class(3).ids)
    data.digests()
    trained = train(recipe, data)
    full = Retrain()(trained, data, request, rng=generator(0)).cost.seconds
    ratios = {}
    for word, method in methods().items():
        if method.supports(trained) is not None:
            continue  # is for models that are pruned already
        ratios[word] = method(trained, data, request, rng=generator(0)).cost.seconds / full
        print(f"{word:28s} {ratios[word]:8.3f} of the {full:.1f} s of retraining")
    logged = train(replace(recipe, epochs=1), data, keep=Keep(batches=True, every=1))
    once = Retrain()(logged, data, request, rng=generator(0)).cost.seconds
    for word in NEEDS_A_LOG:
        ratios[word] = METHODS[word]()(logged, data, request, rng=generator(0)).cost.seconds / once
        print(f"{word:28s} {ratios[word]:8.3f} of retraining, of a model of one epoch")
    rounded = {word: round(value, 4) for word, value in ratios.items()}
    return {**{name: round(value, 2) for name, value in found.items()}, "seconds_over_retrain": rounded}


if __name__ == "__main__":
    main()
