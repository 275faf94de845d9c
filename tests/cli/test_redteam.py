"""`expunge redteam` as its users meet it."""

import json
import re
import shlex
import sys

import pytest

from expunge.attack import SelectRequests
from expunge.cli import parser
from expunge.core.errors import Misuse
from expunge.study.redteam_attacks import ATTACKS
from expunge.study.redteam_screens import SCREENS
from tests.cli.conftest import TABLE, write_customers

BASE = ("redteam", "m", "--data", "t.csv", *TABLE)
WITH = ("--test", "u.csv", "--method", "influence-unlearning")
QUICK = ("--attacks", "select", "--targets", 4, "--budget", ".1", "--draws", 19, "--benign", 10)
WHOLE = (*BASE, *WITH, *QUICK, "--screens", "gradient-norm,isolation", "--out", "r")


@pytest.fixture
def model(expunge, tmp_path):
    """A softmax model in the folder `m`, of the customers in `t.csv`; others in `u.csv`."""
    write_customers(tmp_path / "t.csv")
    write_customers(tmp_path / "u.csv", rows=40, id="r-x")
    recipe = {"model": "softmax", "epochs": 30, "batch_size": 60, "weight_decay": 0.05, "optimiser_args": {"lr": 0.5}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert expunge("train", "--data", "t.csv", *TABLE, "--recipe", "recipe.json", "--out", "m", "-q").code == 0
    return tmp_path


def test_tables_answers_and_a_page_with_pictures(expunge, model):
    said = expunge(*WHOLE, "-q")
    assert said.code in (0, 1)
    assert said.err == ""
    assert re.search(
        r"(?m)^select +6 +(my data|my approximation|both|neither shown|no more than neighbours) ", said.out
    )
    for policy in ("no screen", "GradientNorm", "Isolation", "combined"):
        assert re.search(rf"(?m)^select +{policy} ", said.out)
    assert re.search(r"(?m)^select: .*exact retraining", said.out)
    assert said.out.count("Recommended") == 1
    page = (model / "r" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("Recommended") == 1
    assert "Is it my data or my approximation?" in page
    assert json.loads((model / "r" / "report.json").read_text())["sound"] is (said.code == 0)


def test_the_exit_code_says_whether_an_attack_gets_through(expunge, model):
    said = expunge(*BASE, *WITH, *QUICK, "--screens", "none", "--out", "r", "--json")
    told = json.loads(said.out)
    assert told["harmful"] == told["uncaught"] == ["select"]
    assert (said.code, told["sound"]) == (1, False)
    assert told["recommended"] == "no screen"
    slow = [word if word != "select" else "slow-down" for word in QUICK]
    said = expunge(*BASE, *WITH, *slow, "--screens", "none", "--out", "s", "--json")
    assert (said.code, json.loads(said.out)["harmful"]) == (0, [])


def test_a_run_in_which_no_attack_could_be_carried_out_is_no_success(expunge, model, monkeypatch):
    def refuse(*_, **__):
        raise Misuse("not today")

    monkeypatch.setattr(SelectRequests, "requests", refuse)
    said = expunge(*BASE, *WITH, *QUICK, "--screens", "none", "--out", "r", "--json")
    assert said.code == 1
    assert json.loads(said.out)["verdict"].startswith("Nothing was measured")


def test_an_interrupt_says_how_to_go_on(expunge, model, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SelectRequests, "requests", stop)
        said = expunge(*BASE, *WITH, *QUICK, "--screens", "none", "--out", "r")
    assert said.code == 4
    assert "--resume" in said.err
    said = expunge(*BASE, *WITH, *QUICK, "--screens", "none", "--out", "r", "--resume")
    assert said.code in (0, 1)
    assert "--resume" not in (model / "r" / "report.html").read_text()


def test_a_run_is_gone_on_with_only_if_asked(expunge, model):
    first = expunge(*WHOLE, "--json")
    said = expunge(*WHOLE)
    assert said.code == 2
    assert "--resume" in said.err
    cells = (model / "r" / "cells.jsonl").read_bytes()
    (model / "r" / "cells.jsonl").write_bytes(b"".join(cells.splitlines(keepends=True)[:2]))
    again = expunge(*WHOLE, "--resume", "--json")
    assert (model / "r" / "cells.jsonl").read_bytes().count(b"\n") == cells.count(b"\n")
    assert json.loads(again.out) == json.loads(first.out)
    assert (again.code, again.err) == (first.code, "")
    other = [*WHOLE, "--resume", "--seed", 1]
    assert "another study, which differs in" in expunge(*other).err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--attacks", "magic"), '--attacks are select, .*, got "magic"'),
        (("--attacks", ","), "--attacks are select, .*, got none; name at least one"),
        (("--attacks", "select,select"), '--attacks names "select" twice; name it once'),
        (("--screens", "magic"), '--screens are membership, .*, got "magic"'),
        (("--attacks", "evading", "--screens", "none"), "evading attacks screens, and there are none; name some"),
        (("--budget", "much"), '--budget must be shares of the rows, as .001,.01, got "much"'),
        (("--budget", ""), "got none; give at least one"),
        (("--budget", "0"), "--budget must be shares of the rows above 0 and below 0.5, got 0;"),
        (("--budget", ".01,.6"), "below 0.5, got 0.6;"),
        (("--budget", "nan"), "got nan;"),
        (("--targets", "0"), "--targets must be >= 1, got 0"),
        (("--seeds", "0"), "--seeds must be >= 1, got 0"),
        (("--benign", "0"), "--benign must be >= 1, got 0"),
        (("--rate", "0"), "--rate, the share of false alarms, must lie between 0 and 1, got 0"),
        (
            ("--rate", ".001"),
            "--rate 0.001 takes at least 999 draws to calibrate on, got 200; raise --draws, or --rate",
        ),
        (("--others", "magic"), 'unknown method "magic"'),
        (("--method", "magic"), 'unknown method "magic"'),
        (("--method", "auto", "--set", "magic=1"), 'retrain has no setting "magic"'),
        (("--resume",), "no run in r"),
    ],
)
def test_bad_words_are_told_before_a_model_or_data_is_read(expunge, tmp_path, words, told):
    said = expunge("redteam", "no-model", "--data", "no-data", "--out", "r", *words)
    assert (said.code, said.out) == (2, "")
    assert re.search(told, said.err)
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("redteam", "no-model", "--data", "t.csv"), "no-model holds no trained model"),
        (("redteam", "m", "--data", "no-data"), '--data "no-data" is no file, folder or data set'),
        ((*BASE, "--test", "no-test"), '--test "no-test" is no file, folder or data set'),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_read(expunge, model, monkeypatch, words, told):
    room = sys.modules["expunge.cli.redteam"]  # the package's attribute of this name is the command
    monkeypatch.setattr(room, "load_model", None)
    monkeypatch.setattr(room, "read_records", None)
    said = expunge(*words, "--out", "r")
    assert (said.code, said.out) == (2, "")
    assert told in said.err


def test_a_rate_too_small_for_the_draws_is_no_matter_without_screens(expunge, model):
    said = expunge(*BASE, *WITH, *QUICK, "--rate", ".001", "--screens", "none", "--out", "r", "-q")
    assert said.code in (0, 1)


def other_data(folder):
    """Files that are not the customers the model was trained on, by name."""
    write_customers(folder / "few.csv", rows=20)
    write_customers(folder / "changed.csv", age="7.5")
    for name, make in {"wide": lambda line: line + ",0", "three": lambda line: line}.items():
        lines = (folder / "t.csv").read_text().splitlines()
        head = lines[0] + (",more" if name == "wide" else "")
        (folder / f"{name}.csv").write_text("\n".join([head, *(make(one) for one in lines[1:])]) + "\n")


THREE = (*TABLE[:-1], "no,yes,perhaps")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "few.csv", *TABLE), 'was trained on 60 rows, of which few.csv lacks 40, as "r-20"; give all rows'),
        (
            ("--data", "changed.csv", *TABLE),
            "changed.csv holds other rows than the model was trained on: .* differ; give",
        ),
        (
            ("--data", "wide.csv", *TABLE),
            "the model takes rows of 2 numbers and 2 classes, but wide.csv holds rows of 3 ",
        ),
        (("--data", "t.csv", *THREE), "and 2 classes, but t.csv holds rows of 2 numbers and 3 classes; give --data"),
        (("--data", "t.csv", *TABLE, "--test", "wide.csv"), "but the test rows are rows of 3 numbers .*; give --test"),
        (("--data", "t.csv", *TABLE, "--targets", "4000"), "asked for 4000 targets, but there are 40 test rows; lower"),
    ],
)
def test_data_that_does_not_fit_the_model_is_told_with_what_it_takes(expunge, model, words, told):
    other_data(model)
    test = () if "--test" in words else ("--test", "u.csv" if "wide.csv" not in words else "wide.csv")
    said = expunge("redteam", "m", *words, *test, "--method", "influence-unlearning", "--out", "r")
    assert (said.code, said.out) == (2, "")
    assert re.search(told, said.err), said.err
    assert said.err.count("\n") == 1


def test_without_test_rows_there_is_nothing_to_aim_at(expunge, model):
    said = expunge(*BASE, "--method", "retrain", "--out", "r")
    assert said.code == 2
    assert "give some: --test" in said.err


def test_where_nobody_watches_a_line_is_printed_for_each_trial_unless_quiet(expunge, model):
    words = (*BASE, *WITH, *QUICK, "--screens", "none")
    said = expunge(*words, "--out", "r")
    lines = said.err.splitlines()
    assert [line.partition(" after ")[0] for line in lines] == [f"{done} of 4 trials" for done in range(5)]
    assert lines[0].endswith(": select, 6 rows, target 1")
    assert "s left" not in lines[0] + lines[-1]
    assert all("s left" in line for line in lines[1:-1])
    assert expunge(*words, "--out", "s", "-q").err == ""
    assert expunge(*words, "--out", "t", "--json").err == ""
    again = expunge(*words, "--out", "r", "--resume").err.splitlines()
    assert [line.partition(" after ")[0] for line in again] == ["4 of 4 trials"]


def test_what_the_provider_refuses_is_no_failure_of_the_run(expunge, model):
    words = [word if word != "select" else "strangers" for word in QUICK]
    said = expunge(*BASE, *WITH, *words, "--screens", "gradient-norm", "--out", "r", "-q")
    assert said.code == 0
    assert "Refused by the provider" in said.out
    assert re.search(r"(?m)^strangers +6 +all ", said.out)
    assert "could not be made" not in said.out
    assert "takes strangers for members would be hit" in said.out
    assert "What is left of each attack" not in said.out
    told = json.loads(expunge(*BASE, *WITH, *words, "--screens", "none", "--out", "s", "--json").out)
    assert told["refused"] == [["strangers", 6]]


def test_the_help_names_every_attack_and_screen_and_its_examples_are_commands(expunge):
    said = expunge("redteam", "--help")
    assert said.code == 0
    plain = re.sub(r"[^a-z,-]", "", said.out)
    for name in (*ATTACKS, *SCREENS):
        assert name in plain
    text = re.sub(r"\\\n *", "", parser().commands["redteam"].help)
    examples = re.findall(r"(?m)^ *expunge redteam (.*)$", text)
    assert len(examples) == 2
    for example in examples:
        parser().commands["redteam"].make_context("redteam", shlex.split(example))
