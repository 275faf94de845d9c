"""The curvature of a softmax regression, written out; and gradients by the inputs, which need it in one direction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.calculus import Objective
from expunge.calculus.head import HeadObjective
from expunge.calculus.objective import second_derivatives


def softmax_curvature(
    layer: nn.Linear,
    objective: Objective,
    rows: tuple[Tensor, Tensor, Float[Tensor, " n"]],
    *,
    weight_decay: float,
    exact: bool,
) -> Float[Tensor, "p p"]:
    """The Hessian of the rows' mean loss, in float64, in the order of the layer's parameters.

    Args:
        layer: the model's one layer.
        objective: its losses.
        rows: as the model reads them, their labels and weights.
        weight_decay: added to the diagonal.
        exact: take the weights as they are, at the cost of n p^2 numbers in memory at worst; else those below one half
            for 0 and the others for 1, in blocks.
    """
    x, y, weights = rows
    features = torch.cat([x.reshape(len(x), -1).double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    if exact:
        whole = _weighted(objective, x, features, weights.double())
    else:
        head = HeadObjective(features, y, outputs=layer.out_features, weight_decay=0.0, keep=weights >= 0.5)
        w = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1).double()
        whole = head.hessian(w) * (head.count / len(x))
    whole.diagonal().add_(weight_decay)
    own = _weights_then_biases(layer.out_features, features.shape[1])
    return whole[own][:, own]


def input_gradient(
    objective: Objective,
    x: Tensor,
    y: Tensor,
    v: Float[Tensor, " p"],
    *,
    at: Float[Tensor, " p"] | None = None,
    weights: Float[Tensor, " n"] | None = None,
) -> Tensor:
    """By the inputs, as the model reads them: the gradient of ``sum_i w_i <gradient of row i, v>``.

    Reverse over forward, so that nothing of the size of a Hessian is built. Cost: one mixed second derivative.

    Args:
        objective: the losses of rows.
        x: the rows.
        y: their labels.
        v: a vector of parameters.
        at: the parameters; None: the model's own.
        weights: of the rows; None: all 1.
    """
    here = objective.vector() if at is None else at

    def along(rows: Tensor) -> Tensor:
        lost: Tensor = torch.func.jvp(lambda vector: objective.losses(rows, y, vector), (here,), (v,))[1]
        return lost.sum() if weights is None else torch.dot(weights, lost)

    with second_derivatives():
        gradient: Tensor = torch.func.grad(along)(x)
    return gradient


def _weighted(objective: Objective, x: Tensor, features: Tensor, weights: Tensor) -> Tensor:
    """The exact Hessian of a small model, rows weighted by any number, laid out row after row."""
    p = torch.softmax(objective.outputs(objective.vector(), x).double(), 1)
    slopes = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) * weights[:, None, None]
    blocks = torch.einsum("nab,ni,nj->aibj", slopes, features, features) / len(x)
    return blocks.reshape(objective.size, objective.size)


def _weights_then_biases(outputs: int, width: int) -> Tensor:
    """Places in a matrix laid out row after row, biases last, in the order of a linear layer's parameters."""
    places = torch.arange(outputs * width).reshape(outputs, width)
    return torch.cat([places[:, :-1].reshape(-1), places[:, -1]])
