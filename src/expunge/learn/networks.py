"""The architectures, each a few lines of plain PyTorch; `models.py` builds them by name.

Why group norm is the default of the deep ones: batch norm (Ioffe and Szegedy, 2015) keeps a running mean and variance
of the training rows in buffers that gradient-based deletion does not reach, so that every removed row stays in them; it
makes the gradient of one row depend on the others of its batch; and its in-place update cannot be vmapped while
training. Group norm (Wu and He, 2018) sees one row at a time. ``norm="batch"`` exists to reproduce papers.

No network has dropout, an in-place operation or tied weights: all work under `torch.func`, in float64 and in
safetensors. None pools with an operation that torch lists as nondeterministic on CUDA. Parameter counts are for ten
classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.errors import Misuse
from expunge.learn.layers import PixelMax, PixelMean, conv, he_init, norm_layers, positive, residual_body


class Network(nn.Module):
    """A classifier or regressor in two parts: `features`, then the linear `head`.

    ``forward(x)`` is ``head(features(x))``, always: head-only methods depend on it.

    Args:
        body: maps (batch, *view) to (batch, width); every row by itself unless it holds batch norm.
        width: number of features that `body` gives.
        shape: shape of one row as the caller has it.
        view: shape of one row as `body` wants it; the same number of values.
        outputs: number of classes, or of regression targets.
    """

    smallest: ClassVar[int] = 1
    """Smallest height and width of an image that the network can pool; 1 where rows are flattened."""

    def __init__(
        self, body: nn.Module, width: int, *, shape: tuple[int, ...], view: tuple[int, ...], outputs: int
    ) -> None:
        super().__init__()
        self.shape = shape
        self.view = view
        self.body = body
        self.head = nn.Linear(width, positive("outputs", outputs))

    def features(self, x: Float[Tensor, "batch *row"]) -> Float[Tensor, "batch width"]:
        """What the head sees of each row.

        Raises:
            Misuse: if the rows do not have the shape that the network was built for.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise Misuse(f"x must be a batch of rows of shape {self.shape}, got {tuple(x.shape)}; stack or reshape it")
        features: Tensor = self.body(x.reshape(x.shape[0], *self.view))
        return features

    def forward(self, x: Float[Tensor, "batch *row"]) -> Float[Tensor, "batch outputs"]:
        """Logits, or predicted targets: ``head(features(x))``."""
        outputs: Tensor = self.head(self.features(x))
        return outputs


class SoftmaxRegression(Network):
    """Multinomial logistic regression: the head alone on flattened rows. 7,850 parameters on (28, 28)."""

    def __init__(self, shape: tuple[int, ...], outputs: int, *, norm: str = "none") -> None:
        if norm != "none":
            raise Misuse(f'softmax has no hidden layer to normalise: norm must be "none", got "{norm}"; use mlp')
        size = math.prod(shape)
        super().__init__(nn.Identity(), size, shape=shape, view=(size,), outputs=outputs)


class MLP(Network):
    """Fully connected ReLU layers on flattened rows. 101,770 parameters on (28, 28) with one layer of 128."""

    def __init__(
        self, shape: tuple[int, ...], outputs: int, *, hidden: Sequence[int] = (128,), norm: str = "none"
    ) -> None:
        if not hidden:
            raise Misuse("hidden must name at least one layer, got none; use softmax for a linear model")
        size = math.prod(shape)
        layers: list[nn.Module] = []
        for before, after in zip((size, *hidden), hidden, strict=False):
            linear = nn.Linear(before, positive("hidden", after))
            layers += [linear, *norm_layers(norm, after, images=False), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), hidden[-1], shape=shape, view=(size,), outputs=outputs)


class LeNet(Network):
    """LeNet-5 (LeCun, Bottou, Bengio and Haffner, 1998), with ReLU and max pooling, fully connected C3, no padding.

    61,706 parameters on (32, 32), 44,426 on (28, 28), 62,006 on (3, 32, 32).
    """

    smallest = 16

    def __init__(self, shape: tuple[int, ...], outputs: int, *, norm: str = "none") -> None:
        channels, height, width = view = _image(type(self), shape)
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        layers = [
            *(*conv(channels, 6, norm, kernel=5, padding=0), nn.MaxPool2d(2)),
            *(*conv(6, 16, norm, kernel=5, padding=0), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * rows * columns, 120), *norm_layers(norm, 120, images=False), nn.ReLU()),
            *(nn.Linear(120, 84), *norm_layers(norm, 84, images=False), nn.ReLU()),
        ]
        super().__init__(nn.Sequential(*layers), 84, shape=shape, view=view, outputs=outputs)


class ConvNet3(Network):
    """Three blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling (Gidaris and Komodakis, 2018).

    The network of dataset condensation (Zhao, Mopuri and Bilen, 2021), there with width 128 and one channel a group:
    320,010 parameters on (3, 32, 32) with width 128, 86,282 with the default 64.
    """

    smallest = 8

    def __init__(self, shape: tuple[int, ...], outputs: int, *, width: int = 64, norm: str = "group") -> None:
        view = _image(type(self), shape)
        layers: list[nn.Module] = []
        for before in (view[0], positive("width", width), width):
            layers += [*conv(before, width, norm), nn.AvgPool2d(2)]
        size = width * (view[1] // 8) * (view[2] // 8)
        super().__init__(nn.Sequential(*layers, nn.Flatten()), size, shape=shape, view=view, outputs=outputs)


class AllCNN(Network):
    """All-CNN-C (Springenberg, Dosovitskiy, Brox and Riedmiller, 2015), strides in place of pooling.

    Differs: no dropout, and the last 1x1 convolution comes after the average over pixels, as the linear head (the two
    commute) and without a ReLU. 1,369,738 parameters on (3, 32, 32) without norm, 1,372,234 by default.
    """

    smallest = 9

    def __init__(self, shape: tuple[int, ...], outputs: int, *, width: int = 96, norm: str = "group") -> None:
        view = _image(type(self), shape)
        wide = 2 * positive("width", width)
        body = nn.Sequential(
            *(*conv(view[0], width, norm), *conv(width, width, norm), *conv(width, width, norm, stride=2)),
            *(*conv(width, wide, norm), *conv(wide, wide, norm), *conv(wide, wide, norm, stride=2)),
            *(*conv(wide, wide, norm, padding=0), *conv(wide, wide, norm, kernel=1)),
            PixelMean(),
        )
        super().__init__(he_init(body), wide, shape=shape, view=view, outputs=outputs)


class ResNet20(Network):
    """The CIFAR ResNet with 20 layers (He, Zhang, Ren and Sun, 2016): 16, 32, 64 channels, three blocks each.

    Shortcuts without parameters (their option A). 269,722 parameters on (3, 32, 32).
    """

    smallest = 4

    def __init__(self, shape: tuple[int, ...], outputs: int, *, width: int = 16, norm: str = "group") -> None:
        view = _image(type(self), shape)
        widths = [positive("width", width) * factor for factor in (1, 2, 4)]
        body = residual_body(view[0], widths, 3, norm, project=False)
        super().__init__(body, widths[-1], shape=shape, view=view, outputs=outputs)


class ResNet18(Network):
    """ResNet-18 (He, Zhang, Ren and Sun, 2016) for small images: a 3x3 convolution as stem, no first pooling.

    Shortcuts are 1x1 convolutions where the size changes. 11,173,962 parameters on (3, 32, 32).
    """

    smallest = 8

    def __init__(self, shape: tuple[int, ...], outputs: int, *, width: int = 64, norm: str = "group") -> None:
        view = _image(type(self), shape)
        widths = [positive("width", width) * factor for factor in (1, 2, 4, 8)]
        body = residual_body(view[0], widths, 2, norm, project=True)
        super().__init__(body, widths[-1], shape=shape, view=view, outputs=outputs)


class VGG16(Network):
    """The thirteen convolutions of VGG-16 (Simonyan and Zisserman, 2015) and one linear layer, as used on CIFAR.

    The last pooling takes the maximum over all pixels left: on 32x32 that is the original 2x2 pooling. 14,719,818
    parameters on (3, 32, 32) without norm (of them 14,714,688 in convolutions); 14,728,266 by default.
    """

    smallest = 16

    def __init__(self, shape: tuple[int, ...], outputs: int, *, width: int = 64, norm: str = "group") -> None:
        view = _image(type(self), shape)
        before, layers = view[0], list[nn.Module]()
        for factor, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(depth):
                layers += conv(before, factor * positive("width", width), norm)
                before = factor * width
            layers.append(nn.MaxPool2d(2))
        layers[-1] = PixelMax()
        super().__init__(he_init(nn.Sequential(*layers)), 8 * width, shape=shape, view=view, outputs=outputs)


def _image(kind: type[Network], shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width) of a row, the channel axis added if absent."""
    if len(shape) not in (2, 3):
        raise Misuse(
            f"{kind.__name__} needs rows of shape (height, width) or (channels, height, width), got {shape}; "
            "use softmax or mlp for other rows"
        )
    channels, height, width = (1, *shape)[-3:]
    if min(height, width) < kind.smallest:
        raise Misuse(
            f"{kind.__name__} needs images of at least {kind.smallest} x {kind.smallest}, got {height} x {width} from "
            f"{shape}; put channels first, enlarge the images, or use mlp"
        )
    return channels, height, width
