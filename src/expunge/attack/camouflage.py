r"""Poison that sleeps under camouflage, and a request that removes the camouflage.

The attacker brings two groups of rows into training, all with their right labels and changed by at most eps: poison,
whose gradients point to where the target is answered as the attacker wants, and camouflage, whose gradients point back.
Together they do nothing much. Removing the camouflage, a valid request for the attacker's own rows, leaves the poison,
also under exact retraining.

Both groups are made by gradient matching: rows :math:`x_i + \delta_i` that lower
:math:`1 - \cos(\nabla L, \sum_i \nabla\ell(x_i + \delta_i))`, L the target's loss towards the wanted class for poison,
and towards its true class, on the model that the poison has been trained into, for camouflage.
Source: after Di et al. (Hidden Poison) and Geiping et al. (2021, gradient matching), from notes on both; own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from expunge.attack.aim import check_target
from expunge.attack.bounds import Box, movable
from expunge.attack.curvature import input_gradient
from expunge.calculus import Objective
from expunge.core.coins import child, seed_of
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Method, Target
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import prepare, row_losses
from expunge.learn.training import train

_PICK = 2000
"""Rows at most that base rows are picked among."""


@dataclass(frozen=True, kw_only=True)
class Camouflage:
    """Brings poison and camouflage into training, and later has the camouflage removed.

    Works through models that the attacker trains itself on `records`: what it knows is the data set and `surrogate`,
    not the victim. Base rows are those of the wanted (for camouflage: the true) class whose own gradients go furthest
    along the one that is wanted, so that they pull that way before any change. Each base row is used at most once.

    Cost: ``2 * surrogates`` trainings for a target, and ``restarts * steps`` gradients and mixed second derivatives of
    the brought rows for each group and surrogate.

    Not guaranteed: that it sleeps before or wakes after: a judge measures it by retraining.

    Attributes:
        surrogate: how the attacker trains its own models.
        poison: rows brought to turn the target.
        camouflage: rows brought to turn it back, and removed later.
        eps: the most that any entry changes, as the model reads it (pixels in 0 to 1).
        steps: of Adam on the signs of the gradients.
        restarts: of which the best match is kept; the first starts at the rows themselves.
        surrogates: models, of different coins, that are matched on average.
        owner: in whose name the rows are brought.
    """

    surrogate: Recipe = field(default_factory=lambda: Recipe(model="softmax", weight_decay=1e-3))
    poison: int = 20
    camouflage: int = 20
    eps: float = 16 / 255
    steps: int = 100
    restarts: int = 2
    surrogates: int = 1
    owner: str = "attacker"

    def __post_init__(self) -> None:
        for name in ("poison", "camouflage", "steps", "restarts", "surrogates"):
            if getattr(self, name) < 1:
                raise Misuse(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.eps > 0:
            raise Misuse(f"eps must be > 0, got {self.eps}")
        if self.surrogate.sharding is not None or self.surrogate.loss != "cross_entropy":
            raise Misuse("the surrogate must be one classifier without shards")

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> Records:
        """The rows to bring: ids ``<owner>/poison-000`` and so on, then ``<owner>/camouflage-000`` and so on.

        An untargeted attack wants the class that the first surrogate holds for second best.

        Raises:
            Misuse: for a target that no model of these records can be asked about, more than one target row, too few
                rows of a class to start from, or names that are taken.
            Unsupported: for tokens.
        """
        _check(self, records, target)
        clean = self._trained(records, child(rng, "clean"))
        wanted = _wanted(clean[0], target)
        poison = self._group("poison", records, clean, target, wanted, rng)
        poisoned = self._trained(records.plus(poison), child(rng, "poisoned"))
        return poison.plus(self._group("camouflage", records, poisoned, target, target.y, rng))

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """One request: the removal of the camouflage.

        Raises:
            Misuse: if the model stands on no camouflage of this owner: `contribute` comes before training.
        """
        check_target(target, records)
        prefix = f"{self.owner}/camouflage-"
        mine = [i for i, o in zip(records.ids, records.owners, strict=True) if o == self.owner and i.startswith(prefix)]
        mine = [name for name in mine if name in trained.ids]
        if not mine:
            raise Misuse(
                "the model stands on no camouflage; train it on records.plus(attack.contribute(...)) first, then ask"
            )
        return (Request.remove(mine),)

    def _trained(self, records: Records, rng: Generator) -> list[Objective]:
        made = []
        for number in range(self.surrogates):
            recipe = replace(self.surrogate, seed=seed_of(rng.initial_seed(), number) % 2**31)
            made.append(Objective(train(recipe, records).module, row_losses(recipe)))
        return made

    def _group(
        self,
        kind: str,
        records: Records,
        models: Sequence[Objective],
        target: Target,
        label: Tensor,
        rng: Generator,
    ) -> Records:
        """Rows of class `label` that pull the models' answer on the target towards it."""
        count = self.poison if kind == "poison" else self.camouflage
        wanted = [objective.gradient(_read(target.x, objective), label) for objective in models]
        rows = _nearest(records.of_class(int(label[0])), count, models, wanted, child(rng, kind, "rows"))
        box = Box.of(rows, records, self.eps, models[0].vector().dtype)
        tried = [
            self._matched(rows, box, models, wanted, restart, child(rng, kind, "restart", restart))
            for restart in range(self.restarts)
        ]
        kept = min(tried, key=lambda one: one[1])[0]
        names = [f"{self.owner}/{kind}-{number:03d}" for number in range(count)]
        return Records(box.stored(kept), rows.y, names, [self.owner] * count, classes=records.classes)

    def _matched(
        self,
        rows: Records,
        box: Box,
        models: Sequence[Objective],
        wanted: Sequence[Tensor],
        restart: int,
        rng: Generator,
    ) -> tuple[Tensor, float]:
        """Rows moved within the box, and how badly they match."""
        start = box.start
        noise = box.eps * (2 * torch.rand(start.shape, generator=rng, dtype=start.dtype) - 1) if restart else 0.0
        moved = box.clipped(start + noise).requires_grad_()
        optimiser = torch.optim.Adam([moved], lr=box.eps / 10)
        for step in range(self.steps):
            if step and step in (self.steps * 5 // 8, self.steps * 7 // 8):
                optimiser.param_groups[0]["lr"] /= 10
            moved.grad = mismatch_gradient(moved.detach(), rows.y, models, wanted).sign()
            optimiser.step()
            with torch.no_grad():
                moved.copy_(box.clipped(moved))
        settled = box.rounded(moved.detach())
        return settled, mismatch(settled, rows.y, models, wanted)


def mismatch(x: Tensor, y: Tensor, models: Sequence[Objective], wanted: Sequence[Tensor]) -> float:
    """``1 - cos`` of the rows' summed gradient and the wanted one, a mean over models: 0 is a match, 2 the opposite.

    `descend.Matching` is the same for one model; the two round otherwise, and a step by the gradient's sign would tell.
    """
    found = [
        1 - torch.nn.functional.cosine_similarity(objective.gradient(x, y), goal, dim=0)
        for objective, goal in zip(models, wanted, strict=True)
    ]
    return float(torch.stack(found).mean())


def mismatch_gradient(
    x: Tensor, y: Tensor, models: Sequence[Objective], wanted: Sequence[Float[Tensor, " p"]]
) -> Tensor:
    """Of `mismatch` by x: ``-grad_x <G(x), q>`` with q the cosine's gradient by G, reverse over forward.

    Cost: a model, one gradient and one mixed second derivative of the rows.
    """
    total = torch.zeros_like(x)
    for objective, goal in zip(models, wanted, strict=True):
        own = objective.gradient(x, y)
        length, unit = own.norm().clamp_min(1e-30), goal / goal.norm().clamp_min(1e-30)
        q = (unit - torch.dot(unit, own) / length**2 * own) / length
        total -= input_gradient(objective, x, y, q)
    return total / len(models)


def _nearest(
    base: Records, count: int, models: Sequence[Objective], wanted: Sequence[Tensor], rng: Generator
) -> Records:
    """The `count` rows whose gradients go furthest along the wanted ones."""
    if len(base) < count:
        raise Misuse(f"there are {len(base)} rows of the class to start from, and {count} are to be brought")
    base = base.select(torch.randperm(len(base), generator=rng)[:_PICK])
    found = torch.zeros(len(base), dtype=torch.float64)
    for objective, goal in zip(models, wanted, strict=True):
        places = torch.arange(len(base)).split(256)
        parts = [objective.scores(_read(x, objective), y, goal) for x, y in base.batches(places)]
        found += torch.cat(parts).double()
    return base.select(found.argsort(descending=True, stable=True)[:count])


def _read(x: Tensor, objective: Objective) -> Tensor:
    return prepare(x, objective.vector().dtype)


def _wanted(objective: Objective, target: Target) -> Tensor:
    if target.wanted is not None:
        return target.wanted
    out = objective.outputs(objective.vector(), _read(target.x, objective))
    return out.scatter(1, target.y[:, None], -torch.inf).argmax(1)


def _check(attack: Camouflage, records: Records, target: Target) -> None:
    check_target(target, records)
    if len(target.x) != 1:
        raise Misuse(f"camouflage is made for one target row, got {len(target.x)}; contribute for each by itself")
    x = records.select([0]).x
    if not movable(x):
        raise Unsupported("tokens cannot be changed by a little; use requests that select rows")
    if attack.owner in records.owners:
        raise Misuse(f'owner "{attack.owner}" is in the records already; name another')
