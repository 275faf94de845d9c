"""Features are computed once for a tensor of rows, anew where they must be, and wiped when rows go."""

import gc
from dataclasses import replace

import pytest
import torch

from expunge import Recipe, Records, Unsupported, train
from expunge.certify import features as remembered
from expunge.certify.features import features, forget
from expunge.learn.build import build
from expunge.learn.models import features_of


def some_rows(n=60):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 7, generator=rng)
    return Records(x, torch.arange(n) % 3, [f"r{i}" for i in range(n)], classes=3)


DTYPES = ("float32", "float64")


@pytest.fixture
def module():
    recipe = Recipe(model="mlp", model_args={"hidden": [5], "shape": [7], "outputs": 3})
    return build(recipe).eval()


def plain(module, records):
    with torch.no_grad():
        return torch.cat([features_of(module, records.x).double(), torch.ones(len(records), 1)], dim=1)


def test_they_are_what_the_head_sees_and_a_one(module):
    records = some_rows()
    part = records.take(["r5", "r50", "r7"])
    for one in (records, part):
        seen = features(module, one)
        order = [int(place) for place in seen.places(one)]
        torch.testing.assert_close(seen.x[order], plain(module, one).double(), rtol=0, atol=1e-6)
        assert sorted(order) == seen.keep.nonzero().flatten().tolist()
        assert seen.y[order].tolist() == one.y.tolist()


def test_they_are_computed_once_for_a_set_and_all_its_selections(module, monkeypatch):
    records, calls = some_rows(), []
    computed = remembered._computed
    monkeypatch.setattr(remembered, "_computed", lambda *args: calls.append(len(args[1])) or computed(*args))
    features(module, records)
    features(module, records.take(["r1", "r2"]))
    features(module, records.without(["r1"]))
    assert calls == [60]
    other = build(Recipe(model="mlp", model_args={"hidden": [5], "shape": [7], "outputs": 3}, seed=1)).eval()
    features(other, records)
    assert calls == [60, 60], "another extractor has other features"
    with torch.no_grad():
        other.head.weight.add_(1.0)
    features(other, records)
    assert calls == [60, 60], "the head is no part of the extractor"


def test_what_else_features_depend_on_is_never_mixed_up():
    """A module's structure and dtype are no part of its state, and of foreign modules nobody knows what else."""
    records, head = some_rows(), torch.nn.Linear(7, 3)
    one, other = torch.nn.Sequential(torch.nn.ReLU(), head), torch.nn.Sequential(torch.nn.Tanh(), head)
    first, second = features(one, records), features(other, records)
    assert not torch.equal(first.x, second.x)
    assert first.places(records) is None, "features of foreign modules are never remembered"
    pixels = Records((records.x * 40 + 128).to(torch.uint8), records.y, records.ids, classes=3)
    args = {"shape": [7], "outputs": 3}
    single, double = (features(build(Recipe(model="softmax", model_args=args, dtype=d)), pixels) for d in DTYPES)
    assert not torch.equal(single.x, double.x)


def test_removed_rows_are_wiped_and_come_back_only_if_they_are_asked_for(module):
    records = some_rows()
    seen = features(module, records)
    place = int(seen.places(records.take(["r9"]))[0])
    forget(records.take(["r9"]))
    assert not bool(seen.x[place].any())
    assert seen.places(records.take(["r9"])) is None
    rest = features(module, records.without(["r9"]))
    assert rest.x is seen.x
    again = features(module, records)
    assert again.x is not seen.x
    torch.testing.assert_close(again.x, plain(module, records).double(), rtol=0, atol=1e-6)


def test_they_go_with_the_rows(module):
    records = some_rows()
    features(module, records)
    before = len(remembered._known)
    del records
    gc.collect()
    assert len(remembered._known) == before - 1


def test_a_streamed_data_set_is_read_each_time(module):
    rows = some_rows(20)
    streamed = Records.from_dataset(torch.utils.data.TensorDataset(rows.x, rows.y), classes=3)
    seen = features(module, streamed)
    torch.testing.assert_close(seen.x, plain(module, rows).double(), rtol=0, atol=1e-6)
    assert bool(seen.keep.all())
    assert seen.places(streamed) is None


def test_a_head_without_bias_is_refused():
    with pytest.raises(Unsupported, match="no bias"):
        features(torch.nn.Sequential(torch.nn.Linear(7, 3, bias=False)), some_rows())


def test_features_of_a_trained_softmax_model_are_its_rows():
    records = some_rows()
    trained = train(replace(Recipe(model="softmax", epochs=1), seed=2), records)
    assert torch.equal(features(trained.module, records).x[:, :-1], records.x.double())
