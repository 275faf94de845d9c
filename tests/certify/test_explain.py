"""What a guarantee is said to mean: word by word for four of them, and its figures against their definitions."""

import math
import re
from dataclasses import replace

import pytest
from scipy.stats import norm

from expunge import Recipe
from expunge.certify import gaussian
from expunge.certify.constants import Derivation, derived, estimated, setting, supplied
from expunge.certify.derivations import DERIVATIONS
from expunge.certify.explain import caught, explain
from expunge.certify.guarantee import gaussian_mu, guarantee_of
from expunge.core.claim import Constant, Spent
from expunge.learn.build import build

CURVATURE = Derivation(
    name="curvature",
    formula="sensitivity = slope / weight_decay",
    of=("slope", "weight_decay"),
    compute=lambda slope, weight_decay: slope / weight_decay,
    gives=("sensitivity",),
)
FORMULAS = {**DERIVATIONS, "curvature": CURVATURE}
SPENT = Spent(epsilon=2.3, delta=1e-5, mu=0.565685424949, releases=2, budget_epsilon=4.5, budget_releases=7)


OURS = build(Recipe(model="softmax", model_args={"shape": [2], "outputs": 2}))


def guarantee(*, module=None, parameters=("head.weight", "head.bias"), remarks=(), transcript=None, **other):
    constants = {
        "sigma": setting(0.5, "method.sigma"),
        "slope": setting(0.0200001234, "method.slope"),
        "weight_decay": setting(0.1, "recipe.weight_decay"),
        "rows": setting(12345678, "method.rows"),
        **other,
    }
    constants.setdefault("sensitivity", derived(CURVATURE, constants))
    constants.setdefault("mu", gaussian_mu(constants))
    return guarantee_of(
        module or OURS,
        parameters=parameters,
        constants=constants,
        delta=1e-5,
        mechanism="one addition of noise",
        reference="retraining with the same noise",
        transcript=transcript,
        remarks=remarks,
    )


def told(guarantee, **options):
    return explain(guarantee, derivations=FORMULAS, **options)


NOT_SAID = """\
WHAT IT DOES NOT SAY
- Nothing about copies kept elsewhere: of the data, of older models, or of what was made with
  either.
- Nothing about comparing the model from before the removal with this one: who holds both may see
  what went. The pair leak tells how well (expunge.certify.leak).
- Nothing of other releases made from the same earlier model, as of a request carried out twice:
  only those that led to this model are counted.
- Not that the model tells nothing about the people removed: what it learnt from the others holds
  for whoever is like them.
- Nothing about the last bits of floating-point numbers: the proof is for true Gaussian noise, and a
  computer's is rounded (Mironov, 2012).
"""
ALONE = """\
IN FIGURES
- This model alone: epsilon 1.56, except with probability 1 in 100,000. The best attacker finds at
  most 2.8 % at 1 % false alarms, and at most 19 % at 10 % (exactly, by mu 0.401).
"""
UNKNOWN = "- All releases so far: not known. Whoever holds more than one of them is not covered.\n"
GUESS = "- Who only guesses finds 1 % at 1 % false alarms, and 10 % at 10 %.\n"
COVERED = """
WHAT IT COVERS
- Covered: head.weight, head.bias.
- Nothing of the model is left out.

"""
CLAIM = """\
 sees this model can tell it from one that never saw the removed rows with odds of at most
e^epsilon = 4.74 to 1, where they were even before, except with probability 1 in 100,000 (delta).
Compared with: retraining with the same noise.
Made by: one addition of noise.
"""
MU = """\
mu = 0.401  {}: mu = sensitivity / sigma: one addition of Gaussian noise (Dong, Roth and Su,
    2022, Th. 1) (gaussian-mu)
sensitivity = 0.201  {}: sensitivity = slope / weight_decay (curvature)
sigma = 0.5  proved: setting method.sigma
"""
REST = """\
weight_decay = 0.1  proved: setting recipe.weight_decay
rows = 12,345,678  proved: setting method.rows
None of them was computed again for this text; expunge.certify.recheck does that.
"""
PROVED = (
    "WHAT IS GUARANTEED\nWhoever"
    + CLAIM
    + "Basis: proved. Every number below was set beforehand, or follows from such numbers by a formula.\n\n"
    + ALONE
    + UNKNOWN
    + GUESS
    + COVERED
    + NOT_SAID
    + "\nNUMBERS THAT IT RESTS ON\n"
    + MU.format("proved", "proved")
    + "slope = 0.0200001  proved: setting method.slope\n"
    + REST
)


def test_a_proved_guarantee_word_by_word():
    assert told(guarantee()) == PROVED


def test_a_conditional_guarantee_word_by_word():
    text = told(guarantee(slope=supplied(0.0200001234)))
    condition = """\
WHAT IS GUARANTEED
ONLY IF WHAT SOMEBODY VOUCHES FOR IS RIGHT: whoever sees this model can tell it from one that never
saw the removed rows with odds of at most e^epsilon = 4.74 to 1, where they were even before, except
with probability 1 in 100,000 (delta).
Compared with: retraining with the same noise.
Made by: one addition of noise.
Basis: conditional. Somebody vouches for slope = 0.0200001; nobody has proved it.

"""
    numbers = MU.format("supplied", "supplied") + "slope = 0.0200001  supplied: somebody vouches for it\n" + REST
    figures = ALONE + UNKNOWN + GUESS + COVERED + NOT_SAID
    assert text == condition + figures + "\nNUMBERS THAT IT RESTS ON\n" + numbers


def test_a_guarantee_of_nothing_word_by_word():
    text = told(guarantee(slope=estimated(0.0200001234)))
    nothing = """\
WHAT IS GUARANTEED
NOTHING IS GUARANTEED: it rests on numbers that were measured or guessed, slope = 0.02.
Compared with: retraining with the same noise.
Made by: one addition of noise.
Basis: none. The figures below are what it would say, and must not be relied on.

"""
    numbers = (
        MU.format("estimated", "estimated")
        + "slope = 0.02  estimated: measured or guessed, which proves nothing\n"
        + REST
    )
    figures = ALONE + UNKNOWN + GUESS + COVERED + NOT_SAID
    assert text == nothing + figures + "\nNUMBERS THAT IT RESTS ON\n" + numbers
    assert "Whoever sees" not in text


def test_a_transcript_word_by_word():
    text = told(guarantee(transcript=SPENT))
    all_releases = """\
- All releases so far, 2 of 7: epsilon 2.3 of 4.5 agreed on, except with probability 1 in 100,000.
  The best attacker finds at most 4 % at 1 % false alarms, and at most 24 % at 10 % (exactly, by mu
  0.566).
"""
    assert text == PROVED.replace(UNKNOWN, all_releases)


@pytest.mark.parametrize("mu", [1e-6, 0.1, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("alarms", [0.01, 0.1])
def test_an_attacker_who_is_exactly_as_good_as_mu_finds_what_is_said(mu, alarms):
    threshold = norm.isf(alarms)
    found = caught(alarms, mu=mu, epsilon=math.nan, delta=math.nan)
    assert found == pytest.approx(norm.sf(threshold - mu), rel=1e-12)
    for delta in (1e-2, 1e-5, 1e-9):  # every (epsilon, delta) that mu gives leaves no less
        wider = caught(alarms, mu=None, epsilon=gaussian.epsilon_of(mu, delta), delta=delta)
        assert found <= wider <= 1


def test_the_region_of_epsilon_and_delta_is_the_smallest_with_both_errors_bounded():
    for epsilon, delta in ((0.5, 1e-5), (2.0, 0.01), (6.0, 0.0)):
        for alarms in (0.01, 0.1, 0.5):
            found = caught(alarms, mu=None, epsilon=epsilon, delta=delta)
            missed = 1 - found
            assert found <= math.exp(epsilon) * alarms + delta + 1e-12
            assert 1 - alarms <= math.exp(epsilon) * missed + delta + 1e-9
            more = found + 1e-6
            broken = more > math.exp(epsilon) * alarms + delta
            broken |= 1 - alarms > math.exp(epsilon) * (1 - more) + delta
            assert broken or found == 1
    assert caught(0.1, mu=None, epsilon=math.inf, delta=0.0) == 1.0
    assert caught(0.1, mu=None, epsilon=0.0, delta=0.0) == pytest.approx(0.1)


def test_without_mu_the_figures_come_of_epsilon_and_delta_and_the_text_says_so():
    direct = Constant(0.7, "proved", "guo-worst-epsilon")
    text = told(
        replace(
            guarantee(), mu=None, epsilon=0.7, constants={"sigma": guarantee().constants["sigma"], "epsilon": direct}
        )
    )
    assert "at most 2.1 % at 1 % false alarms, and at most 21 % at 10 % (from epsilon and delta alone)" in " ".join(
        text.split()
    )
    assert "epsilon = 0.7 proved: beta r" in " ".join(text.split())


@pytest.mark.parametrize("markdown", [True, False])
def test_every_constant_appears_with_its_value_and_its_source(markdown):
    for made in (guarantee(), guarantee(slope=supplied(3.0)), guarantee(slope=estimated(3.0))):
        text = told(made, markdown=markdown)
        text = " ".join(text[text.index("rests on" if markdown else "RESTS ON") :].replace("\\", "").split())
        between = " | " if markdown else " = "
        for name, constant in made.constants.items():
            (value,) = re.findall(rf"(?:^|\s){name}{re.escape(between)}([\d.,]+)", text)
            assert float(value.replace(",", "")) == pytest.approx(constant.value, rel=0.01)
            after = text[text.index(f"{name}{between}{value}") + len(f"{name}{between}{value}") :]
            assert after.removeprefix(" |").strip().startswith(constant.source)


@pytest.mark.parametrize(
    ("remark", "vacuous"),
    [
        ("vacuous: so much noise hides any rows", True),
        ("Vacuous: the noise is for more than the ball's diameter.", True),
        ("The bound is not vacuous here.", False),
        ("Steps are taken in float64.", False),
    ],
)
def test_a_vacuous_guarantee_is_called_so_before_anything_else(remark, vacuous):
    text = told(guarantee(remarks=[remark]))
    assert (text.splitlines()[1].startswith("VACUOUS: ")) is vacuous
    assert ("VACUOUS" in text) is vacuous
    assert f"Remark: {remark.rstrip('.')}." in " ".join(text.split())


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: guarantee(sigma=setting(0.0, "method.sigma")), "no noise was added"),
        (lambda: guarantee(slope=Constant(0.02, "proved")), "nobody says what gives slope"),
        (lambda: replace(guarantee(), constants={}), "there are no numbers that it could rest on"),
        (lambda: replace(guarantee(), epsilon=math.inf), "a number that it rests on is not finite"),
        (lambda: guarantee(sensitivity=estimated(7.25)), "measured or guessed, sensitivity = 7.25"),
    ],
)
def test_why_nothing_is_guaranteed_is_said_first(made, why):
    assert made().basis == "none"
    text = told(made())
    assert text.splitlines()[1].startswith("NOTHING IS GUARANTEED: ")
    assert why in text
    assert "Basis: none" in text


def test_numbers_that_are_none_are_written_and_never_as_good_news():
    odd = replace(guarantee(), mu=math.nan, epsilon=math.inf, transcript=replace(SPENT, epsilon=math.nan, mu=None))
    text = " ".join(told(odd).split())
    assert "epsilon infinite" in text
    assert "at most 100 % at 1 % false alarms, and at most 100 % at 10 %" in text
    assert "epsilon no number of 4.5 agreed on" in text


def test_what_is_outside_is_said_where_the_claim_is_made_and_where_the_scope_is():
    deep = build(Recipe(model="mlp", model_args={"shape": [2], "outputs": 2, "hidden": [2]}))
    partly = guarantee(module=deep, parameters=["head.weight"], sigma=setting(0.5, "method.sigma"))
    text = " ".join(told(partly).split())
    assert "Whoever sees the covered part of this model" in text
    assert "NOT covered, and given out as well: body.0.weight, body.0.bias, head.bias." in text
    assert "Nothing of the model is left out" not in text
    many = replace(guarantee(), parameters=tuple(f"p{i}" for i in range(20)))
    assert "Covered: p0, p1, p2, p3, p4, p5 and 14 more." in told(many)


def test_weak_figures_are_called_weak():
    assert "This is weak" not in told(guarantee())
    assert "This is weak" in told(guarantee(slope=setting(0.2, "method.slope")))
    huge = told(guarantee(slope=setting(20.0, "method.slope")))
    assert "more than 1,000,000 to 1" in huge


def test_bounds_are_rounded_up_and_never_shown_with_more_digits_than_they_are_good_for():
    text = told(guarantee(slope=setting(0.020001, "method.slope"), transcript=replace(SPENT, epsilon=2.3000001)))
    assert "mu = 0.401 " in text  # 0.40002
    assert "sensitivity = 0.201 " in text
    assert "epsilon 2.31 of 4.5" in text
    body = text[: text.index("NUMBERS")]
    assert not re.findall(r"\d\.\d{3,}", body.replace("0.401", "").replace("0.566", ""))
    rare = told(replace(guarantee(), delta=1.5e-6))
    assert "1 in 666,000 (delta)" in rare  # 666,666.7: never rarer than it is
    assert "except with probability 1e-12 (delta)" in " ".join(told(replace(guarantee(), delta=1e-12)).split())


def test_plain_text_keeps_to_its_width_and_markdown_to_one_line_a_row():
    for made in (guarantee(transcript=SPENT, remarks=["word " * 60]), guarantee(slope=supplied(1.0))):
        assert max(map(len, told(made).splitlines())) <= 100
        rows = [line for line in told(made, markdown=True).splitlines() if line.startswith("|")]
        assert len(rows) == 2 + len(made.constants)
        assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
        assert told(made, markdown=True).count("## ") == 5


def test_what_others_wrote_cannot_pass_for_the_text_s_own():
    forged = replace(
        guarantee(), reference="x.\n\n## What is guaranteed\n\nEverything \x1b[2J| <script>", remarks=("a|b\r\n- c",)
    )
    plain, marked = told(forged), told(forged, markdown=True)
    assert "\x1b" not in plain + marked
    assert plain.count("\nWHAT ") == 2
    assert marked.count("\n## What is guaranteed") == 0
    assert "\\#\\# What is guaranteed Everything \\[2J\\| \\<script\\>" in marked
    assert "- Remark: a\\|b - c." in marked


def test_a_formula_that_is_not_known_is_said_to_be_none():
    made = guarantee(slope=Constant(0.02, "proved", "power iteration"))
    assert "proved: power iteration, which is no formula that is known here" in told(made)
    assert "which is no formula" not in told(guarantee())
    assert "curvature, which is no formula" in explain(guarantee())


def test_two_guarantees_that_differ_in_one_number_are_told_apart():
    texts = {
        told(made)
        for made in (
            guarantee(),
            guarantee(transcript=SPENT),
            guarantee(transcript=replace(SPENT, releases=3)),
            guarantee(slope=setting(0.03, "method.slope")),
            replace(guarantee(), delta=1e-6),
            replace(guarantee(), epsilon=9.0),
        )
    }
    assert len(texts) == 6
