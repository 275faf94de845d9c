"""How an unlearner moves the parameters, as far as an attacker can guess it from the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from expunge.core.protocols import Method
from expunge.core.trained import Trained
from expunge.learn.networks import SoftmaxRegression
from expunge.unlearn import GradientAscent

Order = Literal["first", "second"]


@dataclass(frozen=True, kw_only=True)
class Reaction:
    """How an unlearner moves the parameters; see `victim`.

    Attributes:
        order: ``first`` or ``second``.
        rate: tau, for ``first``.
        damping: for ``second``: added to H, in mean eigenvalues of H; networks need some, convex heads none.
    """

    order: Order = "second"
    rate: float = 1.0
    damping: float = 0.0

    @classmethod
    def of(cls, method: Method, trained: Trained) -> Reaction:
        """What an attacker expects of this method.

        Gradient ascent is first order: each row's gradient is stepped along `epochs` times, divided by the batch.
        Everything else is taken for what it tries to be, a way to the minimum on the retained rows. A guess for
        whatever stops on the way there: that is why a judge measures on the method itself.
        """
        if isinstance(method, GradientAscent):
            batch = method.batch_size or trained.recipe.batch_size
            return cls(order="first", rate=method.epochs * method.lr / batch)
        if softmax_layer(trained.module) is None:
            return cls(damping=1.0)
        # Without weight decay a softmax has no one minimum: adding a constant to all classes changes nothing.
        return cls(damping=0.0 if trained.recipe.weight_decay > 0 else 1e-6)


def softmax_layer(module: nn.Module) -> nn.Linear | None:
    """The one layer of a softmax regression; None for any other model."""
    if isinstance(module, SoftmaxRegression):
        return module.head
    return module if type(module) is nn.Linear and module.bias is not None else None
