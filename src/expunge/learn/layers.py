"""What the networks are made of: convolution blocks, residual blocks, pooling over pixels."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from expunge.core.errors import Misuse

NORMS = ("batch", "group", "none")


class PixelMean(nn.Module):
    """Mean over all pixels: (batch, channels, height, width) to (batch, channels)."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels"]:
        """The mean of each channel."""
        return x.mean((-2, -1))


class PixelMax(nn.Module):
    """Maximum over all pixels; its gradient is deterministic on CUDA, unlike that of adaptive max pooling."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels"]:
        """The maximum of each channel."""
        return x.amax((-2, -1))


class ZeroShortcut(nn.Module):
    """The shortcut without parameters of He, Zhang, Ren and Sun (2016, option A): fewer pixels, channels of zeros.

    Args:
        extra: number of channels to add.
        stride: distance of the pixels kept.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        """The input, thinned and widened; half of the new channels before the old ones, half after."""
        thin = x[..., :: self.stride, :: self.stride]
        return functional.pad(thin, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``, the branch two 3x3 convolutions that have a bias only without norm.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        norm: "batch", "group" or "none".
        stride: of the first convolution.
        project: whether a shortcut that changes the size is a 1x1 convolution, or else a `ZeroShortcut`.
    """

    def __init__(self, inputs: int, outputs: int, norm: str, *, stride: int, project: bool) -> None:
        super().__init__()
        bias = norm == "none"
        first = conv(inputs, outputs, norm, stride=stride, bias=bias)
        second = conv(outputs, outputs, norm, bias=bias)[:-1]
        self.branch = nn.Sequential(*first, *second)
        self.shortcut: nn.Module = nn.Identity()
        if (stride, inputs) != (1, outputs) and project:
            self.shortcut = nn.Sequential(*conv(inputs, outputs, norm, kernel=1, stride=stride, bias=bias)[:-1])
        elif (stride, inputs) != (1, outputs):
            self.shortcut = ZeroShortcut(outputs - inputs, stride)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        """The block's output, smaller by the stride."""
        return functional.relu(self.branch(x) + self.shortcut(x))


def conv(
    inputs: int,
    outputs: int,
    norm: str,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int | None = None,
    bias: bool = True,
) -> list[nn.Module]:
    """Convolution, norm, ReLU; padded to keep the size at stride 1 unless told otherwise."""
    padding = kernel // 2 if padding is None else padding
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias), *norm_layers(norm, outputs), nn.ReLU()]


def norm_layers(norm: str, channels: int, *, images: bool = True) -> list[nn.Module]:
    """The norm of that name over `channels`, as a list of one layer or none.

    Group norm has 8, 4, 2 or 1 groups: the most that divide the channels evenly and leave four in each, because a group
    of one value is normalised to zero.

    Raises:
        Misuse: if the name is unknown, or there is one channel only to normalise by group.
    """
    if norm not in NORMS:
        raise Misuse(f'norm must be "batch", "group" or "none", got "{norm}"')
    if norm == "none":
        return []
    if norm == "group":
        if channels < 2:
            raise Misuse(f'norm "group" needs at least 2 channels, got {channels}; widen the layer or use "none"')
        groups = next(count for count in (8, 4, 2, 1) if channels % (4 * count) == 0 or count == 1)
        return [nn.GroupNorm(groups, channels)]
    return [nn.BatchNorm2d(channels) if images else nn.BatchNorm1d(channels)]


def residual_body(channels: int, widths: Sequence[int], depth: int, norm: str, *, project: bool) -> nn.Sequential:
    """Stem, `depth` residual blocks of each width, each but the first width halving the image, mean over pixels."""
    before, layers = widths[0], conv(channels, widths[0], norm, bias=norm == "none")
    for width in widths:
        for step in range(depth):
            stride = 2 if step == 0 and width != widths[0] else 1
            layers.append(Residual(before, width, norm, stride=stride, project=project))
            before = width
    return nn.Sequential(*layers, PixelMean())


def he_init(body: nn.Sequential) -> nn.Sequential:
    """Redraws convolutions by He, Zhang, Ren and Sun (2015); with torch's default a deep plain stack fades to zero."""
    for layer in body:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return body


def positive(name: str, value: int) -> int:
    """The value, if it is a whole number of at least 1.

    Raises:
        Misuse: if it is not.
    """
    if not isinstance(value, int) or value < 1:
        raise Misuse(f"{name} must be a whole number >= 1, got {value}")
    return value
