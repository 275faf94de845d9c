"""Row gradients in factors, in one matrix and streamed: all against one backward pass a row, in float64."""

import pytest
import torch
from torch import nn

from expunge.calculus import FisherDual, Objective, row_gradients
from expunge.calculus.factored import maker
from expunge.calculus.pieces import Matrix, Outer, Pieces
from expunge.calculus.rows import Streamed
from expunge.core.errors import Misuse
from expunge.core.mask import Mask
from expunge.learn import models


def cross_entropy(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


class Tokens(nn.Module):
    """Linear and norm layers on several vectors a row."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 5), nn.LayerNorm((3, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x.view(len(x), 3, 8))).tanh().mean(1))


class Tied(nn.Module):
    """One layer, called twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()))


class Twins(Tied):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(24, 24)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.head(self.other(self.layer(x).tanh()))


class Aside(Tied):
    """A layer that is called once, and whose weight is used once more without calling it."""

    def forward(self, x):
        return self.head(self.layer(x).tanh() @ self.layer.weight)


class Slightly(Tied):
    """As `Aside`, and what the weight does besides is small."""

    def __init__(self, share=0.005):
        super().__init__()
        self.share = share

    def forward(self, x):
        return self.head(self.layer(x).tanh() + self.share * x @ self.layer.weight)


class Faint(Aside):
    """As `Aside`, by a path that adds little to the gradient as a whole."""

    def forward(self, x):
        return self.head(x + 1e-8 * (self.layer(x).tanh() @ self.layer.weight))


class Inner(Tokens):
    """A norm over the last axis of rows that have two."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)


class Turned(Tied):
    """Rows not along the first axis of what the layer sees: with as many rows as there are, shapes do not tell."""

    def forward(self, x):
        turned = self.layer(x.view(len(x), 1, 24).expand(-1, len(x), -1).transpose(0, 1))
        return self.head(turned.transpose(0, 1).mean(1).tanh())


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))

    def forward(self, x):
        return self.layers(x)


def image(*layers):
    return nn.Sequential(nn.Unflatten(1, (1, 4, 6)), *layers, nn.Flatten(), nn.LazyLinear(3))


MODULES = {
    "mlp": lambda: nn.Sequential(nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "norms": lambda: nn.Sequential(nn.Linear(24, 6), nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3)),
    "padded": lambda: image(nn.Conv2d(1, 4, 3, padding=(1, 2)), nn.GroupNorm(2, 4), nn.Tanh()),
    "oblong": lambda: image(nn.Conv2d(1, 2, (2, 3)), nn.BatchNorm2d(2), nn.Softplus(), nn.Conv2d(2, 3, (1, 2))),
    "dilated": lambda: image(nn.Conv2d(1, 2, (2, 3), dilation=(2, 1), padding=1), nn.Tanh()),
    "strided": lambda: image(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 2, bias=False)),
    "tokens": Tokens,
    "inner": Inner,
    "in place": InPlace,
}
OTHERS = {
    "tied": Tied,
    "twins": Twins,
    "aside": Aside,
    "slightly": Slightly,
    "faint": Faint,
    "turned": Turned,
    "groups": lambda: image(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2)),
    "same": lambda: image(nn.Conv2d(1, 2, 3, padding="same"), nn.Tanh()),
    "reflected": lambda: image(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Tanh()),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 8)),
        nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(24, 3),
    ),
}


def rows(n=7):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 24, dtype=torch.float64, generator=rng), torch.randint(0, 3, (n,), generator=rng)


def objective_of(kind, **args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = {**MODULES, **OTHERS}[kind]()
        module(torch.randn(30, 24))
        module.double()
        module(rows(30)[0])
    return Objective(module.eval(), cross_entropy, **args)


def one_by_one(objective, x, y):
    held = dict(objective.module.named_parameters())
    answer = []
    for i in range(len(x)):
        loss = cross_entropy(objective.module(x[i : i + 1]), y[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, [held[name] for name in objective.names])
        flat = zip(parts, objective.places.values(), strict=True)
        answer.append(torch.cat([g.reshape(-1) if places is None else g.reshape(-1)[places] for g, places in flat]))
    return torch.stack(answer)


def half(objective):
    rng = torch.Generator().manual_seed(5)
    weights = {n: p for n, p in objective.module.named_parameters() if p.dim() > 1}
    return Mask({name: torch.rand(weight.shape, generator=rng) < 0.5 for name, weight in weights.items()})


def same_matrix(found, right):
    rng = torch.Generator().manual_seed(2)
    v = torch.randn(right.shape[1], dtype=torch.float64, generator=rng)
    c = torch.randn(right.shape[0], dtype=torch.float64, generator=rng)
    assert (found.rows, found.size) == right.shape
    torch.testing.assert_close(found.gram(), right @ right.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.times(v), right @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.transposed(c), right.T @ c, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [*MODULES, *OTHERS])
def test_every_way_holds_the_gradients_of_a_loop(kind, masked):
    whole = objective_of(kind)
    objective = Objective(whole.module, cross_entropy, moves=half(whole)) if masked else whole
    x, y = rows()
    right = one_by_one(objective, x, y)
    make, each = maker(objective, x, y)
    assert (make.func.__name__ == "_by_layers") == (kind in MODULES)
    same_matrix(make(x, y), right)
    same_matrix(row_gradients(objective, x, y), right)
    same_matrix(row_gradients(objective, x, y, most=4 * each), right)
    torch.testing.assert_close(objective.gradients(x, y), right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("share", "dtype", "way"),
    [
        (5e-3, torch.float64, "_by_rows"),
        (1e-5, torch.float64, "_by_rows"),
        (5e-3, torch.float32, "_by_rows"),
        (0.0, torch.float64, "_by_layers"),
        (0.0, torch.float32, "_by_layers"),
    ],
)
def test_a_weight_that_is_used_besides_by_however_little_does_not_go_by_layers(share, dtype, way):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = Objective(Slightly(share).to(dtype).eval(), cross_entropy)
    x, y = rows()
    make, _ = maker(objective, x.to(dtype), y)
    assert make.func.__name__ == way


def test_a_gradient_that_is_zero_but_for_rounding_hinders_nobody():
    """A bias in front of a norm of its own channel alone: what it adds is taken out again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = image(nn.Conv2d(1, 4, 3), nn.GroupNorm(4, 4), nn.Tanh())
        module(torch.randn(2, 24))
    for dtype in (torch.float32, torch.float64):
        objective = Objective(module.to(dtype).eval(), cross_entropy)
        x, y = rows()
        make, _ = maker(objective, x.to(dtype), y)
        bias = objective.pieces(objective.gradient(x.to(dtype), y))["1.bias"]
        assert float(bias.norm()) < 1e-4
        assert make.func.__name__ == "_by_layers"


def test_rows_whose_gradients_are_all_zero_try_nothing():
    objective = objective_of("mlp")
    silent = Objective(objective.module, lambda out, y: 0 * cross_entropy(out, y))
    assert maker(silent, *rows())[0].func.__name__ == "_by_rows"


def test_work_is_counted_in_gradients_of_one_row():
    objective = objective_of("mlp")
    x, y = rows(11)
    _, each = maker(objective, x, y)
    kept, again = row_gradients(objective, x, y), row_gradients(objective, x, y, most=8 * each)
    v, c = torch.ones(objective.size, dtype=torch.float64), torch.ones(11, dtype=torch.float64)
    assert (kept.made, again.made) == (11, 0)
    again.gram()
    assert again.made == 4 + 2 * 4 + 3 * 3  # blocks of 4, 4 and 3: each with itself and with those before it
    again.times(v)
    again.transposed(c)
    assert again.made == 21 + 2 * 11
    kept.gram()
    kept.times(v)
    assert kept.made == 11


def test_chunks_of_rows_are_joined_in_order():
    objective = objective_of("padded")
    x, y = rows(70)
    same_matrix(row_gradients(objective, x, y), one_by_one(objective, x, y))


def test_a_linear_layer_is_never_multiplied_out():
    objective = objective_of("mlp")
    make, each = maker(objective, *rows())
    assert each == (24 + 5) + 5 + (5 + 3)
    held = make(*rows())
    assert [type(piece) for piece in held.pieces] == [Outer, Matrix, Outer]
    assert held.numbers == 7 * each < 7 * objective.size


def test_of_a_pruned_model_only_what_moves_is_kept():
    whole = objective_of("padded")
    mask = half(whole)
    objective = Objective(whole.module, cross_entropy, moves=mask)
    assert objective.size == whole.size - mask.held
    make, each = maker(objective, *rows())
    assert each == objective.size
    assert make(*rows()).numbers == 7 * objective.size


def test_a_vector_of_moving_entries_leaves_the_others_alone():
    whole = objective_of("mlp")
    mask = half(whole)
    mask.prune_(whole.module)
    objective = Objective(whole.module, cross_entropy, moves=mask)
    x, y = rows()
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moving = torch.cat([mask.moves.get(n, torch.ones_like(p)).reshape(-1).bool()
                        for n, p in whole.module.named_parameters()])  # fmt: skip
    spread = torch.zeros(whole.size, dtype=torch.float64)
    spread[moving] = v
    for name in ("hessian_product", "gauss_newton_product"):
        torch.testing.assert_close(getattr(objective, name)(x, y, v), getattr(whole, name)(x, y, spread)[moving])
    torch.testing.assert_close(objective.scores(x, y, v), whole.scores(x, y, spread))
    torch.testing.assert_close(objective.gradient(x, y), whole.gradient(x, y)[moving])
    before = whole.vector()
    objective.put(objective.vector() + v)
    torch.testing.assert_close(whole.vector() - before, spread, rtol=0, atol=1e-15)
    assert not whole.vector()[~moving].any()


def test_a_mask_of_nothing_or_of_another_model_is_refused():
    module = objective_of("mlp").module
    with pytest.raises(Misuse, match="holds every entry"):
        Objective(
            module, cross_entropy, moves=Mask({n: torch.zeros(p.shape).bool() for n, p in module.named_parameters()})
        )
    with pytest.raises(Misuse, match="of another model"):
        Objective(module, cross_entropy, moves=Mask({"9.weight": torch.ones(2).bool()}))


def test_weights_of_rows_multiply_their_gradients():
    objective = objective_of("tokens")
    x, y = rows()
    c = torch.arange(7, dtype=torch.float64) - 2
    torch.testing.assert_close(objective.gradient(x, y, weights=c), one_by_one(objective, x, y).T @ c)


@pytest.mark.parametrize("kind", ["mlp", "strided", "attention"])
@pytest.mark.parametrize("n", [5, 11])
def test_inverse_products_do_not_depend_on_how_the_gradients_are_held(kind, n):
    objective = objective_of(kind)
    x, y = rows(n)
    right = one_by_one(objective, x, y)
    p = right.shape[1]
    v = torch.randn(p, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    matrix = right.T @ right / n
    matrix = matrix + (0.1 * matrix.trace() / p + 0.02) * torch.eye(p, dtype=torch.float64)
    _, each = maker(objective, x, y)
    for most in (1 << 28, n * each - 1, 4 * each):
        held = row_gradients(objective, x, y, most=most)
        assert isinstance(held, Pieces if most == 1 << 28 else Streamed)
        fisher = FisherDual(held, 0.1, ridge=0.02)
        torch.testing.assert_close(fisher.solve(v), torch.linalg.solve(matrix, v), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(fisher.product(v), matrix @ v)


def test_memory_for_less_than_two_rows_is_refused():
    with pytest.raises(Misuse, match=r"two rows .* allow more"):
        row_gradients(objective_of("tied"), *rows(), most=700)


def test_hooks_are_gone_afterwards_and_nothing_is_written():
    objective = objective_of("in place")
    before = {name: tensor.clone() for name, tensor in objective.module.state_dict().items()}
    row_gradients(objective, *rows()).gram()
    assert not any(part._forward_hooks for part in objective.module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.module.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.module.parameters())


@pytest.mark.parametrize("name", ["lenet", "convnet3", "resnet20"])
def test_the_networks_by_name_go_by_layers(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = models.build(name, shape=(16, 16), outputs=3).double().eval()
    x, y = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).double(), torch.arange(3)
    objective = Objective(module, cross_entropy)
    make, _ = maker(objective, x, y)
    assert make.func.__name__ == "_by_layers"
    same_matrix(make(x, y), one_by_one(objective, x, y))
