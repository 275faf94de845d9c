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

import numpy as np
import torch
from torch import Generator, Tensor, nn

from expunge.core import coins
from expunge.core.errors import Misuse, Unsupported
from expunge.core.mask import Mask
from expunge.core.recipe import Pruning, Recipe
from expunge.core.records import Records
from expunge.core.trained import State, TrainingLog, copy_state, device_of
from expunge.learn.loop import NOTHING, Keep, Report, Tally, exact_kernels, fit
from expunge.learn.models import head_of
from expunge.learn.resume import Saver

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_BY_CHANNEL = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_BY_LAST = (nn.LayerNorm, nn.RMSNorm)


def prunable(module: nn.Module) -> dict[str, Tensor]:
    """The weights that are pruned: those of all convolutions and linear layers but the head, biases excepted.

    A weight that layers share is named once; one that is shared with the head is not pruned. Weights that no such
    layer holds are not pruned either, an attention's joint projection among them.

    Raises:
        Unsupported: if there are none, or a layer's weight is computed from others.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _LAYERS)]
    if not all(isinstance(layer.weight, nn.Parameter) for layer in layers):
        raise Unsupported("a layer's weight is computed from others and cannot be pruned; remove the parametrisation")
    head = head_of(module)[1].weight
    wanted = {id(layer.weight) for layer in layers if layer.weight is not head}
    found: dict[str, Tensor] = {name: one for name, one in module.named_parameters() if id(one) in wanted}
    if not found:
        raise Unsupported("there is nothing to prune: the model is its head alone; use a deeper one, such as mlp")
    return found


def mask_of_zeros(module: nn.Module) -> Mask:
    """The mask that keeps every prunable weight that is zero now at zero."""
    return Mask({name: weight.detach() != 0 for name, weight in prunable(module).items()})


def magnitude_mask(module: nn.Module, sparsity: float, *, within: Mask | None = None) -> Mask:
    """Keep the largest weights by absolute value, over all layers together (Han et al., 2015).

    Args:
        module: not written to.
        sparsity: share of the prunable weights to take out, counted exactly.
        within: a mask found before; what it took out stays out, and counts.
    """
    return _largest({name: weight.detach().abs() for name, weight in prunable(module).items()}, sparsity, within)


def random_mask(module: nn.Module, sparsity: float, rng: Generator, *, within: Mask | None = None) -> Mask:
    """Keep weights drawn uniformly; nothing is learnt from data or weights. Draws from `rng`, which is of the CPU."""
    weights = prunable(module)
    scores = {name: torch.rand(one.shape, generator=rng, dtype=torch.float64) for name, one in weights.items()}
    return _largest(scores, sparsity, within)


def synflow_mask(
    module: nn.Module, shape: tuple[int, ...], sparsity: float, iterations: int = 100, *, within: Mask | None = None
) -> Mask:
    """Keep the weights through which most flows, in some rounds of pruning; no data is read (Tanaka et al., 2020).

    Round k of K keeps ``(1 - sparsity)^(k / K)`` of the weights, those of the largest `flow`. The module is not
    written to. In a chain no layer loses all its weights; a residual branch may, for the shortcut carries the flow (of
    ResNet-20 at 99 %, two on images of 16 x 16 pixels and none on 28 x 28).

    Cost: `iterations` forward and backward passes of one row, in float64.

    Raises:
        Unsupported: if nothing flows through the network, at its beginning or with what is left of it.
    """
    if iterations < 1:
        raise Misuse(f"iterations must be >= 1, got {iterations}")
    with exact_kernels(device_of(module)):
        work = _linear(module)
        for round_ in range(1, iterations + 1):
            within = _largest(_flow(work, shape), _share(sparsity, round_, iterations), within)
            within.prune_(work)
        _flow(work, shape)  # refuses a mask that has cut the network through
    return within if within is not None else Mask({})


def flow(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    r"""SynFlow's score of each prunable weight: :math:`|\theta| \cdot \partial R / \partial |\theta|`, in float64.

    R is the sum of the outputs on a row of ones when every weight is replaced by its absolute value, every parameter
    named bias by zero and every normalisation by its scale, which the authors have for batch norm at its beginning.
    Then R is linear in each layer, and in a chain of layers the scores of each sum to R. Of activations, ReLU alone
    is linear then; with others the scores mean less.

    Raises:
        Unsupported: if nothing flows, or the network reads no rows of floats.
    """
    return _flow(_linear(module), shape)


def _flow(work: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    weights = prunable(work)
    row = torch.ones(1, *shape, dtype=torch.float64, device=device_of(work))
    try:
        total = work(row).sum()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise Unsupported(f"the network reads no row of ones in float64 ({reason}); prune by magnitude") from None
    passed = float(total.detach())
    if not 0 < passed < math.inf:
        raise Unsupported(
            f"nothing flows through the network ({passed:g}): a layer is zero, or too little of it is left; "
            "lower the sparsity, or prune by magnitude"
        )
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True, materialize_grads=True)
    return {name: (weight * g).detach() for (name, weight), g in zip(weights.items(), gradients, strict=True)}


def _linear(module: nn.Module) -> nn.Module:
    """A copy with absolute weights, no biases and scales for norms: what SynFlow's scores are computed on."""
    prunable(module)  # refuses what is nothing but a norm, before the norms are replaced
    work = copy.deepcopy(module).double().eval().requires_grad_(True)
    scales: dict[nn.Module, nn.Module] = {}
    for name, layer in list(work.named_modules(remove_duplicate=False)):
        if name and isinstance(layer, (*_BY_CHANNEL, *_BY_LAST)):
            scale = scales.setdefault(layer, _Scale(layer.weight, last=isinstance(layer, _BY_LAST)))
            setattr(work.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], scale)
    with torch.no_grad():
        for name, parameter in work.named_parameters():
            parameter.zero_() if name.endswith("bias") else parameter.abs_()
    return work


class _Scale(nn.Module):
    """A normalisation without what it normalises by."""

    def __init__(self, weight: nn.Parameter | None, *, last: bool) -> None:
        super().__init__()
        self.scale = weight
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Channels times their scale; they lie along the second axis, those of a layer norm along the last ones."""
        if self.scale is None:
            return x
        return x * (self.scale if self.last else self.scale.reshape(-1, *[1] * (x.dim() - 2)))


def _share(sparsity: float, round_: int, rounds: int) -> float:
    """What is out after this round, of rounds that each take the same share of what is left."""
    return sparsity if round_ == rounds else 1 - (1 - sparsity) ** (round_ / rounds)


def _largest(scores: Mapping[str, Tensor], sparsity: float, within: Mask | None = None) -> Mask:
    """Keep ``n - round(sparsity * n)`` of all n entries, those of the largest scores; ties to the first.

    What `within` takes out is out, and counted first.
    """
    if not 0 <= sparsity < 1:
        raise Misuse(f"sparsity must be >= 0 and < 1, got {sparsity}")
    flat = _flat(scores).double()
    if not bool(torch.isfinite(flat).all()):
        raise Misuse("weights that are not finite cannot be told apart; train with a lower lr first")
    if within is not None:
        flat[~_flat({name: within.moves[name] for name in scores})] = -1.0
    keep = max(len(flat) - round(sparsity * len(flat)), 1)
    least = float(np.partition(flat.numpy(), len(flat) - keep)[len(flat) - keep])
    chosen = flat > least
    ties = (flat == least).nonzero().squeeze(1)
    chosen[ties[: keep - int(chosen.sum())]] = True
    chosen &= flat >= 0
    pieces = chosen.split([score.numel() for score in scores.values()])
    return Mask({name: piece.view(score.shape) for (name, score), piece in zip(scores.items(), pieces, strict=True)})


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries in one row, on the CPU, where the choice among equals is the same everywhere."""
    return torch.cat([tensor.detach().reshape(-1).cpu() for tensor in tensors.values()])


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

    By magnitude, the trainings are the stages ``dense``, ``sparse-1`` and so on. Each has an order of rows and dropout
    coins of its own, also after rewinding, as in Frankle et al. (2020), who draw the noise of each training anew; its
    learning rate is that of the epochs that it repeats.

    Returns:
        What the last training left behind: its losses, and what `keep` asks for, in steps counted from where it began.
        `steps` and `rows_read` alone count all trainings.

    Cost: one training by synflow or at random; by magnitude one dense training, and one from `rewind` on each round.
    """
    told: dict[str, Any] = {"saver": saver, "report": report, "tally": tally}
    pruning = recipe.pruning
    if pruning is None:
        raise Misuse("the recipe says nothing of pruning; use fit")
    prunable(module)  # refuses before any work
    if pruning.by != "magnitude":
        mask = mask_before_training(module, recipe, pruning)
        mask.prune_(module)
        return fit(module, recipe, records, mask=mask, keep=keep, **told)
    start, log = _dense_training(module, recipe, records, pruning, told)
    steps, rows, found = log.steps, log.rows_read, None
    for round_ in range(1, pruning.rounds + 1):
        found = magnitude_mask(module, _share(pruning.sparsity, round_, pruning.rounds), within=found)
        module.load_state_dict(dict(start))
        found.prune_(module)
        log = fit(
            module,
            recipe,
            records,
            stage=f"sparse-{round_}",
            begin=pruning.rewind,
            epochs=recipe.epochs - pruning.rewind,
            mask=found,
            keep=keep if round_ == pruning.rounds else NOTHING,
            **told,
        )
        steps, rows = steps + log.steps, rows + log.rows_read
    return replace(log, steps=steps, rows_read=rows)


def mask_before_training(module: nn.Module, recipe: Recipe, pruning: Pruning) -> Mask:
    """The mask of a pruning that no training has a part in, by synflow or at random, of the untrained module."""
    if pruning.by == "synflow":
        return synflow_mask(module, tuple(recipe.model_args["shape"]), pruning.sparsity, pruning.iterations)
    return random_mask(module, pruning.sparsity, coins.child(coins.generator(recipe.seed), "pruning"))


def _dense_training(
    module: nn.Module, recipe: Recipe, records: Records, pruning: Pruning, told: dict[str, Any]
) -> tuple[State, TrainingLog]:
    """Train densely; the state after `rewind` epochs, and the log."""
    beginning = copy_state(module)
    mark = pruning.rewind * math.ceil(len(records) / recipe.batch_size)
    log = fit(module, recipe, records, stage="dense", mark=mark, **told)
    return log.checkpoints[mark] if mark else beginning, log
