"""What the retraining adversary retains of the rows that it was to forget, on all of MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expunge import Recipe, datasets, generator
from expunge.learn.loop import threads
from expunge.study.retention import retention
from expunge.study.retention_found import Retention
from expunge.study.retention_parties import PARTIES, YARDSTICKS
from expunge.study.retention_rows import Rules

CELLS = Path(__file__).resolve().parents[1] / "build" / "verify-retention"
SEEDS = 12
RECIPE = Recipe(
    model="mlp", model_args={"hidden": [64]}, optimiser_args={"lr": 0.1, "momentum": 0.9}, epochs=5, batch_size=256
)
RULES = Rules(forgotten=3_000, hard=0.1, reach=0.75, folds=3)
ASKED = (*YARDSTICKS, "retraining, random of M", "retraining, nearest row", "retraining, last layer")


def measured(seeds: int = SEEDS, asked: tuple[str, ...] = ASKED, keep: Path = CELLS) -> dict[str, Any]:
    """The whole study, or what is missing of it; prints the table."""
    data = datasets.mnist()
    with threads(1):
        found = retention(
            data.train,
            data.test,
            RECIPE,
            seeds=seeds,
            parties={name: PARTIES[name] for name in asked},
            rules=RULES,
            rng=generator(0),
            keep=keep,
            progress=lambda what, done, whole: print(f"{what} ({done} of {whole})", flush=True),
        )
    print(table(found))
    return found.to_json()


def table(found: Retention) -> str:
    """Markdown: accuracies and their gains in points, scores in nats, AUCs less one half in points."""
    lines = []
    for group, chosen in found.chosen.items():
        lines += [
            f"\n{group}, {len(chosen.positions):,} rows, {found.seeds} seeds\n",
            _HEAD,
            "|---|---|---|---|---|---|---|",
        ]
        for party in found.about["parties"]:
            score, seen = found.gain(group, party, "score"), found.gain(group, party, "seen")
            cells = [
                party,
                f"{found.accuracy(group, party):.2%}",
                f"{found.honest_accuracy(group, party):.2%}",
                f"{found.gain(group, party, 'accuracy'):.2%}",
                f"{score:.3f}",
                "-" if seen is None else f"{seen:.2%}",
                f"{found.test(group, party):.2%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, f"\nwidest interval of an accuracy or its gain: {found.widest:.2f} points"])


_HEAD = "| provider | accuracy | matched honest | gain | score gain | AUC - 50 | test |"
