"""Inner products of rows' gradients with vectors: against the gradients themselves, each made by one backward pass."""

import pytest
import torch
from torch import nn

from expunge.calculus import Objective, factored, influence, influence_scores
from expunge.core.errors import Misuse
from expunge.core.mask import Mask
from expunge.learn import models


def cross_entropy(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


class Tokens(nn.Module):
    """Linear and norm layers on several vectors a row."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(32, 5), nn.LayerNorm((8, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x.reshape(len(x), 8, 32))).tanh().mean(1))


class Twins(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x.flatten(1)).tanh()))


class Axes(nn.Module):
    """A linear layer whose first axis is not that of the rows, which one row alone does not show."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(256, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1)[None]).tanh()[0])


def attention():
    block = nn.TransformerEncoderLayer(32, 2, 8, 0.0, batch_first=True)
    return nn.Sequential(nn.Flatten(1, 2), nn.Unflatten(1, (8, 32)), block, nn.Flatten(), nn.Linear(256, 3))


def network(name, **args):
    return lambda: models.build(name, shape=(16, 16), outputs=3, **args)


BY_LAYERS = {
    "softmax": network("softmax"),
    "mlp": network("mlp", hidden=[20, 7]),
    "widening": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.Tanh(), nn.Linear(4, 30), nn.Linear(30, 3)),
    "without bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)),
    "lenet": network("lenet"),
    "group norm": network("convnet3", width=4),
    "batch norm": network("convnet3", width=4, norm="batch"),
    "mlp with batch norm": network("mlp", hidden=[6], norm="batch"),
    "strides": network("resnet20"),
    "tokens": Tokens,
}
IN_FORWARD_MODE = {"twins": Twins, "axes": Axes, "attention": attention}


def objective_of(kind, dtype=torch.float64, **args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = {**BY_LAYERS, **IN_FORWARD_MODE}[kind]()
        module(torch.randn(30, 16, 16))
    return Objective(module.to(dtype).eval(), cross_entropy, **args)


def rows(n=9, dtype=torch.float64):
    """Images with a border that is zero in all of them, as digits have."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 16, 16, dtype=torch.float64, generator=rng)
    x[:, :3], x[:, :, -2:] = 0, 0
    return x.to(dtype), torch.randint(0, 3, (n,), generator=rng)


def vectors(objective, columns=5, dtype=torch.float64):
    rng = torch.Generator().manual_seed(2)
    return torch.randn(objective.size, columns, dtype=torch.float64, generator=rng).to(dtype)


def gradients(objective, x, y):
    """One backward pass a row, by nothing that is used above."""
    held = dict(objective.module.named_parameters())
    answer = []
    for i in range(len(x)):
        loss = cross_entropy(objective.module(x[i : i + 1]), y[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, [held[name] for name in objective.names])
        flat = zip(parts, objective.places.values(), strict=True)
        answer.append(torch.cat([g.reshape(-1) if which is None else g.reshape(-1)[which] for g, which in flat]))
    return torch.stack(answer)


def half(objective):
    rng = torch.Generator().manual_seed(5)
    weights = {name: one for name, one in objective.module.named_parameters() if one.dim() > 1}
    return Mask({name: torch.rand(weight.shape, generator=rng) < 0.5 for name, weight in weights.items()})


def error(found, right):
    assert found.shape == right.shape
    assert found.dtype == right.dtype
    assert not found.requires_grad
    return float((found - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [*BY_LAYERS, *IN_FORWARD_MODE])
def test_scores_are_the_products_of_a_loop_of_gradients(kind, masked, columns):
    whole = objective_of(kind)
    objective = Objective(whole.module, cross_entropy, moves=half(whole)) if masked else whole
    x, y = rows()
    v = vectors(objective, columns)
    right = gradients(objective, x, y) @ v
    assert error(influence_scores(objective, [(x, y)], v), right) < 1e-10
    torch.testing.assert_close(objective.gradients(x, y) @ v, right, rtol=1e-9, atol=1e-10)
    assert (factored.layered(objective, x, y) is not None) == (kind in BY_LAYERS)


@pytest.mark.parametrize("kind", BY_LAYERS)
def test_single_precision_keeps_five_digits(kind):
    x, y = rows()
    exact = objective_of(kind)
    right = gradients(exact, x, y) @ vectors(exact)
    objective = objective_of(kind, torch.float32)
    v = vectors(objective, dtype=torch.float32)
    assert error(influence_scores(objective, [(x.float(), y)], v).double(), right) < 1e-5


@pytest.mark.parametrize("kind", ["mlp", "lenet", "tokens", "batch norm"])
def test_what_is_known_to_go_by_layers_makes_no_pass_in_forward_mode(kind, monkeypatch):
    objective = objective_of(kind)
    monkeypatch.setattr(Objective, "scores", None)
    for columns in (1, 5):
        influence_scores(objective, [rows()], vectors(objective, columns))


@pytest.mark.parametrize("kind", BY_LAYERS)
def test_every_parameter_counts(kind):
    """A vector that is zero but for one parameter: whatever forgets that one, be it a bias, answers zero."""
    objective = objective_of(kind)
    x, y = rows()
    right = gradients(objective, x, y)
    start = 0
    for name, piece in objective.pieces(objective.vector()).items():
        v = torch.zeros(objective.size, dtype=torch.float64)
        v[start : start + len(piece)] = vectors(objective, 1)[start : start + len(piece), 0]
        start += len(piece)
        wanted = right @ v
        if float(wanted.abs().max()) < 1e-9:  # a bias in front of a norm of its channel alone moves nothing
            assert name.endswith("bias")
            continue
        assert error(influence_scores(objective, [(x, y)], v), wanted) < 1e-9, name
    assert start == objective.size


@pytest.mark.parametrize("kind", ["mlp", "lenet", "attention"])
def test_a_vector_is_a_matrix_of_one_column(kind):
    objective = objective_of(kind)
    v = vectors(objective, 1)
    one, many = (influence_scores(objective, [rows()], some) for some in (v[:, 0], v))
    assert (one.shape, many.shape) == ((9,), (9, 1))
    torch.testing.assert_close(one, many[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("kind", ["mlp", "widening", "lenet", "group norm", "tokens", "attention"])
def test_neither_batches_nor_blocks_change_the_numbers(kind, columns, monkeypatch):
    objective = objective_of(kind)
    x, y = rows(40)
    v = vectors(objective, columns)
    whole = influence_scores(objective, [(x, y)], v)
    for sizes in ([1] * 40, [39, 1], [0, 20, 0, 20]):
        batches = zip(x.split(sizes), y.split(sizes), strict=True)
        assert error(influence_scores(objective, batches, v), whole) < 1e-12
    for scratch in (1, 100, 3000):
        monkeypatch.setattr(influence, "SCRATCH", scratch)
        assert error(influence_scores(objective, [(x, y)], v), whole) < 1e-12


def test_one_row_first_does_not_settle_the_way_of_those_that_follow():
    objective = objective_of("axes")
    x, y = rows()
    v = vectors(objective)
    found = influence_scores(objective, zip(x.split([1, 8]), y.split([1, 8]), strict=True), v)
    assert error(found, gradients(objective, x, y) @ v) < 1e-10


def test_no_rows_have_no_scores():
    objective = objective_of("mlp")
    v = vectors(objective)
    x, y = rows(0)
    for batches in ([], [(x, y)], [(x, y), (x, y)]):
        assert influence_scores(objective, batches, v).shape == (0, 5)
        assert influence_scores(objective, batches, v[:, 0]).shape == (0,)
    assert influence_scores(objective, [rows()], v[:, :0]).shape == (9, 0)


def test_some_parameters_only():
    objective = objective_of("mlp", names=["head.bias", "body.0.weight"])
    x, y = rows()
    v = vectors(objective)
    assert error(influence_scores(objective, [(x, y)], v), gradients(objective, x, y) @ v) < 1e-10


def test_columns_need_not_lie_side_by_side_in_memory():
    objective = objective_of("lenet")
    v = vectors(objective)
    turned = v.T.contiguous().T
    whole = influence_scores(objective, [rows()], v)
    assert error(influence_scores(objective, [rows()], turned), whole) < 1e-12
    assert error(influence_scores(objective, [rows()], v[:, 2]), whole[:, 2]) < 1e-12


@pytest.mark.parametrize("shape", [(-1,), (1,), (-1, 2), (0, 2, 2)])
def test_a_vector_of_another_model_is_refused(shape):
    objective = objective_of("mlp")
    wrong = torch.zeros(objective.size + shape[0], *shape[1:], dtype=torch.float64)
    with pytest.raises(Misuse, match=rf"v must be \({objective.size},\) or \({objective.size}, columns\)"):
        influence_scores(objective, [rows()], wrong)


def test_a_vector_of_another_precision_is_refused():
    objective = objective_of("mlp")
    with pytest.raises(Misuse, match=r"v must be torch\.float64 as the parameters are, got torch\.float32"):
        influence_scores(objective, [rows()], torch.zeros(objective.size))


def test_the_module_is_left_as_it_was():
    objective = objective_of("lenet")
    before = objective.vector()
    influence_scores(objective, [rows()], vectors(objective))
    assert torch.equal(objective.vector(), before)
    assert all(one.grad is None for one in objective.module.parameters())
    assert not any(part._forward_hooks for part in objective.module.modules())
