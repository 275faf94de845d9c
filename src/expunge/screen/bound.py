r"""How far a step can raise a probe's loss at most, and when that cannot turn its prediction (statement T1).

If a probe's loss is L-smooth, any move D of the parameters changes it by at most
:math:`\langle \nabla \ell, D \rangle + \tfrac{L}{2} \|D\|^2`. A first-order step over a requested row, D = a g, changes
it by at most :math:`a \|\nabla \ell\| \|g\| |\cos| + \tfrac{a^2 L}{2} \|g\|^2`, and strictly lowers it if the gradients
oppose each other and :math:`a L < 2 |\cos| \|\nabla \ell\| / \|g\|` (sufficient, not necessary).

A probe that is predicted wrongly has at most half of the probability on its class, so that its cross-entropy is at
least log 2: while the bound is less than log 2 minus its loss now, the request is harmless for this probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.func import jvp

from expunge.core.errors import Misuse, Unsupported
from expunge.core.records import Records
from expunge.learn.models import features_of, head_of
from expunge.screen.scene import Scene

LOG2 = math.log(2.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """What a move of the parameters can do to each probe.

    Attributes:
        value: (m,) most that the probe's loss can rise.
        room: (m,) what it can rise by before the prediction can turn; negative where it is not safe now.
        basis: ``proved`` if the smoothness is, ``estimated`` if the curvature at the deployed model stands for it.
    """

    value: Tensor
    room: Tensor
    basis: Literal["proved", "estimated"]

    @property
    def harmless(self) -> Tensor:
        """(m,) probes that the move cannot turn; said with certainty only where `basis` is ``proved``."""
        return self.value < self.room

    def __str__(self) -> str:
        many = int(self.harmless.sum())
        word = "cannot" if self.basis == "proved" else "should not"
        return f"{word} turn {many} of {len(self.value)} probes (bound on their loss, {self.basis})"


def smoothness(features: Tensor) -> Tensor:
    r"""(n,) smoothness of each row's cross-entropy in (W, b) of a linear softmax head: :math:`(\|h\|^2 + 1) / 2`.

    The Hessian is :math:`(\mathrm{diag}(p) - p p^\top) \otimes (h, 1)(h, 1)^\top`. For a unit vector v,
    :math:`v^\top (\mathrm{diag}(p) - p p^\top) v` is the variance of :math:`v_Y`, Y drawn from p, which is at most
    :math:`(\max v - \min v)^2 / 4 \le 2 / 4` (Popoviciu; two entries of a unit vector differ by at most the root
    of 2). It holds at every p, so everywhere.
    """
    return (features.square().sum(1) + 1) / 2


def step_bound(slope: Tensor, length: Tensor | float, smooth: Tensor) -> Tensor:
    """(m,) most that losses of this smoothness rise along a move of this length, `slope` their gradients along it."""
    return slope + smooth / 2 * length**2


def first_order_bound(step: float, probe: Tensor, row: Tensor, cosine: Tensor, smooth: Tensor) -> Tensor:
    """Most that a first-order step over a row changes a probe's loss, from their gradients' norms and the cosine."""
    if not step >= 0:
        raise Misuse(f"the step must be >= 0, got {step}")
    return step * probe * row * cosine.abs() + step**2 * smooth * row.square() / 2


def surely_lowers(step: float, probe: Tensor, row: Tensor, cosine: Tensor, smooth: Tensor) -> Tensor:
    """Whether ``theta - step g`` surely lowers a loss, g at this cosine to its gradient: sufficient, not necessary."""
    return (cosine > 0) & (step * smooth * row < 2 * cosine * probe)


def probe_bounds(scene: Scene, probes: Records, move: Tensor) -> Bounds:
    """What this move of all parameters can do to the probes, up to rounding in the model's dtype.

    Cost: two forward passes in forward mode.

    Raises:
        Unsupported: for targets that are numbers, where no loss turns a prediction.
    """
    if scene.trained.recipe.loss != "cross_entropy":
        raise Unsupported("bounds on predictions need cross-entropy; of numbers look at the influence on the loss")
    x, y = next(scene.batches(probes, len(probes)))
    objective, here = scene.objective, scene.objective.vector()

    def along(t: Tensor) -> Tensor:
        return objective.losses(x, y, here + t * move)

    zero, one = here.new_zeros(()), here.new_ones(())
    losses, slope = jvp(along, (zero,), (one,))[:2]
    if only_head(scene):
        value, basis = step_bound(slope, float(move.norm()), smoothness(features_of(scene.module, x))), "proved"
    else:
        curved = jvp(lambda t: jvp(along, (t,), (one,))[1], (zero,), (one,))[1]
        value, basis = slope + curved.abs() / 2, "estimated"
    room = LOG2 - losses.detach()
    return Bounds(value=value.detach(), room=room, basis="proved" if basis == "proved" else "estimated")


def only_head(scene: Scene) -> bool:
    """Whether the parameters are those of one linear layer that makes the outputs, so that the features are fixed."""
    if not scene.headed:
        return False
    head = head_of(scene.module)[1]
    mine = {id(parameter) for parameter in head.parameters()}
    return all(id(one) in mine for one in scene.module.parameters()) and head.bias is not None
