"""The attacks that red-teaming knows by name, each made for a number of rows that it may ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from torch import Generator

from expunge.attack.camouflage import Camouflage
from expunge.attack.evading import Evading
from expunge.attack.knowledge import Queries, Surrogate
from expunge.attack.perturb import PerturbRequests
from expunge.attack.replace import ReplaceRequests
from expunge.attack.select import SelectRequests
from expunge.attack.sequential import SequentialRequests
from expunge.attack.slow_down import SlowDown
from expunge.attack.strangers import Strangers
from expunge.core.errors import Misuse
from expunge.core.protocols import Attack
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.screen import Decision
from expunge.study.redteam_screens import Watch

_STEPS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """What attacks are made for.

    Attributes:
        trained: the model under attack.
        watch: the screens that stand guard, for attackers who know them; None: nobody looks.
    """

    trained: Trained
    watch: Watch | None = None


Maker: TypeAlias = Callable[[int, Ground], Attack]
"""Makes an attack that may ask for so many rows."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """The provider's screens, all together, in an attacker's hands: calibrated for whatever it asks."""

    watch: Watch = field(repr=False)

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Decision:
        """What they would say of this request."""
        return self.watch.decision(trained, records, request)


def _sequential(rows: int, ground: Ground) -> SequentialRequests:
    steps = min(_STEPS, rows)
    return SequentialRequests(horizon=steps, per_step=rows // steps)


def _evading(rows: int, ground: Ground) -> Evading:
    if ground.watch is None:
        raise Misuse("evading attacks screens, and there are none; name some, or leave it out")
    return Evading(screening=Copy(watch=ground.watch), budget=rows, least=0.1)


ATTACKS: Mapping[str, Maker] = MappingProxyType(
    {
        "select": lambda rows, ground: SelectRequests(count=rows),
        "select-once": lambda rows, ground: SelectRequests(count=rows, how="one-shot"),
        "select-relaxed": lambda rows, ground: SelectRequests(count=rows, how="relaxed"),
        "select-surrogate": lambda rows, ground: SelectRequests(count=rows, knowledge=Surrogate()),
        "select-queries": lambda rows, ground: SelectRequests(count=rows, how="one-shot", knowledge=Queries()),
        "replace": lambda rows, ground: ReplaceRequests(count=rows),
        "perturb": lambda rows, ground: PerturbRequests(recipe=ground.trained.recipe, count=rows),
        "sequential": _sequential,
        "camouflage": lambda rows, ground: Camouflage(poison=rows, camouflage=rows),
        "strangers": lambda rows, ground: Strangers(count=rows),
        "slow-down": lambda rows, ground: SlowDown(budget=rows),
        "evading": _evading,
    }
)
"""By the word on the command line. White-box, unless the name says otherwise; `evading` knows the screens too."""
