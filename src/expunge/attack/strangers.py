"""Requests to delete rows that were never trained on, and a provider that does not look."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator

from expunge.attack.aim import check_target
from expunge.attack.bounds import movable
from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Method, Target
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained


@dataclass(frozen=True, kw_only=True)
class Strangers:
    """Asks for the deletion of rows that look like the target and bear its true label, but were never members.

    An unlearner that takes them on trust moves away from the true answer on them, and so on the target: over-unlearning
    (as in Hu et al., 2024, and Unlearn and Burn; own reconstruction). Exact retraining is not moved: there is nothing
    to leave out. expunge refuses such requests at the door, by content (`Request.split`); see `naive` for a provider
    that does not.

    Attributes:
        count: rows asked for: first an exact copy of each of the target's rows, then copies with noise.
        noise: the most that any entry of a copy differs from the target; of pixels, in units of 255 levels.
        owner: in whose name they are asked for.
    """

    count: int = 10
    noise: float = 0.05
    owner: str = "stranger"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise Misuse(f"count must be >= 1, got {self.count}")
        if not 0 <= self.noise < math.inf:
            raise Misuse(f"noise must be >= 0, got {self.noise}")

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> None:
        """Nothing: that is the point."""

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """One request, to remove rows by their content.

        Raises:
            Misuse: for a target that the model cannot be asked about.
            Unsupported: for tokens, unless noise is 0.
        """
        check_target(target, records)
        rows = torch.arange(self.count) % len(target.x)
        x, kind = target.x[rows], target.x.dtype
        if self.noise:
            if not movable(x):
                raise Unsupported("tokens cannot be changed by a little; use noise=0")
            scale = 255.0 if kind is torch.uint8 else 1.0
            coins = child(rng, "noise")
            away = (2 * torch.rand(x.shape, generator=coins) - 1) * self.noise * scale
            away[: len(target.x)] = 0.0  # the first copies are exact
            whole = records.x
            moved = x.float() + away.trunc() if kind is torch.uint8 else x + away.to(kind)
            low, high = (0, 255) if kind is torch.uint8 else (float(whole.min()), float(whole.max()))
            x = moved.clamp(min(low, float(x.min())), max(high, float(x.max()))).to(kind)
        return (Request.remove_rows(self.owner, x, target.y[rows]),)


def naive(trained: Trained, records: Records, request: Request) -> tuple[Trained, Records, Request]:
    """What a provider without a membership check makes of a request to remove rows: it takes them for members.

    Args:
        trained: the model.
        records: the data set.
        request: of kind ``remove_rows``; whether the rows were ever members is not looked at.

    Returns:
        The model with the rows booked as trained on (its module is shared, no parameter is changed, and it has no seal
        any more, as that would give the lie to it), the data set with the rows in it, and a request for their ids:
        what a `Method` is called with to see the harm. Never to be served or saved.

    Raises:
        Misuse: for a request of another kind, or of a sharded model, whose parts would have to be booked one by one.
    """
    if request.kind != "remove_rows" or request.x is None or request.y is None or request.owner is None:
        raise Misuse(f"only rows given by content can be strangers, got a {request.kind} request; use remove_rows")
    if trained.parts:
        raise Misuse("a sharded model forgets by training again, which strangers do not change; give a single model")
    taken = frozenset(records.ids) | trained.gone
    names = [f"stranger-{number:03d}" for number in range(len(request.x))]
    while any(name in taken for name in names):
        names = [f"{name}'" for name in names]
    new = Records(request.x, request.y, names, [request.owner] * len(names), classes=records.classes)
    booked = replace(trained, ids=trained.ids | frozenset(names), seal=None)
    return booked, records.plus(new), Request.remove(names)
