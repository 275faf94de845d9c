"""What a guarantee says of its own numbers is computed again, and whoever lies about them is caught."""

import math
from dataclasses import replace

import pytest
from torch import nn

from expunge import Recipe
from expunge.certify.accountant import Budget, charge
from expunge.certify.constants import Derivation, derived, estimated, is_called, setting, supplied
from expunge.certify.guarantee import GAUSSIAN_MU, gaussian_mu, guarantee_of, recheck
from expunge.core.claim import Constant, Guarantee, Spent
from expunge.core.errors import Misuse
from expunge.core.events import ClippedModels, ClippedSteps, GaussianNoise, PrivateSteps, Release
from expunge.learn.build import build

CURVATURE = Derivation(
    name="curvature",
    formula="sensitivity = slope / weight_decay",
    of=("slope", "weight_decay"),
    compute=lambda slope, weight_decay: slope / weight_decay,
    gives=("sensitivity",),
)
DIRECT = Derivation(
    name="direct",
    formula="epsilon = sensitivity / sigma - ln(delta)",
    of=("sensitivity", "sigma", "delta"),
    compute=lambda sensitivity, sigma, delta: sensitivity / sigma - math.log(delta),
    gives=("epsilon",),
)
HALF = Derivation(name="half", formula="half of it", of=("slope",), compute=lambda slope: slope / 2)
AROUND = Derivation(
    name="around", formula="a = half of sensitivity", of=("sensitivity",), compute=lambda value: value / 2, gives=("a",)
)
BACK = Derivation(
    name="back", formula="sensitivity = 2 a", of=("a",), compute=lambda value: 2 * value, gives=("sensitivity",)
)
KNOWN = {derivation.name: derivation for derivation in (GAUSSIAN_MU, CURVATURE, DIRECT, HALF, AROUND, BACK)}
SETTINGS = {"method.sigma": 0.5, "method.slope": 0.02, "recipe.weight_decay": 0.1, "method.budget.delta": 1e-5}
ALONE = Spent(epsilon=1.6, delta=1e-5, mu=0.4, releases=1, budget_epsilon=5.0, budget_releases=9)


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
        build(Recipe(model="softmax", model_args={"shape": [2], "outputs": 2})),
        parameters=["head.weight", "head.bias"],
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
    "no mu, and no constant for epsilon": (
        lambda: replace(guarantee(), constants=without("mu"), mu=None, epsilon=0.5),
        "it is inf",
    ),
    "a mu by the formula of another constant": (
        lambda: guarantee(mu=Constant(0.2, "proved", "curvature")),
        "curvature, which does not say that it gives mu",
    ),
    "a sensitivity by a formula that does not say what it gives": (
        lambda: guarantee(sensitivity=Constant(0.01, "proved", "half")),
        "half, which does not say that it gives sensitivity",
    ),
    "a constant that is another's setting": (
        lambda: guarantee(weight_decay=setting(0.5, "method.sigma")),
        "weight_decay is called the setting method.sigma, which is another constant's",
    ),
    "a sensitivity that is another's setting": (
        lambda: guarantee(sensitivity=setting(0.02, "method.slope")),
        "sensitivity is called the setting method.slope, which is another constant's",
    ),
    "a sensitivity that is no setting of a method": (
        lambda: guarantee(sensitivity=setting(0.02, "recipe.sensitivity")),
        "sensitivity is called the setting recipe.sensitivity, which is another constant's",
    ),
    "a supplied number that its formula does not give": (
        lambda: guarantee(slope=supplied(0.02), sensitivity=Constant(0.001, "supplied", "curvature")),
        "curvature gives 0.2",
    ),
    "an estimated number that its formula does not give": (
        lambda: guarantee(slope=estimated(0.02), sensitivity=Constant(0.001, "estimated", "curvature")),
        "curvature gives 0.2",
    ),
    "a derived number called supplied that rests on an estimated one": (
        lambda: guarantee(slope=estimated(0.02), sensitivity=Constant(0.2, "supplied", "curvature")),
        "rests on constants that are estimated",
    ),
    "a supplied number that is no setting's": (
        lambda: guarantee(slope=Constant(0.01, "supplied", "setting method.slope")),
        "which is 0.02",
    ),
    "a bare mu that somebody vouches for": (lambda: guarantee(mu=supplied(0.001)), "nothing is said to give it"),
    "a mu that is a setting": (lambda: guarantee(mu=setting(0.5, "method.sigma")), "only a formula can give it"),
    "a bare sigma that somebody vouches for": (lambda: guarantee(sigma=supplied(9.0)), "nothing is said to give it"),
    "a bare epsilon that somebody vouches for": (
        lambda: directly(epsilon=supplied(0.5)),
        "epsilon is 0.5, and nothing is said to give it",
    ),
    "a smaller delta than its epsilon's": (lambda: replace(directly(), delta=1e-300), "epsilon holds at 1e-05"),
    "an epsilon by a formula without delta": (
        lambda: directly(epsilon=Constant(0.01, "proved", "half")),
        "no constant says at which delta",
    ),
    "an epsilon that hides a mu": (
        lambda: replace(guarantee(), mu=None, epsilon=0.1, constants={**constants(), "epsilon": supplied(0.1)}),
        "another figure hides it",
    ),
    "a second figure beside mu": (
        lambda: replace(guarantee(), constants={**constants(), **directly().constants}),
        "another figure hides it",
    ),
    "a mu that hides in the constants": (
        lambda: replace(guarantee(), mu=None, epsilon=0.1),
        "another figure hides it",
    ),
    "numbers in a circle": (
        lambda: guarantee(sensitivity=Constant(1e-3, "proved", "back"), a=Constant(5e-4, "proved", "around")),
        "in a circle",
    ),
    "endless noise": (lambda: guarantee(sigma=setting(math.inf, "method.sigma")), "nobody adds such noise"),
    "a number that is none": (lambda: with_constant("slope", supplied(math.nan)), "slope is no number"),
    "a formula that cannot be computed": (
        lambda: with_constant("weight_decay", setting(0.0, "recipe.weight_decay")),
        "sensitivity cannot be computed: float division by zero",
    ),
    "a mu below zero": (
        lambda: replace(guarantee(), mu=-1.0, constants={**constants(), "mu": supplied(-1.0)}),
        "epsilon cannot be computed",
    ),
    "no parameters": (lambda: replace(guarantee(), parameters=()), "it covers no parameters"),
    "a transcript that tells nothing": (
        lambda: replace(guarantee(), transcript=replace(ALONE, epsilon=0.0, mu=0.0)),
        "epsilon is said to be 0, and that of this release alone is 1.55",
    ),
    "a transcript of less mu than its last release": (
        lambda: replace(guarantee(), transcript=replace(ALONE, mu=0.3)),
        "mu is said to be 0.3, and that of this release alone is 0.4",
    ),
    "a transcript of less epsilon than its own mu": (
        lambda: replace(guarantee(), transcript=replace(ALONE, mu=0.9)),
        "that of its own mu is",
    ),
    "a transcript of no number": (
        lambda: replace(guarantee(), transcript=replace(ALONE, epsilon=math.nan)),
        "the transcript's epsilon nan is over its budget",
    ),
    "a transcript of no releases": (
        lambda: replace(guarantee(), transcript=replace(ALONE, releases=0)),
        "the transcript is of 0 releases",
    ),
    "a transcript of too many releases": (
        lambda: replace(guarantee(), transcript=replace(ALONE, releases=10)),
        "the transcript is of 10 releases, and its budget of 9",
    ),
    "a transcript over its budget": (
        lambda: replace(guarantee(), transcript=replace(ALONE, budget_epsilon=1.0)),
        "over its budget",
    ),
    "a transcript of another budget than the constants say": (
        lambda: replace(guarantee(budget_requests=setting(7, "method.budget.requests")), transcript=ALONE),
        "the budget's requests is said to be 9, and it is 7",
    ),
    "a transcript at another delta than was agreed on": (
        lambda: replace(guarantee(), transcript=replace(ALONE, delta=1e-2)),
        "the budget's delta is said to be 0.01, and it is 1e-05",
    ),
    "a transcript without mu that tells less than its last release": (
        lambda: replace(directly(), transcript=replace(ALONE, mu=None)),
        "epsilon is said to be 1.6, and it is 11.9",
    ),
    "a transcript with a mu that its last release lacks": (
        lambda: replace(directly(), transcript=replace(ALONE, epsilon=12.0, budget_epsilon=12.0)),
        "its last release has none",
    ),
    "all releases together, of which one tells less": (
        lambda: replace(guarantee(), releases="transcript", transcript=replace(ALONE, epsilon=2.0)),
        "it speaks of all releases",
    ),
}


def without(name):
    return {known: constant for known, constant in constants().items() if known != name}


def directly(**other):
    found = {**without("mu"), "delta": setting(1e-5, "method.budget.delta"), **other}
    found.setdefault("epsilon", derived(DIRECT, found))
    return replace(guarantee(), constants=found, mu=None, epsilon=found["epsilon"].value)


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
    honest = directly()
    assert recheck(honest, KNOWN, SETTINGS) == ()
    assert recheck(replace(honest, epsilon=1.9), KNOWN, SETTINGS) == ("epsilon is said to be 1.9, and it is 11.9129",)
    assert recheck(replace(honest, delta=1e-4), KNOWN, SETTINGS) == ()  # a larger delta is no lie
    spent = replace(ALONE, mu=None, epsilon=12.0, budget_epsilon=12.0)
    assert recheck(replace(honest, transcript=spent), KNOWN, SETTINGS) == ()


def test_an_epsilon_at_a_share_of_the_budget_s_delta_is_compared_with_that_share():
    shared = replace(DIRECT, of=("sensitivity", "budget_delta", "budget_requests"), compute=lambda *_: 2.0)
    budget = {
        "budget_delta": setting(1e-5, "method.budget.delta"),
        "budget_requests": setting(4, "method.budget.requests"),
    }
    honest = replace(directly(**budget, epsilon=Constant(2.0, "proved", "direct")), delta=1e-5 / 4)
    settings = {**SETTINGS, "method.budget.requests": 4.0}
    assert recheck(honest, KNOWN | {"direct": shared}, settings) == ()
    assert recheck(replace(honest, delta=1e-6), KNOWN | {"direct": shared}, settings) == (
        "delta is said to be 1e-06, and epsilon holds at 2.5e-06",
    )


def test_honest_transcripts_pass_alone_and_beside_their_releases():
    once = GaussianNoise(parameters=("head.weight", "head.bias"), sensitivity=0.2, sigma=0.5)
    budget = Budget(epsilon=5.0, requests=9)
    for before in ((), (once, once)):
        honest = replace(guarantee(), transcript=charge(before, once, budget))
        assert recheck(honest, KNOWN, SETTINGS) == ()
        assert recheck(honest, KNOWN, SETTINGS, (*before, once)) == ()
        assert recheck(honest, KNOWN, {**SETTINGS, "method.budget.epsilon": 4.0})
    mixed = ClippedModels(parameters=("weight", "bias"), radius=0.1, steps=3, sigma=0.5)
    honest = replace(guarantee(), transcript=charge((mixed,), once, budget))
    assert honest.transcript.mu is None
    assert recheck(honest, KNOWN, SETTINGS, (mixed, once)) == ()


GIVEN = GaussianNoise(parameters=("head.weight", "head.bias"), sensitivity=0.2, sigma=0.5)
RELEASES = {
    "fewer than were made": ((GIVEN, GIVEN), {}, "said to be of 1 releases, and it is of 2"),
    "more than were made": ((GIVEN,), {"releases": 2}, "said to be of 2 releases, and it is of 1"),
    "none was made": ((), {}, "said to be of 1 releases, and it is of 0"),
    "less mu than all have": (
        (GIVEN, GIVEN),
        {"releases": 2},
        "mu is said to be 0.4, and that of all releases is 0.5",
    ),
    "less epsilon than all have": (
        (GIVEN, GIVEN),
        {"releases": 2, "mu": 0.6, "epsilon": 1.7},
        "epsilon is said to be 1.7, and that of all releases is",
    ),
    "another release's sigma": ((replace(GIVEN, sigma=0.4),), {}, "that of the last release is 0.4"),
    "another release's mu": (
        (replace(GIVEN, sensitivity=0.3),),
        {"mu": 0.9, "epsilon": 4.0},
        "mu is said to be 0.4, and that of the last release is 0.6",
    ),
    "other parameters": ((replace(GIVEN, parameters=("weight",)),), {}, "the last release is of other parameters"),
    "a mu where the release has none": (
        (ClippedModels(parameters=("weight", "bias"), radius=0.1, steps=3, sigma=0.5),),
        {},
        "mu is said to be 0.4, and that of the last release is None",
    ),
    "a mu where not all releases have one": (
        (PrivateSteps(parameters=(), rate=0.1, noise=50.0, steps=1, group=1), GIVEN),
        {"releases": 2},
        "not all of its releases have one",
    ),
    "less epsilon than releases without mu have": (
        (ClippedModels(parameters=("weight", "bias"), radius=0.3, steps=1, sigma=0.5), GIVEN),
        {"releases": 2, "mu": None, "epsilon": 1.6},
        "epsilon is said to be 1.6, and it is ",
    ),
    "a kind that nobody can account for": (
        (Release(parameters=("weight", "bias")),),
        {"mu": None},
        "epsilon of all releases cannot be computed",
    ),
    "numbers that no release can have": (
        (ClippedSteps(parameters=("weight", "bias"), start=-1, gradient=1, lr=9, weight_decay=9, steps=1, sigma=0.5),),
        {},
        "cannot be computed",
    ),
}


@pytest.mark.parametrize("lie", list(RELEASES))
def test_transcripts_that_lie_about_their_releases_are_caught(lie):
    releases, told, problem = RELEASES[lie]
    found = recheck(replace(guarantee(), transcript=replace(ALONE, **told)), KNOWN, SETTINGS, releases)
    assert any(problem in line for line in found), found


def test_releases_without_a_transcript_are_caught_unless_nothing_is_claimed():
    assert recheck(guarantee(), KNOWN, SETTINGS, (GIVEN,)) == ("releases were made, and no transcript is given",)
    assert recheck(guarantee(slope=estimated(0.02)), KNOWN, SETTINGS, (GIVEN,)) == ()
    assert recheck(guarantee(), KNOWN, SETTINGS, ()) == ()


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
    for wrong, said in ((["nope"], "got nope"), ([], "got none")):
        with pytest.raises(Misuse, match=said):
            guarantee_of(
                nn.Linear(1, 1),
                parameters=wrong,
                constants=constants(),
                delta=1e-5,
                mechanism="",
                reference="",
                transcript=None,
            )
    with pytest.raises(Misuse, match="one of mu and epsilon"):
        guarantee(epsilon=supplied(1.0))
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


def test_endless_noise_and_endless_numbers_prove_nothing():
    assert guarantee(sigma=setting(math.inf, "method.sigma")).basis == "none"
    assert guarantee(slope=supplied(math.inf)).basis == "none"
    assert with_constant("slope", supplied(math.inf)).basis == "none"


def test_a_constant_is_called_as_its_setting_is():
    for name, where in (
        ("sigma", "method.sigma"),
        ("budget_delta", "method.budget.delta"),
        ("delta", "method.budget.delta"),
        ("classes", "recipe.outputs"),
    ):
        assert is_called(name, where)
    for name, where in (("delta", "method.budget.epsilon"), ("sigma", "method.budget"), ("a", "b.a.a")):
        assert not is_called(name, where)
