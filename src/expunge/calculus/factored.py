"""Gradients of rows from one batched pass: what went into each layer, and the derivative by what came out of it.

A batched backward pass that stops at the layers' outputs needs no gradient of any weight; those of single rows follow
from it layer by layer (Goodfellow, 2015; Rochette et al., 2019). Linear layers on one vector a row stay in factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from expunge.calculus.objective import Objective
from expunge.calculus.pieces import Matrix, Outer, Piece, Pieces

Seen = dict[nn.Module, tuple[Tensor, Tensor]]
Maker = Callable[[Tensor, Tensor], Pieces]

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
_NEAR = {torch.float64: 1e-6}
"""How near two ways must come for each parameter, relative to its gradient's norm; other dtypes 1e-3."""
_ROWS = {True: 32, False: 512}
"""Rows a pass: of images few, as what convolutions read is copied once for each place of the kernel."""


def maker(objective: Objective, x: Tensor, y: Tensor) -> tuple[Maker, int]:
    """The quickest way to G that is right for this module, and how many numbers it keeps a row.

    By layers, if every parameter belongs to one linear, convolution or norm layer that is called once a pass with rows
    along the first axis. Whether that is so is not read off the code but tried: on the first two of these rows the
    gradients by each parameter must be those that differentiating one row at a time gives. Modules that do otherwise
    (attention, tied weights) go through `Objective.gradients`; the numbers are the same.
    """
    layers = _layers(objective)
    if layers is not None:
        x, y = x[:2], y[:2]
        trial = _pass(objective, layers, x, y)
        if trial is not None and _alike(trial, [objective.gradient(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]):
            return partial(_by_layers, objective, layers), trial.numbers // len(x)
    return partial(_by_rows, objective), objective.size


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


def _layers(objective: Objective) -> dict[str, tuple[nn.Module, str]] | None:
    """For each parameter the layer that it belongs to, and its name there; None if one belongs to no layer known."""
    answer: dict[str, tuple[nn.Module, str]] = {}
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


def _by_layers(objective: Objective, layers: dict[str, tuple[nn.Module, str]], x: Tensor, y: Tensor) -> Pieces:
    chunk = _ROWS[any(isinstance(layer, nn.Conv2d) for layer, _ in layers.values())]
    parts = [_pass(objective, layers, *rows) for rows in zip(x.split(chunk), y.split(chunk), strict=True)]
    whole = [part for part in parts if part is not None]
    return Pieces([_joined(pieces) for pieces in zip(*(part.pieces for part in whole), strict=True)], len(x))


def _joined(pieces: Sequence[Piece]) -> Piece:
    outer = [piece for piece in pieces if isinstance(piece, Outer)]
    if outer:
        return Outer(torch.cat([piece.b for piece in outer]), torch.cat([piece.a for piece in outer]))
    return Matrix(torch.cat([piece.matrix for piece in pieces if isinstance(piece, Matrix)]))


def _pass(objective: Objective, layers: dict[str, tuple[nn.Module, str]], x: Tensor, y: Tensor) -> Pieces | None:
    """G of a few rows; None if a layer is not called exactly once, or not with rows along its first axis."""
    seen = _derivatives(objective, {layer for layer, _ in layers.values()}, x, y)
    if seen is None:
        return None
    pieces = []
    for name, (layer, kind) in layers.items():
        pieces.append(_piece(layer, kind, *seen[layer], objective.places[name]))
    return Pieces(pieces, len(x))


def _derivatives(objective: Objective, layers: set[nn.Module], x: Tensor, y: Tensor) -> Seen | None:
    """What went into each layer, and the derivative of the summed losses by what came out."""
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    calls = []

    def note(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        calls.append(layer)
        inputs[layer] = args[0].detach()
        outputs[layer] = out if out.requires_grad else out.detach().requires_grad_()
        return outputs[layer].clone()  # so that an operation in place behind it changes a copy

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.enable_grad():
            losses = objective.losses(x, y)
            if len(calls) != len(layers) or any(len(one) != len(x) for one in (*inputs.values(), *outputs.values())):
                return None
            derivatives = torch.autograd.grad(losses.sum(), list(outputs.values()), materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: (inputs[layer], one) for layer, one in zip(outputs, derivatives, strict=True)}


def _piece(layer: nn.Module, kind: str, a: Tensor, b: Tensor, places: Tensor | None) -> Piece:
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
    """``sum over places of b a'`` for each place of the kernel: (n, outputs, inputs, height, width)."""
    high, wide = layer.kernel_size
    down, right = (int(by) for by in layer.padding)
    if layer.stride != (1, 1):
        patches = nn.functional.unfold(a, (high, wide), layer.dilation, (down, right), layer.stride)
        return b.flatten(2) @ patches.transpose(1, 2)
    padded = nn.functional.pad(a, (right, right, down, down + 1))  # a line more, for the last views to end in
    line = padded.shape[3]
    flat, lines = padded.flatten(2), nn.functional.pad(b, (0, line - b.shape[3])).flatten(2)
    answer = a.new_empty(high, wide, len(a), b.shape[1], a.shape[1])
    # With lines of one length, shifting the image is a view that begins elsewhere: nothing is copied for each place.
    for i in range(high):
        for j in range(wide):
            start = i * layer.dilation[0] * line + j * layer.dilation[1]
            torch.bmm(lines, flat[..., start : start + lines.shape[2]].transpose(1, 2), out=answer[i, j])
    return answer.permute(2, 3, 4, 0, 1)


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
