"""What the methods that add noise at every step share: the steps, what they can work on, and what is said of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

import torch
from torch import Generator, Tensor, nn

from expunge.certify import noise
from expunge.certify.accountant import Budget
from expunge.certify.constants import setting
from expunge.core.claim import Constant
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import Release
from expunge.core.trained import Trained
from expunge.learn.build import EXTERNAL, build, seeded
from expunge.learn.loop import fit
from expunge.learn.models import has_batch_norm
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.method import Task
from expunge.unlearn.steps import Steps


class NoisyWalk:
    """A task's model as one float64 vector, to which noise is added after each step."""

    def __init__(self, task: Task, *, lr: float, batch_size: int | None, sigma: float) -> None:
        """Start at the task's model; `lr` is only for the books of `Steps`, whose optimiser is not used."""
        self.task, self.sigma = task, sigma
        self.parameters = list(task.trained.module.parameters())
        self.steps = Steps(task, FineTune(lr=lr, momentum=0.0, batch_size=batch_size))
        self.place = self._flat(parameter.detach() for parameter in self.parameters)

    def go(self, rng: Generator, steps: int, move: Callable[[Tensor, Tensor], Tensor]) -> None:
        """`steps` times ``w <- move(w, g) + noise``, g the gradient of a batch's mean loss; then write to the model."""
        module = self.task.trained.module
        module.train()
        with seeded(rng.initial_seed(), "dropout"):
            for x, y, _ in islice(self.steps.batches(self.task.retain, rng, "noisy"), steps):
                self._write()
                gradient = self._gradient(self.steps.loss(module(x), y))
                drawn = noise.secret_normal(self.place.shape).to(self.place.device)
                self.place = move(self.place, gradient) + self.sigma * drawn
        self._write()
        module.eval()

    def _gradient(self, loss: Tensor) -> Tensor:
        free = [parameter for parameter in self.parameters if parameter.requires_grad]
        found = dict(zip(map(id, free), torch.autograd.grad(loss, free, allow_unused=True), strict=True))
        each = ((found.get(id(parameter)), parameter) for parameter in self.parameters)
        return self._flat(torch.zeros_like(parameter) if one is None else one for one, parameter in each)

    @torch.no_grad()
    def _write(self) -> None:
        pieces = self.place.split([parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))

    @staticmethod
    def _flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.double().reshape(-1) for tensor in tensors])


def clipped(vector: Tensor, norm: float) -> Tensor:
    """The vector, scaled down to this L2 norm if it is longer; zero if it is not finite: nothing exceeds the norm."""
    length = float(vector.norm())
    if not length < math.inf:
        return torch.zeros_like(vector)
    return vector * (norm / length) if length > norm else vector


def check_steps(steps: int, lr: float, weight_decay: float, polish: int, batch_size: int | None) -> None:
    """Misuse, before any work, for settings with which no noisy step can be made."""
    checks = [
        (isinstance(steps, int) and steps >= 1, f"steps must be an integer >= 1, got {steps}"),
        (0 < lr < math.inf, f"the method's lr must be > 0, got {lr}"),
        (0 <= lr * weight_decay <= 1, f"need 0 <= lr weight_decay <= 1, got {lr} times {weight_decay}"),
        (isinstance(polish, int) and polish >= 0, f"polish must be an integer >= 0, got {polish}"),
        (batch_size is None or batch_size >= 1, f"batch_size must be >= 1, got {batch_size}"),
    ]
    for fine, message in checks:
        if not fine:
            raise Misuse(message)


def unsuited(name: str, trained: Trained) -> Unsupported | None:
    """Why noise on the parameters would not cover all that the removed rows have shaped; None if it does."""
    module, why = trained.module, ""
    layer = has_batch_norm(module)
    if layer is not None:
        why = f'layer "{layer}" keeps sums over rows that are to go, which no noise is added to'
    elif trained.recipe.pruning is not None:
        why = "which weights are pruned was decided with the rows that are to go, and no noise is added to that"
    elif not any(parameter.requires_grad for parameter in module.parameters()):
        why = "no parameter may move"
    else:
        changed = _changed_buffer(trained)
        why = f'nothing shows that training leaves the buffer "{changed}" as it is' if changed else ""
    return Unsupported(f"{name} cannot certify this model: {why}; use retrain") if why else None


def _changed_buffer(trained: Trained) -> str:
    """Name of a buffer that is not as in a new model of the recipe, or that cannot be compared; empty if none is."""
    buffers = dict(trained.module.named_buffers())
    if not buffers or trained.recipe.model == EXTERNAL:
        return next(iter(buffers), "")
    fresh = dict(build(trained.recipe).named_buffers())
    return next((n for n, b in buffers.items() if n not in fresh or not torch.equal(b.cpu(), fresh[n].cpu())), "")


def polish(task: Task, epochs: int) -> None:
    """Train on by the recipe on retained rows: of a noisy model it needs no noise, as its reference does the same."""
    if epochs:
        recipe = task.trained.recipe.staged(epochs)
        fit(task.trained.module, recipe, task.retain, stage="polish", tally=task.tally)


def polish_remarks(epochs: int) -> tuple[str, ...]:
    """What to say of polishing."""
    if not epochs:
        return ()
    return (f"After the noise come {epochs} epochs of training on the retained rows, in the reference too.",)


def drowned(left: float, spread: float, module: nn.Module) -> list[str]:
    """What to say if the noise is longer than what can be left of the trained model.

    Args:
        left: L2 norm that the model's part of the result has at most.
        spread: standard deviation of the noise in the result, on each parameter.
        module: whose parameters are counted.
    """
    length = spread * math.sqrt(sum(parameter.numel() for parameter in module.parameters()))
    if length <= left:
        return []
    return [
        f"The noise in the weights has an L2 norm of about {length:.3g}, what is left of the trained model at most "
        f"{left:.3g}: nearly a new start."
    ]


def budget_constants(budget: Budget) -> dict[str, Constant]:
    """The budget's settings as constants."""
    return {f"budget_{name}": setting(getattr(budget, name), f"method.budget.{name}") for name in _BUDGET}


_BUDGET = ("epsilon", "delta", "requests")


def released(trained: Trained, release: Release) -> Trained:
    """The model after a release, with nothing un-noised kept: not of this method, nor of one before."""
    return replace(trained, secret={}, releases=(*trained.releases, release))
