"""Certified fine-tuning that asks nothing of the loss: a clipped start, clipped gradients, and noise at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Generator, nn

from expunge.certify.accountant import Budget, charge
from expunge.certify.clipping import clipped_steps_mu, clipped_steps_sigma
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
from expunge.core.events import ClippedSteps
from expunge.core.protocols import Need
from expunge.core.trained import Trained
from expunge.unlearn.method import Done, Method, Task

_STEPS = ("start", "gradient", "lr", "weight_decay", "steps")


def _sigma(start: float, gradient: float, lr: float, decay: float, steps: float, *budget: float) -> float:
    epsilon, delta, requests = budget
    each = Budget(epsilon=epsilon, delta=delta, requests=int(requests)).mu_each
    return clipped_steps_sigma(each, start, gradient, lr, decay, int(steps))


def _reach(start: float, gradient: float, lr: float, decay: float, steps: float) -> float:
    shrink = 1 - lr * decay
    return 2 * start * shrink ** int(steps) + 2 * lr * gradient * math.fsum(shrink**k for k in range(int(steps)))


CLIPPED_STEPS_SIGMA = Derivation(
    name="clipped-steps-sigma",
    formula="sigma = (2 start r^T + 2 lr gradient sum r^k) / (mu_each sqrt(sum r^2k)), r = 1 - lr weight_decay, k < T",
    of=(*_STEPS, "budget_epsilon", "budget_delta", "budget_requests"),
    compute=_sigma,
)
CLIPPED_STEPS_SENSITIVITY = Derivation(
    name="clipped-steps-sensitivity",
    formula="2 start r^T + 2 lr gradient sum r^k: how far apart two runs with equal noise can end",
    of=_STEPS,
    compute=_reach,
)
CLIPPED_STEPS_MU = Derivation(
    name="clipped-steps-mu",
    formula="mu = sensitivity / (sigma sqrt(sum r^2k)), r = 1 - lr weight_decay, k < T (see `clipped_steps_mu`)",
    of=(*_STEPS, "sigma"),
    compute=lambda start, gradient, lr, decay, steps, sigma: clipped_steps_mu(
        start, gradient, lr, decay, int(steps), sigma
    ),
)
DERIVATIONS = (CLIPPED_STEPS_SIGMA, CLIPPED_STEPS_SENSITIVITY, CLIPPED_STEPS_MU)


@dataclass(frozen=True, kw_only=True)
class ClippedFineTune(Method):
    r"""Noisy gradient descent on the retained rows from a clipped start, then ordinary training on them.

    ``w <- clip(w, start)``; then `steps` times ``w <- w - lr (clip(g, gradient) + weight_decay w) + N(0, sigma^2)``,
    `g` the gradient of a batch's mean loss (of the recipe, without its weight decay). Both clips are of the L2 norm of
    the whole vector of all parameters. Then `polish` epochs of the recipe's own training. sigma follows from the
    settings and the budget: :math:`\sigma = (2 C_0 r^T + 2 \eta C_1 \sum_{k<T} r^k) / (\mu \sqrt{\sum_{k<T} r^{2k}})`,
    :math:`r = 1 - \eta \lambda`, :math:`\mu` a release's share of the budget; the proof is at `clipped_steps_mu`.

    What it rests on: the removed rows reach the result through the starting weights alone. All batches are of retained
    rows, in an order that is a function of them and of `rng`; dropout's coins and the polishing's are functions of
    seeds. Nothing about the loss is needed: a gradient that is not finite counts as zero. The steps are made in
    float64, so that rounding to the model's own dtype is but a part of each step's gradient, and at the end of the
    release.

    What is compared: the reference makes the same noisy steps on the same retained rows from any other start, such as
    a model that never saw the removed rows, and polishes in the same way. It is no training by the recipe alone. As
    later requests start from what was released, and from nothing un-noised, later releases of this method tell no more
    of the rows removed now than this one does. With a start near 0 this is a new training with certified neglect of
    the old one: compare with retraining for as many steps.

    Utility: expect that of training anew for `polish` epochs, and no more. The noise has the norm of about ``2 start
    sqrt(p) / mu`` for p parameters, so that nothing much of the old model is left unless mu is of the order of ``2
    sqrt(p)``; the defaults are for noise about as large as the initial weights of a network, from which it can be
    trained. Larger clips are worse. Without weight decay, one addition of noise to the clipped model needs less.

    Cost: `steps` batches and `polish` epochs of gradients, and p secret normal numbers a noisy step.

    Attributes:
        start: L2 norm that the weights are clipped to at first (C_0).
        gradient: L2 norm that a batch's gradient is clipped to (C_1).
        lr: learning rate of the noisy steps.
        weight_decay: of the noisy steps; it shrinks towards zero what is left of the start.
        steps: noisy steps.
        batch_size: rows a step; None: the recipe's.
        polish: epochs of the recipe's training after the noise, its schedule stretched over them; 0 for none.
        budget: of all releases together.
    """

    claim: ClassVar[Claim] = Claim.CERTIFIED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "Koloskova et al., 2025 (gradient clipping), with mu in place of Renyi divergence"
    not_guaranteed: ClassVar[str] = (
        "accuracy: at small epsilon the noise is as good as a new start; and nothing about what earlier releases tell"
    )
    start: float = 0.001
    gradient: float = 0.001
    lr: float = 0.05
    weight_decay: float = 0.0
    steps: int = 10
    batch_size: int | None = None
    polish: int = 5
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        check_steps(self.steps, self.lr, self.weight_decay, self.polish, self.batch_size)
        if not (0 <= self.start < math.inf and 0 < self.gradient < math.inf):
            raise Misuse(f"need start >= 0 and gradient > 0, both finite, got {self.start} and {self.gradient}")

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise of each step on each parameter."""
        return self._constants()["sigma"].value

    def supports(self, trained: Trained) -> Unsupported | None:
        """One dense model with nothing in its state but parameters that the noise covers."""
        return super().supports(trained) or unsuited(self.name, trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        names = tuple(dict(task.trained.module.named_parameters(remove_duplicate=False)))
        settings = {name: getattr(self, name) for name in _STEPS}
        release = ClippedSteps(parameters=names, **settings, sigma=self.sigma)
        spent = charge(task.trained.releases, release, self.budget)
        walk = NoisyWalk(task, lr=self.lr, batch_size=self.batch_size, sigma=release.sigma)
        shrink = 1 - self.lr * self.weight_decay
        walk.place = clipped(walk.place, self.start)
        walk.go(rng, self.steps, lambda w, g: shrink * w - self.lr * clipped(g, self.gradient))
        polish(task, self.polish)
        guarantee = self._guarantee(task.trained.module, names, spent)
        return Done(trained=released(task.trained, release), guarantee=guarantee, events=(release,))

    def _constants(self) -> dict[str, Constant]:
        known = {name: setting(getattr(self, name), f"method.{name}") for name in _STEPS}
        known |= budget_constants(self.budget)
        known["sigma"] = derived(CLIPPED_STEPS_SIGMA, known)
        known["sensitivity"] = derived(CLIPPED_STEPS_SENSITIVITY, known)
        known["mu"] = derived(CLIPPED_STEPS_MU, known)
        return known

    def _guarantee(self, module: nn.Module, names: tuple[str, ...], spent: Spent) -> Guarantee:
        constants = self._constants()
        return guarantee_of(
            module,
            parameters=names,
            constants=constants,
            delta=self.budget.delta,
            mechanism=f"{self.steps} noisy steps from a clipped start, gradients clipped",
            reference="the same noisy steps and the same training after them, on the retained rows, from any other "
            "start, for instance from a model that never saw the removed rows",
            transcript=spent,
            remarks=(*self._remarks(constants, module), *polish_remarks(self.polish)),
        )

    def _remarks(self, constants: Mapping[str, Constant], module: nn.Module) -> list[str]:
        """From settings and the number of parameters alone."""
        reach, mu = constants["sensitivity"].value, constants["mu"].value
        left = self.start * (1 - self.lr * self.weight_decay) ** self.steps
        told = drowned(left, reach / mu, module)
        if reach >= 2 * self.start:
            told.append(
                "The noise is no less than that of clipping the model to this start and adding noise once: the noisy "
                "steps save none."
            )
        return told
