import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.core.claim import Claim
from expunge.core.errors import Unsupported
from expunge.core.recipe import Sharding
from expunge.testing import CHECKS, EXCEPTIONS, LIARS, Case, Foreign, conformance, digits
from expunge.testing.plain import Plain
from expunge.unlearn import FineTune, GradientAscent, NegGradPlus, RandomLabels, Retrain, RetrainBriefly, Sisa

HONEST = {
    "plain": Plain(),
    "retrain": Retrain(),
    "retrain-fresh": Retrain(coins="fresh"),
    "retrain-briefly": RetrainBriefly(),
    "sisa": Sisa(),
    "fine-tune": FineTune(),
    "gradient-ascent": GradientAscent(),
    "neg-grad-plus": NegGradPlus(),
    "random-labels": RandomLabels(),
}
NAMES = tuple(check.name for check in CHECKS)


@pytest.mark.parametrize("name", HONEST)
def test_honest_methods_pass_at_their_defaults(name):
    report = conformance(HONEST[name])
    assert report.passed, report
    assert tuple(verdict.check for verdict in report.verdicts) == NAMES


@pytest.mark.parametrize("name", LIARS)
def test_each_liar_is_caught_by_its_check(name):
    lie = LIARS[name]
    check = next(check for check in CHECKS if check.name == lie.caught_by)
    report = conformance(lie.method, train=lie.train, checks=[check])
    verdict = report[lie.caught_by]
    assert verdict.outcome == "fail", report
    assert not verdict.why.startswith("raised"), f"caught by a crash, not by the check: {verdict}"
    assert not report.passed


def test_every_check_has_a_liar():
    assert {lie.caught_by for lie in LIARS.values()} == set(NAMES)


def test_only_whether_it_is_of_use_here_and_what_noise_hides_are_excepted():
    useless = {"bad-teacher", "fisher-forgetting", "selective-synaptic-dampening"}
    hidden = {"clipped-fine-tune", "clipped-model-fine-tune"}
    assert set(EXCEPTIONS) == useless | hidden
    assert all(set(EXCEPTIONS[name]) == {"nearer-than-standing-still"} for name in useless)
    assert all(set(EXCEPTIONS[name]) == {"row-order", "gone-stays-gone", "replacements-learnt"} for name in hidden)


def test_retrain_of_a_sharded_model_conforms_too():
    case = digits()
    sharded = Case(records=case.records, test=case.test, recipes=case.recipes[1:], request=case.request)
    names = {"input-untouched", "row-order", "exact-equals-scratch"}
    report = conformance(Retrain(), case=sharded, checks=[check for check in CHECKS if check.name in names])
    assert report.passed, report


def fine_tune(module, forget, retain, rng):
    student = copy.deepcopy(module)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(50):
        optimiser.zero_grad()
        nn.functional.cross_entropy(student(retain[0]), retain[1]).backward()
        optimiser.step()
    return student


def shallow_fine_tune(module, forget, retain, rng):
    student = copy.copy(module)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5)
    optimiser.zero_grad()
    nn.functional.cross_entropy(student(retain[0]), retain[1]).backward()
    optimiser.step()
    return student


def wrong_sign(module, forget, retain, rng):
    student = copy.deepcopy(module)
    loss = nn.functional.cross_entropy(student(forget[0]), forget[1])
    for parameter, gradient in zip(student.parameters(), torch.autograd.grad(loss, student.parameters()), strict=True):
        parameter.data -= gradient
    return student


WRONG_SIGN = Foreign("wrong-sign", wrong_sign, learns_new=False)


def test_foreign_function_that_is_right_conforms():
    report = conformance(Foreign("fine-tune", fine_tune))
    assert report.passed, report


def test_foreign_function_on_a_shallow_copy_is_caught():
    report = conformance(Foreign("shallow", shallow_fine_tune))
    assert {"input-untouched", "reference-fixed"} <= set(report.failed)


def test_foreign_function_of_the_wrong_sign_is_caught():
    assert conformance(WRONG_SIGN).failed == ("nearer-than-standing-still",)


def test_foreign_function_that_trains_on_no_retained_row_must_refuse_replacements():
    check = [check for check in CHECKS if check.name == "replacements-learnt"]
    unsaid = conformance(Foreign("wrong-sign", wrong_sign), checks=check)
    assert not unsaid.passed
    assert "they are not trained on" in unsaid["replacements-learnt"].why
    assert conformance(WRONG_SIGN, checks=check).passed


def test_foreign_claim_of_exactness_is_tested():
    report = conformance(Foreign("boast", fine_tune, claim=Claim.EXACT, exactness="pathwise"))
    assert "exact-equals-scratch" in report.failed


def test_foreign_error_is_a_finding_with_its_message():
    def broken(module, forget, retain, rng):
        raise RuntimeError("out of cheese")

    report = conformance(Foreign("broken", broken))
    assert not report.passed
    assert "RuntimeError: out of cheese" in report["input-untouched"].why


def test_known_exceptions_pass_and_needless_ones_do_not():
    known = {"nearer-than-standing-still": "goes the other way"}
    report = conformance(WRONG_SIGN, exceptions=known)
    assert report.passed
    assert "[known: goes the other way]" in str(report)
    needless = conformance(Foreign("fine-tune", fine_tune), exceptions=known)
    assert not needless.passed
    assert needless.needless == tuple(known)


def test_report_is_a_value():
    report = conformance(GradientAscent(), seeds=(0, 1))
    data = json.loads(json.dumps(report.to_json()))
    assert [verdict["check"] for verdict in data["verdicts"]] == list(NAMES)
    assert data["method"] == "gradient-ascent"
    assert str(report).count("\n") == len(NAMES)


def test_one_seed_is_inconclusive_and_so_not_passed():
    report = conformance(FineTune(), seeds=(0,))
    assert report["nearer-than-standing-still"].outcome == "inconclusive"
    assert report.failed == ("nearer-than-standing-still",)


def test_a_method_that_supports_no_recipe_of_the_case_raises():
    case = digits()
    whole = Case(records=case.records, test=case.test, recipes=case.recipes[:1], request=case.request)
    with pytest.raises(Unsupported, match="use retrain"):
        conformance(Sisa(), case=whole)


def test_the_case_is_real_and_shows_forgetting():
    case = digits()
    assert len(case.records) == 480
    assert len(set(case.records.owners)) == 40
    assert set(case.forget.owners) == {f"owner-0{number}" for number in range(4)}
    assert not set(case.records.ids) & set(case.test.ids)
    assert replace(case.recipes[0], sharding=Sharding(shards=4, slices=2, aggregate="mean")) == case.recipes[1]
