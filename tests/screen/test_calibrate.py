"""Benign requests, p-values that keep their promise, and what is decided."""

import copy
import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy import stats

from expunge import Misuse, NeverTrained, Records, Request, UnknownRecord
from expunge.core.coins import child, generator
from expunge.screen import (
    Asked,
    Benign,
    Coalition,
    Desk,
    GradientInfluence,
    GradientNorm,
    Isolation,
    Membership,
    Screening,
    calibrate,
    default_screens,
    defend,
    p_values,
    understand,
)
from expunge.screen.conformal import least_draws
from tests.screen import kit, liars

SIZE = 20


@pytest.fixture(scope="module")
def desk():
    return Desk(default_screens(), kit.trained(), kit.records(), seed=11)


@pytest.fixture(scope="module")
def screening(desk):
    return calibrate(default_screens(), kit.trained(), kit.records(), size=SIZE, draws=600, rng=generator(1), desk=desk)


def plain(benign, found):
    """The same p-values, counted one by one."""
    pool = [*benign.tolist(), found.tolist()]
    total = len(pool)
    each = [[sum(o[s] >= row[s] for o in pool) / total for s in range(len(found))] for row in pool]
    least = [min(row) for row in each]
    return each[-1], sum(one <= least[-1] for one in least) / total


@pytest.mark.parametrize("seed", range(5))
def test_p_values_are_those_counted_one_by_one(seed):
    benign = torch.randint(6, (30, 3), generator=generator(seed)).double()
    found = torch.randint(8, (3,), generator=generator(50 + seed)).double()
    each, p = p_values(benign, found)
    wanted, joint = plain(benign, found)
    assert each.tolist() == pytest.approx(wanted)
    assert p == pytest.approx(joint)


@pytest.mark.parametrize("draws", [19, 39, 99, 199, 999])
def test_a_p_value_that_is_the_rate_is_not_rounded_above_it(draws):
    above = round(0.05 * (draws + 1)) - 1
    benign = torch.arange(draws).double()[:, None]
    each, p = p_values(benign, benign[draws - above - 1] + 0.5)
    assert each.tolist() == [p] == [(above + 1) / (draws + 1)]
    assert each[0] <= 0.05


def test_p_values_of_exchangeable_scores_keep_every_rate_exactly():
    # All 5! orders of five scores, each equally likely: the share with p <= rate never exceeds the rate.
    import itertools

    found = []
    for order in itertools.permutations(range(5)):
        scores = torch.tensor([[float(one), float(-one % 3)] for one in order])
        found.append(p_values(scores[:-1], scores[-1])[1])
    for rate in (0.2, 0.4, 0.6, 0.8, 1.0):
        assert sum(p <= rate + 1e-12 for p in found) / len(found) <= rate + 1e-12
    assert min(found) < 1


def test_nan_is_no_score():
    with pytest.raises(Misuse, match="NaN"):
        p_values(torch.zeros(3, 1), torch.tensor([math.nan]))


def test_false_alarms_on_fresh_benign_requests_stay_at_the_stated_rate(desk):
    # Draws and requests are fresh together, as the promise is made over both: 5 calibrations of 80 requests each.
    trained, records, alarms, total = kit.trained(), kit.records(), 0, 0
    benign = Benign(desk.scene, size=SIZE)
    singles = Counter()
    for number in range(5):
        one = calibrate(default_screens(), trained, records, size=SIZE, rng=generator(100 + number), desk=desk)
        for request in range(80):
            each, p = one.p(trained, records, benign(child(generator(5000), number, request)))
            alarms, total = alarms + (p <= 0.05), total + 1
            singles.update(name for name, value in each.items() if value <= 0.05)
    low = stats.beta.ppf(0.025, alarms, total - alarms + 1)
    high = stats.beta.ppf(0.975, alarms + 1, total - alarms)
    assert low <= 0.05 <= high + 0.02
    assert all(many / total < 0.09 for many in singles.values())


def test_taking_the_smallest_p_value_uncorrected_would_not_keep_it(desk, screening):
    benign = Benign(desk.scene, size=SIZE)
    wrong = right = 0
    for request in range(200):
        each, p = screening.p(kit.trained(), kit.records(), benign(child(generator(9), request)))
        wrong, right = wrong + (min(each.values()) <= 0.05), right + (p <= 0.05)
    assert wrong > 2 * right
    assert wrong / 200 > 0.08


def test_requests_picked_by_influence_are_found(screening):
    trained, records = kit.trained(), kit.records()
    hits = Counter()
    for asked in kit.picked(size=SIZE):
        each, p = screening.p(trained, records, asked)
        hits.update(name for name, value in each.items() if value <= 0.05)
        hits["all"] += p <= 0.05
    many = len(kit.picked(size=SIZE))
    assert hits["all"] >= 0.9 * many
    assert hits["GradientInfluence"] >= 0.75 * many
    assert hits["Membership"] == 0


def test_screens_that_see_nothing_or_all_find_nothing_once_calibrated():
    trained, records = kit.trained("softmax"), kit.records()
    for liar in (liars.FlagsNothing(), liars.FlagsAll()):
        one = calibrate([liar], trained, records, size=5, draws=20, rng=generator(0))
        assert one.p(trained, records, Asked.of(records, range(5))) == ({type(liar).__name__: 1.0}, 1.0)
    told = frozenset(records.ids[:5])
    one = calibrate([liars.ReadsLabels(malicious=frozenset([told]))], trained, records, size=5, rng=generator(0))
    assert one.p(trained, records, Asked.of(records, range(5)))[1] == pytest.approx(1 / 201)
    asked = one(trained, records, Request.remove(records.ids[:5]), rng=generator(0))
    assert asked.action == "exact"
    assert one(trained, records, Request.remove(records.ids[1:6]), rng=generator(0)).action == "carry out"
    who = calibrate([liars.ReadsWhoAsked()], trained, records, size=5, rng=generator(0))
    assert who(trained, records, Request.remove(records.ids[:5], asked_by="attacker"), rng=generator(0)).flagged


def test_benign_requests_are_drawn_as_they_are_said_to_be():
    scene, records = kit.scene("softmax"), kit.records()
    rows = Benign(scene, size=30)
    one, same, other = (rows(generator(seed)) for seed in (0, 0, 1))
    assert one.ids == same.ids != other.ids
    assert len(set(one.ids)) == 30
    owner = Benign(scene, size=5, by="owners")(generator(0))
    assert len({records.owners[place] for place in owner.places.tolist()}) == 1
    several = Benign(scene, size=100, by="owners")(generator(0))
    owners = Counter(records.owners[place] for place in several.places.tolist())
    assert 3 < len(owners) < 20
    mix = Benign(scene, size=7, by="classes", like=Counter({3: 5, 8: 2}))(generator(0))
    assert Counter(records.y[mix.places].tolist()) == {3: 5, 8: 2}
    new = Benign(scene, size=6, kind="replace")(generator(0))
    assert new.new.y.tolist() == records.y[new.places].tolist()
    assert all(not torch.equal(a, b) for a, b in zip(new.new.x, records.x[new.places], strict=True))
    brighter = Benign(
        scene, size=6, kind="replace", alter=lambda old, rng: Records(old.x + 1, old.y, old.ids, classes=10)
    )(generator(0))
    assert torch.equal(brighter.new.x, records.x[brighter.places] + 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 481},
        {"size": 5, "kind": "add"},
        {"size": 5, "by": "mood"},
        {"size": 5, "by": "classes"},
        {"size": 5, "by": "classes", "like": Counter({1: 4})},
    ],
)
def test_benign_requests_that_cannot_be_are_refused(wrong):
    with pytest.raises(Misuse):
        Benign(kit.scene("softmax"), **wrong)


def test_a_class_with_too_few_rows_is_refused():
    with pytest.raises(Misuse, match="class 1 has"):
        Benign(kit.scene("softmax"), size=400, by="classes", like=Counter({1: 400}))(generator(0))


def test_too_few_draws_for_the_rate_are_refused():
    assert [least_draws(rate) for rate in (0.05, 0.01, 0.5)] == [19, 99, 1]
    with pytest.raises(Misuse, match="19 draws"):
        calibrate([GradientNorm()], kit.trained(), kit.records(), size=5, draws=18, rng=generator(0))
    with pytest.raises(Misuse, match="between 0 and 1"):
        calibrate([GradientNorm()], kit.trained(), kit.records(), size=5, rate=0.0, rng=generator(0))
    with pytest.raises(Misuse, match="at least one screen"):
        calibrate([], kit.trained(), kit.records(), size=5, rng=generator(0))


def test_a_calibration_goes_through_json_and_judges_alike(screening):
    trained, records = kit.trained(), kit.records()
    again = Screening.from_json(json.loads(json.dumps(screening.to_json())), default_screens())
    asked = kit.picked(size=SIZE)[0]
    assert again.p(trained, records, asked) == screening.p(trained, records, asked)
    assert (again.seed, again.looked, again.rate, again.size) == (1, 11, 0.05, SIZE)
    assert not any(name in json.dumps(screening.to_json()) for name in records.ids[:50])
    with pytest.raises(Misuse, match="other screens"):
        Screening.from_json(screening.to_json(), [GradientNorm()])
    changed = (Membership(near=0.2), *default_screens()[1:])
    with pytest.raises(Misuse, match="other screens"):
        Screening.from_json(screening.to_json(), changed)
    with pytest.raises(Misuse, match="no calibration"):
        Screening.from_json({}, default_screens())
    with pytest.raises(Misuse, match="as to_json writes it"):
        Screening.from_json({**screening.to_json(), "scores": "x"}, default_screens())


def test_probes_are_part_of_what_a_calibration_is_of():
    def screens(first):
        return [GradientInfluence(probes=kit.unseen().select(range(first, first + 5)))]

    one = calibrate(screens(0), kit.trained(), kit.records(), size=5, draws=20, rng=generator(0))
    assert len(Screening.from_json(one.to_json(), screens(0)).scores) == 20
    with pytest.raises(Misuse, match="other screens"):
        Screening.from_json(one.to_json(), screens(1))


def test_another_model_size_or_kind_asks_for_another_calibration(screening):
    trained, records = kit.trained(), kit.records()
    with pytest.raises(Misuse, match="another model"):
        screening(kit.trained("softmax"), records, Request.remove(records.ids[:SIZE]), rng=generator(0))
    with pytest.raises(Misuse, match="remove 20 rows"):
        screening(trained, records, Request.remove(records.ids[:3]), rng=generator(0))
    request = Request.replace_rows(records.ids[:SIZE], 1 - records.x[:SIZE], records.y[:SIZE])
    with pytest.raises(Misuse, match="this one is to replace"):
        screening(trained, records, request, rng=generator(0))
    small = calibrate([GradientNorm()], trained, records, size=5, draws=30, rng=generator(0))
    other = small.again(trained, records, size=3, rng=generator(1))
    assert (other.size, other.seed, len(other.scores)) == (3, 1, 30)
    assert other(trained, records, Request.remove(records.ids[:3]), rng=generator(0)).p is not None
    mixed = calibrate([GradientNorm()], trained, records, size=5, by="classes", like=Counter({0: 5}), rng=generator(0))
    with pytest.raises(Misuse, match="mix of classes"):
        mixed(trained, records, Request.remove(records.ids[:5]), rng=generator(0))


def test_calibrated_anew_benign_replacements_are_still_made_as_they_were():
    trained, records = kit.trained("softmax"), kit.records()
    made = []

    def brighter(rows, rng):
        made.append(len(rows))
        return Records(rows.x * 0.9, rows.y, rows.ids, classes=10)

    about = {"size": 4, "kind": "replace", "draws": 20}
    one = calibrate([GradientNorm()], trained, records, **about, alter=brighter, rng=generator(0))
    first = len(made)
    assert first == 20
    again = one.again(trained, records, rng=generator(0))
    assert len(made) == 2 * first
    assert torch.equal(again.scores, one.scores)
    plain = calibrate([GradientNorm()], trained, records, **about, rng=generator(0))
    assert not torch.equal(plain.scores, one.scores)
    read = Screening.from_json(json.loads(json.dumps(one.to_json())), [GradientNorm()])
    with pytest.raises(Misuse, match="alter that JSON does not hold; give it"):
        read.again(trained, records, rng=generator(0))
    assert torch.equal(read.again(trained, records, alter=brighter, rng=generator(0)).scores, one.scores)
    older = {name: value for name, value in plain.to_json().items() if name != "altered"}
    assert torch.equal(
        Screening.from_json(older, [GradientNorm()]).again(trained, records, rng=generator(0)).scores, plain.scores
    )


def test_a_decision_tells_what_was_found_in_words_that_name_no_record(screening):
    trained, records = kit.trained(), kit.records()
    asked = Request.remove(kit.picked(size=SIZE)[0].ids, asked_by="somebody")
    found = screening(trained, records, asked, rng=generator(0))
    assert re.fullmatch(
        r"flagged (by \w+: p [\d.e-]+; )+by all 5 together: p [\d.e-]+, at 5 % false alarms", found.told
    )
    assert "by GradientInfluence: p " in found.told
    assert not any(name in found.told for name in (*asked.ids, "somebody"))
    benign = screening(trained, records, Request.remove(records.ids[100 : 100 + SIZE]), rng=generator(0))
    assert re.fullmatch(r"not flagged: p [\d.]+, at 5 % false alarms", benign.told)
    one = defend(trained, records, asked, screens=[GradientInfluence()], draws=60, rng=generator(0))
    assert one.told == f"flagged by GradientInfluence: p {one.p:.3g}, at 5 % false alarms"
    nothing = defend(trained, records, Request.remove([]), screens=[GradientNorm()], rng=generator(0))
    assert nothing.told == "nothing was asked that is still there"
    strangers = Request.remove_rows("nobody", 1 - records.x[:2], records.y[:2])
    refused = defend(trained, records, strangers, screens=[GradientNorm()], rng=generator(0))
    assert refused.told == "the model was trained on none of the rows"


def test_a_model_that_was_changed_in_place_is_another_model():
    records = kit.records()
    trained = replace(kit.trained("softmax"), module=copy.deepcopy(kit.trained("softmax").module))
    small = calibrate([GradientNorm()], trained, records, size=5, draws=20, rng=generator(0))
    with torch.no_grad():
        next(trained.module.parameters()).mul_(2)
    with pytest.raises(Misuse, match="another model"):
        small(trained, records, Request.remove(records.ids[:5]), rng=generator(0))


def test_a_flagged_erasure_is_never_dropped_but_goes_to_exact_retraining_and_waits(screening):
    trained, records = kit.trained(), kit.records()
    request = Request.remove(kit.picked(size=SIZE)[0].ids, key="k", asked_by="somebody")
    decision = screening(trained, records, request, rng=generator(0))
    assert (decision.action, decision.hold, decision.flagged) == ("exact", True, True)
    assert decision.request is request
    assert "never dropped" in decision.reasons[0]
    assert any("GradientInfluence" in line and "probe" in line for line in decision.reasons)
    assert set(decision.judgements) == set(decision.p_values)
    assert all(len(judged) == SIZE for judged in decision.judgements.values())
    plain = decision.to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["ids"] == list(request.ids)
    assert "held" in str(decision)


def test_a_benign_erasure_is_carried_out_as_it_is(screening):
    records = kit.records()
    request = Request.remove(records.ids[100 : 100 + SIZE])
    decision = screening(kit.trained(), records, request, rng=generator(0))
    assert (decision.action, decision.hold, decision.request, decision.reasons) == ("carry out", False, request, ())


def test_a_flagged_replacement_is_purged_and_a_harmless_one_is_not(desk):
    trained, records = kit.trained(), kit.records()
    hard = Request.replace_rows(records.ids[:8], 1 - records.x[:8], (records.y[:8] + 1) % 10, asked_by="me", key="k")
    screens = [GradientNorm(), Isolation(), GradientInfluence(probes=10), Coalition()]
    decision = defend(trained, records, hard, screens=screens, draws=60, rng=generator(0))
    assert (decision.action, decision.hold) == ("purge", True)
    assert (decision.request.kind, set(decision.request.ids)) == ("remove", set(records.ids[:8]))
    assert (decision.request.asked_by, decision.request.key) == ("me", "")
    soft = Request.replace_rows(records.ids[:8], (records.x[:8] + 0.01).clamp(0, 1), records.y[:8])
    decision = defend(trained, records, soft, screens=screens, draws=60, rng=generator(0))
    assert (decision.action, decision.request) == ("carry out", soft)


def test_rows_nobody_trained_on_are_refused_and_say_so():
    trained, records = kit.trained("softmax"), kit.records()
    strangers = Request.remove_rows("nobody", 1 - records.x[:2], records.y[:2])
    decision = defend(trained, records, strangers, screens=[Membership(), GradientNorm()], rng=generator(0))
    assert (decision.action, decision.hold, decision.p) == ("refuse", False, None)
    assert "nothing was ever trained on" in decision.reasons[0]
    assert decision.request.ids == ()
    assert all(one.flagged for one in decision.judgements["Membership"])
    with pytest.raises(NeverTrained):
        Request.remove([records.ids[0]]).split(records, ids=frozenset(records.ids[1:]))


def test_the_trained_rows_of_a_mixed_request_are_carried_out():
    trained, records = kit.trained("softmax"), kit.records()
    x = torch.cat([records.x[:1], 1 - records.x[1:2]])
    mixed = Request.remove_rows(records.owners[0], x, records.y[:2], asked_by="me")
    decision = defend(trained, records, mixed, screens=[Membership(), GradientNorm()], rng=generator(0))
    assert decision.action == "carry out"
    assert (decision.request.kind, decision.request.ids) == ("remove", records.ids[:1])
    assert decision.request.asked_by == "me"
    assert "never trained" in decision.reasons[0]
    decision.request.split(records)


def test_a_replacement_of_some_rows_that_were_never_trained_on_is_judged_row_by_row():
    trained, records = kit.trained("softmax"), kit.records()
    part = replace(trained, ids=frozenset(records.ids[:400]))
    request = Request.replace_rows(
        [records.ids[450], *records.ids[:3]], 1 - records.x[[450, 0, 1, 2]], records.y[[450, 0, 1, 2]]
    )
    decision = defend(part, records, request, draws=20, rng=generator(0))
    assert decision.request.ids == records.ids[:3]
    assert any("never trained" in line for line in decision.reasons)
    plain = defend(part, records, understand(part, records, request).trained.request(), draws=20, rng=generator(0))
    lone = understand(part, records, Request.remove([records.ids[450]]))
    desk = Desk(default_screens(), part, records, seed=generator(0).initial_seed())
    for name, judged in decision.judgements.items():
        assert [one.record for one in judged] == [*records.ids[:3], records.ids[450]]
        assert [one.score for one in judged[:3]] == [one.score for one in plain.judgements[name]]
        assert judged[3].score == desk.judgements(lone)[name][0].score


def test_an_empty_request_is_the_identity_and_an_unknown_one_an_error():
    trained, records = kit.trained("softmax"), kit.records()
    empty = Request.remove([])
    decision = defend(trained, records, empty, rng=generator(0))
    assert (decision.action, decision.request, decision.judgements, decision.p) == ("carry out", empty, {}, None)
    with pytest.raises(UnknownRecord):
        defend(trained, records, Request.remove(["nobody"]), rng=generator(0))


def test_who_asks_for_everything_is_compared_with_the_same():
    trained, records = kit.trained("softmax"), kit.records()
    decision = defend(
        trained, records, Request.remove(records.ids), screens=[GradientNorm()], draws=20, rng=generator(0)
    )
    assert (decision.p, decision.action) == (1.0, "carry out")


def test_against_requests_of_its_own_classes_one_class_is_nothing_unusual():
    trained, records = kit.trained(), kit.records()
    request = Request.remove([i for i, y in zip(records.ids, records.y.tolist(), strict=True) if y == 3][:SIZE])
    screens = [Coalition()]
    rows = defend(trained, records, request, screens=screens, rng=generator(0))
    classes = defend(trained, records, request, screens=screens, by="classes", rng=generator(0))
    assert rows.flagged
    assert not classes.flagged


def test_the_same_seed_decides_alike_and_the_model_is_left_alone():
    trained, records = kit.trained(), kit.records()
    before, request = trained.digest(), Request.remove(records.ids[:4])
    one, two = (defend(trained, records, request, draws=30, rng=generator(3)) for _ in range(2))
    assert one.to_json() == two.to_json()
    assert trained.digest() == before
    permuted = defend(trained, records, Request.remove(records.ids[3::-1]), draws=30, rng=generator(3))
    assert permuted.p_values == one.p_values
