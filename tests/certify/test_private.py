from __future__ import annotations

import math
import sys
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import allow_code
from expunge.calculus.factored import maker
from expunge.calculus.objective import Objective
from expunge.calculus.pieces import Matrix, Pieces
from expunge.certify import gaussian, noise, private, private_steps
from expunge.certify.composition import RenyiAccountant, group_epsilon
from expunge.certify.guarantee import recheck
from expunge.certify.private import DERIVATIONS, covered, steps_epsilon, steps_noise, train_private
from expunge.certify.private_steps import PrivateDescent, clipped_sum, secret_batch
from expunge.core.claim import Claim, Guarantee
from expunge.core.coins import generator
from expunge.core.errors import BudgetExhausted, Misuse, NeverTrained, Unsupported
from expunge.core.events import PrivateSteps, Removed
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import Tally, row_losses
from expunge.learn.predict import outputs
from expunge.learn.training import train
from expunge.testing import digits
from expunge.unlearn import FineTune, Retrain

RECIPE = Recipe(model="mlp", epochs=2, batch_size=96, optimiser_args={"lr": 0.5})


@pytest.fixture(autouse=True)
def given_noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounting takes seconds: where it is not what is tested, noise and epsilon are given."""
    if "accounting" not in request.node.name:
        monkeypatch.setattr(private, "steps_noise", lambda *_: 2.0)
        monkeypatch.setattr(private, "steps_epsilon", lambda *_: 7.0)


@cache
def one() -> tuple[Trained, Guarantee]:
    return train_private(RECIPE, digits().records, epsilon=8.0, delta=1e-3, group=3)


@pytest.mark.parametrize("group", [1, 2, 7])
def test_accounting_with_every_row_in_every_step_is_that_of_the_gaussian_mechanism(group: int) -> None:
    exact = gaussian.epsilon_of(group * math.sqrt(4) / 20.0, 1e-5)
    found = steps_epsilon(1.0, 20.0, 4, group, 1e-5)
    assert exact <= found <= exact * 1.01 + 1e-3


def test_accounting_of_single_rows_is_that_of_opacus_or_a_little_less() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of opacus, at import
        from opacus.accountants import PRVAccountant, RDPAccountant

    rate, size, steps = 0.05, 1.3, 60
    found = steps_epsilon(rate, size, steps, 1, 1e-5)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(size, rate, steps)]
    assert found == pytest.approx(prv.get_epsilon(1e-5), rel=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of opacus, that an order is the largest given
        assert found < rdp.get_epsilon(1e-5)
    assert found < RenyiAccountant().epsilon(
        [PrivateSteps(parameters=(), rate=rate, noise=size, steps=steps, group=1)], 1e-5
    )


def test_accounting_has_a_group_cost_more_than_a_row_and_less_than_by_the_lemma() -> None:
    row, three = (steps_epsilon(0.1, 4.0, 20, group, 1e-5) for group in (1, 3))
    lemma = group_epsilon(PrivateSteps(parameters=(), rate=0.1, noise=4.0, steps=20, group=3), 1e-5)
    assert row < three < lemma


def test_accounting_finds_enough_noise_and_hardly_more() -> None:
    found = steps_noise(0.1, 20, 3, 1.0, 1e-5)
    assert steps_epsilon(0.1, found, 20, 3, 1e-5) <= 1.0
    assert steps_epsilon(0.1, found * 0.99, 20, 3, 1e-5) > 1.0


def of_rows(module: nn.Module, loss: str, x: Tensor, y: Tensor) -> list[Tensor]:
    """Gradient of each row alone, by ordinary differentiation."""
    answer = []
    for row, label in zip(x, y, strict=True):
        module.zero_grad()
        row_losses(Recipe(model="mlp", loss=loss))(module(row[None]), label[None]).sum().backward()
        answer.append(torch.cat([p.grad.double().reshape(-1) for p in module.parameters() if p.grad is not None]))
    return answer


class Mixing(nn.Module):
    """Rows see the mean of their batch: a batch norm that no list of layers names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1)
        return self.head(x - 30 * x.mean(0))


def descent(module: nn.Module, recipe: Recipe = RECIPE, clip: float = 1.0) -> PrivateDescent:
    release = PrivateSteps(parameters=(), rate=1.0, noise=1.0, steps=1, group=1)
    return PrivateDescent(module, recipe, digits().records, release, clip, Tally())


def networks() -> dict[str, nn.Module]:
    shape = {"shape": (8, 8), "outputs": 10}
    made = {name: build(Recipe(model=name, model_args=shape)) for name in ("softmax", "mlp", "convnet3")}
    return {name: module.eval() for name, module in (made | {"mixing": Mixing()}).items()}


@pytest.mark.parametrize("name", ["softmax", "mlp", "convnet3", "mixing"])
@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_each_row_is_clipped_for_itself(name: str, clip: float) -> None:
    module = networks()[name]
    x, y = digits().records.x[:12].reshape(12, 8, 8), digits().records.y[:12]
    each = of_rows(module, "cross_entropy", x, y)
    wanted = sum(g * min(1.0, clip / float(g.norm())) for g in each)
    run = descent(module)
    objective = Objective(module, row_losses(RECIPE))
    found = clipped_sum(lambda a, b: run._gradients(objective, a, b), x, y, clip)
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())
    batch = sum(each)
    assert clip > 1 or float((batch * min(1.0, clip / float(batch.norm())) - wanted).norm()) > 0.1


@pytest.mark.parametrize(("alone", "safe"), [(True, True), (False, False)])
def test_no_row_moves_the_sum_by_more_than_the_clip_even_if_a_module_mixes_rows(alone: bool, safe: bool) -> None:
    module = Mixing().eval()
    run, objective = descent(module), Objective(module, row_losses(RECIPE))
    x, y = digits().records.x[:12].reshape(12, -1).clone(), digits().records.y[:12]
    x[0] *= 100

    def mixed(a: Tensor, b: Tensor) -> Pieces:
        # What hooks on layers take for gradients of rows: by the output's derivative, whatever the other rows did.
        return maker_by_layers(module, a, b)

    def make(a: Tensor, b: Tensor) -> Pieces:
        return run._gradients(objective, a, b) if alone else mixed(a, b)

    apart = clipped_sum(make, x, y, 1.0) - clipped_sum(make, x[1:], y[1:], 1.0)
    assert (float(apart.norm()) <= 1 + 1e-5) is safe


def maker_by_layers(module: Mixing, x: Tensor, y: Tensor) -> Pieces:
    flat = x - 30 * x.mean(0)
    out = module.head(flat).detach().requires_grad_()
    (b,) = torch.autograd.grad(nn.functional.cross_entropy(out, y, reduction="sum"), out)
    return Pieces([Matrix((b[:, :, None] * flat[:, None]).flatten(1)), Matrix(b)], len(x))


def test_gradients_of_rows_are_those_of_opacus() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of opacus, at import and of its hooks
        from opacus.grad_sample import GradSampleModule

        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        x, y = digits().records.x[:8], digits().records.y[:8]
        watched = GradSampleModule(module, loss_reduction="sum")
        nn.functional.cross_entropy(watched(x), y, reduction="sum").backward()
        theirs = torch.cat([p.grad_sample.flatten(1) for p in watched.parameters()], 1)
        watched.to_standard_module()
    module.eval()
    objective, run = Objective(module, row_losses(RECIPE)), descent(module)
    for rows in (run._gradients(objective, x, y), maker(objective, x, y)[0](x, y)):
        assert torch.allclose(private_steps._lengths(rows).float(), theirs.norm(dim=1), rtol=1e-4)
        assert torch.allclose(rows.transposed(torch.ones(8)), theirs.sum(0), atol=1e-4)


def test_a_row_whose_gradient_is_not_finite_counts_as_zero() -> None:
    matrix = torch.tensor([[3.0, 4.0], [math.inf, 0.0], [math.nan, 1.0], [0.3, 0.4]])

    def make(x: Tensor, y: Tensor) -> Pieces:
        return Pieces([Matrix(matrix[x.long().flatten()])], len(x))

    places, y = torch.arange(4.0)[:, None], torch.zeros(4)
    assert clipped_sum(make, places, y, 1.0).tolist() == pytest.approx([0.9, 1.2])
    assert clipped_sum(make, places[1:3], y[1:3], 1.0) == 0.0


@pytest.mark.parametrize("fault", [1.0, 0.9, 96.0])
def test_the_noise_of_a_step_has_the_size_that_is_said_and_a_fault_is_seen(
    fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = noise.secret_normal
    monkeypatch.setattr(noise, "secret_normal", lambda shape: fault * real(shape))
    monkeypatch.setattr(private_steps, "clipped_sum", lambda *_: 0.0)
    recipe = replace(RECIPE, optimiser_args={"lr": 1.0}, epochs=1, batch_size=480).completed(digits().records)
    trained, guarantee = train_private(recipe, digits().records, epsilon=8.0, delta=1e-3, clip=2.0)
    release = trained.releases[0]
    assert isinstance(release, PrivateSteps)
    assert (release.steps, release.rate) == (1, 1.0)
    assert guarantee.sigma == pytest.approx(release.noise * 2.0)
    fresh, right = build(recipe).state_dict(), True
    for name, tensor in trained.module.state_dict().items():
        z = ((fresh[name] - tensor).double() * 480 / guarantee.sigma).reshape(-1)
        right &= abs(float(z.square().mean().sqrt()) - 1) < (0.05 if len(z) > 1000 else 0.5)
    assert right is (fault == 1.0)


@pytest.mark.parametrize("rate", [2.0**-32, 0.03, 0.5, 1.0])
def test_every_row_is_drawn_at_the_rate(rate: float) -> None:
    drawn = [secret_batch(20_000, rate) for _ in range(10)]
    hits = sum(map(len, drawn))
    assert abs(hits - 200_000 * rate) <= 6 * math.sqrt(200_000 * rate * (1 - rate)) + (1 if rate < 1e-6 else 0)
    counts = torch.bincount(torch.cat(drawn), minlength=20_000)
    assert int(counts.max()) <= 10
    if rate == 0.03:
        assert len(set(map(len, drawn))) > 1
        assert float(counts.double().var()) == pytest.approx(10 * 0.03 * 0.97, rel=0.1)


def test_batches_are_drawn_anew_at_the_rate_that_is_said() -> None:
    class Sizes(Tally):
        rows: int = 0

    tally = Sizes()
    recipe = replace(RECIPE, model="softmax", epochs=10, batch_size=24)
    trained, _ = train_private(recipe, digits().records, epsilon=8.0, delta=1e-3, tally=tally)
    release = trained.releases[0]
    assert isinstance(release, PrivateSteps)
    assert (release.rate, release.steps) == (pytest.approx(24 / 480, abs=2**-32), 200)
    wanted = release.steps * 24
    assert abs(tally.gradients - wanted) < 6 * math.sqrt(wanted)
    assert tally.gradients != wanted or tally.rows_read != wanted


def test_a_step_that_nobody_is_drawn_for_still_has_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_steps, "secret_batch", lambda rows, rate: torch.empty(0, dtype=torch.int64))
    recipe = RECIPE.completed(digits().records)
    trained, _ = train_private(recipe, digits().records, epsilon=8.0, delta=1e-3)
    assert not torch.equal(build(recipe).state_dict()["head.weight"], trained.module.state_dict()["head.weight"])


def test_it_learns_something_and_never_the_same_twice() -> None:
    case = digits()
    recipe = replace(RECIPE, epochs=12, model="softmax")
    before = torch.get_rng_state()
    ends = [train_private(recipe, case.records, epsilon=50.0, delta=1e-3)[0] for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert ends[0].digest() != ends[1].digest()
    right = float((outputs(ends[0].module, case.test).argmax(1) == case.test.y).double().mean())
    assert right > 0.6


def test_recipes_optimiser_schedule_and_dtype_are_used() -> None:
    recipe = Recipe(
        model="softmax",
        epochs=2,
        batch_size=96,
        optimiser="adam",
        optimiser_args={"lr": 1e-3},
        schedule={"kind": "steps", "at": [1], "factor": 1e-9},
        dtype="float64",
    )
    trained, _ = train_private(recipe, digits().records, epsilon=8.0, delta=1e-3)
    state = trained.module.state_dict()
    fresh = build(trained.recipe).state_dict()
    moved = float((state["head.weight"] - fresh["head.weight"]).abs().max())
    assert state["head.weight"].dtype is torch.float64
    assert 1e-3 < moved <= 5.5e-3  # Adam's steps are at most about lr, and the second epoch's are nothing


def test_the_guarantee_is_proved_and_accounting_gives_it_again_from_its_constants() -> None:
    trained, guarantee = train_private(RECIPE, digits().records, epsilon=2.0, delta=1e-3, group=2)
    release = trained.releases[0]
    assert guarantee.basis == "proved"
    assert guarantee.mu is None
    assert 1.95 < guarantee.epsilon <= 2.0
    assert guarantee.sensitivity == 2.0
    assert guarantee.outside == ()
    known = {one.name: one for one in DERIVATIONS}
    settings = {f"release.{name}": getattr(release, name) for name in ("rate", "noise", "steps", "group")}
    settings |= {"train_private.clip": 1.0, "train_private.delta": 1e-3}
    assert recheck(guarantee, known, settings) == ()
    assert Guarantee.from_json(guarantee.to_json()) == guarantee
    tripled = {**guarantee.constants, "group": replace(guarantee.constants["group"], value=3.0)}
    assert recheck(replace(guarantee, constants=tripled), known, settings)


def test_up_to_the_group_rows_go_without_work_and_no_more() -> None:
    trained, guarantee = one()
    records = digits().records
    first = covered(trained, guarantee, records, Request.remove(records.ids[:2]))
    assert first.trained.digest() == trained.digest()
    assert first.claim is Claim.CERTIFIED
    assert first.guarantee == guarantee
    assert (first.trained.ids, first.trained.gone) == (frozenset(records.ids[2:]), frozenset(records.ids[:2]))
    assert first.events == (Removed(method="private-training", claim="certified", rows=2),)
    again = covered(first.trained, guarantee, records, Request.remove(records.ids[:2]))
    assert (again.claim, again.trained.gone) == (Claim.NONE, first.trained.gone)
    lean = records.without(first.trained.gone)
    last = covered(first.trained, guarantee, lean, Request.remove(records.ids[2:3]))
    with pytest.raises(BudgetExhausted, match="covers 3 rows in total, 3 are gone and 1 more"):
        covered(last.trained, guarantee, lean, Request.remove(records.ids[3:4]))
    with pytest.raises(BudgetExhausted, match="0 are gone and 4 more"):
        covered(trained, guarantee, records, Request.remove(records.ids[:4]))


def test_only_what_private_training_made_is_covered() -> None:
    trained, guarantee = one()
    case = digits()
    request = Request.remove(case.records.ids[:1])
    changed = FineTune(epochs=1)(trained, case.records, request, rng=generator(0)).trained
    retrained = Retrain()(trained, case.records, request, rng=generator(0)).trained
    ordinary = case.model(train, case.recipes[0])
    for other in (changed, retrained, ordinary):
        with pytest.raises(Unsupported, match="not, or no longer"):
            covered(other, guarantee, case.records, Request.remove(case.records.ids[1:2]))
    extra = Records(case.test.x[:1], case.test.y[:1], ["stranger"], ["stranger"], classes=10)
    with pytest.raises(NeverTrained):
        covered(trained, guarantee, case.records.plus(extra), Request.remove(["stranger"]))
    constants = {**guarantee.constants, "group": replace(guarantee.constants["group"], value=9.0)}
    with pytest.raises(Misuse, match="not that of this model"):
        covered(trained, replace(guarantee, constants=constants), case.records, request)
    other_row = Request.replace_rows(case.records.ids[:1], case.test.x[:1], case.test.y[:1])
    with pytest.raises(Unsupported, match="replacements"):
        covered(trained, guarantee, case.records, other_row)
    others = Records(case.records.x + 1, case.records.y, case.records.ids, case.records.owners, classes=10)
    with pytest.raises(Misuse, match="not those that the model was trained on"):
        covered(trained, guarantee, others, request)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"group": 0}, "group"),
        ({"group": 1.5}, "group"),
        ({"group": 480}, "group 480"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(Misuse, match=why):
        train_private(RECIPE, digits().records, **{"epsilon": 1.0, "delta": 1e-3, **settings})


@pytest.mark.parametrize(("changes", "why"), [({"epochs": 0}, "epochs"), ({"batch_size": 481}, "batch_size 481")])
def test_recipes_without_steps_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(Misuse, match=why):
        train_private(replace(RECIPE, **changes), digits().records, epsilon=1.0, delta=1e-3)


def normed(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


def dropping(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))


def test_what_cannot_be_private_is_refused() -> None:
    refused = {
        'layer "2" mixes rows': replace(RECIPE, model=allow_code(normed)),
        'layer "1" drops values': replace(RECIPE, model=allow_code(dropping)),
        "one dense model": replace(RECIPE, sharding=Sharding(shards=2)),
        "leave sharding and pruning": replace(RECIPE, pruning=Pruning(sparsity=0.5)),
    }
    for why, recipe in refused.items():
        with pytest.raises(Unsupported, match=why):
            train_private(recipe, digits().records, epsilon=1.0, delta=1e-3)


def test_without_dp_accounting_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dp_accounting")] + ["dp_accounting"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unsupported, match=r"expunge\[private\]"):
        train_private(RECIPE, digits().records, epsilon=1.2345, delta=1e-3)


def test_the_model_is_saved_with_its_release(tmp_path: Any) -> None:
    trained, guarantee = one()
    back = Trained.load(trained.save(tmp_path / "model"), build)
    assert back.releases == trained.releases
    records = digits().records
    assert covered(back, guarantee, records, Request.remove(records.ids[:1])).claim is Claim.CERTIFIED
