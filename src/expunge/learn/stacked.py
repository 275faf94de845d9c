"""Many models of one architecture as one: parameters stacked along a first axis, one forward pass, one update.

A network that is a line of linear and elementwise layers is run layer by layer, each linear layer one batched matrix
product; any other goes through `torch.func.vmap`, which takes every module and is slower.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from expunge.core.recipe import Recipe
from expunge.learn.networks import Network

Parameters = Mapping[str, Tensor]
Derivative = Callable[[Tensor], Tensor]
_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Softplus, nn.Identity)


class Product(NamedTuple):
    """A weight gradient not yet multiplied out: rows (models, batch, in) and output gradients (models, batch, out)."""

    rows: Tensor
    grads: Tensor

    def dense(self) -> Tensor:
        """(models, in, out) the gradient itself."""
        return torch.bmm(self.rows.transpose(1, 2), self.grads)


Gradient = Tensor | Product


class Stack(ABC):
    """Models of one architecture with their parameters stacked: each tensor is (models, ...)."""

    parameters: dict[str, Tensor]

    @abstractmethod
    def gradients(self, models: int, x: Tensor, derivative: Derivative) -> dict[str, Gradient]:
        """Gradients of the first so many models' parameters.

        Args:
            models: how many.
            x: each one's own rows (models, batch, ...).
            derivative: from outputs (models, batch, outputs) to the derivative of the loss by them, of that shape.
        """

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

    def gradients(self, models: int, x: Tensor, derivative: Derivative) -> dict[str, Gradient]:
        """See `Stack`."""
        leaves = {name: value[:models].detach().requires_grad_() for name, value in self.parameters.items()}
        outputs = self._run(leaves, x)
        grads = torch.autograd.grad(outputs, list(leaves.values()), derivative(outputs.detach()))
        return dict(zip(leaves, grads, strict=True))

    def write_back(self, models: list[nn.Module]) -> None:
        """See `Stack`."""
        _unstack(self.parameters, models)


class LineStack(Stack):
    """A line of linear and elementwise layers on flat rows: each linear layer is one batched matrix product.

    Weights are kept as (models, in, out), which is how their gradients come out of the product, and the product is left
    to the update, which can multiply it straight into the velocity: memory traffic is what the time goes into.
    """

    def __init__(self, models: list[nn.Module], line: list[nn.Module], device: torch.device) -> None:
        """Stack copies of the models' parameters; `line` holds the first model's layers in order."""
        names = {id(part): name for name, part in models[0].named_modules()}
        self._steps = [(f"{names[id(layer)]}.".lstrip("."), layer) for layer in line]
        self.parameters = {name: value.to(device) for name, value in self._turned(_stacked(models)).items()}

    def gradients(self, models: int, x: Tensor, derivative: Derivative) -> dict[str, Gradient]:
        """Backpropagation, the linear layers by hand and everything between them by autograd."""
        inputs, outputs, activated = [], [], []
        hidden = x.flatten(2)
        for prefix, layer in self._steps:
            if isinstance(layer, nn.Linear):
                activated.append(hidden)
                inputs.append(hidden.detach())
                hidden = self._linear(prefix, inputs[-1], models).requires_grad_()
                outputs.append((prefix, hidden))
            else:
                hidden = layer(hidden)
        activated.append(hidden)
        grad = derivative(hidden.detach())
        found: dict[str, Gradient] = {}
        for place in reversed(range(len(outputs))):
            prefix, output = outputs[place]
            if activated[place + 1] is not output:
                (grad,) = torch.autograd.grad(activated[place + 1], [output], grad)
            found[f"{prefix}weight"] = Product(inputs[place], grad)
            if f"{prefix}bias" in self.parameters:
                found[f"{prefix}bias"] = grad.sum(1)
            if place:
                grad = torch.bmm(grad, self.parameters[f"{prefix}weight"][:models].transpose(1, 2))
        return {name: found[name] for name in self.parameters}

    @torch.no_grad()
    def _linear(self, prefix: str, rows: Tensor, models: int) -> Tensor:
        weight = self.parameters[f"{prefix}weight"][:models]
        if f"{prefix}bias" not in self.parameters:
            return torch.bmm(rows, weight)
        return torch.baddbmm(self.parameters[f"{prefix}bias"][:models].unsqueeze(1), rows, weight)

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
        args = recipe.optimiser_args
        self.stacked, self.decay, self.adam = stacked, recipe.weight_decay, recipe.optimiser == "adam"
        self.momentum, self.nesterov = float(args.get("momentum", 0.0)), bool(args.get("nesterov", False))
        self.plain = not self.adam and not self.momentum
        self.betas: tuple[float, float] = tuple(args.get("betas", (0.9, 0.999)))
        self.eps = float(args.get("eps", 1e-8))
        self.first = {name: torch.zeros_like(value) for name, value in stacked.items()}
        self.second = {name: torch.zeros_like(value) for name, value in stacked.items()} if self.adam else {}
        self.steps = 0

    @torch.no_grad()
    def __call__(self, models: int, grads: Mapping[str, Gradient], rates: Float[Tensor, " models"] | float) -> None:
        """One step of the first so many models; `rates` is one number if all have the same."""
        self.steps += 1
        for name, grad in grads.items():
            value, memory = self.stacked[name][:models], self.first[name][:models]
            if self.plain and isinstance(grad, Product) and isinstance(rates, float):
                value.baddbmm_(grad.rows.transpose(1, 2), grad.grads, beta=1 - rates * self.decay, alpha=-rates)
                continue
            if self.adam:
                direction = self._adam(value, grad, memory, self.second[name][:models])
            else:
                direction = self._sgd(value, grad, memory)
            if isinstance(rates, float):
                value.sub_(direction, alpha=rates)
            else:
                value.addcmul_(direction, rates.to(value).view(-1, *[1] * (value.dim() - 1)), value=-1)

    def _sgd(self, value: Tensor, grad: Gradient, velocity: Tensor) -> Tensor:
        if not self.momentum or self.nesterov:
            dense = self._dense(value, grad)
            if not self.momentum:
                return dense
            velocity.mul_(self.momentum).add_(dense)
            return dense.add(velocity, alpha=self.momentum)
        if isinstance(grad, Product):
            velocity.baddbmm_(grad.rows.transpose(1, 2), grad.grads, beta=self.momentum)
        else:
            velocity.mul_(self.momentum).add_(grad)
        return velocity.add_(value, alpha=self.decay) if self.decay else velocity

    def _adam(self, value: Tensor, grad: Gradient, mean: Tensor, square: Tensor) -> Tensor:
        """Kingma and Ba (2015), algorithm 1, with eps outside the root as in torch."""
        first, second = self.betas
        dense = self._dense(value, grad)
        mean.lerp_(dense, 1 - first)
        square.mul_(second).addcmul_(dense, dense, value=1 - second)
        scale = (square / (1 - second**self.steps)).sqrt_().add_(self.eps)
        return (mean / (1 - first**self.steps)).div_(scale)

    def _dense(self, value: Tensor, grad: Gradient) -> Tensor:
        dense = grad.dense() if isinstance(grad, Product) else grad
        return dense.add(value, alpha=self.decay) if self.decay else dense
