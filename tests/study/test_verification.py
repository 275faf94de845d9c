"""The matrix of providers and verifiers: what each cell must be by construction, and who always says the same."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge import Recipe, Records, generator
from expunge.attack.providers import HonestRetrain
from expunge.attack.providers_hiding import near_copies
from expunge.core.errors import Misuse, Unsupported
from expunge.core.protocols import Verdict
from expunge.report.verification import matrix_grid, verdict, verification_report, worth_grid
from expunge.study.verification import verification
from expunge.study.verification_checks import NearCopies, ServedAlike, chance_of_near
from expunge.study.verification_ground import Terms
from expunge.study.verification_parties import HONEST, PROVIDERS, VERIFIERS, joined
from expunge.testing.case import digits
from expunge.verify.binomial import at_least

CASE = digits(rows=600, owners=8, careless=0)
ROWS, QUERIES = CASE.records, CASE.test
RECIPE = Recipe(model="mlp", model_args={"hidden": [32]}, epochs=6, batch_size=32, optimiser_args={"lr": 0.2})
TERMS = Terms(places=16, share=0.8, asked=60, every=8, shards=2)
SOME = ("honest retrain", "honest sisa", "lazy", "retraining, nearest row", "forging")
HIDING = ("surrogate data", "surrogate data, cleaned", "selective server", "retraining, nearest row again")


def matrix(*names, verifiers=None, **settings):
    chosen = {name: PROVIDERS[name] for name in names}
    given = {"seeds": 1, "rng": generator(0), "terms": TERMS, **settings}
    return verification(ROWS, QUERIES, RECIPE, providers=chosen, verifiers=verifiers, **given)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix") / "run"
    return folder, matrix(*SOME, *HIDING, keep=folder)


@pytest.fixture(scope="module")
def found(kept):
    return kept[1]


def outcomes(found, provider):
    cells = {name: found.cell(provider, name) for name in found.verifiers}
    return {name: "fail" if one.caught else "pass" if one.passed else "unsure" for name, one in cells.items()}


PASSES = dict.fromkeys(VERIFIERS, "pass")
EXPECTED = {
    "honest retrain": {},
    "lazy": {
        **dict.fromkeys(("backdoor", "replay", "replay, loose", "replay, sampler", "public coin"), "fail"),
        "served alike": "unsure",
    },
    "retraining, nearest row": {"public coin": "fail"},
    "retraining, nearest row again": {"replay, sampler": "fail", "public coin": "fail"},
    "surrogate data, cleaned": {"data audit": "fail"},
    "selective server": {"served alike": "fail"},
}


@pytest.mark.parametrize("provider", EXPECTED)
def test_each_cell_is_what_it_must_be_by_construction(found, provider):
    told, expected = outcomes(found, provider), PASSES | EXPECTED[provider]
    if expected["served alike"] == "pass":  # or the two models are too much alike to tell, which is no catch either
        assert told.pop("served alike") in ("pass", "unsure")
        expected.pop("served alike")
    assert told == expected


def test_forging_fails_at_the_measured_tolerance_and_passes_at_a_loose_one(found):
    assert found.cell("forging", "replay").checks == ("replay",)
    assert found.cell("forging", "replay, loose").passed == 1
    assert found.cell("forging", "public coin").caught == 1


def test_copies_of_stamped_rows_carry_the_trigger_along_and_cleaned_ones_do_not(found):
    told = outcomes(found, "surrogate data")
    assert (told["backdoor"], told["data audit"]) == ("fail", "fail")
    assert {told[name] for name in ("replay", "replay, sampler", "public coin")} == {"pass"}
    assert found.caught_by("surrogate data, cleaned") == ("data audit",)


def test_shards_are_replayed_one_by_one_and_never_accused(found):
    told = outcomes(found, "honest sisa")
    assert {told[name] for name in VERIFIERS if name != "backdoor"} == {"pass"}
    assert told["backdoor"] in ("pass", "unsure")


def test_what_follows_from_the_cells(found):
    assert found.honest == HONEST
    assert found.sound
    assert found.uncaught == ()
    wrong = found.accusations()
    assert (wrong.value, wrong.n) == (0, 2)
    assert {found.worth(name) for name in VERIFIERS} == {"fine"}
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["uncaught"] == []


def always(outcome):
    return lambda hearing: Verdict(check="always", outcome=outcome, why="whoever it is")


@pytest.fixture(scope="module")
def liars():
    every = {"yes": always("pass"), "no": always("fail"), "data audit": VERIFIERS["data audit"]}
    return matrix("honest retrain", "lazy", "surrogate data", verifiers=every)


def test_verifiers_that_always_say_the_same_are_exposed(liars):
    assert liars.worth("no") == "accuses honest providers"
    assert liars.worth("yes") == "catches nobody"
    assert liars.worth("data audit") == "fine"
    assert not liars.sound
    report = verification_report(liars)
    assert "no accuses honest providers" in report.verdict
    assert "yes catches nobody" in report.verdict
    assert "ACCUSED" in matrix_grid(liars).rows[0]


def test_without_whom_always_fails_a_lazy_provider_is_nobodys(liars):
    told = {key: {name: one for name, one in row.items() if name != "no"} for key, row in liars.rows.items()}
    rest = replace(liars, rows=told, about=liars.about | {"verifiers": ["yes", "data audit"]})
    assert rest.uncaught == ("lazy",)
    assert not rest.sound
    assert rest.accusations().value == 0
    assert matrix_grid(rest).rows[1][-1] == "NOBODY in 1 of 1"
    assert "BY NOBODY in some seed: lazy." in verification_report(rest).verdict


def test_a_finished_run_is_read_again_and_a_torn_one_is_gone_on_with(kept, monkeypatch):
    folder, first = kept
    made = []
    monkeypatch.setattr("expunge.study.verification._found", lambda hearing, _: made.append(hearing.name) or {})
    assert matrix(*SOME, *HIDING, keep=folder).to_json() == first.to_json()
    assert made == []
    with pytest.raises(Misuse, match=r"another study, which differs in terms\.asked"):
        matrix(*SOME, *HIDING, keep=folder, terms=replace(TERMS, asked=61))


def test_torn_cells_are_worked_out_again_to_the_same(kept, tmp_path):
    verifiers = {name: VERIFIERS[name] for name in ("data audit", "served alike")}
    folder = tmp_path / "run"
    first = matrix("honest retrain", "lazy", verifiers=verifiers, keep=folder)
    cells = folder / "cells.jsonl"
    cells.write_bytes(cells.read_bytes().splitlines(keepends=True)[0] + b'{"torn')
    assert matrix("honest retrain", "lazy", verifiers=verifiers, keep=folder).to_json() == first.to_json()


def test_seeds_can_be_added_to_a_run(tmp_path):
    verifiers = {"data audit": VERIFIERS["data audit"]}
    one = matrix("honest retrain", verifiers=verifiers, keep=tmp_path / "run")
    two = matrix("honest retrain", verifiers=verifiers, keep=tmp_path / "run", seeds=2)
    assert (one.accusations().n, two.accusations().n) == (1, 2)
    assert {seed for seed, _ in two.rows} == {0, 1}


class Refusing(HonestRetrain):
    def _answer(self, split, stays, rng):
        raise Unsupported("not with\nme")


def test_a_provider_that_cannot_work_is_said_so_and_is_no_catch():
    def make(ground, folder, draw):
        return Refusing(trained=ground.trained, records=ground.records)

    verifiers = {"replay": VERIFIERS["replay"]}
    found = verification(
        ROWS, QUERIES, RECIPE, seeds=1, providers={"shy": make}, verifiers=verifiers, terms=TERMS, rng=generator(0)
    )
    cell = found.cell("shy", "replay")
    assert (cell.untried, cell.tried, cell.why) == (1, 0, "Unsupported: not with me")
    assert found.caught_by("shy") == ()
    assert matrix_grid(found).rows[0][1:] == ("not tried", "(not tried)")
    assert (found.untried, found.uncaught) == (("shy",), ())
    assert "Not tried: shy (Unsupported: not with me)." in verdict(found)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(Misuse, match="one seed or more"):
        matrix("lazy", seeds=0)
    with pytest.raises(Misuse, match="8 of 8 owners cannot ask"):
        matrix("lazy", terms=replace(TERMS, askers=8))


# The two checks


def model(flips=0.0):
    """Labels by the sum of the row; `flips` share of rows answered otherwise."""

    def predict(x):
        total = x.flatten(1).double().sum(1)
        other = (total * 1e4).long() % 1000 < 1000 * flips
        return torch.where(other, 1, 0)

    return predict


def test_another_model_served_is_found_and_the_same_one_passes_with_its_power():
    check = ServedAlike(queries=QUERIES, before=model(0.2))
    same = check(model(), model(), rng=generator(0))
    assert same.outcome == "pass"
    assert same.figures["power"] > 0.999
    other = check(model(0.2), model(), rng=generator(0))
    assert (other.outcome, other.figures["power"]) == ("fail", same.figures["power"])
    assert check(model(0.01), model(), rng=generator(0)).outcome == "fail"


def test_serving_alike_is_not_said_where_it_could_not_have_been_seen():
    assert ServedAlike(queries=QUERIES)(model(), model(), rng=generator(0)).outcome == "inconclusive"
    alike = ServedAlike(queries=QUERIES, before=model())(model(), model(), rng=generator(0))
    assert (alike.outcome, alike.figures["power"]) == ("inconclusive", 0)
    few = ServedAlike(queries=QUERIES, before=model(0.2), asked=3)(model(), model(), rng=generator(0))
    assert few.outcome == "inconclusive"
    assert "ask about" in few.why
    with pytest.raises(Misuse, match="nothing to ask"):
        ServedAlike(queries=QUERIES.select([]))(model(), model(), rng=generator(0))


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_near_copies_among_the_rows_that_stay_are_found_whosever_they_are(noise):
    forgotten, stays = ROWS.select(range(60)), ROWS.select(range(60, 600))
    owners = [f"stranger-{place}" for place in range(len(stays))]
    stays = Records(stays.x, stays.y, stays.ids, owners, classes=10)
    audit = NearCopies()
    assert audit(stays, forgotten, rng=generator(0)).outcome == "pass"
    copies = near_copies(forgotten.select(range(12)), noise, generator(1))
    told = audit(stays.plus(copies), forgotten, rng=generator(0))
    assert told.outcome == "fail"
    assert told.figures["near"] >= 12


def test_an_audit_of_random_removals_accuses_at_its_rate():
    outcomes = []
    for seed in range(60):
        mixed = torch.randperm(len(ROWS), generator=generator(seed))
        forgotten, stays = ROWS.select(mixed[:40]), ROWS.select(mixed[40:])
        outcomes.append(NearCopies(alpha=0.05)(stays, forgotten, rng=generator(seed)).outcome)
    assert outcomes.count("fail") <= 7  # of 60 at 5 %: more than 7 has chance 1 %


def test_the_audits_chance_is_that_of_all_orders():
    for asked, controls in ((3, 4), (2, 5), (5, 2)):
        for within in range(controls):
            orders = list(itertools.combinations(range(asked + controls), asked))  # places of the rows asked
            before = [sum(place - i <= within for i, place in enumerate(places)) for places in orders]
            for near in range(asked + 1):
                exact = sum(one >= near for one in before) / len(orders)
                assert chance_of_near(near, asked, within, controls) == pytest.approx(exact)


def test_the_audit_accuses_no_oftener_than_it_says_of_many_rows_where_a_binomial_law_would():
    rng, wrong, liar = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        near = int((rng.random(1000) <= rng.random(100).min()).sum())
        wrong += chance_of_near(near, 1000, 1, 100) <= 1e-3
        liar += at_least(1000, near, 2 / 101) <= 1e-3
    assert wrong <= 8 < 30 < liar  # of 2,000 at 0.1 %: more than 8 has chance 0.02 %


def test_one_row_alone_cannot_be_told_from_chance_and_an_owners_other_rows_are_no_copies():
    mine, rest = ROWS.select([0, 0 + 1]), ROWS.select(range(2, 600))
    one = NearCopies()(rest.plus(near_copies(mine.select([0]), 0.0, generator(0))), mine.select([0]), rng=generator(0))
    assert one.outcome == "inconclusive"
    twins = Records(mine.x, mine.y, ["twin-0", "twin-1"], mine.owners, classes=10)
    assert NearCopies()(rest.plus(twins), mine, rng=generator(0)).figures["near"] == 0
    with pytest.raises(Misuse, match="give both"):
        NearCopies()(rest, mine.select([]), rng=generator(0))


def test_verdicts_join_to_the_worst_and_name_who_decided():
    def said(check, outcome):
        return Verdict(check=check, outcome=outcome, why=check)

    some = [said("a", "pass"), said("b", "fail"), said("c", "inconclusive"), said("d", "fail")]
    assert (joined(some).outcome, joined(some).check) == ("fail", "b, d")
    assert joined(some[:1] + some[2:3]).outcome == "inconclusive"
    assert joined(some[:2], without="b").outcome == "pass"


def test_lazy_and_selective_are_caught_with_the_power_that_was_computed(found):
    for provider, verifier in (("lazy", "backdoor"), ("selective server", "served alike")):
        cell = found.cell(provider, verifier)
        figures = found.rows[0, provider][verifier]["figures"]
        assert (cell.caught, cell.power_caught) == (1, figures["power"])
        assert cell.power_caught > 0.9
        line = next(row for row in matrix_grid(found).rows if row[0] == provider)
        assert line[1 + found.verifiers.index(verifier)].startswith("caught (power 0.9")
    unsure = [cell for who in found.providers if (cell := found.cell(who, "served alike")).inconclusive]
    assert all(0 <= cell.power_undecided < 1 - 1e-3 for cell in unsure)


def test_every_figure_of_the_table_is_in_the_json(found):
    data = found.to_json()["cells"]
    for row in matrix_grid(found).rows:
        for verifier, text in zip(found.verifiers, row[1:], strict=False):
            cell = data[row[0]][verifier]
            word = "ACCUSED" if row[0] in HONEST else "caught"
            assert (word in text) == (cell["caught"] > 0)
    assert [row[0] for row in worth_grid(found).rows] == list(VERIFIERS)
