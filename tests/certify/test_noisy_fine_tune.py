from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.certify import gaussian, noise
from expunge.certify.accountant import Budget
from expunge.certify.clipped_models import DERIVATIONS as MODEL_DERIVATIONS
from expunge.certify.clipped_models import ClippedModelFineTune
from expunge.certify.guarantee import recheck
from expunge.certify.noisy_fine_tune import CLIPPED_STEPS_MU, CLIPPED_STEPS_SIGMA, ClippedFineTune
from expunge.certify.noisy_fine_tune import DERIVATIONS as STEP_DERIVATIONS
from expunge.certify.noisy_steps import clipped
from expunge.core import coins
from expunge.core.claim import Claim, Guarantee
from expunge.core.coins import generator
from expunge.core.errors import BudgetExhausted, Misuse, Unsupported
from expunge.core.events import ClippedModels, ClippedSteps
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.loop import Tally
from expunge.learn.training import adopt, train
from expunge.testing import conformance, digits
from expunge.testing.claims import CLAIMS
from expunge.testing.contract import CONTRACT
from expunge.unlearn import FineTune

ONCE = Budget(requests=1)
STEP = ClippedFineTune(start=0.5, gradient=0.3, lr=0.1, weight_decay=0.5, steps=7, polish=0, budget=ONCE)
MODEL = ClippedModelFineTune(radius=0.5, lr=0.1, weight_decay=0.5, steps=7, polish=0, budget=ONCE)
BOTH = pytest.mark.parametrize("method", [STEP, MODEL], ids=lambda method: method.name)
DERIVATIONS = {one.name: one for one in (*STEP_DERIVATIONS, *MODEL_DERIVATIONS)}


def start(**changes: Any) -> Trained:
    case = digits()
    return case.model(train, replace(case.recipes[0], **changes))


def other_start(**changes: Any) -> Trained:
    case = digits()
    return case.model(train, replace(case.recipes[0], **changes), without_forgotten=True)


def call(method: Any, trained: Trained, tally: Tally | None = None, records: Records | None = None) -> Any:
    case = digits()
    return method(trained, records or case.records, case.request, rng=generator(3), tally=tally)


def vector(trained: Trained) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in trained.module.parameters()])


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "secret_normal", lambda shape: torch.zeros(tuple(shape), dtype=torch.float64))


def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that can be drawn again: the n-th draw since this call is always the same."""
    drawn = iter(range(10**6))
    monkeypatch.setattr(
        noise,
        "secret_normal",
        lambda shape: torch.randn(tuple(shape), generator=generator(next(drawn)), dtype=torch.float64),
    )


def settings_of(method: Any) -> dict[str, float]:
    own = {f"method.{name}": value for name, value in vars(method).items() if isinstance(value, int | float)}
    return own | {f"method.budget.{name}": value for name, value in vars(method.budget).items()}


def by_hand(method: Any, trained: Trained, noises: list[Tensor]) -> Tensor:
    """The same steps, written down once more: one tensor at a time, sums of squares by hand."""
    case = digits()
    rows = case.retain
    module = trained.module.eval()
    weights = [p.detach().double() for p in module.parameters()]

    def cut(tensors: list[Tensor], most: float) -> list[Tensor]:
        length = math.sqrt(sum(float((t * t).sum()) for t in tensors))
        return [t * min(1.0, most / length) for t in tensors] if length else tensors

    if isinstance(method, ClippedFineTune):
        weights = cut(weights, method.start)
    size, step = trained.recipe.batch_size, 0
    for epoch in range(100):
        order = torch.from_numpy(coins.order(rows.keys, generator(3).initial_seed(), "noisy", epoch))
        for positions in order.split(size):
            if step == method.steps:
                return torch.cat([w.reshape(-1) for w in weights])
            with torch.no_grad():
                for p, w in zip(module.parameters(), weights, strict=True):
                    p.copy_(w)
            module.zero_grad()
            chosen = rows.select(positions)
            nn.functional.cross_entropy(module(chosen.x.double()), chosen.y).backward()
            gradients = [p.grad.double() for p in module.parameters() if p.grad is not None]
            pieces = [n.view_as(w) for n, w in zip(noises[step].split([w.numel() for w in weights]), weights)]  # noqa: B905
            if isinstance(method, ClippedFineTune):
                gradients = cut(gradients, method.gradient)
            weights = [w - method.lr * (g + method.weight_decay * w) for w, g in zip(weights, gradients, strict=True)]
            if isinstance(method, ClippedModelFineTune):
                weights = cut(weights, method.radius)
            weights = [w + method.sigma * n for w, n in zip(weights, pieces, strict=True)]
            step += 1
    raise AssertionError("too many steps")


@BOTH
def test_the_steps_are_those_of_the_paper_written_down_again(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = start(dtype="float64")
    size = vector(trained).numel()
    noises = [torch.randn(size, generator=generator(step), dtype=torch.float64) for step in range(method.steps)]
    wanted = by_hand(method, start(dtype="float64"), noises)
    known_noise(monkeypatch)
    found = vector(call(method, trained).trained)
    assert float((found - wanted).norm()) < 1e-9 * float(wanted.norm())


def test_sigma_of_clipped_steps_is_the_golden_one() -> None:
    # 2 (.5 .95^7 + .03 sum .95^k) / (mu sqrt(sum .95^2k)), mu = 1 / 3.73063
    powers = [0.95**k for k in range(7)]
    wanted = 3.73063 * 2 * (0.5 * 0.95**7 + 0.03 * sum(powers)) / math.sqrt(sum(p * p for p in powers))
    assert STEP.sigma == pytest.approx(wanted, rel=1e-5)


def test_without_weight_decay_sigma_is_the_limit_of_little_weight_decay() -> None:
    none, little = replace(STEP, weight_decay=0.0), replace(STEP, weight_decay=1e-9)
    assert none.sigma == pytest.approx(little.sigma, rel=1e-6)
    assert none.sigma == pytest.approx(3.73063 * 2 * (0.5 + 7 * 0.03) / math.sqrt(7), rel=1e-5)


def test_epsilon_keeps_the_order_of_renyi_divergence() -> None:
    # rho = mu^2 / 2 = 1, which common code reports as epsilon 1.004.
    mu = CLIPPED_STEPS_MU.compute(1.0, 0.5, 0.1, 0.0, 4, (2 + 4 * 0.1) / (math.sqrt(4) * math.sqrt(2)))
    assert mu == pytest.approx(math.sqrt(2))
    assert gaussian.epsilon_of(mu, 1e-5) == pytest.approx(6.573, abs=1e-3)


@pytest.mark.parametrize(
    ("steps", "ratio"), [(1, 7.461), (2, 2.335), (5, 1.056), (10, 0.749), (50, 0.475), (100, 0.420), (500, 0.340)]
)
def test_sigma_of_clipped_models_is_the_golden_one(steps: int, ratio: float) -> None:
    assert replace(MODEL, steps=steps, radius=2.0).sigma == pytest.approx(2 * ratio, rel=2e-3)


@BOTH
def test_without_noise_no_start_ends_farther_away_than_the_sensitivity(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence(monkeypatch)
    ends = [call(method, trained) for trained in (start(), _opposite(start()))]
    apart = float((vector(ends[0].trained) - vector(ends[1].trained)).norm())
    assert 0 < apart <= ends[0].guarantee.sensitivity * (1 + 1e-6)
    # The starts themselves are farther apart: a start that is not clipped would be caught.
    assert float((vector(start()) - vector(_opposite(start()))).norm()) * 0.95**7 > 2 * ends[0].guarantee.sensitivity


def _opposite(trained: Trained) -> Trained:
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.neg_()
    return trained


def test_opposed_gradients_reach_the_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    silence(monkeypatch)
    rows = torch.ones(40, 1, dtype=torch.float64)
    records = Records(rows, torch.zeros(40, dtype=torch.float64))
    recipe = Recipe(model="external", loss="mse", dtype="float64", batch_size=8)
    ends = []
    for side in (1.0, -1.0):
        module = Hill(side * 5.0)
        trained = adopt(module, recipe, records)
        ends.append(STEP(trained, records, Request.remove(["3"]), rng=generator(0)))
    apart = abs(float(vector(ends[0].trained) - vector(ends[1].trained)))
    assert apart == pytest.approx(ends[0].guarantee.sensitivity, rel=1e-9)


class Hill(nn.Module):
    """Its loss falls away from zero on either side, as steeply as is needed for clipping."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (100 - 50 * self.weight.abs())


def spread_is(method: Any, result: Any, still: dict[str, Tensor], spread: float) -> bool:
    """True if the result is `still` and noise of this standard deviation, in every single parameter."""
    for name, tensor in result.trained.module.state_dict().items():
        z = ((tensor.double() - still[name].double()) / spread).reshape(-1)
        within = 6 / math.sqrt(2 * len(z))
        if abs(float(z.square().mean().sqrt()) - 1) > within or abs(float(z.mean())) > 6 / math.sqrt(len(z)):
            return False
    return True


@pytest.mark.parametrize("fault", [1.0, STEP.lr, 0.5**0.5])
def test_every_parameter_has_noise_of_the_right_size_and_a_fault_is_seen(
    fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(STEP, gradient=1e-12)  # so that the steps are linear, and the noise is all that differs
    real = noise.secret_normal
    monkeypatch.setattr(noise, "secret_normal", lambda shape: fault * real(shape))
    result = call(method, start())
    monkeypatch.setattr(noise, "secret_normal", lambda shape: 0 * real(shape))
    still = call(method, start()).trained.module.state_dict()
    spread = method.sigma * math.sqrt(sum(0.95 ** (2 * k) for k in range(7)))
    assert spread_is(method, result, still, spread) is (fault == 1.0)


def test_a_clipped_model_is_within_its_radius_but_for_the_last_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[Tensor] = []
    real = noise.secret_normal

    def noted(shape: Any) -> Tensor:
        last[:] = [real(shape)]
        return last[0]

    monkeypatch.setattr(noise, "secret_normal", noted)
    found = vector(call(MODEL, start(dtype="float64")).trained) - MODEL.sigma * last[0]
    assert float(found.norm()) == pytest.approx(MODEL.radius, rel=1e-6)


@pytest.mark.parametrize(("norm", "same"), [(0.0, True), (1.0, False)])
def test_from_a_start_of_zero_the_model_never_saw_the_removed_rows(
    norm: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, ends = replace(STEP, start=norm, polish=2), []
    for module in (start().module, other_start().module):
        known_noise(monkeypatch)
        ends.append(call(method, replace(start(), module=module)).trained.digest())
    assert (ends[0] == ends[1]) is same


@BOTH
def test_only_retained_rows_are_read_in_noisy_steps_and_after(method: Any) -> None:
    class Seen(Tally):
        ids: frozenset[str] = frozenset()

        def saw(self, records: Records, positions: Tensor, x: Tensor, y: Tensor) -> None:
            super().saw(records, positions, x, y)
            self.ids |= {records.ids[i] for i in positions.tolist()}

    tally, case = Seen(), digits()
    call(replace(method, polish=1), start(), tally)
    assert tally.ids == frozenset(case.retain.ids)
    assert tally.gradients == 7 * 32 + len(case.retain)


@BOTH
def test_the_order_of_rows_and_ids_changes_nothing(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = digits()
    shuffled = case.records.select(torch.randperm(len(case.records), generator=generator(5)))
    known_noise(monkeypatch)
    one = call(replace(method, polish=1), start()).trained
    known_noise(monkeypatch)
    request = Request.remove(case.forget.ids[::-1])
    other = replace(method, polish=1)(start(), shuffled, request, rng=generator(3)).trained
    assert one.digest() == other.digest()


@BOTH
def test_rows_gone_before_are_not_read_again(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = digits()
    method = replace(method, polish=1, budget=Budget(requests=2))
    first = method(start(), case.records, Request.remove(case.forget.ids[:9]), rng=generator(3)).trained
    ends = []
    for records in (case.records, case.records.without(first.gone)):
        known_noise(monkeypatch)
        ends.append(method(first, records, Request.remove(case.forget.ids[9:]), rng=generator(3)).trained)
    assert ends[0].digest() == ends[1].digest()
    assert len(ends[0].releases) == 2


@BOTH
def test_nothing_without_noise_is_kept(method: Any) -> None:
    trained = start()
    trained = replace(trained, secret={name: p.detach().clone() for name, p in trained.module.named_parameters()})
    result = call(method, trained)
    assert result.trained.secret == {}
    assert result.trained.log is None
    assert all(p.grad is None for p in result.trained.module.parameters())
    assert not result.trained.module.training


@BOTH
def test_the_guarantee_is_proved_and_computed_again_from_its_constants(method: Any) -> None:
    result = call(method, start())
    guarantee = result.guarantee
    assert result.claim is Claim.CERTIFIED
    assert guarantee.basis == "proved"
    assert guarantee.epsilon == pytest.approx(1.0, rel=1e-6)
    assert guarantee.epsilon <= 1 + 1e-6
    assert guarantee.delta == 1e-5
    assert guarantee.outside == ()
    assert set(guarantee.parameters) == set(start().module.state_dict())
    assert recheck(guarantee, DERIVATIONS, settings_of(method)) == ()
    assert Guarantee.from_json(guarantee.to_json()) == guarantee


@BOTH
@pytest.mark.parametrize("name", ["sigma", "sensitivity", "steps", "budget_epsilon"])
def test_a_tampered_constant_is_found(method: Any, name: str) -> None:
    guarantee = call(method, start()).guarantee
    constant = guarantee.constants[name]
    tampered = replace(constant, value=constant.value * 2)
    assert recheck(
        replace(guarantee, constants={**guarantee.constants, name: tampered}), DERIVATIONS, settings_of(method)
    )


def test_a_release_has_its_share_of_the_budget() -> None:
    four = Budget(epsilon=2.0, delta=1e-4, requests=4)
    step = call(replace(STEP, budget=four), start())
    assert step.guarantee.mu == pytest.approx(gaussian.mu_of(2.0, 1e-4) / 2, rel=1e-9)
    assert step.guarantee.transcript.mu == pytest.approx(step.guarantee.mu)
    assert isinstance(step.events[0], ClippedSteps)
    model = call(replace(MODEL, budget=four), start())
    assert (model.guarantee.mu, model.guarantee.delta) == (None, 2.5e-5)
    assert model.guarantee.epsilon == pytest.approx(0.5, rel=1e-6)
    assert model.guarantee.transcript.epsilon == pytest.approx(0.5, rel=1e-6)
    assert isinstance(model.events[0], ClippedModels)


@BOTH
def test_past_the_budget_nothing_is_done(method: Any) -> None:
    case = digits()
    first = method(start(), case.records, Request.remove(case.forget.ids[:9]), rng=generator(3)).trained
    tally = Tally()
    with pytest.raises(BudgetExhausted, match="1 releases is spent"):
        method(first, case.records, Request.remove(case.forget.ids[9:]), rng=generator(3), tally=tally)
    assert tally.gradients == 0


def test_both_kinds_of_release_share_one_budget() -> None:
    # Of a release with a mu and one without, epsilons can only be added up: two shares are more than the whole.
    case, two = digits(), Budget(requests=2)
    first = replace(STEP, budget=two)(start(), case.records, Request.remove(case.forget.ids[:9]), rng=generator(3))
    rest = Request.remove(case.forget.ids[9:])
    with pytest.raises(BudgetExhausted, match=r"epsilon 1\.217"):
        replace(MODEL, budget=two)(first.trained, case.records, rest, rng=generator(3))


def test_what_is_drowned_in_noise_is_called_nearly_a_new_start() -> None:
    assert any("nearly a new start" in told for told in call(STEP, start()).guarantee.remarks)
    assert any("nearly a new start" in told for told in call(MODEL, start()).guarantee.remarks)
    wide = Budget(epsilon=1e5, requests=1)
    assert call(replace(STEP, gradient=1e-3, budget=wide), start()).guarantee.remarks == ()
    assert call(replace(MODEL, budget=wide, steps=1), start()).guarantee.remarks == ()


def test_steps_that_save_no_noise_are_said_to() -> None:
    told = call(replace(STEP, weight_decay=0.0), start()).guarantee.remarks
    assert any("save none" in one for one in told)
    assert not any("save none" in one for one in call(replace(STEP, gradient=1e-3), start()).guarantee.remarks)


@BOTH
def test_training_after_the_noise_is_said(method: Any) -> None:
    assert any("2 epochs" in one for one in call(replace(method, polish=2), start()).guarantee.remarks)


def test_nothing_of_the_guarantee_depends_on_the_rows_removed() -> None:
    case, told = digits(), []
    for ids in (case.forget.ids[:1], case.forget.ids, case.retain.ids[:300]):
        for method in (STEP, MODEL):
            result = method(start(), case.records, Request.remove(ids), rng=generator(len(ids)))
            told.append(f"{result.guarantee.to_json()} {result.events[0]}")
    assert len(set(told)) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_clipped_to_zero(bad: float) -> None:
    assert torch.equal(clipped(torch.tensor([1.0, bad]), 1.0), torch.zeros(2))


def test_clipping_scales_what_is_long_and_leaves_what_is_short() -> None:
    assert clipped(torch.tensor([3.0, 4.0]), 1.0).tolist() == pytest.approx([0.6, 0.8])
    assert clipped(torch.tensor([0.3, 0.4]), 1.0).tolist() == pytest.approx([0.3, 0.4])
    assert clipped(torch.zeros(2), 0.0).tolist() == [0.0, 0.0]


@BOTH
def test_a_loss_that_is_nowhere_finite_breaks_no_guarantee(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((10, 64), 9.0))

        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), -1) @ self.weight.T * math.inf

    silence(monkeypatch)
    case = digits()
    trained = adopt(Broken(), case.recipes[0], case.records)
    assert float(vector(call(method, trained).trained).norm()) <= 0.5 + 1e-6


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again = nn.Linear(64, 64), nn.Linear(64, 64)
        self.again.weight = self.inner.weight
        self.frozen = nn.Parameter(torch.ones(64), requires_grad=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.inner(x.reshape(len(x), -1)).relu()) * self.frozen)


@BOTH
def test_tied_and_frozen_parameters_are_covered_too(method: Any) -> None:
    case = digits()
    result = call(method, adopt(Tied(), case.recipes[0], case.records))
    assert {"again.weight", "inner.weight", "frozen"} <= set(result.guarantee.parameters)
    assert result.guarantee.outside == ()
    module = result.trained.module
    assert module.inner.weight is module.again.weight
    assert float((module.frozen - 1).abs().min()) > 1e-3


class Buffered(nn.Module):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(value))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(len(x), -1) * self.scale)


@BOTH
def test_what_noise_on_parameters_would_not_cover_is_refused(method: Any) -> None:
    case, small = digits(), Recipe(model="mlp", epochs=1, batch_size=32)
    normed = adopt(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)), small, case.records
    )
    frozen = adopt(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False), small, case.records)
    models = {
        'layer "2"': normed,
        "pruned": train(replace(small, pruning=Pruning(sparsity=0.5)), case.records),
        "shards": train(replace(small, sharding=Sharding(shards=2)), case.records),
        "no parameter may move": frozen,
        'buffer "scale"': adopt(Buffered(), small, case.records),
    }
    for why, trained in models.items():
        with pytest.raises(Unsupported, match=why):
            call(method, trained)


@BOTH
def test_a_constant_buffer_is_taken_and_a_changed_one_refused(method: Any) -> None:
    from expunge import allow_code

    case = digits()
    recipe = Recipe(model=allow_code(_buffered), epochs=1, batch_size=32)
    trained = train(recipe, case.records)
    guarantee = call(method, trained).guarantee
    assert guarantee.outside == ("scale",)
    trained.module.scale.fill_(2.0)
    with pytest.raises(Unsupported, match='buffer "scale"'):
        call(method, trained)


def _buffered(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return Buffered()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"start": -1.0}, "start"),
        ({"start": math.inf}, "start"),
        ({"gradient": 0.0}, "gradient"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": 0.5, "weight_decay": 2.1}, "lr weight_decay"),
        ({"weight_decay": -0.1}, "lr weight_decay"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"polish": -1}, "polish"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(Misuse, match=why):
        ClippedFineTune(**settings)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_without_meaning_is_refused(radius: float) -> None:
    with pytest.raises(Misuse, match="radius"):
        ClippedModelFineTune(radius=radius)


@pytest.mark.parametrize("method", [ClippedFineTune(), ClippedModelFineTune()], ids=lambda method: method.name)
def test_they_keep_the_contract(method: Any) -> None:
    report = conformance(method, checks=(*CONTRACT, *CLAIMS))
    assert report.passed, report


def test_dropout_is_on_in_noisy_steps_and_its_coins_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    case = digits()
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
    trained, ends = adopt(module, case.recipes[0], case.records), []
    for _ in range(2):
        known_noise(monkeypatch)
        ends.append(call(STEP, trained).trained.digest())
    module[3].p = 0.0
    known_noise(monkeypatch)
    assert ends[0] == ends[1] != call(STEP, trained).trained.digest()


def test_ordinary_fine_tuning_is_not_certified() -> None:
    assert call(FineTune(epochs=1), start()).guarantee is None


def test_the_share_of_the_budget_enters_sigma() -> None:
    assert CLIPPED_STEPS_SIGMA.compute(1.0, 1.0, 0.1, 0.0, 9, 1.0, 1e-5, 16) == pytest.approx(
        4 * CLIPPED_STEPS_SIGMA.compute(1.0, 1.0, 0.1, 0.0, 9, 1.0, 1e-5, 1)
    )
