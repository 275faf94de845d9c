"""Train, forget, forget again, evaluate: on real digits and on a user's own table, as text and as JSON."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expunge import datasets
from expunge.cli.inputs import METHODS
from expunge.core.recipe import Recipe, Sharding
from expunge.learn.training import load, train
from tests.cli.conftest import QUICK, TABLE, write_customers

DIGITS = ("--data", "optdigits")


@pytest.fixture
def ask(expunge):
    """``ask(words)`` runs a command with --json, and gives the one object that it must print, and nothing else."""

    def run(*words, code=0):
        said = expunge(*words, "--json")
        assert said.code == code, said
        assert said.err == ""
        assert said.out.count("\n") == 1
        return json.loads(said.out)

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with `whole` and `sharded`, both of optdigits, two epochs, as the command line would train them."""
    folder = tmp_path_factory.mktemp("digits")
    recipe = Recipe(model="mlp", epochs=2)
    train(recipe, datasets.optdigits().train).save(folder / "whole")
    train(recipe, datasets.optdigits().train, shards=5).save(folder / "sharded")
    return folder


TRAINED = {"model", "digest", "records", "shards"}
FORGOTTEN = {
    *("model", "method", "claim", "exactness", "not_covered", "removed", "gone", "seconds", "row_gradients", "digest"),
    *("guarantee", "events"),
}
ROW = {"method", "claim", "forget", "retain", "test", "attack", "seconds", "unlearning_accuracy"}
GAPS = {"gaps", "mean_gap", "tug_of_war", "seconds_over_reference"}


def test_training_by_words_is_training_by_python(ask, digits):
    found = ask("train", *DIGITS, *QUICK, "--shards", 5, "--out", "out")
    assert set(found) == TRAINED
    assert found == {"model": "out", "digest": load(digits / "sharded").digest(), "records": 3823, "shards": 5}
    assert load("out").digest() == found["digest"]


def test_a_recipe_file_and_the_options_that_replace_its_fields(ask, tmp_path):
    sharding = Sharding(shards=3, slices=2, salt="pinch", aggregate="mean")
    kept = Recipe(model="softmax", epochs=9, optimiser_args={"lr": 0.02, "momentum": 0.5}, sharding=sharding)
    (tmp_path / "r.json").write_text(json.dumps(kept.to_json()))
    ask("train", *DIGITS, "--recipe", "r.json", "--epochs", 1, "--lr", 0.1, "--shards", 2, "--out", "out")
    found = load("out").recipe
    assert found.model == "softmax"
    assert found.epochs == 1
    assert dict(found.optimiser_args) == {"lr": 0.1, "momentum": 0.5}
    assert found.sharding == Sharding(shards=2, slices=2, salt="pinch", aggregate="mean")


def test_forget_by_owner_then_by_id_gone_stays_gone(ask, digits, optdigits):
    mine = optdigits.train.of_owner("owner-017").ids
    first = ask("forget", digits / "sharded", *DIGITS, "--owner", "owner-017", "--out", "one")
    assert set(first) == FORGOTTEN
    assert (first["method"], first["claim"], first["exactness"]) == ("sisa", "exact", "pathwise")
    assert first["removed"] == first["gone"] == len(mine)
    assert "copies kept elsewhere" in first["not_covered"]
    other = next(record for record in optdigits.train.ids if record not in mine)
    second = ask("forget", "one", *DIGITS, "--id", other, "--id", mine[0], "--out", "two")
    assert (second["removed"], second["gone"]) == (1, len(mine) + 1)
    assert load("two").gone == {*mine, other}
    scratch = train(load("two").recipe, optdigits.train.without({*mine, other}))
    assert second["digest"] == scratch.digest()
    third = ask("forget", "two", *DIGITS, "--owner", "owner-017", "--out", "three")
    assert (third["removed"], third["digest"]) == (0, second["digest"])
    found = ask("evaluate", "two", "--before", digits / "sharded", *DIGITS, "--retrain")
    assert (found["removed"], found["equals_retraining"]) == (len(mine) + 1, True)


def test_forget_by_class_and_ids_file_from_one_model(ask, digits, optdigits, tmp_path):
    found = ask("forget", digits / "whole", *DIGITS, "--class", 3, "--out", "out")
    assert (found["method"], found["removed"]) == ("retrain", int((optdigits.train.y == 3).sum()))
    (tmp_path / "ids.txt").write_text("\n".join(optdigits.train.of_class(3).ids) + "\n\n")
    listed = ask("forget", digits / "whole", *DIGITS, "--ids-file", "ids.txt", "--out", "listed")
    assert listed["digest"] == found["digest"]


def test_evaluate_an_approximate_method(ask, digits):
    words = ("--class", 3, "--method", "fine-tune", "--set", "lr=0.1", "--set", "epochs=1")
    found = ask("forget", digits / "whole", *DIGITS, *words, "--out", "out")
    assert (found["claim"], found["exactness"]) == ("none", None)
    compared = ask("evaluate", "out", "--before", digits / "whole", *DIGITS)
    assert compared["equals_retraining"] is None
    assert [row["method"] for row in compared["rows"]] == ["before", "after"]
    assert set(compared["rows"][0]) == ROW
    compared = ask("evaluate", "out", "--before", digits / "whole", *DIGITS, "--retrain")
    assert compared["equals_retraining"] is False
    assert [row["claim"] for row in compared["rows"]] == ["nothing removed", "none", "reference"]
    assert set(compared["rows"][1]) == ROW | GAPS
    assert compared["rows"][2]["mean_gap"] == 0 < compared["rows"][1]["mean_gap"]


def test_evaluate_says_with_its_exit_code_that_an_exact_model_is_none(ask, digits, optdigits):
    """The liar: a model that calls itself exact, and was trained with other coins."""
    whole = load(digits / "whole")
    mine = frozenset(optdigits.train.of_owner("owner-001").ids)
    rest = optdigits.train.without(mine)
    lie = train(Recipe(**{**whole.recipe.to_json(), "seed": 5, "epochs": 2}), rest)
    liar = type(lie)(module=lie.module, recipe=whole.recipe, ids=lie.ids, gone=mine)
    liar.save("liar")
    found = ask("evaluate", "liar", "--before", digits / "whole", *DIGITS, "--retrain", code=1)
    assert found["equals_retraining"] is False


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_a_table_of_one_s_own_with_a_table_to_test_on(ask, shop, tmp_path, name):
    data = ("--data", shop / "customers.csv", *TABLE)
    found = ask("forget", shop / name, *data, "--owner", "c-9", "--out", "out")
    assert (found["claim"], found["removed"]) == ("exact", 2)
    compared = ask("evaluate", "out", "--before", shop / name, *data, "--retrain")
    assert compared["equals_retraining"] is True
    assert {row["test"] for row in compared["rows"]} == {None}
    write_customers(tmp_path / "more.csv", rows=30)
    compared = ask("evaluate", "out", "--before", shop / name, *data, "--test", "more.csv")
    assert compared["rows"][0]["test"]["n"] == 30


def test_columns_say_scale_and_categories(ask, shop, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"columns": ["age"], "scale": {"age": [0, 2]}}))
    ask("train", "--data", shop / "customers.csv", *TABLE, "--columns", "c.json", *QUICK, "--out", "out")
    assert list(load("out").recipe.model_args["shape"]) == [1]


def test_regression_trains_with_squared_loss_and_is_not_tabled(expunge, ask, shop, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"columns": ["age"], "regression": True}))
    data = ("--data", shop / "customers.csv", "--id-column", "id", "--label-column", "spent", "--columns", "c.json")
    ask("train", *data, *QUICK, "--out", "out")
    assert load("out").recipe.loss == "mse"
    ask("forget", "out", *data, "--id", "r-3", "--out", "after")
    said = expunge("evaluate", "after", "--before", "out", *data)
    assert said.code == 3
    assert "float targets" in said.err


def test_records(ask, expunge, optdigits):
    found = ask("records", *DIGITS, "--limit", 3)
    assert set(found) == {"data", "count", "shown"}
    assert found["count"] == 3823
    assert found["shown"][2] == {"id": optdigits.train.ids[2], "owner": optdigits.train.owners[2], "label": 7}
    owners = ask("records", *DIGITS, "--owners", "--limit", 0)
    assert owners["count"] == len(owners["shown"]) == 200
    assert sum(line["records"] for line in owners["shown"]) == 3823
    text = expunge("records", *DIGITS, "--limit", 2).out.splitlines()
    assert text[0].startswith("optdigits: 3,823 records of 200 owners")
    assert text[2].split() == ["id", "owner", "label"]
    assert text[-1] == "... 3,821 more; --limit 0 lists all"


def test_methods(ask, expunge):
    found = ask("methods")["methods"]
    assert [about["method"] for about in found] == list(METHODS)
    assert {about["method"] for about in found if about["claim"] == "exact"} == {"retrain", "sisa"}
    keys = {"method", "claim", "needs", "settings", "source", "not_guaranteed", "class", "what", "cost", "choices"}
    assert all(set(about) == {*keys, "learns_new"} and about["not_guaranteed"] for about in found)
    assert {about["method"] for about in found if not about["learns_new"]} >= {"gradient-ascent", "boundary-shrink"}
    said = expunge("methods")
    assert all(about["not_guaranteed"] in said.out for about in found)


ON_MODELS = ("demo", "train", "forget", "evaluate", "compare", "records", "methods", "redteam")


def test_a_method_around_another_takes_settings_of_both(ask, digits):
    words = ("forget", digits / "whole", *DIGITS, "--class", 3, "--method", "pruned-fine-tune", "--set", "by=random")
    found = ask(*words, "--set", "then.epochs=1", "--set", "then.lr=0.01", "--set", "sparsity=0.5", "--out", "a")
    other = ask(*words, "--set", "then=gradient-ascent", "--set", "sparsity=0.5", "--out", "b")
    assert (found["method"], other["method"]) == ("pruned-fine-tune", "pruned-gradient-ascent")
    weights = load("a").module.state_dict()["body.0.weight"]
    assert int((weights == 0).sum()) == weights.numel() // 2


def test_a_model_that_was_ruined_is_told_of(expunge, digits):
    words = ("forget", digits / "whole", *DIGITS, "--class", 3, "--method", "fine-tune", "--set")
    said = expunge(*words, "lr=1e6", "--out", "ruined")
    assert said.code == 0
    assert re.search(r"warning: of the records that stay, the model now gets \d+% right, and before 9\d%", said.err)
    assert "warning" not in expunge(*words, "lr=0.01", "--out", "fine").err


def test_steps_are_kept_for_the_method_that_takes_them_back(ask, expunge, digits):
    quick = (*DIGITS, "--model", "softmax", "--epochs", 1, "--batch-size", 512)
    ask("train", *quick, "--keep-steps", "--out", "kept")
    gone = ("--class", 3, "--method", "amnesiac-unlearning")
    assert ask("forget", "kept", *DIGITS, *gone, "--out", "after")["removed"] == 389
    said = expunge("forget", digits / "whole", *DIGITS, *gone, "--out", "no")
    assert said.code == 3
    assert "--keep-steps" in said.err


@pytest.mark.parametrize("command", ON_MODELS)
def test_every_command_has_help_with_two_examples(expunge, command):
    said = expunge(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert "Examples:" in said.out
    assert said.out.count(f"\n    expunge {command}") == 2


def test_every_command_is_in_the_list_in_one_whole_line(expunge):
    said = expunge()
    assert (said.code, said.err) == (0, "")
    assert all(f"\n  {command} " in said.out for command in ON_MODELS)
    assert "..." not in said.out.partition("Commands:")[2]
    assert expunge("--help").out == said.out
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", expunge("--version").out)


ESCAPE = "\x1b"


def test_text_says_what_is_not_covered_without_colour(expunge, digits):
    said = expunge("forget", digits / "sharded", *DIGITS, "--owner", "owner-017", "--out", "out")
    assert said.err == ""
    assert "exact (pathwise)" in said.out
    assert "Not covered: copies kept elsewhere" in said.out
    said = expunge("evaluate", "out", "--before", digits / "sharded", *DIGITS, "--retrain")
    assert "The model after equals retraining byte for byte." in said.out
    assert ESCAPE not in said.out + said.err


def test_a_claim_of_none_is_said_so(expunge, digits):
    said = expunge("forget", digits / "whole", *DIGITS, "--class", 3, "--method", "gradient-ascent", "--out", "out")
    assert "No claim" in said.out


ON_A_TERMINAL = """
import os, sys
os.environ.update(given["environment"])
os.chdir(given["folder"])
terminal = os.open(given["terminal"], os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(terminal, number)
sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
sys.argv = ["expunge", *given["words"]]
from expunge.cli import main
try:
    main()
except SystemExit as stop:
    answer = stop.code
sys.stdout.flush()
"""


@pytest.fixture
def on_a_terminal(forks, tmp_path):
    """Runs a command in a process with a terminal of 100 columns: (exit code, all that it wrote there)."""

    def run(*words, **environment):
        leader, follower = pty.openpty()
        given = {"COLUMNS": "100", "TERM": "xterm", **environment}
        os.set_blocking(leader, False)
        code = forks(
            ON_A_TERMINAL,
            words=[*map(str, words)],
            folder=str(tmp_path),
            terminal=os.ttyname(follower),
            environment=given,
        )
        said = os.read(leader, 1 << 16).decode()
        os.close(follower)
        os.close(leader)
        return code, said

    return run


def test_a_terminal_shows_progress_and_quiet_and_no_color_are_heard(shop, on_a_terminal):
    words = ("train", "--data", shop / "customers.csv", *TABLE, *QUICK)
    code, said = on_a_terminal(*words, "--out", "a")
    assert code == 0
    assert ESCAPE in said
    assert "trained on 60 records, one model; saved in a\r\n" in said
    code, said = on_a_terminal(*words, "--quiet", "--out", "b")
    assert (code, said) == (0, "trained on 60 records, one model; saved in b\r\n")
    code, said = on_a_terminal(*words, "--out", "c", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[(?:\d+;)*3\d", said)  # no colour: bold and cursor movements may be


def test_reading_half_of_the_list_is_no_error(tmp_path):
    """As `expunge records ... | head` does."""
    words = [sys.executable, "-m", "expunge.cli", "records", "--data", "optdigits", "--limit", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


MYNET = """
from torch import nn

def make(shape, outputs, width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], width), nn.Tanh(), nn.Linear(width, outputs))
"""


def test_a_module_of_one_s_own_runs_with_leave_only(expunge, ask, shop, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("expunge.learn.build._allowed", {})
    (tmp_path / "mynet.py").write_text(MYNET)
    (tmp_path / "r.json").write_text(json.dumps({"model": "mynet:make", "model_args": {"width": 4}, "epochs": 2}))
    data = ("--data", shop / "customers.csv", *TABLE)
    said = expunge("train", *data, "--recipe", "r.json", "--out", "out")
    assert said.code == 2
    assert "--allow-code" in said.err
    assert not Path("out").exists()
    ask("train", *data, "--recipe", "r.json", "--allow-code", "--out", "out")
    monkeypatch.setattr("expunge.learn.build._allowed", {})
    said = expunge("forget", "out", *data, "--owner", "c-1", "--out", "after")
    assert said.code == 2
    assert "--allow-code" in said.err
    found = ask("forget", "out", *data, "--owner", "c-1", "--out", "after", "--allow-code")
    assert (found["method"], found["claim"]) == ("retrain", "exact")
    compared = ask("evaluate", "after", "--before", "out", *data, "--retrain", "--allow-code")
    assert compared["equals_retraining"] is True
