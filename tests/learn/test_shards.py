"""Shards: what stands after any stream of requests is, byte for byte, a training from scratch in a fresh process."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.coins import generator
from expunge.core.digest import digest_tensors
from expunge.core.errors import EmptyRetain, NeverTrained, UnknownRecord
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import Keep, Tally
from expunge.learn.shards import (
    ShardSizes,
    ShardWarning,
    first_unclean_slices,
    retrain_shards,
    shard_sizes,
    shards_of,
    slice_epochs,
)
from expunge.learn.training import load, train
from expunge.unlearn import Done, Retrain, Sisa

pytestmark = pytest.mark.filterwarnings("ignore::expunge.learn.shards.ShardWarning")
RNG = generator(5)

SCRATCH = """
import warnings
import torch
import expunge
from expunge.core.digest import digest_tensors

warnings.simplefilter("ignore")
recipe = expunge.Recipe.from_json(given["recipe"])
answer = []
for x, y, owners in given["sets"]:
    records = expunge.Records(torch.tensor(x), torch.tensor(y), owners=owners, classes=given["classes"])
    trained = expunge.train(recipe, records)
    slices = [[digest_tensors(state) for state in part.log.slices] if part.log else [] for part in trained.parts]
    answer.append([trained.digest(), slices])
"""


def fingerprint(trained):
    slices = [[digest_tensors(state) for state in part.log.slices] if part.log else [] for part in trained.parts]
    return [trained.digest(), slices]


def uneven(sizes):
    """Owner k holds sizes[k] rows; some rows are held by two owners, some twice by one."""
    owners = [f"o{k}" for k, size in enumerate(sizes) for _ in range(size)]
    x = torch.randn(len(owners), 3, generator=generator(len(owners)))
    x[len(owners) // 2 :: 3] = x[0].clone()
    y = [i % 3 for i in range(len(owners))]
    return Records(x, [y[0] if torch.equal(x[i], x[0]) else y[i] for i in range(len(owners))], owners=owners, classes=3)


def as_json(records):
    return [records.x.tolist(), records.y.tolist(), list(records.owners)]


@st.composite
def streams(draw):
    sizes = draw(st.lists(st.integers(1, 8), min_size=3, max_size=7))
    sharding = Sharding(
        shards=draw(st.integers(1, 4)),
        slices=draw(st.integers(1, 3)),
        salt=draw(st.sampled_from("abc")),
        aggregate=draw(st.sampled_from(["vote", "mean"])),
    )
    ids, owners = st.integers(0, sum(sizes) - 1).map(str), st.integers(0, len(sizes) - 1).map(lambda k: f"o{k}")
    request = st.one_of(
        st.tuples(st.just("remove"), st.lists(ids, min_size=1, max_size=3, unique=True)),
        st.tuples(st.just("replace"), st.lists(ids, min_size=1, max_size=2, unique=True)),
        st.tuples(st.just("owner"), owners),
        st.tuples(st.just("class"), st.integers(0, 2)),
        st.tuples(st.just("rows"), owners),
    )
    return sizes, sharding, draw(st.lists(request, min_size=1, max_size=4))


def request_of(kind, what, records):
    if kind == "remove":
        return Request.remove(what)
    if kind == "owner":
        return Request.remove_owner(what)
    if kind == "class":
        return Request.remove_class(what)
    if kind == "rows":
        return Request.remove_rows(what, records.of_owner(what).x[:2], records.of_owner(what).y[:2])
    rows = records.take(what)
    return Request.replace_rows(what, -rows.x, rows.y)


def walk(recipe, sizes, stream, forks, methods):
    """Carry out the stream with every method; compare each model with a training from scratch on what remains."""
    records = uneven(sizes)
    start = train(recipe, records)
    models, gone, remaining, seen = dict.fromkeys(methods, start), frozenset(), [as_json(records)], [[start]]
    for kind, what in stream:
        try:
            request = request_of(kind, what, records)
            split = request.split(records, ids=start.ids - gone | added(records, gone), gone=gone)
        except (EmptyRetain, UnknownRecord, NeverTrained):
            continue
        for method, trained in models.items():
            result = method(trained, records, request, rng=RNG)
            assert result.exactness == "pathwise"
            assert result.trained.gone == gone | set(split.forget.ids)
            assert result.trained.ids == set(split.retain.ids)
            models[method] = result.trained
        gone |= frozenset(split.forget.ids)
        if split.added:
            records = records.plus(split.retain.take(sorted(split.added)))
        remaining.append(as_json(split.retain))
        seen.append(list(models.values()))
    scratch = forks(SCRATCH, recipe=start.recipe.to_json(), sets=remaining, classes=3)
    for step, (models_, expected) in enumerate(zip(seen, scratch, strict=True)):
        for trained in models_:
            assert fingerprint(trained) == expected, step
    return gone


@dataclass(frozen=True, kw_only=True)
class LazySisa(Sisa):
    """A liar: retrains from the last slice, as if the removed rows were always there and nowhere else."""

    def _apply(self, task, *, rng):
        touched = dict.fromkeys(
            first_unclean_slices(task.trained, task.forget), task.trained.recipe.sharding.slices - 1
        )
        return Done(trained=retrain_shards(task.trained, task.retain, touched))


@dataclass(frozen=True, kw_only=True)
class BookkeepingSisa(Sisa):
    """A liar: writes the rows off and leaves the model as it is."""

    def _apply(self, task, *, rng):
        return Done(trained=task.trained)


@pytest.mark.parametrize("liar", [LazySisa(), BookkeepingSisa()], ids=str)
def test_liars_are_told_from_a_training_from_scratch(forks, liar):
    sharding = Sharding(shards=2, slices=3, salt="a")
    first = next(f"o{k}" for k in range(6) if sharding.slice_of(f"o{k}") == 0)
    recipe = Recipe(model="softmax", epochs=3, batch_size=4, sharding=sharding)
    walk(recipe, [4] * 6, [("owner", first)], forks, [Sisa()])
    with pytest.raises(AssertionError):
        walk(recipe, [4] * 6, [("owner", first)], forks, [liar])


def added(records, gone):
    return frozenset(record_id for record_id in records.ids if "~" in record_id) - gone


@given(streams(), st.booleans())
@settings(max_examples=12, deadline=None, print_blob=True)
def test_any_stream_of_requests_leaves_a_training_from_scratch(forks, given_stream, adam):
    sizes, sharding, stream = given_stream
    more = {"optimiser": "adam", "optimiser_args": {"lr": 0.1}} if adam else {"schedule": {"kind": "cosine"}}
    recipe = Recipe(model="softmax", epochs=3, batch_size=4, sharding=sharding, **more)
    walk(recipe, sizes, stream, forks, [Sisa(), Retrain()])


@given(streams())
@settings(max_examples=6, deadline=None, print_blob=True)
def test_any_stream_of_requests_to_a_single_model(forks, given_stream):
    sizes, _, stream = given_stream
    recipe = Recipe(model="mlp", model_args={"hidden": [4]}, epochs=2, batch_size=4)
    walk(recipe, sizes, stream, forks, [Retrain()])


@pytest.mark.soak
@given(streams(), st.booleans())
@settings(max_examples=400, deadline=None, print_blob=True)
def test_many_streams_of_requests(forks, given_stream, adam):
    sizes, sharding, stream = given_stream
    more = {"optimiser": "adam", "optimiser_args": {"lr": 0.1}} if adam else {"schedule": {"kind": "cosine"}}
    recipe = Recipe(model="softmax", epochs=3, batch_size=4, sharding=sharding, **more)
    walk(recipe, sizes, stream, forks, [Sisa(), Retrain()])


def test_real_digits_in_a_fresh_process(optdigits, forks):
    records = optdigits.train.select(range(600))
    recipe = Recipe(model="mlp", model_args={"hidden": [16]}, epochs=2, sharding=Sharding(shards=5, slices=2))
    trained = train(recipe, records)
    first = Sisa()(trained, records, Request.remove_owner(records.owners[7]), rng=RNG).trained
    second = Sisa()(first, records, Request.remove(first.ids and sorted(first.ids)[:3]), rng=RNG).trained
    stay = records.where(lambda record_id, _: record_id in second.ids)
    assert second.gone == set(records.ids) - second.ids
    sets = [as_json(stay)]
    assert [fingerprint(second)] == forks(SCRATCH, recipe=trained.recipe.to_json(), sets=sets, classes=10)


def three(owners=6, **more):
    records = uneven([4] * owners)
    sharding = Sharding(**{"shards": 3, "salt": "s", **more})
    return records, Recipe(model="softmax", epochs=2, batch_size=4, sharding=sharding)


def test_untouched_shards_are_shared_and_not_read():
    records, recipe = three()
    trained = train(recipe, records)
    tally = Tally()
    touched = recipe.sharding.shard_of("o0")
    result = Sisa()(trained, records, Request.remove_owner("o0"), rng=RNG)
    for index, (before, after) in enumerate(zip(trained.parts, result.trained.parts, strict=True)):
        assert (before is after) == (index != touched)
    rows = sum(recipe.sharding.shard_of(owner) == touched for owner in records.owners) - 4
    assert result.cost.rows_read == result.cost.gradients == 2 * rows
    assert tally.rows_read == 0


def test_clean_slices_are_kept():
    records, recipe = three(owners=12, shards=1, slices=3)
    trained = train(recipe, records)
    last = next(o for o in records.owners if recipe.sharding.slice_of(o) == 2)
    assert first_unclean_slices(trained, records.of_owner(last)) == {0: 2}
    result = Sisa()(trained, records, Request.remove_owner(last), rng=RNG)
    before, after = trained.parts[0].log.slices, result.trained.parts[0].log.slices
    assert [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert result.cost.rows_read == slice_epochs(2, 3) * (len(records) - 4)


def test_a_shard_that_becomes_empty_abstains():
    records, recipe = three(owners=3)
    sharding = recipe.sharding
    alone = next(
        o for o in records.owners if sum(sharding.shard_of(p) == sharding.shard_of(o) for p in ("o0", "o1", "o2")) == 1
    )
    trained = train(recipe, records)
    before = trained.module.votes(records.x).sum(1)
    after = Sisa()(trained, records, Request.remove_owner(alone), rng=RNG).trained
    assert not after.parts[sharding.shard_of(alone)].ids
    assert (after.module.votes(records.x).sum(1) == before - 1).all()
    assert torch.allclose(after.module(records.x).exp().sum(1), torch.ones(len(records)), atol=1e-4)


def test_gone_is_cumulative_on_disk_too(tmp_path):
    records, recipe = three(slices=2)
    trained = train(recipe, records)
    one = Sisa()(trained, records, Request.remove(["0"]), rng=RNG).trained
    two = Sisa()(load(one.save(tmp_path / "one")), records, Request.remove(["0", "9"]), rng=RNG)
    assert two.trained.gone == {"0", "9"}
    assert two.trained.ids == set(records.ids) - {"0", "9"}
    assert two.events[0].to_json() == {"event": "AlreadyRemoved", "rows": 1}
    assert fingerprint(two.trained) == fingerprint(train(recipe, records.without(["0", "9"])))


def test_shards_know_nothing_of_each_other():
    records, recipe = three()
    whole = train(recipe, records)
    for index, part in enumerate(whole.parts):
        alone = records.where(lambda _, owner, index=index: recipe.sharding.shard_of(owner) == index)
        if len(alone):
            assert train(recipe, alone).parts[index].digest() == part.digest()
            assert part.ids == set(alone.ids)
    assert whole.ids == set(records.ids)
    assert len({part.recipe.seed for part in whole.parts}) == 3


def test_batches_and_checkpoints_of_shards():
    records, recipe = three(owners=12, shards=2, slices=2)
    trained = train(recipe, records, keep=Keep(batches=True, every=3))
    for part in trained.parts:
        assert len(part.log.batches) == part.log.steps
        assert {record_id for batch in part.log.batches for record_id in batch} == part.ids
        assert sum(map(len, part.log.batches)) == part.log.rows_read
        assert part.log.checkpoints
        assert all(0 < step <= part.log.steps for step in part.log.checkpoints)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=25), st.integers(1, 12), st.sampled_from("abcd"))
@settings(max_examples=60, deadline=None, print_blob=True)
def test_the_suggested_number_of_shards_is_even_and_the_largest(sizes, shards, salt):
    records = uneven(sizes)
    sharding = Sharding(shards=shards, salt=salt)
    found = shard_sizes(records, sharding)

    def count(number):
        parts = shards_of(records, replace(sharding, shards=number))
        return tuple(len(part) for part in parts)

    assert found.rows == count(shards)
    assert found.largest_owner_rows == max(sizes)
    even = [number for number in range(1, shards + 1) if max(count(number)) <= 2 * len(records) / number]
    assert found.suggested == max(even)
    assert found.uneven == (shards not in even)
    assert found.largest_share == max(found.rows) / len(records)
    assert not shard_sizes(records, replace(sharding, shards=found.suggested)).uneven


def test_an_oversized_shard_is_warned_of_with_the_number_that_is_even():
    records = uneven([40, 1, 1, 1, 1, 1, 1, 1])
    recipe = Recipe(model="softmax", epochs=1, sharding=Sharding(shards=6, salt="s"))
    sizes = shard_sizes(records, recipe.sharding)
    assert sizes.uneven
    with pytest.warns(
        ShardWarning, match=rf"the largest owner alone holds 40 rows.; {sizes.suggested} shards? would be even$"
    ):
        train(recipe, records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(replace(recipe, sharding=Sharding(shards=sizes.suggested, salt="s")), records)


def test_sizes_in_words():
    assert str(ShardSizes((10, 12), 3, 2)) == "2 shards of 10 to 12 rows, mean 11"
    text = str(ShardSizes((1000, 10, 10), 900, 1))
    assert text == (
        "3 shards of 10 to 1,000 rows, mean 340; the largest costs 98% of a full retraining to forget in, where 1/3 "
        "was wanted (the largest owner alone holds 900 rows); 1 shard would be even"
    )


@pytest.mark.parametrize(("epochs", "slices", "expected"), [(10, 1, 10), (10, 2, 7), (10, 3, 5), (1, 5, 1), (0, 3, 0)])
def test_epochs_of_a_slice(epochs, slices, expected):
    assert slice_epochs(epochs, slices) == expected
