"""A victim's gradients are those of exact retraining, whatever the weights, the shards and the loss."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge import Recipe
from expunge.attack import Reaction, Victim, victims
from expunge.attack.aim import check_target
from expunge.attack.knowledge import Plan, White, Wish
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Target
from expunge.core.recipe import Sharding
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.training import adopt, train
from expunge.unlearn import GradientAscent, Retrain
from tests.attack.oracles import Array, adversary, problem, retrained, slope, softmax_model, with_bias

DECAY = 5e-2


def weights_slope(records: Records, target: Target, weights: Array, row: int) -> float:
    """How the adversary's loss changes per unit of deletion of one row, by retraining at ten weights near by."""

    def loss(deleted: float) -> float:
        w = weights.copy()
        w[row] -= deleted
        t = retrained(with_bias(records.x), records.y.numpy(), w[None], classes=records.classes or 0, decay=DECAY)
        return float(adversary(t, target)[0])

    return slope(loss, 1e-3)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("fractional", [False, True])
def test_the_selection_gradient_is_that_of_exact_retraining(classes: int, targeted: bool, fractional: bool) -> None:
    records, target = problem(3, classes=classes)
    if targeted:
        target = Target(x=target.x, y=target.y, wanted=(target.y + 1) % classes)
    plan = White().plan(softmax_model(records), records, target, Retrain()).settled
    weights = torch.rand(14, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if fractional else None
    if weights is not None:
        plan = plan.refit(weights)
    found = plan.effects(Wish(target=target)).numpy()
    at = np.ones(14) if weights is None else weights.numpy()
    truth = np.array([weights_slope(records, target, at, row) for row in range(14)])
    assert np.abs(found - truth).max() < 1e-6 * np.abs(truth).max()
    stale = White().plan(softmax_model(records), records, target, Retrain()).effects(Wish(target=target)).numpy()
    assert np.abs(stale - truth).max() > 1e-3 * np.abs(truth).max()  # at the model as training left it


def test_a_refit_is_what_retraining_gives_and_the_large_way_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    records, target = problem(5, n=60, classes=3)
    weights = torch.ones(60, dtype=torch.float64)
    weights[:9] = 0
    (victim,) = victims(softmax_model(records), records, target, Retrain())
    truth = retrained(
        with_bias(records.x), records.y.numpy(), weights.numpy()[None], classes=3, decay=DECAY
    )[0]  # fmt: skip
    own = np.concatenate([truth[:, :-1].ravel(), truth[:, -1]])
    assert np.abs(victim.refit(weights).objective.vector().numpy() - own).max() < 1e-8
    monkeypatch.setattr("expunge.attack.victim._FEW", 1)
    assert np.abs(victim.refit(weights).objective.vector().numpy() - own).max() < 1e-8
    with pytest.raises(Misuse, match="raise most"):
        victim.refit(weights, most=1)


def test_the_gradient_of_shards_is_that_of_the_mean_of_their_losses() -> None:
    records, target = problem(7, n=24, classes=3)
    trained = softmax_model(records, sharding=Sharding(shards=2, aggregate="mean"))
    plan = White().plan(trained, records, target, Retrain()).settled
    assert len(plan.victims) == 2
    found = dict(zip(plan.ids, plan.effects(Wish(target=target)).tolist(), strict=True))
    for part in trained.parts:
        mine = records.where(lambda name, _, ids=part.ids: name in ids)
        ones = np.ones(len(mine))
        truth = np.array([weights_slope(mine, target, ones, row) for row in range(len(mine))]) / 2
        got = np.array([found[name] for name in mine.ids])
        assert np.abs(got - truth).max() < 1e-6 * np.abs(truth).max()
    weights = torch.ones(24, dtype=torch.float64)
    weights[0] = 0
    after = plan.refit(weights)
    assert after.victims[0] is not plan.victims[0]
    assert after.victims[1] is plan.victims[1]


def test_a_wish_to_spare_other_rows_has_the_gradient_of_both_losses() -> None:
    records, target = problem(9, n=20, classes=3)
    plan = White().plan(softmax_model(records), records, target, Retrain()).settled
    wish = Wish(target=target, beta=0.7, kept=(records.x[:6], records.y[:6]))
    x, y = with_bias(records.x), records.y.numpy()
    kept = Target(x=records.x[:6], y=records.y[:6])

    def truth(row: int) -> float:
        def loss(deleted: float) -> float:
            w = np.ones((1, 20))
            w[0, row] -= deleted
            t = retrained(x, y, w, classes=3, decay=DECAY)
            return float(adversary(t, target)[0] - 0.7 * adversary(t, kept)[0])

        return slope(loss, 1e-3)

    found, wanted = plan.effects(wish), torch.tensor([truth(row) for row in range(20)])
    assert float((found - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


def tanh_model(n: int = 12) -> tuple[Trained, Records, Target]:
    g = torch.Generator().manual_seed(2)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    records = Records(x, torch.arange(n) % 3, classes=3)
    trained = adopt(module, Recipe(model="softmax", weight_decay=1e-2), records)
    target = Target(x=torch.randn(2, 3, generator=g, dtype=torch.float64), y=torch.tensor([0, 2]))
    return trained, records, target


def gauss_newton(module: nn.Module, x: Tensor, decay: float, damping: float) -> Tensor:
    """(H + d I)^-1 / n, with every Jacobian written out."""
    names, here = zip(*module.named_parameters(), strict=True)
    flat = torch.cat([one.detach().reshape(-1) for one in here])

    def out(vector: Tensor) -> Tensor:
        pieces = vector.split([one.numel() for one in here])
        state = {name: piece.view_as(one) for name, piece, one in zip(names, pieces, here, strict=True)}
        answer: Tensor = torch.func.functional_call(module, state, (x,))
        return answer

    j = torch.func.jacrev(out)(flat)
    p = torch.softmax(out(flat), 1)
    h = torch.einsum("nap,nab,nbq->pq", j, torch.diag_embed(p) - p[:, :, None] * p[:, None], j) / len(x)
    h = h + decay * torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.inv(h + damping * h.trace() / len(h) * torch.eye(len(h), dtype=h.dtype)) / len(x)


def test_a_network_is_answered_for_by_its_damped_gauss_newton_matrix() -> None:
    trained, records, target = tanh_model()
    victim = Victim.of(trained, records, Retrain())
    b = gauss_newton(trained.module, records.x, 1e-2, 1.0)
    v = torch.randn(len(b), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(victim.answer(v), b @ v, rtol=1e-9, atol=1e-12)
    ones = torch.ones(12, dtype=torch.float64)
    assert victim.refit(ones) is victim
    weights = ones.clone()
    weights[4] = 0.25
    moved = victim.refit(weights).objective.vector() - victim.objective.vector()
    leaving = 0.75 * victim.objective.gradient(records.x[4:5], records.y[4:5])
    assert torch.allclose(moved, b @ leaving, rtol=1e-9, atol=1e-12)
    assert target.x.shape == (2, 3)


def test_gradient_ascent_is_answered_for_by_its_own_rate() -> None:
    records, _ = problem(3)
    trained = softmax_model(records, batch_size=7)
    victim = Victim.of(trained, records, GradientAscent(lr=0.1, epochs=3))
    assert victim.reaction == Reaction(order="first", rate=pytest.approx(3 * 0.1 / 7))
    assert not victim.retrains
    weights = torch.ones(14, dtype=torch.float64)
    weights[2] = 0
    moved = victim.refit(weights).objective.vector() - victim.objective.vector()
    leaving = victim.objective.gradient(records.x[2:3], records.y[2:3])
    assert torch.allclose(moved, victim.reaction.rate * leaving)


def test_gradient_ascent_is_known_by_what_it_is_and_not_by_its_name() -> None:
    records, _ = problem(3)
    trained = softmax_model(records, batch_size=7)

    class Steeper(GradientAscent):
        """Gradient ascent by another name."""

    namesake = type("GradientAscent", (Retrain,), {})
    assert Reaction.of(Steeper(lr=0.1, epochs=3), trained).order == "first"
    assert Reaction.of(namesake(), trained) == Reaction(order="second")


def test_many_targets_share_what_was_computed_and_nothing_outlives_the_model() -> None:
    records, target = problem(3)
    trained = softmax_model(records)
    (first,) = victims(trained, records, target, Retrain())
    other = Target(x=-target.x, y=target.y)
    assert victims(trained, records, other, Retrain())[0] is first
    assert victims(trained, records, other, GradientAscent())[0] is not first
    assert first.settled is first.settled
    gone = weakref.ref(first)
    del trained, first
    gc.collect()
    assert gone() is None


def test_the_model_is_left_as_it_was() -> None:
    records, target = problem(3)
    trained = softmax_model(records)
    before = trained.digest()
    plan = White().plan(trained, records, target, Retrain())
    plan.refit(torch.full((14,), 0.5, dtype=torch.float64)).effects(Wish(target=target))
    assert trained.digest() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(1, 5)}, "shape"),
        ({"y": torch.tensor([7])}, "run from 0 to 1"),
        ({"y": torch.tensor([0, 1])}, "one label a row"),
        ({"wanted": torch.tensor([-1])}, "run from 0 to 1"),
        ({"y": torch.tensor([0]), "wanted": torch.tensor([0])}, "is the true one"),
        ({"y": torch.tensor([0.0])}, "int64"),
        ({"wanted": torch.tensor([1], dtype=torch.int32)}, "int64"),
        ({"x": torch.full((1, 4), torch.nan)}, "not finite"),
    ],
)
def test_a_target_outside_the_data_is_refused(change: dict[str, Tensor], said: str) -> None:
    records, target = problem(3)
    asked = {"x": target.x, "y": target.y, **change}
    with pytest.raises(Misuse, match=said):
        check_target(Target(**asked), records)
    check_target(target, records)


def test_a_target_that_is_stored_otherwise_than_the_records_would_be_read_on_another_scale() -> None:
    records, target = problem(3)
    check_target(Target(x=target.x.float(), y=target.y), records)
    pixels = Records((records.x * 20 + 128).clamp(0, 255).to(torch.uint8), records.y, classes=2)
    check_target(Target(x=pixels.x[:1], y=target.y), pixels)
    for x, others in ((pixels.x[:1].float(), pixels), (pixels.x[:1].to(torch.int64), pixels), (pixels.x[:1], records)):
        with pytest.raises(Misuse, match="stored as"):
            check_target(Target(x=x, y=target.y), others)


def test_float_targets_have_no_class_to_turn() -> None:
    records, target = problem(3)
    with pytest.raises(Misuse, match="float targets"):
        check_target(target, Records(records.x, records.x[:, 0]))


def test_a_sharded_model_is_no_single_victim() -> None:
    records, _ = problem(3)
    with pytest.raises(Unsupported, match="victims"):
        Victim.of(softmax_model(records, sharding=Sharding(shards=2)), records, Retrain())


def test_a_plan_names_its_rows_victim_after_victim() -> None:
    records, target = problem(7, n=24)
    plan = White().plan(softmax_model(records, sharding=Sharding(shards=3)), records, target, Retrain())
    assert isinstance(plan, Plan)
    assert sorted(plan.ids) == sorted(records.ids)
    assert torch.equal(plan.labels, records.take(plan.ids).y)


def test_a_softmax_without_weight_decay_can_be_attacked():
    rows = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    records = Records(rows, torch.arange(60) % 2, classes=2)
    trained = train(Recipe(model="softmax", epochs=5, batch_size=16), records)
    target = Target(x=torch.full((1, 3), 0.5), y=torch.tensor([0]))
    (victim,) = victims(trained, records, target, Retrain())
    effects = victim.effects(target)
    assert bool(torch.isfinite(effects).all())
    assert float(effects.abs().max()) > 0
