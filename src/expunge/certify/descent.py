"""Descent-to-delete: a number of gradient steps, fixed beforehand, from the weights that the last request left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from expunge.certify.accountant import Budget, charge
from expunge.certify.constants import Derivation, derived, setting
from expunge.certify.full_batch import (
    CAP,
    MONTH_S,
    SoftmaxRows,
    accelerated,
    budget_constants,
    fresh_until,
    is_softmax,
    kept_event,
    number,
    plain,
    refuse_outside,
    shrinkage,
    softmax_constants,
    steps_to,
    until_of,
)
from expunge.certify.full_batch import DERIVATIONS as SHARED
from expunge.certify.guarantee import gaussian_mu, guarantee_of
from expunge.certify.noise import put_with_noise
from expunge.core.claim import Claim, Constant
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import GaussianNoise
from expunge.core.trained import State, Trained
from expunge.unlearn.method import Done, Method, Task

_FINEST = 1e-9
_MOST_STEPS = 1_000_000


def _drift(weight_decay: float, gradient: float, share: float) -> float:
    return 2 * share * gradient / weight_decay


def _warm_steps(
    smoothness: float, weight_decay: float, gradient: float, accelerated: float, share: float, cap: float
) -> float:
    drift = _drift(weight_decay, gradient, share)
    start = math.sqrt(2 * cap * cap + 4 * cap * drift + 3 * drift * drift) if accelerated else cap + drift
    return steps_to(smoothness, weight_decay, accelerated, cap / start)


def _cold_steps(smoothness: float, weight_decay: float, accelerated: float, extent: float, cap: float) -> float:
    return steps_to(smoothness, weight_decay, accelerated, min(1.0, cap / extent))


def _distance(
    smoothness: float,
    weight_decay: float,
    gradient: float,
    accelerated: float,
    share: float,
    extent: float,
    steps: float,
    cold_steps: float,
) -> float:
    left = shrinkage(smoothness, weight_decay, accelerated, steps)
    stays = left * _drift(weight_decay, gradient, share)
    if accelerated:
        stays *= (2 * left + math.sqrt(3 - 2 * left * left)) / (1 - 2 * left * left)
    else:
        stays /= 1 - left
    return max(stays, shrinkage(smoothness, weight_decay, accelerated, cold_steps) * extent)


EXTENT = Derivation(
    name="descent-extent",
    formula="extent = sqrt(2 ln(classes) / weight_decay): no optimum is longer, as it is no worse than zero weights",
    of=("weight_decay", "classes"),
    compute=lambda weight_decay, classes: math.sqrt(2 * math.log(classes) / weight_decay),
    gives=("extent",),
)
WARM_STEPS = Derivation(
    name="descent-steps",
    formula="fewest steps that leave cap of what is there at worst: cap + d, d = 2 share gradient / weight_decay; "
    "accelerated: sqrt(2 cap^2 + 4 cap d + 3 d^2)",
    of=("smoothness", "weight_decay", "gradient", "accelerated", "share", "cap"),
    compute=_warm_steps,
    gives=("steps",),
)
COLD_STEPS = Derivation(
    name="descent-cold-steps",
    formula="fewest steps that leave cap of extent",
    of=("smoothness", "weight_decay", "accelerated", "extent", "cap"),
    compute=_cold_steps,
    gives=("cold_steps",),
)
DISTANCE = Derivation(
    name="descent-distance",
    formula="max of what steps leave however many requests follow one another, c d / (1 - c), accelerated: "
    "c d (2 c + sqrt(3 - 2 c^2)) / (1 - 2 c^2), and what cold_steps leave of extent (Neel et al., 2021, re-derived)",
    of=("smoothness", "weight_decay", "gradient", "accelerated", "share", "extent", "steps", "cold_steps"),
    compute=_distance,
    gives=("sensitivity",),
)

DERIVATIONS = (*SHARED, EXTENT, WARM_STEPS, COLD_STEPS, DISTANCE)


@dataclass(frozen=True, kw_only=True)
class DescentToDelete(Method):
    r"""Go on descending on the retained rows for a number of steps that settings alone decide, then add noise once.

    For softmax models with weight decay. Full-batch steps in float64 start from the un-noised weights of the request
    before, which stay secret; where there are none (first request, loaded model, other settings, time is up) or a
    request removes more than `share`, from zero and for more steps: training anew, with nothing of removed rows. It
    does so too where that takes no more steps, as with accelerated ones unless `share` is small; `plan` tells both.

    Proof, with :math:`\lambda` the weight decay, G the largest norm of a row's gradient (`full_batch`), f and f' the
    objectives before and after a request, which removes m of n rows and brings at most as many, v and w their optima:

    1. From zero: an optimum is at most :math:`E = \sqrt{2 \ln(classes) / \lambda}` long, as :math:`\frac{\lambda}{2}
       ||w||^2 \le f'(w) \le f'(0) = \ln(classes)`; and the potential of `shrinkage` is at most :math:`f'(0)`.
    2. f' - f changes with the weights by at most 2 m G / n times their distance. Hence :math:`||v - w|| \le d = 2 m G /
       (\lambda n)`, as f has at w a gradient of at most 2 m G / n and is :math:`\lambda`-strongly convex.
    3. Plain steps from u with :math:`||u - v|| \le A`: :math:`||u - w|| \le A + d`, of which they leave a share c.
    4. Accelerated ones from u with :math:`f(u) - f(v) \le \frac{\lambda}{2} A^2`, so that :math:`||u - v|| \le A` too:
       :math:`f'(u) - f'(w) \le f(u) - f(v) + \lambda d (A + d)` by 2., and the potential is at most
       :math:`\frac{\lambda}{2} (A^2 + 2 d (A + d) + (A + d)^2)`, of whose root they leave a share c.
    5. The A that comes out is not above the A that went in, however many requests follow, if that is :math:`c d / (1 -
       c)`, accelerated :math:`c d (2 c + \sqrt{3 - 2 c^2}) / (1 - 2 c^2)`, or more. The number of steps is the fewest
       with which it is within the budget's cap; that from zero the fewest with which c E is.

    Differs: Neel et al. fit sigma to a given number of steps, with a formula of their own; here the number of steps is
    fitted to sigma and the exact Gaussian mechanism. `accelerated` is not theirs. They release the first model with
    noise as well, and so should you: what training gave out without noise is covered by nothing here.

    Cost: steps times one product of all rows with the weights and one back, usually thousands; see `plan`. Newton's
    method makes do with dozens: that the steps are known beforehand is all that speaks for these. On 10,000 rows of
    MNIST (radius 17, weight decay .01, sigma .02, share .001, ten requests): 2,262 accelerated steps from zero and
    2,036 from the weights before, plain ones 68,253 and 57,448. Memory: the rows as float64.

    Attributes:
        sigma: standard deviation of the noise on each parameter.
        share: of the rows trained on, the largest that one request removes without starting from zero.
        radius: bound on the norm of any row, as prepared and with a 1 appended for the bias, chosen without looking at
            rows; None: features lie within [-1, 1], as pixels do.
        accelerated: Nesterov's steps: about the square root of the number that plain ones need.
        keep_s: seconds for which un-noised weights that removed rows had a part in may be started from.
        budget: of all releases.
    """

    claim: ClassVar[Claim] = Claim.CERTIFIED
    source: ClassVar[str] = "Neel, Roth and Sharifi-Malvajerdi, 2021"
    not_guaranteed: ClassVar[str] = (
        "anything of models given out without noise, or of who sees un-noised weights; rounding is not in the proof"
    )
    sigma: float = 0.02
    share: float = 0.001
    radius: float | None = None
    accelerated: bool = True
    keep_s: float = MONTH_S
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        checks = [
            (0 < self.sigma < math.inf, f"sigma must be > 0 and finite, got {self.sigma}"),
            (0 < self.share <= 1, f"share must be > 0 and <= 1, got {self.share}"),
            (self.radius is None or 1 < self.radius < math.inf, f"radius must be > 1, got {self.radius}"),
            (0 <= self.keep_s < math.inf, f"keep_s must be >= 0 and finite, got {self.keep_s}"),
        ]
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs a dense softmax model with weight decay."""
        problem = super().supports(trained)
        if problem is not None:
            return problem
        recipe = trained.recipe
        dense = is_softmax(trained) and recipe.pruning is None and recipe.model_args["outputs"] > 1
        if not dense or recipe.weight_decay <= 0:
            return Unsupported(
                f"{self.name} needs a dense softmax model of two classes or more, cross-entropy and weight_decay > 0: "
                "one optimum to descend to; use rewind-to-delete, or retrain"
            )
        return None

    def plan(self, trained: Trained) -> Mapping[str, Constant]:
        """Every number that the guarantee rests on, `steps` and `cold_steps` among them, from settings alone.

        Raises:
            Misuse: if sigma asks for steps finer than float64 can make, or for more than a million.
        """
        recipe = trained.recipe
        known = softmax_constants(recipe, self.radius)
        known |= {
            "weight_decay": setting(recipe.weight_decay, "recipe.weight_decay"),
            "sigma": setting(self.sigma, "method.sigma"),
            "share": setting(self.share, "method.share"),
            "accelerated": setting(self.accelerated, "method.accelerated"),
            "classes": setting(recipe.model_args["outputs"], "recipe.classes"),
            **budget_constants(self.budget),
        }
        known["cap"] = derived(CAP, known)
        known["extent"] = derived(EXTENT, known)
        cap, extent = known["cap"].value, known["extent"].value
        if cap < _FINEST * extent:
            raise Misuse(
                f"sigma {self.sigma:g} leaves a cap of {cap:.2g} on weights of up to {extent:.2g}, finer than float64 "
                "can be trusted with; raise sigma or weight_decay"
            )
        known["steps"] = derived(WARM_STEPS, known)
        known["cold_steps"] = derived(COLD_STEPS, known)
        most = max(known["steps"].value, known["cold_steps"].value)
        if most > _MOST_STEPS:
            raise Misuse(f"this would take {most:,.0f} steps; raise weight_decay or sigma, or set accelerated=True")
        known["sensitivity"] = derived(DISTANCE, known)
        known["mu"] = gaussian_mu(known)
        return known

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        trained, known = task.trained, self.plan(task.trained)
        module, cap = trained.module, known["sensitivity"].value
        names = tuple(name for name, _ in module.named_parameters())
        release = GaussianNoise(parameters=names, sensitivity=cap, sigma=self.sigma)
        spent = charge(trained.releases, release, self.budget)
        for rows in (task.forget, task.retain):
            refuse_outside(rows, known["radius"].value)
        kept = self._usable(task, known)
        w = self._descended(task, kept, known)
        until = until_of(kept, "descent", self.keep_s) if kept else math.inf
        books = {"within": cap, "accelerated": self.accelerated, "until": until}
        secret = {**_cut(w), **{f".descent.{name}": number(value) for name, value in books.items()}}
        put_with_noise(module, {name: secret[name].double() for name in names}, self.sigma)
        releases = (*trained.releases, release)
        guarantee = guarantee_of(
            module,
            parameters=names,
            constants=known,
            delta=self.budget.delta,
            mechanism="full-batch gradient descent for a number of steps fixed beforehand, then Gaussian noise once",
            reference="the minimiser of the objective on the retained rows, plus noise of the same size drawn anew",
            transcript=spent,
            remarks=_remarks(known),
        )
        what = "weights before noise, which steps from those before the removal led to"
        events = (kept_event(what, self.budget, len(releases), until),) if kept else ()
        return Done(
            trained=replace(trained, module=module, secret=secret, releases=releases, log=None),
            guarantee=guarantee,
            events=(release, *events),
        )

    def _usable(self, task: Task, known: Mapping[str, Constant]) -> State:
        """The secret state, if these settings may start from it and gain by it; else nothing."""
        trained, secret = task.trained, task.trained.secret
        few = len(task.forget) <= self.share * len(trained.ids) and len(task.retain) <= len(trained.ids)
        within = float(secret.get(".descent.within", number(math.inf))) <= known["sensitivity"].value
        gain = known["steps"].value < known["cold_steps"].value
        alike = float(secret.get(".descent.accelerated", number(math.nan))) == self.accelerated
        return secret if few and within and alike and gain and fresh_until(secret, "descent") else {}

    def _descended(self, task: Task, kept: State, known: Mapping[str, Constant]) -> Tensor:
        recipe, classes = task.trained.recipe, int(task.trained.recipe.model_args["outputs"])
        rows = SoftmaxRows.of(task.retain, recipe.seed, task.tally)
        if kept:
            w, steps = torch.cat([kept["head.weight"], kept["head.bias"][:, None]], dim=1), known["steps"]
        else:
            w, steps = rows.x.new_zeros(classes, rows.x.shape[1]), known["cold_steps"]
        count = round(steps.value)
        task.tally.gradients += (count - 1) * len(task.retain)
        step = accelerated if self.accelerated else plain
        return step(rows, w, count, smoothness=known["smoothness"].value, weight_decay=recipe.weight_decay)


def _cut(w: Tensor) -> dict[str, Tensor]:
    return {"head.weight": w[:, :-1].clone(), "head.bias": w[:, -1].clone()}


def _remarks(known: Mapping[str, Constant]) -> tuple[str, ...]:
    remarks = ["steps are taken in float64, and their rounding is not in the proof"]
    if known["sensitivity"].value >= known["extent"].value:
        remarks.append("vacuous: so much noise hides the optimum of any rows whatever, and no step is needed for it")
    return tuple(remarks)
