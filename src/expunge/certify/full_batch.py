r"""What descent-to-delete and rewind-to-delete share: constants of softmax models, their rows, and time limits.

The objective is the mean of the rows' losses plus ``weight_decay / 2 ||w||^2``. Of a softmax model (weights W and bias,
laid side by side as one matrix that multiplies (x, 1)) on rows with :math:`||(x, 1)|| \le R`, for any labels and at any
weights:

- the gradient of a row's loss is :math:`(p - e_y) (x, 1)'`, of norm at most :math:`\sqrt 2 R`, as the entries of
  :math:`p - e_y` are one in [-1, 0] and others in [0, 1] that sum to its size;
- the Hessian of a row's loss is :math:`(diag(p) - p p') \otimes (x, 1) (x, 1)'`, which has no negative eigenvalue and
  none above :math:`R^2 / 2`: each row of :math:`diag(p) - p p'` has absolute sum :math:`2 p_i (1 - p_i) \le 1/2`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expunge.certify.accountant import Budget
from expunge.certify.constants import Derivation, derived, setting
from expunge.core import coins
from expunge.core.claim import Constant
from expunge.core.errors import Misuse
from expunge.core.events import SecretKept
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import State, Trained
from expunge.learn.loop import Tally, prepare
from expunge.learn.models import SoftmaxRegression

MONTH_S = 30 * 86400.0
_CHUNK = 4096

UNIT_RADIUS = Derivation(
    name="full-batch-unit-radius",
    formula="radius = sqrt(features + 1): features within [-1, 1], as all pixels are, with a 1 for the bias",
    of=("features",),
    compute=lambda features: math.sqrt(features + 1),
    gives=("radius",),
)
SMOOTHNESS = Derivation(
    name="full-batch-softmax-smoothness",
    formula="smoothness = radius^2 / 2: largest eigenvalue of a row's Hessian, weight decay not counted",
    of=("radius",),
    compute=lambda radius: radius * radius / 2,
    gives=("smoothness",),
)
GRADIENT = Derivation(
    name="full-batch-softmax-gradient",
    formula="gradient = sqrt(2) radius: largest norm of a row's gradient, weight decay not counted",
    of=("radius",),
    compute=lambda radius: math.sqrt(2) * radius,
    gives=("gradient",),
)
CAP = Derivation(
    name="full-batch-cap",
    formula="cap = mu(budget_epsilon, budget_delta) / sqrt(budget_requests) sigma: the distance that one release hides",
    of=("budget_epsilon", "budget_delta", "budget_requests", "sigma"),
    compute=lambda epsilon, delta, requests, sigma: Budget(epsilon=epsilon, delta=delta, requests=round(requests)).cap(
        sigma
    ),
    gives=("cap",),
)

DERIVATIONS = (UNIT_RADIUS, SMOOTHNESS, GRADIENT, CAP)


def is_softmax(trained: Trained) -> bool:
    """Whether it is multinomial logistic regression on the rows as they are, by cross-entropy."""
    return type(trained.module) is SoftmaxRegression and trained.recipe.loss == "cross_entropy"


def softmax_constants(recipe: Recipe, radius: float | None) -> dict[str, Constant]:
    """`radius`, `smoothness` and `gradient` of a softmax model; no radius: that of features within [-1, 1]."""
    found: dict[str, Constant] = {}
    if radius is None:
        found["features"] = setting(math.prod(recipe.model_args["shape"]), "recipe.features")
        found["radius"] = derived(UNIT_RADIUS, found)
    else:
        found["radius"] = setting(radius, "method.radius")
    found["smoothness"] = derived(SMOOTHNESS, found)
    found["gradient"] = derived(GRADIENT, found)
    return found


def budget_constants(budget: Budget) -> dict[str, Constant]:
    """The budget's three numbers."""
    names = ("epsilon", "delta", "requests")
    return {f"budget_{name}": setting(getattr(budget, name), f"method.budget.{name}") for name in names}


def refuse_outside(records: Records, radius: float) -> None:
    """Misuse if a row with a 1 appended is longer than `radius`: nothing would be proved of it."""
    parts = torch.arange(len(records)).split(_CHUNK)
    longest = max((float(_with_one(x).square().sum(1).max()) for x, _ in records.batches(parts)), default=0.0)
    if math.sqrt(longest) > radius * (1 + 1e-12):
        raise Misuse(
            f"a row with a 1 for the bias has norm {math.sqrt(longest):.6g}, and the method's radius is {radius:.6g}; "
            "give a larger radius, for a reason that holds for any row: this norm tells of one of them"
        )


def _with_one(x: Tensor) -> Tensor:
    flat = prepare(x, torch.float64).flatten(1)
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)


@dataclass(frozen=True, eq=False)
class SoftmaxRows:
    """All rows at once, for exact gradients of a softmax model in float64: n (features + 1) numbers of memory."""

    x: Float[Tensor, "n columns"]
    y: Int[Tensor, " n"]

    @classmethod
    def of(cls, records: Records, seed: int, tally: Tally) -> SoftmaxRows:
        """Read them, in an order that is the rows' own, so that sums do not depend on the records' order."""
        parts = torch.from_numpy(coins.order(records.keys, seed, "descent")).split(_CHUNK)
        rows, labels = [], []
        for positions, (x, y) in zip(parts, records.batches(parts), strict=True):
            tally.saw(records, positions, x, y)
            rows.append(_with_one(x))
            labels.append(y)
        return cls(torch.cat(rows), torch.cat(labels))

    def gradient(self, w: Float[Tensor, "classes columns"], weight_decay: float) -> Float[Tensor, "classes columns"]:
        """Of the mean loss plus ``weight_decay / 2 ||w||^2``. Cost: two products of the rows with a matrix."""
        p = (self.x @ w.T).softmax(1)
        p[torch.arange(len(p), device=p.device), self.y] -= 1
        return p.T @ self.x / len(p) + weight_decay * w


def shrinkage(smoothness: float, weight_decay: float, accelerated: float, steps: float) -> float:
    r"""What `steps` steps leave of the distance to the optimum, or of the root of the potential, at most.

    Gradient steps of length :math:`2 / (\beta + 2 \lambda)` leave :math:`(\beta / (\beta + 2 \lambda))^T` of the
    distance: a step is a contraction where second derivatives lie between :math:`\lambda` and :math:`\beta + \lambda`.
    Accelerated ones leave :math:`(1 - \sqrt{\lambda / (\beta + \lambda)})^{T/2}` of the root of the potential
    :math:`f(w) - f^* + \frac{\lambda}{2} ||v - w^*||^2`, v being w at the start (Nesterov, 2004).

    Args:
        smoothness: :math:`\beta`, of the rows' losses.
        weight_decay: :math:`\lambda`.
        accelerated: 0 or 1.
        steps: T.
    """
    if not accelerated:
        return math.exp(-steps * math.log1p(2 * weight_decay / smoothness))
    return math.exp(steps / 2 * math.log1p(-math.sqrt(weight_decay / (smoothness + weight_decay))))


def steps_to(smoothness: float, weight_decay: float, accelerated: float, share: float) -> int:
    """Fewest steps, at least one, that leave at most this share."""
    each = -math.log(shrinkage(smoothness, weight_decay, accelerated, 1))
    steps = max(1, math.ceil(-math.log(share) / each) - 1)
    while shrinkage(smoothness, weight_decay, accelerated, steps) > share:
        steps += 1
    return steps


def plain(rows: SoftmaxRows, w: Tensor, steps: int, *, smoothness: float, weight_decay: float) -> Tensor:
    """Gradient steps of the length that contracts most."""
    lr = 2 / (smoothness + 2 * weight_decay)
    for _ in range(steps):
        w = w - lr * rows.gradient(w, weight_decay)
    return w


def accelerated(rows: SoftmaxRows, w: Tensor, steps: int, *, smoothness: float, weight_decay: float) -> Tensor:
    """Nesterov's steps for strongly convex objectives."""
    largest = smoothness + weight_decay
    root = math.sqrt(weight_decay / largest)
    ahead = w
    for _ in range(steps):
        then, w = w, ahead - rows.gradient(ahead, weight_decay) / largest
        ahead = w + (1 - root) / (1 + root) * (w - then)
    return w


def fresh_until(secret: State, name: str) -> bool:
    """Whether what is kept under this name may still be used."""
    until = secret.get(f".{name}.until")
    return until is not None and time.time() < float(until)


def until_of(secret: State, name: str, keep_s: float) -> float:
    """Unix time after which what is derived from removed rows must go; it never moves on by being used again."""
    until = float(secret[f".{name}.until"]) if f".{name}.until" in secret else math.inf
    return min(until, time.time() + keep_s)


def kept_event(what: str, budget: Budget, releases: int, until: float) -> SecretKept:
    """That it is kept, for as many requests as the budget has left."""
    return SecretKept(what=what, requests_left=max(0, budget.requests - releases), until=until)


def number(value: float) -> Tensor:
    """As secret state holds it."""
    return torch.tensor(float(value), dtype=torch.float64)
