"""The whole state of a training at one step, as named tensors: what a checkpoint of a transcript holds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from expunge.core.digest import digest_tensors
from expunge.core.recipe import Recipe
from expunge.core.trained import State, device_of
from expunge.learn.ball import Ball
from expunge.learn.loop import mean_loss, optimiser_of, prepare
from expunge.learn.models import has_dropout

GROUPS = ("parameter", "buffer", "optimiser")


class Stepper:
    """Makes the steps of a recipe's training, as `expunge.learn.loop.fit` makes them, on whatever rows it is given."""

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        """Ready for the first step; the module is trained in place."""
        self.module, self.recipe = module.train(), recipe
        self.optimiser = optimiser_of(recipe, module)
        self.loss = mean_loss(recipe)
        self.ball = Ball(module, recipe.max_norm)
        self.dtype = getattr(torch, recipe.dtype)

    def step(self, x: Tensor, y: Tensor, epoch: int) -> None:
        """One step on rows as stored, at the learning rate of this epoch (0-based)."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.optimiser_args["lr"] * self.recipe.lr_factor(epoch)
        self.optimiser.zero_grad()
        self.loss(self.module(prepare(x, self.dtype)), y).backward()
        self.optimiser.step()
        self.ball.project()


def coins_now() -> dict[str, Tensor]:
    """Where torch's generators, which dropout draws from, stand now."""
    now = {"coins/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        now["coins/cuda"] = torch.cuda.get_rng_state()
    return now


def snapshot(module: nn.Module, optimiser: torch.optim.Optimizer, coins: State | None = None) -> dict[str, Tensor]:
    """Parameters, buffers, optimiser state and coins (as they are now, if not given), copied to the CPU."""
    trained = dict(module.named_parameters(remove_duplicate=False))
    whole = {
        f"{'parameter' if name in trained else 'buffer'}/{name}": tensor for name, tensor in module.state_dict().items()
    }
    for index, parameter in enumerate(_parameters(optimiser)):
        for name, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                whole[f"optimiser/{index}/{name}"] = value
    whole.update(coins_now() if coins is None else coins)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.items()}


def restore(state: State, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Put module, optimiser and coins where a snapshot was taken. Shares no storage with `state`.

    Not by `Optimizer.load_state_dict`, which keeps the very tensors that it is given: the next step would write into
    the evidence.
    """
    module.load_state_dict(model_of(state))
    optimiser.state.clear()
    for index, parameter in enumerate(_parameters(optimiser)):
        mine = _below(f"optimiser/{index}/", state)
        if mine:
            optimiser.state[parameter] = {name: value.clone().to(parameter.device) for name, value in mine.items()}
    torch.set_rng_state(state["coins/cpu"].clone())
    if "coins/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["coins/cuda"].clone())


def model_of(state: State) -> dict[str, Tensor]:
    """Parameters and buffers under their names in the module."""
    return {**_below("parameter/", state), **_below("buffer/", state)}


def model_digest(state: State) -> str:
    """SHA-256 of parameters and buffers: that of `Trained.digest`."""
    return digest_tensors(model_of(state))


def misfit(state: State, module: nn.Module, optimiser: torch.optim.Optimizer) -> str | None:
    """What keeps this state from being put into module and optimiser; None if nothing does. Loads nothing."""
    fresh = {name: one for name, one in snapshot(module, optimiser).items() if not name.startswith("optimiser/")}
    allowed = {**fresh, **_room(optimiser)}
    for name in sorted({*fresh, *state} - {"coins/cuda"}):
        tensor, like = state.get(name), allowed.get(name)
        if tensor is None:
            return f'lacks "{name}"'
        if like is None:
            return f'holds "{name[:60]}", which neither the model nor its optimiser has'
        if tensor.shape != like.shape or tensor.dtype is not like.dtype:
            got, due = (f"{one.dtype} {tuple(one.shape)}"[:80] for one in (tensor, like))
            return f'holds "{name[:60]}" of {got}, expected {due}'
    for index in range(len(_parameters(optimiser))):
        mine = set(_below(f"optimiser/{index}/", state))
        if mine and mine != set(_below(f"optimiser/{index}/", allowed)):
            return f"holds part of the optimiser's state of parameter {index}, but not all"
    return None


def _room(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors like those that the optimiser may keep, by their names in a snapshot."""
    args = optimiser.defaults
    names = ("step", "exp_avg", "exp_avg_sq") if "betas" in args else ("momentum_buffer",) if args["momentum"] else ()
    count = torch.zeros((), dtype=torch.float32)
    return {
        f"optimiser/{index}/{name}": count if name == "step" else parameter.detach()
        for index, parameter in enumerate(_parameters(optimiser))
        for name in names
    }


def distance(first: State, second: State, group: str) -> float:
    """L2 distance in float64 of all floating tensors of a group; infinite if names, shapes or whole numbers differ."""
    ones, twos = _below(f"{group}/", first), _below(f"{group}/", second)
    if set(ones) != set(twos):
        return math.inf
    total = 0.0
    for name, one in ones.items():
        two = twos[name]
        if one.shape != two.shape:
            return math.inf
        if not one.is_floating_point() or name.endswith("/step"):
            if not bool((one == two).all()):
                return math.inf
            continue
        total += float((one.double() - two.double()).square().sum())
    return math.inf if math.isnan(total) else math.sqrt(total)


def same_coins(told: State, mine: State, module: nn.Module) -> bool:
    """True if the generators that dropout draws from stand where they are told to: the GPU's too, for a model there.

    A transcript made on a CPU tells of no GPU's; that is no fault unless the model has dropout, which draws from it.
    """
    names = ["coins/cpu"]
    if device_of(module).type == "cuda" and ("coins/cuda" in told or has_dropout(module)):
        names.append("coins/cuda")
    return all(name in told and name in mine and torch.equal(told[name], mine[name]) for name in names)


def as_double(state: State) -> dict[str, Tensor]:
    """The same with floating tensors in float64."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
