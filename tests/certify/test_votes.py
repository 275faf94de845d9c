"""No deletion within the radius flips a vote: all small cases, random large ones, all deletions of a real model."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expunge
from expunge.certify.votes import (
    DeletionRobustness,
    deletion_robustness,
    radius,
    robustness_by_shards,
    touched_shards,
    winners,
)
from expunge.core.claim import Claim
from expunge.core.errors import BadRecipe, Impossible, Misuse, Unsupported
from expunge.core.records import Records
from expunge.learn.ensemble import ShardEnsemble
from expunge.learn.predict import outputs
from expunge.testing.case import digits

SMALL = [(shards, classes) for classes in (2, 3, 4) for shards in range(1, 8)]


def tally(ballots, classes):
    """Counts from ballots (n, shards); whoever says `classes` abstains."""
    return np.stack([(ballots == c).sum(1) for c in range(classes)], 1)


def chosen(counts):
    """The lowest class of those with most votes, one row after the other."""
    return np.array([max(range(len(row)), key=lambda c: (row[c], -c)) for row in counts.tolist()], dtype=int)


def all_ballots(shards, classes):
    """Every way in which the shards vote or abstain, but that in which nobody votes."""
    every = np.array(list(itertools.product(range(classes + 1), repeat=shards)))
    return every[(every < classes).any(1)]


def replies(ballots, size, classes):
    """The ballots after each choice of so many touched shards and each of their replies, abstaining among them."""
    for touched in itertools.combinations(range(ballots.shape[1]), size):
        for reply in itertools.product(range(classes + 1), repeat=size):
            after = ballots.copy()
            after[:, touched] = reply
            yield after


def flips(before, ballots, classes):
    """Rows whose prediction is another one now; where nobody votes any more there is none."""
    counts = tally(ballots, classes)
    return (counts.argmax(1) != before) | (counts.sum(1) == 0)


def broken(claimed, shards, classes):
    """True if some touched shards, at most as many as claimed, flip a prediction."""
    ballots = all_ballots(shards, classes)
    counts = tally(ballots, classes)
    allowed, before = claimed(torch.from_numpy(counts)).numpy(), chosen(counts)
    for size in range(1, int(allowed.max()) + 1):
        inside = allowed >= size
        if any(flips(before[inside], after, classes).any() for after in replies(ballots[inside], size, classes)):
            return True
    return False


@pytest.mark.parametrize(("shards", "classes"), SMALL)
def test_no_reply_of_so_many_touched_shards_flips_any_vote(shards, classes):
    assert not broken(radius, shards, classes)


@pytest.mark.parametrize(("shards", "classes"), SMALL)
def test_one_more_touched_shard_flips_every_vote(shards, classes):
    ballots = all_ballots(shards, classes)
    counts = tally(ballots, classes)
    one_more, before = radius(torch.from_numpy(counts)).numpy() + 1, chosen(counts)
    for size in np.unique(one_more):
        left = one_more == size
        standing, was = ballots[left], before[left]
        for touched in itertools.combinations(range(shards), int(size)):
            for reply in itertools.product(range(classes + 1), repeat=int(size)):
                after = standing.copy()
                after[:, touched] = reply
                keep = ~((tally(after, classes).argmax(1) != was) & (after < classes).any(1))
                standing, was = standing[keep], was[keep]
        assert not len(standing), (size, standing[0])


def gap(votes, towards):
    """The radius with another tie term."""
    won = winners(votes)[:, None]
    order = torch.arange(votes.shape[1])
    rivals = (votes + towards(order, won)).scatter(1, won, -1)
    return votes.gather(1, won)[:, 0] - rivals.amax(1)


MUTANTS = {
    "without the tie term": lambda votes: gap(votes, lambda c, w: 0 * (c + w)) // 2,
    "with ties to the highest class": lambda votes: gap(votes, lambda c, w: (c > w).long()).clamp_min(0) // 2,
    "rounded up": lambda votes: (gap(votes, lambda c, w: (c < w).long()) + 1) // 2,
    "as if touched shards only abstained": lambda votes: gap(votes, lambda c, w: (c < w).long()),
    "one more": lambda votes: radius(votes) + 1,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_enumeration_breaks_a_radius_that_is_wrong(name):
    assert broken(MUTANTS[name], 4, 3)


def test_the_tie_term_is_needed_with_three_votes():
    votes = torch.tensor([[1, 2, 1], [2, 1, 1], [0, 2, 0], [2, 0, 0], [3, 1, 0], [1, 3, 0], [0, 0, 1]])
    assert winners(votes).tolist() == [1, 0, 1, 0, 0, 1, 2]
    assert radius(votes).tolist() == [0, 0, 0, 1, 1, 0, 0]


some = settings(max_examples=200, deadline=None, derandomize=True, database=None)
BALLOTS = st.integers(2, 12).flatmap(
    lambda classes: st.tuples(st.just(classes), st.lists(st.integers(0, classes - 1), min_size=1, max_size=60))
)


@some
@given(BALLOTS, st.data())
def test_random_touched_shards_within_the_radius_flip_nothing_and_the_best_beyond_it_do(given_votes, data):
    classes, ballots = given_votes
    counts = tally(np.array([ballots]), classes)
    won, allowed = int(chosen(counts)[0]), int(radius(torch.from_numpy(counts))[0])
    touched = data.draw(st.lists(st.integers(0, len(ballots) - 1), max_size=allowed, unique=True))
    after = list(ballots)
    for shard in touched:
        after[shard] = data.draw(st.integers(0, classes))
    assert chosen(tally(np.array([after]), classes))[0] == won
    assert any(vote < classes for vote in after)
    supporters = [shard for shard, vote in enumerate(ballots) if vote == won][: allowed + 1]
    assert len(supporters) == allowed + 1
    attacked = []
    for rival in set(range(classes)) - {won}:
        moved = np.array([rival if shard in supporters else vote for shard, vote in enumerate(ballots)])
        attacked.append(int(chosen(tally(moved[None], classes))[0]))
    assert set(attacked) != {won}


@some
@given(st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=20), st.booleans())
def test_winners_are_what_the_model_says_ties_included(rows, double):
    ballots = torch.tensor(rows)
    answers = torch.nn.functional.one_hot(ballots.T, 6).to(torch.float64 if double else torch.float32)
    ensemble = ShardEnsemble([torch.nn.Identity()] * 7, 6, "cross_entropy", "vote")
    assert winners(ensemble.tally(answers)).equal(ensemble.combine(answers).argmax(1))


def test_shares_of_many_shards_stay_apart():
    for votes in ([500, 501, 0], [501, 501, 1], [333, 333, 334], [0, 1000, 1000]):
        ballots = torch.tensor([c for c, count in enumerate(votes) for _ in range(count)])
        ensemble = ShardEnsemble([torch.nn.Identity()] * len(ballots), 3, "cross_entropy", "vote")
        answers = torch.nn.functional.one_hot(ballots, 3).to(torch.float32)[:, None]
        assert winners(torch.tensor([votes])).equal(ensemble.combine(answers).argmax(1))


@pytest.mark.parametrize(
    ("votes", "error", "says"),
    [
        (torch.tensor([[0.5, 0.5]]), Misuse, "votes must be counts"),
        (torch.tensor([[True, False]]), Misuse, "votes must be counts"),
        (torch.tensor([1, 2]), Misuse, "votes must be counts"),
        (torch.tensor([[2], [1]]), Impossible, "two classes"),
        (torch.tensor([[2, -1]]), Misuse, "cannot be negative, got -1"),
        (torch.tensor([[2, 1], [0, 0]]), Misuse, "nobody votes on row 1"),
    ],
)
def test_what_is_no_vote_is_refused(votes, error, says):
    with pytest.raises(error, match=says):
        radius(votes)


def test_no_rows_have_no_radius_and_small_integers_do_not_overflow():
    assert radius(torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)
    assert radius(torch.tensor([[127, 0]], dtype=torch.int8)).tolist() == [63]
    assert radius(torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [127]


# A real model, and every deletion from it


SHARDS = 5


@pytest.fixture(scope="module")
def small():
    """240 digits of ten owners, four of whom mislabel, and 200 test rows."""
    case = digits(rows=240, owners=10)
    return case.records, case.test.select(range(200))


@pytest.fixture(scope="module")
def recipe():
    base = digits(rows=240, owners=10).recipes[0]
    return replace(base, epochs=30, sharding=expunge.Sharding(shards=SHARDS, salt="votes"))


@pytest.fixture(scope="module")
def trained(small, recipe):
    return expunge.train(recipe, small[0])


@pytest.fixture(scope="module")
def found(small, trained):
    return deletion_robustness(trained, small[1])


def forget(trained, records, owners, method=None):
    ids = [name for name, owner in zip(records.ids, records.owners, strict=True) if owner in owners]
    request = expunge.Request.remove(ids)
    return (method or expunge.Sisa())(trained, records, request, rng=expunge.generator(0)).trained


def predictions(trained, test):
    return outputs(trained.module, test).argmax(1)


def test_the_votes_are_those_of_the_model(small, trained, found):
    assert found.predicted.equal(predictions(trained, small[1]))
    assert (found.shards, found.voters, found.model) == (SHARDS, SHARDS, trained.digest())
    assert found.votes.sum(1).eq(SHARDS).all()
    assert set(found.radius.tolist()) == {0, 1, 2}
    assert not trained.module.training


@pytest.mark.parametrize(("slices", "most"), [(1, 2), (2, 1)])
def test_no_one_or_two_owners_that_leave_flip_a_prediction_within_the_radius(small, recipe, trained, slices, most):
    records, test = small
    if slices > 1:
        sliced = replace(recipe, sharding=replace(recipe.sharding, slices=slices))
        trained = expunge.train(sliced, records)
    before = deletion_robustness(trained, test)
    owners, beyond = sorted(set(records.owners)), 0
    for gone in itertools.chain(*(itertools.combinations(owners, size) for size in range(1, most + 1))):
        touched = touched_shards(trained, records.where(lambda _, owner, gone=gone: owner in gone))
        assert len(touched) <= len(gone)
        changed = predictions(forget(trained, records, gone), test) != before.predicted
        assert not (changed & (before.radius >= len(touched))).any(), gone
        beyond += int(changed.sum())
    assert beyond  # deletions do flip what the radius does not cover


@pytest.fixture(scope="module")
def outcomes(small, trained):
    """For each shard: what it votes on the test rows after each set of its own owners has left; -1 abstains."""
    records, test = small
    every = sorted(set(records.owners))
    found = []
    for shard in range(SHARDS):
        mine = [owner for owner in every if trained.recipe.sharding.shard_of(owner) == shard]
        ballots = {}
        for size in range(len(mine) + 1):
            for gone in itertools.combinations(mine, size):
                part = (forget(trained, records, gone) if gone else trained).parts[shard]
                votes = outputs(part.module, test).argmax(1) if part.ids else torch.full((len(test),), -1)
                ballots[gone] = votes.numpy()
        found.append(ballots)
    return found


def attack_everything(found, outcomes):
    """(n,) fewest shards that some deletion must touch to flip each prediction; a large number if none flips it."""
    fewest = np.full(len(found), 99)
    for combination in itertools.product(*(ballots.items() for ballots in outcomes)):
        touched = sum(bool(gone) for gone, _ in combination)
        ballots = np.stack([votes for _, votes in combination], 1)
        if (ballots >= 0).any():
            flipped = tally(ballots, found.votes.shape[1]).argmax(1) != found.predicted.numpy()
            fewest[flipped] = np.minimum(fewest[flipped], touched)
    return fewest


def test_of_all_sets_of_owners_that_can_leave_none_breaks_the_radius(small, trained, found, outcomes):
    assert sum(len(ballots) > 1 for ballots in outcomes) == SHARDS
    assert int(np.prod([len(ballots) for ballots in outcomes])) == 2 ** len(set(small[0].owners))
    fewest = attack_everything(found, outcomes)
    assert (fewest > found.radius.numpy()).all()
    for size in (0, 1, 2):  # a radius larger by one is broken by real deletions, whatever it is
        assert (fewest[found.radius.numpy() == size] == size + 1).any()


def test_the_pieces_that_everything_was_put_together_from_are_those_of_whole_deletions(small, trained, outcomes):
    records, test = small
    gone = tuple(next(iter(owners for owners in ballots if len(owners) == 1)) for ballots in outcomes[:2])
    whole = forget(trained, records, {owner for owners in gone for owner in owners})
    ballots = np.stack([*(outcomes[k][gone[k]] for k in (0, 1)), *(each[()] for each in outcomes[2:])], 1)
    assert tally(ballots, 10).argmax(1).tolist() == predictions(whole, test).tolist()


def test_a_shard_whose_owners_all_leave_abstains_and_flips_nothing_within_the_radius(small, trained, found):
    records, test = small
    shard_of = trained.recipe.sharding.shard_of
    gone = {owner for owner in records.owners if shard_of(owner) == 1}
    after = forget(trained, records, gone)
    assert not after.parts[1].ids
    later = deletion_robustness(after, test)
    assert (later.shards, later.voters) == (SHARDS, SHARDS - 1)
    stands = found.radius >= 1
    assert later.predicted[stands].equal(found.predicted[stands])
    assert touched_shards(trained, records.where(lambda _, owner: owner in gone)) == {1}


def test_rows_replaced_by_anything_touch_the_shards_of_their_owners_only(small, trained, found):
    records, test = small
    mine = records.of_owner("owner-05")
    noise = torch.rand(mine.x.shape, generator=torch.Generator().manual_seed(0))
    request = expunge.Request.replace_rows(mine.ids, noise, (mine.y + 3) % 10)
    after = expunge.Sisa()(trained, records, request, rng=expunge.generator(0)).trained
    changed = predictions(after, test) != found.predicted
    assert changed.any()
    assert not (changed & (found.radius >= 1)).any()
    same = [a.module is b.module for a, b in zip(after.parts, trained.parts, strict=True)]
    assert same.count(False) == 1


def test_retraining_with_the_same_coins_is_covered_and_with_fresh_ones_or_another_salt_it_is_not(small, trained, found):
    records, test = small
    same = forget(trained, records, {"owner-05"}, expunge.Retrain())
    assert same.digest() == forget(trained, records, {"owner-05"}).digest()
    fresh = forget(trained, records, {"owner-05"}, expunge.Retrain(coins="fresh"))
    salted = replace(trained.recipe, sharding=replace(trained.recipe.sharding, salt="other"))
    dealt_anew = expunge.train(salted, records.where(lambda _, owner: owner != "owner-05"))
    for other in (fresh, dealt_anew):
        changed = predictions(other, test) != found.predicted
        assert (changed & (found.radius >= 1)).any()


def test_ids_and_order_of_the_rows_change_no_radius(small, trained, found):
    test = small[1]
    turned = test.select(range(len(test) - 1, -1, -1))
    assert deletion_robustness(trained, turned).radius.flip(0).equal(found.radius)


# What follows from the votes


def value(votes, labels, shards=None):
    votes = torch.tensor(votes)
    names = tuple(f"t-{row}" for row in range(len(votes)))
    seen = int(votes[0].sum()) if shards is None else shards
    return DeletionRobustness(model="m", shards=seen, ids=names, labels=torch.tensor(labels), votes=votes)


def test_the_floor_counts_rows_that_are_right_and_stand():
    given_votes = value([[5, 0], [0, 5], [3, 2], [1, 4], [4, 1]], [0, 1, 0, 0, 1])
    assert given_votes.predicted.tolist() == [0, 1, 0, 1, 0]
    assert given_votes.radius.tolist() == [2, 2, 0, 1, 1]
    assert [given_votes.accuracy_floor(k).value for k in range(4)] == [0.6, 0.4, 0.4, 0.0]
    curve = given_votes.curve()
    assert [floor.k for floor in curve] == [0, 1, 2, 3]
    assert [floor.stable.value for floor in curve] == [1.0, 0.8, 0.4, 0.0]
    assert [floor.accuracy for floor in curve] == [given_votes.accuracy_floor(k) for k in range(4)]
    assert given_votes.accuracy_floor(1).n == 5
    assert given_votes.median_radius == 1.0
    assert json.loads(json.dumps(curve[1].to_json()))["stable"]["value"] == 0.8


def test_no_deletion_from_a_real_model_takes_accuracy_below_its_floor(small, found, outcomes):
    labels = small[1].y.numpy()
    worst = {}
    for combination in itertools.product(*(ballots.items() for ballots in outcomes)):
        touched = sum(bool(gone) for gone, _ in combination)
        ballots = np.stack([votes for _, votes in combination], 1)
        if (ballots >= 0).any():
            right = float((tally(ballots, 10).argmax(1) == labels).mean())
            worst[touched] = min(worst.get(touched, 1.0), right)
    assert worst[0] == found.accuracy_floor(0).value
    assert all(found.accuracy_floor(k).value <= right for k, right in worst.items())
    assert found.accuracy_floor(1).value > 0


def test_the_value_is_its_json():
    one = value([[2, 1], [0, 3]], [0, 1], shards=4)
    again = DeletionRobustness.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one
    assert hash(again) == hash(one)
    assert one != value([[2, 1], [1, 2]], [0, 1], shards=4)
    assert one != "votes"
    assert (one.voters, one.shards, len(one)) == (3, 4, 2)
    assert "4 shards" in str(one)


@pytest.mark.parametrize("k", [-1, 0.5, True, "1"])
def test_the_number_of_touched_shards_is_a_number(k):
    with pytest.raises(Misuse, match="k must be an integer >= 0"):
        value([[2, 1]], [0]).accuracy_floor(k)


def test_votes_that_no_shards_cast_are_refused():
    with pytest.raises(Misuse, match="2 to 3 votes of 3 shards"):
        value([[2, 1], [2, 0]], [0, 0])
    with pytest.raises(Misuse, match="3 to 3 votes of 2 shards"):
        value([[2, 1]], [0], shards=2)
    with pytest.raises(Misuse, match="1 ids, 2 labels and votes on 1 rows"):
        value([[2, 1]], [0, 1])
    with pytest.raises(Misuse, match="no rows"):
        DeletionRobustness(
            model="m", shards=1, ids=(), labels=torch.zeros(0, dtype=torch.int64), votes=torch.zeros(0, 2).long()
        )


# What has no votes


def test_models_without_votes_are_told_what_to_use(small, recipe, trained):
    records, test = small
    quick = replace(recipe, epochs=1)
    whole = expunge.train(replace(quick, sharding=None), records)
    with pytest.raises(Unsupported, match="this model is whole; train it in shards"):
        deletion_robustness(whole, test)
    with pytest.raises(Unsupported, match="this model is whole"):
        touched_shards(whole, records)
    mean = expunge.train(replace(quick, sharding=replace(recipe.sharding, aggregate="mean")), records)
    with pytest.raises(Unsupported, match='use Sharding\\(aggregate="vote"\\)'):
        deletion_robustness(mean, test)
    moved = replace(trained, standing=Claim.NONE)
    with pytest.raises(Unsupported, match="no longer what training made of their rows"):
        deletion_robustness(moved, test)
    with pytest.raises(Misuse, match="float targets"):
        deletion_robustness(trained, Records(test.x, test.y.float()))
    with pytest.raises(Misuse, match="no rows"):
        deletion_robustness(trained, test.select([]))


@pytest.mark.parametrize("shards", [None, 2])
def test_a_mean_of_numbers_can_never_stand_still(small, shards):
    records = small[0].select(range(40))
    numbers = Records(records.x, records.y.float(), records.ids, records.owners)
    model = expunge.train(expunge.Recipe(model="softmax", loss="mse", epochs=1), numbers, shards=shards)
    with pytest.raises(Impossible, match="only votes for classes can stand still"):
        deletion_robustness(model, numbers)


def test_numbers_of_shards_are_compared_on_the_same_rows(small, recipe):
    records, test = small
    told = []
    quick = replace(recipe, epochs=2, sharding=None)
    one, three = robustness_by_shards(quick, records, test, [1, 3], report=lambda *said: told.append(said))
    assert (one.shards, three.shards) == (1, 3)
    assert one.ids == three.ids == test.ids
    assert one.radius.eq(0).all()
    assert three == deletion_robustness(expunge.train(quick, records, shards=3), test)
    assert [0 < done <= steps for _, done, steps in told] == [True] * len(told)
    assert [done / steps for _, done, steps in told] == sorted(done / steps for _, done, steps in told)
    with pytest.raises(Misuse, match="at least one number of shards"):
        robustness_by_shards(quick, records, test, [])
    with pytest.raises(BadRecipe, match="integers >= 1"):
        robustness_by_shards(quick, records, test, [0])
    with pytest.raises(Unsupported, match="mean"):
        robustness_by_shards(replace(quick, sharding=expunge.Sharding(shards=2, aggregate="mean")), records, test, [2])
