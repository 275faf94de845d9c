"""Many models of one architecture as one: parameters stacked along a first axis, one forward pass, one update.

A network that is a line of linear and elementwise layers is run layer by layer, each linear layer one batched matrix
product; any other goes through `torch.func.vmap`, which takes every module and is slower.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.sgd import sgd

from expunge.core.recipe import Recipe
from expunge.learn.networks import Network

Parameters = Mapping[str, Tensor]
_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Softplus, nn.Identity)


class Stack(ABC):
    """Models of one architecture with their parameters stacked: each tensor is (models, ...)."""

    parameters: dict[str, Tensor]

    def leaves(self, models: int) -> dict[str, Tensor]:
        """The first so many models' parameters as autograd leaves that share their memory."""
        return {name: value[:models].detach().requires_grad_() for name, value in self.parameters.items()}

    @abstractmethod
    def forward(self, parameters: Parameters, x: Tensor) -> Float[Tensor, "models batch outputs"]:
        """Outputs of each model for its own rows (models, batch, ...)."""

    @abstractmethod
    def write_back(self, models: list[nn.Module]) -> None:
        """Write the parameters into the modules."""


def stack_of(models: list[nn.Module], device: torch.device) -> Stack:
    """The quicker stack that can hold these models."""
    line = _line(models[0])
    return VmapStack(models, device) if line is None else LineStack(models, line, device)


class VmapStack(Stack):
    """Any module without batch statistics, by `torch.func.vmap`."""

    def __init__(self, models: list[nn.Module], device: torch.device) -> None:
        """Stack copies of the models' parameters."""
        module = copy.deepcopy(models[0]).to(device).train()
        self.parameters = {name: value.to(device) for name, value in _stacked(models).items()}
        self._run = vmap(lambda parameters, rows: functional_call(module, parameters, (rows,)))

    def forward(self, parameters: Parameters, x: Tensor) -> Float[Tensor, "models batch outputs"]:
        """See `Stack`."""
        outputs: Tensor = self._run(dict(parameters), x)
        return outputs

    def write_back(self, models: list[nn.Module]) -> None:
        """See `Stack`."""
        _unstack(self.parameters, models)


class LineStack(Stack):
    """A line of linear and elementwise layers on flat rows: each linear layer is one batched matrix product.

    Weights are kept as (models, in, out), so that their gradients, which come out as (rows' transpose times output
    gradients), lie in memory as the weights do: otherwise the update takes four times as long.
    """

    def __init__(self, models: list[nn.Module], line: list[nn.Module], device: torch.device) -> None:
        """Stack copies of the models' parameters; `line` holds the first model's layers in order."""
        names = {id(part): name for name, part in models[0].named_modules()}
        self._steps = [(f"{names[id(layer)]}.".lstrip("."), layer) for layer in line]
        self.parameters = {name: value.to(device) for name, value in self._turned(_stacked(models)).items()}

    def forward(self, parameters: Parameters, x: Tensor) -> Float[Tensor, "models batch outputs"]:
        """See `Stack`."""
        hidden = x.flatten(2)
        for prefix, layer in self._steps:
            if not isinstance(layer, nn.Linear):
                hidden = layer(hidden)
            elif layer.bias is None:
                hidden = torch.bmm(hidden, parameters[f"{prefix}weight"])
            else:
                bias = parameters[f"{prefix}bias"].unsqueeze(1)
                hidden = torch.baddbmm(bias, hidden, parameters[f"{prefix}weight"])
        return hidden

    def write_back(self, models: list[nn.Module]) -> None:
        """See `Stack`."""
        _unstack(self._turned(self.parameters), models)

    @staticmethod
    def _turned(parameters: Parameters) -> dict[str, Tensor]:
        return {n: v.transpose(1, 2).contiguous() if v.dim() == 3 else v for n, v in parameters.items()}


def _line(module: nn.Module) -> list[nn.Module] | None:
    """The layers in order if each is linear or elementwise on flat rows, else None."""
    if type(module) is nn.Linear or isinstance(module, _ELEMENTWISE):
        return [module]
    if isinstance(module, Network) and len(module.view) == 1:
        parts: list[nn.Module] = [module.body, module.head]
    elif type(module) is nn.Sequential:
        parts = list(module)
        if parts and type(parts[0]) is nn.Flatten:
            parts = parts[1:]
    else:
        return None
    lines = [_line(part) for part in parts]
    return None if any(line is None for line in lines) else [layer for line in lines for layer in line or ()]


def _stacked(models: list[nn.Module]) -> dict[str, Tensor]:
    named = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([part[name].detach() for part in named]) for name in named[0]}


@torch.no_grad()
def _unstack(stacked: Parameters, models: list[nn.Module]) -> None:
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            parameter.copy_(stacked[name][index])


class Update:
    """The recipe's optimiser on stacked parameters, as torch's own on each model, with a learning rate for each."""

    def __init__(self, recipe: Recipe, stacked: Parameters) -> None:
        """Start with all memory at zero."""
        self.recipe, args = recipe, recipe.optimiser_args
        self.momentum, self.nesterov = float(args.get("momentum", 0.0)), bool(args.get("nesterov", False))
        self.betas: tuple[float, float] = tuple(args.get("betas", (0.9, 0.999)))
        self.eps = float(args.get("eps", 1e-8))
        self.first = [torch.zeros_like(value) for value in stacked.values()]
        self.second = [torch.zeros_like(value) for value in stacked.values()] if recipe.optimiser == "adam" else []
        self.steps = 0

    @torch.no_grad()
    def __call__(self, leaves: Parameters, grads: list[Tensor], rates: Float[Tensor, " models"] | float) -> None:
        """One step of the first ``len(leaf)`` models; `rates` is one number if all have the same."""
        self.steps += 1
        values = list(leaves.values())
        if isinstance(rates, float) and self.recipe.optimiser == "sgd":
            self._fused(values, grads, rates)
            return
        if self.recipe.weight_decay:
            grads = list(torch._foreach_add(grads, values, alpha=self.recipe.weight_decay))
        active = len(values[0])
        direct = self._adam if self.recipe.optimiser == "adam" else self._sgd
        directions = direct([memory[:active] for memory in self.first], grads)
        if isinstance(rates, float):
            torch._foreach_sub_(values, directions, alpha=rates)
            return
        for value, direction in zip(values, directions, strict=True):
            value.addcmul_(direction, rates.to(value).view(-1, *[1] * (value.dim() - 1)), value=-1)

    def _fused(self, values: list[Tensor], grads: list[Tensor], rate: float) -> None:
        """torch's own step, one pass over memory instead of three. It takes for granted that layouts agree."""
        active = len(values[0])
        sgd(
            values,
            [grad.contiguous() for grad in grads],
            [memory[:active] for memory in self.first] if self.momentum else [None] * len(values),
            fused=True,
            weight_decay=self.recipe.weight_decay,
            momentum=self.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
        )

    def _sgd(self, velocity: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        if not self.momentum:
            return grads
        torch._foreach_mul_(velocity, self.momentum)
        torch._foreach_add_(velocity, grads)
        return list(torch._foreach_add(grads, velocity, alpha=self.momentum)) if self.nesterov else velocity

    def _adam(self, mean: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Kingma and Ba (2015), algorithm 1, with eps outside the root as in torch."""
        first, second = self.betas
        square = [memory[: len(mean[0])] for memory in self.second]
        torch._foreach_lerp_(mean, grads, 1 - first)
        torch._foreach_mul_(square, second)
        torch._foreach_addcmul_(square, grads, grads, value=1 - second)
        scale = torch._foreach_sqrt(torch._foreach_div(square, 1 - second**self.steps))
        torch._foreach_add_(scale, self.eps)
        return list(torch._foreach_div(torch._foreach_div(mean, 1 - first**self.steps), scale))
