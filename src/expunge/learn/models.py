"""Networks by name, and what the rest of expunge asks of any module: its head, its features, its batch statistics.

The deep networks have group norm by default, never batch norm, whose running statistics are a global statistic of the
training rows that leaks between rows, outlives a deletion and cannot be vmapped: `networks.py` says more.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from expunge.core.errors import Misuse, Unsupported
from expunge.learn.networks import MLP, VGG16, AllCNN, ConvNet3, LeNet, Network, ResNet18, ResNet20, SoftmaxRegression

__all__ = [
    "MLP",
    "MODELS",
    "VGG16",
    "AllCNN",
    "ConvNet3",
    "LeNet",
    "Network",
    "ResNet18",
    "ResNet20",
    "SoftmaxRegression",
    "build",
    "features_of",
    "has_batch_norm",
    "has_dropout",
    "head_of",
]

MODELS: Mapping[str, type[Network]] = MappingProxyType(
    {
        "softmax": SoftmaxRegression,
        "mlp": MLP,
        "lenet": LeNet,
        "convnet3": ConvNet3,
        "allcnn": AllCNN,
        "resnet20": ResNet20,
        "resnet18": ResNet18,
        "vgg16": VGG16,
    }
)


def build(name: str, *, shape: Sequence[int], outputs: int, **args: Any) -> Network:
    """A fresh network by name, in torch's default dtype on its default device.

    Weights come from torch's global generator, as in every torch module: seed it inside `torch.random.fork_rng`.

    Args:
        name: a key of `MODELS`.
        shape: shape of one row; image networks take (height, width) or (channels, height, width), softmax and mlp any.
        outputs: number of classes, or of regression targets.
        args: what the architecture takes by keyword (`norm`, `width`, `hidden`).

    Raises:
        Misuse: if the name or an argument is unknown, or the shape does not suit the architecture.

    Example:
        >>> build("mlp", shape=(28, 28), outputs=10, hidden=[32]).head
        Linear(in_features=32, out_features=10, bias=True)
    """
    if name not in MODELS:
        raise Misuse(f'unknown model "{name}"; known: {", ".join(sorted(MODELS))}')
    if not shape or min(shape) < 1:
        raise Misuse(f"shape must be that of one row, all sizes >= 1, got {tuple(shape)}")
    accepted = list(inspect.signature(MODELS[name]).parameters)[2:]
    for arg in args:
        if arg not in accepted:
            raise Misuse(f'{name} takes no argument "{arg}"; accepted: {", ".join(accepted)}')
    return MODELS[name](shape=tuple(shape), outputs=outputs, **args)


def head_of(module: nn.Module) -> tuple[str, nn.Linear]:
    """Name and layer of the last `nn.Linear` in registration order; `head` of a `Network`.

    The name is that of `named_modules`: it is empty if the module itself is the layer. Registration order is all that
    can be seen from outside: of a module that registers its output layer first, this is another layer.

    Raises:
        Unsupported: if the module has no linear layer.
    """
    if isinstance(module, Network):
        return "head", module.head
    linear = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise Unsupported(f"{type(module).__name__} has no nn.Linear to use as head; end it with one")
    return linear[-1]


def features_of(module: nn.Module, x: Float[Tensor, "batch *row"]) -> Float[Tensor, "batch width"]:
    """What the head (`head_of`) sees of each row, in evaluation mode; training flags are put back, gradients kept.

    Raises:
        Unsupported: if one pass does not call the head exactly once, on a matrix.
    """
    name, head = head_of(module)
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else kwargs["input"])

    with _evaluation(module):
        if isinstance(module, Network):
            return module.features(x)
        hook = head.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            module(x)
        finally:
            hook.remove()
    if len(seen) != 1:
        raise Unsupported(f'the head "{name}" must be called once a pass, got {len(seen)} calls; use a Network')
    if seen[0].ndim != 2:
        raise Unsupported(f'the head "{name}" must see (batch, width), got {tuple(seen[0].shape)}; pool before it')
    return seen[0]


def has_batch_norm(module: nn.Module) -> str | None:
    """Name of the first layer with statistics of a batch: any batch norm, or instance norm with running statistics.

    A module that is itself such a layer is named by its class. Functional calls inside `forward` cannot be seen.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _InstanceNorm) and layer.track_running_stats):
            return name or type(layer).__name__
    return None


def has_dropout(module: nn.Module) -> str | None:
    """Name of the first layer that drops values at random while training, with a probability above 0.

    Counts all dropout layers, and recurrent and attention layers with `dropout`. A module that is itself such a layer
    is named by its class. Functional calls inside `forward` cannot be seen.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _DropoutNd):
            rate = layer.p
        elif isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
            rate = layer.dropout
        else:
            continue
        if rate > 0:
            return name or type(layer).__name__
    return None


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the training flag that it had."""
    flags = [(layer, layer.training) for layer in module.modules()]
    try:
        for layer, _ in flags:
            layer.training = False
        yield
    finally:
        for layer, flag in flags:
            layer.training = flag
