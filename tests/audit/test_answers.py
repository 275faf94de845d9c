"""Remembered outputs are the outputs; each module is asked once."""

import gc

import pytest
import torch

from expunge import Recipe, Records, Request, Sisa, generator, train
from expunge.audit import Answers, measure
from expunge.learn.predict import outputs

X = torch.randn(60, 4, generator=generator(0))
RECORDS = Records(X, (X[:, 0] > 0).long(), [f"r{i}" for i in range(60)], [f"o{i // 2}" for i in range(60)], classes=2)
TEST = Records(X + 1, RECORDS.y, [f"t{i}" for i in range(60)], classes=2)
RECIPE = Recipe(model="mlp", model_args={"hidden": [8]}, epochs=2)


class Counted:
    """Counts the rows that each module is asked for."""

    def __init__(self, monkeypatch):
        self.rows = {}
        plain = torch.nn.Linear.forward
        counted = self

        def forward(layer, x):
            counted.rows[layer] = counted.rows.get(layer, 0) + len(x)
            return plain(layer, x)

        monkeypatch.setattr(torch.nn.Linear, "forward", forward)


@pytest.mark.parametrize("aggregate", ["one", "vote", "mean"])
def test_answers_are_outputs(aggregate):
    recipe = RECIPE if aggregate == "one" else Recipe(
        **{**RECIPE.to_json(), "sharding": {"shards": 3, "aggregate": aggregate}}
    )  # fmt: skip
    trained = train(recipe, RECORDS)
    answers = Answers(RECORDS, TEST)
    for records in (RECORDS, RECORDS.select([5, 3, 40]), TEST.select(range(9)).select([2, 1]), RECORDS.select([])):
        assert torch.allclose(answers(trained, records), outputs(trained.module, records).view(len(records), 2))
    strangers = Records(X - 1, RECORDS.y, classes=2)
    assert torch.equal(answers(trained, strangers), outputs(trained.module, strangers))


def test_the_whole_sets_may_be_selections_themselves(monkeypatch):
    trained = train(RECIPE, RECORDS)
    backwards, first, rest = (
        RECORDS.select(list(one)) for one in (reversed(range(60)), range(7, 40), [*range(50, 60), 3, 2])
    )
    for answers in (Answers(backwards), Answers(first, rest)):
        for records in (backwards, first, rest, rest.select([11, 0]), first.select([32]), RECORDS):
            assert torch.equal(answers(trained, records), outputs(trained.module, records))
    counted = Counted(monkeypatch)
    answers = Answers(first, rest)
    for records in (first, rest, rest.select([11, 0]), first.select([32])):
        answers(trained, records)
    assert set(counted.rows.values()) == {len(first) + len(rest)}


def test_each_module_is_asked_once_and_shards_are_shared(monkeypatch):
    before = train(RECIPE, RECORDS, shards=5)
    after = Sisa()(before, RECORDS, Request.remove_owner("o3"), rng=generator()).trained
    forget, retain = RECORDS.of_owner("o3"), RECORDS.where(lambda _, owner: owner != "o3")
    plain = [measure(model, forget, retain, TEST, method="a") for model in (before, after)]
    counted = Counted(monkeypatch)
    answers = Answers(RECORDS, TEST)
    for _ in range(2):
        assert [measure(model, forget, retain, TEST, method="a", ask=answers) for model in (before, after)] == plain
    assert set(counted.rows.values()) == {len(RECORDS) + len(TEST)}
    assert len(counted.rows) == 2 * (5 + 1)  # two layers of five shards, and of the one that was trained again


def test_a_dropped_model_is_forgotten():
    answers = Answers(RECORDS)
    trained = train(RECIPE, RECORDS)
    answers(trained, RECORDS)
    assert len(answers._known[0]) == 1
    del trained
    gc.collect()
    assert len(answers._known[0]) == 0
