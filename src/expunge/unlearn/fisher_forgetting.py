"""Adding noise where the retained rows do not mind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Need
from expunge.core.trained import Trained
from expunge.unlearn.dampening import Directions, check_rows, mean_squares
from expunge.unlearn.method import Done, Method, Task


@dataclass(frozen=True, kw_only=True)
class FisherForgetting(Method):
    r"""Add Gaussian noise to every parameter, the more the less the retained rows' predictions depend on it.

    Variance of parameter j of the p that are not pruned:
    :math:`\frac{2 \alpha}{p} \min\bigl(\frac{1}{F_j}, \frac{m}{\bar F}\bigr)`, with m for
    `most` and :math:`\bar F` the mean of F. F is the diagonal of the Fisher matrix of the retained rows: the mean over
    rows of :math:`\sum_y p_y (\partial_j \log p_y)^2` under the model's own distribution, all classes weighted by their
    probability (squared error: a Gaussian of variance 1/2 about each output). Noise of variance v costs a row
    :math:`v F_j / 2` nats of KL divergence to second order, hence the unit of alpha.

    The removed rows are never read: what is forgotten is what the retained rows do not need, whatever was asked for.
    No class is treated apart: the public code sets the weights of a class to zero, and that does its forgetting.

    Differs: the paper's bound asks for variances in ``F^-1/2``, its code takes ``1 / F`` as here; the public code
    squares mean gradients of batches, and gives some layers ten times the noise by their shape.

    Noise alone brought no model nearer to retraining in any setting tried: on the digits of `expunge.testing` (alpha
    1e-3 to 3, `most` 1 to 1,000; wrong labels, or a class removed) the gain was negative or within its error, and on
    MNIST accuracy on the removed class fell with that on the others. The default costs half a point of MNIST accuracy.

    The noise is named by `rng`, the parameter and how many rows had gone before: who knows `rng` can subtract it.
    Cost: `rows` retained rows, one gradient for each class.

    Attributes:
        alpha: KL divergence, in nats a retained row and to second order, that the noise costs where `most` caps none.
        most: cap on a parameter's variance, in units of that of a parameter of average Fisher information.
        rows: read at most so many, chosen by coins; None reads all.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "Golatkar, Achille and Soatto, 2020"
    not_guaranteed: ClassVar[str] = "any forgetting: what the retained rows depend on as well stays"
    alpha: float = 0.01
    most: float = 10.0
    rows: int | None = 2_000

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("most", self.most)):
            if not 0 < value < math.inf:
                raise Misuse(f"{name} must be > 0, got {value}")
        check_rows(self.rows)

    @property
    def learns_new(self) -> bool:
        """Never: it trains on nothing."""
        return False

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        fisher = mean_squares(task, task.retain, scores(task.trained), rng, "fisher", self.rows)
        if task.moves is not None:  # a pruned weight takes no noise, and none of alpha
            free = task.moves.moves
            fisher = {name: torch.where(free[name], f, math.inf) if name in free else f for name, f in fisher.items()}
        spread = self.variances(fisher)
        held = dict(task.trained.module.named_parameters())
        with torch.no_grad():
            for name, variance in spread.items():
                coins = child(rng, "fisher forgetting", name, len(task.trained.gone))
                noise = torch.randn(variance.shape, generator=coins, dtype=torch.float64).to(variance.device)
                held[name].add_((variance.sqrt() * noise).to(held[name].dtype))
        return Done(trained=task.trained)

    def variances(self, fisher: dict[str, Tensor]) -> dict[str, Tensor]:
        """Variance of the noise of each parameter, of the diagonal Fisher information by parameter.

        Entries of infinite information may not move: they get no noise, and count for neither p nor the mean.

        Raises:
            Unsupported: if it is zero or not a number: no prediction depends on any parameter.
        """
        free = torch.cat([one[~one.isposinf()] for one in fisher.values()])
        size, average = len(free), float(free.mean())
        if not 0 < average < math.inf:
            raise Unsupported(f"the mean Fisher information is {average}, so that noise has no scale; use fine-tune")
        return {name: 2 * self.alpha / size * (1 / one).clamp(max=self.most / average) for name, one in fisher.items()}


def scores(trained: Trained) -> Directions:
    """Directions at the outputs whose squares sum to the Fisher matrix of the model's own distribution, for each row.

    Classes: ``sqrt(p_y) (p - e_y)`` for each y. Squared error: ``sqrt(2) e_k`` for each output k.
    """

    def of_classes(outputs: Tensor, _: Tensor) -> Tensor:
        p = outputs.softmax(1)
        eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
        return p.T.sqrt()[:, :, None] * (p[None] - eye[:, None])

    def of_targets(outputs: Tensor, _: Tensor) -> Tensor:
        eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        return math.sqrt(2) * eye[:, None].expand(-1, len(outputs), -1)

    return of_classes if trained.recipe.loss == "cross_entropy" else of_targets
