"""`expunge certify votes` and `votes-plan` as their users meet them."""

import json
import re
import shlex
from pathlib import Path

import pytest

from expunge.cli import parser
from expunge.learn.training import load
from tests.cli.conftest import QUICK, TABLE, write_customers

VERBS = ("votes", "votes-plan")


@pytest.fixture
def held_out(shop, tmp_path):
    """Words that name the customers of the shop, and others."""
    write_customers(tmp_path / "later.csv", rows=40)
    return ("--data", str(shop / "customers.csv"), *TABLE, "--test", "later.csv")


def test_a_model_of_shards_with_its_floors(expunge, shop, held_out):
    said = expunge("certify", "votes", shop / "sharded", *held_out)
    assert (said.code, said.err) == (0, "")
    told = re.sub(r"\s+", " ", said.out)
    assert "4 shards, 4 of them vote; 40 predictions, median radius" in told
    assert "shards touched cannot change accuracy at least" in told
    assert "k owners, or k rows, touch at most k" in told
    assert "Not covered: wrong predictions" in told
    assert "votes by class" not in told


def test_json_has_every_prediction_if_asked(expunge, shop, held_out):
    words = ("certify", "votes", shop / "sharded", *held_out, "--json")
    about = json.loads(expunge(*words).out)
    assert "each" not in about
    assert (about["shards"], about["voters"], about["rows"]) == (4, 4, 40)
    assert about["digest"] == load(shop / "sharded").digest()
    each = json.loads(expunge(*words, "--each").out)["each"]
    assert [row["id"] for row in each] == [f"r-{row}" for row in range(40)]
    for row in each:
        most = max(row["votes"])
        assert row["predicted"] == row["votes"].index(most)
        no, yes = row["votes"]
        assert row["radius"] == ((no - yes) // 2 if row["predicted"] == 0 else (yes - no - 1) // 2)
    right = [row["label"] == row["predicted"] for row in each]
    assert about["accuracy"]["value"] == sum(right) / 40
    first = sum(ok and row["radius"] >= 1 for ok, row in zip(right, each, strict=True)) / 40
    assert about["floors"][1]["accuracy"]["value"] == first
    text = expunge("certify", "votes", shop / "sharded", *held_out, "--each").out
    assert re.search(rf"r-0 +{each[0]['label']} +{each[0]['predicted']} +{each[0]['radius']} +\d \d", text)


def test_a_picture_is_written_once(expunge, shop, held_out):
    words = ("certify", "votes", shop / "sharded", *held_out, "--plot", "deep/v.svg")
    assert expunge(*words).code == 0
    picture = Path("deep/v.svg").read_text()
    assert picture.startswith("<?xml")
    assert picture.count("<svg") == 1
    again = expunge(*words)
    assert (again.code, "v.svg is there already" in again.err) == (2, True)
    assert "must end in .svg" in expunge(*words[:-1], "v.png").err


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [("whole", 3, "this model is whole; train it in shards: --shards"), ("none", 2, "is no trained model")],
)
def test_what_has_no_votes_is_told_in_one_line(expunge, shop, held_out, model, code, says):
    said = expunge("certify", "votes", shop / model, *held_out)
    assert (said.code, said.out) == (code, "")
    assert says in said.err
    assert said.err.count("\n") == 1


def test_rows_that_the_model_was_trained_on_are_no_test(expunge, shop):
    said = expunge("certify", "votes", shop / "sharded", "--data", shop / "customers.csv", *TABLE)
    assert (said.code, said.out) == (2, "")
    assert "rows that the model was not trained on; give them: --test" in said.err


def test_numbers_of_shards_beside_each_other(expunge, held_out):
    words = ("certify", "votes-plan", *held_out, *QUICK, "--shards", "4,2", "--k", "1,0")
    said = expunge(*words)
    assert said.code == 0
    told = re.sub(r"\s+", " ", said.out)
    assert "shards vote accuracy median radius radius >= 1 floor, k=0 floor, k=1" in told
    about = json.loads(expunge(*words, "--json", "--plot", "v.svg").out)
    assert [line["shards"] for line in about["lines"]] == [2, 4]
    assert about["k"] == [0, 1]
    assert Path("v.svg").read_text().count(" shards -->") >= 2
    lone = f"{about['lines'][0]['floors'][0]['accuracy']['value']:.1%}".rstrip("%")
    assert re.search(rf"(?m)^ *2 +2 +{re.escape(lone)} ", said.out)


def test_the_plan_trains_what_train_trains(expunge, held_out, shop):
    words = ("certify", "votes-plan", *held_out, *QUICK, "--shards", "4", "--json")
    assert json.loads(expunge(*words).out)["lines"][0]["digest"] == load(shop / "sharded").digest()
    assert json.loads(expunge(*words, "--seed", 7).out)["recipe"]["seed"] == 7
    Path("r.json").write_text(json.dumps({"model": "softmax", "epochs": 1, "seed": 5}))
    of_file = ("certify", "votes-plan", *held_out, "--recipe", "r.json", "--shards", "2", "--json")
    assert json.loads(expunge(*of_file).out)["recipe"]["seed"] == 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--shards", "a"), "--shards must be whole numbers >= 1"),
        (("--shards", "0,3"), "--shards must be whole numbers >= 1"),
        (("--shards", ""), "--shards must be whole numbers >= 1"),
        (("--k", "-1"), "--k must be whole numbers >= 0"),
        (("--plot", "v.png"), "--plot must end in .svg"),
    ],
)
def test_numbers_that_are_none_are_refused_before_any_work(expunge, held_out, words, says):
    said = expunge("certify", "votes-plan", *held_out, *QUICK, *words)
    assert (said.code, said.out) == (2, "")
    assert says in said.err
    assert said.err.count("\n") == 1


def test_a_plan_needs_rows_to_test_on_and_may_hold_some_out(expunge, shop):
    words = ("certify", "votes-plan", "--data", shop / "customers.csv", *TABLE, *QUICK, "--shards", "2")
    said = expunge(*words)
    assert (said.code, "give them: --test or --holdout" in said.err) == (2, True)
    assert json.loads(expunge(*words, "--holdout", "0.3", "--json").out)["lines"][0]["rows"] == 18


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_two_examples_that_parse(expunge, verb):
    said = expunge("certify", verb, "--help")
    assert (said.code, said.err) == (0, "")
    for option in ("--json", "--quiet", "--seed"):
        assert option in said.out
    examples = re.findall(rf"(?m)^ *(expunge certify {verb} (?:.*\\\n)*.*)$", said.out)
    assert len(examples) == 2
    for example in examples:
        words = shlex.split(example.replace("\\\n", " "))
        with parser().commands["certify"].commands[verb].make_context(verb, words[3:]):
            pass


def test_the_list_of_verbs_has_both_in_a_whole_line(expunge):
    listed = expunge("certify", "--help").out.partition("Commands:")[2]
    assert all(f"\n  {verb} " in listed for verb in VERBS)
    assert "..." not in listed
