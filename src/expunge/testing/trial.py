"""One method on one case: what the checks share, so that each of them is short."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeAlias

import torch
from torch import Generator

from expunge.core.claim import Claim
from expunge.core.coins import child, generator
from expunge.core.digest import digest_tensors
from expunge.core.protocols import Method, Unlearned, Verdict
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import State, Trained
from expunge.testing.case import Case, Train
from expunge.testing.foreign import Foreign

Subject: TypeAlias = Method | Foreign

ROUNDING = 1e-3
"""Largest difference, as a share of the whole change, that a method without a claim may owe to the order of sums."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A method, and all that is needed to try it.

    Attributes:
        method: the method.
        case: the data.
        train: how the method's own system trains from scratch.
        seeds: of the trainings that statistical checks repeat.
    """

    method: Subject
    case: Case
    train: Train
    seeds: tuple[int, ...]

    @cached_property
    def recipe(self) -> Recipe:
        """The first recipe of the case that the method supports; the last one's error if it supports none."""
        problem = None
        for recipe in self.case.recipes:
            problem = self.method.supports(self.case.model(self.train, recipe))
            if problem is None:
                return recipe
        raise problem or ValueError("a case needs at least one recipe")

    @cached_property
    def first(self) -> Unlearned:
        """What the method makes of the case's request; computed once, and not to be written to."""
        return self.call(self.start())

    def start(self) -> Trained:
        """A fresh copy of the trained model, of the first seed."""
        return self.case.model(self.train, self.seeded(self.seeds[0]))

    def seeded(self, seed: int) -> Recipe:
        """The recipe with this seed."""
        return replace(self.recipe, seed=seed)

    def call(
        self,
        trained: Trained,
        request: Request | Iterable[str] | None = None,
        *,
        records: Records | None = None,
        coins: Generator | None = None,
    ) -> Unlearned:
        """Call the method with this request (or ids), on these records, with these coins; the case's by default."""
        if request is None:
            request = self.case.request
        elif not isinstance(request, Request):
            request = Request.remove(request)
        records = self.case.records if records is None else records
        return self.method(trained, records, request, rng=generator(0) if coins is None else coins)


class NamedCheck(ABC):
    """One idea, with a name."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Look at the subject, without changing it."""

    def passed(self, why: str, **figures: float) -> Verdict:
        """A verdict of passed."""
        return Verdict(check=self.name, outcome="pass", why=why, figures=figures)

    def unless(self, problems: Iterable[str], why: str, **figures: float) -> Verdict:
        """Failed for these problems, or passed if there are none."""
        told = "; ".join(problems)
        return Verdict(check=self.name, outcome="fail" if told else "pass", why=told or why, figures=figures)

    def alike(self, trial: Trial, one: Unlearned, other: Unlearned, why: str) -> Verdict:
        """Passed if both results have the same bytes (if they do not claim to be exact: but for rounding)."""
        if noise_hides(one) or noise_hides(other):
            return Verdict(check=self.name, outcome="inconclusive", why="the result keeps no state without noise")
        apart = distance(state_of(one), state_of(other))
        if apart == 0 and digest_tensors(state_of(one)) == digest_tensors(state_of(other)):
            return self.passed(f"{why} changes no byte", apart=0.0)
        moved = distance(state_of(one), trial.start().module.state_dict())
        share = apart / moved if moved else math.inf
        if one.claim is not Claim.EXACT and share <= ROUNDING:
            return self.passed(f"{why} changes the result by rounding only", apart=apart, share=share)
        return self.unless([f"{why} changes the result by {share:.2g} of the whole step"], "", apart=apart, share=share)


def state_of(result: Unlearned) -> State:
    """What coins of the method determine: the un-noised state of a certified result, else parameters and buffers."""
    state = result.trained.module.state_dict()
    return {name: result.trained.secret.get(name, tensor) for name, tensor in state.items()}


def noise_hides(result: Unlearned) -> bool:
    """True if a certified result keeps no un-noised state that could be compared."""
    return result.claim is Claim.CERTIFIED and not result.trained.secret


def distance(one: State, other: State) -> float:
    """L2 distance of all tensors together, in float64; infinite if names or shapes differ."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return math.inf
    squares = ((one[name].double() - other[name].double()).square().sum() for name in one)
    return math.sqrt(math.fsum(float(square) for square in squares))


def footprint(trained: Trained) -> dict[str, object]:
    """Everything of a model that a method might leave a trace in, by name."""
    parts = (trained, *trained.parts)
    logs = [part.log for part in parts if part.log is not None]
    kept = [digest_tensors(state) for log in logs for state in (*log.slices, *log.checkpoints.values())]
    return {
        "parameters or buffers": [part.digest() for part in parts],
        "training flags": [[module.training for module in part.module.modules()] for part in parts],
        "requires_grad": [[p.requires_grad for p in part.module.parameters()] for part in parts],
        "gradients": [[p.grad is not None for p in part.module.parameters()] for part in parts],
        "kept slices or checkpoints": kept,
        "kept batches": [log.batches for log in logs],
        "ids": [part.ids for part in parts],
        "gone": [part.gone for part in parts],
        "recipe": [part.recipe for part in parts],
        "standing": [part.standing for part in parts],
    }


def footprint_of_rows(records: Records) -> dict[str, object]:
    """Everything of records that a method might leave a trace in, by name; read anew, not from what is remembered."""
    rows = digest_tensors({"x": records.x, "y": records.y})
    return {"rows": rows, "record ids": records.ids, "owners": records.owners, "classes": records.classes}


def differing(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names of what is no longer as it was."""
    return [name for name, was in before.items() if after[name] != was]


@contextmanager
def other_global_coins(seed: int) -> Iterator[None]:
    """Within: torch's global generator stands elsewhere. After: where it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(child(generator(seed), "elsewhere").initial_seed())
        yield
