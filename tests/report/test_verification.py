"""The matrix as people read it: every word follows from the verdicts, and what nobody catches is said first."""

from __future__ import annotations

import itertools
import json

import pytest

from expunge.report import write
from expunge.report.verification import matrix_grid, reasons_grid, said, verification_report, worth_grid
from expunge.study.verification import Cell, Matrix

OUTCOMES = {
    "honest retrain": {"backdoor": ("pass", "pass"), "replay": ("pass", "pass"), "public coin": ("pass", "pass")},
    "lazy": {"backdoor": ("fail", "inconclusive"), "replay": ("fail", "fail"), "public coin": ("fail", "fail")},
    "retraining": {"backdoor": ("pass", "pass"), "replay": ("pass", "pass"), "public coin": ("fail", "fail")},
    "surrogate": {"backdoor": ("pass", "pass"), "replay": ("pass", "pass"), "public coin": ("pass", "not tried")},
}


def matrix(outcomes=OUTCOMES):
    about = {
        "rows": 3000,
        "owners": 10,
        "seed": 0,
        "recipe": {"model": "mlp"},
        "terms": {"askers": 1, "share": 0.5},
        "providers": list(outcomes),
        "verifiers": list(next(iter(outcomes.values()))),
        "honest": ["honest retrain"],
    }
    rows = {
        (seed, who): {
            name: {
                "outcome": told[seed],
                "check": "sampler, replay" if told[seed] == "fail" else "all",
                "why": "<b>why",
            }
            for name, told in row.items()
        }
        for (who, row), seed in itertools.product(outcomes.items(), range(2))
    }
    return Matrix(about=about, seeds=2, rows=rows)


def test_each_cell_says_what_happened_in_how_many_seeds():
    rows = {row[0]: row[1:] for row in matrix_grid(matrix()).rows}
    assert rows["honest retrain"] == ("passes 2", "passes 2", "passes 2", "(honest)")
    assert rows["lazy"] == ("caught 1, undecided 1", "caught 2", "caught 2", "2 of 3")
    assert rows["retraining"] == ("missed 2", "missed 2", "caught 2", "public coin only")
    assert rows["surrogate"] == ("missed 2", "missed 2", "missed 1, not tried 1", "NOBODY in 2 of 2")


@pytest.mark.parametrize(
    ("honest", "cell", "word"),
    [(True, (1, 0), "ACCUSED"), (True, (0, 1), "passes"), (False, (1, 0), "caught"), (False, (0, 1), "missed")],
)
def test_at_one_seed_a_cell_is_one_word(honest, cell, word):
    one = Cell(caught=cell[0], passed=cell[1], inconclusive=0, untried=0, checks=(), why="")
    assert said(one, honest, 1) == word


def test_who_catches_or_cannot_decide_says_with_what_power_at_least():
    found = matrix()
    rows = {key: {name: dict(told) for name, told in row.items()} for key, row in found.rows.items()}
    for seed, power in ((0, 0.9996), (1, 0.25)):
        for who in found.providers:
            rows[seed, who]["backdoor"]["figures"] = {"power": power}
    found = Matrix(about=found.about, seeds=2, rows=rows)
    assert said(found.cell("lazy", "backdoor"), False, 2) == "caught 1 (power 0.999), undecided 1 (power 0.250)"
    assert said(found.cell("retraining", "backdoor"), False, 2) == "missed 2"
    assert found.cell("lazy", "replay").power_caught is None
    assert found.to_json()["cells"]["lazy"]["backdoor"]["power_undecided"] == 0.25
    for seed in (0, 1):
        rows[seed, "lazy"]["backdoor"]["outcome"] = "fail"
    assert said(found.cell("lazy", "backdoor"), False, 2) == "caught 2 (power 0.250)"


def test_the_verdict_names_who_comes_past_whom():
    report = verification_report(matrix())
    assert "Honest providers are accused by any verifier in 0 (0 to 84) % of 2 runs." in report.verdict
    assert "Past backdoor and replay come retraining and surrogate." in report.verdict
    assert "By nothing but public coin is caught: retraining." in report.verdict
    assert "BY NOBODY in some seed: surrogate." in report.verdict
    assert not report.sound


def test_an_accused_honest_provider_is_no_sound_matrix():
    wrong = {**OUTCOMES, "honest retrain": {**OUTCOMES["honest retrain"], "replay": ("pass", "fail")}}
    wrong = {name: row for name, row in wrong.items() if name != "surrogate"}
    right = {name: row for name, row in OUTCOMES.items() if name != "surrogate"}
    assert verification_report(matrix(right)).sound
    report = verification_report(matrix(wrong))
    assert not report.sound
    assert "Of no use here: replay accuses honest providers." in report.verdict
    assert matrix_grid(matrix(wrong)).rows[0][2] == "ACCUSED 1, passes 1"
    assert worth_grid(matrix(wrong)).rows[1][1] == "accuses honest providers"


def test_reasons_name_checks_and_the_page_escapes_them(tmp_path):
    found = matrix()
    assert ("lazy", "replay", "sampler, replay", "<b>why") in reasons_grid(found).rows
    html, data = write(verification_report(found, "expunge verify matrix"), tmp_path)
    assert "<b>why" not in html.read_text()
    told = json.loads(data.read_text())
    assert told["chapters"]["verify"]["uncaught"] == ["surrogate"]
    assert "kept beside the served model" in html.read_text()
