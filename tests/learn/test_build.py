"""From recipes to modules: initial weights, leave to run code, and what cannot be made."""

import pytest
import torch
from torch import nn

from expunge.core.coins import seed_of
from expunge.core.errors import BadRecipe, CodeNotAllowed
from expunge.core.recipe import Recipe, Sharding
from expunge.learn.build import allow_code, build, seeded
from expunge.learn.ensemble import ShardEnsemble


def recipe(**more):
    return Recipe(**{"model": "mlp", "model_args": {"shape": [4], "outputs": 3, "hidden": [5]}, **more})


def linear(shape, outputs, bias=True):
    return nn.Linear(shape[0], outputs, bias=bias)


def nothing(**_):
    return "no module"


def fails(**_):
    raise ValueError("out of layers")


def test_initial_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(recipe(seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = build(recipe(seed=3, epochs=99, batch_size=1)), build(recipe(seed=4))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    torch.manual_seed(seed_of(3, "init"))
    assert torch.equal(nn.Linear(4, 5).weight, first.body[0].weight)


def test_dtype():
    assert build(recipe(dtype="float64")).head.weight.dtype is torch.float64
    assert torch.equal(build(recipe(dtype="float64")).head.weight.float(), build(recipe()).head.weight)


def test_a_sharded_recipe_is_the_aggregate_of_its_parts():
    parts = (build(recipe(seed=1)), build(recipe(seed=2)))
    whole = build(recipe(sharding=Sharding(shards=2, aggregate="mean")), parts)
    assert isinstance(whole, ShardEnsemble)
    assert (whole.outputs, whole.aggregate, tuple(whole.parts)) == (3, "mean", parts)


def test_seeded_puts_the_coins_back_after_an_error_too():
    before = torch.get_rng_state()
    drawn = []

    def fail():
        with seeded("x", 1):
            drawn.append(torch.rand(3))
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    assert torch.equal(torch.get_rng_state(), before)
    first, again = drawn
    assert torch.equal(first, again)
    with seeded("x", 2):
        assert not torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "mpl"}, 'model "mpl" cannot be made: unknown model "mpl"; known: .*'),
        (
            {"model_args": {"shape": [4], "outputs": 3, "hiden": [5]}},
            'model "mlp" cannot be made: mlp takes no argument "hiden"; .*',
        ),
        ({"model_args": {"shape": [4], "outputs": 0}}, 'model "mlp" cannot be made: outputs must be a whole number .*'),
        ({"model_args": {"shape": [4], "outputs": 3, "hidden": 5}}, 'model "mlp" cannot be made: .*'),
        (
            {"model": "lenet", "model_args": {"shape": [4], "outputs": 3}},
            'model "lenet" cannot be made: LeNet needs rows of shape .*',
        ),
    ],
)
def test_models_that_cannot_be_made(more, message):
    with pytest.raises(BadRecipe, match=rf"^{message}$"):
        build(recipe(**more))


def test_code_needs_leave_and_says_so():
    named = recipe(model=f"{__name__}:linear", model_args={"shape": [4], "outputs": 3})
    with pytest.raises(
        CodeNotAllowed, match=r"^the recipe names code, .*:linear; if you trust it: --allow-code, or expunge"
    ):
        build(named)
    assert allow_code(linear) == named.model
    assert tuple(build(named).weight.shape) == (3, 4)
    assert build(recipe(model=named.model, model_args={"shape": [4], "outputs": 3, "bias": False})).bias is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_place:net", "no_such_place:net cannot be imported .*; is it on the Python path[?]"),
        ("torch.nn:NoSuchLayer", "torch.nn:NoSuchLayer cannot be imported .*"),
        ("math:pi", "math:pi is not callable; name a function or class that makes the module"),
        (nothing, ".*:nothing must return a torch.nn.Module, got str"),
        (fails, 'model ".*:fails" cannot be made: out of layers'),
    ],
)
def test_code_that_makes_no_module(name, message):
    with pytest.raises(BadRecipe, match=rf"^{message}$"):
        build(recipe(model=allow_code(name)))


def test_code_may_be_named_as_text():
    name = allow_code("torch.nn:Linear")
    built = build(recipe(model=name, model_args={"in_features": 4, "out_features": 2}))
    assert type(built) is nn.Linear
