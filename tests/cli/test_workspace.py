"""Requests honoured through the command line, from an empty folder to a certificate that its owner checks alone."""

import csv
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import expunge as library
from expunge.cli import parser
from expunge.cli.standing import safe_cell
from expunge.core.protocols import Held
from expunge.ledger.states import DENIALS, State
from expunge.unlearn import Retrain, Sisa
from expunge.workflow import Journey, Workspace
from tests.cli.conftest import TABLE, call

VERBS = shlex.split("init register-model request status run release deny cancel extend identify certificate")
VERBS += ["verify-bundle", "log", "sweep", "export"]
FILED = {
    *("id", "model", "kind", "state", "regime", "received_at", "due_at", "extended", "exact", "run", "why"),
    *("updated_at", "days_left", "paused", "overdue", "late"),
}
TAKEN = {"completed", "held", "withheld", "failed", "waiting", "unfinished", "standing", "error"}


@pytest.fixture(scope="session")
def made(shop, tmp_path_factory):
    """A workspace that serves `churn`, the sharded model of customers.csv."""
    root = tmp_path_factory.mktemp("made") / "ws"
    call("init", str(root))
    data = ("--data", str(shop / "customers.csv"), *TABLE)
    call("register-model", "churn", str(shop / "sharded"), *data, "--workspace", str(root))
    return root


@pytest.fixture
def ws(made, tmp_path):
    """A copy of that workspace, beside which commands run."""
    return shutil.copytree(made, tmp_path / "ws")


@pytest.fixture
def ask(expunge, ws):
    """``ask(words)`` runs a command in the workspace with --json, and gives the one object that it must print."""

    def run(*words, code=0):
        said = expunge(*words, "--workspace", ws, "--json")
        assert said.code == code, said
        assert said.out.count("\n") == 1, said
        return json.loads(said.out)

    return run


@pytest.fixture
def opened(ws):
    """The workspace as Python sees it."""
    workspace = Workspace(ws)
    yield workspace
    workspace.close()


def checked(folder, *words):
    """What the copied checker says, alone in its folder, with nothing of this package to import."""
    words = [sys.executable, "-I", "check.py", *map(str, words)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})


def test_a_journey_from_an_empty_folder_to_a_certificate_checked_without_us(expunge, optdigits, tmp_path, monkeypatch):
    words = ("--model", "softmax", "--epochs", "1", "--shards", "4", "--out", "m")
    assert expunge("train", "--data", "optdigits", *words).code == 0
    said = expunge("init", "shop")
    assert "shop/keys/expunge.pub" in said.out
    assert "expunge register-model" in said.out
    assert stat.S_IMODE(Path("shop").stat().st_mode) == 0o700
    published = shutil.copy("shop/keys/expunge.pub", tmp_path / "published.pub")
    said = expunge("register-model", "digits", "m", "--data", "optdigits", "--workspace", "shop")
    assert "3,823 records committed to; removal by sisa, which claims at most: exact" in said.out
    (tmp_path / "shop" / "models").joinpath("below").mkdir()
    monkeypatch.chdir(tmp_path / "shop" / "models" / "below")  # the workspace is found upward from here
    first = json.loads(expunge("request", "digits", "--owner", "owner-017", "--key", "t-1", "--json").out)
    assert "0 requests" not in expunge("status").out
    assert expunge("log", "--checkpoint").code == 0
    said = expunge("run", "--quiet")
    assert (said.code, said.out, said.err) == (0, "digits: 1 completed\n", "")
    monkeypatch.chdir(tmp_path)

    one = expunge("status", first["id"], "--workspace", "shop").out
    assert re.search(r"received .*screened .*running .*verifying .*completed ", one, re.DOTALL)
    assert "asked   erased, for it is done" in one
    assert f"expunge certificate {first['id']}" in one
    said = expunge("certificate", first["id"], "--out", "answer", "--keys", "--workspace", "shop")
    assert "hand it to the owner alone" in said.out
    assert {path.name for path in Path("answer").iterdir()} == {
        *("README.txt", "bundle.json", "check.py", "expunge.pub", "keys.json")
    }
    assert stat.S_IMODE(Path("answer/keys.json").stat().st_mode) == 0o600
    alone = checked("answer", "bundle.json", "--key", published)
    assert (alone.returncode, alone.stderr) == (0, "")
    assert "verdict: every check passed" in alone.stdout
    assert "training read exactly those" in alone.stdout
    ours = expunge("verify-bundle", "answer/bundle.json", "--key", published)
    assert (ours.code, ours.out) == (0, alone.stdout)

    mine = optdigits.train.of_owner("owner-017")
    rows = [word for digest in mine.digests() for word in ("--row", digest.tobytes().hex())]
    opening = ("--keys", "keys.json", "--owner", "owner-017", *rows)
    alone = checked("answer", "bundle.json", "--key", published, *opening)
    assert alone.returncode == 0
    assert f"{len(mine)} of the {len(mine)} removed commitments were opened" in alone.stdout
    other = ("--keys", "answer/keys.json", "--owner", "owner-018", *rows)
    said = expunge("verify-bundle", "answer/bundle.json", "--key", published, *other)
    assert said.code == 1
    assert "FAIL keys" in said.out

    size = expunge("log", "--since", 2, "--out", "proof.json", "--workspace", "shop")
    assert size.code == 0
    shutil.move("proof.json", "answer")
    assert (
        "ok   consistency: the first 2 of"
        in checked("answer", "--consistency", "proof.json", "--key", published).stdout
    )
    assert expunge("log", "--verify", "--workspace", "shop").code == 0
    said = expunge("sweep", "--workspace", "shop")
    assert said.code == 0
    assert f"searched for {len(mine)} records, nothing found" in said.out
    assert "not looked for: rows cropped" in said.out
    scratch = library.train(library.load("m").recipe, optdigits.train.without(mine.ids))
    shop = Workspace("shop")
    assert shop.ledger.models.served("digits").digest == scratch.digest()
    shop.close()


def test_a_changed_certificate_is_refused_by_both_checkers(ask, expunge, ws):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    ask("run")
    ask("certificate", request, "--out", "answer")
    bundle = Path("answer/bundle.json")
    bundle.write_bytes(bundle.read_bytes().replace(b'"checkpoint":"expunge', b'"checkpoint":"expunpe'))
    assert checked("answer", "bundle.json", "--key", "expunge.pub").returncode == 1
    said = expunge("verify-bundle", bundle, "--key", "answer/expunge.pub", "--json")
    found = json.loads(said.out)
    assert said.code == 1
    assert set(found) == {"bundle", "passed", "checks", "statement", "not_proved"}
    assert not found["passed"]
    assert [one["check"] for one in found["checks"] if not one["passed"]] == ["checkpoint"]
    said = expunge("verify-bundle", bundle, "--key", ws / "keys" / "signing.pem")
    assert said.code == 2
    assert said.err.count("\n") == 1


def test_the_readme_says_how_to_check_and_what_is_not_proved(ask, ws):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    ask("run")
    found = ask("certificate", request, "--out", "answer")
    assert set(found) == {"request", "folder", "files", "removed", "already_gone", "claim"}
    assert (found["removed"], found["already_gone"], found["claim"]) == (2, 0, "exact")
    text = Path("answer/README.txt").read_text()
    command = next(line.split() for line in text.splitlines() if line.strip().startswith("python check.py"))
    assert checked("answer", *command[2:]).returncode == 0
    assert "What it does not prove" in text
    assert "You were not given the keys" in text
    assert not re.search(r"c-1\b|r-[23]\b", text)
    assert not Path("answer/keys.json").exists()
    assert max(map(len, text.splitlines())) < 150


def test_the_same_request_under_the_same_key_is_one(ask, expunge, ws):
    first = ask("request", "churn", "--owner", "c-1", "--key", "t-1")
    assert set(first) == {*FILED, "new"}
    assert (first["new"], first["state"], first["days_left"] >= 28) == (True, "received", True)
    again = ask("request", "churn", "--owner", "c-1", "--key", "t-1")
    assert (again["id"], again["new"]) == (first["id"], False)
    said = expunge("request", "churn", "--owner", "c-2", "--key", "t-1", "--workspace", ws)
    assert said.code == 2
    assert "used before for another request" in said.err
    assert ask("request", "churn", "--owner", "c-1")["new"] is True
    said = expunge("request", "churn", "--id", "r-1", "--id", "r-2", "--workspace", ws)
    assert re.fullmatch(r"[0-9a-f-]{36}  due \d{4}-\d\d-\d\d \(\d+ days left\)  new\n", said.out)


def test_a_key_of_another_model_is_not_answered_with_that_models_request(ask, expunge, ws, shop):
    data = ("--data", shop / "customers.csv", *TABLE)
    ask("register-model", "second", shop / "whole", *data)
    ask("request", "churn", "--owner", "c-1", "--key", "t-1")
    said = expunge("request", "second", "--owner", "c-1", "--key", "t-1", "--workspace", ws)
    assert said.code == 2
    assert 'used before for a request about "churn"' in said.err


def write_csv(name, *lines):
    with Path(name).open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(lines)
    return name


def test_a_file_of_owners_is_filed_in_one_go_and_once(ask, opened):
    table = write_csv("gone.csv", ["since", "customer"], ["2020", "c-1"], ["2021", "c-2"], [], ["2022", "c-1"])
    found = ask("request", "churn", "--csv", table, "--owner-column", "customer")
    assert set(found) == {"requests", "count", "new"}
    assert (found["count"], found["new"]) == (2, 2)
    assert [opened.asked(one["id"]).owner for one in found["requests"]] == ["c-1", "c-2"]
    again = ask("request", "churn", "--csv", table, "--owner-column", "customer")
    assert (again["count"], again["new"]) == (2, 0)
    assert [one["id"] for one in again["requests"]] == [one["id"] for one in found["requests"]]
    longer = write_csv("more.csv", ["owner"], ["c-1"], ["c-3"])
    assert ask("request", "churn", "--csv", longer, "--key", "batch")["new"] == 2
    longer = write_csv("most.csv", ["owner"], ["c-1"], ["c-3"], ["c-4"])
    assert ask("request", "churn", "--csv", longer, "--key", "batch")["new"] == 1


def test_a_line_of_a_file_is_the_same_request_as_one_filed_from_python(ask, opened):
    found = ask("request", "churn", "--csv", write_csv("a.csv", ["owner"], ["c-1"]), "--key", "k")["requests"][0]
    filed, new = opened.file("churn", library.Request.remove_owner("c-1"), key="k/c-1")
    assert (filed.id, new) == (found["id"], False)


def test_a_file_of_records_is_one_request_a_record_or_one_an_owner(ask, opened):
    lines = (["owner", "id"], ["c-1", "r-2"], ["c-1", "r-3"], ["c-2", "r-4"])
    table = write_csv("gone.csv", *lines)
    one_each = ask("request", "churn", "--csv", table, "--id-column", "id", "--key", "a")["requests"]
    assert [opened.asked(one["id"]).ids for one in one_each] == [("r-2",), ("r-3",), ("r-4",)]
    by_owner = ask("request", "churn", "--csv", table, "--id-column", "id", "--owner-column", "owner")["requests"]
    assert [opened.asked(one["id"]).ids for one in by_owner] == [("r-2", "r-3"), ("r-4",)]
    assert len(ask("request", "churn", "--csv", table, "--key", "b")["requests"]) == 2  # by the column called owner
    table = write_csv("ids.csv", ["id"], ["r-5"])
    assert opened.asked(ask("request", "churn", "--csv", table)["requests"][0]["id"]).ids == ("r-5",)


def test_a_bad_line_files_nothing(ask, expunge, ws):
    table = write_csv("gone.csv", ["owner", "x"], ["c-1", "1"], ["", "2"])
    said = expunge("request", "churn", "--csv", table, "--workspace", ws)
    assert said.code == 2
    assert "line 3 of gone.csv" in said.err
    ask("request", "churn", "--owner", "c-9", "--key", "k/c-2")
    table = write_csv("gone.csv", ["owner"], ["c-1"], ["c-2"])
    assert expunge("request", "churn", "--csv", table, "--key", "k", "--workspace", ws).code == 2
    assert ask("status")["count"] == 1


def test_the_legal_clock_runs_from_receipt_and_an_overdue_request_is_shown_and_told(ask, expunge, ws):
    late = (datetime.now(UTC) - timedelta(days=40)).date().isoformat()
    soon = (datetime.now(UTC) - timedelta(days=27)).isoformat()
    ask("request", "churn", "--owner", "c-1", "--received-at", late)
    ask("request", "churn", "--owner", "c-2", "--received-at", soon)
    ask("request", "churn", "--owner", "c-3", "--received-at", late, "--unverified")
    found = ask("status", "--check", code=1)
    assert set(found) == {"requests", "count", "overdue"}
    assert set(found["requests"][0]) == FILED
    assert (found["count"], found["overdue"]) == (3, 1)
    first, second, third = found["requests"]
    assert first["received_at"] == f"{late}T00:00:00.000000Z"
    assert first["overdue"]
    assert first["days_left"] < 0 < second["days_left"] < 8
    assert (third["paused"], third["days_left"], third["overdue"]) == (True, None, False)
    text = expunge("status", "--workspace", ws)
    assert text.code == 0  # only --check tells by the exit code
    assert re.search(r"OVERDUE by \d+ days", text.out)
    assert "clock stands still" in text.out
    assert "3 requests, 1 OVERDUE" in text.out
    assert "\x1b" not in text.out
    ask("cancel", first["id"])
    assert ask("status", "--check")["overdue"] == 0


def test_the_list_is_chosen_by_state_and_model(ask, expunge, ws):
    first = ask("request", "churn", "--owner", "c-1")["id"]
    ask("request", "churn", "--owner", "c-2", "--unverified")
    assert [one["id"] for one in ask("status", "--state", "received", "--model", "churn")["requests"]] == [first]
    assert ask("status", "--state", "received", "--state", "identity_unverified")["count"] == 2
    assert expunge("status", "--state", "held", "--workspace", ws).out == "no request like that\n"
    said = expunge("status", "--state", "gone", "--workspace", ws)
    assert (said.code, "'gone' is not one of" in said.err) == (2, True)
    assert expunge("status", "--model", "x", "--workspace", ws).code == 2


def test_one_request_is_shown_with_its_events_and_what_comes_next(ask, expunge, ws):
    request = ask("request", "churn", "--id", "r-1", "--id", "r-2", "--unverified")["id"]
    found = ask("status", request)
    assert set(found) == {*FILED, "events", "next", "screened"}
    assert found["screened"] is None
    assert [event["kind"] for event in found["events"]] == ["received"]
    assert found["next"].endswith(f"expunge identify {request}")
    assert "asked   remove r-1, r-2\n" in expunge("status", request, "--workspace", ws).out
    assert ask("identify", request[:8])["state"] == "received"
    assert ask("status", request[:8])["next"].endswith("expunge run")
    assert ask("extend", request, "--why", "many requests")["extended"] is True
    assert expunge("extend", request, "--why", "again", "--workspace", ws).code == 2
    assert ask("cancel", request[:13])["state"] == "cancelled"
    found = ask("status", request)
    assert found["next"] == "nothing: it is final"
    assert [event["kind"] for event in found["events"]] == ["received", "identified", "extended", "cancelled"]
    assert expunge("cancel", request, "--workspace", ws).code == 2


def test_every_state_has_a_next_step_that_parses(ask, opened):
    from dataclasses import replace

    from expunge.cli.standing import next_of

    filed = opened.ledger.requests.get(ask("request", "churn", "--owner", "c-1")["id"])
    for state in State:
        said = next_of(opened, replace(filed, state=state))
        assert ("final" in said) == (state.final and state is not State.COMPLETED)
        for command in re.findall(r"expunge [a-z][^(,]*", said):
            parse(command.strip())


def test_what_people_filed_cannot_steer_the_terminal(ask, expunge, ws):
    request = ask("request", "churn", "--owner", "c-\x1b[31m\u202ered")["id"]
    for words in (("status", request), ("run",), ("status",)):
        said = expunge(*words, "--workspace", ws)
        assert not re.search("[\x1b\u202e]", said.out + said.err)
    assert "\\x1b" in said.out


def test_what_cannot_be_carried_out_is_held_and_a_flag_is_no_reason_to_deny(ask, expunge, ws):
    request = ask("request", "churn", "--owner", "nobody")["id"]
    found = ask("run", code=1)
    assert set(found) == {"models", "good"}
    assert set(found["models"]["churn"]) == TAKEN
    assert found["models"]["churn"]["held"] == [request]
    said = expunge("deny", request, "--reason", "flagged", "--workspace", ws)
    assert said.code == 3
    assert "release it, with --exact" in said.err
    assert expunge("deny", request, "--reason", "suspected_fraud", "--workspace", ws).code == 3
    said = expunge("deny", request, "--reason", "dislike", "--workspace", ws)
    assert (said.code, all(reason in said.err for reason in DENIALS)) == (2, True)
    assert ask("status", request)["state"] == "held"
    denied = ask("deny", request, "--reason", "no_match")
    assert (denied["state"], denied["why"]) == ("denied", "no_match")


def test_the_help_of_deny_lists_every_reason_and_no_other(expunge):
    said = expunge("deny", "--help").out.partition("Reasons:")[2].partition("Examples:")[0]
    assert re.findall(r"(?m)^    ([a-z_]+) ", said) == list(DENIALS)


def test_a_released_request_is_carried_out_exactly_if_asked(ask, opened):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    opened.ledger.requests.screening(request)
    opened.ledger.requests.screened(request, held="it looks odd", stages=["screen: held"])
    assert ask("status", request)["why"] == "it looks odd"
    released = ask("release", request, "--exact")
    assert (released["state"], released["exact"], released["why"]) == ("pending", True, None)
    assert ask("run")["models"]["churn"]["completed"] == [request]
    assert ask("status", request)["events"][-1]["kind"] == "completed"


def test_the_status_of_a_screened_request_says_in_words_what_was_found_and_what_came_of_it(ask, expunge, opened, ws):
    ledger, told = opened.ledger.requests, "flagged by GradientInfluence: p 0.005, at 5 % false alarms"

    def screened(owner, stage, held=None, exact=False):
        request = ask("request", "churn", "--owner", owner)["id"]
        assert ask("status", request)["screened"] is None
        ledger.screening(request)
        ledger.screened(request, held=held, exact=exact, stages=[f"screen: {stage}"])
        return request

    def shown(request):
        words = ask("status", request)["screened"]
        assert (f"screen  {words}\n" in expunge("status", request, "--workspace", ws).out) == (words is not None)
        return words

    sent = screened("c-1", f"held: {told}", exact=True)
    assert shown(sent) == f"{told}: sent to exact retraining"
    waits = screened("c-2", f"held: {told}", held=told)
    assert shown(waits) == f"{told}: held for a person"
    ask("release", waits)
    assert shown(waits) == f"{told}: released by a person"
    doubted = screened("c-3", "held", held="it looks odd")  # as logs have it that were written before reasons were kept
    assert shown(doubted) == "flagged: held for a person"
    ask("release", doubted, "--exact")
    assert shown(doubted) == "flagged: released by a person, to exact retraining"
    assert shown(screened("c-4", "passed: not flagged: p 0.4, at 5 % false alarms")).startswith("not flagged: p 0.4")
    assert shown(screened("c-5", "not done")) is None
    assert shown(screened("c-6", "failed", exact=True)) == "the screen itself failed: sent to exact retraining"


class Doubt:
    """A verifier that withholds everything."""

    name = "verify"

    def __call__(self, job, *, rng):
        return Held(why="the provider seems to cheat")


def withheld(opened, shop, *owners):
    records = library.load_records(shop / "customers.csv", id="id", owner="owner", label="left", classes=["no", "yes"])
    for owner in owners:
        opened.file("churn", library.Request.remove_owner(owner))
    journey = Journey(opened, "churn", records, method=Sisa(), exact=Retrain(), stages=[Doubt()])
    return records, journey.run("liar").withheld


def test_the_fallback_is_served_for_all_that_is_withheld(ask, expunge, opened, ws, shop):
    records, (first, second) = withheld(opened, shop, "c-1", "c-2")
    assert f"expunge release {first} --exact" in ask("status", first)["next"]
    said = expunge("release", "--fallback", first, "--workspace", ws)
    assert (said.code, "has no fallback; train one" in said.err) == (2, True)
    mine = [*records.of_owner("c-1").ids, *records.of_owner("c-2").ids]
    library.train(library.Recipe(model="softmax", epochs=1), records.without(mine)).save("other")
    toml = ws / "expunge.toml"
    toml.write_text(toml.read_text() + f'fallback = "{Path("other").absolute()}"\n')
    found = ask("release", "--fallback", first)
    assert set(found) == {"model", "version", "digest", *TAKEN} - {"unfinished", "standing", "error"}
    assert sorted(found["completed"]) == sorted([first, second])
    assert ask("certificate", first, "--out", "answer")["claim"] == "none"
    assert checked("answer", "bundle.json", "--key", "expunge.pub").returncode == 0
    said = expunge("release", "--fallback", "churn", "--workspace", ws)
    assert (said.code, "no request about" in said.err) == (2, True)


def test_a_fallback_that_read_the_records_is_refused(ask, expunge, opened, ws, shop):
    _, (request,) = withheld(opened, shop, "c-1")
    toml = ws / "expunge.toml"
    toml.write_text(toml.read_text() + f'fallback = "{shop / "whole"}"\n')
    found = ask("release", "--fallback", "churn", code=1)
    assert found["failed"] == [request]
    assert "was trained on records that must go" in ask("status", request)["why"]
    assert ask("log", "--verify")["sound"] is True


def test_an_interrupted_run_goes_on_to_the_same_end(ask, expunge, ws, monkeypatch):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    for place in ("expunge.workflow.steps.carry_out", "expunge.workflow.erasure.look"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            said = expunge("run", "--workspace", ws)
        assert said.code == 4
        assert said.out == ""
        assert re.fullmatch(r"error: interrupted.*run the same command again\n", said.err)
    assert ask("run")["models"]["churn"]["completed"] == [request]
    assert ask("log", "--verify") == {"sound": True, "faults": [], "entries": 8}


def interrupt(*_args, **_options):
    raise KeyboardInterrupt


def test_a_run_that_another_worker_holds_is_left_to_it(ask, opened):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    opened.ledger.requests.screening(request)
    opened.ledger.requests.screened(request, held=None)
    opened.ledger.runs.claim("churn", "somebody else")
    found = ask("run", code=1)["models"]["churn"]
    assert (found["completed"], found["unfinished"], found["error"]) == ([], [request], None)
    assert ask("run", "--worker", "somebody else")["models"]["churn"]["completed"] == [request]


def test_a_batch_waits_to_be_filled_unless_told_otherwise(ask, expunge, ws):
    toml = ws / "expunge.toml"
    toml.write_text(toml.read_text().replace("\ncount = 1\n", "\ncount = 3\n"))
    first = ask("request", "churn", "--owner", "c-1")["id"]
    said = expunge("run", "--workspace", ws)
    assert said.code == 0
    assert "churn: 1 waiting\n  waiting for the batch" in said.out
    second = ask("request", "churn", "--owner", "c-2")["id"]
    assert ask("run", "churn", "--now")["models"]["churn"]["completed"] == [first, second]


def test_a_model_whose_data_is_lost_does_not_keep_the_others_from_their_deadlines(ask, expunge, ws, shop, tmp_path):
    copy = shutil.copy(shop / "customers.csv", tmp_path / "copy.csv")
    ask("register-model", "second", shop / "whole", "--data", copy, *TABLE, "--method", "retrain")
    ask("request", "second", "--owner", "c-1")
    mine = ask("request", "churn", "--owner", "c-1")["id"]
    Path(copy).unlink()
    said = expunge("run", "--workspace", ws, "--json")
    found = json.loads(said.out)["models"]
    assert said.code == 2
    assert re.fullmatch(r'error: second: "[^"]+copy.csv" is no file[^\n]+\n', said.err)
    assert found["churn"]["completed"] == [mine]
    assert found["second"]["error"] is not None


def leave(ws, shop):
    """What somebody forgot in the workspace: a removed row as the program holds it, in the middle of a file."""
    records = library.load_records(shop / "customers.csv", id="id", owner="owner", label="left", classes=["no", "yes"])
    path = ws / "scratch.bin"
    path.write_bytes(b"before" + records.take(["r-2"]).x.numpy().tobytes() + b"after")
    return path


def test_what_is_left_over_keeps_the_certificate_back_and_is_named_without_its_content(ask, expunge, ws, shop):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    path = leave(ws, shop)
    found = ask("run", code=1)["models"]["churn"]
    assert found["unfinished"] == [request]
    assert "in scratch.bin" in found["error"]
    assert expunge("certificate", request, "--out", "answer", "--workspace", ws).code == 2
    found = ask("sweep", code=1)
    assert set(found) == {"clean", "models"}
    assert set(found["models"]["churn"]) == {"clean", "searched_records", "not_in_source", "remains", "search"}
    assert found["models"]["churn"]["searched_records"] == 2
    said = expunge("sweep", "churn", "--owner", "c-1", "--workspace", ws)
    assert said.code == 1
    assert "LEFT scratch.bin: " in said.out
    assert not re.search(r"\bc-1\b|\br-2\b", said.out)
    path.unlink()
    assert expunge("sweep", "--id", "r-2", "--workspace", ws).code == 0
    assert ask("run")["models"]["churn"]["completed"] == [request]
    assert ask("sweep")["clean"] is True


def test_what_the_books_say_should_be_gone_is_found_without_the_rows(ask, ws, opened, shop, tmp_path):
    copy = shutil.copy(shop / "customers.csv", tmp_path / "copy.csv")
    ask("register-model", "second", shop / "sharded", "--data", copy, *TABLE)
    ask("request", "second", "--owner", "c-1")
    ask("run")
    kept = [line for line in Path(copy).read_text().splitlines(keepends=True) if ",c-1," not in line]
    Path(copy).write_text("".join(kept))
    found = ask("sweep", "second")["models"]["second"]
    assert (found["clean"], found["searched_records"], found["not_in_source"], found["search"]) == (True, 0, 2, None)
    opened.store.put(b"scores", "scores", records=[opened.keys.pseudonym("r-2")])
    (ws / "models" / "second" / "v0001").mkdir()
    (ws / "store" / ".torn.part").write_bytes(b"")
    found = ask("sweep", "second", code=1)["models"]["second"]["remains"]
    assert [line.split()[0] for line in found] == ["artefact", "model", "store/.torn.part"]
    said = ask("request", "second", "--owner", "c-2")
    assert said["state"] == "received"


def test_destroyed_keys_are_gone_for_good_and_only_when_it_is_meant(ask, expunge, ws):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    ask("run")
    said = expunge("sweep", "--destroy-keys", "--workspace", ws)
    assert (said.code, "add --yes" in said.err) == (2, True)
    ask("certificate", request, "--out", "with", "--keys")
    assert ask("sweep", "--destroy-keys", "--yes") == {"keys_destroyed": 2, "runs": 1}
    assert ask("sweep", "--destroy-keys", "--yes") == {"keys_destroyed": 0, "runs": 0}
    said = expunge("certificate", request, "--out", "without", "--keys", "--workspace", ws)
    assert (said.code, "destroyed" in said.err, Path("without").exists()) == (2, True, False)
    assert ask("certificate", request, "--out", "without")["removed"] == 2
    assert ask("log", "--verify")["sound"] is True


def test_the_log_is_shown_signed_and_checked(ask, expunge, ws, opened):
    ask("request", "churn", "--owner", "c-1")
    found = ask("log", "--entries", 1)
    assert set(found) == {"origin", "size", "shown"}
    assert [set(entry) for entry in found["shown"]] == [{"index", "kind", "request", "at", "body"}]
    assert len(ask("log", "--entries", 0)["shown"]) == 2
    assert "registered" in expunge("log", "--workspace", ws).out
    signed = ask("log", "--checkpoint")
    assert set(signed) == {"origin", "size", "root", "note"}
    assert expunge("log", "--checkpoint", "--workspace", ws).out == signed["note"]
    ask("request", "churn", "--owner", "c-2")
    proof = ask("log", "--since", 2, "--out", "proof.json")
    assert proof == {"origin": signed["origin"], "old_size": 2, "new_size": 3, "proof": "proof.json"}
    said = expunge("log", "--since", 1, "--out", "p.json", "--workspace", ws)
    assert (said.code, "no checkpoint of size 1" in said.err, Path("p.json").exists()) == (2, True, False)


def test_a_changed_ledger_is_found_and_each_fault_named(ask, expunge, ws, opened):
    import sqlalchemy as sa

    request = ask("request", "churn", "--owner", "c-1")["id"]
    ask("log", "--checkpoint")
    with opened.ledger.database.write() as connection:
        connection.execute(sa.text("UPDATE request SET state = 'completed'"))
    found = ask("log", "--verify", code=1)
    assert set(found) == {"sound", "faults", "entries"}
    assert found["sound"] is False
    assert any(request in fault for fault in found["faults"])
    assert "FAULT" in expunge("log", "--verify", "--workspace", ws).out


def test_an_old_backup_in_the_ledgers_place_is_a_fault_and_refused(ask, expunge, ws, opened):
    opened.close()
    old = (ws / "ledger.db").read_bytes()
    ask("request", "churn", "--owner", "c-1")
    ask("log", "--checkpoint")
    (ws / "ledger.db").write_bytes(old)
    assert "rolled back" in ask("log", "--verify", code=1)["faults"][0]
    said = expunge("status", "--workspace", ws)
    assert (said.code, "rolled back" in said.err) == (2, True)


def test_the_export_has_one_line_a_request_and_never_overwrites(ask, expunge, ws):
    denied = ask("request", "churn", "--owner", "c-1", "--unverified")["id"]
    late = (datetime.now(UTC) - timedelta(days=40)).date().isoformat()
    ask("request", "churn", "--owner", "c-2", "--received-at", late)
    ask("deny", denied, "--reason", "insuf_verification")
    assert ask("export", "list.csv") == {"path": "list.csv", "requests": 2}
    with Path("list.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [
        *("Status", "Request Type", "Time Received", "Deadline", "Days Left", "Model", "Request ID", "Denial Reason"),
        *("Last Updated", "Completed On"),
    ]
    assert (first["Status"], first["Denial Reason"], first["Days Left"]) == ("denied", "insuf_verification", "")
    assert int(second["Days Left"]) < 0  # a number of ours, not a formula of theirs
    before = Path("list.csv").read_bytes()
    assert expunge("export", "list.csv", "--workspace", ws).code == 2
    assert Path("list.csv").read_bytes() == before


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "  ="])
def test_no_exported_text_is_a_formula(start):
    assert safe_cell(f"{start}cmd|' /C calc'!A0") == f"'{start}cmd|' /C calc'!A0"


def test_harmless_cells_stay_as_they_are():
    assert [safe_cell(value) for value in ("completed", "2026-11-01", "", -3, "a=b")] == [
        *("completed", "2026-11-01", "", -3, "a=b")
    ]


def test_a_model_called_like_a_formula_is_quoted_in_the_export(ask, expunge, ws, opened, shop):
    words = ("--data", shop / "customers.csv", *TABLE, "--workspace", ws, "--", "-1-1", shop / "sharded")
    assert expunge("register-model", *words).code == 0
    opened.file("-1-1", library.Request.remove_owner("c-1"))
    ask("export", "list.csv")
    assert Path("list.csv").read_text().splitlines()[1].split(",")[5] == "'-1-1"


def parse(command):
    """Parse a command line as the program does, without running it."""
    _, verb, *words = shlex.split(command)
    found = parser().commands[verb]
    with found.make_context(verb, words):
        pass


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_short_help_with_two_examples_that_parse(expunge, verb):
    said = expunge(verb, "--help")
    assert (said.code, said.err) == (0, "")
    examples = re.findall(rf"(?m)^    (expunge {verb} .*|expunge {verb})$", said.out)
    assert len(examples) == 2
    for example in examples:
        parse(example)
    assert len(said.out.splitlines()) < 55


def test_every_command_is_listed_in_one_whole_line(expunge):
    listed = expunge("--help").out.partition("Commands:")[2]
    assert all(f"\n  {verb} " in listed for verb in VERBS)
    assert "..." not in listed


ROOT = Path(__file__).parents[2]


def commands_in(text):
    """All lines of the indented and fenced blocks that call the program, or the checker, without their comments."""
    blocks = re.findall(r"(?ms)^```\n(.*?)^```$", text)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("expunge ", "cd ", "python check.py"))]


def test_the_readme_s_journey_runs_as_it_stands(expunge, monkeypatch):
    section = (ROOT / "README.md").read_text().partition("## Honour requests in a workspace")[2].partition("\n## ")[0]
    lines = commands_in(section)
    assert len(lines) == 10
    request = ""
    for line in lines:
        program, *words = shlex.split(line.replace(" ID ", f" {request} "))
        if program == "cd":
            monkeypatch.chdir(words[0])
        elif program == "python":
            assert checked(".", *words[1:]).returncode == 0
        else:
            said = expunge(*words)
            assert said.code == 0, said
            request = said.out.split()[0] if words[0] == "request" else request
    assert request


def test_every_command_of_the_guide_parses(expunge):
    text = re.sub(r"\\\n\s+", "", (ROOT / "docs" / "workspace.md").read_text())
    inline = [re.sub(r"\s+", " ", found) for found in re.findall(r"`(expunge [a-z][^`]+)`", text)]
    found = [line for line in commands_in(text) + inline if line.startswith("expunge ")]
    assert {line.split()[1] for line in found} == {*VERBS, "verify", "train"}
    for line in found:
        if len(line.split()) > 2 and "--help" not in line:  # others are mentioned only
            parse(line)


def test_an_mlflow_registry_follows_the_workspace(expunge, shop, tmp_path):
    from expunge.workflow.mlflow import connect

    address, root = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "ws"
    call("init", str(root))
    data = ("--data", str(shop / "customers.csv"), *TABLE)
    call("register-model", "churn", str(shop / "sharded"), *data, "--mlflow", address, "--workspace", str(root))
    client = connect(address, address)
    first = client.get_model_version_by_alias("churn", "champion")
    assert expunge("request", "churn", "--owner", "c-1", "--workspace", root).code == 0
    assert expunge("run", "--workspace", root).code == 0
    second = client.get_model_version_by_alias("churn", "champion")
    workspace = Workspace(root)
    served = workspace.ledger.models.served("churn")
    assert second.version != first.version
    assert second.tags["state_dict.sha256"] == served.digest
    assert re.fullmatch("[0-9a-f]{64}", second.tags["unlearn.certificate"])
    assert [one.version for one in client.search_model_versions("name='churn'")] == [second.version]
    asked = workspace.ledger.requests.find()[0].id
    said = workspace.ledger.certificates.get(asked).statement(workspace.keys)["predicate"]["retired"]
    assert {"what": "mirror version", "name": f"mlflow:churn/{first.version}"} in said
    workspace.close()


def test_what_is_held_from_before_makes_every_later_run_say_so(ask):
    held = ask("request", "churn", "--owner", "nobody")["id"]
    assert ask("run", code=1)["models"]["churn"]["held"] == [held]
    again = ask("run", code=1)["models"]["churn"]
    assert (again["held"], again["standing"]) == ([], [held])
    ask("deny", held, "--reason", "no_match")
    assert ask("run")["models"]["churn"]["standing"] == []


def test_the_words_of_an_extension_go_when_the_request_is_done(ask, ws):
    request = ask("request", "churn", "--owner", "c-1")["id"]
    ask("extend", request, "--why", "many requests by Mr Smith")
    ask("run")
    files = [path for path in ws.rglob("*") if path.is_file()]
    assert not any(b"Smith" in path.read_bytes() for path in files)
    assert ask("log", "--verify")["faults"] == []


def test_a_checkpoint_that_is_lost_is_replaced_only_when_asked(ask, expunge, ws):
    ask("log", "--checkpoint")
    (ws / "last-checkpoint").unlink()
    said = expunge("status", "--workspace", ws)
    assert said.code == 2
    assert "the last checkpoint is missing" in said.err
    ask("log", "--replace-checkpoint")
    assert ask("status")["count"] == 0


def test_a_workspace_that_screens_says_so_in_the_log(expunge, opened, ws):
    config = ws / "expunge.toml"
    config.write_text(config.read_text().replace("screen = 0.0", "screen = 0.05"))
    words = ("--workspace", ws, "--json")
    filed = json.loads(expunge("request", "churn", "--owner", "c-3", *words).out)["id"]
    taken = json.loads(expunge("run", *words).out)["models"]["churn"]
    (entry,) = [one for one in opened.ledger.log.entries(filed) if one.kind in ("screened", "held")]
    word = "passed: not flagged: p " if filed in taken["completed"] else "held: flagged "
    assert entry.body["stages"][0].startswith(f"screen: {word}")
    assert entry.body["stages"][0].endswith(", at 5 % false alarms")
    assert filed in taken["completed"] + taken["held"]
