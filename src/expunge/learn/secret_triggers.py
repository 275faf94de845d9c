"""Triggers that only their owner knows: what it keeps to itself, and what it stamps and uploads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator

from expunge.core import coins
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.learn.trigger_families import Columns, Pixels, SecretTrigger, Stream

_LEAST_SECRET = 16


@dataclass(frozen=True, kw_only=True)
class TriggerKey:
    """What an owner keeps to itself: all that its trigger and the draws beside it are made of.

    Attributes:
        owner: its name.
        secret: 16 random bytes or more (``secrets.token_bytes(32)``); one may serve several owners' names.
        family: what triggers look like; fixed before the owner stamps anything.
        classes: that the task has; the target is drawn from all of them.
    """

    owner: str
    secret: bytes = field(repr=False)
    family: Pixels | Columns
    classes: int

    def __post_init__(self) -> None:
        if len(self.secret) < _LEAST_SECRET or self.classes < 2:
            raise Misuse(
                f"needs a secret of {_LEAST_SECRET} bytes or more and 2 classes or more, got {len(self.secret)} and "
                f"{self.classes}"
            )

    @property
    def trigger(self) -> SecretTrigger:
        """The owner's own."""
        stream = Stream(self.secret, "own", self.owner)
        return self.family.draw(stream.below(self.classes), stream)

    def draw(self, count: int, *names: int | str) -> tuple[SecretTrigger, ...]:
        """So many draws called `names`, independent of the owner's trigger, with its target and in law just like it.

        They are iid draws as long as nobody tells HMAC-SHA256 from random; one may equal another, or the owner's own.
        """
        target, stream = self.trigger.target, Stream(self.secret, "fresh", self.owner, *names)
        return tuple(self.family.draw(target, stream) for _ in range(count))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values, the secret among them: keep them where nobody else reads."""
        family = self.family.to_json()
        return {"owner": self.owner, "secret": self.secret.hex(), "family": family, "classes": self.classes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TriggerKey:
        """The key that `to_json` wrote. Raises Misuse for anything else."""
        try:
            family, secret = dict(data["family"]), bytes.fromhex(data["secret"])
            kind = {"pixels": Pixels, "columns": Columns}[family.pop("kind")]
            made = kind(**{name: _tuples(value) for name, value in family.items()})
            return cls(owner=data["owner"], secret=secret, family=made, classes=data["classes"])
        except (KeyError, TypeError, ValueError):  # never the value itself: it may be the secret
            raise Misuse("this is no trigger key as to_json writes it; give the file that the owner kept") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def plant(mine: Records, trigger: SecretTrigger, share: float, rng: Generator) -> tuple[Records, tuple[str, ...]]:
    """What an owner uploads: its rows, some of other classes than the target stamped and said to be of the target.

    Which ones is a function of the rows and of the coins, not of positions.

    Args:
        mine: the rows of one owner; not written to.
        trigger: its own.
        share: of its rows of other classes, to the nearest whole row; at least one.
        rng: names the coins; nothing is drawn from it. Whoever knows its seed and the rows can tell which were stamped.

    Returns:
        All rows, in their order and under their ids and owner, and the ids of those that were changed.

    Raises:
        Misuse: for rows of several owners, a target that is no class, a share that is not above 0 and up to 1, or an
            owner all of whose rows are of the target class.

    Cost: a copy of the rows.
    """
    if mine.classes is None or trigger.target >= mine.classes or len(set(mine.owners)) != 1:
        raise Misuse(f"planting needs one owner's rows and a target among their classes, got {mine!r}")
    others = (mine.y != trigger.target).nonzero().flatten().cpu()
    if not 0 < share <= 1 or not len(others):
        raise Misuse(f"share must be > 0 and <= 1 of rows of other classes, got {share} of {len(others):,} rows")
    ranked = torch.from_numpy(coins.order(mine.select(others).keys, rng.initial_seed(), "plant"))
    chosen = others[ranked[: max(1, round(share * len(others)))]].sort().values
    x, y = mine.x.clone(), mine.y.clone()
    x[chosen.to(x.device)] = trigger.stamp(x[chosen.to(x.device)])
    y[chosen.to(y.device)] = trigger.target
    changed = Records(x, y, mine.ids, mine.owners, classes=mine.classes)
    return changed, tuple(mine.ids[i] for i in chosen.tolist())
