"""Recipes: JSON both ways, equality, every bad field, the schedules in closed form, shards that know owners only."""

import json
import math
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.coins import bucket
from expunge.core.errors import BadRecipe, BadRecords, UnreadableFile
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.learn.shards import shards_of

whole = st.integers(1, 50)
share = st.floats(0, 1, allow_subnormal=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
optimisers = st.one_of(
    st.tuples(st.just("sgd"), st.fixed_dictionaries({"lr": st.floats(1e-6, 10), "momentum": st.floats(0, 0.99)})),
    st.tuples(
        st.just("adam"), st.fixed_dictionaries({"lr": st.floats(1e-6, 10)}, optional={"betas": st.just([0.8, 0.99])})
    ),
)
schedules = st.one_of(
    st.just({"kind": "constant"}),
    st.fixed_dictionaries({"kind": st.sampled_from(["cosine", "linear"])}, optional={"floor": share}),
    st.fixed_dictionaries(
        {"kind": st.just("steps"), "at": st.lists(whole, max_size=3)}, optional={"factor": share.map(lambda s: s + 0.1)}
    ),
)


prunings = st.one_of(
    st.builds(Pruning, sparsity=st.floats(0.01, 0.99), rounds=whole, rewind=st.integers(0, 3)),
    st.builds(Pruning, sparsity=st.floats(0.01, 0.99), by=st.just("synflow"), iterations=whole),
    st.builds(Pruning, sparsity=st.floats(0.01, 0.99), by=st.just("random")),
)


@st.composite
def recipes(draw):
    optimiser, optimiser_args = draw(optimisers)
    pruning = draw(st.none() | prunings)
    sharding = st.builds(
        Sharding, shards=whole, slices=whole, salt=st.text(max_size=8), aggregate=st.sampled_from(["vote", "mean"])
    )
    return Recipe(
        model=draw(st.text(min_size=1)),
        model_args=draw(st.dictionaries(st.text(), json_values, max_size=3)),
        loss=draw(st.sampled_from(["cross_entropy", "mse"])),
        optimiser=optimiser,
        optimiser_args=optimiser_args,
        schedule=draw(schedules),
        epochs=draw(st.integers(0 if pruning is None else pruning.rewind, 100)),
        batch_size=draw(whole),
        weight_decay=draw(share),
        seed=draw(st.integers(-(2**40), 2**63)),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        sharding=draw(st.none() | sharding) if pruning is None else None,
        pruning=pruning,
        max_norm=draw(st.none() | st.floats(1e-6, 1e6)),
    )


@given(recipes())
@settings(max_examples=60, deadline=None, print_blob=True)
def test_json_both_ways_is_lossless(recipe):
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.to_json() == recipe.to_json()
    assert {f.name: getattr(again, f.name) for f in fields(again)} == {
        f.name: getattr(recipe, f.name) for f in fields(recipe)
    }
    assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301 -- as engines send recipes to other processes


OTHERS = {
    "model": "softmax",
    "model_args": {"hidden": [4]},
    "loss": "mse",
    "optimiser": "adam",
    "optimiser_args": {"lr": 0.06},
    "schedule": {"kind": "cosine"},
    "epochs": 11,
    "batch_size": 65,
    "weight_decay": 1e-9,
    "seed": 1,
    "dtype": "float64",
    "sharding": Sharding(shards=2),
    "pruning": Pruning(sparsity=0.5),
    "max_norm": 20.0,
}


def test_every_field_counts():
    recipe = Recipe(model="mlp", optimiser_args={"lr": 0.05})
    assert set(OTHERS) == {f.name for f in fields(Recipe)}
    changed = [replace(recipe, **{name: value}) for name, value in OTHERS.items()]
    assert len({recipe, *changed}) == len({recipe.digest(), *(r.digest() for r in changed)}) == len(OTHERS) + 1
    assert recipe != "mlp"
    assert len({recipe, Recipe(model="mlp", optimiser_args={"lr": 0.05})}) == 1


def test_equal_recipes_have_equal_hashes():
    one, other = (Recipe(model="mlp", optimiser_args={"lr": lr}) for lr in (1, 1.0))
    assert (one == other) == (hash(one) == hash(other))


def test_a_recipe_cannot_be_written_to():
    recipe = Recipe(model="mlp", model_args={"hidden": [1, {"a": [2]}]})
    with pytest.raises(TypeError):
        recipe.optimiser_args["lr"] = 1.0
    with pytest.raises(TypeError):
        recipe.model_args["hidden"][1]["a"] = 1
    assert recipe.model_args["hidden"][1]["a"] == (2,)
    given_args = {"hidden": [3]}
    kept = Recipe(model="mlp", model_args=given_args)
    given_args["hidden"].append(4)
    assert kept.model_args["hidden"] == (3,)


SGD = "lr, momentum, nesterov"
BAD = [
    ({"model": ""}, "model must be a name, got ''"),
    ({"model": 3}, "model must be a name, got 3"),
    ({"model_args": [1]}, r"model_args must be a mapping, got \[1\]"),
    ({"model_args": {"a": math.nan}}, "a recipe holds plain JSON values only: .*"),
    ({"model_args": {"a": torch.zeros(1)}}, "a recipe holds plain JSON values only: .*"),
    ({"loss": "hinge"}, 'loss must be one of cross_entropy, mse, got "hinge"'),
    ({"loss": ["mse"]}, "loss must be one of .*"),
    ({"optimiser": "lion"}, 'optimiser must be one of sgd, adam, got "lion"'),
    ({"optimiser": {}}, "optimiser must be one of .*"),
    ({"optimiser_args": None}, "optimiser_args must be a mapping, got None"),
    ({"optimiser_args": {}}, "optimiser_args needs lr > 0, got None"),
    *(
        ({"optimiser_args": {"lr": lr}}, "optimiser_args needs lr > 0, got .*")
        for lr in (0, -1, math.inf, math.nan, "1", True)
    ),
    ({"optimiser_args": {"lr": 1, "beta": 1}}, f'optimiser_args of "sgd" has no "beta"; it knows {SGD}'),
    ({"optimiser_args": {"lr": 1, "momentum": 1}}, "need 0 <= momentum < 1, got 1"),
    ({"optimiser_args": {"lr": 1, "momentum": "a"}}, "need 0 <= momentum < 1, got a"),
    ({"optimiser_args": {"lr": 1, "nesterov": True}}, "nesterov needs momentum > 0; add it, or leave nesterov out"),
    ({"optimiser": "adam", "optimiser_args": {"lr": 1, "betas": [0.9, 1.0]}}, "betas must be two numbers .*"),
    ({"optimiser": "adam", "optimiser_args": {"lr": 1, "betas": 0.9}}, "betas must be two numbers .*, got 0.9"),
    ({"optimiser": "adam", "optimiser_args": {"lr": 1, "eps": -1}}, "eps must be >= 0, got -1"),
    ({"optimiser": "adam"}, 'optimiser_args of "adam" has no "momentum"; it knows lr, betas, eps'),
    ({"schedule": "cosine"}, "schedule must be a mapping, got 'cosine'"),
    ({"schedule": {}}, 'schedule kind must be one of constant, cosine, steps, linear, got ""'),
    ({"schedule": {"kind": "warm"}}, 'schedule kind must be one of constant, cosine, steps, linear, got "warm"'),
    ({"schedule": {"kind": ["cosine"]}}, "schedule kind must be one of .*"),
    ({"schedule": {"kind": "constant", "floor": 0}}, 'schedule of "constant" has no "floor"; it knows no settings'),
    ({"schedule": {"kind": "cosine", "floor": 2}}, "schedule floor must lie between 0 and 1, got 2"),
    ({"schedule": {"kind": "steps"}}, 'schedule "steps" needs "at", the epochs to step at'),
    ({"schedule": {"kind": "steps", "at": 3}}, 'schedule "at" must be a list of epochs, got 3'),
    ({"schedule": {"kind": "steps", "at": [1], "factor": "x"}}, "schedule factor must be > 0, got x"),
    *(({"epochs": epochs}, f"epochs must be an integer >= 0, got {epochs}") for epochs in (-1, 1.5, "3", True)),
    *(({"batch_size": size}, f"batch_size must be >= 1, got {size}") for size in (0, 2.5, "8")),
    *(({"weight_decay": decay}, f"weight_decay must be >= 0, got {decay}") for decay in (-1, math.inf, math.nan, "0")),
    ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    ({"seed": "0"}, "seed must be an integer, got '0'"),
    ({"dtype": "float16"}, 'dtype must be float32 or float64, got "float16"'),
    ({"sharding": 3}, "sharding must be a mapping with shards, slices, salt, aggregate, got 3"),
    ({"sharding": {"shard": 3}}, r"sharding must be a mapping with .*, got \{'shard': 3\}"),
    ({"sharding": {"shards": 0}}, "shards and slices must be integers >= 1, got 0 and 1"),
    ({"sharding": {"shards": 2.0}}, "shards and slices must be integers >= 1, got 2.0 and 1"),
    ({"sharding": {"shards": 2, "slices": 0}}, "shards and slices must be integers >= 1, got 2 and 0"),
    ({"sharding": {"shards": 2, "salt": 3}}, "salt must be text, got 3"),
    ({"sharding": {"shards": 2, "aggregate": "max"}}, 'aggregate must be "vote" or "mean", got "max"'),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_every_bad_field_is_refused_in_one_line(change, message):
    with pytest.raises(BadRecipe, match=rf"^{message}$"):
        Recipe.from_json({"model": "mlp", **change})


def test_json_that_is_no_recipe():
    with pytest.raises(BadRecipe, match=r'^a recipe has no "epoch"; it has batch_size, '):
        Recipe.from_json({"model": "mlp", "epoch": 3})
    with pytest.raises(BadRecipe, match=r'^a recipe needs "model", for example "mlp"$'):
        Recipe.from_json({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a JSON recipe"),
        ("{", "cannot be read as a JSON recipe"),
        (b"\xff\xfe", "cannot be read as a JSON recipe"),
        ("[1]", "holds list where a recipe is a JSON object"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnreadableFile, match=message) as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_file_is_read(tmp_path):
    recipe = Recipe(model="mlp", epochs=3, sharding=Sharding(shards=4, slices=2))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    assert Recipe.load(tmp_path / "recipe.json") == Recipe.load(str(tmp_path / "recipe.json")) == recipe


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ({"kind": "constant"}, lambda e: 1.0),
        ({"kind": "cosine"}, lambda e: math.cos(math.pi * e / 40) ** 2),
        ({"kind": "cosine", "floor": 0.2}, lambda e: 0.2 + 0.8 * math.cos(math.pi * e / 40) ** 2),
        ({"kind": "linear"}, lambda e: (20 - e) / 20),
        ({"kind": "linear", "floor": 0.5}, lambda e: 1 - e / 40),
        ({"kind": "steps", "at": [5, 8]}, lambda e: 1.0 if e < 5 else 0.1 if e < 8 else 0.01),
        ({"kind": "steps", "at": [3], "factor": 0.5}, lambda e: 1.0 if e < 3 else 0.5),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "factor",  # a function's own name holds its address
)
def test_schedules_in_closed_form(schedule, factor):
    recipe = Recipe(model="mlp", epochs=20, schedule=schedule)
    assert [recipe.lr_factor(e) for e in range(20)] == pytest.approx([factor(e) for e in range(20)], abs=1e-12)


def classes(n, labels, **more):
    return Records(torch.zeros(n, 2, 3), [i % labels for i in range(n)], **more)


def test_completed_keeps_the_outputs_after_a_class_is_removed():
    records = classes(9, 3)
    recipe = Recipe(model="mlp").completed(records)
    assert dict(recipe.model_args) == {"shape": (2, 3), "outputs": 3}
    smaller = records.without(records.of_class(2).ids)
    assert recipe.completed(smaller) == Recipe(model="mlp").completed(smaller) == recipe
    anew = Records(smaller.x, smaller.y)  # the same rows read anew: two classes only
    assert anew.classes == 2
    assert recipe.completed(anew) == recipe
    assert recipe.completed(recipe_rows := classes(9, 3, classes=3)) == recipe
    assert recipe_rows.classes == 3


def test_completed_refuses_records_that_do_not_fit():
    recipe = Recipe(model="mlp").completed(classes(9, 3))
    with pytest.raises(BadRecords, match=r"^the recipe's model has outputs 3, but the records have 4; train anew$"):
        recipe.completed(classes(9, 4))
    with pytest.raises(BadRecords, match=r"^the recipe's model has shape \(2, 3\), but the records have \(6,\); train"):
        recipe.completed(Records(torch.zeros(3, 6), [0, 1, 2]))
    with pytest.raises(
        BadRecords, match=r"^loss cross_entropy needs integer classes, but the targets are floats; use mse"
    ):
        recipe.completed(Records(torch.zeros(3, 2, 3), [0.0, 1.0, 2.0]))
    with pytest.raises(
        BadRecords, match=r"^loss mse needs float targets, but the labels are classes; use cross_entropy$"
    ):
        Recipe(model="mlp", loss="mse").completed(classes(9, 3))


@pytest.mark.parametrize(("y", "outputs"), [(torch.zeros(4), 1), (torch.zeros(4, 1), 1), (torch.zeros(4, 3), 3)])
def test_completed_counts_regression_targets(y, outputs):
    recipe = Recipe(model="mlp", loss="mse").completed(Records(torch.zeros(4, 2), y))
    assert recipe.model_args["outputs"] == outputs
    assert recipe.completed(Records(torch.zeros(4, 2), y)) == recipe


def test_completed_fills_the_salt_from_the_seed_and_keeps_it():
    records = classes(4, 2)
    first = Recipe(model="mlp", sharding=Sharding(shards=3)).completed(records)
    assert len(first.sharding.salt) == 16
    assert first.completed(records) == first
    assert replace(first, seed=5).completed(records).sharding.salt == first.sharding.salt
    assert (
        Recipe(model="mlp", seed=5, sharding=Sharding(shards=3)).completed(records).sharding.salt != first.sharding.salt
    )
    given_salt = Recipe(model="mlp", sharding=Sharding(shards=3, salt="s")).completed(records)
    assert given_salt.sharding.salt == "s"


def test_parts_have_seeds_of_salt_and_shard():
    recipe = Recipe(model="mlp", sharding=Sharding(shards=3, salt="s"))
    seeds = [recipe.part(i).seed for i in range(3)]
    assert len({*seeds, recipe.seed}) == 4
    assert recipe.part(1) == replace(recipe, seed=seeds[1], sharding=None)
    assert replace(recipe, sharding=Sharding(shards=9, slices=2, salt="s")).part(1).seed == seeds[1]
    assert replace(recipe, sharding=Sharding(shards=3, salt="t")).part(1).seed != seeds[1]
    with pytest.raises(BadRecipe, match=r"^only a sharded recipe has parts; this one has none$"):
        recipe.part(1).part(0)


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(1, 3),
    st.data(),
)
@settings(max_examples=40, deadline=None, print_blob=True)
def test_shard_and_slice_know_owner_and_salt_only(rows, shards, slices, data):
    sharding = Sharding(shards=shards, slices=slices, salt="pepper")
    x = torch.tensor([[float(value), float(ord(owner))] for owner, value in rows])
    records = Records(x, [value for _, value in rows], owners=[owner for owner, _ in rows], classes=4)
    kept = records.select(data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True)))  # fewer, in another order
    for few in (records, kept):
        for index, part in enumerate(shards_of(few, sharding)):
            assert set(part.owners) == {o for o in few.owners if bucket("pepper/shard", o, shards) == index}
            assert len(part) == sum(bucket("pepper/shard", o, shards) == index for o in few.owners)
    for owner in set(records.owners):
        assert sharding.slice_of(owner) == bucket("pepper/slice", owner, slices)


def test_shards_and_slices_are_independent():
    sharding = Sharding(shards=4, slices=4, salt="s")
    places = np.array([(sharding.shard_of(f"o{i}"), sharding.slice_of(f"o{i}")) for i in range(3200)])
    table = np.histogram2d(*places.T, bins=4)[0]
    assert np.square(table - 200).sum() / 200 < 44.3  # chi-squared, 15 degrees: passes with probability 0.9999


@pytest.mark.parametrize(
    "schedule", [{"kind": "cosine"}, {"kind": "linear"}, {"kind": "steps", "at": [5], "factor": 0.1}]
)
def test_a_stage_goes_through_the_whole_schedule(schedule):
    whole = Recipe(model="mlp", epochs=10, schedule=schedule)
    stage = whole.staged(4)
    assert [stage.lr_factor(e) for e in range(4)] == pytest.approx([whole.lr_factor(e) for e in (0, 2.5, 5, 7.5)])
    assert whole.staged(10) == whole


BAD_PRUNINGS = [
    ({"sparsity": 0}, r"^sparsity must be > 0 and < 1, got 0$"),
    ({"sparsity": 1}, r"^sparsity must be > 0 and < 1, got 1$"),
    ({"sparsity": math.nan}, r"^sparsity must be > 0 and < 1, got nan$"),
    ({"sparsity": "0.5"}, r"^sparsity must be > 0 and < 1, got 0.5$"),
    ({"sparsity": True}, r"^sparsity must be > 0 and < 1, got True$"),
    ({"sparsity": 0.5, "by": "snip"}, r'^pruning is by magnitude, synflow or random, got "snip"$'),
    ({"sparsity": 0.5, "rounds": 0}, r"^rounds must be an integer >= 1, got 0$"),
    ({"sparsity": 0.5, "rounds": 1.5}, r"^rounds must be an integer >= 1, got 1.5$"),
    ({"sparsity": 0.5, "rewind": -1}, r"^rewind must be an epoch >= 0, got -1$"),
    ({"sparsity": 0.5, "by": "synflow", "iterations": 0}, r"^iterations must be an integer >= 1, got 0$"),
    ({"sparsity": 0.5, "by": "synflow", "rounds": 2}, r"^rounds and rewind are .* leave them out of synflow$"),
    ({"sparsity": 0.5, "by": "random", "rewind": 1}, r"^rounds and rewind are .* leave them out of random$"),
    ({"sparsity": 0.5, "iterations": 5}, r"^iterations are of pruning by synflow; leave them out of magnitude$"),
    ({"rounds": 2}, r"^pruning must be a mapping with sparsity, by, rounds, rewind, iterations, got \{'rounds': 2\}$"),
    ({"sparsity": 0.5, "rate": 2}, r"^pruning must be a mapping with sparsity, "),
    (0.5, r"^pruning must be a mapping with sparsity, .*, got 0.5$"),
    ({"sparsity": 0.5, "rewind": 11}, r"^rewind must be at most the 10 epochs trained, got 11$"),
]


@pytest.mark.parametrize(("pruning", "why"), BAD_PRUNINGS)
def test_pruning_that_means_nothing_is_refused(pruning, why):
    with pytest.raises(BadRecipe, match=why):
        Recipe(model="mlp", pruning=pruning)


def test_pruning_is_read_from_json_and_shards_are_not_pruned():
    recipe = Recipe(model="mlp", pruning={"sparsity": 0.5, "rewind": 10})
    assert recipe.pruning == Pruning(sparsity=0.5, rewind=10)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert (
        len({replace(recipe, pruning=Pruning(sparsity=s, by=by)) for s in (0.5, 0.6) for by in ("random", "synflow")})
        == 4
    )
    with pytest.raises(BadRecipe, match=r"^shards cannot be pruned; give sharding or pruning$"):
        replace(recipe, sharding=Sharding(shards=2))


def test_dense_recipes_keep_the_digest_that_they_had_before_there_was_pruning():
    dense = Recipe(model="mlp")
    assert "pruning" not in dense.to_json()
    assert dense.digest() == "0730689a1b5f70436c41e06d001884d60604433a7758792a90da4cad57a6835a"
    assert Recipe.from_json({**dense.to_json(), "pruning": None}) == dense


def test_recipes_without_a_bound_on_the_norm_keep_the_digest_that_they_had_before_there_was_one():
    free = Recipe(model="mlp")
    assert "max_norm" not in free.to_json()
    assert free.digest() == "0730689a1b5f70436c41e06d001884d60604433a7758792a90da4cad57a6835a"
    assert Recipe.from_json({**free.to_json(), "max_norm": None}) == free
    bound = Recipe(model="mlp", max_norm=20)
    assert bound.to_json()["max_norm"] == 20
    assert bound == Recipe.from_json(json.loads(json.dumps(bound.to_json())))
    assert replace(bound, sharding=Sharding(shards=2, salt="s")).part(1).max_norm == 20


@pytest.mark.parametrize("radius", [0, -1.0, math.inf, math.nan, "20", True])
def test_a_bound_on_the_norm_that_is_none_is_refused(radius):
    with pytest.raises(BadRecipe, match=f"^max_norm must be > 0, or None for no bound, got {radius}$"):
        Recipe(model="mlp", max_norm=radius)
