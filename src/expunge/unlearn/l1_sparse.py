"""Fine-tuning that pulls weights towards zero, so that what only the forgotten rows hold up is let go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from expunge.core.errors import Misuse
from expunge.core.protocols import Need
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.steps import Steps, check_pace

Schedule = Literal["decay", "constant", "grow"]


@dataclass(frozen=True, kw_only=True)
class L1Sparse(Method):
    """Go on training on the retained rows, with a price on the size of the weights.

    Objective at epoch t of E: ``L(retain) + gamma_t * ||theta||_1``, the recipe's mean loss and the sum of absolute
    values. With ``T = E - plain_epochs``: ``decay`` has ``gamma_t = gamma * (1 - t / T)`` (the paper's), ``grow`` its
    mirror image ``gamma * (t + 1) / T``, ``constant`` gamma; the last `plain_epochs` have none. With `plain_epochs` =
    `epochs` it is fine-tuning; the public code then has a constant price.

    `gamma` alone says nothing: a weight that no gradient holds moves towards zero by ``pull(steps an epoch)``. That has
    to be of the order of the weights that are to go. `proximal` steps give exact zeros: after each step of the
    optimiser, ``theta <- sign(theta) * max(|theta| - lr * gamma_t, 0)``. Momentum multiplies the loss's gradient by
    ``1 / (1 - momentum)`` and not the threshold, so that with a constant gamma they rest where
    ``L + (1 - momentum) * gamma * ||theta||_1`` does. `subgradient` steps, the paper's, put the price through the
    momentum: the same gamma pulls ``1 / (1 - momentum)`` times as far, and leaves small numbers instead of zeros.
    The zeros of a result are counted by ``expunge.learn.pruning.mask_of_zeros(module).sparsity``.

    The defaults have the pace of the public code, and the gamma of 5e-4 of a later port multiplied by
    ``1 / (1 - momentum)``, as proximal steps ask; the paper's own steps are ``mode="subgradient", which="all"``. On
    MNIST with an MLP and batches of 128 (pull 0.12) they removed class 3: forget accuracy 0.00, test 0.976, where
    retraining has 0.00 and 0.975 and the same fine-tuning without a price 0.63 and 0.981 (one seed). With few rows the
    pull is small, and they are fine-tuning and little more.
    Cost: `epochs` passes over the retained rows, and one over the parameters a step.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "Jia et al., 2023"
    not_guaranteed: ClassVar[str] = "any forgetting: weights that the retained rows hold up keep what else is in them"
    epochs: int = 10
    lr: float = 0.01
    momentum: float = 0.9
    gamma: float = 5e-3
    schedule: Schedule = "decay"
    plain_epochs: int = 0
    per: Literal["epoch", "step"] = "epoch"
    mode: Literal["proximal", "subgradient"] = "proximal"
    which: Literal["weights", "all"] = "weights"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_pace(self)
        plain = self.plain_epochs
        checks = [
            (0 <= self.gamma < math.inf, f"gamma must be >= 0, got {self.gamma}"),
            (
                isinstance(plain, int) and 0 <= plain <= self.epochs,
                f"plain_epochs must be an integer from 0 to epochs ({self.epochs}), got {plain}",
            ),
        ]
        choices = {
            "schedule": ("decay", "constant", "grow"),
            "per": ("epoch", "step"),
            "mode": ("proximal", "subgradient"),
            "which": ("weights", "all"),
        }
        for name, known in choices.items():
            got = getattr(self, name)
            checks.append((got in known, f'{name} must be one of {", ".join(known)}, got "{got}"'))
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    @property
    def name(self) -> str:
        """As the field writes it."""
        return "l1-sparse"

    def gammas(self, steps: int) -> list[float]:
        """gamma_t of each step, with so many steps an epoch."""
        size = 1 if self.per == "step" else steps
        units = (self.epochs - self.plain_epochs) * steps // size
        priced = [self.gamma * self._share(step // size, units) for step in range(units * size)]
        return priced + [0.0] * (self.plain_epochs * steps)

    def _share(self, unit: int, units: int) -> float:
        if self.schedule == "constant":
            return 1.0
        return 1 - unit / units if self.schedule == "decay" else (unit + 1) / units

    def pull(self, steps: int) -> float:
        """How far a weight that no gradient holds moves towards zero in all, with so many steps an epoch.

        ``lr * sum of gamma_t over steps`` if proximal; by subgradients up to that over ``1 - momentum`` (what momentum
        has not yet delivered after the last step is missing).
        """
        total = self.lr * math.fsum(self.gammas(steps))
        return total if self.mode == "proximal" else total / (1 - self.momentum)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        steps = Steps(task, self)
        gammas = self.gammas(math.ceil(len(task.retain) / steps.batch_size))
        priced = penalised(steps.module, self.which)
        proximal, thresholds = self.mode == "proximal", iter(gammas)

        def losses() -> Iterator[Tensor]:
            batches = steps.batches(task.retain, rng, "retain", self.epochs)
            for gamma, (x, y, _) in zip(gammas, batches, strict=True):
                loss = steps.loss(steps.module(x), y)
                if gamma and not proximal:
                    loss = loss + gamma * torch.stack([weight.abs().sum() for weight in priced]).sum()
                yield loss

        def shrink() -> None:
            soften_(priced, self.lr * next(thresholds))

        steps.take(losses(), rng, after=shrink if proximal else None)
        return Done(trained=task.trained)


def penalised(module: nn.Module, which: Literal["weights", "all"] = "weights") -> list[nn.Parameter]:
    """What the price is on: all parameters that are trained, or the matrices and kernels among them.

    Those have two dimensions or more, and are neither biases nor the scales of a normalisation.
    """
    if which == "all":
        return [parameter for parameter in module.parameters() if parameter.requires_grad]
    layers = [layer for layer in module.modules() if not isinstance(layer, _NORMS)]
    named = {id(p): p for layer in layers for name, p in layer.named_parameters(recurse=False) if "bias" not in name}
    return [parameter for parameter in named.values() if parameter.dim() > 1 and parameter.requires_grad]


@torch.no_grad()
def soften_(parameters: list[nn.Parameter], threshold: float) -> None:
    """``sign(theta) * max(|theta| - threshold, 0)``, in place: the proximal step of ``threshold * ||theta||_1``."""
    if threshold:
        for parameter in parameters:
            parameter.copy_(nn.functional.softshrink(parameter, threshold))


_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
