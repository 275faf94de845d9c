"""How far rewind-to-delete ends from training without the removed rows: bounds from settings alone."""

from __future__ import annotations

import math

import torch

from expunge.calculus.objective import Objective
from expunge.certify.accountant import Budget
from expunge.certify.constants import Derivation, estimated
from expunge.certify.full_batch import DERIVATIONS as SHARED
from expunge.core.claim import Constant
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import prepare, row_losses


def rewind_distance(
    stretch: float, shrink: float, gradient: float, lr: float, epochs: float, steps: float, share: float
) -> float:
    r"""How far descending on all rows and then on the retained ones ends from descending on those all along, at most.

    The recursion :math:`z \leftarrow \min(s z + 2 \eta \rho G, r z + 2 \eta G)` from 0, with :math:`\rho` the share of
    the rows removed in the first T - K steps and 0 in the last K; see `RewindToDelete` for the proof.

    Args:
        stretch: s, a Lipschitz constant of one step on fixed rows.
        shrink: r, of its part that no row has a share in: ``|1 - lr weight_decay|``.
        gradient: G, largest norm of a row's gradient.
        lr: :math:`\eta`.
        epochs: T.
        steps: K.
        share: :math:`\rho`.
    """
    most = 2 * lr * gradient
    distance = 0.0
    for epoch in range(round(epochs)):
        apart = share * most if epoch < round(epochs) - round(steps) else 0.0
        distance = min(stretch * distance + apart, shrink * distance + most)
    return distance


def published_distance(smoothness: float, gradient: float, lr: float, epochs: int, steps: int, share: float) -> float:
    r"""The bound of Mu and Klabjan (2025), to compare: ``2 share gradient h / smoothness``.

    :math:`h = ((1 + \eta L / (1 - \rho))^{T-K} - 1) (1 + \eta L)^K`; theirs asks for ``lr <= min(1 / L, 1 / (2
    (1 - share) L))``. `RewindToDelete` uses a smaller one, which asks for nothing.
    """
    grown = math.expm1((epochs - steps) * math.log1p(lr * smoothness / (1 - share)))
    return 2 * share * gradient / smoothness * grown * (1 + lr * smoothness) ** steps


def _shrink(lr: float, weight_decay: float) -> float:
    return abs(1 - lr * weight_decay)


def _convex(
    smoothness: float,
    gradient: float,
    weight_decay: float,
    lr: float,
    epochs: float,
    steps: float,
    share: float,
) -> float:
    shrink = _shrink(lr, weight_decay)
    stretch = max(shrink, abs(1 - lr * (smoothness + weight_decay)))
    return rewind_distance(stretch, shrink, gradient, lr, epochs, steps, share)


def _smooth(
    smoothness: float,
    gradient: float,
    weight_decay: float,
    lr: float,
    epochs: float,
    steps: float,
    share: float,
) -> float:
    shrink = _shrink(lr, weight_decay)
    return rewind_distance(shrink + lr * smoothness, shrink, gradient, lr, epochs, steps, share)


def _anything(gradient: float, weight_decay: float, lr: float, epochs: float) -> float:
    shrink = _shrink(lr, weight_decay)
    return 2 * lr * gradient * math.fsum(shrink**epoch for epoch in range(round(epochs)))


def _sigma(sensitivity: float, epsilon: float, delta: float, requests: float) -> float:
    return sensitivity / Budget(epsilon=epsilon, delta=delta, requests=round(requests)).mu_each


_KNOWN = ("smoothness", "gradient", "weight_decay", "lr", "epochs", "steps", "share")

CONVEX_DISTANCE = Derivation(
    name="rewind-distance-convex",
    formula="z <- min(s z + 2 lr share gradient, r z + 2 lr gradient) from 0, epochs times, share 0 in the last steps; "
    "r = |1 - lr weight_decay|, s = max(r, |1 - lr (smoothness + weight_decay)|): convex losses",
    of=_KNOWN,
    compute=_convex,
    gives=("sensitivity",),
)
SMOOTH_DISTANCE = Derivation(
    name="rewind-distance-smooth",
    formula="as rewind-distance-convex with s = r + lr smoothness: any losses (Mu and Klabjan, 2025, re-derived)",
    of=_KNOWN,
    compute=_smooth,
    gives=("sensitivity",),
)
ANY_DISTANCE = Derivation(
    name="rewind-distance-any",
    formula="2 lr gradient (1 + r + ... + r^(epochs - 1)): between trainings on any two sets of rows",
    of=("gradient", "weight_decay", "lr", "epochs"),
    compute=_anything,
    gives=("any",),
)
SIGMA = Derivation(
    name="rewind-sigma",
    formula="sigma = sensitivity sqrt(budget_requests) / mu(budget_epsilon, budget_delta)",
    of=("sensitivity", "budget_epsilon", "budget_delta", "budget_requests"),
    compute=_sigma,
    gives=("sigma",),
)

DERIVATIONS = (*SHARED, CONVEX_DISTANCE, SMOOTH_DISTANCE, ANY_DISTANCE, SIGMA)


def rough_constants(trained: Trained, records: Records, *, rounds: int = 20) -> dict[str, Constant]:
    """`smoothness` and `gradient` as they look at the model's weights: too small, and no basis for any claim.

    The largest norm of the gradients of the rows given, and the largest size of an eigenvalue of their mean loss's
    Hessian, by power iteration. At other weights and of single rows both are larger.

    Args:
        trained: a single model.
        records: a few hundred rows: all are held in memory, and their gradients one by one.
        rounds: of power iteration.
    """
    objective = Objective(trained.module, row_losses(trained.recipe))
    (x, y), *_ = records.batches([torch.arange(len(records))])
    x = prepare(x, getattr(torch, trained.recipe.dtype))
    gradient = float(objective.gradients(x, y).norm(dim=1).max())
    v = torch.ones(objective.size, dtype=x.dtype, device=x.device)
    size = 0.0
    for _ in range(rounds):
        v = objective.hessian_product(x, y, v / v.norm()) / len(y)
        size = float(v.norm())
    return {"smoothness": estimated(size), "gradient": estimated(gradient)}
