"""The networks: shapes, the head's place, counts, `torch.func`, and what is said of modules that are not ours."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from expunge.core.errors import Misuse, Unsupported
from expunge.learn.models import MODELS, Network, build, features_of, has_batch_norm, has_dropout, head_of

SMALL: dict[str, dict[str, Any]] = {
    "softmax": {},
    "mlp": {"hidden": [9, 7]},
    "lenet": {},
    "convnet3": {"width": 8},
    "allcnn": {"width": 8},
    "resnet20": {"width": 4},
    "resnet18": {"width": 4},
    "vgg16": {"width": 4},
}
FLAT = ("softmax", "mlp")
IMAGE = tuple(name for name in SMALL if name not in FLAT)


def small(name: str, shape: tuple[int, ...] = (1, 16, 16), outputs: int = 3, **args: Any) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(name, shape=shape, outputs=outputs, **{**SMALL[name], **args})


def rows(n: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def row_loss(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(net, parameters, (x.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, y.unsqueeze(0))

    return loss


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def test_every_model_is_tested() -> None:
    assert list(MODELS) == list(SMALL)


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (3, 32, 32), (112, 92), (2, 17, 19)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_output_is_the_head_of_the_features(name: str, shape: tuple[int, ...]) -> None:
    net = small(name, shape, 5)
    x = rows(2, shape)
    features = net.features(x)
    assert features.shape == (2, net.head.in_features)
    assert net(x).shape == (2, 5)
    assert torch.equal(net(x), net.head(features))
    assert features.std() > 0


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("shape", [(64,), (2, 3, 4, 5)], ids=str)
def test_flat_networks_take_rows_of_any_shape(name: str, shape: tuple[int, ...]) -> None:
    assert small(name, shape)(rows(4, shape)).shape == (4, 3)


@pytest.mark.parametrize("name", IMAGE)
def test_smallest_image_works_and_one_less_does_not(name: str) -> None:
    side = MODELS[name].smallest
    assert small(name, (side, side))(rows(2, (side, side))).isfinite().all()
    with pytest.raises(
        Misuse, match=rf"^{MODELS[name].__name__} needs images of at least {side} x {side}, got {side} x"
    ):
        small(name, (side, side - 1))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("name", [name for name in SMALL if name != "softmax"])
def test_norms(name: str, norm: str) -> None:
    net = small(name, norm=norm)
    x = rows(4, (1, 16, 16))
    together = net(x)
    assert (has_batch_norm(net) is not None) == (norm == "batch")
    assert any(isinstance(layer, nn.GroupNorm) for layer in net.modules()) == (norm == "group")
    if norm != "batch":  # no row sees another, while training either
        torch.testing.assert_close(together[:1], net(x[:1]))


@pytest.mark.parametrize("name", SMALL)
def test_default_network_has_neither_batch_statistics_nor_chance_nor_buffers(name: str) -> None:
    net = small(name)
    assert has_batch_norm(net) is None
    assert has_dropout(net) is None
    assert not list(net.buffers())


@pytest.mark.parametrize("hidden", [[2], [4], [6], [8]], ids=str)
def test_group_norm_never_normalises_a_value_by_itself(hidden: list[int]) -> None:
    net = build("mlp", shape=(5,), outputs=2, hidden=hidden, norm="group")
    assert net(rows(6, (5,))).std(0).min() > 0


@pytest.mark.parametrize(
    ("name", "shape", "args", "expected"),
    [
        ("softmax", (28, 28), {}, 7_850),
        ("mlp", (28, 28), {}, 101_770),
        ("lenet", (32, 32), {}, 61_706),  # LeNet-5 with C3 fully connected
        ("lenet", (28, 28), {}, 44_426),
        ("lenet", (3, 32, 32), {}, 62_006),
        ("convnet3", (3, 32, 32), {}, 86_282),
        ("convnet3", (3, 32, 32), {"width": 128}, 320_010),  # dataset condensation
        ("allcnn", (3, 32, 32), {"norm": "none"}, 1_369_738),
        ("allcnn", (3, 32, 32), {}, 1_372_234),
        ("resnet20", (3, 32, 32), {"norm": "batch"}, 269_722),
        ("resnet20", (3, 32, 32), {}, 269_722),
        ("resnet18", (3, 32, 32), {"norm": "batch"}, 11_173_962),
        ("vgg16", (3, 32, 32), {"norm": "none"}, 14_714_688 + 5_130),
        ("vgg16", (3, 32, 32), {"norm": "batch"}, 14_728_266),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], args: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        assert count(build(name, shape=shape, outputs=10, **args)) == expected


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    first, second = small(name), small(name)
    other = build(name, shape=(1, 16, 16), outputs=3, **SMALL[name])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("name", ["vgg16", "allcnn"])
def test_deep_plain_networks_do_not_fade_without_norm(name: str) -> None:
    net = small(name, (3, 32, 32), norm="none", width=16)
    assert 0.05 < net(rows(8, (3, 32, 32))).std() < 5


@pytest.mark.parametrize("name", SMALL)
def test_float64(name: str) -> None:
    net = small(name).double()
    assert net(rows(2, (1, 16, 16), torch.float64)).dtype is torch.float64


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", SMALL)
def test_vmapped_row_gradients_are_those_of_a_loop(name: str, norm: str) -> None:
    net = small(name, norm="none" if name == "softmax" else norm).double()
    x, y = rows(3, (1, 16, 16), torch.float64), torch.tensor([0, 2, 1])
    together = vmap(grad(row_loss(net)), in_dims=(None, 0, 0))(weights(net), x, y)
    for i in range(3):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        for key, parameter in net.named_parameters():
            torch.testing.assert_close(together[key][i], parameter.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, in its forward-mode rules
@pytest.mark.parametrize("name", SMALL)
def test_both_hessian_products_agree(name: str) -> None:
    net = small(name).double()
    x, y = rows(1, (1, 16, 16), torch.float64)[0], torch.tensor(1)
    at = weights(net)
    along = {key: torch.cos(torch.arange(value.numel(), dtype=value.dtype)).view_as(value) for key, value in at.items()}

    def slope(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        gradient: dict[str, Tensor] = grad(row_loss(net))(parameters, x, y)
        return gradient

    def directional(parameters: dict[str, Tensor]) -> Tensor:
        return sum(((g * along[key]).sum() for key, g in slope(parameters).items()), torch.zeros((), dtype=x.dtype))

    _, forward = jvp(slope, (at,), (along,))
    backward = grad(directional)(at)
    for key in at:
        torch.testing.assert_close(forward[key], backward[key], rtol=1e-7, atol=1e-7)


def test_batch_norm_cannot_be_vmapped_while_training() -> None:
    net = small("resnet20", norm="batch")
    x, y = rows(3, (1, 16, 16)), torch.tensor([0, 2, 1])
    with pytest.raises((RuntimeError, ValueError)):
        vmap(grad(row_loss(net)), in_dims=(None, 0, 0))(weights(net), x, y)


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_files_hold_the_same_network(name: str) -> None:
    net, x = small(name), rows(2, (1, 16, 16))
    twin = copy.deepcopy(net)
    assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        twin.head.bias.add_(1)
    assert not torch.equal(net(x), twin(x))
    twin.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize("name", SMALL)
def test_input_is_untouched(name: str) -> None:
    x = rows(2, (1, 16, 16))
    before = x.clone()
    small(name)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet99",
            {},
            'unknown model "resnet99"; known: allcnn, convnet3, lenet, mlp, resnet18, resnet20, softmax, vgg16',
        ),
        ("mlp", {"hiden": [3]}, 'mlp takes no argument "hiden"; accepted: hidden, norm'),
        ("resnet20", {"hidden": [3]}, 'resnet20 takes no argument "hidden"; accepted: width, norm'),
        ("mlp", {"hidden": []}, "hidden must name at least one layer, got none; use softmax for a linear model"),
        ("mlp", {"hidden": [3, 0]}, "hidden must be a whole number >= 1, got 0"),
        (
            "mlp",
            {"hidden": [1], "norm": "group"},
            'norm "group" needs at least 2 channels, got 1; widen the layer or use "none"',
        ),
        ("convnet3", {"width": 0}, "width must be a whole number >= 1, got 0"),
        ("lenet", {"outputs": 0}, "outputs must be a whole number >= 1, got 0"),
        ("lenet", {"norm": "layer"}, 'norm must be "batch", "group" or "none", got "layer"'),
        (
            "softmax",
            {"norm": "group"},
            'softmax has no hidden layer to normalise: norm must be "none", got "group"; use mlp',
        ),
        (
            "lenet",
            {"shape": (64,)},
            "LeNet needs rows of shape (height, width) or (channels, height, width), got (64,); "
            "use softmax or mlp for other rows",
        ),
        (
            "vgg16",
            {"shape": (3, 8, 32)},
            "VGG16 needs images of at least 16 x 16, got 8 x 32 from (3, 8, 32); "
            "put channels first, enlarge the images, or use mlp",
        ),
        ("softmax", {"shape": ()}, "shape must be that of one row, all sizes >= 1, got ()"),
        ("lenet", {"shape": (0, 28, 28)}, "shape must be that of one row, all sizes >= 1, got (0, 28, 28)"),
    ],
)
def test_build_says_what_is_wrong(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(name, **{"shape": (28, 28), "outputs": 10, **options})
    assert type(caught.value) is Misuse
    assert str(caught.value) == message


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(Misuse, match=r"x must be a batch of rows of shape \(1, 16, 16\), got \(2, 16, 16\)"):
        small(name)(rows(2, (16, 16)))


def test_json_arguments_are_taken_as_they_are() -> None:
    net = build("mlp", shape=[4, 5], outputs=2, hidden=[3])
    assert net(rows(2, (4, 5))).shape == (2, 2)


@pytest.mark.parametrize("name", SMALL)
def test_head_and_features_of_ours(name: str) -> None:
    net, x = small(name), rows(2, (1, 16, 16))
    assert head_of(net) == ("head", net.head)
    assert torch.equal(features_of(net, x), net.features(x))


def test_head_and_features_of_a_plain_module() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)))
    x = rows(3, (4,))
    name, head = head_of(net)
    assert name == "2.1"
    assert head is net.get_submodule(name)
    assert torch.equal(features_of(net, x), net[:2](x))
    assert features_of(net, x).requires_grad
    assert not head._forward_pre_hooks


def test_a_linear_layer_is_its_own_head() -> None:
    layer, x = nn.Linear(4, 2), rows(3, (4,))
    assert head_of(layer) == ("", layer)
    assert features_of(layer, x) is x


def test_features_leave_mode_flags_and_running_statistics_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    net[1].eval()
    flags = [layer.training for layer in net.modules()]
    before = net[1].running_mean.clone()
    features_of(net, rows(3, (4,)))
    assert [layer.training for layer in net.modules()] == flags
    assert torch.equal(net[1].running_mean, before)
    ours = small("resnet20", norm="batch")
    statistics = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    features_of(ours, rows(3, (1, 16, 16)))
    assert ours.training
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in ours.named_buffers())


class Odd(nn.Module):
    """A module whose head is called as often as one likes, perhaps by keyword, perhaps in vain."""

    def __init__(self, calls: int = 1, fail: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.calls, self.fail = calls, fail

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.head(input=x)
        if self.fail:
            raise KeyError("out of luck")
        return x


def test_features_of_a_head_called_by_keyword() -> None:
    x = rows(3, (4,))
    assert torch.equal(features_of(Odd(), x), x)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_head_not_called_once_is_refused(calls: int) -> None:
    with pytest.raises(Unsupported, match=f'^the head "head" must be called once a pass, got {calls} calls'):
        features_of(Odd(calls), rows(3, (4,)))


def test_the_hook_goes_when_forward_raises() -> None:
    net = Odd(fail=True)
    with pytest.raises(KeyError):
        features_of(net, rows(3, (4,)))
    assert not net.head._forward_pre_hooks
    assert net.training


def test_a_head_on_sequences_is_refused() -> None:
    with pytest.raises(Unsupported, match=r'^the head "head" must see \(batch, width\), got \(3, 5, 4\)'):
        features_of(Odd(), rows(3, (5, 4)))


def test_a_module_without_linear_layer_has_no_head() -> None:
    with pytest.raises(Unsupported, match=r"^ReLU has no nn.Linear to use as head"):
        head_of(nn.ReLU())


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.SyncBatchNorm(4),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.InstanceNorm3d(4, track_running_stats=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_batch_statistics_are_found(layer: nn.Module) -> None:
    assert has_batch_norm(nn.Sequential(nn.ReLU(), nn.Sequential(layer), layer)) == "1.0"
    assert has_batch_norm(layer) == type(layer).__name__


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4), nn.Dropout()])
def test_no_batch_statistics_where_there_are_none(layer: nn.Module) -> None:
    assert has_batch_norm(nn.Sequential(layer)) is None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(),
        nn.Dropout1d(),
        nn.Dropout2d(),
        nn.Dropout3d(),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
        nn.LSTM(4, 4, num_layers=2, dropout=0.1),
        nn.MultiheadAttention(4, 2, dropout=0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_dropout_is_found(layer: nn.Module) -> None:
    assert has_dropout(nn.Sequential(nn.ReLU(), layer)) == "1"
    assert has_dropout(layer) == type(layer).__name__


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), nn.BatchNorm1d(4)])
def test_no_dropout_where_nothing_is_dropped(layer: nn.Module) -> None:
    assert has_dropout(nn.Sequential(layer)) is None
