"""What a guarantee says of its own numbers is computed again, and whoever lies about them is caught."""

import math
from dataclasses import replace

import pytest
from torch import nn

from expunge.certify.constants import Derivation, derived, estimated, setting, supplied
from expunge.certify.guarantee import GAUSSIAN_MU, gaussian_mu, guarantee_of, recheck
from expunge.core.claim import Constant, Guarantee
from expunge.core.errors import Misuse

CURVATURE = Derivation(
    name="curvature",
    formula="sensitivity = slope / weight_decay",
    of=("slope", "weight_decay"),
    compute=lambda slope, weight_decay: slope / weight_decay,
)
KNOWN = {derivation.name: derivation for derivation in (GAUSSIAN_MU, CURVATURE)}
SETTINGS = {"method.sigma": 0.5, "method.slope": 0.02, "recipe.weight_decay": 0.1}


def constants(**other):
    found = {
        "sigma": setting(0.5, "method.sigma"),
        "slope": setting(0.02, "method.slope"),
        "weight_decay": setting(0.1, "recipe.weight_decay"),
        **other,
    }
    if "sensitivity" not in found:
        found["sensitivity"] = derived(CURVATURE, found)
    if "mu" not in found:
        found["mu"] = gaussian_mu(found)
    return found


def guarantee(**other):
    return guarantee_of(
        nn.Linear(2, 2),
        parameters=["weight", "bias"],
        constants=constants(**other),
        delta=1e-5,
        mechanism="one addition of noise",
        reference="retraining with the same noise",
        transcript=None,
    )


def test_an_honest_guarantee_passes():
    honest = guarantee()
    assert honest.basis == "proved"
    assert honest.mu == pytest.approx(0.4)
    assert recheck(honest, KNOWN, SETTINGS) == ()
    assert recheck(Guarantee.from_json(honest.to_json()), KNOWN, SETTINGS) == ()


def test_an_honest_guarantee_on_a_number_that_somebody_vouches_for_passes_and_is_conditional():
    vouched = guarantee(slope=supplied(0.02))
    assert vouched.basis == "conditional"
    assert vouched.constants["mu"].source == "supplied"
    assert recheck(vouched, KNOWN, SETTINGS) == ()


def test_an_honest_estimate_proves_nothing_and_says_so():
    measured = guarantee(slope=estimated(0.02))
    assert measured.basis == "none"
    assert {name for name, one in measured.constants.items() if one.source == "estimated"} == {
        "slope",
        "sensitivity",
        "mu",
    }
    assert recheck(measured, KNOWN, SETTINGS) == ()


def with_constant(name, constant):
    return replace(guarantee(), constants={**guarantee().constants, name: constant})


LIARS = {
    "a measured number under an unknown formula's name": (
        lambda: with_constant("slope", Constant(0.02, "proved", "power iteration")),
        "no known formula",
    ),
    "a measured number as a setting that the method does not have": (
        lambda: with_constant("slope", Constant(0.02, "proved", "setting method.measured_slope")),
        "not there",
    ),
    "a measured number as a setting that has another value": (
        lambda: guarantee(slope=setting(0.01, "method.slope")),
        "which is 0.02",
    ),
    "a derived number that its formula does not give": (
        lambda: guarantee(sensitivity=Constant(0.1, "proved", "curvature")),
        "curvature gives 0.2",
    ),
    "a derived number whose formula lacks a number": (
        lambda: replace(guarantee(), constants={k: v for k, v in guarantee().constants.items() if k != "slope"}),
        'there is no "slope"',
    ),
    "a derived number called proved that rests on an estimated one": (
        lambda: guarantee(slope=estimated(0.02), sensitivity=Constant(0.2, "proved", "curvature")),
        "rests on constants that are estimated",
    ),
    "a derived number called proved that rests on a supplied one": (
        lambda: guarantee(slope=supplied(0.02), sensitivity=Constant(0.2, "proved", "curvature")),
        "rests on constants that are supplied",
    ),
    "an epsilon that is too small": (lambda: replace(guarantee(), epsilon=1.0), "epsilon is said to be 1,"),
    "an epsilon with the factor alpha dropped": (
        lambda: replace(guarantee(sensitivity=setting(math.sqrt(0.5), "method.sensitivity")), epsilon=1.004),
        "epsilon is said to be 1.004",
    ),
    "a mu that no constant gives": (lambda: replace(guarantee(), mu=0.2), "mu is said to be 0.2"),
    "a sigma that no constant gives": (lambda: replace(guarantee(), sigma=5.0), "sigma is said to be 5"),
    "a sensitivity that no constant gives": (
        lambda: replace(guarantee(), sensitivity=0.01),
        "sensitivity is said to be 0.01",
    ),
    "no mu, and no constant for epsilon": (lambda: replace(guarantee(), mu=None, epsilon=0.5), "it is inf"),
}


@pytest.mark.parametrize("liar", list(LIARS))
def test_liars_are_caught(liar):
    made, problem = LIARS[liar]
    found = recheck(made(), KNOWN, SETTINGS)
    assert any(problem in line for line in found), found


def test_two_lies_that_agree_with_each_other_are_caught_by_the_settings_alone():
    agreeing = guarantee(slope=setting(0.01, "method.slope"))
    assert recheck(agreeing, KNOWN) == ()  # consistent in itself
    assert recheck(agreeing, KNOWN, SETTINGS) == ("slope is called the setting method.slope, which is 0.02",)


def test_a_larger_epsilon_than_needed_is_no_lie():
    assert recheck(replace(guarantee(), epsilon=100.0), KNOWN, SETTINGS) == ()


def test_an_epsilon_without_mu_is_compared_with_its_constant():
    direct = {**constants(), "epsilon": setting(2.0, "method.epsilon")}
    del direct["mu"]
    honest = replace(guarantee(), constants=direct, mu=None, epsilon=2.0)
    assert recheck(honest, KNOWN, {**SETTINGS, "method.epsilon": 2.0}) == ()
    assert recheck(replace(honest, epsilon=1.9), KNOWN, SETTINGS | {"method.epsilon": 2.0}) == (
        "epsilon is said to be 1.9, and it is 2",
    )


def test_a_derived_constant_is_no_better_than_the_worst_that_it_takes():
    taken = {"sensitivity": supplied(1.0), "sigma": setting(2.0, "method.sigma")}
    assert derived(GAUSSIAN_MU, taken) == Constant(0.5, "supplied", "gaussian-mu")
    assert derived(GAUSSIAN_MU, taken | {"sigma": estimated(2.0)}).source == "estimated"
    assert derived(GAUSSIAN_MU, taken | {"sensitivity": setting(1.0, "method.cap")}).source == "proved"
    assert derived(GAUSSIAN_MU, taken | {"sigma": setting(0.0, "method.sigma")}).value == math.inf
    with pytest.raises(Misuse, match="sigma"):
        derived(GAUSSIAN_MU, {"sensitivity": supplied(1.0)})


def test_a_guarantee_needs_its_constants_and_names_what_it_leaves_out():
    with pytest.raises(Misuse, match="a guarantee needs sigma"):
        guarantee_of(
            nn.Linear(1, 1),
            parameters=["weight"],
            constants={"sigma": setting(1.0, "method.sigma"), "mu": setting(1.0, "method.mu")},
            delta=1e-5,
            mechanism="",
            reference="",
            transcript=None,
        )
    partly = guarantee_of(
        nn.BatchNorm1d(2),
        parameters=["weight"],
        constants=constants(),
        delta=1e-5,
        mechanism="",
        reference="",
        transcript=None,
    )
    assert partly.outside == ("bias", "running_mean", "running_var", "num_batches_tracked")


def test_without_noise_nothing_is_proved():
    silent = guarantee(sigma=setting(0.0, "method.sigma"))
    assert silent.epsilon == math.inf
    assert silent.basis == "none"
