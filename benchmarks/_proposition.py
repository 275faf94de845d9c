"""Proposition 2 of Jia et al. (2023): the unlearning error of gradient ascent falls as the mask gets sparser.

Their bound: ``error(m) = O(lr^2 t |m * (theta_t - theta_0)| sigma(m))``, where ``error`` is the distance of the
parameters after gradient ascent to those of the retrained model with the same mask, t the steps of training by plain
SGD, and sigma the largest eigenvalue, in absolute value, of the Hessian among the parameters that may move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from expunge import GradientAscent, Recipe, Records, Request, Retrain, Trained, generator, train
from expunge.calculus import Objective
from expunge.core.coins import child
from expunge.core.estimate import Estimate, mean
from expunge.core.recipe import Pruning
from expunge.core.rows import CHUNK
from expunge.learn.build import build
from expunge.learn.loop import prepare, row_losses
from expunge.learn.pruning import mask_of_zeros
from expunge.study.store import opened
from expunge.unlearn.sparsity import RetrainSameMask

SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99)
RECIPE = Recipe(model="mlp", epochs=5, batch_size=128, optimiser_args={"lr": 0.1})  # plain SGD, as the theory has it
SHARE = 0.1
ROWS = 2000
Figures = dict[str, float]


def measured(records: Records, seeds: Sequence[int], folder: Path | None) -> dict[str, Any]:
    """Errors and bounds at each sparsity and seed, and how they go together; resumable in the folder."""
    about = {
        "by": "synflow",
        "recipe": RECIPE.to_json(),
        "sparsities": list(SPARSITIES),
        "share": SHARE,
        "rows": len(records),
    }
    with opened(folder, about) as cells:
        for seed in seeds:
            for sparsity in SPARSITIES:
                if (seed, sparsity) not in cells:
                    cells.add((seed, sparsity), point(records, sparsity, seed))
        points = {seed: [cells[(seed, sparsity)] for sparsity in SPARSITIES] for seed in seeds}
    return summary(points)


def summary(points: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, and rank correlations over the sparsities, one a seed."""
    names = ("error", "before", "bound", "sigma", "moved")
    table = [
        {"sparsity": sparsity}
        | {name: _json([told[place][name] for told in points.values()]) for name in names}
        | {"share_left": _json([told[place]["error"] / told[place]["before"] for told in points.values()])}
        for place, sparsity in enumerate(SPARSITIES)
    ]
    density = [1 - sparsity for sparsity in SPARSITIES]
    against = {
        "error_with_density": [_rank(density, told, "error") for told in points.values()],
        "error_with_bound": [_rank([one["bound"] for one in told], told, "error") for told in points.values()],
    }
    return {"points": table, **{name: _json(values) for name, values in against.items()}}


def _rank(values: list[float], told: list[dict[str, Any]], name: str) -> float:
    return float(stats.spearmanr(values, [one[name] for one in told]).statistic)


def _json(values: list[float]) -> dict[str, Any]:
    found: Estimate = mean(values)
    return {"mean": found.value, "low": found.low, "high": found.high} if len(values) > 1 else {"mean": found.value}


def point(records: Records, sparsity: float, seed: int) -> Figures:
    """Error, bound and its factors at one sparsity, for a tenth of the rows forgotten."""
    # By synflow: one training, whose order of rows retraining with the same mask repeats, as it is with a dense one.
    pruning = None if sparsity == 0 else Pruning(sparsity=sparsity, by="synflow")
    trained = train(replace(RECIPE, seed=seed, pruning=pruning), records)
    forget, _ = records.split(SHARE, child(generator(seed), "forget"))
    request = Request.remove(forget.ids)
    ascent = GradientAscent()(trained, records, request, rng=generator(seed)).trained
    same_mask = RetrainSameMask() if pruning else Retrain()  # of a dense model the mask is no choice
    again = same_mask(trained, records, request, rng=generator(seed)).trained
    begun = build(trained.recipe)
    if pruning is not None:
        mask_of_zeros(trained.module).prune_(begun)
    steps = RECIPE.epochs * -(-len(records) // RECIPE.batch_size)
    moved, sigma = _apart(trained.module, begun), largest_curvature(trained, records, seed)
    return {
        "error": _apart(ascent.module, again.module),
        "before": _apart(trained.module, again.module),
        "moved": moved,
        "sigma": sigma,
        "bound": RECIPE.optimiser_args["lr"] ** 2 * steps * moved * sigma,
    }


def _apart(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return float(torch.stack([(a.detach() - b.detach()).double().square().sum() for a, b in pairs]).sum().sqrt())


def largest_curvature(trained: Trained, records: Records, seed: int, iterations: int = 30) -> float:
    """Largest eigenvalue, in absolute value, of the mean loss's Hessian among what may move; by power iteration."""
    rows, _ = records.split(min(ROWS / len(records), 0.99), child(generator(seed), "curvature"))
    x, y = prepare(rows.x[:CHUNK], torch.float32), rows.y[:CHUNK]
    objective = Objective(trained.module, row_losses(trained.recipe))
    free = torch.ones(objective.size)
    if trained.recipe.pruning is not None:
        moves = mask_of_zeros(trained.module).moves
        free = torch.cat([moves.get(name, one).reshape(-1).float() for name, one in objective.split(free).items()])
    v = torch.randn(objective.size, generator=child(generator(seed), "power")) * free
    value = 0.0
    for _ in range(iterations):
        v = v / v.norm()
        image = objective.hessian_product(x, y, v) / len(y) * free
        value, v = float(torch.dot(v, image)), image
    return abs(value)
