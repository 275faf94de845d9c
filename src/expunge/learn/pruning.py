"""Pruning: which weights to take out of a network, and training with what is left.

A mask is a function of the recipe's coins and of what it was trained on, nothing else. Where training is part of how
a mask is found, the mask remembers the rows: exact retraining has to find it anew without the removed ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from expunge.core import coins
from expunge.core.errors import Misuse, Unsupported
from expunge.core.mask import Mask
from expunge.core.recipe import Pruning, Recipe
from expunge.core.records import Records
from expunge.core.trained import State, TrainingLog, copy_state
from expunge.learn.loop import NOTHING, Keep, Report, Tally, fit
from expunge.learn.models import head_of
from expunge.learn.resume import Saver

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def prunable(module: nn.Module) -> dict[str, Tensor]:
    """The weights that are pruned: those of all convolutions and linear layers but the head, biases excepted.

    Raises:
        Unsupported: if there are none.
    """
    head = head_of(module)[1]
    found = {
        f"{name}.weight" if name else "weight": layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, _LAYERS) and layer is not head
    }
    if not found:
        raise Unsupported("there is nothing to prune: the model is its head alone; use a deeper one, such as mlp")
    return found


def mask_of_zeros(module: nn.Module) -> Mask:
    """The mask that keeps every prunable weight that is zero now at zero."""
    return Mask({name: weight.detach() != 0 for name, weight in prunable(module).items()})


def magnitude_mask(module: nn.Module, sparsity: float) -> Mask:
    """Keep the largest weights by absolute value, over all layers together (Han et al., 2015)."""
    return _largest({name: weight.detach().abs() for name, weight in prunable(module).items()}, sparsity)


def random_mask(module: nn.Module, sparsity: float, rng: Generator) -> Mask:
    """Keep weights drawn uniformly; nothing is learnt from data or weights."""
    return _largest({name: torch.rand(w.shape, generator=rng) for name, w in prunable(module).items()}, sparsity)


def synflow_mask(module: nn.Module, shape: tuple[int, ...], sparsity: float, iterations: int = 100) -> Mask:
    """Keep the weights through which most flows, in some rounds of pruning; no data is read (Tanaka et al., 2020).

    Round k of K keeps ``(1 - sparsity)^(k / K)`` of the weights, those of the largest `flow`. The module is not
    written to. Cost: `iterations` forward and backward passes of one row, in float64.
    """
    if iterations < 1:
        raise Misuse(f"iterations must be >= 1, got {iterations}")
    work = _linear(module)
    mask = Mask({})
    for round_ in range(1, iterations + 1):
        mask = _largest(_flow(work, shape), 1 - (1 - sparsity) ** (round_ / iterations))
        mask.prune_(work)
    return mask


def flow(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    r"""SynFlow's score of each prunable weight: :math:`|\theta| \cdot \partial R / \partial |\theta|`, in float64.

    R is the sum of the outputs on a row of ones when every weight is replaced by its absolute value, every bias by
    zero and every normalisation by its scale, which the authors have for batch norm at its beginning. Then R is
    linear in each layer, and in a chain of layers the scores of each sum to R. Not with activations other than ReLU.
    """
    return _flow(_linear(module), shape)


def _flow(work: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    weights = prunable(work)
    row = torch.ones(1, *shape, dtype=torch.float64, device=next(iter(weights.values())).device)
    gradients = torch.autograd.grad(work(row).sum(), list(weights.values()))
    return {name: (weight * g).detach() for (name, weight), g in zip(weights.items(), gradients, strict=True)}


def _linear(module: nn.Module) -> nn.Module:
    """A copy with absolute weights, no biases and scales for norms: what SynFlow's scores are computed on."""
    work = copy.deepcopy(module).double().eval()
    for name, layer in list(work.named_modules()):
        if isinstance(layer, _NORMS):
            parent = work.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _Scale(layer.weight, last=isinstance(layer, nn.LayerNorm)))
    with torch.no_grad():
        for name, parameter in work.named_parameters():
            parameter.zero_() if name.endswith("bias") else parameter.abs_()
    return work


class _Scale(nn.Module):
    """A normalisation without what it normalises by."""

    def __init__(self, weight: Tensor | None, *, last: bool) -> None:
        super().__init__()
        self.scale = None if weight is None else nn.Parameter(weight.detach().clone())
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Channels times their scale; they lie along the second axis, those of a layer norm along the last ones."""
        if self.scale is None:
            return x
        return x * (self.scale if self.last else self.scale.reshape(-1, *[1] * (x.dim() - 2)))


def _largest(scores: Mapping[str, Tensor], sparsity: float) -> Mask:
    """Keep exactly ``n - round(sparsity * n)`` of all n entries, those of the largest scores; ties to the first."""
    if not 0 <= sparsity < 1:
        raise Misuse(f"sparsity must be >= 0 and < 1, got {sparsity}")
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    keep = len(flat) - round(sparsity * len(flat))
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(descending=True, stable=True)[: max(keep, 1)]] = True
    pieces = chosen.split([score.numel() for score in scores.values()])
    return Mask({name: piece.view(score.shape) for (name, score), piece in zip(scores.items(), pieces, strict=True)})


def fit_pruned(
    module: nn.Module,
    recipe: Recipe,
    records: Records,
    *,
    keep: Keep = NOTHING,
    saver: Saver | None = None,
    report: Report | None = None,
    tally: Tally | None = None,
) -> TrainingLog:
    """Train the module in place, sparse as the recipe's pruning says; else as `loop.fit`.

    Returns:
        What the last training left behind; `steps` and `rows_read` count all of them.

    Cost: one training by synflow or at random; by magnitude one dense training, and one from `rewind` on each round.
    """
    told: dict[str, Any] = {"saver": saver, "report": report, "tally": tally}
    pruning = recipe.pruning
    if pruning is None:
        raise Misuse("the recipe says nothing of pruning; use fit")
    if pruning.by != "magnitude":
        mask = _chosen_blindly(module, recipe, pruning)
        mask.prune_(module)
        return fit(module, recipe, records, mask=mask, keep=keep, **told)
    start, log = _dense_training(module, recipe, records, pruning, told)
    steps, rows = log.steps, log.rows_read
    for round_ in range(1, pruning.rounds + 1):
        mask = magnitude_mask(module, 1 - (1 - pruning.sparsity) ** (round_ / pruning.rounds))
        module.load_state_dict(dict(start))
        mask.prune_(module)
        log = fit(
            module,
            recipe,
            records,
            stage=f"sparse-{round_}",
            begin=pruning.rewind,
            epochs=recipe.epochs - pruning.rewind,
            mask=mask,
            keep=keep if round_ == pruning.rounds else NOTHING,
            **told,
        )
        steps, rows = steps + log.steps, rows + log.rows_read
    return replace(log, steps=steps, rows_read=rows)


def _chosen_blindly(module: nn.Module, recipe: Recipe, pruning: Pruning) -> Mask:
    if pruning.by == "synflow":
        return synflow_mask(module, tuple(recipe.model_args["shape"]), pruning.sparsity, pruning.iterations)
    return random_mask(module, pruning.sparsity, coins.child(coins.generator(recipe.seed), "pruning"))


def _dense_training(
    module: nn.Module, recipe: Recipe, records: Records, pruning: Pruning, told: dict[str, Any]
) -> tuple[State, TrainingLog]:
    """Train densely; the state after `rewind` epochs, and the log."""
    beginning = copy_state(module)
    every = pruning.rewind * math.ceil(len(records) / recipe.batch_size)
    log = fit(module, recipe, records, stage="dense", keep=Keep(every=every), **told)
    return log.checkpoints[every] if every else beginning, log
