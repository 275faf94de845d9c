"""`expunge compare` as its users meet it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from expunge.cli import parser
from expunge.unlearn import FineTune
from tests.cli.conftest import TABLE, write_customers

BASE = (
    *("compare", "--data", "t.csv", *TABLE, "--model", "mlp", "--epochs", "2"),
    *("--methods", "fine-tune,gradient-ascent", "--scenarios", "random:0.2,owner:c-3", "--sparsities", "0,0.5"),
)
WHOLE = (*BASE, "--holdout", "0.3", "--seeds", "2", "--folder", "s")


@pytest.fixture
def table(tmp_path):
    return write_customers(tmp_path / "t.csv")


def test_a_table_a_page_and_the_same_again(expunge, table, tmp_path):
    whole = (*WHOLE, "--scenarios", "random:0.2")
    said = expunge(*whole)
    assert (said.code, said.err) == (0, "")
    for caption in ("random:0.2, dense", "random:0.2, 50 % sparse"):
        assert said.out.count(f"Forgetting {caption}\n") == 1
    assert said.out.count("MIA-eff.: share of the removed rows") == 1  # the columns are explained once
    assert re.search(r"(?m)^Of 4 rows \(a method, a scenario and a sparsity\), \d are nearer", said.out)
    page = (tmp_path / "s" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "<span>--scenarios</span> <span>random:0.2</span>" in page  # the command itself
    cells = (tmp_path / "s" / "cells.jsonl").read_bytes()
    assert cells.count(b"\n") == 2 * 2 * (2 + 2 * 2)
    again = expunge(*whole)
    assert (again, (tmp_path / "s" / "cells.jsonl").read_bytes()) == (said, cells)
    data = json.loads(expunge(*whole, "--json").out)
    assert [line["method"] for line in data["lines"][:4]] == ["original", "retrain", "fine-tune", "gradient-ascent"]
    assert data["lines"][1]["figures"]["gap"]["value"] == 0
    assert (data["report"], data["records"]["rows"] + data["test"]["rows"]) == ("s/report.html", 60)
    assert data["settings"]["seeds"] == [0, 1]


def test_an_interruption_says_how_to_go_on_and_loses_nothing(expunge, table, tmp_path, monkeypatch):
    calls, original = [], FineTune._apply

    def pressed(self, task, *, rng):
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, task, rng=rng)

    monkeypatch.setattr(FineTune, "_apply", pressed)
    said = expunge(*WHOLE)
    assert (said.code, said.out) == (4, "")
    assert said.err == ("error: interrupted: 8 of 48 cells are finished and kept in s; go on with the same command\n")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "s" / "cells.jsonl").read_bytes()
    finished = expunge(*WHOLE)
    assert finished.code == 0
    assert (tmp_path / "s" / "cells.jsonl").read_bytes().startswith(before)


def test_without_test_rows_it_says_not_measured(expunge, table):
    said = expunge(*BASE, "--seeds", "1", "--folder", "s", "--sparsities", "0", "--methods", "fine-tune")
    assert said.code == 0
    assert "not measured" in said.out
    assert "One seed. Intervals (95 %) are over rows of one training" in re.sub(r"\s+", " ", said.out)


def test_a_search_and_settings_are_recorded(expunge, table, tmp_path):
    words = ("--trials", "3", "--set", "fine-tune.lr=0.02", "--set", "fine-tune.epochs=1", "--floor")
    data = json.loads(expunge(*WHOLE, *words, "--sparsities", "0", "--json").out)
    assert [one["trials"] for one in data["chosen"]] == [3] * 4
    given = data["settings"]["methods"]["fine-tune"]
    assert (given["lr"], given["epochs"]) == (0.02, 1)
    assert data["settings"]["searched"]["fine-tune"]["lr"] == ["log-uniform", 0.001, 0.2]
    assert {line["kind"] for line in data["lines"]} == {"original", "retrain", "floor", "method"}
    said = expunge(*WHOLE, *words, "--sparsities", "0")
    assert "What the search chose" in said.out
    assert "set aside" not in said.err


def test_ids_are_read_from_a_file(expunge, table, tmp_path):
    (tmp_path / "who.txt").write_text("r-3\n\nr-7 \n")
    words = ("--scenarios", "ids:who.txt", "--seeds", "1", "--sparsities", "0", "--folder", "s", "--json")
    data = json.loads(expunge(*BASE, *words).out)
    assert data["settings"]["scenarios"]["ids:who.txt"]["ids"] == ["r-3", "r-7"]
    assert {cell["row"]["forget"]["n"] for cell in data["cells"]} == {2}


def test_every_step_can_be_kept_for_methods_that_need_it(expunge, table, monkeypatch):
    kept = []
    monkeypatch.setattr(FineTune, "supports", lambda self, trained: kept.append(trained.log))
    for more, count in ((("--keep-steps",), 2 * 1), ((), 0)):
        kept.clear()
        words = ("--seeds", "1", "--sparsities", "0", "--scenarios", "owner:c-3", "--methods", "fine-tune")
        assert expunge(*BASE, *words, "--folder", f"s{count}", *more).code == 0
        assert len(kept[0].checkpoints) == len(kept[0].batches) == count


WRONG = {
    "no folder": ("--holdout 0.3", "Missing option '--folder'"),
    "unknown method": ("--folder s --methods fine-tone", 'unknown method "fine-tone"; known: '),
    "the reference": ("--folder s --methods retrain,fine-tune", "retraining is always there"),
    "a method twice": ("--folder s --methods fine-tune,fine-tune", "names fine-tune twice"),
    "no method": ("--folder s --methods ,", "a study needs methods"),
    "unknown scenario": ("--folder s --scenarios clas:3", 'unknown scenario "clas:3"; give class:3, random:0.1'),
    "a class that is not there": ("--folder s --scenarios class:7", "class 7 holds no record here"),
    "an owner who is not there": ("--folder s --scenarios owner:me", 'owner "me" holds no record here'),
    "ids of no file": ("--folder s --scenarios ids:none.txt", r"none\.txt cannot be read .* give ids:FILE"),
    "a sparsity in words": ("--folder s --sparsities 0,most", 'sparsities must be numbers .* got "most"'),
    "all weights": ("--folder s --sparsities 1", "sparsities must be >= 0 and < 1"),
    "no seeds": ("--folder s --seeds 0", "--seeds must be >= 1, got 0"),
    "no trials": ("--folder s --trials 0", "trials must be an integer >= 1"),
    "a search without test rows": ("--folder s --trials 2", "give test rows, or trials=1"),
    "unknown criterion": ("--folder s --criterion test", 'criterion is validation or oracle, got "test"'),
    "unknown pruning": (
        "--folder s --prune-by luck --sparsities 0",
        'must be one of magnitude, synflow, random, got "luck"',
    ),
    "unknown compute": ("--folder s --equal-compute steps", "seconds, gradients or None"),
    "a setting of no method": ("--folder s --set lr=0.1", "--set lr=0.1 is of no method compared"),
    "a setting that is none": (
        "--folder s --set fine-tune.speed=2",
        'fine-tune has no setting "speed"; it has epochs, lr',
    ),
    "a setting without a value": ("--folder s --set fine-tune.lr", "--set lr lacks its value; give it as lr=value"),
    "an owner held out": ("--folder s --holdout 0.9 --scenarios owner:c-3", '"c-3" of scenario .* was held out'),
    "nothing to prune": ("--folder s --model softmax", "there is nothing to prune"),
    "test rows twice": ("--folder s --test t.csv --holdout 0.2", "--test or --holdout, not both"),
    "a holdout of all": ("--folder s --holdout 1", "share must lie between 0 and 1"),
    "a folder of other things": ("--folder .", "holds something other than a study; name a new folder"),
    "a file": ("--folder t.csv", r"t\.csv is a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_get_one_line_and_leave_nothing_behind(expunge, table, tmp_path, case):
    words, complaint = WRONG[case]
    said = expunge(*BASE, *words.split())
    assert (said.code, said.out) == (3 if case == "nothing to prune" else 2, "")
    assert len(said.err.splitlines()) == 1
    assert re.search(complaint, said.err), said.err
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_another_study_in_the_folder_is_refused(expunge, table):
    words = ("--seeds", "1", "--sparsities", "0", "--methods", "fine-tune", "--folder", "s")
    assert expunge(*BASE, *words).code == 0
    said = expunge(*BASE, *words, "--epochs", "3")
    assert (said.code, said.out) == (2, "")
    assert "s holds another study, which differs in settings.recipe.epochs; give the same settings" in said.err


def test_a_built_in_set_brings_its_own_test_rows(expunge):
    said = expunge("compare", "--data", "optdigits", "--holdout", "0.2", "--folder", "s")
    assert said.code == 2
    assert "optdigits brings its own test rows; leave out --holdout" in said.err


def test_the_examples_of_the_help_and_of_the_guide_parse(expunge):
    said = expunge("compare", "--help")
    assert (said.code, said.err) == (0, "")
    guide = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    examples = re.findall(r"(?m)^ *(expunge compare (?:.*\\\n)*.*)$", said.out + guide)
    assert len(examples) == 4
    for example in examples:
        words = shlex.split(example.replace("\\\n", " "))
        with parser().commands["compare"].make_context("compare", words[2:]):
            pass
