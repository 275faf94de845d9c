"""Screening as a stage of the journey of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Generator

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Held, Job, Passed, Screen
from expunge.core.request import refuse_contradictions
from expunge.screen.benign import By
from expunge.screen.calibrate import defend
from expunge.screen.conformal import least_draws
from expunge.screen.desk import Desk, default_screens


@dataclass(frozen=True, kw_only=True, eq=False)
class ScreenStage:
    """Screens every request of a job, and holds it if one is not simply to be carried out.

    What follows from `Held` is the workspace's policy: a person, or exact retraining; never a refusal of a valid
    erasure. The evidence holds scores, p-values and reasons, and names records by id; no contents. What it has under
    ``told`` names no record either, and is what a workspace's log keeps.

    Attributes:
        screens: the screens.
        rate: false-alarm rate of a request, over benign requests of its size.
        draws: benign requests that each is compared with.
        by: how they are drawn: see `benign.Benign`.
        seed: of the calibration. None: the stage's own coins, another calibration for each request, which looks at
            the model anew; with a seed, one look serves all requests about a model.

    Cost: see `calibrate`; under a minute for 60,000 rows and 200 draws.
    """

    name: ClassVar[str] = "screen"
    screens: tuple[Screen, ...] = field(default_factory=default_screens)
    rate: float = 0.05
    draws: int = 200
    by: By = "rows"
    seed: int | None = None
    _desks: list[Desk] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.draws < least_draws(self.rate):
            raise Misuse(
                f"a false-alarm rate of {self.rate:g} needs {least_draws(self.rate)} draws at least, got {self.draws}"
            )

    def __call__(self, job: Job, *, rng: Generator) -> Passed | Held:
        """Judge each request by itself; several that act together only as one are not seen.

        Raises:
            Misuse: before any work, if requests of the job contradict each other; see `refuse_contradictions`.
        """
        by_place = {f"request {place}": one for place, one in enumerate(job.requests, start=1)}
        refuse_contradictions(by_place, job.records, ids=job.before.ids, gone=job.before.gone)
        desk = self._desk(job, child(rng, "screen").initial_seed() if self.seed is None else self.seed)
        coins = child(rng, "screen") if self.seed is None else child(rng).manual_seed(self.seed)
        decisions = [
            defend(
                job.before,
                job.records,
                request,
                rng=coins,
                screens=self.screens,
                rate=self.rate,
                draws=self.draws,
                by=self.by,
                desk=desk,
            )
            for request in job.requests
        ]
        held = [one for one in decisions if one.action != "carry out"]
        told = "; ".join(one.told for one in held or decisions)
        evidence = {"decisions": [one.to_json() for one in decisions], "told": told}
        if not held:
            return Passed(why=f"{len(decisions)} requests like benign ones of their sizes", evidence=evidence)
        return Held(why=told, evidence=evidence)

    def _desk(self, job: Job, seed: int) -> Desk:
        for desk in self._desks:
            same = (desk.model, desk.seed, desk.scene.trained.ids) == (job.before.digest(), seed, job.before.ids)
            if same and desk.scene.records is job.records:
                return desk
        self._desks[:] = [Desk(self.screens, job.before, job.records, seed=seed)]
        return self._desks[0]
