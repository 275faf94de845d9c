"""Gradients of rows from one batched pass: what went into each layer, and the derivative by what came out of it.

A batched backward pass that stops at the layers' outputs needs no gradient of any weight; those of single rows follow
from it layer by layer (Goodfellow, 2015; Rochette et al., 2019). Linear layers on one vector a row stay in factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from expunge.calculus.objective import Objective
from expunge.calculus.pieces import Matrix, Outer, Piece, Pieces

Layers = dict[str, tuple[nn.Module, str]]
"""For each parameter of an objective the layer that it belongs to, and its name there."""
Seen = dict[nn.Module, tuple[Tensor, Tensor]]
"""What went into each layer, and the derivative of the summed losses by what came out."""
Maker = Callable[[Tensor, Tensor], Pieces]

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
_NEAR = {torch.float64: 1e-6}
"""How near two ways must come for each parameter, relative to its gradient's norm; other dtypes 1e-3."""
_ROWS = {True: 32, False: 512}
"""Rows a pass: of images few, so that what a pass allocates is small enough to be used again by the next."""


def maker(objective: Objective, x: Tensor, y: Tensor) -> tuple[Maker, int]:
    """The quickest way to G that is right for this module, and how many numbers it keeps a row.

    By layers, if every parameter belongs to one linear, convolution or norm layer that is called once a pass with rows
    along the first axis. Whether that is so is not read off the code but tried, once for an objective: on the first
    two of its rows the gradients by each parameter must be those that differentiating one row at a time gives. Modules
    that do otherwise (attention, tied weights) go through `Objective.gradients`; the numbers are the same.
    """
    found = layered(objective, x, y)
    if found is None:
        return partial(_by_rows, objective), objective.size
    return partial(_by_layers, objective, found[0]), found[1]


def layered(objective: Objective, x: Tensor, y: Tensor) -> tuple[Layers, int] | None:
    """The layers by which `maker` goes, and how many numbers G keeps a row by them; None if it cannot.

    What was found on two rows is remembered. One row alone is tried each time: rows and another axis of length one
    look the same.
    """
    layers = _layers(objective)
    if layers is None:
        return None
    numbers = _TRIED[objective] if objective in _TRIED else _numbers(objective, layers, x[:2], y[:2])
    if len(x) > 1:
        _TRIED[objective] = numbers
    return None if numbers is None else (layers, numbers)


_TRIED: WeakKeyDictionary[Objective, int | None] = WeakKeyDictionary()


def _numbers(objective: Objective, layers: Layers, x: Tensor, y: Tensor) -> int | None:
    """How many numbers G keeps a row by layers; None if it is another G."""
    trial = _pass(objective, layers, x, y)
    if trial is None or not _alike(trial, [objective.gradient(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]):
        return None
    return trial.numbers // len(x)


def _alike(trial: Pieces, right: Sequence[Tensor]) -> bool:
    eye = torch.eye(len(right), dtype=right[0].dtype, device=right[0].device)
    found, wanted = torch.stack([trial.transposed(row) for row in eye]), torch.stack(list(right))
    whole, near, widths = wanted.norm(), _NEAR.get(wanted.dtype, 1e-3), [piece.width for piece in trial.pieces]
    # Where all are zero, nothing was tried. A gradient that is zero but for rounding is alike only to that.
    rounding = 100 * torch.finfo(wanted.dtype).eps * whole
    pairs = zip(found.split(widths, 1), wanted.split(widths, 1), strict=True)
    return bool(whole > 0) and all(bool((a - b).norm() <= near * b.norm() + rounding) for a, b in pairs)


def _by_rows(objective: Objective, x: Tensor, y: Tensor) -> Pieces:
    return Pieces([Matrix(objective.gradients(x, y))], len(x))


def _layers(objective: Objective) -> Layers | None:
    """For each parameter its layer, and its name there; None if one belongs to no layer known."""
    answer: Layers = {}
    owners: dict[int, int] = {}
    for prefix, layer in objective.module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
            if _known(layer) and owners[id(parameter)] == 1:
                answer[f"{prefix}.{name}" if prefix else name] = (layer, name)
    held = dict(objective.module.named_parameters())
    if any(name not in answer or owners[id(held[name])] > 1 for name in objective.names):
        return None
    return {name: answer[name] for name in objective.names}


def _known(layer: nn.Module) -> bool:
    # Subclasses may do anything with their weights: that of attention's output is never called.
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear or type(layer) in _NORMS


def _by_layers(objective: Objective, layers: Layers, x: Tensor, y: Tensor) -> Pieces:
    chunk = rows_a_pass(layers)
    store = _Store(len(x))
    for rows in zip(x.split(chunk), y.split(chunk), strict=True):
        part = _pass(objective, layers, *rows)
        if part is not None:
            store.add(part.pieces)
    return store.joined()


def rows_a_pass(layers: Layers, vectors: int = _ROWS[False]) -> int:
    """How many rows go through these layers at a time: few images, so many vectors."""
    return _ROWS[True] if any(isinstance(layer, nn.Conv2d) for layer, _ in layers.values()) else vectors


class _Store:
    """Pieces of more and more rows; a matrix is made once, for all rows, so that each part can go at once."""

    def __init__(self, rows: int) -> None:
        self.rows, self.filled = rows, 0
        self.matrices: dict[int, Tensor] = {}
        self.outers: dict[int, list[Outer]] = {}

    def add(self, pieces: Sequence[Piece]) -> None:
        """The same pieces of the next rows."""
        count = 0
        for place, piece in enumerate(pieces):
            if isinstance(piece, Outer):
                self.outers.setdefault(place, []).append(piece)
                count = len(piece.a)
            elif isinstance(piece, Matrix):
                count = len(piece.matrix)
                if place not in self.matrices:
                    self.matrices[place] = piece.matrix.new_empty(self.rows, piece.width)
                self.matrices[place][self.filled : self.filled + count] = piece.matrix
        self.filled += count

    def joined(self) -> Pieces:
        """All rows."""
        whole: dict[int, Piece] = {place: Matrix(matrix) for place, matrix in self.matrices.items()}
        for place, parts in self.outers.items():
            whole[place] = Outer(torch.cat([one.b for one in parts]), torch.cat([one.a for one in parts]))
        return Pieces([whole[place] for place in sorted(whole)], self.rows)


def _pass(objective: Objective, layers: Layers, x: Tensor, y: Tensor) -> Pieces | None:
    """G of a few rows; None if a layer is not called exactly once, or not with rows along its first axis."""
    seen = derivatives(objective, layers, x, y)
    if seen is None:
        return None
    pieces = []
    for name, (layer, kind) in layers.items():
        pieces.append(piece_of(layer, kind, *seen[layer], objective.places[name]))
    return Pieces(pieces, len(x))


def derivatives(objective: Objective, layers: Layers, x: Tensor, y: Tensor) -> Seen | None:
    """One pass forward and one backward that stops at the layers' outputs.

    None if a layer is not called exactly once, or not with rows along its first axis.
    """
    hooked = {layer for layer, _ in layers.values()}
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    calls = []

    in_place = any(getattr(part, "inplace", False) for part in objective.module.modules())

    def note(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        calls.append(layer)
        inputs[layer] = args[0].detach()
        inner = out.requires_grad
        outputs[layer] = out if inner else out.detach().requires_grad_()
        # An operation in place behind it must change a copy. One that no module owns up to is found by the trial.
        return outputs[layer].clone() if in_place or not inner else outputs[layer]

    hooks = [layer.register_forward_hook(note) for layer in hooked]
    try:
        with torch.enable_grad():
            losses = objective.losses(x, y)
            if len(calls) != len(hooked) or any(len(one) != len(x) for one in (*inputs.values(), *outputs.values())):
                return None
            found = torch.autograd.grad(losses.sum(), list(outputs.values()), materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: (inputs[layer], one) for layer, one in zip(outputs, found, strict=True)}


def piece_of(layer: nn.Module, kind: str, a: Tensor, b: Tensor, places: Tensor | None) -> Piece:
    """The columns of one parameter of a layer, of its inputs and its outputs' derivatives."""
    if isinstance(layer, nn.Linear) and kind == "weight" and a.dim() == 2:
        if places is None:
            return Outer(b, a)
        return Matrix(b[:, places // a.shape[1]] * a[:, places % a.shape[1]])
    if isinstance(layer, nn.Linear):
        whole = b.flatten(1, -2).sum(1) if kind == "bias" and b.dim() > 2 else b
        if kind == "weight":
            whole = b.flatten(1, -2).transpose(1, 2) @ a.flatten(1, -2)
    elif isinstance(layer, nn.Conv2d):
        whole = b.flatten(2).sum(2) if kind == "bias" else _of_convolution(layer, a, b)
    else:
        whole = _of_norm(layer, kind, a, b)
    flat = whole.reshape(len(a), -1)
    return Matrix(flat if places is None else flat[:, places])


def _of_convolution(layer: nn.Conv2d, a: Tensor, b: Tensor) -> Tensor:
    """(n, outputs, inputs, height, width): the weight's gradient with each row a group of one wide convolution."""
    rows, outputs, inputs = len(a), b.shape[1], a.shape[1]
    flat: Tensor = conv2d_weight(
        a.reshape(1, rows * inputs, *a.shape[2:]),
        (rows * outputs, inputs, *layer.kernel_size),
        b.reshape(1, rows * outputs, *b.shape[2:]),
        layer.stride,
        layer.padding,
        layer.dilation,
        rows,
    )
    return flat.view(rows, outputs, inputs, *layer.kernel_size)


def _of_norm(layer: nn.Module, kind: str, a: Tensor, b: Tensor) -> Tensor:
    by = b if kind == "bias" else b * _normalised(layer, a)
    if isinstance(layer, nn.LayerNorm):
        lead = by.dim() - len(layer.normalized_shape)
        return by.reshape(len(by), -1, *by.shape[lead:]).sum(1)
    return by.reshape(len(by), by.shape[1], -1).sum(2)


def _normalised(layer: nn.Module, a: Tensor) -> Tensor:
    if isinstance(layer, nn.GroupNorm):
        return nn.functional.group_norm(a, layer.num_groups, eps=layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return nn.functional.batch_norm(a, layer.running_mean, layer.running_var, eps=layer.eps)
    raise TypeError(type(layer).__name__)
