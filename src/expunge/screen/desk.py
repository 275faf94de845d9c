"""Several screens that have looked at one model together, under names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core.coins import child, generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Judgement, Screen
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.screen.asked import Asked
from expunge.screen.coalition import Coalition
from expunge.screen.influence import GradientInfluence
from expunge.screen.isolation import Isolation
from expunge.screen.membership import Membership
from expunge.screen.norm import GradientNorm
from expunge.screen.scene import Scene
from expunge.screen.sieve import Reader, Sieve, told, whole_of


def default_screens() -> tuple[Screen, ...]:
    """All five, as they come."""
    return (Membership(), GradientNorm(), Isolation(), GradientInfluence(), Coalition())


class Desk:
    """Screens that have looked at one model. Made once for a model; requests are then look-ups.

    A screen of somebody else's (`core.protocols.Screen`) is called anew for every request, on the trained rows by id;
    its score of a request is what its `whole` says of the judgements, or else the largest score of a row.

    Attributes:
        screens: by name: that of the class, numbered if there are several.
        seed: names all coins.
        model: digest of the model.
        scene: the model and its rows.
    """

    def __init__(self, screens: Sequence[Screen], trained: Trained, records: Records, *, seed: int) -> None:
        """Prepare every screen. Misuse without screens, or if one gives no score for a row."""
        if not screens:
            raise Misuse("give at least one screen: Membership(), GradientNorm(), Isolation(), ...")
        self.screens, self.seed, self.model = named(screens), seed, trained.digest()
        self.scene = Scene(trained, records)
        rng = generator(seed)
        self._readers: dict[str, Reader] = {
            name: screen.prepare(self.scene, rng=child(rng, "screen", name))
            for name, screen in self.screens.items()
            if isinstance(screen, Sieve)
        }
        self._rng = rng

    def wholes(self, asked: Asked) -> Tensor:
        """(screens,) the trained rows' score by each screen."""
        held = asked.trained
        scores = []
        for name, screen in self.screens.items():
            if name in self._readers:
                scores.append(self._readers[name](held).whole)
            else:
                judged = self._foreign(name, screen, held)
                scores.append(float(getattr(screen, "whole", whole_of)(judged)))
        return torch.tensor(scores, dtype=torch.float64)

    def judgements(self, asked: Asked) -> dict[str, tuple[Judgement, ...]]:
        """What each screen thinks of each row."""
        return {
            name: told(self._readers[name], asked) if name in self._readers else self._foreign(name, screen, asked)
            for name, screen in self.screens.items()
        }

    def _foreign(self, name: str, screen: Screen, asked: Asked) -> tuple[Judgement, ...]:
        scene, rng = self.scene, child(self._rng, "screen", name)
        judged = screen(scene.trained, scene.records, asked.request(), rng=rng)
        if len(judged) != len(asked.ids):
            raise Misuse(f"{name} gave {len(judged)} judgements of {len(asked.ids)} rows; it owes one for each")
        return judged


def named(screens: Sequence[Screen]) -> dict[str, Screen]:
    """The screens by the names of their classes, the second of a class with a 2 behind it, and so on."""
    answer: dict[str, Screen] = {}
    for screen in screens:
        name, number = type(screen).__name__, 2
        while name in answer:
            name, number = f"{type(screen).__name__} {number}", number + 1
        answer[name] = screen
    return answer


def settings(screen: Screen) -> dict[str, Any]:
    """A screen's fields as plain JSON values: rows by their digest, methods and others by what they print."""
    if not is_dataclass(screen):
        return {}
    return {field.name: _plain(getattr(screen, field.name)) for field in fields(screen)}


def _plain(value: object) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Records):
        return f"{len(value)} rows {hashlib.sha256(value.digests().tobytes()).hexdigest()}"
    return repr(value)
