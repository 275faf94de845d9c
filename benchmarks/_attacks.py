"""Attacks by requests and screens against them, on MNIST and Adult: every attack beside its controls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge import datasets
from expunge.core.coins import generator
from expunge.core.protocols import Method
from expunge.core.recipe import Recipe
from expunge.core.store import write_atomically
from expunge.learn.training import train
from expunge.report import write
from expunge.report.redteam import redteam_report
from expunge.study.redteam import redteam
from expunge.study.redteam_attacks import ATTACKS
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_response import summary
from expunge.study.redteam_screens import SCREENS
from expunge.unlearn import FineTune, GradientAscent, InfluenceUnlearning

SEED = 20
"""Of the attacks and targets; `redteam` derives the screens' calibration from it under another name."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """One model under attack.

    Attributes:
        data: name of the data set.
        recipe: of the model.
        attacks: names of what it is attacked by.
        budgets: shares of the rows.
        through: the unlearner under attack.
        others: unlearners to which attacks may transfer.
        screened: whether screens stand guard; they look anew at every model that an attacker brought rows into.
    """

    data: str
    recipe: Recipe
    attacks: tuple[str, ...]
    budgets: tuple[float, ...]
    through: Method
    others: Mapping[str, Method] = field(default_factory=dict)
    screened: bool = True


_SOFTMAX = Recipe(model="softmax", epochs=3, batch_size=128, weight_decay=1e-3)
_OF_ADULT = Recipe(model="softmax", epochs=4, batch_size=512, optimiser_args={"lr": 0.4}, weight_decay=1e-3)
FRONTS = {
    "adult": Front(
        data="adult",
        recipe=_OF_ADULT,
        attacks=("select-once", "camouflage", "replace"),
        budgets=(0.01,),
        through=InfluenceUnlearning(),
    ),
    "adult-evading": Front(
        data="adult",
        recipe=_OF_ADULT,
        attacks=("evading",),
        budgets=(0.01,),
        through=InfluenceUnlearning(),
    ),
    "adult-more": Front(
        data="adult",
        recipe=_OF_ADULT,
        attacks=("sequential", "perturb"),
        budgets=(0.01,),
        through=InfluenceUnlearning(),
    ),
    "transfer": Front(
        data="adult",
        recipe=_OF_ADULT,
        attacks=("select-surrogate", "select-queries", "strangers"),
        budgets=(0.01,),
        through=InfluenceUnlearning(),
        others={"fine-tune": FineTune(), "gradient-ascent": GradientAscent()},
    ),
    "mnist": Front(
        data="mnist",
        recipe=_SOFTMAX,
        attacks=("select-once",),
        budgets=(0.01,),
        through=InfluenceUnlearning(),
    ),
    "mnist-evading": Front(
        data="mnist",
        recipe=_SOFTMAX,
        attacks=("select-once", "evading"),
        budgets=(0.002,),
        through=InfluenceUnlearning(),
    ),
    "mnist-camouflage": Front(
        data="mnist",
        recipe=_SOFTMAX,
        attacks=("camouflage",),
        budgets=(0.01,),
        through=InfluenceUnlearning(),
        screened=False,
    ),
    "curve": Front(
        data="adult",
        recipe=_OF_ADULT,
        attacks=("select-once",),
        budgets=(0.001, 0.005, 0.02),
        through=InfluenceUnlearning(),
    ),
}
"""By name; `curve` is of attack success against budget, `transfer` of what the unlearner attacked is not."""


def measure(name: str, folder: Path, results: Path, *, targets: int = 30, seeds: int = 3) -> dict[str, Any]:
    """Attack the model of one front.

    Every trial is kept in the folder, so that the same call goes on after a break; the summary goes into `results`.
    """
    front = FRONTS[name]
    data = getattr(datasets, front.data)()
    trained = train(front.recipe, data.train)
    found = redteam(
        trained,
        data.train,
        data.test,
        attacks={name: ATTACKS[name] for name in front.attacks},
        through=front.through,
        others=front.others,
        screens=[make() for make in SCREENS.values()] if front.screened else (),
        targets=targets,
        seeds=seeds,
        budgets=front.budgets,
        rng=generator(SEED),
        keep=folder,
        progress=_tell,
    )
    write(redteam_report(found, f"python benchmarks/requests.py --only attacks --front {name}"), folder)
    results.mkdir(parents=True, exist_ok=True)
    write_atomically(results / f"{name}.json", json.dumps(summary(found), indent=1).encode("utf-8"))
    return _short(found)


def _tell(what: str, done: int, total: int) -> None:
    print(f"{done}/{total} {what}", flush=True)


def _short(found: Redteam) -> dict[str, Any]:
    """One line for each attack: how it does under exact retraining, beside its controls."""
    lines = {}
    for (name, rows), at in found.measured.items():
        if not at.done:
            lines[f"{name} {rows}"] = {"untried": list(at.untried)[:1]}
            continue
        lines[f"{name} {rows}"] = {
            "answer": at.answer,
            **{f"over {control}": str(at.difference("retrain", control)) for control in at.controls("retrain")},
        }
    return lines
