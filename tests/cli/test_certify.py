"""`expunge certify` as its users meet it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from expunge.certify.head import NewtonHead
from expunge.cli import parser
from expunge.cli.inputs import METHODS, named_method
from expunge.core.errors import Misuse
from expunge.learn.training import load
from tests.cli.conftest import TABLE, write_customers

VERBS = ("remove", "explain", "plan", "plot")
DATA = ("--data", "t.csv", *TABLE)
REMOVE = ("certify", "remove")


@pytest.fixture
def model(expunge, tmp_path):
    """A softmax model with weight decay in the folder `m`, of the customers in `t.csv`."""
    write_customers(tmp_path / "t.csv")
    recipe = {"model": "softmax", "epochs": 2, "weight_decay": 0.1}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert expunge("train", *DATA, "--recipe", "r.json", "--out", "m", "-q").code == 0
    return tmp_path


@pytest.fixture
def removed(expunge, model):
    """The same without r-3, in `n`, with its guarantee."""
    assert expunge(*REMOVE, "m", *DATA, "--id", "r-3", "--out", "n").code == 0
    return model


def keys(value):
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(inner)


def test_a_removal_with_its_claim_its_two_figures_and_what_is_not_covered(expunge, model):
    said = expunge(*REMOVE, "m", *DATA, "--id", "r-3", "--requests", 4, "--set", "sigma=.02", "--out", "n")
    assert said.code == 0
    told = re.sub(r"\s+", " ", said.out)
    assert "removed 1 records; newton-head; saved in n certified, proved: compared with the head that" in told
    assert re.search(r"this model alone epsilon 0\.4\d+, delta 1e-05 ", told)
    assert re.search(r"all releases so far epsilon 0\.4\d+ of 1, delta 1e-05: release 1 of 4 ", told)
    assert "Not covered: anything outside the guarantee's scope" in told
    assert told.strip().endswith("guarantee in n.guarantee.json")
    after = load("n")
    assert after.gone == {"r-3"}
    kept = json.loads(Path("n.guarantee.json").read_text())
    assert (kept["model"], kept["method"]) == (after.digest(), "newton-head")
    assert kept["guarantee"]["sigma"] == after.releases[0].sigma == 0.02
    assert kept["settings"]["method.budget.requests"] == 4


def test_what_it_took_goes_to_the_operator_alone(expunge, model):
    said = expunge(*REMOVE, "m", *DATA, "--owner", "c-3", "--out", "n", "--json")
    assert re.fullmatch(r"took \S+ s \(for you alone\)\n", said.err)
    about = json.loads(said.out)
    kept = json.loads(Path("n.guarantee.json").read_text())
    assert about["guarantee"] == kept["guarantee"]
    for name in (*keys(about), *keys(kept["guarantee"])):
        assert not re.search("second|step|residual|gradient|cost|took|rows_read", name), name
    quiet = expunge(*REMOVE, "n", *DATA, "--owner", "c-4", "--out", "o", "--quiet")
    assert quiet.err == ""
    assert not re.search(r"\d s\b|seconds", quiet.out)


def test_releases_add_up_over_saved_models_until_the_budget_is_spent(expunge, model):
    for number, (before, after) in enumerate([("m", "a"), ("a", "b")], start=1):
        words = (*REMOVE, before, *DATA, "--id", f"r-{number}", "--requests", 2, "--out", after, "--json")
        spent = json.loads(expunge(*words).out)["guarantee"]["transcript"]
        assert (spent["releases"], spent["budget_releases"]) == (number, 2)
    assert spent["epsilon"] == pytest.approx(1.0, rel=1e-6)
    before = sorted(model.iterdir())
    said = expunge(*REMOVE, "b", *DATA, "--id", "r-5", "--requests", 2, "--out", "c")
    assert (said.code, said.out) == (3, "")
    assert "for 2 releases is spent: 2 were made" in said.err
    assert said.err.count("\n") == 1
    assert sorted(model.iterdir()) == before
    assert expunge("certify", "explain", "b").code == 0


def test_nothing_left_to_remove_keeps_the_guarantee_that_there_was(expunge, removed):
    said = expunge(*REMOVE, "n", *DATA, "--id", "r-3", "--out", "again")
    assert said.code == 0
    assert "nothing left to remove" in said.out
    assert Path("again.guarantee.json").read_bytes() == Path("n.guarantee.json").read_bytes()
    assert expunge("certify", "explain", "again").code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--method", "retrain"), 2, '"retrain" is no certified method; these are: clipped-fine-tune'),
        (("--method", "magic"), 2, '"magic" is no certified method'),
        (("--set", "budget=1,1e-5,5"), 2, "said by --epsilon, --delta and --requests"),
        (("--set", "sigma=0"), 2, "sigma must be > 0"),
        (("--set", "sigma=big"), 2, 'sigma must be a number, got "big"'),
        (("--set", "public_extractor=maybe"), 2, 'public_extractor must be true or false, got "maybe"'),
        (("--epsilon", "0"), 2, "epsilon must be > 0"),
        (("--requests", "0"), 2, "requests must be an integer >= 1"),
        (("--owner", "c-9"), 2, "in one way: --id"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_and_leaves_nothing(expunge, model, words, code, says):
    before = sorted(model.iterdir())
    said = expunge(*REMOVE, "m", *DATA, "--id", "r-3", "--out", "n", *words)
    assert (said.code, said.out) == (code, "")
    assert says in said.err
    assert said.err.count("\n") == 1
    assert sorted(model.iterdir()) == before


def test_a_model_that_cannot_be_certified_and_files_that_are_there(expunge, model, shop):
    said = expunge(*REMOVE, shop / "whole", "--data", shop / "customers.csv", *TABLE, "--id", "r-3", "--out", "n")
    assert said.code == 3
    assert "needs weight_decay > 0" in said.err
    Path("n.guarantee.json").write_text("mine")
    said = expunge(*REMOVE, "m", *DATA, "--id", "r-3", "--out", "n")
    assert said.code == 2
    assert "n.guarantee.json is there already" in said.err
    assert not Path("n").exists()


def test_an_explanation_of_a_folder_and_of_a_file(expunge, removed):
    said = expunge("certify", "explain", "n")
    assert (said.code, said.err) == (0, "")
    assert "WHAT IS GUARANTEED" in said.out
    assert "Computed again: all 7 constants hold." in said.out
    assert "None of them was computed again" not in said.out
    quiet = expunge("certify", "explain", "n/", "-q")
    assert quiet.out.startswith("Computed again: all 7 constants hold.")
    alone = expunge("certify", "explain", "n.guarantee.json", "--json")
    about = json.loads(alone.out)
    assert (alone.code, about["holds"], about["problems"]) == (0, True, [])
    assert about["guarantee"]["basis"] == "proved"
    bare = json.loads(Path("n.guarantee.json").read_text())["guarantee"]
    Path("bare.json").write_text(json.dumps(bare))
    assert "Which model it is of was not looked at" in expunge("certify", "explain", "bare.json").out


def test_an_explanation_of_a_guarantee_without_the_model_or_a_model_without_one(expunge, model):
    said = expunge("certify", "explain", "m")
    assert said.code == 2
    assert "m.guarantee.json cannot be read as a guarantee" in said.err


def lower_epsilon(kept):
    kept["guarantee"]["epsilon"] /= 2


def lower_mu(kept):
    kept["guarantee"]["constants"]["mu"]["value"] /= 2
    kept["guarantee"]["mu"] /= 2


def claim_a_basis(kept):
    kept["guarantee"]["constants"]["mu"]["source"] = "estimated"


def lower_the_transcript(kept):
    kept["guarantee"]["transcript"]["epsilon"] /= 2


def another_model(kept):
    kept["model"] = "0" * 64


def another_recipe(kept):
    kept["guarantee"]["constants"]["weight_decay"]["value"] = kept["settings"]["recipe.weight_decay"] = 7.0


def another_sigma(kept):
    """Consistent in itself: only the model's own release says otherwise."""
    constants = kept["guarantee"]["constants"]
    for name in ("sigma", "sensitivity"):
        constants[name]["value"] *= 2
        kept["guarantee"][name] *= 2
    kept["settings"]["method.sigma"] *= 2


@pytest.mark.parametrize(
    ("change", "in_file", "says"),
    [
        (lower_epsilon, True, "epsilon is said to be"),
        (lower_mu, True, "gaussian-mu gives"),
        (claim_a_basis, True, 'its basis is said to be "proved", and its constants make it "none"'),
        (lower_the_transcript, True, "transcript"),
        (another_model, False, "it is of model 000000000000, and this is"),
        (another_recipe, False, "weight_decay is called the setting recipe.weight_decay, which is 0.1"),
        (another_sigma, False, "sigma is said to be 0.02, and the model's was 0.01"),
    ],
)
def test_who_changes_a_guarantee_is_found_out(expunge, removed, change, in_file, says):
    kept = json.loads(Path("n.guarantee.json").read_text())
    change(kept)
    Path("n.guarantee.json").write_text(json.dumps(kept))
    said = expunge("certify", "explain", "n")
    assert said.code == 1
    assert "it does NOT hold" in said.out
    assert says in said.out
    assert expunge("certify", "explain", "n.guarantee.json").code == (1 if in_file else 0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "3",
        '{"format": "expunge-guarantee/2"}',
        '{"format": "expunge-guarantee/1"}',
        '{"epsilon": 1}',
        pytest.param(("epsilon", "1"), id="a number as text"),
        pytest.param(("sigma", True), id="a number as truth"),
        pytest.param(("constants", {"sigma": {"value": "a", "source": "proved", "derivation": "x"}}), id="a constant"),
        pytest.param(("constants", {"sigma": {"value": 1, "source": "sworn", "derivation": "x"}}), id="a source"),
        pytest.param(("parameters", [1]), id="a name"),
        pytest.param(("epsilon", float("nan")), id="no number"),
        pytest.param(("surprise", 1), id="a field"),
    ],
)
def test_what_is_no_guarantee_is_refused_in_one_line(expunge, removed, content):
    if isinstance(content, tuple):
        kept = json.loads(Path("n.guarantee.json").read_text())
        kept["guarantee"][content[0]] = content[1]
        content = json.dumps(kept)
    Path("x.json").write_text(content)
    said = expunge("certify", "explain", "x.json")
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert "x.json" in said.err


def test_a_plan_before_anything_is_trained(expunge, tmp_path):
    write_customers(tmp_path / "t.csv")
    words = ("certify", "plan", *DATA, "--holdout", "0.4", "--epochs", 2, "--draws", 2, "--requests", 3)
    said = expunge(*words, "--methods", "newton-head,clipped-fine-tune,guo-removal")
    assert (said.code, said.err) == (0, "")
    assert "3 requests of 1 row within epsilon 1, delta 1e-05: softmax on" in said.out
    told = re.sub(r"\s+", " ", said.out)
    assert re.search(r"newton-head yes proved 0\.01 ", told)
    assert "from the start: weight_decay > 0, here 0.001" in told
    assert "cannot: no sigma keeps the worst case of 3 removals" in told
    data = json.loads(expunge(*words, "--methods", "newton-head", "--weight-decay", 0.5, "--rows", 2, "--json").out)
    assert (data["budget"]["requests"], data["rows_per_request"]) == (3, 2)
    assert (data["lines"][0]["demand"], data["lines"][0]["can"]) == ("", "yes")
    assert list(tmp_path.iterdir()) == [tmp_path / "t.csv"]


def test_a_plan_for_a_model_that_there_is(expunge, model):
    (model / "m.csv").write_bytes((model / "t.csv").read_bytes())
    words = ("certify", "plan", *DATA, "--test", "m.csv", "--methods", "newton-head", "--draws", 2, "--requests", 2)
    data = json.loads(expunge(*words, "--model-folder", "m", "--json").out)
    assert data["lines"][0]["can"] == "yes"
    said = expunge(*words, "--model-folder", "m", "--epochs", 3)
    assert said.code == 2
    assert "--model-folder brings its own recipe" in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give them: --test or --holdout"),
        (("--holdout", "0.3", "--methods", "magic"), 'got "magic"'),
        (("--holdout", "0.3", "--draws", "1"), "draws must be an integer >= 2"),
        (("--holdout", "0.3", "--requests", "1000"), "1,000 requests of 1 rows leave nothing"),
        (("--holdout", "0.3", "--rows", "0"), "rows of a request must be >= 1"),
    ],
)
def test_plans_that_cannot_be_meant(expunge, tmp_path, words, says):
    write_customers(tmp_path / "t.csv")
    said = expunge("certify", "plan", *DATA, *words)
    assert (said.code, said.out) == (2, "")
    assert says in said.err
    assert said.err.count("\n") == 1


def test_float_targets_have_no_accuracy(expunge, tmp_path):
    write_customers(tmp_path / "t.csv")
    words = ("--data", "t.csv", "--id-column", "id", "--owner-column", "owner", "--label-column", "spent")
    (tmp_path / "c.json").write_text(json.dumps({"regression": True, "columns": ["age"]}))
    said = expunge("certify", "plan", *words, "--columns", "c.json", "--holdout", "0.3")
    assert said.code == 2
    assert "plans are for classifiers" in said.err


def test_a_page_and_a_picture(expunge, tmp_path):
    write_customers(tmp_path / "t.csv")
    words = ("certify", "plot", *DATA, "--holdout", "0.4", "--epochs", 2, "--draws", 2, "--requests", 3)
    words = (*words, "--methods", "newton-head", "--epsilons", "1,.1")
    said = expunge(*words, "--out", "deep/p.html")
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith("written  deep/p.html\n")
    page = Path("deep/p.html").read_text()
    assert page.count("<svg") == 3
    assert "<span>--epsilons</span> <span>1,.1</span>" in page
    assert json.loads(Path("deep/p.json").read_text())["chapters"]["certified"]["epsilons"] == [0.1, 1.0]
    assert {path.name for path in Path("deep").iterdir()} == {"p.html", "p.json"}
    data = json.loads(expunge(*words, "--out", "p.svg", "--json").out)
    assert (len(data["lines"]), data["out"]) == (2, "p.svg")
    assert Path("p.svg").read_text().startswith("<?xml")
    again = expunge(*words, "--out", "p.svg")
    assert (again.code, "p.svg is there already" in again.err) == (2, True)
    assert "must end in .html or .svg" in expunge(*words, "--out", "p.png").err
    assert "--epsilons must be numbers" in expunge(*words[:-1], "a,b", "--out", "q.svg").err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_two_examples_that_parse(expunge, verb):
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


def test_the_list_has_every_verb_in_one_whole_line(expunge):
    said = expunge("certify", "--help")
    listed = said.out.partition("Commands:")[2]
    assert all(f"\n  {verb} " in listed for verb in VERBS)
    assert "..." not in listed
    assert "\n  certify " in expunge("--help").out


def test_settings_of_certified_methods_can_be_said_in_words():
    method = named_method("newton-head", ["budget=2,1e-6,7", "public_extractor=yes", "refactor_after=3"])
    assert (method.budget.epsilon, method.budget.delta, method.budget.requests) == (2.0, 1e-6, 7)
    assert (method.public_extractor, method.refactor_after) == (True, 3)
    assert not named_method("newton-head", ["public_extractor=false"]).public_extractor
    assert named_method("newton-head", []) == NewtonHead()
    for wrong, says in [
        ("budget=1,1e-5", "must be epsilon,delta,requests"),
        ("budget=a,b,c", "must be epsilon,delta,requests"),
        ("budget=-1,1e-5,3", "epsilon must be > 0"),
    ]:
        with pytest.raises(Misuse, match=says):
            named_method("newton-head", [wrong])
    assert METHODS["newton-head"] is NewtonHead
