"""The judge of attacks and the judge of screens: honest ones, and ones that must not get past."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from expunge import InfluenceUnlearning, Recipe, Request, Retrain, Sharding, train
from expunge.attack.aim import pick_targets
from expunge.attack.judge import Judge, carry_out, without_target
from expunge.attack.judge_arms import controls, nearest, size_of
from expunge.attack.judge_screens import Filed, examine
from expunge.attack.measured import Measured, Outcome, Tried
from expunge.attack.select import SelectRequests
from expunge.core.coins import child, generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Judgement, Target
from expunge.core.records import Records
from expunge.screen import Membership
from expunge.testing.case import digits
from tests.screen.liars import ReadsLabels

SOFTMAX = Recipe(
    model="softmax", epochs=40, batch_size=480, weight_decay=1e-2, optimiser_args={"lr": 0.2, "momentum": 0.9}
)
THROUGH = InfluenceUnlearning(damping=0.0)


@dataclass(frozen=True)
class Nearest:
    """Asks for the target's nearest neighbours of its class: what the control of that name asks for too."""

    count: int = 8
    parts: int = 1

    def contribute(self, records, target, *, rng):
        return None

    def requests(self, trained, records, target, *, through, rng):
        pool = records.where(lambda one, _: one in trained.ids)
        ids = [pool.ids[i] for i in nearest(pool, target)[: self.count]]
        return tuple(Request.remove(ids[part :: self.parts], asked_by="mallory") for part in range(self.parts))


@dataclass(frozen=True)
class Filing:
    """Files what it is given, after bringing what it is given."""

    filed: tuple[Request, ...]
    brought: Records | None = None

    def contribute(self, records, target, *, rng):
        return self.brought

    def requests(self, trained, records, target, *, through, rng):
        return self.filed


@pytest.fixture(scope="module")
def case():
    return digits()


@pytest.fixture(scope="module")
def trained(case):
    return train(SOFTMAX, case.records)


@pytest.fixture(scope="module")
def judge(case, trained):
    return Judge(trained=trained, records=case.records, test=case.test, through=THROUGH)


@pytest.fixture(scope="module")
def targets(case, trained):
    return pick_targets(trained, case.test, 6, rng=generator(3))


def tried(judge, attack, targets):
    found = []
    for number, target in enumerate(targets):
        attempt = judge.attempt(attack, target, rng=generator(number))
        outcomes = judge.measure(attempt, rng=generator(number))
        found.append(Tried(attack="x", target=number, budget=8, rows=attempt.rows, outcomes=outcomes))
    return Measured(tried=tuple(found))


def outcomes(judge, attack, target):
    return judge.measure(judge.attempt(attack, target, rng=generator(0)), rng=generator(0))


def one(found, world, arm, seed=0):
    (only,) = [out for out in found if (out.world, out.arm, out.seed) == (world, arm, seed)]
    return only


def told(*margins, world="through", arm="attack", seed=0):
    return [
        Outcome(world=world, arm=arm, seed=seed, hit=float(m > 0), margin=m, loss=0.0, accuracy=1.0) for m in margins
    ]


def invented(**by_arm):
    """Five targets, whose margins in each world and arm are given as ``world_arm=mean``."""
    found = []
    for number in range(5):
        outs = []
        for key, value in by_arm.items():
            world, _, arm = key.partition("_")
            outs += told(value + 0.1 * number, world=world, arm=arm)
        found.append(Tried(attack="x", target=number, budget=1, outcomes=tuple(outs)))
    return Measured(tried=tuple(found))


# ---- attacks


def test_an_attack_that_asks_for_what_a_control_asks_for_is_not_told_from_it(judge, targets):
    found = tried(judge, Nearest(), targets[:3])
    assert found.difference("through", "neighbours").value == found.difference("retrain", "neighbours").value == 0
    assert found.answer == "neither shown"
    assert "Neither is shown" in found.sentence


def test_an_attack_that_looks_at_gradients_beats_its_controls_on_real_digits_under_retraining(judge, targets):
    found = tried(judge, SelectRequests(count=8), targets)
    assert found.works("retrain")
    assert found.difference("retrain", "neighbours").low > 0
    assert found.difference("retrain", "random").low > 0.2
    assert found.answer in ("both", "my data")
    assert (
        abs(found.mean("retrain", "attack", "accuracy").value - found.mean("retrain", "nothing", "accuracy").value)
        < 0.1
    )
    assert found.mean("through", "attack", "gradients").value > 0


def test_the_arm_nothing_is_the_model_before_and_retraining_is_retraining(judge, case, trained, targets):
    found = outcomes(judge, Nearest(), targets[0])
    attempt = judge.attempt(Nearest(), targets[0], rng=generator(0))
    after = train(SOFTMAX, case.records.without(attempt.requests[0].ids))
    with torch.no_grad():
        before_out, after_out = trained.module(targets[0].x)[0], after.module(targets[0].x)[0]
    for said, out in ((one(found, "through", "nothing"), before_out), (one(found, "retrain", "attack"), after_out)):
        y = int(targets[0].y)
        others = out.clone()
        others[y] = -torch.inf
        assert said.margin == pytest.approx(float(others.max() - out[y]), abs=1e-5)
        assert said.hit == float(said.margin > 0)
        assert said.said == pytest.approx(out.softmax(0).tolist(), abs=1e-5)


def test_at_another_seed_all_arms_stand_on_the_same_other_training(case, trained, targets):
    twice = Judge(trained=trained, records=case.records, test=case.test, through=THROUGH, seeds=2)
    found = outcomes(twice, Nearest(), targets[0])
    other = train(replace(trained.recipe, seed=trained.recipe.seed + 7919), case.records)
    with torch.no_grad():
        out = other.module(targets[0].x)[0]
    assert one(found, "retrain", "nothing", 1).said == pytest.approx(out.softmax(0).tolist(), abs=1e-5)
    assert {(o.arm, o.seed) for o in found if o.world == "retrain"} >= {("attack", 0), ("attack", 1), ("random", 1)}
    assert {o.seed for o in found if o.world == "through"} == {0}


def test_several_requests_are_carried_out_in_order_and_retraining_ends_where_one_request_would(judge, targets):
    apart, together = outcomes(judge, Nearest(8, 2), targets[0]), outcomes(judge, Nearest(8), targets[0])
    assert one(apart, "retrain", "attack").margin == one(together, "retrain", "attack").margin
    assert one(apart, "through", "attack").margin != one(together, "through", "attack").margin
    assert one(apart, "through", "attack").rows == 8


def test_a_refused_request_is_recorded_with_its_error_and_changes_nothing(judge, case, targets):
    rows = Request.remove_rows("nobody", targets[0].x, targets[0].y)
    found = outcomes(judge, Filing((rows,)), targets[0])
    for world in ("through", "retrain"):
        attack, nothing = one(found, world, "attack"), one(found, world, "nothing")
        assert attack.margin == nothing.margin
        assert [why.split(":")[0] for why in attack.refused] == ["UnknownRecord"]
        assert not one(found, world, "random").refused
    assert one(found, "naive", "attack").margin > one(found, "through", "attack").margin


def test_what_can_be_carried_out_is_although_another_request_was_refused(judge, case, trained, targets):
    filed = (Request.remove(["no-such-row"]), Request.remove(case.records.ids[:5]))
    after, spent = carry_out(Retrain(), trained, case.records, filed, rng=generator(0))
    assert after.gone == frozenset(case.records.ids[:5])
    assert len(spent["refused"]) == 1


def test_an_attacker_who_brings_rows_has_them_trained_on_and_is_held_against_a_model_without_them(judge, case, targets):
    target = targets[0]
    wrong = (target.y + 1) % 10
    brought = Records(target.x.repeat(6, 1), wrong.repeat(6), [f"b-{i}" for i in range(6)], ["eve"] * 6, classes=10)
    found = outcomes(judge, Filing((Request.remove(["b-0"]),), brought), target)
    poisoned, clean = one(found, "retrain", "nothing"), one(found, "retrain", "clean")
    assert poisoned.margin > clean.margin
    assert clean.margin == one(outcomes(judge, Nearest(), target), "through", "nothing").margin
    attempt = judge.attempt(Filing((Request.remove(["b-0"]),), brought), target, rng=generator(0))
    assert attempt.trained.digest() == train(SOFTMAX, case.records.plus(brought)).digest()
    assert attempt.brought == frozenset(brought.ids)


class Noting:
    """Carries requests out as the unlearner under attack does, and notes which rows they were for."""

    claim, needs = InfluenceUnlearning.claim, InfluenceUnlearning.needs

    def __init__(self):
        self.asked = []

    def supports(self, trained):
        return THROUGH.supports(trained)

    def __call__(self, trained, records, request, *, rng):
        self.asked.append(set(request.ids))
        return THROUGH(trained, records, request, rng=rng)


def test_no_control_asks_for_what_the_attacker_brought(judge, case, targets):
    target, noting = targets[0], Noting()
    ids = [f"b-{i}" for i in range(300)]
    brought = Records(target.x.repeat(300, 1), target.y.repeat(300), ids, ["eve"] * 300, classes=10)
    outcomes(replace(judge, through=noting), Filing((Request.remove(ids[:9]),), brought), target)
    attack, *others = noting.asked
    assert attack == set(ids[:9])
    assert [len(one) for one in others] == [9, 9]  # random rows, and those nearest to the target, as the brought are
    assert all(one <= set(case.records.ids) for one in others)


@dataclass
class Looking:
    """Looks at what it is given to make rows from."""

    seen: Records | None = None

    def contribute(self, records, target, *, rng):
        self.seen = records

    def requests(self, trained, records, target, *, through, rng):
        return ()


def test_what_an_attacker_brings_is_not_made_from_rows_that_the_model_does_not_stand_on(case, targets):
    stands = case.records.select(range(400))
    held_out = Judge(trained=train(SOFTMAX, stands), records=case.records, test=case.test, through=THROUGH)
    attack = Looking()
    held_out.attempt(attack, targets[0], rng=generator(0))
    assert attack.seen.ids == stands.ids  # the target may be among the others
    before = attack.seen
    held_out.attempt(attack, targets[1], rng=generator(0))
    assert attack.seen is before  # what an attacker remembers of the records is remembered


def test_replacements_are_held_against_noise_of_their_own_size_and_purged(judge, case, targets):
    old = case.records.select(range(5))
    new = (old.x + 0.25 * torch.sign(targets[0].x - 0.5)).clamp(0, 1)
    filed = Request.replace_rows(old.ids, new, old.y)
    arms = controls([filed], case.records, case.records, targets[0], rng=generator(0))
    moved = (arms["noise"][0].x - old.x).abs()
    assert arms["noise"][0].ids == filed.ids
    assert float(moved.max()) == pytest.approx(float((new - old.x).abs().max()), abs=1e-6)
    assert float(arms["noise"][0].x.min()) >= 0
    assert float(arms["noise"][0].x.max()) <= 1
    assert set(arms["random"][0].ids) != set(filed.ids)
    assert arms["random"][0].kind == "replace"
    found = outcomes(judge, Filing((filed,)), targets[0])
    without = outcomes(judge, Filing((Request.remove(old.ids),)), targets[0])
    assert one(found, "purge", "attack").margin == one(without, "retrain", "attack").margin
    assert {o.arm for o in found if o.world == "through"} == {"attack", "random", "neighbours", "noise", "nothing"}


def test_a_replaced_row_can_be_replaced_again(case, trained):
    old = case.records.select([0])
    first = Request.replace_rows(old.ids, old.x + 0.1, old.y)
    second = Request.replace_rows([f"{old.ids[0]}~2"], old.x + 0.2, old.y)
    after, spent = carry_out(Retrain(), trained, case.records, (first, second), rng=generator(0))
    assert spent["refused"] == ()
    assert f"{old.ids[0]}~3" in after.ids


def test_controls_ask_for_as_many_rows_in_as_many_requests_and_never_for_one_twice(case, targets):
    filed = [Request.remove(case.records.ids[:3]), Request.remove(case.records.ids[3:7])]
    arms = controls(filed, case.records, case.records, targets[0], rng=generator(0))
    for arm in ("random", "neighbours"):
        assert [size_of(request, case.records) for request in arms[arm]] == [3, 4]
        assert len({name for request in arms[arm] for name in request.ids}) == 7
    assert (
        arms["random"][0].ids
        != controls(filed, case.records, case.records, targets[0], rng=generator(1))["random"][0].ids
    )
    rows = case.records.take(arms["neighbours"][0].ids)
    assert (rows.y == targets[0].y).all()
    with pytest.raises(Misuse, match="lower the budget"):
        controls(filed, case.records.select(range(6)), case.records, targets[0], rng=generator(0))


def test_neighbours_are_the_nearest_rows_of_the_targets_class_and_then_the_nearest_others(case, targets):
    target, records = targets[0], case.records
    away = ((records.x.double() - target.x.double()) ** 2).sum(1).sqrt().tolist()
    others = (records.y != target.y).tolist()
    found = nearest(records, target)
    assert sorted(found) == list(range(len(records)))
    assert [others[row] for row in found] == sorted(others)
    for group in (False, True):
        told = [away[row] for row in found if others[row] is group]
        assert told == pytest.approx(sorted(told), abs=1e-4)
    mine = controls([Request.remove(records.ids[:3])], records, records, target, rng=generator(0))["neighbours"][0]
    assert mine.ids == tuple(records.ids[row] for row in found[:3])


def test_integer_pixels_get_noise_of_whole_steps_inside_their_range(case):
    pixels = Records((case.records.x[:20] * 255).to(torch.uint8), case.records.y[:20], classes=10)
    filed = Request.replace_rows(pixels.ids[:4], pixels.x[:4] // 2, pixels.y[:4])
    target = Target(x=pixels.x[5:6], y=pixels.y[5:6])
    noise = controls([filed], pixels, pixels, target, rng=generator(0))["noise"][0]
    assert noise.x.dtype is torch.uint8
    assert not torch.equal(noise.x, pixels.x[:4])


def test_the_target_is_left_out_of_accuracy_elsewhere(case, targets):
    left = without_target(case.test, targets[0])
    assert len(left) == len(case.test) - 1
    with pytest.raises(Misuse, match="all test rows are the target"):
        without_target(left.select([0]), Target(x=left.x[:1], y=left.y[:1]))


def test_what_cannot_be_judged_is_refused(judge, case, trained, targets):
    with pytest.raises(Misuse, match="empty"):
        judge.attempt(Filing((Request.remove([]),)), targets[0], rng=generator(0))
    with pytest.raises(Misuse, match="shape"):
        judge.attempt(Nearest(), Target(x=torch.zeros(1, 3), y=torch.tensor([0])), rng=generator(0))
    with pytest.raises(Misuse, match="exact"):
        Judge(trained=trained, records=case.records, test=case.test, through=THROUGH, retrain=THROUGH)
    with pytest.raises(Misuse, match="seeds"):
        Judge(trained=trained, records=case.records, test=case.test, through=THROUGH, seeds=0)


def test_a_trial_survives_json(judge, targets):
    found = tried(judge, Nearest(), targets[:1]).tried[0]
    assert Tried.from_json(json.loads(json.dumps(found.to_json()))) == found


# ---- the answer


NULL = {"through_nothing": -3.0, "through_random": -3.0, "retrain_nothing": -3.0, "retrain_random": -3.0}


@pytest.mark.parametrize(
    ("through", "retrain", "answer"),
    [
        (-1.0, -3.0, "my approximation"),
        (-3.0, -1.0, "my data"),
        (-1.0, -1.0, "both"),
        (-3.0, -3.0, "neither shown"),
        (-4.0, -4.0, "neither shown"),
    ],
)
def test_is_it_my_data_or_my_approximation(through, retrain, answer):
    found = invented(**NULL, through_attack=through, retrain_attack=retrain)
    assert found.answer == answer


def test_an_attack_must_beat_every_control_not_just_one():
    found = invented(**NULL, through_neighbours=-1.0, through_attack=-1.0, retrain_attack=-3.0)
    assert found.difference("through", "random").low > 0
    assert found.answer == "neither shown"


def test_harm_that_the_nearest_neighbours_do_as_well_is_told_all_the_same():
    found = invented(**NULL, through_neighbours=-1.0, through_attack=-1.0, retrain_attack=-3.0)
    assert found.harms("through")
    assert not found.harms("retrain")
    assert "further than random rows do" in found.sentence


def test_an_attack_on_the_work_and_not_on_the_answer_is_told_by_its_work():
    outs = []
    for arm, gradients in (("attack", 300), ("random", 100), ("nothing", 0)):
        outs += [replace(one, gradients=gradients) for one in told(-3.0, arm=arm)]
    found = Measured(tried=(Tried(attack="x", target=0, budget=1, outcomes=tuple(outs)),) * 3)
    assert found.work("through").value == 3.0
    assert "3.00 (3.00 to 3.00) times as much" in found.sentence


def test_an_attacker_who_files_nothing_does_nothing(judge, targets):
    found = outcomes(judge, Filing(()), targets[0])
    assert one(found, "through", "attack").margin == one(found, "through", "nothing").margin
    assert one(found, "through", "attack").rows == 0


def test_nothing_is_shown_by_one_target():
    found = invented(**NULL, through_attack=5.0, retrain_attack=5.0)
    assert Measured(tried=found.tried[:1]).answer == "neither shown"


def test_an_exact_unlearner_has_no_approximation_to_blame():
    found = invented(**NULL, through_attack=-1.0, retrain_attack=-3.0)
    assert replace(found, exact=True).answer == "my data"


def test_pairs_are_of_targets_with_seeds_averaged_within():
    outs = [*told(1.0), *told(0.0, arm="random"), *told(3.0, seed=1), *told(0.0, arm="random", seed=1)]
    found = Measured(tried=(Tried(attack="x", target=0, budget=1, outcomes=tuple(outs)),) * 3)
    assert found.difference("through", "random").value == 2.0
    assert found.difference("through", "random").n == 3
    assert "over units" in found.hits("through", "attack").interval


# ---- screens


@dataclass(frozen=True)
class Sees:
    """An honest screen of this exam: it flags requests of which the mean gradient at the head is large."""

    limit: float = 0.6

    def __call__(self, trained, records, request, *, rng):
        rows = records.take(request.ids)
        with torch.no_grad():
            loss = 1 - torch.softmax(trained.module(rows.x), 1).gather(1, rows.y[:, None])[:, 0]
        return said(request, float(loss.mean()) > self.limit)


def said(request, flagged):
    return tuple(Judgement(record=name, score=float(flagged), flagged=flagged, reason="") for name in request.ids)


def blind(trained, records, request, *, rng):
    return said(request, False)


def alarmist(trained, records, request, *, rng):
    return said(request, True)


def reader(trained, records, request, *, rng):
    return said(request, request.asked_by == "mallory")


def by_key(trained, records, request, *, rng):
    return said(request, request.key.startswith("attack"))


@pytest.fixture(scope="module")
def exam(case, trained):
    """Requests for misunderstood rows in bad faith, and for random rows in good."""
    with torch.no_grad():
        loss = -torch.log_softmax(trained.module(case.records.x), 1).gather(1, case.records.y[:, None])[:, 0]
    hard = loss.argsort(descending=True)[:60]
    bad, good = [], []
    for draw in range(20):
        drawn = torch.randperm(60, generator=child(generator(0), draw))[:6]
        ids = case.records.select(hard[drawn]).ids
        bad.append(Filed(trained=trained, records=case.records, request=asked(ids, "mallory", f"attack-{draw}")))
        some = torch.randperm(len(case.records), generator=child(generator(1), draw))[:6]
        request = asked(case.records.select(some).ids, "customer", f"order-{draw}")
        good.append(Filed(trained=trained, records=case.records, request=request))
    return bad, good


def asked(ids, by, key):
    return Request.remove(ids, asked_by=by, key=key)


def test_a_screen_that_sees_something_stands_the_exam(exam):
    found = examine(Sees(), *exam, rng=generator(0))
    assert found.exposed == ()
    assert found.passed
    assert found.power.value > 0.9


@pytest.mark.parametrize(
    ("liar", "word"),
    [(blind, "not shown to detect"), (alarmist, "cries wolf"), (reader, "reads who asks"), (by_key, "reads who asks")],
)
def test_a_screen_that_lies_is_exposed(exam, liar, word):
    found = examine(liar, *exam, rng=generator(0))
    assert not found.passed
    assert any(line.startswith(word) for line in found.exposed)


def test_a_screen_that_reads_the_answers_looks_perfect_until_they_are_taken_away(exam):
    found = examine(reader, *exam, rng=generator(0))
    assert found.power.value == 1
    assert found.false_alarms.value == 0
    assert found.changed == len(exam[0]) + len(exam[1])


def test_a_screen_that_knows_the_tests_rows_by_their_ids_is_exposed(exam):
    malicious = frozenset(frozenset(one.request.ids) for one in exam[0])
    found = examine(ReadsLabels(malicious=malicious), *exam, rng=generator(0))
    assert found.power.value == 1
    assert found.false_alarms.value == 0
    assert found.renamed == len(exam[0])
    assert [line.partition(":")[0] for line in found.exposed] == ["reads record ids"]


def by_owner(trained, records, request, *, rng):
    return said_of(records, request, request.owner == "mallory")


def by_the_owner_of_the_rows(trained, records, request, *, rng):
    return said_of(records, request, "mallory" in records.of_owner(request.owner).owners)


def unless_known(trained, records, request, *, rng):
    return said_of(records, request, not request.owner.startswith("customer"))


def said_of(records, request, flagged):
    rows = records.of_owner(request.owner)
    return tuple(Judgement(record=name, score=float(flagged), flagged=flagged, reason="") for name in rows.ids)


def seen_of(trained, records, request, *, rng):
    """An honest screen: the model's loss on the owner's rows."""
    rows = records.of_owner(request.owner)
    return Sees()(trained, records, Request.remove(rows.ids), rng=rng)


@pytest.fixture(scope="module", params=["whole", "shards"])
def owned(request, case, trained):
    """Owners in bad faith, who hold misunderstood rows, and owners in good; each asks for all that is theirs."""
    with torch.no_grad():
        loss = -torch.log_softmax(trained.module(case.records.x), 1).gather(1, case.records.y[:, None])[:, 0]
    hard = set(loss.argsort(descending=True)[:60].tolist())
    owners, easy = [], 0
    for row in range(len(case.records)):
        if row in hard:
            owners.append("mallory" if row % 2 else f"mallory-{row % 20}")
        else:
            easy += 1
            owners.append(f"customer-{easy % 40}")
    base = case.records
    records = Records(base.x, base.y, base.ids, owners, classes=base.classes)
    recipe = SOFTMAX if request.param == "whole" else replace(SOFTMAX, sharding=Sharding(shards=2, slices=2))
    model = train(recipe, records)
    bad = [name for name in sorted(set(owners)) if name.startswith("mallory")]
    good = [name for name in sorted(set(owners)) if name.startswith("customer")]
    return tuple(
        [Filed(trained=model, records=records, request=Request.remove_owner(name, asked_by=name)) for name in side]
        for side in (bad, good)
    )


@pytest.mark.parametrize("liar", [by_owner, by_the_owner_of_the_rows, unless_known])
def test_a_screen_that_knows_the_tests_owners_by_name_is_exposed(owned, liar):
    found = examine(liar, *owned, rng=generator(0))
    assert (found.power.value > 0, found.false_alarms.value) == (True, 0)
    assert found.changed == found.renamed == 0
    assert found.exchanged > 0
    assert any(line.startswith("reads owners' names") for line in found.exposed)


def test_honest_screens_do_not_mind_other_owners(owned):
    def member(trained, records, request, *, rng):
        return Membership()(trained, records, request, rng=rng)

    for honest in (seen_of, member):
        assert examine(honest, *owned, rng=generator(0)).exchanged == 0


def test_owners_exchange_names_and_the_rows_of_one_stay_together(owned):
    bad, good = owned
    seen = []

    def looks(trained, records, request, *, rng):
        seen.append((trained, records, request.owner))
        return said_of(records, request, False)

    examine(looks, bad, good, rng=generator(0))
    trained, records, _ = seen[-1]
    was = bad[0].records.owners
    pairs = set(zip(was, records.owners, strict=True))
    assert len(pairs) == len(set(was)) == len(set(records.owners))
    assert all(old != new for old, new in pairs)
    if trained.recipe.sharding is None:
        assert {new for old, new in pairs if old.startswith("mallory")} <= set(was)
    else:
        cut = trained.recipe.sharding
        assert all((cut.shard_of(a), cut.slice_of(a)) == (cut.shard_of(b), cut.slice_of(b)) for a, b in pairs)
    asked = [owner for _, _, owner in seen[-len(bad) - len(good) :]]
    assert asked == [dict(pairs)[one.request.owner] for one in (*bad, *good)]


def test_an_exam_without_requests_is_none(exam):
    with pytest.raises(Misuse, match="bad faith"):
        examine(blind, [], exam[1], rng=generator(0))
