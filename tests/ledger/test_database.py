"""The ledger outlives what befalls a database: death at any instant, torn files, full disks, wrong clocks, upgrades."""

import random
import shutil
import sqlite3
import tempfile
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from expunge.core.errors import Corrupt, Misuse, Unsupported, Unwritable
from expunge.ledger import database, log, tables, upgrades
from expunge.ledger.database import Database
from expunge.ledger.requests import Submission
from expunge.ledger.states import State
from tests.ledger import kit

HERE = str(Path(__file__).parent)
_CHILD = """
import os, signal, sys
sys.path.insert(0, given["here"])
import kit
"""


def rows_of(ledger):
    """How many requests there are, and how many entries."""
    held = kit.tables(ledger)
    return len(held["request"]), len(held["entry"])


_CRASHES = (
    _CHILD
    + """
def journey(number):
    ledger = kit.opened(given["url"], now=None, new_id=None, anchor=given["anchor"])
    kit.ready(ledger, f"r-{2 * number}", f"r-{2 * number + 1}")
    kit.carry_out(ledger)
    os._exit(0)

answer = []
first = kit.opened(given["url"], now=None, anchor=given["anchor"])
kit.register(first, 30)
first.close()
for number, point in enumerate(given["points"]):
    child = os.fork()
    if not child:
        os.environ["EXPUNGE_FAIL_AT"] = point
        journey(number)
    status = os.waitpid(child, 0)[1]
    ledger = kit.opened(given["url"], now=None, anchor=given["anchor"])
    torn = kit.faults(ledger)
    filed = ledger.requests.find()
    stood = [f"{one.state}" for one in filed[-2:]] if len(filed) > 2 * number else []
    for name in (f"r-{2 * number}", f"r-{2 * number + 1}"):
        one = kit.file(ledger, name)
        if one.state == "received":
            ledger.requests.screening(one.id)
        if ledger.requests.get(one.id).state == "screening":
            ledger.requests.screened(one.id, held=None)
    kit.carry_out(ledger)
    ends = sorted({one.state.value for one in ledger.requests.find()})
    answer.append([os.WTERMSIG(status), torn, stood, kit.faults(ledger), ends, len(ledger.requests.find())])
    ledger.close()
"""
)


def test_killed_at_any_point_each_request_is_whole_or_not_there_and_going_on_completes_it_once(
    database_url, forks, tmp_path
):
    counts = {"before update": (2, 9), "before commit": (2, 8, 11, 12), "after commit": (2, 8, 11, 12)}
    points = [f"{point}:{number}" for point, numbers in counts.items() for number in numbers] + ["after sign:1"]
    told = forks(_CRASHES, here=HERE, url=database_url, anchor=str(tmp_path / "anchor"), points=points)
    assert len(told) == len(points)
    stages = set()
    for number, (signal, torn, stood, faults, ends, many) in enumerate(told):
        assert (signal, torn, faults, ends, many) == (9, [], [], ["completed"], 2 * number + 2), points[number]
        stages |= {tuple(stood)}
    assert {(), ("running", "running"), ("verifying", "verifying"), ("completed", "completed")} <= stages


@pytest.fixture
def busy(tmp_path):
    """A ledger amid its work, as its files stand when the power goes: most of it is in the write-ahead log only."""
    ledger = kit.opened(f"sqlite:///{tmp_path}/ledger.db", now=kit.Time(), anchor=tmp_path / "anchor")
    kit.register(ledger)
    ledger.database.forget_pages()
    for number in range(8):
        kit.ready(ledger, f"r-{number}")
        if number % 3 == 2:
            kit.carry_out(ledger)
    entries = [entry.leaf() for entry in ledger.log.entries()]
    at = len(kit.tables(ledger)["entry"])
    files = {path.name: path.read_bytes() for path in kit.files_of(f"sqlite:///{tmp_path}/ledger.db")}
    anchored = ledger.log.last_checkpoint().size
    ledger.close()
    assert len(files["ledger.db-wal"]) > 100_000
    return files, (tmp_path / "anchor").read_bytes(), anchored, entries[:at]


def power_fails(busy, folder, trials):
    """Cut the write-ahead log anywhere, or flip one bit of it: what sizes of the log were found."""
    files, anchor, anchored, entries = busy
    draw, seen = random.Random(1), []
    for trial in range(trials):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        wal = bytearray(files["ledger.db-wal"])
        if trial % 2:
            del wal[draw.randrange(len(wal)) :]
        else:
            wal[draw.randrange(len(wal))] ^= 1 << draw.randrange(8)
        (folder / "ledger.db").write_bytes(files["ledger.db"])
        (folder / "ledger.db-wal").write_bytes(wal)
        ledger = kit.opened(f"sqlite:///{folder}/ledger.db")
        found = [entry.leaf() for entry in ledger.log.entries()]
        assert found == entries[: len(found)]
        assert kit.faults(ledger) == []
        ledger.close()
        (folder / "anchor").write_bytes(anchor)
        again = partial(kit.opened, f"sqlite:///{folder}/ledger.db", anchor=folder / "anchor")
        if len(found) < anchored:
            with pytest.raises(Corrupt, match=f"it has {len(found)} entries and {anchored} were signed"):
                again()
        else:
            again().close()
        seen.append(len(found))
    return seen


def test_after_a_power_failure_the_ledger_is_a_whole_beginning_and_says_if_signed_entries_are_lost(busy, tmp_path):
    seen = power_fails(busy, tmp_path / "torn", 30)
    assert len(set(seen)) > 10
    assert min(seen) < busy[2] <= max(seen)


@pytest.mark.soak
def test_after_three_hundred_power_failures_the_ledger_is_a_whole_beginning_each_time(busy, tmp_path):
    assert len(set(power_fails(busy, tmp_path / "torn", 300))) > 20


def test_a_ledger_of_which_half_a_transaction_is_there_would_be_seen(busy, tmp_path):
    files, _, _, _ = busy
    for name, data in files.items():
        (tmp_path / name.replace("ledger", "half")).write_bytes(data)
    raw = sqlite3.connect(tmp_path / "half.db")
    raw.execute("DELETE FROM entry WHERE idx = (SELECT max(idx) FROM entry)")
    raw.commit()
    raw.close()
    ledger = kit.opened(f"sqlite:///{tmp_path}/half.db")
    assert kit.faults(ledger) != []
    ledger.close()


_FULL = (
    _CHILD
    + """
import resource
from expunge.core.errors import Unwritable
ledger = kit.opened(given["url"], now=kit.Time(), anchor=given["anchor"])
size = max(os.path.getsize(given["url"].removeprefix("sqlite:///") + end) for end in ("", "-wal"))
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30_000, resource.RLIM_INFINITY))
kept, said = [], []
for number in range(40):
    try:
        kept.append(kit.file(ledger, f"r-{number}", body=bytes(5_000)).id)
    except Unwritable as error:
        said.append(str(error))
readable = len(ledger.requests.find())
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    ledger.log.checkpoint()
except Unwritable as error:
    said.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
later = kit.file(ledger, "r-100").id
ledger.log.checkpoint()
answer = [kept, said, readable, later, kit.faults(ledger)]
"""
)


def test_on_a_full_disk_nothing_is_lost_and_when_there_is_room_all_goes_on(forks, tmp_path):
    url, anchor = f"sqlite:///{tmp_path}/ledger.db", str(tmp_path / "anchor")
    kit.opened(url, now=kit.Time(), anchor=anchor).close()
    kept, said, readable, later, faults = forks(_FULL, here=HERE, url=url, anchor=anchor)
    assert 0 < len(kept) < 40
    assert len(said) == 40 - len(kept) + 1
    for line in said:
        assert "\n" not in line
        assert line.endswith("run again")
    assert readable == len(kept)
    assert faults == []
    ledger = kit.opened(url, anchor=anchor)
    assert [filed.id for filed in ledger.requests.find()] == [*kept, later]
    assert kit.faults(ledger) == []
    ledger.close()
    assert not list(tmp_path.glob(".*.part"))


_READ_ONLY = (
    _CHILD
    + """
from expunge.core.errors import Unwritable
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
answer = []
for url in given["urls"]:
    try:
        kit.opened(url)
        answer.append("opened")
    except Unwritable as error:
        answer.append(str(error))
"""
)


def test_a_read_only_folder_or_file_is_said_in_one_line_and_works_again_when_it_is_writable(forks):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        folder = Path(place)
        url = f"sqlite:///{folder}/ledger.db"
        ledger = kit.opened(url)
        kit.file(ledger, "r-0")
        before = kit.tables(ledger)
        ledger.close()
        for path in kit.files_of(url):
            path.chmod(0o444)
        folder.chmod(0o555)
        urls = [url, f"sqlite:///{folder}/new.db", f"sqlite:///{folder}/below/ledger.db"]
        for line in forks(_READ_ONLY, here=HERE, urls=urls):
            assert line.startswith(("the ledger at sqlite:///", "the folder "))
            assert "\n" not in line
        folder.chmod(0o755)
        for path in kit.files_of(url):
            path.chmod(0o644)
        ledger = kit.opened(url)
        assert kit.tables(ledger) == before
        kit.file(ledger, "r-1")
        ledger.close()


def test_a_database_opened_for_reading_only_can_be_read_and_verified_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = kit.opened(f"sqlite:///{tmp_path}/ledger.db")
    filed = kit.file(ledger, "r-0")
    ledger.close()
    ledger = kit.opened(f"sqlite:///file:{tmp_path}/ledger.db?mode=ro&uri=true")
    assert ledger.requests.find() == [filed]
    assert ledger.verify() == []
    with pytest.raises(Unwritable, match="readonly"):
        kit.file(ledger, "r-1")
    ledger.close()
    assert not (tmp_path / "file:").exists()


def test_what_is_no_database_or_cannot_be_reached_is_said_in_one_line(tmp_path):
    (tmp_path / "ledger.db").write_bytes(b"this is no database" * 100)
    for url in (
        f"sqlite:///{tmp_path}/ledger.db",
        f"sqlite:///{tmp_path}",
        f"sqlite:///{tmp_path}/ledger.db/below.db",
        f"postgresql://me:sesame@/x?host={tmp_path}",
    ):
        with pytest.raises(Unwritable) as raised:
            kit.opened(url)
        assert "\n" not in str(raised.value)
        assert "sesame" not in str(raised.value)
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true", "sqlite:///file:x?mode=memory"):
        with pytest.raises(Misuse, match="in memory"):
            Database(url)
    with pytest.raises(Unsupported, match="mysql"):
        Database("mysql://localhost/x")


def test_another_process_that_writes_for_too_long_is_said_and_nothing_is_lost(tmp_path):
    ledger = kit.opened(f"sqlite:///{tmp_path}/ledger.db?timeout=0.05")
    kit.file(ledger, "r-0")
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unwritable, match="locked"):
        kit.file(ledger, "r-1")
    other.execute("ROLLBACK")
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM request").fetchall()
    kit.file(ledger, "r-1")
    with pytest.raises(Unwritable, match="another process reads"):
        ledger.database.forget_pages()
    other.execute("ROLLBACK")
    other.close()
    ledger.database.forget_pages()
    assert (tmp_path / "ledger.db-wal").stat().st_size == 0
    assert kit.faults(ledger) == []
    ledger.close()


def test_a_connection_lost_at_the_very_commit_is_not_called_a_change_undone(postgres_url, monkeypatch):
    ledger = kit.opened(postgres_url)
    killer = sa.create_engine(postgres_url)
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "

    def cut(where, name):
        if name == where:
            with killer.connect() as connection:
                connection.exec_driver_sql(f"{others} pg_backend_pid()")

    for where, said in (
        ("before commit", "not known whether the last change"),
        ("before update", "nothing was changed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(database, "failpoint", partial(cut, where))
            with pytest.raises(Unwritable, match=said):
                kit.file(ledger, "r-0")
    kit.file(ledger, "r-0")
    assert rows_of(ledger) == (1, 1)
    assert kit.faults(ledger) == []
    ledger.close()
    killer.dispose()


@pytest.mark.parametrize("how", ["read", "write"])
def test_an_interruption_amid_a_query_stays_one_and_the_ledger_goes_on(postgres_url, how):
    """Psycopg leaves a connection busy if its query is interrupted twice: undoing on it fails, and hid the Ctrl-C."""
    ledger = kit.opened(postgres_url)
    kit.file(ledger, "r-0")

    def interrupted():
        with getattr(ledger.database, how)() as connection:
            if how == "write":
                connection.execute(sa.text("DELETE FROM outbox"))
            connection.connection.dbapi_connection.pgconn.send_query(b"SELECT pg_sleep(30)")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    kit.file(ledger, "r-1")
    assert rows_of(ledger) == (2, 2)
    assert kit.faults(ledger) == []
    ledger.close()


def test_a_reader_has_one_view_however_many_queries_it_makes(database_url):
    ledger = kit.opened(database_url)
    kit.file(ledger, "r-0")
    query = sa.select(sa.func.count()).select_from(tables.request)
    with ledger.database.read() as connection:
        assert connection.execute(query).scalar_one() == 1
        kit.file(ledger, "r-1")
        assert connection.execute(query).scalar_one() == 1
    with ledger.database.read() as connection:
        assert connection.execute(query).scalar_one() == 2
    ledger.close()


def test_the_databases_own_settings_are_the_safe_ones(tmp_path):
    ledger = kit.opened(f"sqlite:///{tmp_path}/ledger.db")
    wanted = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "temp_store": 2}
    with ledger.database.read() as connection:
        found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted}
    assert found == wanted
    ledger.close()


def two_threads_read_the_tree(url, patience_s):
    """The second asks for the tree while the first is in the midst of reading it."""
    ledger = kit.opened(url)
    for number in range(5):
        kit.file(ledger, f"r-{number}")
    begun, ended, append = threading.Event(), threading.Event(), log.Tree.append

    def slow_append(tree, leaf):
        first = not begun.is_set()
        begun.set()
        if first:
            ended.wait(patience_s)  # in vain, if the second must wait for the first
        append(tree, leaf)

    def second():
        assert begun.wait(60)
        ledger.log.tree()
        ended.set()

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log.Tree, "append", slow_append)
            kit.at_once(ledger.log.tree, second)
        assert len(ledger.log.tree()) == 5
    finally:
        ledger.close()


def test_threads_read_the_tree_one_after_the_other(tmp_path):
    two_threads_read_the_tree(f"sqlite:///{tmp_path}/ledger.db", 0.2)


def test_threads_that_read_the_tree_together_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "threading", SimpleNamespace(RLock=nullcontext))
    with pytest.raises(Corrupt, match="is missing from the log"):
        two_threads_read_the_tree(f"sqlite:///{tmp_path}/ledger.db", 60)


def test_threads_that_sign_and_file_at_once_sign_one_history(database_url, tmp_path):
    ledger = kit.opened(database_url, anchor=tmp_path / "anchor")

    def work(first):
        for number in range(8):
            kit.file(ledger, f"r-{first + number}")
            ledger.log.checkpoint()

    kit.at_once(*(partial(work, 100 * thread) for thread in range(4)))
    assert len(ledger.log) == 32
    assert kit.faults(ledger) == []
    ledger.close()


def test_clocks_that_jump_lose_and_double_nothing(database_url):
    time = kit.Time()
    ledger = kit.opened(database_url, now=time)
    kit.register(ledger)
    due = kit.file(ledger, "r-0").due_at
    jumps = (-3600.0, 365 * kit.DAY_S, -365 * kit.DAY_S, 3600.0, -7200.0, 400 * kit.DAY_S)
    doubted = kit.file(ledger, "r-9", identified=False)
    for number, jump in enumerate(jumps):
        time.at_s += jump
        if number == 0:
            kit.ready(ledger, "r-0", "r-1")
            first = kit.advance(ledger, ledger.runs.claim("m", "first"))
        if number == 1:
            second = ledger.runs.claim("m", "second")
            assert second.fence == first.fence + 1
        if number == 2:
            assert ledger.runs.claim("m", "third") is None  # its lease seems to last a year; its worker goes on
            assert ledger.requests.verify_identity(doubted.id).due_at == doubted.due_at
            second = kit.advance(ledger, second)
        if number == 3:
            kit.finish(ledger, second)
        assert kit.file(ledger, "r-0").due_at == due
        assert kit.faults(ledger) == []
    done = [filed for filed in ledger.requests.find() if filed.state is State.COMPLETED]
    assert len(done) == 2
    kit.ready(ledger, "r-2")
    kit.carry_out(ledger)
    assert kit.faults(ledger) == []
    ledger.close()


LATER = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.create_table("extra", sa.Column("name", sa.String(40), primary_key=True))
    with op.batch_alter_table("outbox") as outbox:
        outbox.add_column(sa.Column("tries", sa.Integer, nullable=False, server_default="0"))
"""


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Lets the ledger be of a later release, whose only new migration is this text."""

    def later(text):
        folder = tmp_path / "migrations"
        if not folder.exists():
            shutil.copytree(upgrades._HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "versions" / "0002_later.py").write_text(text)
        monkeypatch.setattr(upgrades, "_HERE", folder)
        monkeypatch.setattr(upgrades, "run", partial(upgrades.run, target="0002"))

    return later


def columns_of(ledger, table):
    return {column["name"] for column in sa.inspect(ledger.database.engine).get_columns(table)}


def test_an_older_ledger_keeps_every_row_and_proof_and_an_older_release_refuses_a_newer_ledger(
    database_url, release, tmp_path, monkeypatch
):
    ledger = kit.opened(database_url, anchor=tmp_path / "anchor")
    kit.register(ledger)
    [done] = kit.ready(ledger, "r-0")
    kit.carry_out(ledger)
    kit.ready(ledger, "r-1")
    before, bundle = kit.tables(ledger), ledger.certificates.bundle(done)
    ledger.close()
    with monkeypatch.context() as patch:
        release(LATER.replace("batch_alter_table", "no_such_step"))
        with pytest.raises(AttributeError):
            kit.opened(database_url)
        patch.undo()
    monkeypatch.undo()
    ledger = kit.opened(database_url, anchor=tmp_path / "anchor")
    assert not sa.inspect(ledger.database.engine).has_table("extra")
    assert kit.tables(ledger) == before
    ledger.close()
    release(LATER)
    ledger = kit.opened(database_url, anchor=tmp_path / "anchor")
    assert "tries" in columns_of(ledger, "outbox")
    assert sa.inspect(ledger.database.engine).has_table("extra")
    assert kit.tables(ledger) == before
    assert ledger.certificates.bundle(done) == bundle
    kit.carry_out(ledger)
    assert kit.faults(ledger) == []
    ledger.close()
    kit.opened(database_url, anchor=tmp_path / "anchor").close()
    monkeypatch.undo()
    with pytest.raises(Unsupported, match="of form 0002 and this release knows 0001; upgrade expunge"):
        kit.opened(database_url)


def test_the_tables_are_what_the_migrations_make(database_url):
    ledger = kit.opened(database_url)
    with ledger.database.engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, tables.metadata) == []
        connection.exec_driver_sql("ALTER TABLE outbox ADD COLUMN tries INTEGER")
        assert len(compare_metadata(context, tables.metadata)) == 1
    ledger.close()


_TOGETHER = (
    _CHILD
    + """
import alembic.command, alembic.config
answer = []
for url in given["urls"]:
    ours, theirs = os.pipe()
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            os.close(theirs)
            os.read(ours, 1)  # until all are let go at once
            try:
                ledger = kit.opened(url, new_id=None)
                kit.file(ledger, f"r-{os.getpid()}")
            except BaseException as error:
                sys.stderr.write(f"{type(error)} {error}")
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(ours)
    os.close(theirs)
    answer.append([os.waitpid(child, 0)[1] for child in children])
"""
)


def test_processes_that_open_a_new_ledger_at_once_make_it_once(forks, postgres_url, tmp_path):
    urls = [*(f"sqlite:///{tmp_path}/{number}.db" for number in range(4)), postgres_url]
    assert forks(_TOGETHER, here=HERE, urls=urls) == [[0] * 4] * len(urls)
    for url in urls:
        ledger = kit.opened(url)
        assert rows_of(ledger) == (4, 4)
        assert kit.faults(ledger) == []
        ledger.close()


def test_an_error_never_shows_what_was_asked(database_url):
    ledger = kit.opened(database_url, new_id=lambda: "always the same")
    ledger.requests.submit(Submission(model="m", kind="remove", body=b"my name is Nobody", key="a"))
    with pytest.raises(sa.exc.IntegrityError) as raised:
        ledger.requests.submit(Submission(model="m", kind="remove", body=b"my name is Nobody", key="b"))
    assert "Nobody" not in str(raised.value)
    ledger.close()


def test_a_new_file_that_another_process_reads_is_waited_for(tmp_path, monkeypatch):
    reader = sqlite3.connect(tmp_path / "new.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM sqlite_master").fetchall()
    monkeypatch.setattr("expunge.ledger.database.time.sleep", lambda _: reader.execute("COMMIT"))
    impatient = sqlite3.connect(tmp_path / "new.db", isolation_level=None, timeout=0)
    database._log_ahead(impatient, 30.0)
    assert not reader.in_transaction
    assert impatient.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    impatient.close()
    reader.close()


def test_a_new_file_that_is_never_let_go_is_refused_in_the_end(tmp_path):
    reader = sqlite3.connect(tmp_path / "new.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM sqlite_master").fetchall()
    with pytest.raises(Unwritable, match="locked"):
        kit.opened(f"sqlite:///{tmp_path}/new.db?timeout=0.05")
    reader.close()
