"""Red-teaming a real model: kept trial by trial, and what follows from what was measured."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from expunge import FineTune, GradientAscent, InfluenceUnlearning, Recipe, Request, Retrain, Sharding, Sisa, train
from expunge.attack.judge_arms import nearest
from expunge.attack.measured import Outcome, Tried
from expunge.core.coins import generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Judgement
from expunge.core.records import Records
from expunge.report.redteam import redteam_report
from expunge.report.redteam_grids import attack_grid, refused_grid, screen_grid, transfer_grid, untried_grid
from expunge.screen import GradientInfluence, GradientNorm
from expunge.study.redteam import redteam
from expunge.study.redteam_attacks import ATTACKS, Ground
from expunge.study.redteam_found import Redteam
from expunge.study.redteam_response import NO_SCREEN, choose, gains, response, summary
from expunge.study.redteam_screens import SCREENS, TOGETHER, Benign, Watched
from expunge.testing.case import digits

SOFTMAX = Recipe(
    model="softmax", epochs=25, batch_size=480, weight_decay=1e-2, optimiser_args={"lr": 0.2, "momentum": 0.9}
)
THROUGH = InfluenceUnlearning(damping=0.0, rows=128)
SMALL = {"targets": 2, "budgets": (0.01, 0.02), "draws": 19, "benign": 10, "rng": generator(0)}


@dataclass(frozen=True)
class Nearest:
    """Asks for the target's nearest neighbours."""

    count: int
    fails: bool = False

    def contribute(self, records, target, *, rng):
        return None

    def requests(self, trained, records, target, *, through, rng):
        if self.fails:
            raise Misuse("this attack never works")
        return (Request.remove([records.ids[i] for i in nearest(records, target)[: self.count]]),)


@dataclass(frozen=True)
class Watchful:
    """Flags every request: somebody else's screen, called through the protocol alone."""

    def __call__(self, trained, records, request, *, rng):
        return tuple(Judgement(record=one, score=1.0, flagged=True, reason="always") for one in request.ids)

    def whole(self, judgements):
        return 1.0


def near(rows, ground):
    return Nearest(rows)


def failing(rows, ground):
    return Nearest(rows, fails=True)


@pytest.fixture(scope="module")
def case():
    return digits()


@pytest.fixture(scope="module")
def trained(case):
    return train(SOFTMAX, case.records)


@pytest.fixture(scope="module")
def kept(case, trained, tmp_path_factory):
    """A finished run and its folder."""
    folder = tmp_path_factory.mktemp("redteam") / "run"
    return folder, run(case, trained, keep=folder)


def run(case, trained, **other):
    settings = {
        "attacks": {"near": near, "failing": failing},
        "through": THROUGH,
        "screens": (GradientNorm(), GradientInfluence(probes=10, sample=32)),
        **SMALL,
    }
    return redteam(trained, case.records, case.test, **{**settings, **other})


def test_every_attack_meets_every_target_at_every_budget(kept):
    found = kept[1]
    assert [(one.attack, one.budget, one.target) for one in found.tried] == [
        (name, rows, target) for name in ("near", "failing") for rows in (5, 10) for target in range(2)
    ]
    assert {out.world for out in found.tried[0].outcomes} == {"through", "retrain"}
    assert all(one.rows == one.budget for one in found.tried if one.outcomes)
    assert found.largest == 10
    assert {one.error for one in found.tried if one.attack == "failing"} == {"Misuse: this attack never works"}


def test_every_policy_is_asked_of_every_attempt_and_of_good_faith(kept):
    found = kept[1]
    assert found.policies == ("GradientNorm", "GradientInfluence", TOGETHER)
    assert len(found.watched) == 3 * 4
    assert {one.group for one in found.benign} == {"remove 5", "remove 10"}
    assert all(len(one.scores) == 10 for one in found.benign)
    for policy in found.policies:
        points, area = found.roc(policy, "near", 10)
        assert points[0] == (0, 0)
        assert points[-1] == (1, 1)
        assert 0 <= area <= 1


def test_a_run_survives_json_and_goes_on_where_it_stopped(kept, case, trained):
    folder, found = kept
    assert Redteam.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
    lines = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "cells.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    told = []
    again = run(case, trained, keep=folder, progress=lambda what, done, total: told.append((what, done, total)))
    assert comparable(again) == comparable(found)
    assert told[-1] == ("done", 8, 8)


def comparable(found):
    """Without seconds, which are never the same twice."""
    tried = [replace(t, seconds=0, outcomes=tuple(replace(o, seconds=0) for o in t.outcomes)) for t in found.tried]
    return sorted(tried, key=repr), sorted(found.watched, key=repr), sorted(found.benign, key=repr), found.targets


def test_another_run_is_refused_the_folder(kept, case, trained):
    with pytest.raises(Misuse, match="another study"):
        run(case, trained, keep=kept[0], benign=11)


def test_what_follows_is_plain_json_and_a_page_with_pictures(kept):
    found = kept[1]
    told = json.loads(json.dumps(summary(found), allow_nan=False))
    assert told["attacks"][0]["answer"] == "neither shown"  # it asks for what a control asks for
    assert told["attacks"][-1]["untried"] == ["Misuse: this attack never works"]
    assert [one["policy"] for one in told["responses"]] == [NO_SCREEN, *found.policies]
    report = redteam_report(found, "expunge redteam m")
    assert [chapter.name for chapter in report.chapters] == ["attacks", "targets", "screens"]
    assert all("<svg" in svg for chapter in report.chapters for svg in chapter.plots.values())
    assert len(attack_grid(found).rows) == 2
    assert len(screen_grid(found).rows) == 4
    assert any("never works" in cell for row in untried_grid(found)[0].rows for cell in row)


def test_without_screens_there_is_nothing_to_recommend(case, trained):
    found = run(case, trained, attacks={"near": near}, screens=(), targets=1, budgets=(0.01,))
    assert found.policies == ()
    assert choose(found).recommended == NO_SCREEN
    assert [chapter.name for chapter in redteam_report(found).chapters] == ["attacks", "targets"]


def test_requests_are_carried_out_through_other_unlearners_too(case, trained):
    other = {"ascent": GradientAscent(), "sgd": FineTune(lr=0.01)}
    found = run(case, trained, attacks={"near": near}, screens=(), budgets=(0.01,), others=other)
    assert found.at_most("near").worlds == ("through", "retrain", "ascent", "sgd")
    assert [row[:2] for row in transfer_grid(found)[0].rows] == [("near", "ascent"), ("near", "sgd")]


def test_a_sharded_model_is_attacked_through_its_own_exact_method(case):
    sharded = train(replace(SOFTMAX, sharding=Sharding(shards=3, aggregate="mean")), case.records)
    settings = {"attacks": {"near": near}, "targets": 1, "budgets": (0.01,), "screens": (GradientNorm(),)}
    found = run(case, sharded, through=Sisa(), **settings)
    through, exact = (found.tried[0].of(world, "attack")[0] for world in ("through", "retrain"))
    assert through.margin == exact.margin
    assert found.at_most("near").exact


@pytest.mark.parametrize("floats", [False, True])
def test_pictures_are_shown_where_rows_are_pictures(case, floats):
    def pictures(rows):
        x = rows.x.reshape(-1, 8, 8)
        return Records(x if floats else (x * 255).to(torch.uint8), rows.y, rows.ids, rows.owners, classes=10)

    records, test = pictures(case.records), pictures(case.test)
    settings = {**SMALL, "targets": 1, "budgets": (0.01,)}
    found = redteam(train(SOFTMAX, records), records, test, attacks={"near": near}, through=Retrain(), **settings)
    picture = torch.tensor(found.targets[0]["picture"])
    assert picture.shape == (8, 8)
    assert 200 < int(picture.max()) <= 255
    (svg,) = redteam_report(found).chapters[1].plots.values()
    assert "data:image/png;base64" in svg
    assert found.at_most("near").exact


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"attacks": {}}, "nothing to try"),
        ({"budgets": (0.0,)}, "above 0"),
        ({"budgets": (0.6,)}, "below 0.5"),
        ({"targets": 0}, "targets"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(case, trained, other, words):
    with pytest.raises(Misuse, match=words):
        run(case, trained, **other)


def test_every_attack_by_name_is_made_for_its_rows_and_every_screen_too(trained):
    for name, make in ATTACKS.items():
        if name != "evading":
            made = make(7, Ground(trained=trained))
            assert {"contribute", "requests"} <= set(dir(made)), name
    with pytest.raises(Misuse, match="there are none"):
        ATTACKS["evading"](7, Ground(trained=trained))
    assert len({repr(make()) for make in SCREENS.values()}) == len(SCREENS)


# ---- what follows, on figures that were made up so that it is known


def outcome(world, arm, margin, gradients=0):
    return Outcome(
        world=world, arm=arm, seed=0, hit=float(margin > 0), margin=margin, loss=0.0, accuracy=0.9, gradients=gradients
    )


def made_up(*, through=1.0, retrain=-3.0, kind="remove", says=None):
    """Ten targets; `says` maps a policy to (score in bad faith, deployed action, share of good faith above it)."""
    says = says or {}
    tried, watched = [], []
    for target in range(10):
        off = 0.01 * target
        outs = [outcome("through", "nothing", -3 + off), outcome("through", "random", -3 + off, 10)]
        outs += [outcome("through", "attack", through + off, 10), outcome("retrain", "nothing", -3 + off)]
        outs += [outcome("retrain", "random", -3 + off, 110), outcome("retrain", "attack", retrain + off, 110)]
        if kind == "replace":
            outs.append(outcome("purge", "attack", -2.0 + off))
        tried.append(Tried(attack="a", target=target, budget=5, rows=5, requests=1, outcomes=tuple(outs)))
        for policy, (score, action, _) in says.items():
            said = {"attack": "a", "target": target, "budget": 5, "policy": policy, "score": score, "action": action}
            watched.append(Watched(**said, delayed=action != "carry out"))
    benign = [
        Benign(
            group=f"{kind} 5",
            policy=policy,
            scores=tuple(score + 1.0 if n < round(100 * share) else 0.0 for n in range(100)),
            delayed=tuple(n < round(100 * share) for n in range(100)),
        )
        for policy, (score, _, share) in says.items()
    ]
    about = {"attacks": ["a"], "budgets": [5], "policies": list(says), "rate": 0.05, "exact": False, "seeds": 1}
    return Redteam(
        about=about,
        tried=tuple(tried),
        watched=tuple(watched),
        benign=tuple(benign),
        groups={("a", 5, target): f"{kind} 5" for target in range(10)},
        targets=({"y": 0, "wanted": None, "picture": None},) * 10,
    )


GOOD, BLIND, WOLF = (1.0, "exact", 0.04), (0.0, "carry out", 0.0), (1.0, "exact", 1.0)


def test_a_caught_erasure_ends_in_retraining_and_an_uncaught_one_in_the_unlearner():
    found = made_up(says={"sees": GOOD, "blind": BLIND})
    assert response(found, NO_SCREEN, "a", 5).gain.value == pytest.approx(4.0)
    assert response(found, "blind", "a", 5).gain.value == pytest.approx(4.0)
    seen = response(found, "sees", "a", 5)
    assert seen.gain.value == pytest.approx(0.0)
    assert seen.caught.value == 1
    assert seen.hit.value == 0
    assert seen.false_alarms.value == 0.04
    assert seen.gradients == pytest.approx(4.0)  # 4 % of good faith is retrained, for 100 row gradients more
    assert choose(found).recommended == choose(found).best_single == "sees"


def test_a_screen_that_never_fires_is_not_the_best_single_one():
    found = made_up(says={"blind": BLIND})
    assert choose(found).best_single is None
    assert choose(found).recommended == NO_SCREEN


def test_a_caught_replacement_ends_purged_and_a_refused_request_where_it_began():
    found = made_up(kind="replace", says={"sees": (1.0, "purge", 0.0), "door": (1.0, "refuse", 0.0)})
    assert response(found, "sees", "a", 5).gain.value == pytest.approx(1.0)
    assert gains(found, "sees", "a", 5)[3] == pytest.approx(1.0)
    assert response(found, "door", "a", 5).gain.value == pytest.approx(0.0)


def test_a_screen_that_cries_wolf_is_worth_nothing_at_equal_false_alarms():
    found = made_up(says={"wolf": WOLF})
    told = response(found, "wolf", "a", 5)
    assert told.gain.value == pytest.approx(0.0)
    assert told.gain_equal.value == pytest.approx(4.0)
    assert not found.catches("wolf", "a")
    assert found.uncaught == ("a",)
    assert choose(found).recommended == NO_SCREEN


def test_an_attack_that_no_screen_sees_is_uncaught_and_one_that_is_seen_is_not():
    assert made_up(says={"blind": BLIND}).uncaught == ("a",)
    assert made_up(says={"blind": BLIND, "sees": GOOD}).uncaught == ()
    assert made_up(through=-3.0, says={"blind": BLIND}).uncaught == ()
    assert made_up().uncaught == ("a",)


def test_alarms_do_not_help_where_retraining_is_harmed_as_much():
    found = made_up(retrain=1.0, says={"sees": GOOD})
    assert choose(found).recommended == NO_SCREEN
    assert found.measured["a", 5].answer == "both"


def test_the_combination_is_recommended_only_where_it_is_shown_to_leave_less():
    assert choose(made_up(says={"sees": GOOD, "blind": BLIND, TOGETHER: GOOD})).recommended == "sees"
    assert choose(made_up(says={"sees": GOOD, "blind": BLIND, TOGETHER: BLIND})).recommended == "sees"
    found = choose(made_up(says={"one": BLIND, "blind": BLIND, TOGETHER: GOOD}))
    assert found.recommended == TOGETHER
    assert found.combination_less_best.high < 0


def test_the_area_below_the_curve_is_the_chance_of_scoring_higher():
    found = made_up(says={"sees": GOOD})
    assert found.roc("sees", "a", 5)[1] == pytest.approx(0.96)
    assert made_up(says={"blind": BLIND}).roc("blind", "a", 5)[1] == pytest.approx(0.5)


def test_a_foreign_screen_that_flags_everything_is_found_out(case, trained):
    found = run(case, trained, attacks={"near": near}, screens=(Watchful(),), budgets=(0.01,))
    assert not found.catches("Watchful", "near")


# ---- what people read, on the same figures


def with_refusals(found, *, moved=0.0, reason="NeverTrained: rows 1 to 5 were never trained on"):
    """The same where the unlearner refused the attack's requests; `moved`: what it did all the same."""
    tried = []
    for one in found.tried:
        before = one.of("through", "nothing")[0]
        after = replace(before, arm="attack", refused=(reason,), margin=before.margin + moved)
        others = [out for out in one.outcomes if (out.world, out.arm) != ("through", "attack")]
        trusting = replace(before, world="naive", arm="attack", margin=before.margin + 4.0, hit=1.0)
        tried.append(replace(one, outcomes=(*others, after, trusting)))
    about = {**found.about, "rows": 500, "others": {}, "benign": 100, "model": "softmax", "test_rows": 50, "seed": 0}
    about |= {"through": "FineTune()", "retrain": "Retrain()", "targets": 10, "screens": list(found.policies)}
    return replace(found, tried=tuple(tried), about=about)


def test_requests_that_the_provider_refuses_are_told_apart_from_attacks_that_failed():
    found = with_refusals(made_up(says={"sees": GOOD}))
    assert found.refused == {("a", 5)}
    assert found.screened == ()
    assert attack_grid(found).rows == ()
    assert untried_grid(found) == ()
    (grid,) = refused_grid(found)
    assert grid.headers == ("attack", "budget", "requests", "why", "hit, if trusted", "gain, if trusted")
    assert grid.rows == (("a", "5", "all", "rows 1 to 5 were never trained on", "100 (69 to 100)", "+4.00"),)
    report = redteam_report(found)
    assert report.chapters[0].text[0].startswith("a: Neither: the provider refused its requests")
    assert "hit on 100 % of targets, their margins +4.00 above" in report.chapters[0].text[0]
    assert [chapter.name for chapter in report.chapters] == ["attacks", "targets"]
    assert summary(found)["refused"] == [["a", 5]]


def test_a_refusal_of_some_requests_does_not_hide_what_the_others_did():
    found = with_refusals(made_up(says={"sees": GOOD}), moved=2.0)
    assert found.refused == frozenset()
    assert [row[0] for row in attack_grid(found).rows] == ["a"]
    assert refused_grid(found)[0].rows[0][2] == "some, of 10 of 10 targets"
    plain = made_up(says={"sees": GOOD})
    assert refused_grid(plain) == ()
    assert plain.refused == frozenset()


def test_no_two_columns_share_a_name_and_none_is_empty():
    found = with_refusals(made_up(says={"sees": GOOD, "wolf": WOLF}), moved=2.0)
    for grid in (attack_grid(found), screen_grid(found), *refused_grid(found)):
        assert len(set(grid.headers)) == len(grid.headers)
        assert all(len(row) == len(grid.headers) for row in grid.rows)
        for place, header in enumerate(grid.headers):
            assert {row[place] for row in grid.rows} - {"", "0"}, header


def test_columns_in_which_nothing_is_known_are_left_out_with_what_they_mean():
    told = with_refusals(made_up(says={"sees": GOOD, "wolf": WOLF}), moved=2.0)
    assert {"at equal", "work"} <= set(screen_grid(told).headers)
    assert "at equal: " in screen_grid(told).notes
    silent = with_refusals(made_up(retrain=1.0, says={"blind": BLIND}), moved=4.0)
    grid = screen_grid(silent)
    assert grid.headers == ("attack", "policy", "caught", "hit", "gain", "delayed", "area")
    assert "at equal" not in grid.notes
    assert "work" not in grid.notes
    assert "work" not in attack_grid(silent).headers


def test_the_recommendation_is_said_once():
    report = redteam_report(with_refusals(made_up(says={"sees": GOOD}), moved=4.0))
    said = [report.verdict, *(text for one in report.chapters for text in (one.headline, *one.text))]
    assert sum("Recommended" in one for one in said) == 1


@pytest.mark.parametrize("budgets", [1, 2])
def test_success_is_drawn_as_bars_at_one_budget_and_against_budgets_else(budgets):
    found = with_refusals(made_up(), moved=4.0)
    if budgets == 2:
        more = tuple(replace(one, budget=9) for one in found.tried)
        about = {**found.about, "budgets": [5, 9]}
        found = replace(found, tried=(*found.tried, *more), about=about)
    (caption,) = redteam_report(found).chapters[0].plots
    assert ("against budget" in caption) is (budgets == 2)
    svg = redteam_report(found).chapters[0].plots[caption]
    assert ("budget, % of the rows" in svg) is (budgets == 2)


def test_kept_trials_are_not_told_of_again(kept, case, trained):
    told = []
    run(case, trained, keep=kept[0], progress=lambda *what: told.append(what))
    assert told == [("done", 8, 8)]
