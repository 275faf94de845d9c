"""Certified fine-tuning that asks nothing of the loss: after every step the whole model is clipped, and noise added."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Generator, nn

from expunge.certify.accountant import Budget, charge
from expunge.certify.clipping import model_clipping_epsilon, model_clipping_sigma
from expunge.certify.constants import Derivation, derived, setting
from expunge.certify.guarantee import guarantee_of
from expunge.certify.noisy_steps import (
    NoisyWalk,
    budget_constants,
    check_steps,
    clipped,
    drowned,
    polish,
    polish_remarks,
    released,
    unsuited,
)
from expunge.core.claim import Claim, Constant, Guarantee, Spent
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import ClippedModels
from expunge.core.protocols import Need
from expunge.core.trained import Trained
from expunge.unlearn.method import Done, Method, Task


def _sigma(radius: float, steps: float, epsilon: float, delta: float, requests: float) -> float:
    return model_clipping_sigma(epsilon / requests, delta / requests, radius, int(steps))


CLIPPED_MODELS_SIGMA = Derivation(
    name="clipped-models-sigma",
    formula="smallest sigma with epsilon / requests, delta / requests by delta_t+1 = delta_t theta(2 radius / sigma), "
    "theta the Gaussian profile at ln(1 + (e^epsilon - 1) / delta_t) (Koloskova et al., 2025)",
    of=("radius", "steps", "budget_epsilon", "budget_delta", "budget_requests"),
    compute=_sigma,
)
CLIPPED_MODELS_SENSITIVITY = Derivation(
    name="clipped-models-sensitivity",
    formula="2 radius: the diameter of the ball that the model is clipped to before each addition of noise",
    of=("radius",),
    compute=lambda radius: 2 * radius,
)
CLIPPED_MODELS_EPSILON = Derivation(
    name="clipped-models-epsilon",
    formula="smallest epsilon with budget_delta / budget_requests at this sigma, by the recursion that gives sigma",
    of=("radius", "steps", "sigma", "budget_delta", "budget_requests"),
    compute=lambda radius, steps, sigma, delta, requests: model_clipping_epsilon(
        radius, sigma, int(steps), delta / requests
    ),
)
DERIVATIONS = (CLIPPED_MODELS_SIGMA, CLIPPED_MODELS_SENSITIVITY, CLIPPED_MODELS_EPSILON)


@dataclass(frozen=True, kw_only=True)
class ClippedModelFineTune(Method):
    r"""Noisy descent on the retained rows, the whole model clipped before each noise, then ordinary training on them.

    `steps` times ``w <- clip(w - lr (g + weight_decay w), radius) + N(0, sigma^2)``, `g` the gradient of a batch's mean
    loss; the clip is of the L2 norm of the vector of all parameters. Then `polish` epochs of the recipe's own training.

    sigma is the smallest with (epsilon / requests, delta / requests) by :math:`\delta_{t+1} = \delta_t
    \theta_{\epsilon_t}(2 C / \sigma)`, :math:`\epsilon_t = \ln(1 + (e^\epsilon - 1) / \delta_t)`, :math:`\delta_0 = 1`,
    :math:`\theta_\epsilon(\mu)` the smallest delta of Gaussian differential privacy: each step lets through at most
    that share of what still tells the two starts apart. With one step it is plain noise on the clipped model.

    What it rests on, what it is compared with, and why later releases add nothing for rows removed now: as for
    `ClippedFineTune`; the step may be any function of the model, the retained rows and fixed coins. A model that is not
    finite is clipped to zero. There is no mu: releases share the budget's epsilon and delta in equal parts, which for
    many releases is dearer than sharing mu.

    Utility: expect that of training anew for `polish` epochs. sigma is .34 `radius` at epsilon 1, delta 1e-5, 500 steps
    and 7.5 `radius` for one step, on each of the p parameters: its norm is ``sqrt(p)`` times that.

    Cost: `steps` batches and `polish` epochs of gradients, and p secret normal numbers a noisy step.

    Attributes:
        radius: L2 norm that the model is clipped to before each noise (C).
        lr: learning rate of the noisy steps.
        weight_decay: of the noisy steps.
        steps: noisy steps.
        batch_size: rows a step; None: the recipe's.
        polish: epochs of the recipe's training after the noise, its schedule stretched over them; 0 for none.
        budget: of all releases together.
    """

    claim: ClassVar[Claim] = Claim.CERTIFIED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "Koloskova et al., 2025 (model clipping)"
    not_guaranteed: ClassVar[str] = (
        "accuracy: at small epsilon the noise is as good as a new start; and nothing about what earlier releases tell"
    )
    radius: float = 0.1
    lr: float = 0.05
    weight_decay: float = 0.0
    steps: int = 50
    batch_size: int | None = None
    polish: int = 5
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        check_steps(self.steps, self.lr, self.weight_decay, self.polish, self.batch_size)
        if not 0 < self.radius < math.inf:
            raise Misuse(f"radius must be > 0 and finite, got {self.radius}")

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise of each step on each parameter."""
        return self._constants()["sigma"].value

    def supports(self, trained: Trained) -> Unsupported | None:
        """One dense model with nothing in its state but parameters that the noise covers."""
        return super().supports(trained) or unsuited(self.name, trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        names = tuple(dict(task.trained.module.named_parameters(remove_duplicate=False)))
        constants = self._constants()
        sigma = constants["sigma"].value
        release = ClippedModels(parameters=names, radius=self.radius, steps=self.steps, sigma=sigma)
        spent = charge(task.trained.releases, release, self.budget)
        walk = NoisyWalk(task, lr=self.lr, batch_size=self.batch_size, sigma=sigma)
        shrink = 1 - self.lr * self.weight_decay
        walk.go(rng, self.steps, lambda w, g: clipped(shrink * w - self.lr * g, self.radius))
        polish(task, self.polish)
        guarantee = self._guarantee(task.trained.module, names, constants, spent)
        return Done(trained=released(task.trained, release), guarantee=guarantee, events=(release,))

    def _constants(self) -> dict[str, Constant]:
        known = {name: setting(getattr(self, name), f"method.{name}") for name in ("radius", "steps")}
        known |= budget_constants(self.budget)
        for name, derivation in zip(("sigma", "sensitivity", "epsilon"), DERIVATIONS, strict=True):
            known[name] = derived(derivation, known)
        return known

    def _guarantee(
        self, module: nn.Module, names: tuple[str, ...], constants: dict[str, Constant], spent: Spent
    ) -> Guarantee:
        return guarantee_of(
            module,
            parameters=names,
            constants=constants,
            delta=self.budget.delta / self.budget.requests,
            mechanism=f"{self.steps} noisy steps, the model clipped before each noise",
            reference="the same noisy steps and the same training after them, on the retained rows, from any other "
            "start, for instance from a model that never saw the removed rows",
            transcript=spent,
            remarks=(*drowned(self.radius, constants["sigma"].value, module), *polish_remarks(self.polish)),
        )
