"""What requested rows would do to probes once they are gone: gradient influence, row by row and all together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from expunge.calculus import FisherDual, Objective, influence_scores, row_gradients
from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Method
from expunge.core.records import Records
from expunge.learn.ensemble import ShardEnsemble
from expunge.learn.models import head_of
from expunge.screen.asked import Asked
from expunge.screen.bound import probe_bounds
from expunge.screen.probes import choose, falls, margins
from expunge.screen.scene import Scene, seen
from expunge.screen.sieve import Measure, Reader, Sieve

_MOST = 1 << 28
"""Numbers that the probes' gradients may take: past that the last layer's stand for all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientInfluence(Sieve):
    """How far the margins of probes are predicted to fall when requested rows go, and whether they fall together.

    The abstract of the malicious unlearning attacks (Qian et al., KDD 2023) proposes to identify effective malicious
    requests "based on their gradient influence on the unlearned models". Its formulas, thresholds and tables are not
    known to us; this is our form of that sentence.

    Removing row i moves the parameters by ``P g_i / n`` to first order, g_i its loss gradient and P the inverse of a
    damped empirical Fisher matrix of a sample of rows. A row's score is the largest predicted fall of a probe's
    margin (of numbers: rise of its squared error). A selection attack need not hold one row that stands out, so that
    the request's score is joint, on the probe that fares worst:

    - ``ranks``: every row is ranked among all trained rows by its effect on the probe, and the request scores the
      mean of ``-log(1 - rank)`` (Savage's scores: 1 on average for random rows). It sees rows that were picked because
      they act alike on one probe, and no single hard row dominates it.
    - ``fall``: the summed fall. It measures harm, but in a model that has fitted its rows a few hard ones decide it.

    By default influence is linear, at the deployed model: a calibration of 200 requests is then look-ups. With
    `through`, requests are tentatively carried out by that method, gradients are taken at the unlearned model, and
    the request's score is the largest fall that was measured: every request and every draw of a calibration costs one
    call of the method.

    Attributes:
        probes: rows that must not be harmed, the best of them those that matter to somebody; or how many trained rows
            to draw, half of them at random, half those with the smallest margins of a random few.
        by: what the request is scored by.
        damping: of the Fisher matrix, in its mean eigenvalues; None: P is the identity, as in a first-order step.
        sample: rows of which that matrix is made.
        through: a tentative unlearning method.

    Not guaranteed: influence is a first-order prediction, and an attack on a target that no probe resembles is seen
    only as far as it moves the others.
    """

    probes: int | Records = 50
    by: Literal["ranks", "fall"] = "ranks"
    damping: float | None = 1.0
    sample: int = 256
    through: Method | None = None

    def __post_init__(self) -> None:
        if (self.probes if isinstance(self.probes, int) else len(self.probes)) < 1:
            raise Misuse(f"give at least one probe, got {self.probes}")
        if self.by not in ("ranks", "fall"):
            raise Misuse(f'by must be "ranks" or "fall", got "{self.by}"')
        if self.damping is not None and not self.damping > 0:
            raise Misuse(f"damping must be > 0, or None for none, got {self.damping}")
        if self.sample < 2:
            raise Misuse(f"the sample must hold at least 2 rows, got {self.sample}")

    def prepare(self, scene: Scene, *, rng: Generator) -> Reader:
        """Draw the probes, and score all rows against them."""
        return _Reader(self, scene, child(rng, "influence"))


class _Reader:
    """The screen, once it has looked at a model."""

    def __init__(self, screen: GradientInfluence, scene: Scene, rng: Generator) -> None:
        self.screen, self.scene, self.rng = screen, scene, rng
        self.probes = choose(scene, screen.probes, rng)
        names = None
        if scene.objective.size * len(self.probes) > _MOST:
            heads = _heads(scene)
            names = [one for one in scene.objective.names if one.startswith(heads)]
        self.names = names
        self.margins = margins(scene, scene.module, self.probes)
        self.classed = scene.trained.recipe.loss == "cross_entropy"
        if screen.through is None:
            self.linear = _Linear(self, scene.module)
            self.effects = self.linear.effects(scene.rows)
            self._forget_themselves()
            self.ordered = self.effects.T.contiguous().sort(1).values

    def _forget_themselves(self) -> None:
        """A probe that is requested itself is no witness: its own going is what was asked."""
        held = {record: row for row, record in enumerate(self.scene.rows.ids)}
        for column, record in enumerate(self.probes.ids):
            if record in held:
                self.effects[held[record], column] = 0

    def __call__(self, asked: Asked) -> Measure:
        """Measure a request."""
        if self.screen.through is None:
            effects = self._look_up(asked)
            joint, move = effects.sum(0), None
        else:
            effects, joint, move = self._tentative(asked, self.screen.through)
        if self.screen.through is None and self.screen.by == "ranks":
            whole = self._by_ranks(effects)
        else:
            whole = float(joint.max())
        said: list[str] = []

        def reason(row: int) -> str:
            probe = int(effects[row].argmax())
            said[:] = said or [self._said(asked, joint, move)]
            return f'lowers probe "{self.probes.ids[probe]}" by {float(effects[row, probe]):.3g}; {said[0]}'

        limit = self.margins if self.classed else torch.full_like(self.margins, torch.inf)
        flagged = (effects >= limit).any(1)
        return Measure(rows=effects.max(1).values.double(), whole=whole, flagged=flagged, reason=reason)

    def _by_ranks(self, effects: Tensor) -> float:
        """The mean of Savage's scores over the rows, on the probe where it is largest."""
        below = torch.searchsorted(self.ordered, effects.T.contiguous()).double()
        above = (len(self.scene.rows) - below).clamp_min(1) / (len(self.scene.rows) + 1)
        return float((-above.log()).mean(1).max())

    def _said(self, asked: Asked, joint: Tensor, move: Tensor | None) -> str:
        worst = f'the request as a whole "{self.probes.ids[int(joint.argmax())]}" by {float(joint.max()):.3g}'
        if not self.classed:
            return worst
        what = "the tentative model"
        if move is None:
            move, what = self._gradient(asked) / len(self.scene.rows), f"a first-order step of 1/{len(self.scene.rows)}"
        return f"{worst}; {what} {probe_bounds(self.scene, self.probes, move)}"

    def _gradient(self, asked: Asked) -> Tensor:
        """The summed gradient that leaves."""
        scene = self.scene
        total = torch.zeros_like(scene.objective.vector())
        parts = [(scene.records.select(asked.places), 1.0), (asked.new, -1.0), (asked.strangers, 1.0)]
        for records, sign in parts:
            for x, y in scene.batches(records) if records is not None and len(records) else ():
                total += sign * scene.objective.gradient(x, y)
        return total

    def _look_up(self, asked: Asked) -> Tensor:
        found = self.effects[self.scene.index(asked)]
        if asked.new is not None:
            found = found - self.linear.effects(asked.new)
        if asked.strangers is not None:
            found = torch.cat([found, self.linear.effects(asked.strangers)])
        return found

    def _tentative(self, asked: Asked, through: Method) -> tuple[Tensor, Tensor, Tensor | None]:
        """Effects by the gradients at the unlearned model, the falls that were measured, and the parameters' move."""
        scene = self.scene
        request = asked.request()
        if not request.ids:
            zero = torch.zeros(len(asked), len(self.probes))
            return zero, zero[0], torch.zeros_like(scene.objective.vector())
        done = through(scene.trained, scene.records, request, rng=child(self.rng, "through"))
        after = seen(done.trained, scene.records)
        linear = _Linear(self, after)
        effects = linear.effects(scene.records.select(asked.places))
        if asked.new is not None:
            effects = effects - linear.effects(asked.new)
        if asked.strangers is not None:
            effects = torch.cat([effects, linear.effects(asked.strangers)])
        joint = self.margins - margins(scene, after, self.probes)
        held = set(asked.ids)
        joint[[column for column, one in enumerate(self.probes.ids) if one in held]] = 0
        there = Objective(after, scene.objective.row_losses).vector()
        here = scene.objective.vector()
        move = there - here if len(there) == len(here) else None  # a shard lost its last row
        return effects, joint, move


def _heads(scene: Scene) -> tuple[str, ...]:
    """How the names of the last layer's parameters begin: of every shard's, if there are shards."""
    if not isinstance(scene.module, ShardEnsemble):
        return (f"{head_of(scene.module)[0]}.",)
    return tuple(f"parts.{number}.{head_of(part)[0]}." for number, part in enumerate(scene.module.parts))


class _Linear:
    """First-order effects of rows on the probes, at one model."""

    def __init__(self, reader: _Reader, module: nn.Module) -> None:
        self.scene = reader.scene
        self.objective = Objective(module, self.scene.objective.row_losses, names=reader.names)
        x, y = self._at_once(reader.probes)
        fall = Objective(module, falls(self.scene.trained.recipe.loss), names=reader.names).gradients(x, y)
        damping = reader.screen.damping
        if damping is not None:
            rows = torch.randperm(len(self.scene.rows), generator=child(reader.rng, "sample"))[: reader.screen.sample]
            sample = self._at_once(self.scene.rows.select(rows.sort().values))
            fisher = FisherDual(row_gradients(self.objective, *sample), damping)
            fall = torch.stack([fisher.solve(one) for one in fall])
        self.directions = fall.T / len(self.scene.rows)

    def _at_once(self, records: Records) -> tuple[Tensor, Tensor]:
        return next(self.scene.batches(records, len(records)))

    def effects(self, records: Records) -> Tensor:
        """(n, probes) how far each row's going lowers each probe."""
        return influence_scores(self.objective, self.scene.batches(records), self.directions).cpu()
