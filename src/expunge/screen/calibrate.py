"""Screens set against benign requests of the same size, so that they raise false alarms at a stated rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Screen
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.screen.asked import Asked, understand
from expunge.screen.benign import Alter, Benign, By
from expunge.screen.conformal import least_draws, p_values
from expunge.screen.decide import Decision, decide, nothing_asked, refused
from expunge.screen.desk import Desk, default_screens, named, settings

FORMAT = "expunge-screening/1"
Kind = Literal["remove", "replace"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Screening:
    """Screens that know what benign requests of one kind and size score on one model.

    Called with a request of that kind and size it says what to do. The false-alarm rate is `rate` over benign requests
    drawn as the calibration drew them, over calibrations; of one calibration with m draws it varies by about
    ``sqrt(rate (1 - rate) / m)``. Of benign requests of another make (see `by`) nothing is promised: owners whose rows
    are mislabelled or of one class are flagged by what they hold.

    Not guaranteed: that attacks are found. Who asks for one row at a time is not told from anybody else.

    Attributes:
        screens: the screens.
        rate: false-alarm rate.
        size: rows of a request.
        kind: ``remove`` (however rows are named) or ``replace``.
        by: how benign requests were drawn, see `benign.Benign`.
        like: with ``classes``, rows of each class.
        alter: what benign rows were replaced by, if the default was not; JSON does not hold it.
        altered: whether there was such an `alter`, which JSON does hold.
        seed: names the coins of the benign draws; attacks that are to be judged by it need another.
        looked: names the coins of what the screens drew when they looked at the model.
        model: digest of the model.
        scores: (draws, screens) what the benign requests scored.
    """

    screens: tuple[Screen, ...]
    rate: float
    size: int
    kind: Kind
    by: By
    seed: int
    looked: int
    model: str
    scores: Tensor
    like: Mapping[int, int] = field(default_factory=dict)
    alter: Alter | None = field(default=None, repr=False)
    altered: bool = False
    _desks: list[Desk] = field(default_factory=list, repr=False)

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Decision:
        """What to do with the request. All coins are the calibration's, so that `rng` is for the protocol's sake.

        Raises:
            Misuse: for another model, kind, size or mix of classes than it was calibrated on: calibrate anew, as
                `defend` does for every request.
        """
        asked = understand(trained, records, request)
        if not len(asked):
            return nothing_asked(request, self.rate)
        desk = self.desk(trained, records)
        if not asked.ids:
            return refused(request, asked, self.rate, desk.judgements(asked))
        self._refuse_other(asked, records)
        each, p = p_values(self.scores, desk.wholes(asked))
        return decide(
            request,
            asked,
            p=p,
            p_values=dict(zip(desk.screens, each.tolist(), strict=True)),
            rate=self.rate,
            judgements=desk.judgements(asked),
        )

    def p(self, trained: Trained, records: Records, asked: Asked) -> tuple[Mapping[str, float], float]:
        """Each screen's p-value and the combined one, without judgements: for many requests."""
        self._refuse_other(asked, records)
        desk = self.desk(trained, records)
        each, p = p_values(self.scores, desk.wholes(asked))
        return dict(zip(desk.screens, each.tolist(), strict=True)), p

    def desk(self, trained: Trained, records: Records) -> Desk:
        """The screens that have looked at the model; they look once, and anew if read from JSON."""
        if trained.digest() != self.model:  # of the same object too: its module may have been changed in place
            raise Misuse("the screens were calibrated on another model; calibrate them on this one")
        for desk in self._desks:
            if desk.scene.trained is trained and desk.scene.records is records:
                return desk
        self._desks[:] = [Desk(self.screens, trained, records, seed=self.looked)]
        return self._desks[0]

    def _refuse_other(self, asked: Asked, records: Records) -> None:
        kind = "replace" if asked.kind == "replace" else "remove"
        if (kind, len(asked.ids)) != (self.kind, self.size):
            raise Misuse(
                f"the screens were calibrated on requests to {self.kind} {self.size} rows, this one is to {kind} "
                f"{len(asked.ids)}; calibrate for its size"
            )
        if self.by == "classes" and Counter(self.like) != mix_of(records, asked):
            raise Misuse("the screens were calibrated on another mix of classes than this request's; calibrate for it")

    def again(
        self,
        trained: Trained,
        records: Records,
        *,
        size: int | None = None,
        alter: Alter | None = None,
        rng: Generator,
    ) -> Screening:
        """The same screens calibrated anew: on another model, with other coins, for another size, or another `alter`.

        Raises:
            Misuse: if it was calibrated with an `alter` that is not known any more, as after `from_json`; give it.
        """
        alter = self.alter if alter is None else alter
        if self.altered and alter is None:
            raise Misuse("benign replacements were made by an alter that JSON does not hold; give it: again(alter=...)")
        like = Counter(self.like) if self.by == "classes" else None
        return calibrate(
            self.screens,
            trained,
            records,
            size=self.size if size is None else size,
            kind=self.kind,
            rate=self.rate,
            draws=len(self.scores),
            by=self.by,
            like=like,
            alter=alter,
            rng=rng,
        )

    def to_json(self) -> dict[str, Any]:
        """The calibration as plain JSON values: no rows, no ids."""
        return {
            "format": FORMAT,
            "screens": [{"screen": name, "settings": settings(one)} for name, one in named(self.screens).items()],
            **{name: getattr(self, name) for name in ("rate", "size", "kind", "by", "seed", "looked", "model")},
            "like": {str(label): many for label, many in self.like.items()},
            "altered": self.altered,
            "scores": self.scores.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], screens: Sequence[Screen]) -> Screening:
        """What `to_json` gave, with the same screens, which are given and not read: Misuse if they differ."""
        if data.get("format") != FORMAT:
            raise Misuse(f"this is no calibration of format {FORMAT}; make one with calibrate")
        mine = [{"screen": name, "settings": settings(one)} for name, one in named(screens).items()]
        if mine != data.get("screens"):
            raise Misuse(f"the calibration is of other screens: {data.get('screens')}; give those, or calibrate anew")
        try:
            scores = torch.tensor(data["scores"], dtype=torch.float64).reshape(-1, len(mine))
            like = {int(label): int(many) for label, many in data["like"].items()}
            altered = bool(data.get("altered", False))
            plain: dict[str, Any] = {n: data[n] for n in ("rate", "size", "kind", "by", "seed", "looked", "model")}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise Misuse(f"this is no calibration as to_json writes it ({error!r})") from None
        return cls(screens=tuple(screens), scores=scores, like=like, altered=altered, **plain)


def calibrate(
    screens: Sequence[Screen],
    trained: Trained,
    records: Records,
    *,
    size: int,
    rng: Generator,
    kind: Kind = "remove",
    rate: float = 0.05,
    draws: int = 200,
    by: By = "rows",
    like: Counter[int] | None = None,
    alter: Alter | None = None,
    desk: Desk | None = None,
) -> Screening:
    """Draw benign requests, measure them, and remember what they score.

    Args:
        screens: at least one.
        trained: the model.
        records: all its records.
        size: rows of a request.
        rng: its seed names all coins, and is kept; give attacks another.
        kind: of the requests.
        rate: false-alarm rate.
        draws: benign requests.
        by: how they are drawn; see `benign.Benign`.
        like: rows of each class, with ``classes``.
        alter: what benign rows are replaced by.
        desk: the screens if they have looked at this model already.

    Raises:
        Misuse: if the draws are too few for the rate, for a size that the model has not rows enough for, or no screens.

    Cost: one look of every screen at the model (none with `desk`), and look-ups. With a `GradientInfluence` that goes
    `through` a method, `draws` calls of it.
    """
    if draws < least_draws(rate):
        raise Misuse(f"a false-alarm rate of {rate:g} needs {least_draws(rate)} draws at least, got {draws}; draw more")
    desk = Desk(screens, trained, records, seed=rng.initial_seed()) if desk is None else desk
    benign = Benign(desk.scene, size=size, kind=kind, by=by, like=like, alter=alter)
    scores = torch.stack([desk.wholes(benign(child(rng, "benign", number))) for number in range(draws)])
    return Screening(
        screens=tuple(screens),
        rate=rate,
        size=size,
        kind=kind,
        by=by,
        like=dict(like or {}),
        alter=alter,
        altered=alter is not None,
        seed=rng.initial_seed(),
        looked=desk.seed,
        model=desk.model,
        scores=scores,
        _desks=[desk],
    )


def defend(
    trained: Trained,
    records: Records,
    request: Request,
    *,
    rng: Generator,
    screens: Sequence[Screen] | None = None,
    rate: float = 0.05,
    draws: int = 200,
    by: By = "rows",
    alter: Alter | None = None,
    desk: Desk | None = None,
) -> Decision:
    """Calibrate for this request's kind and size, screen it, and say what to do. See `calibrate` and `Decision`.

    An empty request, or one for records that are gone, is carried out as it is, unjudged. One that asks for all that
    the model is trained on has no other to be compared with, and p 1.

    Raises:
        UnknownRecord: for an id, owner or class that the records never held.
    """
    asked = understand(trained, records, request)
    if not len(asked):
        return nothing_asked(request, rate)
    given = default_screens() if screens is None else screens
    desk = Desk(given, trained, records, seed=rng.initial_seed()) if desk is None else desk
    if not asked.ids:
        return refused(request, asked, rate, desk.judgements(asked))
    like = mix_of(records, asked) if by == "classes" else None
    kind: Kind = "replace" if asked.kind == "replace" else "remove"
    screening = calibrate(
        given,
        trained,
        records,
        size=len(asked.ids),
        kind=kind,
        rate=rate,
        draws=draws,
        by=by,
        like=like,
        alter=alter,
        rng=rng,
        desk=desk,
    )
    return screening(trained, records, request, rng=rng)


def mix_of(records: Records, asked: Asked) -> Counter[int]:
    """How many trained rows of each class a request is about."""
    return Counter(cast("list[int]", records.y[asked.places].tolist()))
