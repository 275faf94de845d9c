"""Settings and registration: what cannot be meant is refused in one line, and nothing is left half written."""

from contextlib import suppress
from datetime import date

import pytest

from expunge import Keep, Records, Request, Retrain, train
from expunge.core.errors import Corrupt, ExpungeError, Misuse, UnknownRecord, UnreadableFile
from expunge.core.records import Records as CoreRecords
from expunge.ledger.models import Models
from expunge.workflow import Config, Policy, Workspace
from expunge.workflow.config import TEMPLATE
from tests.workflow import kit

ANN = kit.owners_of(kit.digits())[0]


def written(path, text=TEMPLATE, url="sqlite:///ledger.db"):
    file = path / "expunge.toml"
    file.write_text(text.replace("{url}", f'"{url}"').replace("{origin}", '"expunge/x"'), encoding="utf-8")
    return file


def test_the_template_says_what_the_defaults_are(tmp_path):
    config = Config.read(written(tmp_path))
    assert config.policy == Policy()
    assert (config.url, config.origin, config.anchor) == ("sqlite:///ledger.db", "expunge/x", "last-checkpoint")
    assert (config.clock.regime.name, config.clock.holidays, dict(config.models)) == ("gdpr", frozenset(), {})


def test_settings_from_before_there_was_a_replay_still_work_and_leave_it_out(tmp_path):
    assert TEMPLATE.count("replay = 0.0\n") == 1
    config = Config.read(written(tmp_path, TEMPLATE.replace("replay = 0.0\n", "")))
    assert config.policy == Policy()
    assert config.policy.replay == 0


def test_every_setting_is_read(tmp_path):
    text = """
        [ledger]
        url = "postgresql://me@host/base"
        origin = "o"
        anchor = "/elsewhere/checkpoint"
        [clock]
        regime = "ccpa"
        zone = "Europe/Berlin"
        holidays = [2026-12-25, "2026-12-26"]
        [batch]
        count = 3
        wait_hours = 0.5
        most = 7
        [policy]
        on_flag = "exact"
        replay = 0.25
        identity_days = 1
        keys_days = 2.5
        [models.a]
        records = "a.csv"
    """
    config = Config.read(written(tmp_path, text))
    assert (config.url, config.anchor) == ("postgresql://me@host/base", "/elsewhere/checkpoint")
    assert (config.clock.regime.name, str(config.clock.zone)) == ("ccpa", "Europe/Berlin")
    assert config.clock.holidays == {date(2026, 12, 25), date(2026, 12, 26)}
    batch = {"count": 3, "wait_hours": 0.5, "most": 7}
    assert config.policy == Policy(**batch, on_flag="exact", replay=0.25, identity_days=1, keys_days=2.5)
    assert config.models == {"a": {"records": "a.csv"}}


BAD = {
    "count 0": ("count = 1", "count = 0", "count must be >= 1"),
    "count half": ("count = 1", "count = 1.5", "count"),
    "count text": ("count = 1", 'count = "1"', "count"),
    "count true": ("count = 1", "count = true", "count"),
    "most 0": ("most = 1000", "most = 0", "most must be >= 1"),
    "wait negative": ("wait_hours = 24", "wait_hours = -1", "wait_hours must be >= 0"),
    "wait nan": ("wait_hours = 24", "wait_hours = nan", "wait_hours"),
    "wait text": ("wait_hours = 24", 'wait_hours = "a day"', "wait_hours"),
    "identity negative": ("identity_days = 30", "identity_days = -30", "identity_days must be >= 0"),
    "keys text": ("keys_days = 30", 'keys_days = "for ever"', "keys_days"),
    "flag refuse": ('on_flag = "hold"', 'on_flag = "refuse"', "never dropped"),
    "flag list": ('on_flag = "hold"', "on_flag = []", "on_flag"),
    "replay more than all": ("replay = 0.0", "replay = 1.5", "replay must be a share of the training from 0"),
    "replay negative": ("replay = 0.0", "replay = -0.1", "replay must be a share"),
    "replay nan": ("replay = 0.0", "replay = nan", "replay must be a share"),
    "replay true": ("replay = 0.0", "replay = true", "replay must be a share"),
    "replay text": ("replay = 0.0", 'replay = "5%"', "replay must be a share"),
    "unknown setting": ("count = 1", "counts = 1", "counts"),
    "unknown in ledger": ("[clock]", 'urls = "x"\n[clock]', "urls"),
    "unknown in clock": ('zone = "UTC"', 'zones = "UTC"', "zones"),
    "unknown part": ("[batch]", "[batches]", r"unknown part \[batches\]"),
    "twice": ("[policy]", "[policy]\ncount = 2", "count"),
    "regime": ('regime = "gdpr"', 'regime = "gpdr"', "gdpr, ccpa"),
    "regime list": ('regime = "gdpr"', 'regime = ["gdpr"]', "regime"),
    "zone": ('zone = "UTC"', 'zone = "Mars/Olympus"', "Mars/Olympus"),
    "zone number": ('zone = "UTC"', "zone = 1", "zone"),
    "holiday": ("holidays = []", 'holidays = ["Christmas"]', "Christmas"),
    "holidays text": ("holidays = []", 'holidays = "2026-12-25"', "holiday"),
    "no url": ("url = {url}", "", "'url'"),
    "no origin": ("origin = {origin}", "", "'origin'"),
    "part is no part": ("# The settings of this expunge workspace.", "batch = 3", "batch"),
    "models are no part": ("# The settings of this expunge workspace.", "models = 3", "models"),
    "url number": ("url = {url}", "url = 3", "url"),
    "origin empty": ("origin = {origin}", 'origin = ""', "origin"),
    "model is no part": ("# Models are added below by: expunge register-model", "[models]\nx = 3", "models"),
    "holiday with a time": ("holidays = []", "holidays = [2026-12-25T00:00:00Z]", "2026-12-25"),
    "toml": ("[ledger]", "[ledger", "cannot be read"),
}


@pytest.mark.parametrize("what", BAD, ids=[what.replace(" ", "-") for what in BAD])
def test_a_setting_that_cannot_be_meant_is_refused_in_one_line(tmp_path, what):
    old, new, why = BAD[what]
    assert TEMPLATE.count(old) == 1
    text = TEMPLATE.replace(old, new)
    if what == "part is no part":
        text = text.partition("[batch]")[0]
    with pytest.raises(Misuse, match=why) as caught:
        Config.read(written(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lease", [0, -1, float("nan"), float("inf"), True, "60"])
def test_a_lease_is_a_time(lease):
    with pytest.raises(Misuse, match="lease_s must be > 0"):
        Policy(lease_s=lease)


def test_a_folder_without_settings_is_no_workspace(tmp_path):
    with pytest.raises(Misuse, match="is no workspace; make one with: expunge init"):
        Workspace(tmp_path)
    (tmp_path / "expunge.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UnreadableFile, match="cannot be read"):
        Workspace(tmp_path)


def test_a_folder_that_is_not_empty_becomes_no_workspace(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(Misuse, match="is not empty"):
        Workspace.init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(Misuse, match="is not empty"):
        Workspace.init(tmp_path / "mine.txt")
    made = Workspace.init(tmp_path / "ws")
    made.close()
    with pytest.raises(Misuse, match="is not empty"):
        Workspace.init(tmp_path / "ws")
    assert Workspace(tmp_path / "ws").keys.pepper == made.keys.pepper


def test_a_workspace_is_for_its_owner_alone_and_names_itself(tmp_path):
    made = [Workspace.init(tmp_path / name) for name in "ab"]
    for one in made:
        assert one.root.stat().st_mode & 0o077 == 0
        assert {path.stat().st_mode & 0o777 for path in (one.root / "keys").glob("*.[pk]e[my]")} == {0o600}
        one.close()
    assert made[0].config.origin != made[1].config.origin
    assert made[0].keys.pepper != made[1].keys.pepper
    named = Workspace.init(tmp_path / "c", origin='a"name"')
    assert named.config.origin == named.ledger.log.origin == 'a"name"'
    named.close()


def test_a_relative_database_lies_in_the_workspace_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Workspace.init("ws").close()
    assert (tmp_path / "ws" / "ledger.db").is_file()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "ws").rename(tmp_path / "moved")
    moved = Workspace(tmp_path / "moved")
    assert moved.ledger.database.url.database == str(tmp_path / "moved" / "ledger.db")
    moved.close()
    assert list(elsewhere.iterdir()) == []


def test_a_database_elsewhere_stays_elsewhere(tmp_path):
    made = Workspace.init(tmp_path / "ws", url=f"sqlite:///{tmp_path}/other/base.db")
    made.close()
    assert (tmp_path / "other" / "base.db").is_file()
    assert not (tmp_path / "ws" / "ledger.db").exists()


def test_a_workspace_on_postgresql(tmp_path, postgres_url):
    made = Workspace.init(tmp_path / "ws", url=postgres_url)
    made.close()
    again = Workspace(tmp_path / "ws")
    assert not again.ledger.database.on_sqlite
    assert not (tmp_path / "ws" / "ledger.db").exists()
    again.close()


def test_a_database_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ExpungeError, match="SQLite or PostgreSQL"):
        Workspace.init(tmp_path / "ws", url="mysql://x/y")


@pytest.fixture
def empty(tmp_path):
    """A workspace that serves nothing yet."""
    made = Workspace.init(tmp_path / "new", keys=kit.KEYS)
    yield made
    made.close()


def untouched(workspace):
    """Whether nothing is registered, and nothing of a registration is left."""
    assert workspace.ledger.models.all() == []
    with workspace.ledger.database.read() as connection:
        assert len(workspace.ledger.commitments.present(connection, kit.MODEL)) == 0
    return len(workspace.ledger.log) == 0


def test_a_registered_model_is_served_as_it_was_given(empty):
    served = empty.register(kit.MODEL, kit.trained(), kit.digits(), {"records": "digits.npy", "shards": 4})
    assert (served.version, served.digest) == (1, kit.trained().digest())
    loaded = empty.load(kit.MODEL, kit.digits())
    assert loaded.digest() == kit.trained().digest()
    assert loaded.ids == kit.trained().ids
    assert empty.config.models == {kit.MODEL: {"records": "digits.npy", "shards": 4}}
    assert empty.config.policy == Policy()


def test_of_a_larger_data_set_only_what_the_model_stands_on_is_committed_to(empty):
    some = kit.digits().select(range(50))
    empty.register(kit.MODEL, kit.from_scratch(kit.recipe(), some), kit.digits())
    with empty.ledger.database.read() as connection:
        assert len(empty.ledger.commitments.present(connection, kit.MODEL)) == 50


def test_of_the_training_log_no_batches_are_kept(empty):
    logged = train(kit.recipe(), kit.digits(), keep=Keep(batches=True))
    assert logged.log.batches
    empty.register(kit.MODEL, logged, kit.digits())
    assert empty.load(kit.MODEL, kit.digits()).log.batches == ()


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", "ä", "a.b"])
def test_a_name_that_is_no_name_is_refused(empty, name):
    with pytest.raises(Misuse, match="a model is called by letters"):
        empty.register(name, kit.trained(), kit.digits())
    assert untouched(empty)


@pytest.mark.parametrize("after", [False, True], ids=["at once", "after a removal"])
def test_a_name_that_is_taken_is_refused_and_nothing_of_the_other_is_kept(place, after):
    here = place("shards")
    if after:
        here.honour(Request.remove_owner(ANN))
    before, versions = here.served().digest(), here.versions()
    with pytest.raises(Misuse, match='there is a model "digits" already'):
        here.workspace.register(kit.MODEL, kit.trained("whole"), kit.digits())
    assert here.served().digest() == before
    assert here.versions() == versions
    assert here.sound()


def other_content():
    records = kit.digits()
    x = records.x.clone()
    x[3] += 1
    return Records(x, records.y, records.ids, records.owners, classes=10)


def other_owners():
    records = kit.digits()
    return Records(records.x, records.y, records.ids, [*records.owners[1:], "eve"], classes=10)


@pytest.mark.parametrize("records", [other_content(), other_owners()], ids=["content", "owners"])
def test_records_that_the_model_was_not_trained_on_are_refused(empty, records):
    with pytest.raises(Misuse, match="not the records that the model was trained on"):
        empty.register(kit.MODEL, kit.trained(), records)
    assert untouched(empty)


def test_a_data_set_that_lacks_records_of_the_model_is_refused(empty):
    with pytest.raises(UnknownRecord):
        empty.register(kit.MODEL, kit.trained(), kit.digits().select(range(100)))
    assert untouched(empty)


class Torn(BaseException):
    """The plug was pulled."""


@pytest.mark.parametrize("at", ["digests", "register"])
def test_a_registration_that_was_interrupted_is_made_again(empty, monkeypatch, at):
    def torn(*_):
        raise Torn

    with monkeypatch.context() as patched:
        patched.setattr(*((CoreRecords, "digests") if at == "digests" else (Models, "_anchor")), torn)
        with pytest.raises(Torn):
            empty.register(kit.MODEL, kit.trained("whole"), kit.digits())
    assert untouched(empty)
    left = empty.root / "models" / kit.MODEL / "v0001"
    left.mkdir(parents=True, exist_ok=True)
    (left / "half").write_bytes(b"x")
    empty.register(kit.MODEL, kit.trained("shards"), kit.digits())
    assert empty.load(kit.MODEL, kit.digits()).digest() == kit.trained("shards").digest()
    assert not (left / "half").exists()
    assert empty.ledger.verify() == []


def test_a_registration_that_was_interrupted_before_its_settings_were_written_can_be_finished(empty, monkeypatch):
    def torn(*_):
        raise Torn

    given = (kit.MODEL, kit.trained("whole"), kit.digits(), {"records": "digits.npy"})
    with monkeypatch.context() as patched:
        patched.setattr("expunge.workflow.workspace.write_atomically", torn)
        with pytest.raises(Torn):
            empty.register(*given)
    with suppress(Misuse):  # that it is registered already may be said, if the settings are written nevertheless
        empty.register(*given)
    assert Config.read(empty.root / "expunge.toml").models == {kit.MODEL: {"records": "digits.npy"}}


def test_a_served_model_that_was_changed_on_disk_is_refused(place):
    here = place("whole")
    path = here.root / "models" / kit.MODEL / "v0001"
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    here.workspace.keep(kit.from_scratch(kit.recipe(epochs=3), kit.digits()), "models/digits/v0001")
    with pytest.raises(Corrupt, match="not the one that the ledger names"):
        here.served()
    asked = here.ask(Request.remove_owner(ANN))
    with pytest.raises(Corrupt):
        here.run(method=Retrain())
    assert here.state(asked) == "screening"
    with pytest.raises(Misuse, match="give the whole data set"):
        here.workspace.read("models/digits/v0001", kit.from_scratch(kit.recipe(epochs=3), kit.digits()).digest(), {})
