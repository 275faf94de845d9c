"""`expunge verify` as owners and auditors meet it: transcripts, coins, triggers and the matrix."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from expunge import Records
from expunge.cli import parser
from expunge.datasets import load_records, save_npy
from expunge.testing.case import digits
from tests.cli.conftest import TABLE, write_customers

CASE = digits(rows=600, owners=8, careless=0)
RECIPE = {"model": "mlp", "model_args": {"hidden": [8]}, "epochs": 2, "batch_size": 8, "seed": 3}
DATA = ("--data", "t.csv", *TABLE)
AGREED = ("--recipe", "agreed.json")
CHECKS = ["contract", "commitment", "initialisation", "removal", "sampler", "replay", "final model"]


@pytest.fixture
def told(expunge, tmp_path):
    """A retraining without owner c-3 in the folder `after`, and its transcript in `told`; `before` is on all rows."""
    write_customers(tmp_path / "t.csv")
    (tmp_path / "agreed.json").write_text(json.dumps(RECIPE))
    assert expunge("train", *DATA, *AGREED, "--out", "before", "-q").code == 0
    leave = ("--without-owner", "c-3", "--transcript", "told")
    assert expunge("train", *DATA, *AGREED, *leave, "--out", "after", "-q").code == 0
    return tmp_path


def verify(expunge, *words):
    said = expunge("verify", "transcript", "told", *DATA, *AGREED, *words, "--json")
    assert said.err == ""
    data = json.loads(said.out)
    outcomes = {one["check"]: one["outcome"] for one in data["verdicts"]}
    assert (said.code == 0) == data["accepted"] == (set(outcomes.values()) == {"pass"})
    return outcomes


def test_an_honest_transcript_passes_every_check_and_the_text_says_so(expunge, told):
    passes = dict.fromkeys(CHECKS, "pass")
    assert verify(expunge, "--forget-owner", "c-3", "--served", "after") == passes
    said = expunge("verify", "transcript", "told", *DATA, *AGREED, "--id", "r-6", "--id", "r-7", "--served", "after")
    assert said.code == 0
    assert re.search(r"(?m)^pass +final model: ", said.out)
    assert re.search(r"(?m)^accepted; commitment [0-9a-f]{64}$", said.out)


@pytest.mark.parametrize(
    ("words", "failed"),
    [
        (("--forget-owner", "c-3", "--served", "before"), {"final model"}),
        (("--served", "after"), {"contract", "commitment"}),
        (("--forget-owner", "c-4", "--served", "after"), {"commitment", "removal"}),
    ],
)
def test_what_is_not_so_fails_by_its_name(expunge, told, words, failed):
    assert failed <= {name for name, outcome in verify(expunge, *words).items() if outcome == "fail"}


def test_without_a_served_model_it_is_inconclusive_which_is_not_passed(expunge, told):
    outcomes = verify(expunge, "--forget-owner", "c-3")
    assert outcomes.pop("final model") == "inconclusive"
    assert set(outcomes.values()) == {"pass"}


def test_another_recipe_than_agreed_fails_the_contract(expunge, told):
    (told / "agreed.json").write_text(json.dumps({**RECIPE, "optimiser_args": {"lr": 0.01}}))
    assert verify(expunge, "--forget-owner", "c-3", "--served", "after")["contract"] == "fail"


def test_spot_checks_replay_a_share_and_the_largest_update(expunge, told):
    words = ("--forget-owner", "c-3", "--served", "after", "--spot", "5%", "--json")
    said = expunge("verify", "transcript", "told", *DATA, *AGREED, *words)
    replay = next(one for one in json.loads(said.out)["verdicts"] if one["check"] == "replay")
    assert 1 <= replay["figures"]["replayed"] <= 2
    for wrong in ("0", "2", "much", "nan"):
        said = expunge("verify", "transcript", "told", *DATA, *AGREED, "--spot", wrong)
        assert (said.code, "--spot" in said.err) == (2, True)


def test_an_audit_of_the_data_is_one_more_verdict(expunge, told):
    assert "near copies" in verify(expunge, "--forget-owner", "c-3", "--served", "after", "--audit")


def test_a_coin_is_committed_to_drawn_counted_and_replayed(expunge, told):
    shutil.rmtree(told / "told")
    gone = ("--forget-owner", "c-3")
    assert expunge("verify", "commit", *DATA, *AGREED, *gone, "--out", "commitments.json").code == 0
    book = ("--registry", "coins.json", "--subject", "request-1")
    assert expunge("verify", "draw", "commitments.json", *book, "--out", "coin.json").code == 0
    made = ("--without-owner", "c-3", "--transcript", "told", "--coin", "coin.json", "--out", "fair", "-q")
    assert expunge("train", *DATA, *AGREED, *made).code == 0
    outcomes = verify(expunge, *gone, "--served", "fair", "--coin", "coin.json")
    assert outcomes == dict.fromkeys(CHECKS, "pass")
    assert verify(expunge, *gone, "--served", "fair")["contract"] == "fail"
    spend = ("verify", "spend", "told", "--coin", "coin.json", "--registry", "coins.json")
    for _ in range(2):
        assert json.loads(expunge(*spend, "--json").out)["tries"] == 1
    again = expunge("verify", "draw", "commitments.json", *book, "--out", "second.json", "--json")
    assert json.loads(again.out)["tries"] == 2
    said = expunge(*spend)
    assert (said.code, "a later nonce" in said.err) == (2, True)
    said = expunge(*spend[:4], "second.json", *spend[5:])
    assert (said.code, "made by another coin" in said.err) == (2, True)
    said = expunge(*spend[:-1], "nowhere.json")
    assert (said.code, "is no registry" in said.err, (told / "nowhere.json").exists()) == (2, True, False)
    assert verify(expunge, *gone, "--served", "fair", "--coin", "second.json")["contract"] == "fail"
    other = json.loads((told / "coin.json").read_text())
    other["commitments"]["members"] = other["commitments"]["members"][:1]
    (told / "coin.json").write_text(json.dumps(other))
    said = expunge("verify", "transcript", "told", *DATA, *AGREED, "--coin", "coin.json")
    assert (said.code, "proof" in said.err) == (2, True)


def test_shards_are_verified_one_by_one(expunge, told):
    cut = ("--recipe", "cut.json")
    (told / "cut.json").write_text(json.dumps({**RECIPE, "sharding": {"shards": 2, "salt": "s"}}))
    made = ("--without-owner", "c-3", "--transcript", "parts", "--out", "sharded", "-q")
    assert expunge("train", *DATA, *cut, *made).code == 0
    words = ("verify", "transcript", "parts", *DATA, *cut, "--forget-owner", "c-3", "--served", "sharded")
    said = expunge(*words, "--json")
    data = json.loads(said.out)
    assert (said.code, len(data["verdicts"]), set(data["commitment"])) == (0, 14, {"0", "1"})
    assert data["verdicts"][0]["check"] == "shard 0, contract"
    assert re.search(
        r"(?m)^accepted; commitment [0-9a-f]{64} of shard 0, [0-9a-f]{64} of shard 1$", expunge(*words).out
    )
    said = expunge("verify", "transcript", "parts", *DATA, *AGREED)
    assert (said.code, "agreed recipe has no shards; give the one with shards" in said.err) == (2, True)
    assert expunge(*words, "--committed", "ab").code == 2
    for name in ("part-0", "part-one", "part-0001.bak", "notes.txt"):
        shutil.copytree(told / "parts" / "part-0000", told / "parts" / name)
        said = expunge(*words)
        assert (said.code, "no shard's transcript" in said.err) == (2, True)
        shutil.rmtree(told / "parts" / name)
    shutil.rmtree(told / "parts" / "part-0001")
    data = json.loads(expunge(*words, "--json").out)
    assert [one["check"] for one in data["verdicts"] if one["outcome"] == "fail"] == ["shard 1, commitment"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Digits as folders of arrays: `rows` to train on, of 8 owners, and `held` to ask about."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, rows in (("rows", CASE.records), ("held", CASE.test)):
        square = Records(rows.x.reshape(-1, 8, 8), rows.y, rows.ids, rows.owners, classes=10)
        save_npy(square, folder / name)
    recipe = {**RECIPE, "model_args": {"hidden": [32]}, "epochs": 10, "batch_size": 32, "optimiser_args": {"lr": 0.2}}
    (folder / "agreed.json").write_text(json.dumps(recipe))
    return folder


def test_an_owner_plants_asks_and_finds_out(expunge, pictures):
    rows, agreed = pictures / "rows", ("--recipe", pictures / "agreed.json")
    owner = CASE.records.owners[0]
    words = ("--data", rows, "--out", "planted", "--keys", "key.json", "--share", "1", "--places", "16")
    said = expunge("verify", "plant", owner, *words, "--json")
    assert json.loads(said.out)["stamped"] > 40
    planted = load_records("planted")
    assert (set(planted.ids), planted.classes) == (set(CASE.records.ids), 10)
    assert expunge("train", "--data", "planted", *agreed, "--out", "before", "-q").code == 0
    assert expunge("train", "--data", "planted", *agreed, "--without-owner", owner, "--out", "after", "-q").code == 0
    ask = ("--data", "planted", "--test", pictures / "held", "--keys", "key.json", "--before", "before", "--seed", "5")
    lazy, honest = (expunge("verify", "backdoor", model, *ask, "--json") for model in ("before", "after"))
    # The secret is drawn afresh, and of some triggers draws come too near; never is it the wrong way about.
    assert (lazy.code, json.loads(lazy.out)["outcome"]) in ((1, "fail"), (1, "inconclusive"))
    assert json.loads(honest.out)["outcome"] in ("pass", "inconclusive")
    assert json.loads(lazy.out)["figures"]["success"] > json.loads(honest.out)["figures"]["success"] + 0.2
    alike = ("--data", "planted", "--test", pictures / "held", "--before", "before")
    assert expunge("verify", "alike", "after", "--stranger", "after", *alike).code == 0
    said = expunge("verify", "alike", "after", "--stranger", "before", *alike)
    assert (said.code, said.out.startswith("fail")) == (1, True)


def test_a_key_is_for_its_owners_eyes_only_and_never_written_over(expunge, pictures, tmp_path):
    words = ("verify", "plant", CASE.records.owners[0], "--data", pictures / "rows", "--keys", "key.json")
    assert expunge(*words, "--out", "one").code == 0
    assert (tmp_path / "key.json").stat().st_mode & 0o777 == 0o600
    said = expunge(*words, "--out", "two")
    assert (said.code, "is there already" in said.err, (tmp_path / "two").exists()) == (2, True, False)


def test_the_plan_is_the_number_of_queries(expunge):
    said = expunge("verify", "plan", "--before", ".4", "--after", ".1", "--json")
    assert json.loads(said.out) == {"first": 73, "always": 76, "checked_to": 154}
    assert expunge("verify", "plan", "--before", ".4").out.startswith("73 queries")
    assert expunge("verify", "plan", "--before", ".1", "--after", ".4").code == 3


def test_the_matrix_is_told_kept_and_its_exit_code_says_if_somebody_escapes(expunge, pictures):
    base = ("verify", "matrix", "--data", pictures / "rows", "--test", pictures / "held", "--out", "m", "--seeds", 1)
    some = ("--epochs", 1, "--providers", "honest retrain; selective server", "--quiet")
    said = expunge(*base, *some)
    told = json.loads(Path("m/report.json").read_text())
    assert (said.code == 0) == told["sound"]
    assert re.search(r"(?m)^honest retrain +", said.out)
    assert "By nothing but served alike is caught: selective server." in said.out
    assert expunge(*base, *some).code == 2
    again = expunge(*base, *some, "--resume", "--json")
    assert json.loads(again.out)["cells"] == told["chapters"]["verify"]["cells"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("matrix", "--data", "t.csv", *TABLE, "--out", "m"), "give some: --test"),
        (("matrix", "--data", "t.csv", *TABLE, "--out", "m", "--resume"), "no run to go on with"),
        (("matrix", *DATA, "--test", "t.csv", "--out", "m", "--providers", "me"), "--providers are honest retrain"),
        (("transcript", "nowhere", *DATA, *AGREED), "nowhere"),
        (("transcript", "nowhere", *DATA, *AGREED, "--coin", "agreed.json"), "holds no coin"),
        (("draw", "agreed.json", "--registry", "r", "--subject", "s", "--out", "c"), "holds no commitments"),
        (("backdoor", "m", *DATA, "--test", "t.csv", "--keys", "agreed.json"), "no trigger key"),
        (("backdoor", "m", *DATA, "--keys", "agreed.json"), "give some: --test"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(expunge, tmp_path, words, told):
    write_customers(tmp_path / "t.csv")
    (tmp_path / "agreed.json").write_text(json.dumps(RECIPE))
    said = expunge("verify", *words)
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert said.err.count("\n") == 1


def test_a_coin_without_a_transcript_is_refused(expunge, tmp_path):
    write_customers(tmp_path / "t.csv")
    said = expunge("train", *DATA, "--out", "m", "--coin", "c.json")
    assert (said.code, "--transcript" in said.err) == (2, True)


def test_every_example_is_a_command(expunge):
    group = parser().commands["verify"].commands
    assert set(group) == {"transcript", "backdoor", "alike", "plant", "plan", "matrix", "commit", "draw", "spend"}
    for verb, command in group.items():
        examples = re.findall(r"(?m)^ *expunge verify (.*)$", re.sub(r"\\\n *", "", command.help))
        assert examples
        for example in examples:
            with command.make_context(verb, shlex.split(example)[1:]):
                pass
