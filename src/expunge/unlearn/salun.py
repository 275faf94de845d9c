"""Changing only the weights that the rows to forget pull at most, by any method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from expunge.calculus import Objective
from expunge.core import coins
from expunge.core.claim import Claim
from expunge.core.errors import Misuse, Unsupported
from expunge.core.mask import Held, Mask
from expunge.core.trained import Trained
from expunge.learn.loop import prepare, row_losses
from expunge.learn.predict import evaluating
from expunge.unlearn.distil import without_classes
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.random_labels import RandomLabels
from expunge.unlearn.steps import check_pace


@dataclass(frozen=True, kw_only=True)
class SaliencyMasked(Method):
    """Another method, allowed to change only the entries that the forget rows pull at most.

    Those are the `share` of all entries that may move (of all parameters together, pruned weights left out) with the
    largest absolute gradient of the forget rows' summed loss at the trained parameters, in evaluation mode and without
    weight decay: exactly ``max(1, round(share * entries))``, ties to the first. All others keep their value bit for
    bit, whatever weight decay and momentum do, and whether or not the method knows of masks. A method that builds a
    model anew (`RetrainBriefly`) does so whole; of that the salient entries are taken.
    Cost: the method's, one pass over the forget rows, a sort of all entries and a copy of the parameters.

    Attributes:
        then: the method; one that claims nothing, for parts of two models are neither.
        share: of the entries that it may change.
    """

    source: ClassVar[str] = "Fan et al., 2024 (saliency mask)"
    not_guaranteed: ClassVar[str] = "that what the forget rows taught lies in the entries that they pull now"
    then: Method = field(default_factory=FineTune)
    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.then, Method) or self.then.claim is not Claim.NONE:
            raise Misuse(f"then must be a method that claims nothing, such as FineTune(), got {self.then!r}")
        _check_share(self.share)

    @property
    def name(self) -> str:
        """``saliency-masked-`` and the method's."""
        return f"saliency-masked-{self.then.name}"

    @property
    def learns_new(self) -> bool:
        """As `then`."""
        return self.then.learns_new

    def supports(self, trained: Trained) -> Unsupported | None:
        """What the method supports, if it is one model."""
        return super().supports(trained) or self.then.supports(trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        module = task.trained.module
        mask = saliency_mask(task, self.share, rng)
        held = Held(mask, module)
        done = self.then._apply(replace(task, moves=mask if task.moves is None else mask & task.moves), rng=rng)
        if done.trained.module is not module:
            module.load_state_dict(done.trained.module.state_dict())
        held.put_back()
        # A log of the method's would tell of steps that were undone in part.
        return Done(trained=replace(done.trained, module=module, log=None), events=done.events)


@dataclass(frozen=True, kw_only=True)
class SalUn(Method):
    """`RandomLabels`, changing only the entries that the forget rows pull at most: see `SaliencyMasked`.

    Objective of a step: ``L(retain batch) + weight * L(forget batch, wrong labels)``, means over batches, over the
    salient entries alone. The authors weigh both alike (``weight=1``); their code takes the forget rows' batches first
    and the retained rows' after them. The default is `RandomLabels`', for its reason: on 20,000 MNIST rows (MLP), class
    3 removed, ``weight=1`` took the distance to retraining on other test rows from 0.02 to 0.11.
    Cost: `epochs` passes over the retained rows, and as many forget rows; one more pass over the forget rows and a sort
    of all parameters for the mask.
    """

    source: ClassVar[str] = "Fan et al., 2024"
    not_guaranteed: ClassVar[str] = "that the result resembles retraining, which is not wrong about rows it never saw"
    epochs: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    weight: float = 0.02
    share: float = 0.5
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)
        _check_share(self.share)
        if not self.weight >= 0:
            raise Misuse(f"weight must be >= 0, got {self.weight}")

    @property
    def name(self) -> str:
        """``salun``."""
        return "salun"

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs at least two classes."""
        return without_classes(self.name, trained) or super().supports(trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        wrong = RandomLabels(
            epochs=self.epochs, lr=self.lr, momentum=self.momentum, weight=self.weight, batch_size=self.batch_size
        )
        return SaliencyMasked(then=wrong, share=self.share)._apply(task, rng=rng)


def saliency_mask(task: Task, share: float, rng: Generator) -> Mask:
    """Where the summed loss of the task's forget rows has its largest absolute gradients; see `SaliencyMasked`.

    Rows are summed in an order of their own, so that the order they are given in cannot tip an entry over the edge.
    """
    module, recipe = task.trained.module, task.trained.recipe
    order = torch.from_numpy(coins.order(task.forget.keys, rng.initial_seed(), "saliency")).split(recipe.batch_size)
    with evaluating(module):
        objective = Objective(module, row_losses(recipe))
        gradient = torch.zeros_like(objective.vector())
        for positions, (x, y) in zip(order, task.forget.batches(order), strict=True):
            task.tally.saw(task.forget, positions, x, y)
            gradient += objective.gradient(prepare(x, gradient.dtype), y)
    return largest(objective.split(gradient.abs()), share, among=task.moves)


def largest(scores: Mapping[str, Tensor], share: float, *, among: Mask | None = None) -> Mask:
    """The mask of the `share` of all entries with the largest scores (>= 0), exactly ``max(1, round(share * n))``.

    Ties go to the first. With `among`, only its n entries that may move are counted and chosen from.
    """
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    if among is not None:
        moves = [among.moves.get(name, torch.ones_like(score, dtype=torch.bool)) for name, score in scores.items()]
        flat = flat.masked_fill(~torch.cat([one.reshape(-1) for one in moves]).to(flat.device), -1)
    count = int((flat >= 0).sum())
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(descending=True, stable=True)[: max(1, round(share * count))]] = True
    pieces = chosen.split([score.numel() for score in scores.values()])
    return Mask({name: piece.view(score.shape) for (name, score), piece in zip(scores.items(), pieces, strict=True)})


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise Misuse(f"share must be > 0 and <= 1, got {share}")
