"""The chapter `verify`: ways to cheat an owner who asks, and who finds them, on a part of the data."""

from __future__ import annotations

from dataclasses import replace

from expunge.core.coins import child, generator
from expunge.core.recipe import Recipe
from expunge.demo.story import Story
from expunge.report import Chapter
from expunge.report.verification import matrix_grid, verification_chapter
from expunge.study.verification import some_owners, verification
from expunge.study.verification_ground import Terms
from expunge.study.verification_parties import PROVIDERS, VERIFIERS

ROWS = 3000
SHOWN = (
    "honest retrain",
    "lazy",
    "rewinder, spliced",
    "retraining, nearest row",
    "retraining, last layer",
    "forging",
    "surrogate data, cleaned",
    "selective server",
)
_LEFT_OUT = ("replay, loose",)


def tell_verify(story: Story) -> Chapter:
    """Every provider shown before every verifier, at one seed."""
    data = story.data
    story.step("verify providers that cheat")
    coins = child(generator(story.settings.seed), "verify")
    found = verification(
        some_owners(data.train, ROWS, coins),
        data.test,
        Recipe(model="mlp", model_args={"hidden": [64]}, epochs=3, batch_size=32, optimiser_args={"lr": 0.1}),
        seeds=1,
        providers={name: PROVIDERS[name] for name in SHOWN},
        verifiers={name: check for name, check in VERIFIERS.items() if name not in _LEFT_OUT},
        terms=Terms(asked=50),
        rng=coins,
    )
    again = f"expunge verify matrix --data mnist --rows {ROWS} --epochs 3 --batch-size 32 --out matrix"
    told = verification_chapter(found, again)
    accused = found.accusations()
    # A cheat that comes past everybody is a finding; an honest provider that is accused is a fault.
    sound = accused is not None and accused.value == 0
    return replace(told, grids=(matrix_grid(found),), data={**told.data, "sound": sound})
