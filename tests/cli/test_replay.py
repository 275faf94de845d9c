"""A workspace that replays retraining before it releases: from its settings to an auditor with the kept transcript."""

import json
import shutil

import pytest

from expunge import Recipe, load
from expunge.workflow import Workspace, transcripts
from tests.cli.conftest import TABLE, call


@pytest.fixture(scope="module")
def made(shop, tmp_path_factory):
    """Workspaces that serve `churn`, the whole and the sharded model of customers.csv."""
    home = tmp_path_factory.mktemp("made")
    for kind in ("whole", "sharded"):
        call("init", str(home / kind))
        data = ("--data", str(shop / "customers.csv"), *TABLE)
        call("register-model", "churn", str(shop / kind), *data, "--workspace", str(home / kind))
    return home


@pytest.fixture
def ws(made, tmp_path):
    """``ws(kind, share)`` is a copy of one, which replays so much."""

    def of(kind, share):
        root = shutil.copytree(made / kind, tmp_path / "ws")
        config = root / "expunge.toml"
        assert "\nreplay = 0.0\n" in config.read_text()
        config.write_text(config.read_text().replace("replay = 0.0", f"replay = {share}"))
        return root

    return of


@pytest.fixture
def honour(expunge):
    """``honour(root, owner)`` files a request and runs: its id, and what the run said."""

    def run(root, owner):
        words = ("--workspace", root, "--json")
        filed = json.loads(expunge("request", "churn", "--owner", owner, *words).out)["id"]
        return filed, json.loads(expunge("run", *words).out)["models"]["churn"]

    return run


def stages(root, filed):
    workspace = Workspace(root)
    said = workspace.ledger.certificates.get(filed).statement(workspace.keys)["predicate"]
    workspace.close()
    return {stage["name"]: stage["outcome"] for stage in said["stages"]}


def version(root):
    workspace = Workspace(root)
    served = workspace.ledger.models.served("churn")
    workspace.close()
    return root / served.folder


@pytest.mark.parametrize("kind", ["whole", "sharded"])
@pytest.mark.parametrize("share", [0.25, 1])
def test_what_was_replayed_is_certified_as_verified(expunge, ws, honour, kind, share):
    root = ws(kind, share)
    filed, taken = honour(root, "c-3")
    assert taken["completed"] == [filed]
    assert stages(root, filed)["verify"] == "passed"
    assert expunge("certificate", filed, "--out", "answer", "--workspace", root).code == 0
    said = expunge("verify-bundle", "answer/bundle.json", "--key", root / "keys" / "expunge.pub")
    assert said.code == 0
    assert "stage verify" not in said.out  # it stands among what is not proved if it was not done
    assert "stage screen" in said.out


def test_without_the_setting_it_is_not_done(expunge, ws, honour):
    root = ws("whole", 0.0)
    filed, _ = honour(root, "c-3")
    assert stages(root, filed)["verify"] == "not done"
    assert not (version(root) / "transcript").exists()
    expunge("certificate", filed, "--out", "answer", "--workspace", root)
    said = expunge("verify-bundle", "answer/bundle.json", "--key", root / "keys" / "expunge.pub")
    assert "stage verify" in said.out


def test_an_auditor_replays_what_is_kept_with_the_documented_command(expunge, ws, honour, shop):
    root = ws("whole", 1)
    honour(root, "c-3")
    kept = version(root)
    agreed = load(shop / "whole").recipe
    with open("agreed.json", "w") as file:
        json.dump(agreed.to_json(), file)
    words = (
        *("verify", "transcript", kept / "transcript", "--data", shop / "customers.csv", *TABLE),
        *("--recipe", "agreed.json", "--served", kept),
    )
    said = expunge(*words, "--forget-owner", "c-3")
    assert said.code == 0, said
    assert "accepted; commitment" in said.out
    assert expunge(*words, "--forget-owner", "c-4").code == 1


def test_for_several_removals_the_auditor_names_all_that_is_gone_in_a_file(expunge, ws, honour, shop, tmp_path):
    root = ws("whole", 1)
    for owner in ("c-3", "c-4"):
        honour(root, owner)
    kept = version(root)
    Recipe.from_json(load(shop / "whole").recipe.to_json())
    (tmp_path / "agreed.json").write_text(json.dumps(load(shop / "whole").recipe.to_json()))
    (tmp_path / "gone.txt").write_text("r-6\nr-7\nr-8\nr-9\n")
    words = ("verify", "transcript", kept / "transcript", "--data", shop / "customers.csv", *TABLE)
    said = expunge(*words, "--recipe", "agreed.json", "--served", kept, "--ids-file", "gone.txt", "--spot", "5%")
    assert said.code == 0, said


def test_a_lie_is_withheld_shown_and_released_with_exact(expunge, ws, honour, shop, monkeypatch):
    root = ws("whole", 1)
    honest = transcripts.record

    def stale(recipe, records, folder, **how):
        made, old = honest(recipe, records, folder, **how), load(shop / "whole")
        return type(made)(module=old.module, recipe=recipe, ids=made.ids, log=made.log)

    with monkeypatch.context() as patch:
        patch.setattr(transcripts, "record", stale)
        filed, taken = honour(root, "c-3")
    assert taken["withheld"] == [filed]
    said = expunge("status", filed, "--workspace", root).out
    assert "verify: final model: fail" in " ".join(said.split())
    assert version(root).name == "v0001"
    assert expunge("release", filed, "--exact", "--workspace", root).code == 0
    assert expunge("run", "--workspace", root).code == 0
    assert stages(root, filed)["verify"] == "passed"


def test_a_share_that_is_none_is_refused_in_one_line(expunge, ws):
    said = expunge("status", "--workspace", ws("whole", 2))
    assert said.code == 2
    assert "replay must be a share of the training from 0 (none) to 1 (all), got 2" in said.err
    assert said.err.count("\n") == 1
