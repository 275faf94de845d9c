"""Two models of one lineage compared, with exact retraining or without."""

import json
from dataclasses import replace

import pytest
import torch

from expunge import FineTune, Recipe, Records, Request, Sisa, compare, generator, train
from expunge.core.errors import BadRecords, Misuse, UnknownRecord, Unsupported

RECIPE = Recipe(model="mlp", model_args={"hidden": [8]}, epochs=3)


def rows(n, seed, name):
    x = torch.randn(n, 4, generator=generator(seed))
    owners = [f"{name}{i // 2}" for i in range(n)]
    return Records(x, (x[:, 0] > 0).long(), [f"{name}-{i}" for i in range(n)], owners, classes=2)


RECORDS, TEST = rows(80, 0, "a"), rows(30, 1, "t")


@pytest.fixture(scope="module")
def before():
    return train(RECIPE, RECORDS, shards=3)


@pytest.fixture(scope="module")
def after(before):
    return Sisa()(before, RECORDS, Request.remove_owner("a7"), rng=generator()).trained


def test_without_retraining_there_are_no_gaps(before, after):
    found = compare(before, after, RECORDS)
    assert [row.method for row in found.rows] == ["before", "after"]
    assert (found.removed, found.equals_retraining, found.table) == (2, None, None)
    assert all(row.test is None and row.attack is None for row in found.rows)
    assert "mean_gap" not in found.to_json()["rows"][0]
    assert "test not measured" in str(found)


def test_an_exact_model_equals_retraining(before, after):
    heard = []
    found = compare(before, after, RECORDS, TEST, retrain=True, report=lambda *said: heard.append(said))
    assert found.equals_retraining is True
    assert found.rows[1].forget == found.rows[2].forget
    assert found.rows[1].mean_gap(found.rows[2]) == 0
    data = json.loads(json.dumps(found.to_json()))
    assert [row["method"] for row in data["rows"]] == ["before", "after", "retrain"]
    assert data["rows"][2]["seconds"] > 0


def test_a_model_that_only_pretends_does_not(before, after):
    pretender = replace(before, ids=after.ids, gone=after.gone)
    found = compare(before, pretender, RECORDS, TEST, retrain=True)
    assert found.equals_retraining is False


def test_an_approximate_model_does_not():
    whole = train(RECIPE, RECORDS)
    tuned = FineTune()(whole, RECORDS, Request.remove(["a-3"]), rng=generator()).trained
    found = compare(whole, tuned, RECORDS, TEST, retrain=True)
    assert found.equals_retraining is False
    assert [row.claim for row in found.rows] == ["nothing removed", "none", "reference"]


def test_only_what_went_in_between_counts_as_removed(before, after):
    later = Sisa()(after, RECORDS, Request.remove(["a-0"]), rng=generator()).trained
    found = compare(after, later, RECORDS, retrain=True)
    assert (found.removed, found.rows[0].forget.n, found.rows[0].retain.n) == (1, 1, 77)
    assert found.equals_retraining is True


def test_models_that_cannot_be_compared_are_refused(before, after):
    with pytest.raises(Misuse, match="is the order before, after"):
        compare(after, before, RECORDS)
    with pytest.raises(Misuse, match="is the order before, after"):
        compare(after, replace(before, ids=before.ids - {"a-1"}, gone=frozenset({"a-1"})), RECORDS)
    other = replace(after, ids=after.ids - {"a-1"})
    with pytest.raises(Misuse, match="not of one lineage"):
        compare(before, other, RECORDS)


def test_records_must_be_those_of_the_models(before, after):
    with pytest.raises(UnknownRecord, match=r'"a-7[0-9]"'):
        compare(before, after, RECORDS.select(range(70)))
    with pytest.raises(UnknownRecord, match='"a-14"'):
        compare(before, after, RECORDS.without(["a-14"]))
    narrow = Records(RECORDS.x[:, :3], RECORDS.y, RECORDS.ids, RECORDS.owners, classes=2)
    with pytest.raises(BadRecords, match="shape"):
        compare(before, after, narrow)
    with pytest.raises(BadRecords, match="do not fit"):
        compare(before, after, RECORDS, Records(TEST.x[:, :3], TEST.y, TEST.ids, classes=2))


def test_regression_has_no_table():
    targets = Records(RECORDS.x, RECORDS.x[:, 0].contiguous(), RECORDS.ids)
    whole = train(replace(RECIPE, loss="mse"), targets)
    tuned = FineTune()(whole, targets, Request.remove(["a-3"]), rng=generator()).trained
    with pytest.raises(Unsupported, match="compare losses"):
        compare(whole, tuned, targets)
