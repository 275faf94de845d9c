"""`expunge redteam` as its users meet it."""

import json
import re
import shlex

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
    said = expunge(*WHOLE)
    assert said.code in (0, 1)
    assert said.err == ""
    assert re.search(
        r"(?m)^select +6 +(my data|my approximation|both|neither shown|no more than neighbours) ", said.out
    )
    for policy in ("no screen", "GradientNorm", "Isolation", "combined"):
        assert re.search(rf"(?m)^select +{policy} ", said.out)
    assert re.search(r"(?m)^select: .*exact retraining", said.out)
    page = (model / "r" / "report.html").read_text()
    assert page.count("<svg") == 3
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
    assert json.loads(again.out) == json.loads(first.out)
    assert (again.code, again.err) == (first.code, "")
    other = [*WHOLE, "--resume", "--seed", 1]
    assert "another study, which differs in" in expunge(*other).err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*BASE, *WITH, "--out", "r", "--attacks", "magic"), "--attacks are select"),
        ((*BASE, *WITH, "--out", "r", "--screens", "magic"), "--screens are membership"),
        ((*BASE, *WITH, "--out", "r", "--attacks", "evading", "--screens", "none"), "there are none"),
        ((*BASE, *WITH, "--out", "r", "--budget", "much"), "--budget must be shares"),
        ((*BASE, *WITH, "--out", "r", "--budget", "0"), "above 0"),
        ((*BASE, *WITH, "--out", "r", "--resume"), "no run in r"),
        ((*BASE, "--method", "retrain", "--out", "r"), "give some: --test"),
        ((*BASE, *WITH, "--out", "r", "--targets", "4000"), "asked for 4000 targets"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(expunge, model, words, told):
    said = expunge(*words)
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert said.err.count("\n") == 1


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
