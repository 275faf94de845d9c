"""MIA-efficacy against brute force and against what it must say of models that anybody can judge."""

import numpy as np
import pytest
import torch

from expunge import Recipe, Records, generator, train
from expunge.audit import mia_efficacy
from expunge.audit.efficacy import best_threshold, confidence
from expunge.core.errors import Misuse, Unsupported
from expunge.learn.predict import outputs


def brute(members, strangers):
    """The lowest of all thresholds with the highest balanced accuracy, in whole numbers."""
    found = {}
    for t in sorted({*members, *strangers}):
        right = sum(m >= t for m in members) * len(strangers) + sum(s < t for s in strangers) * len(members)
        found[t] = right
    top = max(found.values())
    assert top >= len(members) * len(strangers)  # calling nobody a member is never better
    return min(t for t, right in found.items() if right == top)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_by_brute_force(seed, ties):
    rng = np.random.default_rng(seed)
    members, strangers = rng.normal(rng.uniform(-1, 2), 1, rng.integers(1, 30)), rng.normal(0, 1, rng.integers(1, 30))
    if ties:
        members, strangers = members.round(), strangers.round()
    found = best_threshold(torch.from_numpy(members), torch.from_numpy(strangers))
    assert found == brute(members.tolist(), strangers.tolist())


def test_sides_weigh_the_same_however_many_rows_each_has():
    members, strangers = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.5])
    assert best_threshold(members, strangers) == best_threshold(members.repeat(100), strangers)
    with pytest.raises(Misuse, match="both sides, got 0 and 2"):
        best_threshold(torch.empty(0), strangers)


def test_confidence_is_the_labels_probability_and_has_no_ties_at_one():
    told, y = torch.randn(6, 4, generator=generator(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    by_hand = told.double().softmax(1)[torch.arange(6), y]
    assert torch.allclose(confidence(told, y).sigmoid(), by_hand, atol=1e-12)
    sure = torch.tensor([[40.0, 0.0], [60.0, 0.0]])
    assert bool((sure.softmax(1)[:, 0] == 1).all())
    assert confidence(sure, torch.zeros(2, dtype=torch.int64)).unique().numel() == 2


X = torch.randn(300, 5, generator=generator(1))
Y = torch.randint(0, 3, (300,), generator=generator(2))  # noise: nothing but the rows themselves can be learnt
NAMES = [f"r{i}" for i in range(300)]
FORGET, RETAIN, TEST = (Records(X[a:b], Y[a:b], NAMES[a:b], classes=3) for a, b in ((0, 60), (60, 180), (180, 300)))
RECIPE = Recipe(model="mlp", model_args={"hidden": [256]}, epochs=150, batch_size=20, optimiser_args={"lr": 0.1})


@pytest.fixture(scope="module")
def models():
    return train(RECIPE, FORGET.plus(RETAIN)), train(RECIPE, RETAIN)


def test_a_model_that_knows_the_rows_and_one_that_never_saw_them_are_told_apart(models):
    knows, never = (mia_efficacy(model, FORGET, RETAIN, TEST) for model in models)
    assert knows.value < 0.2
    assert never.value > 0.5
    assert (knows.n, never.n) == (60, 60)
    assert "threshold as given" in knows.interval


def test_the_share_is_counted_by_hand(models):
    for model in models:
        scores = [confidence(outputs(model.module, rows), rows.y).tolist() for rows in (FORGET, RETAIN, TEST)]
        threshold = brute(scores[1], scores[2])
        assert mia_efficacy(model, FORGET, RETAIN, TEST).value == sum(one < threshold for one in scores[0]) / 60


def test_strangers_are_of_retained_classes_only(models):
    kept = RETAIN.select((RETAIN.y != 2).nonzero().flatten())
    alike = TEST.select((TEST.y != 2).nonzero().flatten())
    assert mia_efficacy(models[0], FORGET, kept, TEST) == mia_efficacy(models[0], FORGET, kept, alike)
    assert mia_efficacy(models[0], FORGET, kept, TEST.of_class(2)) is None


def sure(label, *confidences):
    """Rows that are their own outputs, with these confidences in their label."""
    told = torch.zeros(len(confidences), 2)
    told[:, label] = torch.tensor(confidences)
    ids = [f"{label}-{i}-{one}" for i, one in enumerate(confidences)]
    return Records(told, torch.full((len(confidences),), label), ids, classes=2)


def test_strangers_of_other_classes_do_not_move_the_threshold(models):
    retain, forget = sure(0, 2.0, 2.0, 2.0, 3.0), sure(1, 1.5, 1.5, 2.5)
    alike, others = sure(0, 0.0, 0.0, 1.0, 1.0), sure(1, *[2.2] * 20)
    for test in (alike, alike.plus(others)):
        found = mia_efficacy(models[0], forget, retain, test, ask=lambda _, rows: rows.x)
        assert found.value == 2 / 3  # by a threshold of 2; with the others among the strangers it would be 3
    everybody = torch.cat([confidence(one.x, one.y) for one in (alike, others)])
    assert best_threshold(confidence(retain.x, retain.y), everybody) == 3


def test_what_has_no_confidence_is_refused():
    rows = Records(X, X[:, 0])
    model = train(Recipe(model="mlp", loss="mse", epochs=1, optimiser_args={"lr": 0.01}), rows)
    with pytest.raises(Unsupported, match="compare losses"):
        mia_efficacy(model, rows, rows, rows)
