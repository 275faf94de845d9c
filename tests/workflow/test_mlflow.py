"""The MLflow mirror: one version for one model, the alias last, nothing of the old left, after any crash as well."""

import json
import os
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from expunge.core.errors import Misuse, Stopped, UnreadableFile, Unsupported
from expunge.core.recipe import Recipe
from expunge.core.trained import Trained
from expunge.workflow import mlflow as module
from expunge.workflow.mirror import PARENT, REQUESTS, Mirror
from expunge.workflow.mlflow import CERTIFICATE, DIGEST, RETIRED, SUPERSEDED, MlflowMirror

ASKED = {PARENT: "1", REQUESTS: "9b1c2f5e-5d0a-4a56-9a3e-0c1f5a1b7d11,1f0e5c9a-7a43-4d0c-8f27-5f3f5f0b2c22"}
PROOF = "c" * 64


def linear(recipe, parts=()):
    return nn.Linear(2, 2)


def save(folder, bias):
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.fill_(bias)
    trained = Trained(module=net, recipe=Recipe(model="softmax"), ids=frozenset("ab"))
    return trained.save(folder), trained.digest()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A registry with its tables made, which takes seconds; each `World` begins with all models deleted."""
    path = tmp_path_factory.mktemp("registry") / "registry.db"
    module.connect(f"sqlite:///{path}", f"sqlite:///{path}").search_registered_models()
    return path


class World:
    """A registry with one model served, and the model that an unlearning run left to take its place."""

    def __init__(self, folder, database, kind=MlflowMirror, **fields):
        self.folder, self.database = folder, database
        self.uri = f"sqlite:///{database}"
        self.client = module.connect(self.uri, self.uri)
        for old in self.client.search_registered_models():
            self.client.delete_registered_model(old.name)
        assert self.rows() == []
        fields = {"artifacts": folder / "files", **fields}
        self.mirror = kind(model="credit", tracking_uri=self.uri, **fields)
        self.before, self.after = save(folder / "before", 1.0), save(folder / "after", 2.0)

    def start(self):
        self.mirror.serve(self.mirror.publish(*self.before, {}))
        return self

    def cycle(self):
        version = self.mirror.publish(*self.after, ASKED)
        self.mirror.serve(version)
        retired = self.mirror.retire(version)
        self.mirror.certify(version, PROOF)
        return version, retired

    def versions(self):
        return {str(one.version): one for one in self.client.search_model_versions("name = 'credit'")}

    def served(self):
        return str(self.client.get_registered_model("credit").aliases.get("champion", ""))

    def rows(self):
        """All versions that MLflow's database holds, the deleted ones too."""
        return self.query("select version, current_stage from model_versions order by version")

    def query(self, text):
        with closing(sqlite3.connect(self.database)) as database:
            return database.execute(text).fetchall()

    def files(self):
        return {
            path.relative_to(self.folder / "files").as_posix(): path.read_bytes()
            for path in sorted((self.folder / "files").rglob("*"))
            if path.is_file()
        }

    def state(self):
        there = {number: (one.tags, one.source, one.status) for number, one in self.versions().items()}
        return there, self.served(), self.rows(), self.files()


@pytest.fixture
def world(tmp_path, database):
    return World(tmp_path, database)


class Crash(BaseException):
    """The power went."""


class Wire:
    """Stands between the mirror and all that it changes; notes each change, and crashes at one point if told to.

    Each change has a point after it, which is the one before the next; copying and deleting a folder have one half way.
    """

    def __init__(self, monkeypatch, at=None):
        self.changes, self.points, self.at = [], 0, at
        real = module.connect
        monkeypatch.setattr(module, "connect", lambda *uris: self.wrap(real(*uris)))
        monkeypatch.setattr(module, "shutil", SimpleNamespace(copytree=self.copytree, rmtree=self.rmtree))
        monkeypatch.setattr(module, "os", SimpleNamespace(replace=self.replace, environ=os.environ))

    def point(self):
        self.points += 1
        if self.points - 1 == self.at:
            raise Crash

    def change(self, name, args, steps):
        self.changes.append((name, *args))
        for step in steps:
            result = step()
            self.point()
        return result

    def wrap(self, client):
        wire = self

        class Client:
            def __getattr__(self, name):
                real = getattr(client, name)
                if name.startswith(("get_", "search_")):
                    return real
                return lambda *args, **more: wire.change(name, args, [lambda: real(*args, **more)])

        return Client()

    def copytree(self, source, target, **how):
        def half():
            target.mkdir(parents=True)
            shutil.copy(source / "trained.json", target)

        self.change("copytree", (), [half, lambda: shutil.copytree(source, target, dirs_exist_ok=True, **how)])

    def rmtree(self, path, ignore_errors=False):
        if path.exists():
            self.change("rmtree", (), [lambda: min(path.iterdir()).unlink(), lambda: shutil.rmtree(path)])

    def replace(self, source, target):
        self.change("replace", (), [lambda: os.replace(source, target)])


def whole(world):
    """The version served has all its tags, and files that can be loaded as the model that it says it is."""
    one = world.versions()[world.served()]
    loaded = Trained.load(module._path_of(one.source), linear)
    wanted = ASKED if one.tags[DIGEST] == world.after[1] else {}
    return loaded.digest() == one.tags[DIGEST] and wanted.items() <= one.tags.items()


def test_a_cycle_leaves_the_new_version_served_tagged_and_alone(world):
    version, retired = world.start().cycle()
    assert (version, retired, world.served()) == ("2", ("mlflow:credit/1",), "2")
    assert list(world.versions()) == ["2"]
    assert world.versions()["2"].tags == {**ASKED, DIGEST: world.after[1], RETIRED: "1", CERTIFICATE: PROOF}
    assert world.rows() == [(1, "Deleted_Internal"), (2, "None")]
    assert whole(world)


def test_what_is_copied_is_the_folder_and_the_old_copy_goes(world):
    def held(folder):
        return sorted((path.name, path.read_bytes()) for path in folder.iterdir())

    def copies():
        return sorted((Path(name).name, data) for name, data in world.files().items())

    world.start()
    assert copies() == held(world.before[0])
    world.cycle()
    assert copies() == held(world.after[0])
    assert world.before[0].is_dir(), "the folder given is its owner's"


def test_an_old_version_is_marked_before_it_is_deleted(world, monkeypatch):
    world.start()
    wire = Wire(monkeypatch)
    world.cycle()
    mark = wire.changes.index(("set_model_version_tag", "credit", "1", SUPERSEDED, "2"))
    files = [name for name, *_ in wire.changes].index("rmtree")
    assert mark < files < wire.changes.index(("delete_model_version", "credit", "1"))
    kept = dict(world.query("select key, value from model_version_tags where version = 1"))
    assert kept == {DIGEST: world.before[1], SUPERSEDED: "2"}, "what MLflow's own audit keeps"


class AliasFirst(MlflowMirror):
    """Lets others fetch the version before it says what it is."""

    def publish(self, folder, digest, tags):
        version = super().publish(folder, digest, {PARENT: tags[PARENT]} if tags else {})
        self.serve(version)
        return super().publish(folder, digest, tags)


def alias_comes_last(world, monkeypatch):
    """Whether publishing and serving change the alias once, after all else."""
    world.start()
    wire = Wire(monkeypatch)
    world.mirror.serve(world.mirror.publish(*world.after, ASKED))
    names = [name for name, *_ in wire.changes]
    return names.count("set_registered_model_alias") == 1 and names[-1] == "set_registered_model_alias"


def test_the_alias_moves_last(world, monkeypatch):
    assert alias_comes_last(world, monkeypatch)


def test_a_mirror_that_moves_the_alias_first_is_caught(tmp_path, database, monkeypatch):
    assert not alias_comes_last(World(tmp_path, database, AliasFirst), monkeypatch)


POINTS = 12


def crashed_and_run_again(world, monkeypatch, at):
    """The state after a crash at this point and a second run, and whether all served meanwhile was whole."""
    with monkeypatch.context() as patch:
        Wire(patch, at)
        with pytest.raises(Crash):
            world.cycle()
    fine = whole(world)
    again = world.cycle()
    return again, world.state(), fine


@pytest.fixture(scope="module")
def reference(tmp_path_factory, database):
    """What a run without a crash ends in, and where it can crash; the paths in it are made relative."""
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("reference"), database).start()
        wire = Wire(patch)
        done = world.cycle()
    return done, relative(world.state(), world.folder), wire.points


def relative(state, folder):
    there, *rest = state
    return [
        {key: (tags, source.replace(str(folder), ""), status) for key, (tags, source, status) in there.items()},
        *rest,
    ]


def test_all_points_are_crashed_at(reference):
    assert reference[2] == POINTS


@pytest.mark.parametrize("at", range(POINTS))
def test_a_crash_and_a_second_run_end_as_one_run(tmp_path, database, reference, monkeypatch, at):
    world = World(tmp_path, database).start()
    again, state, fine = crashed_and_run_again(world, monkeypatch, at)
    assert (again, relative(state, tmp_path)) == reference[:2]
    assert fine


def test_a_run_after_the_end_changes_nothing(world, monkeypatch):
    done, state = world.start().cycle(), world.state()
    wire = Wire(monkeypatch)
    assert (world.cycle(), world.state(), wire.changes) == (done, state, [])


class Forgetful(MlflowMirror):
    """Publishes without looking whether it did so before."""

    def publish(self, folder, digest, tags):
        with self._asking() as client:
            source = self._place(folder, f"{digest}-{'0' * 16}")
            self._ensure_model(client)
            return str(client.create_model_version(self.model, source=source, tags={**tags, DIGEST: digest}).version)


def test_a_mirror_that_publishes_twice_is_caught(tmp_path, database, reference, monkeypatch):
    world = World(tmp_path, database, Forgetful).start()
    with monkeypatch.context() as patch:
        Wire(patch, 3)  # the version is made
        with pytest.raises(Crash):
            world.cycle()
    world.cycle()
    assert [row[0] for row in world.rows()] == [1, 2, 3]
    assert relative(world.state(), tmp_path)[2] != reference[1][2]


class Hoarder(MlflowMirror):
    """Keeps the files of what it retires."""

    def _sweep(self, kept):
        pass


def test_a_mirror_that_keeps_old_files_is_caught(tmp_path, database, reference):
    world = World(tmp_path, database, Hoarder).start()
    assert world.cycle() == reference[0]
    assert relative(world.state(), tmp_path)[3] != reference[1][3]


class Greedy(MlflowMirror):
    """Takes every version of the registered model for its own."""

    def _ours(self, client):
        return sorted(client.search_model_versions(f"name = '{self.model}'"), key=lambda one: int(one.version))


def foreign_survives(world):
    world.start()
    theirs = str(
        world.client.create_model_version("credit", source="s3://theirs/model", tags={"owner": "them"}).version
    )
    world.client.set_registered_model_alias("credit", "theirs", theirs)
    before = dict(world.versions()[theirs])
    _, retired = world.cycle()
    after = world.versions().get(theirs)
    return retired == ("mlflow:credit/1",) and after is not None and dict(after) == before


def test_a_version_that_others_made_is_left_alone(world):
    assert foreign_survives(world)


def test_a_mirror_that_retires_what_others_made_is_caught(tmp_path, database):
    assert not foreign_survives(World(tmp_path, database, Greedy))


def test_a_version_that_others_made_is_neither_served_nor_certified_nor_kept(world):
    world.start()
    theirs = str(world.client.create_model_version("credit", source="s3://theirs/model").version)
    for call in (world.mirror.serve, world.mirror.retire, lambda version: world.mirror.certify(version, PROOF)):
        for version in (theirs, "7"):
            with pytest.raises(Misuse, match=r"no version '.' that was published from here; it has 1"):
                call(version)
    assert set(world.versions()) == {"1", theirs}


def test_every_old_version_goes_even_if_never_served(world):
    world.start()
    world.mirror.publish(*save(world.folder / "abandoned", 3.0), ASKED)
    version, retired = world.cycle()
    assert (version, retired) == ("3", ("mlflow:credit/1", "mlflow:credit/2"))
    assert list(world.versions()) == ["3"]
    assert len({name.split("/")[1] for name in world.files()}) == 1


def test_what_was_retired_is_named_in_the_order_of_the_versions(world):
    world.start()
    world.client.set_model_version_tag("credit", "1", RETIRED, "10,9")
    assert world.mirror.retire("1") == ("mlflow:credit/9", "mlflow:credit/10")


def test_a_copy_that_a_crash_left_without_a_version_goes_too(world, monkeypatch):
    world.start()
    with monkeypatch.context() as patch:
        Wire(patch, 2)  # copied and in place, not yet a version
        with pytest.raises(Crash):
            world.mirror.publish(*save(world.folder / "abandoned", 3.0), ASKED)
    assert len({name.split("/")[1] for name in world.files()}) == 2
    for copy in list((world.folder / "files" / "credit").iterdir()):
        shutil.copytree(copy, f"{copy}.part")
    world.cycle()
    assert len({name.split("/")[1] for name in world.files()}) == 1
    assert whole(world)


def test_files_that_are_not_copies_of_ours_stay(world):
    world.start()
    note = world.folder / "files" / "credit" / "README"
    note.write_text("theirs")
    world.cycle()
    assert note.read_text() == "theirs"


def test_the_same_weights_after_another_parent_are_another_version(world):
    world.start()
    assert world.mirror.publish(*world.before, ASKED) == "2"
    assert len({one.source for one in world.versions().values()}) == 2, "the folders may tell of other records"
    world.mirror.serve("2")
    assert world.mirror.retire("2") == ("mlflow:credit/1",)
    assert whole(world)


def test_tags_that_are_missing_are_set_when_published_again(world):
    world.start()
    version = world.mirror.publish(*world.after, ASKED)
    world.client.delete_model_version_tag("credit", version, REQUESTS)
    assert world.mirror.publish(*world.after, ASKED) == version
    assert world.versions()[version].tags[REQUESTS] == ASKED[REQUESTS]


def test_without_a_folder_for_copies_the_version_points_at_the_one_given(tmp_path, database):
    world = World(tmp_path, database, artifacts=None).start()
    version, retired = world.cycle()
    assert world.versions()[version].source == world.after[0].as_uri()
    assert retired == ("mlflow:credit/1",)
    assert world.before[0].is_dir()
    assert not (tmp_path / "files").exists()
    shutil.copytree(world.after[0], tmp_path / "moved")
    with pytest.raises(Misuse, match=r"credit/2 holds this model at file:///.*/after; publish it from there"):
        world.mirror.publish(tmp_path / "moved", world.after[1], ASKED)


def test_copies_are_not_forgotten_when_the_mirror_is_given_another_folder(world):
    world.start()
    for artifacts in (None, world.folder / "elsewhere"):
        other = MlflowMirror(model="credit", tracking_uri=world.uri, artifacts=artifacts)
        version = other.publish(*save(world.folder / f"new-{artifacts is None}", 4.0 + (artifacts is None)), ASKED)
        other.serve(version)
        with pytest.raises(Misuse, match=r"the files of mlflow:credit/1 were copied to .*; give artifacts=.*/files$"):
            other.retire(version)
    assert "1" in world.versions()
    assert len(world.files()) == 2


def test_the_version_served_is_never_retired(world):
    world.start()
    version = world.mirror.publish(*world.after, ASKED)
    with pytest.raises(Misuse, match="champion of mlflow:credit is 1, not 2; serve that one first"):
        world.mirror.retire(version)
    assert set(world.versions()) == {"1", "2"}


def test_a_superseded_version_is_not_served_again(world):
    world.start()
    version = world.mirror.publish(*world.after, ASKED)
    world.client.set_model_version_tag("credit", "1", SUPERSEDED, version)
    with pytest.raises(Misuse, match="mlflow:credit/1 is superseded by 2; serve that one"):
        world.mirror.serve("1")
    assert world.mirror.publish(*world.before, {}) == "3", "half retired, it is no version to go back to"


def test_a_folder_that_holds_another_model_is_refused(world):
    with pytest.raises(Misuse, match="holds the model"):
        world.mirror.publish(world.before[0], world.after[1], {})
    with pytest.raises(UnreadableFile, match="is no saved model"):
        world.mirror.publish(world.folder, world.after[1], {})
    (world.folder / "trained.json").write_text(json.dumps(["digest"]))
    with pytest.raises(UnreadableFile, match="is no saved model"):
        world.mirror.publish(world.folder, world.after[1], {})
    assert world.client.search_registered_models() == []


@pytest.mark.parametrize("tag", [DIGEST, SUPERSEDED, RETIRED, CERTIFICATE])
def test_a_tag_that_the_mirror_sets_itself_is_refused(world, tag):
    with pytest.raises(Misuse, match="is set by the mirror; leave it out"):
        world.mirror.publish(*world.after, {tag: "x"})


def test_what_is_no_digest_is_refused(world):
    with pytest.raises(Misuse, match=r"digest must be 64 hexadecimal digits, got '\.\./x'"):
        world.mirror.publish(world.before[0], "../x", {})
    with pytest.raises(Misuse, match="64 hexadecimal digits, its SHA-256, got 'yes'"):
        world.mirror.certify("1", "yes")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a:b", "it's", "a\nb", ".hidden"])
def test_a_name_that_is_no_name_of_a_model_and_a_folder_is_refused(name):
    with pytest.raises(Misuse, match="model must be letters"):
        MlflowMirror(model=name, tracking_uri="sqlite://")


@pytest.mark.parametrize("uri", ["http://localhost:1", "https://u:secret@host", "databricks", "./mlruns", "file:///x"])
def test_a_registry_that_is_no_database_is_refused_and_its_address_kept_to_itself(uri):
    with pytest.raises(Unsupported, match="give the address of its database") as caught:
        MlflowMirror(model="credit", tracking_uri=uri)
    assert "secret" not in str(caught.value)
    ours = MlflowMirror(model="credit", tracking_uri=uri, registry_uri="postgresql+psycopg://u:secret@host/registry")
    assert "secret" not in repr(ours)


def test_without_mlflow_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(Unsupported, match=r"pip install 'expunge\[mlflow\]'"):
        MlflowMirror(model="credit", tracking_uri="sqlite://")


def test_what_the_registry_or_the_disk_refuses_says_how_to_go_on(world):
    world.start()
    with pytest.raises(
        Stopped, match=r"mlflow:credit did not do it \(.*alias.*\); run it again, nothing is done twice"
    ):
        MlflowMirror(model="credit", tracking_uri=world.uri, alias="latest").serve("1")
    (world.folder / "flat").write_text("")
    with pytest.raises(Stopped, match="mlflow:credit did not do it"):
        MlflowMirror(model="credit", tracking_uri=world.uri, artifacts=world.folder / "flat").publish(
            *world.after, ASKED
        )
    with pytest.raises(Stopped, match="mlflow:credit did not do it"):
        MlflowMirror(model="credit", tracking_uri=f"sqlite:///{world.folder}/flat/x.db").serve("1")


def test_a_registry_beside_the_tracking_one_is_the_one_asked(world):
    shutil.copy(world.database, world.folder / "tracking.db")
    tracking = f"sqlite:///{world.folder / 'tracking.db'}"
    mirror: Mirror = MlflowMirror(model="credit", tracking_uri=tracking, registry_uri=world.uri)
    assert mirror.publish(*world.before, {}) == "1"
    assert list(world.versions()) == ["1"]
    assert module.connect(tracking, tracking).search_registered_models() == []


def test_all_pages_of_versions_are_read(world):
    def search(text, page_token=None):
        pages = {None: (["3", "1"], "more"), "more": (["10"], "")}
        numbers, token = pages[page_token]
        page = type("Page", (list,), {"token": token})
        return page(SimpleNamespace(version=number, tags={DIGEST: "x"}) for number in numbers)

    found = world.mirror._ours(SimpleNamespace(search_model_versions=search))
    assert [one.version for one in found] == ["1", "3", "10"]


QUIET = """
import os
from pathlib import Path
for name in [*os.environ]:
    if name.startswith(("MLFLOW_", "GITHUB_")) or name in {"CI", "DO_NOT_TRACK", "PYTEST_CURRENT_TEST"}:
        del os.environ[name]
os.environ["HOME"] = os.environ["XDG_CONFIG_HOME"] = str(Path.cwd() / "home")
before = dict(os.environ)
from expunge.workflow.mlflow import MlflowMirror
lazy = "mlflow" not in sys.modules
mirror = MlflowMirror(model="credit", tracking_uri=given["uri"])
lazy = lazy and "mlflow" not in sys.modules
mirror.publish(Path(given["folder"]), given["digest"], {})
import mlflow
from mlflow.telemetry import get_telemetry_client, set_telemetry_client
quiet = get_telemetry_client() is None and dict(os.environ) == before
files = [str(path) for path in Path.cwd().rglob("*")]
uri = mlflow.get_tracking_uri()
set_telemetry_client()  # what MLflow does at import, when it is not told to be silent
answer = [lazy, quiet, files, given["uri"] in uri, get_telemetry_client() is not None]
"""


def test_it_is_lazy_warns_of_nothing_sends_nothing_and_leaves_no_global_state(world, fresh_python):
    lazy, quiet, files, shared, liar = fresh_python(
        QUIET, "-W", "error", uri=world.uri, folder=str(world.before[0]), digest=world.before[1]
    )
    assert (lazy, quiet, files, shared) == (True, True, [], False)
    assert liar, "without the precaution there would be a client that sends"
