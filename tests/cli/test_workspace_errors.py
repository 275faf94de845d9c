# ruff: noqa: E501
"""In a workspace too, whatever is wrong is one line that says what to do, and nothing is changed."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import expunge as library
from expunge.workflow import Workspace
from tests.cli.conftest import TABLE, call

NOBODY = "17bf6cd9-3af0-4e39-8285-6aa52cbc3d64"
DATA = "--data {shop}/customers.csv {table}"
NEW = "register-model new {shop}/sharded"


@pytest.fixture(scope="module")
def made(shop, tmp_path_factory):
    """A workspace that serves `churn`, in which one request waits."""
    root = tmp_path_factory.mktemp("made") / "ws"
    call("init", str(root))
    data = ("--data", str(shop / "customers.csv"), *TABLE)
    call("register-model", "churn", str(shop / "sharded"), *data, "--workspace", str(root))
    workspace = Workspace(root)
    filed, _ = workspace.file("churn", library.Request.remove_owner("c-1"))
    workspace.ledger.log.checkpoint()
    workspace.close()
    (root.parent / "request").write_text(filed.id)
    return root


@pytest.fixture
def folder(made, tmp_path):
    """Where commands run: `ws` is the workspace, and the files beside it are what cases need."""
    shutil.copytree(made, tmp_path / "ws")
    (tmp_path / "empty.csv").write_text("owner\n")
    (tmp_path / "gone.csv").write_text("customer\nc-1\n")
    (tmp_path / "quotes.csv").write_text('owner\n"c-1\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    (tmp_path / "bad.pub").write_text("no key")
    return tmp_path


CASES = {
    # where
    "init: a folder with files": ("init taken", "taken is not empty; name a new folder", 2),
    "init: a workspace": ("init ws", "ws is not empty", 2),
    "init: no URL": ("init new --url nonsense", "--url must be a database's, as postgresql://", 2),
    "init: another database": ("init new --url mysql://a/b", "ledgers live in SQLite or PostgreSQL", 3),
    "init: a server that is not there": ("init new --url postgresql://x:secret@127.0.0.1:1/none", "could not be read or written", 4),
    "init: an origin of two lines": ("init new --origin 'a\nb'", "--origin must be text without spaces", 2),
    "no workspace here": ("status", "neither here nor above is a workspace; .*expunge init DIR", 2),
    "no workspace there": ("status --workspace taken", "taken is no workspace; make one with: expunge init taken", 2),
    # serving
    "register: name taken": (f"register-model churn {{shop}}/sharded {DATA} {{ws}}", 'there is a model "churn" already', 2),
    "register: a path as name": (f"register-model ../x {{shop}}/sharded {DATA} {{ws}}", "a model is called by letters", 2),
    "register: no model": (f"register-model new nothing {DATA} {{ws}}", "nothing", 2),
    "register: data inside": (f"{NEW} --data ws/customers.csv {{table}} {{ws}}", "lies inside the workspace .* must not keep rows", 2),
    "register: a model inside": (f"register-model new ws/models/churn/v0001 {DATA} {{ws}}", "lies inside the workspace", 2),
    "register: a fallback inside": (f"{NEW} {DATA} --fallback ws/models/churn {{ws}}", "lies inside the workspace", 2),
    "register: no fallback there": (f"{NEW} {DATA} --fallback nothing {{ws}}", "nothing", 2),
    "register: other data": (f"{NEW} --data {{shop}}/few.csv {{table}} {{ws}}", "record", 2),
    "register: unknown method": (f"{NEW} {DATA} --method magic {{ws}}", 'unknown method "magic"', 2),
    "register: method of whole models": (f"{NEW} {DATA} --method fine-tune {{ws}}", "use sisa or retrain", 3),
    "register: a path that TOML cannot hold": (f"{NEW} --data \U0001f600.csv {{table}} {{ws}}", "data holds a character that expunge.toml cannot keep", 2),
    # filing
    "request: unknown model": ("request x --owner c-1 {ws}", 'there is no model "x"; there are: churn', 2),
    "request: no way": ("request churn {ws}", "in one way: --id", 2),
    "request: two ways": ("request churn --owner c-1 --class 0 {ws}", "in one way: --id", 2),
    "request: a file and an owner": ("request churn --csv gone.csv --owner c-1 {ws}", "--csv names what to remove line by line", 2),
    "request: a column without a file": ("request churn --owner c-1 --id-column id {ws}", "read a file of requests; give it: --csv", 2),
    "request: no file": ("request churn --csv nothing.csv {ws}", "nothing.csv cannot be read as CSV", 2),
    "request: an empty file": ("request churn --csv empty.csv {ws}", "lists no request", 2),
    "request: an open quote": ("request churn --csv quotes.csv {ws}", "cannot be read as CSV", 2),
    "request: no such column": ("request churn --csv gone.csv {ws}", 'has no column "id"; it has customer', 2),
    "request: a time without a zone": ("request churn --owner c-2 --received-at 2026-01-01T09:30 {ws}", "--received-at must be a date or an instant", 2),
    "request: no date": ("request churn --owner c-2 --received-at yesterday {ws}", "--received-at must be a date or an instant", 2),
    "request: a date to come": ("request churn --owner c-2 --received-at 2999-01-01 {ws}", "received in the future", 2),
    # one request
    "status: unknown": (f"status {NOBODY} {{ws}}", "there is no request .*expunge status", 2),
    "status: an id and a state": ("status {id} --state held {ws}", "leave them out beside an ID", 2),
    "identify: unknown": (f"identify {NOBODY} {{ws}}", "there is no request", 2),
    "identify: nobody in doubt": ("identify {id} {ws}", "is received and cannot become received", 2),
    "cancel: unknown": (f"cancel {NOBODY} {{ws}}", "there is no request", 2),
    "extend: unknown": (f"extend {NOBODY} --why x {{ws}}", "there is no request", 2),
    "extend: without a reason": ("extend {id} --why ' ' {ws}", "--why must say why", 2),
    "deny: a flag": ("deny {id} --reason screen {ws}", "no reason to refuse it; release it, with --exact", 3),
    "deny: fraud of somebody identified": ("deny {id} --reason suspected_fraud {ws}", "no reason to refuse it", 3),
    "deny: a word": ("deny {id} --reason tired {ws}", '"tired" is no reason to deny an erasure; reasons are', 2),
    "release: nothing is held": ("release {id} {ws}", "is received and cannot become pending", 2),
    "release: exact and fallback": ("release {id} --exact --fallback {ws}", "choose one", 2),
    "release: fallback of nothing": ("release --fallback x {ws}", 'there is no model and no request "x"', 2),
    "release: no fallback declared": ("release --fallback churn {ws}", 'model "churn" has no fallback', 2),
    # running
    "run: unknown model": ("run x {ws}", 'there is no model "x"', 2),
    # handing out
    "certificate: unknown": (f"certificate {NOBODY} --out new {{ws}}", "there is no request", 2),
    "certificate: not done": ("certificate {id} --out new {ws}", "has no certificate: it is not completed", 2),
    "certificate: inside": ("certificate {id} --out ws/x/../new {ws}", "lies inside the workspace .*: name a place outside", 2),
    "certificate: over another": ("certificate {id} --out taken {ws}", "taken is there already", 2),
    "verify-bundle: no bundle": ("verify-bundle nothing --key ws/keys/expunge.pub", "nothing cannot be read", 2),
    "verify-bundle: no key": ("verify-bundle gone.csv --key nothing", "cannot be read as a public key .*PEM", 2),
    "verify-bundle: something else as key": ("verify-bundle gone.csv --key bad.pub", "cannot be read as a public key", 2),
    "verify-bundle: keys without an owner": ("verify-bundle gone.csv --key ws/keys/expunge.pub --keys k", "go together", 2),
    "export: inside": ("export ws/list.csv {ws}", "lies inside the workspace", 2),
    "export: over another": ("export gone.csv {ws}", "gone.csv is there already and is not overwritten", 2),
    "export: no folder": ("export nowhere/list.csv {ws}", "its folder is not there", 2),
    # the log and the sweep
    "log: two things": ("log --verify --checkpoint {ws}", "choose one", 2),
    "log: no file for the proof": ("log --since 1 {ws}", "--since and --out go together", 2),
    "log: a proof inside": ("log --since 2 --out ws/proof.json {ws}", "lies inside the workspace", 2),
    "log: a size that was never signed": ("log --since 7 --out new {ws}", "no checkpoint of size 7 was signed", 2),
    "log: less than none": ("log --entries -1 {ws}", "--entries must be >= 0", 2),
    "sweep: two ways": ("sweep --owner c-1 --id r-1 {ws}", "search in one way", 2),
    "sweep: unknown owner": ("sweep --owner nobody {ws}", 'owner "nobody" holds no record in the data of', 2),
    "sweep: unknown record": ("sweep --id r-1 --id r-999 {ws}", 'record "r-999" is not in the data of', 2),
    "sweep: unknown model": ("sweep x {ws}", 'there is no model "x"', 2),
    "sweep: keys of one owner": ("sweep --destroy-keys --yes --owner c-1 {ws}", "leave out --owner and --id", 2),
    "sweep: keys by mistake": ("sweep --destroy-keys {ws}", "there is no way back; .*add --yes", 2),
}  # fmt: skip


def words_of(text, shop, made):
    filled = {"shop": str(shop), "table": " ".join(TABLE), "ws": "--workspace ws"}
    return shlex.split(text.format(**filled, id=(made.parent / "request").read_text()))


def state_of(folder):
    """Every file but the database's scratch files, with the bytes of all that is settings, keys or models."""
    paths = [path for path in folder.rglob("*") if not path.name.startswith("ledger.db")]
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in paths}


def one_line(said, code):
    assert said.code == code, said
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", said.err), said.err
    return said.err


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_one_line_and_changes_nothing(expunge, shop, made, folder, name):
    words, says, code = CASES[name]
    before = state_of(folder)
    said = expunge(*words_of(words, shop, made))
    assert re.search(says, one_line(said, code)), said.err
    assert len(said.err) < 520
    assert "secret" not in said.err
    after = state_of(folder)
    if not name.startswith("log: a size"):  # which signs the log as it is, and that is no harm
        assert after == before
    workspace = Workspace(folder / "ws")
    assert [filed.state.value for filed in workspace.ledger.requests.find()] == ["received"]
    assert len(workspace.ledger.log) == 2
    workspace.close()


def test_a_workspace_without_models_says_how_to_begin(expunge):
    assert expunge("init", "empty").code == 0
    assert "expunge register-model NAME FOLDER" in one_line(expunge("run", "--workspace", "empty"), 2)
    assert expunge("status", "--workspace", "empty").out == "no request was filed yet; file one: expunge request\n"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("data = ", "date = ", 'unknown setting "date"; it has data, id_column'),
        ("data = ", "# data = ", "must say where the rows are"),
        ('method = "auto"', "method = 3", "method under .* is of another kind .*, got 3"),
        ('method = "auto"', 'method = "magic"', 'unknown method "magic"'),
        ('method = "auto"', 'set = ["lr"]', "has no setting"),
    ],
)
def test_settings_of_a_model_that_cannot_be_meant_are_named(expunge, folder, old, new, says):
    path = folder / "ws" / "expunge.toml"
    path.write_text(path.read_text().replace(f"\n{old}", f"\n{new}"))
    said = expunge("run", "--workspace", "ws")
    assert said.code == 2
    assert said.out == "churn: not done\n"
    assert re.search(says, said.err), said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["status", "run", "log", "sweep"])
def test_a_damaged_workspace_is_one_line_in_every_command(expunge, folder, verb):
    key = folder / "ws" / "keys" / "signing.pem"
    key.chmod(0o644)
    assert "chmod 600" in one_line(expunge(verb, "--workspace", "ws"), 2)
    key.chmod(0o600)
    (folder / "ws" / "expunge.toml").write_text("[ledger")
    assert "cannot be read" in one_line(expunge(verb, "--workspace", "ws"), 2)


def test_something_else_in_a_bundles_place_is_refused_with_exit_code_1(expunge, folder):
    said = expunge("verify-bundle", "gone.csv", "--key", "ws/keys/expunge.pub")
    assert said.code == 1
    assert "FAIL encoding" in said.out
    assert "verdict: REFUSED" in said.out


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("status",), "cli.standing.clock_of"),
        (("export", "new.csv"), "cli.standing.clock_of"),
        (("run",), "cli.workspace.journey_of"),
        (("sweep",), "cli.sweeping.look"),
        (("log", "--verify"), "ledger.ledger.faults"),
    ],
)
def test_an_interrupt_is_exit_code_4_and_leaves_nothing(expunge, folder, monkeypatch, words, place):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"expunge.{place}", interrupt)
    words = (*words, "--owner", "c-1") if words == ("sweep",) else words
    said = expunge(*words, "--workspace", "ws")
    assert one_line(said, 4).startswith("error: interrupted")
    assert not Path("new.csv").exists()
