"""Certified removal from a head: what is released, what is kept, what is said, and that it holds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge import (
    BudgetExhausted,
    Claim,
    FineTune,
    Misuse,
    NeverTrained,
    Recipe,
    Request,
    Retrain,
    Trained,
    Unsupported,
    adopt,
    generator,
    train,
)
from expunge.certify import chord, head
from expunge.certify.accountant import Budget
from expunge.certify.features import features
from expunge.certify.head import NewtonHead
from expunge.core.events import GaussianNoise, SecretKept
from expunge.learn.build import build
from expunge.testing import conformance
from expunge.testing.case import digits

RECIPE = Recipe(model="softmax", epochs=2, batch_size=64, weight_decay=1e-2)
RECORDS = digits().records


@pytest.fixture(scope="module")
def trained():
    return train(RECIPE, RECORDS)


def remove(trained, *ids, method=None):
    return (method or NewtonHead())(trained, RECORDS, Request.remove(list(ids)), rng=generator(0))


def matrix(state):
    return torch.cat([state["head.weight"].double(), state["head.bias"].double()[:, None]], dim=1)


def minimiser(trained, recipe=RECIPE):
    """By L-BFGS of torch on autograd's gradient, in float64: nothing here is shared with what is tested."""
    rows = RECORDS.take(trained.ids)
    x = torch.cat([rows.x.flatten(1).double(), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    w = torch.zeros(10, x.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [w], max_iter=3000, history_size=60, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ w.T, rows.y) + recipe.weight_decay / 2 * w.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert w.grad.norm() < 1e-7, "within 1e-5 of the minimiser, a fiftieth of the smallest cap here"
    return w.detach()


def test_what_is_kept_lies_within_the_cap_and_what_is_released_carries_the_noise(trained):
    method = NewtonHead(sigma=0.05)
    noise = []
    for _ in range(20):
        answer = remove(trained, "row-000", "row-001", method=method)
        secret = matrix(answer.trained.secret)
        assert float((secret - minimiser(answer.trained)).norm()) <= method.cap
        noise.append(matrix(answer.trained.module.state_dict()) - secret)
    drawn = torch.stack(noise)
    assert drawn.std() == pytest.approx(0.05, rel=0.03)
    assert abs(float(drawn.mean())) < 0.05 * 4 / drawn.numel() ** 0.5
    assert float(drawn.std(0).min()) > 0.02, "every entry must carry noise"
    assert float(torch.corrcoef(drawn.flatten(1)).fill_diagonal_(0).abs().max()) < 0.2, "and never the same twice"


def test_the_claim_is_certified_on_a_proved_basis(trained):
    answer = remove(trained, "row-000")
    guarantee = answer.guarantee
    assert answer.claim is Claim.CERTIFIED
    assert guarantee.basis == "proved"
    assert guarantee.outside == ()
    assert guarantee.parameters == ("head.weight", "head.bias")
    assert guarantee.transcript.releases == 1
    assert guarantee.epsilon < guarantee.transcript.budget_epsilon == 1.0
    assert guarantee.mu == pytest.approx(Budget().mu_each, rel=1e-9)
    kinds = [type(event) for event in answer.events]
    assert kinds[:2] == [GaussianNoise, SecretKept]


def test_nothing_that_is_said_depends_on_the_rows(trained):
    """Neither residual nor steps nor what was refactorised may show: only the count of releases moves."""
    one = remove(trained, "row-000")
    many = remove(trained, *[f"row-{i:03d}" for i in range(200)])
    assert one.guarantee == many.guarantee
    until = [event.until for event in (*one.events, *many.events) if isinstance(event, SecretKept)]
    assert until[0] == pytest.approx(until[1], abs=600)
    assert [replace(e, until=0.0) if isinstance(e, SecretKept) else e for e in one.events[:2]] == [
        replace(e, until=0.0) if isinstance(e, SecretKept) else e for e in many.events[:2]
    ]


def test_a_learnt_extractor_is_outside_and_said_to_be(trained):
    mlp = train(replace(RECIPE, model="mlp", model_args={"hidden": [16]}), RECORDS)
    answer = remove(mlp, "row-000")
    assert answer.claim is Claim.CERTIFIED
    assert answer.guarantee.basis == "conditional"
    assert answer.guarantee.outside == ("body.0.weight", "body.0.bias")
    assert "still holds what it learnt of them" in answer.guarantee.remarks[0]
    vouched = remove(mlp, "row-000", method=NewtonHead(public_extractor=True))
    assert "vouches" in vouched.guarantee.remarks[0]
    assert vouched.guarantee.basis == "conditional"


IDS = st.lists(st.sampled_from(list(RECORDS.ids)), min_size=1, max_size=40, unique=True)


@settings(max_examples=8, deadline=None, database=None)
@given(requests=st.lists(IDS, min_size=2, max_size=4))
def test_every_release_of_a_sequence_lies_within_the_cap(requests):
    method = NewtonHead(budget=Budget(requests=10))
    now = train(RECIPE, RECORDS)
    done = 0
    for ids in requests:
        answer = method(now, RECORDS, Request.remove(ids), rng=generator(0))
        now, done = answer.trained, done + bool(set(ids) - now.gone)
        assert not set(ids) & now.ids
        assert len(now.releases) == done
        if now.secret:
            assert float((matrix(now.secret) - minimiser(now)).norm()) <= method.cap


def test_the_budget_is_refused_before_any_work(trained, monkeypatch):
    method = NewtonHead(budget=Budget(requests=2))
    now = remove(trained, "row-000", method=method).trained
    now = remove(now, "row-001", method=method).trained
    monkeypatch.setattr(head, "features", lambda *_: pytest.fail("work was done"))
    with pytest.raises(BudgetExhausted, match="2 were made, as many as were agreed on"):
        remove(now, "row-002", method=method)


def test_the_old_factor_is_used_until_its_time_is_over(trained, monkeypatch):
    made = []

    def counted(objective, w):
        made.append(objective.count)
        return factorise(objective, w)

    factorise = chord.factorise
    monkeypatch.setattr(chord, "factorise", counted)
    method = NewtonHead(refactor_after=3, refactor_within_s=100.0)
    now = trained
    for i in range(7):
        now = remove(now, f"row-{i:03d}", method=method).trained
    assert made == [479, 476, 473], "made at the first request, and again after three uses"
    monkeypatch.setattr(head.time, "time", lambda: 1e12)
    remove(now, "row-100", method=method)
    assert made[3:] == [472], "and after its time"


def test_a_model_without_its_secret_state_gets_the_same_guarantee(trained, tmp_path):
    method = NewtonHead()
    first = remove(trained, "row-000", method=method)
    loaded = Trained.load(first.trained.save(tmp_path / "model"), build)
    assert not loaded.secret
    assert loaded.releases == first.trained.releases
    again, straight = (remove(start, "row-001", method=method) for start in (loaded, first.trained))
    assert again.guarantee == straight.guarantee
    assert again.guarantee.transcript.releases == 2
    assert float((matrix(again.trained.secret) - minimiser(again.trained)).norm()) <= method.cap


def test_nothing_secret_is_written_to_disk(trained, tmp_path):
    answer = remove(trained, "row-000")
    folder = answer.trained.save(tmp_path / "model")
    assert "secret" not in json.loads((folder / "trained.json").read_text())
    stored = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for name, tensor in answer.trained.secret.items():
        for dtype in (torch.float32, torch.float64):
            first = np.ascontiguousarray(tensor.to(dtype).numpy()).tobytes()[: 4 * dtype.itemsize]
            assert first not in stored, name


def test_a_budget_changed_on_the_way_and_a_large_delta_are_said(trained):
    once = remove(trained, "row-000", method=NewtonHead(budget=Budget(epsilon=1.0, requests=2))).trained
    later = remove(once, "row-001", method=NewtonHead(budget=Budget(epsilon=8.0, requests=50))).guarantee
    assert "the budget was changed on the way" in later.remarks[-1]
    kept = remove(once, "row-001", method=NewtonHead(budget=Budget(epsilon=1.0, requests=2))).guarantee
    assert kept.remarks == ()
    large = remove(trained, "row-000", method=NewtonHead(budget=Budget(delta=0.01))).guarantee
    assert "worth little" in large.remarks[-1]


def test_features_of_removed_rows_are_not_kept(trained):
    remove(trained, "row-003")
    seen = features(trained.module, RECORDS.take(["row-004"]))
    assert len(seen.x) > 400, "the others are still remembered"
    assert seen.places(RECORDS.take(["row-003"])) is None
    assert bool((seen.x[seen.keep][:, -1] == 1).all())


def test_noise_is_added_before_rounding(trained, monkeypatch):
    """A centre rounded first would lie elsewhere by more than a small cap."""
    secret, target = None, torch.full((10, 65), 1 + 2.0**-25, dtype=torch.float64)

    def drawn(shape):
        part = target[:, :-1] if len(tuple(shape)) == 2 else target[:, -1]
        w = secret[:, :-1] if len(tuple(shape)) == 2 else secret[:, -1]
        return (part - w) / 0.01

    secret = matrix(remove(trained, "row-000").trained.secret)
    monkeypatch.setattr("expunge.certify.noise.secret_normal", drawn)
    released = matrix(remove(trained, "row-000").trained.module.state_dict())
    assert torch.equal(released, target.float().double())


def test_a_second_release_of_the_same_head_must_be_paid_for(trained):
    method = NewtonHead(budget=Budget(requests=1))
    for model in (remove(trained, "row-000", method=method).trained, method.begin(trained, RECORDS)):
        with pytest.raises(Misuse, match="nothing was removed from yet"):
            method.begin(model, RECORDS.take(model.ids))


def test_of_foreign_modules_nothing_is_proved(trained):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    answer = remove(adopt(module, RECIPE, RECORDS), "row-000")
    assert answer.guarantee.basis == "conditional"
    assert "keeps nothing of rows outside its" in answer.guarantee.remarks[-1]


def test_earlier_removals_without_a_claim_are_said_to_be_uncovered(trained):
    tuned = FineTune(epochs=1)(trained, RECORDS, Request.remove(["row-000"]), rng=generator(0)).trained
    assert "covered by nothing" in remove(tuned, "row-001").guarantee.remarks[-1]
    assert remove(trained, "row-001").guarantee.remarks == ()


def test_other_methods_forget_the_secret_state_and_keep_the_transcript(trained):
    certified = remove(trained, "row-000").trained
    for method in (FineTune(), Retrain()):
        after = method(certified, RECORDS, Request.remove(["row-001"]), rng=generator(0)).trained
        assert not after.secret
        assert after.releases == certified.releases


def test_the_first_model_can_be_given_out_with_noise(trained):
    method = NewtonHead(sigma=0.02)
    first = method.begin(trained, RECORDS)
    assert first.releases == ()
    assert first.standing is Claim.CERTIFIED
    assert float((matrix(first.secret) - minimiser(first)).norm()) <= method.cap
    spread = matrix(first.module.state_dict()) - matrix(first.secret)
    assert spread.std() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(Misuse, match="exactly the records"):
        method.begin(trained, RECORDS.take(RECORDS.ids[:10]))


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (replace(RECIPE, weight_decay=0.0), "weight_decay > 0"),
        (replace(RECIPE, model="mlp", model_args={"hidden": [8], "norm": "batch"}), "keeps sums over removed rows"),
    ],
    ids=["no-weight-decay", "batch-norm"],
)
def test_what_cannot_be_certified_is_refused_with_the_reason(recipe, why):
    with pytest.raises(Unsupported, match=why):
        remove(train(recipe, RECORDS), "row-000")


def test_it_keeps_to_the_contract_of_all_methods():
    """The recipe's own training must come near its minimum, or retraining by it is another reference than ours."""
    case = replace(digits(), recipes=(replace(RECIPE, epochs=30, weight_decay=1e-3),), _models={})
    report = conformance(NewtonHead(), case=case, seeds=range(3))
    assert report.passed, report


def test_ids_never_trained_on_are_refused(trained):
    some = train(RECIPE, RECORDS.take(RECORDS.ids[:100]))
    with pytest.raises(NeverTrained):
        remove(some, "row-400")


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"sigma": float("nan")}, {"refactor_after": -1}, {"budget": 3}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(Misuse):
        NewtonHead(**wrong)
