"""What a cheat retains: intervals worked out by hand, liars that retain all, honest parties that retain nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from expunge import Recipe, Records, generator, train
from expunge.audit.metrics import auc
from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.learn.loop import Tally
from expunge.learn.predict import outputs
from expunge.study import retention as study
from expunge.study import retention_rows
from expunge.study.retention import retention, scores_of
from expunge.study.retention_found import FIGURES, Retention
from expunge.study.retention_parties import PARTIES, Removal, honest_retrain
from expunge.study.retention_rows import GROUPS, Chosen, Rules, atypical_rows, unseen_scores
from expunge.testing.case import digits

CASE = digits(rows=400, owners=8, careless=1)  # whose wrong labels can only be known by heart
ROWS, TEST = CASE.records, CASE.test
RECIPE = Recipe(
    model="mlp",
    model_args={"hidden": [64]},
    epochs=18,
    batch_size=64,
    optimiser_args={"lr": 0.2, "momentum": 0.9},
)
STEPS = 18 * math.ceil(400 / 64)
RULES = Rules(forgotten=50, hard=0.3, reach=0.9, folds=2)
SOME = ("original", "honest retrain", "honest retrain, other coins", "retraining, nearest row")


def measured(*names, **settings):
    given = {"seeds": 4, "rng": generator(0), "rules": RULES, **settings}
    return retention(ROWS, TEST, RECIPE, parties={name: PARTIES[name] for name in names}, **given)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retention") / "run"
    return folder, measured(*SOME, keep=folder)


@pytest.fixture(scope="module")
def found(kept):
    return kept[1]


@pytest.fixture(scope="module")
def removal():
    original = train(replace(RECIPE, seed=5), ROWS)
    forgotten = ROWS.select(range(0, 400, 8))
    return Removal(
        records=ROWS, retain=ROWS.without(forgotten.ids), forgotten=forgotten, original=original, rng=generator(1)
    )


def line(steps, match, accuracy, scores):
    return {"steps": steps, "match": match, "accuracy": accuracy, "test": 0.5, "scores": scores}


def by_hand():
    ours = [(0.5, [1.0, 4.0]), (0.75, [2.0, 5.0]), (1.0, [3.0, 9.0])]
    honest = [(0.25, [0.0, 3.0]), (0.75, [1.0, 5.0]), (0.25, [2.0, 4.0])]
    return Retention(
        about={"parties": ["cheat"], "groups": ["some"]},
        seeds=3,
        chosen={"some": Chosen(positions=(0, 1), figures={})},
        models={("some", seed, "cheat"): line(10, 10, *one) for seed, one in enumerate(ours)},
        matched={("some", seed, 10): line(10, 10, *one) for seed, one in enumerate(honest)},
    )


# The figures


def test_gains_are_paired_by_seed_and_their_intervals_are_students():
    told = by_hand()
    gain = told.gain("some", "cheat", "accuracy")  # differences .25, 0, .75: mean 1/3, variance 7/48
    half = 4.302652729749464 * math.sqrt(7 / 48 / 3)
    assert (gain.value, gain.low, gain.high) == pytest.approx((1 / 3, 1 / 3 - half, 1 / 3 + half))
    score = told.gain("some", "cheat", "score")  # means of rows' differences 1, .5, 3: mean 1.5, variance 1.75
    half = 4.302652729749464 * math.sqrt(1.75 / 3)
    assert (score.value, score.low, score.high) == pytest.approx((1.5, 1.5 - half, 1.5 + half))
    assert told.honest_accuracy("some", "cheat").value == pytest.approx(1.25 / 3)
    assert told.widest == pytest.approx(200 * 4.302652729749464 * math.sqrt(7 / 48 / 3))


def test_gains_over_rows_are_of_each_rows_mean_over_seeds():
    told = by_hand().over_rows("some", "cheat")  # rows' means 1 and 2: mean 1.5, variance .5
    half = 12.706204736432095 * math.sqrt(0.5 / 2)
    assert (told.value, told.low, told.high, told.n) == pytest.approx((1.5, 1.5 - half, 1.5 + half, 2))


def test_seen_compares_each_row_with_other_seeds_honest_retrainings():
    told = by_hand().gain("some", "cheat", "seen")
    # Seed 0: others (1, 5) and (2, 4), centres 1.5 and 4.5, widths .707: ours (-.707, -.707), honest (-2.12, -2.12).
    # Seed 1: others (0, 3) and (2, 4), centres 1 and 3.5, widths 1.414, .707: ours (.707, 2.12), honest (0, 2.12).
    # Seed 2: others (0, 3) and (1, 5), centres .5 and 4, widths .707, 1.414: ours (3.54, 3.54), honest (2.12, 0).
    assert told.value == pytest.approx((1.0 + 0.625 + 1.0) / 3 - 0.5)
    assert replace(by_hand(), seeds=2).gain("some", "cheat", "seen") is None
    assert replace(by_hand(), seeds=2).verdict("some", "cheat", "seen") == "not shown"


@pytest.mark.parametrize(
    ("shift", "word"), [(0.0, "not shown"), (2.0, "retained"), (-2.0, "less than the honest retrain")]
)
def test_a_verdict_needs_the_whole_interval_on_one_side(shift, word):
    noise = [0.3, -0.2, 0.1, -0.2]
    models = {("some", s, "cheat"): line(1, 1, 0.5, [shift + one, shift + one]) for s, one in enumerate(noise)}
    matched = {("some", s, 1): line(1, 1, 0.5, [0.0, 0.0]) for s in range(4)}
    told = replace(by_hand(), seeds=4, models=models, matched=matched)
    assert told.verdict("some", "cheat", "score") == word
    assert told.verdict("some", "cheat", "accuracy") == "not shown"


def test_judging_many_at_once_asks_for_more():
    told = by_hand()
    assert told.joint_level == pytest.approx(1 - 0.05 / 3)
    many = replace(told, about={"parties": ["original", "cheat", "other"], "groups": ["some"]})
    assert many.judged == ("cheat", "other")
    assert many.joint_level == pytest.approx(1 - 0.05 / 6)
    wide, usual = told.gain("some", "cheat", "score", told.joint_level), told.gain("some", "cheat", "score")
    assert wide.high - wide.low > usual.high - usual.low


def test_scores_are_log_odds_of_the_label(removal):
    scores = scores_of(removal.original.module, TEST)
    told = outputs(removal.original.module, TEST).double().softmax(1)
    p = told[torch.arange(len(TEST)), TEST.y]
    torch.testing.assert_close(scores, (p / (1 - p)).log(), rtol=1e-4, atol=1e-3)


# Liars and honest parties


def test_the_model_that_never_forgot_is_shown_to_retain(found):
    for figure in FIGURES:
        assert found.gain("atypical", "original", figure).low > 0
        assert found.verdict("atypical", "original", figure) == "retained"
    assert found.verdict("random", "original", "score") == "retained"


def test_honest_retraining_with_other_coins_is_not(found):
    for group in GROUPS:
        for figure in FIGURES:
            assert found.verdict(group, "honest retrain, other coins", figure, 0.999) == "not shown"


def test_all_is_told_as_json(found):
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(data["rows"]) == {"random", "atypical"}
    told = data["rows"]["atypical"]["original"]
    assert told["score_verdict"] == "retained"
    assert told["accuracy_gain"]["n"] == 4
    assert "positions" not in json.dumps(data)


# Steps


def test_steps_are_matched_exactly(found):
    for (group, seed, name), told in found.models.items():
        honest = found.matched[group, seed, told["match"]]
        assert honest["steps"] == told["match"] == STEPS
        stay = 400 - len(found.chosen[group].positions)
        fewer = 18 * math.ceil(stay / 64)
        assert fewer < STEPS
        assert told["steps"] == (fewer if name == "honest retrain" else STEPS)


@pytest.mark.parametrize("name", [name for name in PARTIES if name.startswith("retraining")])
def test_every_adversary_counts_the_steps_that_it_makes(removal, name, monkeypatch):
    from expunge.verify.states import Stepper

    made, step = [], Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda self, *args: made.append(len(args[1])) or step(self, *args))
    removal = replace(removal, original=replace(removal.original, recipe=replace(removal.recipe, epochs=2)))
    answer = PARTIES[name](removal)
    assert answer.steps == answer.match == len(made)
    if "once" not in name:
        assert sum(made) == 2 * 400


def test_an_honest_retraining_of_the_recipes_own_steps_is_the_training_itself(removal):
    recipe = removal.recipe
    steps = recipe.epochs * math.ceil(len(removal.retain) / 64)
    ours = honest_retrain(recipe, removal.retain, steps).module.state_dict()
    theirs = train(recipe, removal.retain).module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Spying(Tally):
    def __init__(self):
        super().__init__()
        self.ids, self.batches = set(), 0

    def saw(self, records, positions, x, y):
        self.ids |= {records.ids[place] for place in positions.tolist()}
        self.batches += 1


def test_forgotten_rows_are_in_no_step_of_the_matched_retraining(removal):
    spy = Spying()
    answer = honest_retrain(removal.recipe, removal.retain, removal.steps, tally=spy)
    assert spy.batches == answer.steps == removal.steps == STEPS
    assert spy.ids == set(removal.retain.ids)
    assert not spy.ids & set(removal.forgotten.ids)
    liar = Spying()
    honest_retrain(removal.recipe, ROWS, removal.steps, tally=liar)
    assert liar.ids & set(removal.forgotten.ids)


# The rows


def test_each_row_is_scored_by_a_model_that_never_saw_it_and_that_nobody_judges(monkeypatch):
    seen = []

    def spied(recipe, records, **more):
        seen.append((recipe.seed, set(records.ids)))
        return train(recipe, records, **more)

    monkeypatch.setattr(retention_rows, "train", spied)
    scores = unseen_scores(ROWS, RECIPE, 3, generator(2))
    assert len(seen) == 3
    assert all(sum(name not in ids for _, ids in seen) == 1 for name in ROWS.ids)
    judged = {child(generator(2), "seed", seed).initial_seed() >> 1 for seed in range(10)}
    assert not judged & {seed for seed, _ in seen}
    own = next(place for place, name in enumerate(ROWS.ids) if name not in seen[1][1])
    model = train(replace(RECIPE, seed=seen[1][0]), ROWS.take([n for n in ROWS.ids if n in seen[1][1]]))
    assert float(scores[own]) == pytest.approx(float(scores_of(model.module, ROWS.select([own]))), abs=1e-4)


def test_the_choice_of_rows_trains_and_reads_no_judged_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a judged model was trained")

    chosen = atypical_rows(ROWS, RECIPE, RULES, generator(2))
    monkeypatch.setattr(study, "train", refuse)
    monkeypatch.setattr(study, "honest_retrain", refuse)
    monkeypatch.setattr(study, "accuracy_of", refuse)
    assert atypical_rows(ROWS, replace(RECIPE, seed=99), RULES, generator(2)) == chosen
    with pytest.raises(AssertionError, match="judged model"):
        measured("original", seeds=2)


def test_atypical_rows_are_hard_and_their_twins_are_near_of_their_label_and_stay():
    rules = replace(RULES, reach=0.5)
    chosen = atypical_rows(ROWS, RECIPE, rules, generator(2))
    scores, drawn = unseen_scores(ROWS, RECIPE, 2, generator(2)), torch.tensor(chosen.positions)
    hard = scores.argsort()[: int(0.3 * 400)]
    assert set(drawn.tolist()) <= set(hard.tolist())
    x = ROWS.x.flatten(1)
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    apart[ROWS.y[:, None] != ROWS.y[None]] = torch.inf
    apart.fill_diagonal_(torch.inf)
    near, twins = apart.min(1)
    assert not set(twins[drawn].tolist()) & set(drawn.tolist())
    assert float(near[drawn].max()) <= float(near.quantile(0.5)) + 1e-5  # all 400 rows are in the sample
    assert chosen.figures["nearest that stays, median"] < chosen.figures["random row of the class, median"]
    assert chosen.figures["twins that are atypical"] > 0
    many = atypical_rows(ROWS, RECIPE, replace(RULES, forgotten=350, hard=0.95, reach=1.0), generator(2)).positions
    assert len(many) > 100
    assert not set(twins[list(many)].tolist()) & set(many), "where most rows are somebody's twin too"


def test_rows_of_a_group_do_not_depend_on_the_order_of_seeds_or_parties(found):
    alone = measured("original", seeds=2, groups={"atypical": GROUPS["atypical"]})
    assert alone.chosen["atypical"] == found.chosen["atypical"]
    assert len(found.chosen["random"].positions) == 50
    assert set(found.chosen["random"].positions) != set(found.chosen["atypical"].positions)


# Going on, and what cannot be meant


def test_a_finished_study_is_read_again_and_a_torn_one_is_gone_on_with(kept, tmp_path, monkeypatch):
    folder, first = kept
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "study.json").write_bytes((folder / "study.json").read_bytes())
    lines = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (torn / "cells.jsonl").write_bytes(b"".join(lines[:-3]) + b'{"torn')
    assert measured(*SOME, keep=torn).to_json() == first.to_json()
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("a finished model was trained again"))
    assert measured(*SOME, keep=folder).to_json() == first.to_json()
    with pytest.raises(Misuse, match=r"another study, which differs in rules\.hard"):
        measured(*SOME, keep=folder, rules=replace(RULES, hard=0.2))


def test_seeds_can_be_added(kept, found, tmp_path):
    two = measured("original", seeds=2, keep=tmp_path / "run")
    three = measured("original", seeds=3, keep=tmp_path / "run")
    assert two.accuracy("random", "original").n == 2
    assert three.gain("random", "original", "seen") is not None
    assert three.models["random", 2, "original"]["scores"] == found.models["random", 2, "original"]["scores"]


def test_the_seen_figure_is_an_auc_less_one_half(found):
    group, name = "atypical", "original"
    ours = torch.tensor([found.models[group, seed, name]["scores"] for seed in range(4)]).double()
    honest = torch.tensor(
        [found.matched[group, seed, found.models[group, seed, name]["match"]]["scores"] for seed in range(4)]
    ).double()
    others = honest[[1, 2, 3]]
    z = [(one[0] - others.mean(0)) / others.std(0).clamp_min(1e-3) for one in (ours, honest)]
    first = auc(*z).value - 0.5
    assert first > 0
    assert found.gain(group, name, "seen").value == pytest.approx(first, abs=0.2)


def test_what_cannot_be_meant_is_refused(tmp_path):
    with pytest.raises(Misuse, match="two seeds or more, got 1"):
        measured("original", seeds=1)
    with pytest.raises(Misuse, match="400 of 400 rows cannot be forgotten"):
        measured("original", rules=replace(RULES, forgotten=400))
    with pytest.raises(Misuse, match="no test rows"):
        retention(ROWS, TEST.select([]), RECIPE, rng=generator(0))
    with pytest.raises(Unsupported, match='schedule "cosine"'):
        retention(ROWS, TEST, replace(RECIPE, schedule={"kind": "cosine"}), rng=generator(0))
    with pytest.raises(Unsupported, match="one dense model"):
        retention(ROWS, TEST, replace(RECIPE, sharding={"shards": 2}), rng=generator(0))
    floats = Records(ROWS.x, ROWS.y.float(), ROWS.ids)
    with pytest.raises(Unsupported, match="targets are floats"):
        retention(floats, TEST, RECIPE, rng=generator(0))
    with pytest.raises(Misuse, match="raise hard or reach"):
        atypical_rows(ROWS, RECIPE, Rules(forgotten=10, hard=0.002, reach=0.001), generator(0))
    for wrong in ({"forgotten": 1}, {"folds": 1}, {"hard": 0.0}, {"hard": 1.0}, {"reach": 0.0}):
        with pytest.raises(Misuse, match=r"must be >= 2|need 0 <"):
            replace(RULES, **wrong)
