"""Training again on what remains: the reference for everything else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Generator

from expunge.core.claim import Claim, Exactness
from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import Retrained
from expunge.core.protocols import Need
from expunge.core.trained import Trained
from expunge.learn.build import EXTERNAL, build
from expunge.learn.loop import fit
from expunge.learn.training import train
from expunge.unlearn.method import Done, Method, Task


def _needs_a_beginning(method: Method, trained: Trained) -> Unsupported | None:
    if trained.recipe.model == EXTERNAL:
        return Unsupported(
            f"{method.name} trains from the beginning, and this model was trained elsewhere; "
            "give a recipe whose model can be made anew, or use fine-tune"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Retrain(Method):
    """Train from scratch on what remains.

    Exact. With the same coins: the bytes that this program would have made had the rows never been there. With fresh
    coins: a draw from the same distribution, of which the seed in `trained.recipe` is the only new choice.

    Cost: a full training.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "by definition"
    not_guaranteed: ClassVar[str] = "that copies elsewhere are gone; other builds or thread counts give other last bits"
    coins: Literal["same", "fresh"] = "same"

    def __post_init__(self) -> None:
        if self.coins not in ("same", "fresh"):
            raise Misuse(f'coins must be "same" or "fresh", got "{self.coins}"')

    @property
    def exactness(self) -> Exactness:
        """Pathwise with the same coins, in law with fresh ones."""
        return "pathwise" if self.coins == "same" else "in law"

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs a recipe whose model can be made anew."""
        return _needs_a_beginning(self, trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        recipe = task.trained.recipe
        if self.coins == "fresh":
            seed = child(rng, "retrain", recipe.seed).initial_seed() >> 1
            recipe = replace(recipe, seed=seed)
        trained = train(recipe, task.retain, tally=task.tally)
        return Done(trained=trained, events=(Retrained(part=-1, rows=len(task.retain)),))


@dataclass(frozen=True, kw_only=True)
class RetrainBriefly(Method):
    """Train from scratch on what remains, but stop after some steps: the yardstick "retrain for the same time".

    The result never saw the removed rows, but it is not what the recipe's training would have given, so that nothing
    is claimed. A method that does worse than this at equal cost is not worth its cost. A pruned model keeps its mask,
    which the removed rows may have had a part in.
    Cost: `steps` batches of gradients.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "a baseline"
    not_guaranteed: ClassVar[str] = "the accuracy of the full training, which it stops short of"
    steps: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Misuse(f"steps must be >= 1, got {self.steps}")

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs a single model that can be made anew."""
        return super().supports(trained) or _needs_a_beginning(self, trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        recipe = task.trained.recipe
        self._refuse_unread(task)
        module = build(recipe).to(task.retain.device)
        if task.zeros is not None:
            task.zeros.prune_(module)
        fit(module, recipe, task.retain, steps=self.steps, mask=task.zeros, tally=task.tally)
        return Done(trained=replace(task.trained, module=module))

    def _refuse_unread(self, task: Task) -> None:
        """Unsupported if replacements would be booked as trained on that so few steps may never read."""
        least = -(-len(task.retain) // task.trained.recipe.batch_size)
        if self.steps < least and not frozenset(task.retain.ids) <= task.trained.ids:
            raise Unsupported(
                f"{self.name} stops after {self.steps:,} steps, before it has read every row that comes as a "
                f"replacement; give steps={least} or more, or use retrain"
            )
