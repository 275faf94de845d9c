"""How much each of many rows moves what one cares about: inner products of the rows' gradients with a few vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.calculus.factored import Layers, derivatives, layered, piece_of, rows_a_pass
from expunge.calculus.objective import Objective
from expunge.core.errors import Misuse

SCRATCH = 1 << 20
"""Numbers that one step of a layer's product may hold beside its inputs: 4 or 8 MiB."""
_ROWS = 2048
_DENSE = 0.9
"""From this share of a layer's inputs on, leaving out those that no row of a block uses costs what it saves."""


def influence_scores(
    objective: Objective, batches: Iterable[tuple[Tensor, Tensor]], v: Float[Tensor, "p *columns"]
) -> Float[Tensor, "n *columns"]:
    """The inner product of every row's loss gradient with a vector, or with each column of a matrix.

    Row i's entry is ``<grad of row i's loss, v>``: how fast its loss grows along `v`. Losses are summed over rows, and
    hold no weight decay, as everywhere in `Objective`.

    Where every parameter belongs to a linear, convolution or norm layer (`factored.maker` says exactly when), one
    pass forward and one backward serves all columns: a linear layer's gradient of a row is ``b a'``, so that its
    product with V is ``b' (V a)``, and no gradient is made. Convolutions and layers on several vectors a row make the
    weight's gradients of a few rows at a time. All other modules go in forward mode, one pass a column. Both ways give
    the same numbers up to rounding.

    Args:
        objective: whose losses.
        batches: rows and labels, as the module reads them. Each is read once, in order; any may be empty.
        v: (p,) or (p, m), p the objective's size, in the parameters' dtype and on their device.

    Returns:
        (n,) or (n, m), rows in the order of the batches, without a graph.

    Cost: by layers, a linear layer needs n m multiply-adds a weight, about what one product of all rows' gradients with
    `v` needs once they exist. Memory is what a batch needs beside `v` and the answer, whatever n is.

    Raises:
        Misuse: if `v` has another length or dtype than the parameters, or more than two axes.

    Not guaranteed: that a module whose way depends on the rows' values is seen through. The first two rows are tried.
    """
    _check(objective, v)
    columns = v if v.dim() == 2 else v[:, None]
    parts = [_of_batch(objective, x, y, columns) for x, y in batches if len(x)]
    whole = torch.cat(parts) if parts else columns.new_zeros(0, columns.shape[1])
    return whole if v.dim() == 2 else whole[:, 0]


def _check(objective: Objective, v: Tensor) -> None:
    if v.dim() not in (1, 2) or len(v) != objective.size:
        raise Misuse(
            f"v must be ({objective.size},) or ({objective.size}, columns), one row a parameter entry of the "
            f"objective, got {tuple(v.shape)}"
        )
    dtype = next(one.dtype for name, one in objective.module.named_parameters() if name in objective.names)
    if v.dtype != dtype:
        raise Misuse(f"v must be {dtype} as the parameters are, got {v.dtype}; convert one of them")


def _of_batch(objective: Objective, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    found = layered(objective, x, y) if v.shape[1] else None
    if found is None:
        return _in_forward_mode(objective, x, y, v)
    chunk = rows_a_pass(found[0], vectors=_ROWS)
    rows = zip(x.split(chunk), y.split(chunk), strict=True)
    return torch.cat([_by_layers(objective, found[0], *some, v) for some in rows])


def _in_forward_mode(objective: Objective, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """(n, m) by one pass a column."""
    answer = v.new_empty(len(x), v.shape[1])
    for column in range(v.shape[1]):
        answer[:, column] = objective.scores(x, y, v[:, column]).detach()
    return answer


def _by_layers(objective: Objective, layers: Layers, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    seen = derivatives(objective, layers, x, y)
    if seen is None:
        return _in_forward_mode(objective, x, y, v)
    answer = v.new_zeros(len(x), v.shape[1])
    cut = v.split([len(piece) for piece in objective.pieces(v[:, 0]).values()])
    for (name, (layer, kind)), part in zip(layers.items(), cut, strict=True):
        answer += _of_parameter(layer, kind, *seen[layer], objective.places[name], part)
    return answer


def _of_parameter(layer: nn.Module, kind: str, a: Tensor, b: Tensor, places: Tensor | None, v: Tensor) -> Tensor:
    """(n, m): what one parameter's entries add, of a layer's inputs and its outputs' derivatives."""
    if places is None and kind == "weight":
        if isinstance(layer, nn.Linear) and v.shape[1] == 1:
            return (nn.functional.linear(a, v.reshape(layer.weight.shape)) * b).flatten(1).sum(1, keepdim=True)
        if isinstance(layer, nn.Linear) and a.dim() == 2:
            return _of_outer(a, b, v)
        if isinstance(layer, nn.Conv2d) and v.shape[1] == 1:
            kernel = v.reshape(layer.weight.shape)
            out = nn.functional.conv2d(a, kernel, None, layer.stride, layer.padding, layer.dilation)
            return (out * b).flatten(1).sum(1, keepdim=True)
    rows = max(1, SCRATCH // getattr(layer, kind).numel())
    parts = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([piece_of(layer, kind, *some, places).times(v) for some in parts])


def _of_outer(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """``b[i]' V a[i]`` of each row i and each column's V, a few of the outputs at a time.

    The longer side goes into the matrix product, so that what it makes, which is to be read once more, is small.
    """
    rows, columns = len(a), v.shape[1]
    by_output = v.reshape(b.shape[1], a.shape[1], columns)
    if a.shape[1] < b.shape[1]:
        a, b, by_output = b, a, by_output.transpose(0, 1)
    used = a.any(0).nonzero()[:, 0]
    if thin := len(used) < _DENSE * a.shape[1]:
        a = a.index_select(1, used)
    answer = v.new_zeros(rows, columns)
    few = max(1, SCRATCH // (rows * columns))
    for some, derivatives_by in zip(by_output.split(few), b.split(few, 1), strict=True):
        held = some.index_select(1, used) if thin else some
        made = a @ held.transpose(0, 1).reshape(a.shape[1], -1)
        answer += torch.bmm(derivatives_by[:, None], made.view(rows, -1, columns))[:, 0]
    return answer
