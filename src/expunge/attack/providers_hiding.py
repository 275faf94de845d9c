"""Providers whose training is honest, and who cheat where no check of a training looks: in the data, and in serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from expunge.attack.providers import Holder, HonestRetrain
from expunge.core.coins import child
from expunge.core.records import Records
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.verify.served import predict_of


@dataclass(kw_only=True, eq=False)
class SurrogateData(HonestRetrain):
    """Commits near copies of the forgotten rows as retained rows of other owners, and then retrains honestly on all.

    No check of a transcript finds anything, as all of it is true: only a look at the data can.

    Attributes:
        noise: of the copies, in standard deviations of all values of the forgotten rows.
    """

    noise: float = 0.05

    def _staying(self, split: Split, rng: Generator) -> Records:
        return split.retain.plus(near_copies(split.forget, self.noise, rng))


@dataclass(kw_only=True, eq=False)
class SelectiveServer:
    """Retrains honestly for its verifiers, and serves everybody else the old model.

    Attributes:
        honest: what the verifiers are shown.
        verifiers: names that it knows; whoever asks under another name, or none, gets the old model.
    """

    honest: Holder
    verifiers: frozenset[str] = frozenset({"verifier"})

    def unlearn(self, request: Request, *, rng: Generator) -> Trained:
        """The honest answer, which it does not serve to everybody."""
        return self.honest.unlearn(request, rng=rng)

    def predict(self, x: Tensor, asker: str = "") -> Tensor:
        """(n, classes) what it serves to whoever asks under this name."""
        return predict_of(self.honest.served if asker in self.verifiers else self.honest.trained)(x)

    @property
    def transcript(self) -> Path | None:
        """The honest one."""
        return self.honest.transcript


def near_copies(rows: Records, noise: float, rng: Generator) -> Records:
    """Copies of the rows with noise on them, each of an owner of its own, with names of their own."""
    x = rows.x
    values = x.double() + noise * x.double().std() * torch.randn(
        x.shape, generator=child(rng, "near copies"), dtype=torch.float64
    ).to(x.device)
    if not x.is_floating_point():
        limits = torch.iinfo(x.dtype)
        values = values.round().clamp(limits.min, limits.max)
    names = [f"{record_id}~near" for record_id in rows.ids]
    return Records(values.to(x.dtype), rows.y.clone(), names, names, classes=rows.classes)
