"""All formulas in one table, all settings by their names, and every certified method's guarantee computed again."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from expunge import certify
from expunge.certify import private
from expunge.certify.accountant import Budget
from expunge.certify.clipped_models import ClippedModelFineTune
from expunge.certify.constants import SETTING, STANDS_ON, Derivation
from expunge.certify.derivations import DERIVATIONS, merged, settings_of
from expunge.certify.descent import DescentToDelete
from expunge.certify.guarantee import GAUSSIAN_MU, recheck
from expunge.certify.guo import GuoRemoval
from expunge.certify.head import NewtonHead
from expunge.certify.newton import NewtonUnlearning
from expunge.certify.newton_bound import Smoothness
from expunge.certify.noisy_fine_tune import ClippedFineTune
from expunge.certify.private import train_private
from expunge.certify.rewind import RewindToDelete
from expunge.core.coins import generator
from expunge.core.errors import Misuse
from expunge.core.events import PrivateSteps
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.learn.loop import Keep
from expunge.learn.training import train


def class_rows(n):
    rng = np.random.default_rng(1)
    y = torch.from_numpy(rng.integers(0, 3, n))
    x = torch.from_numpy(rng.normal(size=(n, 4))) + 2 * nn.functional.one_hot(y, 4)
    return Records(x / x.norm(dim=1).max(), y, [f"r{i}" for i in range(n)], classes=3)


ROWS, MANY = class_rows(60), class_rows(600)
BUDGET = Budget(epsilon=3.0, requests=4)
SOFTMAX = Recipe(model="softmax", epochs=3, batch_size=60, weight_decay=0.1, optimiser_args={"lr": 0.1})
FULL = replace(SOFTMAX, epochs=8, dtype="float64")
BALL = replace(FULL, max_norm=10.0)
MLP = replace(SOFTMAX, model="mlp", model_args={"hidden": [5]}, dtype="float64")
VOUCHED = Smoothness(hessian_lipschitz=2.0, lambda_min=-1.0, gradient_lipschitz=3.0)
MEASURED = replace(VOUCHED, source="estimated")
SERIES = {"solver": "lissa", "scale": 4.0, "steps": 200, "damping": 2.0, "rho": 1e-8}
METHODS = {
    "head": (SOFTMAX, NewtonHead(budget=BUDGET)),
    "head of a network": (MLP, NewtonHead(budget=BUDGET)),
    "descent": (SOFTMAX, DescentToDelete(sigma=0.5, share=0.1, radius=2.0, budget=BUDGET)),
    "descent on pixels": (SOFTMAX, DescentToDelete(sigma=0.5, share=0.1, accelerated=False, budget=BUDGET)),
    "rewind": (FULL, RewindToDelete(steps=3, share=0.1, radius=2.0, budget=BUDGET)),
    "newton": (BALL, NewtonUnlearning(feature_radius=1.0, budget=BUDGET)),
    "newton exact": (BALL, NewtonUnlearning(feature_radius=1.0, solver="exact", sigma=9000.0)),
    "newton by a series": (BALL, NewtonUnlearning(feature_radius=1.0, budget=BUDGET, **SERIES)),
    "newton vouched for": (replace(MLP, max_norm=5.0), NewtonUnlearning(smoothness=VOUCHED, damping=4.0)),
    "newton measured": (replace(MLP, max_norm=5.0), NewtonUnlearning(smoothness=MEASURED, damping=4.0)),
    "newton of nothing known": (replace(MLP, max_norm=5.0), NewtonUnlearning(sigma=0.1)),
    "clipped steps": (MLP, ClippedFineTune(polish=0, weight_decay=0.1, budget=BUDGET)),
    "clipped models": (MLP, ClippedModelFineTune(polish=0, steps=4, budget=BUDGET)),
    "guo": (replace(SOFTMAX, weight_decay=0.5), GuoRemoval(sigma=20.0, rows=550, removals=4)),
    "guo as published": (SOFTMAX, GuoRemoval(sigma=10.0, bound="paper")),
}


@cache
def removed(name):
    recipe, method = METHODS[name]
    rows = MANY if name == "guo" else ROWS
    place = recipe.epochs - getattr(method, "steps", 1)
    keep = Keep(every=place) if isinstance(method, RewindToDelete) else Keep()
    trained = method.fit(recipe, rows) if isinstance(method, GuoRemoval) else train(recipe, rows, keep=keep)
    for ids in (["r1", "r5"], ["r9"]):
        done = method(trained, rows, Request.remove(ids), rng=generator(0))
        trained = done.trained
    return done


def all_settings(name):
    return settings_of(METHODS[name][1], removed(name).trained.recipe)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_s_guarantee_is_computed_again_with_settings_and_releases(name):
    done = removed(name)
    assert recheck(done.guarantee, DERIVATIONS, all_settings(name), done.trained.releases) == ()
    assert done.guarantee.basis == {
        "head of a network": "conditional",
        "newton by a series": "conditional",
        "newton vouched for": "conditional",
        "newton measured": "none",
        "newton of nothing known": "none",
        "guo as published": "conditional",
    }.get(name, "proved")


@pytest.mark.parametrize("name", list(METHODS))
def test_every_setting_that_is_tampered_with_is_named(name):
    guarantee, settings = removed(name).guarantee, all_settings(name)
    used = {
        one.derivation.removeprefix(SETTING): constant
        for constant, one in guarantee.constants.items()
        if one.derivation.startswith(SETTING)
    }
    assert used
    for where, constant in used.items():
        for wrong in (settings | {where: settings[where] + 1}, {k: v for k, v in settings.items() if k != where}):
            found = recheck(guarantee, DERIVATIONS, wrong)
            assert any(line.startswith(f"{constant} is called the setting {where}, which is") for line in found)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_derived_number_that_is_tampered_with_is_named_whatever_is_said_of_its_source(name):
    guarantee = removed(name).guarantee
    for constant, one in guarantee.constants.items():
        if one.derivation in DERIVATIONS:
            for source in ("proved", "supplied", "estimated"):
                lie = replace(one, value=one.value * 0.97 + 1e-3, source=source)
                lying = replace(guarantee, constants={**guarantee.constants, constant: lie})
                assert any(line.startswith(f"{constant} is ") for line in recheck(lying, DERIVATIONS)), constant


@pytest.mark.parametrize("name", [name for name in METHODS if "guo" not in name and "nothing" not in name])
def test_releases_that_were_left_out_are_noticed(name):
    done = removed(name)
    assert len(done.trained.releases) == 2
    if done.guarantee.transcript is not None:
        assert recheck(done.guarantee, DERIVATIONS, None, done.trained.releases[1:])
        alone = replace(done.guarantee.transcript, releases=1)
        assert recheck(replace(done.guarantee, transcript=alone), DERIVATIONS, None, done.trained.releases)


@pytest.fixture
def accounted(monkeypatch):
    """Accounting of private training takes seconds, and is not what is tested here."""
    monkeypatch.setattr(private, "steps_noise", lambda *_: 2.0)
    monkeypatch.setattr(private, "steps_epsilon", lambda *_: 1.5)


def test_private_training_s_guarantee_is_computed_again(accounted):
    recipe = replace(SOFTMAX, batch_size=20)
    trained, guarantee = train_private(recipe, ROWS, epsilon=2.0, delta=1e-3, group=2, clip=0.5)
    (release,) = trained.releases
    assert isinstance(release, PrivateSteps)
    settings = settings_of(None, trained.recipe, release=release, arguments={"clip": 0.5, "delta": 1e-3})
    assert recheck(guarantee, DERIVATIONS, settings) == ()
    for name in ("release.group", "train_private.clip", "train_private.delta"):
        assert recheck(guarantee, DERIVATIONS, settings | {name: settings[name] * 2})


def test_every_formula_of_every_module_is_in_the_table():
    found = set()
    for module in pkgutil.iter_modules(certify.__path__):
        for value in vars(importlib.import_module(f"expunge.certify.{module.name}")).values():
            held = value.values() if isinstance(value, Mapping) else value
            held = held if isinstance(value, Mapping | tuple | list) else [held]
            found |= {one.name for one in held if isinstance(one, Derivation)}
    assert len(found) >= 30
    assert found == set(DERIVATIONS)
    assert all(name == one.name for name, one in DERIVATIONS.items())


def test_every_formula_says_what_it_gives():
    for derivation in DERIVATIONS.values():
        names = {name for done in map(removed, METHODS) for name in done.guarantee.constants} | set(STANDS_ON)
        given = {name for name in names if derivation.may_give(name)}
        assert len(given) == 1, (derivation.name, given)


def test_what_a_formula_says_itself_goes_before_and_silence_gives_nothing_that_a_guarantee_stands_on():
    silent = Derivation(name="silent", formula="", of=(), compute=float)
    assert silent.may_give("slope")
    assert not any(silent.may_give(name) for name in ("mu", "epsilon", "sensitivity", "sigma"))
    assert replace(silent, gives=("mu",)).may_give("mu")
    assert not replace(silent, gives=("mu",)).may_give("slope")
    assert not replace(silent, name="zhang-cg").may_give("slope")
    assert not replace(silent, name="zhang-cg", gives=("slope",)).may_give("sensitivity")


def test_two_formulas_of_one_name_are_refused():
    other = replace(GAUSSIAN_MU, compute=lambda *_: 0.0)
    assert list(merged([[GAUSSIAN_MU], [GAUSSIAN_MU]])) == ["gaussian-mu"]
    with pytest.raises(Misuse, match='two formulas have the name "gaussian-mu"'):
        merged([[GAUSSIAN_MU], [other]])
    with pytest.raises(TypeError):
        DERIVATIONS["gaussian-mu"] = other


def test_settings_have_the_names_that_constants_give_them():
    method = NewtonUnlearning(feature_radius=1.0, smoothness=None, budget=BUDGET)
    recipe = replace(SOFTMAX, sharding=Sharding(shards=2, slices=3)).completed(ROWS)
    found = settings_of(method, recipe)
    assert found["method.feature_radius"] == 1.0
    assert found["method.share"] == method.share
    assert (found["method.budget.epsilon"], found["method.budget.requests"]) == (3.0, 4.0)
    assert found["recipe.weight_decay"] == 0.1
    assert found["recipe.lr"] == 0.1
    assert found["recipe.epochs"] == 3.0
    assert (found["recipe.features"], found["recipe.classes"], found["recipe.outputs"]) == (4.0, 3.0, 3.0)
    assert found["recipe.sharding.shards"] == 2.0
    assert not {"method.smoothness", "method.sigma", "recipe.max_norm", "recipe.model", "method.solver"} & set(found)
    assert "model.parameters" not in found  # of an ensemble, whose parts are not here
    assert all(type(value) is float for value in found.values())


def test_settings_count_what_the_module_trains():
    recipe = replace(MLP, max_norm=5.0).completed(ROWS)
    assert settings_of(None, recipe)["model.parameters"] == 4 * 5 + 5 + 5 * 3 + 3
    module = nn.Linear(2, 3)
    module.bias.requires_grad = False
    assert settings_of(None, recipe, module=module)["model.parameters"] == 6
    assert settings_of(None) == {}


def test_settings_that_nothing_can_be_made_of_are_left_out():
    method = NewtonUnlearning(feature_radius=1.0, solver="lissa", rho=0.5)
    with pytest.raises(Misuse):
        _ = method.share
    assert "method.share" not in settings_of(method)
