"""Each derivative and each solver against brute force in float64; batch norm in training mode is refused."""

from threading import Event, Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.calculus import FisherDual, Objective, conjugate_gradients, dense, lissa, mean_eigenvalue, solve_dense
from expunge.calculus.objective import second_derivatives
from expunge.core.errors import Misuse, Unsupported


def cross_entropy(outputs, y):
    return nn.functional.cross_entropy(outputs, y, reduction="none")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.view(len(x), 6, 4)).mean(1))


def made(kind):
    torch.manual_seed(0)
    modules = {
        "mlp": lambda: nn.Sequential(nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 3)),
        "convolution": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 4, 6)),
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        "attention": Attention,
    }
    module = modules[kind]().double()
    if kind == "convolution":
        module(torch.randn(20, 24, dtype=torch.float64))  # so that the running statistics are not the initial ones
    return module.eval()


@pytest.fixture(params=["mlp", "convolution", "attention"])
def objective(request):
    return Objective(made(request.param), cross_entropy)


@pytest.fixture
def rows():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(7, 24, dtype=torch.float64, generator=rng)
    return x, torch.randint(0, 3, (7,), generator=rng)


def gradients_one_by_one(objective, x, y):
    answer = []
    for i in range(len(x)):
        loss = cross_entropy(objective.module(x[i : i + 1]), y[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, list(objective.module.parameters()))
        answer.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(answer)


def hessian(objective, x, y):
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivatives
        return torch.autograd.functional.hessian(lambda v: objective.losses(x, y, v).sum(), objective.vector())


def test_gradients_are_those_of_a_loop(objective, rows):
    one_by_one = gradients_one_by_one(objective, *rows)
    for chunk in (None, 2):
        torch.testing.assert_close(objective.gradients(*rows, chunk=chunk), one_by_one)
    torch.testing.assert_close(objective.gradient(*rows), one_by_one.sum(0))


def test_scores_are_inner_products_with_the_gradients(objective, rows):
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(objective.scores(*rows, v), gradients_one_by_one(objective, *rows) @ v)


def test_hessian_products_are_those_of_the_whole_matrix(objective, rows):
    whole = hessian(objective, *rows)
    found = dense(lambda v: objective.hessian_product(*rows, v), objective.size, objective.vector())
    torch.testing.assert_close(found, whole, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found, found.T, atol=1e-10, rtol=1e-8)


def test_gauss_newton_products_are_those_of_the_jacobian(objective, rows):
    x, y = rows
    jacobian = torch.autograd.functional.jacobian(lambda v: objective.outputs(v, x), objective.vector())
    chances = torch.softmax(objective.module(x), 1).detach()
    curved = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    whole = torch.einsum("nap,nab,nbq->pq", jacobian, curved, jacobian)
    found = dense(lambda v: objective.gauss_newton_product(x, y, v), objective.size, objective.vector())
    torch.testing.assert_close(found, whole, atol=1e-10, rtol=1e-8)
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-10


def test_some_parameters_may_be_chosen_and_the_others_stay_constant(rows):
    module = made("mlp")
    last = Objective(module, cross_entropy, names=["2.weight", "2.bias"])
    everything = Objective(module, cross_entropy)
    assert (last.size, everything.size) == (18, 143)
    torch.testing.assert_close(last.gradients(*rows), everything.gradients(*rows)[:, -18:])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    last.put(last.vector() + 1)
    assert all(torch.equal(before[name], module.state_dict()[name]) == name.startswith("0.") for name in before)


def test_nothing_is_written_to(objective, rows):
    before = {name: tensor.clone() for name, tensor in objective.module.state_dict().items()}
    v = torch.ones_like(objective.vector())
    objective.gradients(*rows)
    objective.scores(*rows, v)
    objective.hessian_product(*rows, v)
    objective.gauss_newton_product(*rows, v)
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.module.state_dict().items())
    assert not any(torch._C._functorch.is_gradtrackingtensor(p) for p in objective.module.parameters())


@pytest.mark.parametrize("kind", ["mlp", "convolution"])
def test_training_mode_is_refused_with_the_reason(kind):
    module = made(kind)
    next(module.children()).train()
    with pytest.raises(Unsupported, match=r"batch norm mixes rows.*module.eval"):
        Objective(module, cross_entropy)


def test_names_that_are_no_parameters_are_refused():
    with pytest.raises(Misuse, match=r"no parameter '9\.weight'"):
        Objective(made("mlp"), cross_entropy, names=["9.weight"])


@given(n=st.integers(1, 12), p=st.integers(1, 12), damping=st.floats(1e-3, 10), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_dual_fisher_inverse_is_that_of_the_matrix(n, p, damping, seed):
    rng = torch.Generator().manual_seed(seed)
    gradients, v = torch.randn(n, p, generator=rng, dtype=torch.float64), torch.randn(p, generator=rng).double()
    fisher = FisherDual(gradients, damping)
    matrix = gradients.T @ gradients / n
    matrix = matrix + damping * matrix.trace() / p * torch.eye(p, dtype=torch.float64)
    torch.testing.assert_close(fisher.solve(v), torch.linalg.solve(matrix, v), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fisher.product(v), matrix @ v)
    u = torch.randn(p, generator=rng).double()
    torch.testing.assert_close(u @ fisher.solve(v), v @ fisher.solve(u), rtol=1e-8, atol=1e-10)
    shuffled = FisherDual(gradients[torch.randperm(n, generator=rng)], damping)
    torch.testing.assert_close(fisher.solve(v), shuffled.solve(v), rtol=1e-8, atol=1e-10)


def popular_recurrence(gradients, v):
    """The recurrence that public code passes off as an inverse product, with damping 1; here as a liar."""
    n = len(gradients)
    o, k = gradients[0].clone(), v.clone()
    for g in gradients[1:]:
        k = k - (k @ g) / (n + o @ g) * o
        o = o - (o @ g) / (n + o @ g) * o
    return k


def test_the_popular_recurrence_is_no_inverse_not_symmetric_and_depends_on_the_order():
    rng = torch.Generator().manual_seed(3)
    gradients = torch.randn(30, 10, generator=rng, dtype=torch.float64)
    u, v = torch.randn(2, 10, generator=rng, dtype=torch.float64)
    right = torch.linalg.solve(torch.eye(10, dtype=torch.float64) + gradients.T @ gradients / 30, v)
    wrong = popular_recurrence(gradients, v)
    assert float((wrong - right).norm() / right.norm()) > 0.1
    assert float((u @ wrong - v @ popular_recurrence(gradients, u)).abs()) > 1e-3
    assert float((wrong - popular_recurrence(gradients.flip(0), v)).norm()) > 1e-3
    along = torch.linalg.lstsq(gradients[:1].T, (v - wrong)[:, None]).solution
    torch.testing.assert_close(gradients[0] * along[0, 0], v - wrong)  # it only ever moves along the first gradient


def test_without_damping_or_gradients_there_is_no_inverse():
    with pytest.raises(Misuse, match="damping must be > 0"):
        FisherDual(torch.ones(2, 3), 0.0)
    with pytest.raises(Misuse, match="all gradients are zero"):
        FisherDual(torch.zeros(2, 3), 1.0)


@pytest.fixture
def system():
    rng = torch.Generator().manual_seed(4)
    root = torch.randn(12, 12, generator=rng, dtype=torch.float64)
    return root @ root.T + 0.5 * torch.eye(12, dtype=torch.float64), torch.randn(12, generator=rng, dtype=torch.float64)


def test_solvers_agree_and_say_how_well_they_did(system):
    matrix, b = system
    unit = float(matrix.trace()) / 12
    damped = matrix + 0.1 * unit * torch.eye(12, dtype=torch.float64)
    right = torch.linalg.solve(damped, b)
    exact = solve_dense(matrix, b, damping=0.1)
    iterated = conjugate_gradients(lambda v: matrix @ v, b, damping=0.1, unit=unit, tolerance=1e-10)
    split = conjugate_gradients(lambda v: matrix @ v, b, damping=0.04, unit=unit, ridge=0.06 * unit, tolerance=1e-10)
    scale = float(torch.linalg.eigvalsh(damped)[-1])
    slow = lissa([lambda v: matrix @ v] * 2000, b, scale=scale, damping=0.1, unit=unit)
    for found, close in ((exact, 1e-10), (iterated, 1e-9), (split, 1e-9), (slow, 1e-4)):
        torch.testing.assert_close(found.x, right, rtol=close, atol=close)
        assert found.residual == pytest.approx(float((damped @ found.x - b).norm() / b.norm()))
    assert exact.converged
    assert iterated.converged
    short = conjugate_gradients(lambda v: matrix @ v, b, most=2)
    assert (short.iterations, short.converged) == (2, False)
    assert short.residual > 1e-6


def test_what_is_not_positive_definite_is_refused_with_the_figure(system):
    matrix, b = system
    lowered = matrix - 2 * torch.eye(12)
    least = float(torch.linalg.eigvalsh(lowered)[0])
    assert least < 0
    with pytest.raises(Misuse, match=f"smallest eigenvalue is {least:.3g}"):
        solve_dense(lowered, b)
    with pytest.raises(Misuse, match=r"the curvature is -.* add more than"):
        conjugate_gradients(lambda v: lowered @ v, b)
    with pytest.raises(Misuse, match=r"the curvature is -.* raise damping above") as raised:
        conjugate_gradients(lambda v: lowered @ v, b, damping=0.01, unit=2.0)
    told = float(str(raised.value).rpartition(" ")[2])
    assert 0.01 < told <= -least / 2 * 1.01  # no more than what is lacking, counted in units
    with pytest.raises(Misuse, match="diverged"):
        lissa([lambda v: matrix @ v] * 4000, b, scale=0.1)


def test_a_zero_right_side_has_a_zero_solution():
    found = conjugate_gradients(lambda v: v, torch.zeros(3))
    assert (found.x.tolist(), found.residual, found.converged) == ([0, 0, 0], 0.0, True)


def test_damping_is_counted_in_the_curvatures_own_mean_eigenvalue(system):
    matrix, b = system
    for solve in (
        lambda a: solve_dense(a, b, damping=0.3),
        lambda a: conjugate_gradients(lambda v: a @ v, b, damping=0.3, unit=float(a.trace()) / 12, tolerance=1e-12),
    ):
        torch.testing.assert_close(solve(1000 * matrix).x, solve(matrix).x / 1000, rtol=1e-8, atol=1e-12)
    root = torch.randn(5, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    torch.testing.assert_close(FisherDual(root, 0.3).solve(b), solve_dense(root.T @ root / 5, b, damping=0.3).x)


@pytest.mark.parametrize("unit", [None, 0.0, -1.0])
def test_damping_without_a_unit_is_refused(unit, system):
    matrix, b = system
    with pytest.raises(Misuse, match="in mean eigenvalues, which must be > 0"):
        conjugate_gradients(lambda v: matrix @ v, b, damping=0.1, unit=unit)
    with pytest.raises(Misuse, match="in mean eigenvalues, which must be > 0"):
        lissa([lambda v: matrix @ v], b, scale=1.0, damping=0.1, unit=unit)
    with pytest.raises(Misuse, match="damping must be >= 0, got -1"):
        solve_dense(matrix, b, damping=-1.0)


def test_the_mean_eigenvalue_is_exact_for_few_parameters_and_else_near(system):
    matrix = system[0]
    right, like, rng = (
        float(matrix.trace()) / 12,
        torch.zeros(12, dtype=torch.float64),
        torch.Generator().manual_seed(0),
    )
    assert mean_eigenvalue(lambda v: matrix @ v, like, rng, probes=12) == pytest.approx(right, rel=1e-12)
    several = [
        mean_eigenvalue(lambda v: matrix @ v, like, torch.Generator().manual_seed(k), probes=8) for k in range(60)
    ]
    away = torch.tensor(several) / right - 1
    assert abs(float(away.mean())) < 4 * float(away.std()) / 60**0.5
    assert 0 < float(away.std()) < (2 / 8) ** 0.5
    state = rng.get_state()
    assert several[0] == mean_eigenvalue(lambda v: matrix @ v, like, rng, probes=8)
    assert torch.equal(state, rng.get_state())


@pytest.mark.parametrize("probes", [1, 3, 8, 11, 40])
def test_of_a_diagonal_matrix_any_number_of_probes_finds_the_mean_eigenvalue(probes):
    diagonal = torch.linspace(-1, 5, 12, dtype=torch.float64)
    products = []

    def product(v):
        products.append(v)
        return diagonal * v

    found = mean_eigenvalue(product, diagonal, torch.Generator().manual_seed(0), probes=probes)
    assert found == pytest.approx(2.0, rel=1e-12)
    assert len(products) == min(probes, 12)


def switches():
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


@pytest.mark.parametrize("first_out", [0, 1])
def test_threads_that_overlap_leave_attention_as_it_was(first_out):
    """Each goes in while the other is inside, and out in either order; nobody sees the fused kernels from inside."""
    before, seen = switches(), []
    into, out = [Event(), Event()], [Event(), Event()]

    def work(which):
        with second_derivatives():
            into[which].set()
            out[which].wait(60)
            seen.append(switches())

    threads = [Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread, event in zip(threads, into, strict=True):
        thread.start()
        assert event.wait(60)
    for which in (first_out, 1 - first_out):
        out[which].set()
        threads[which].join(60)
    assert before[0]
    assert any(before[1:3])
    assert seen == [(False, False, False, True)] * 2
    assert switches() == before


def test_an_error_inside_leaves_attention_as_it_was():
    before = switches()
    with pytest.raises(ZeroDivisionError), second_derivatives(), second_derivatives():
        raise ZeroDivisionError
    assert switches() == before


def test_a_ridge_is_added_as_it_is_and_may_not_be_negative():
    gradients = torch.randn(4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    matrix = gradients.T @ gradients / 4
    matrix = matrix + (matrix.trace() / 3 + 0.7) * torch.eye(3, dtype=torch.float64)
    v = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(FisherDual(gradients, 1.0, ridge=0.7).solve(v), torch.linalg.solve(matrix, v))
    with pytest.raises(Misuse, match="ridge must be >= 0"):
        FisherDual(gradients, 1.0, ridge=-0.1)
