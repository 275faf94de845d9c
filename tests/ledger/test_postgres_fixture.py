"""The databases that the ledger's tests are given: empty, real, durable, and gone afterwards."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from tests.ledger import postgres

FOLDER = Path(__file__).parent


def connect(url):
    return psycopg.connect(postgres.plain(url), autocommit=True)


def setting(connection, name):
    return connection.execute("SELECT current_setting(%s)", [name]).fetchone()[0]


def lock(connection, key):
    return connection.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone()[0]


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_has_an_empty_database_of_either_kind(database_url, turn):
    engine = sqlalchemy.create_engine(database_url)
    assert sqlalchemy.inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE left_by_a_test (id INTEGER)")
    assert sqlalchemy.inspect(engine).get_table_names() == ["left_by_a_test"]
    engine.dispose()


def test_the_kinds_are_what_they_are_called(database_url, request):
    assert sqlalchemy.make_url(database_url).get_backend_name() in request.node.callspec.id


def test_a_database_is_dropped_from_under_whoever_is_connected(postgres_server):
    def names():
        with psycopg.connect(postgres_server.conninfo) as connection:
            return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}

    before = names()
    with postgres_server.database() as url, postgres_server.database() as other:
        held = connect(url)
        assert len(names() - before) == 2
        assert url != other
    assert names() == before
    with pytest.raises(psycopg.OperationalError):
        held.execute("SELECT 1")
    held.close()


def test_two_connections_see_what_the_other_committed_and_no_more(postgres_url):
    with psycopg.connect(postgres.plain(postgres_url)) as one, connect(postgres_url) as two:
        one.execute("CREATE TABLE entry (id INTEGER)")
        one.commit()
        one.execute("INSERT INTO entry VALUES (1)")
        assert two.execute("SELECT count(*) FROM entry").fetchone() == (0,)
        one.commit()
        assert two.execute("SELECT count(*) FROM entry").fetchone() == (1,)


def test_an_advisory_lock_keeps_others_out_of_one_database(postgres_server, postgres_url):
    with (
        postgres_server.database() as elsewhere,
        connect(postgres_url) as one,
        connect(postgres_url) as two,
        connect(elsewhere) as three,
    ):
        assert lock(one, 7)
        assert not lock(two, 7)
        assert lock(two, 8)
        assert lock(three, 7)
        one.execute("SELECT pg_advisory_unlock(7)")
        assert lock(two, 7)


def test_what_is_committed_is_on_the_disk(postgres_url):
    with connect(postgres_url) as connection:
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            assert setting(connection, name) == "on", name


def test_only_the_socket_is_open(postgres_server, postgres_url):
    with connect(postgres_url) as connection:
        assert setting(connection, "listen_addresses") == ""
        assert setting(connection, "unix_socket_directories") == str(postgres_server.folder)
    assert len(os.fsencode(postgres_server.folder / ".s.PGSQL.65535.lock")) <= 107


@pytest.mark.usefixtures("postgres_server")  # which skips where there is none
def test_a_server_stops_and_leaves_nothing():
    with pytest.raises(ZeroDivisionError), postgres.Server() as server:  # noqa: PT012
        held = psycopg.connect(server.conninfo, autocommit=True)
        held.execute("SELECT 1")
        assert server.folder.is_dir()
        raise ZeroDivisionError
    assert not server.folder.exists()
    with pytest.raises(psycopg.OperationalError):
        held.execute("SELECT 1")
    held.close()


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import postgres
server = postgres.Server()
print(server.folder, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.usefixtures("postgres_server")
def test_a_killed_test_run_leaves_no_server():
    # The keeper holds the run's stderr, so the run's output ends when the keeper has done its work.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, FOLDER], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = done.stdout.strip()
    assert Path(folder).name.startswith("expunge-pg-")
    assert not Path(folder).exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(f"postgresql://postgres@/postgres?host={folder}")


@pytest.mark.usefixtures("postgres_server")
def test_a_server_that_does_not_start_says_why_and_leaves_nothing(monkeypatch):
    made = []
    monkeypatch.setattr(postgres, "_OPTIONS", "-c no_such_setting=1")
    monkeypatch.setattr(postgres.tempfile, "mkdtemp", remembered(postgres.tempfile.mkdtemp, made))
    with pytest.raises(RuntimeError, match="no_such_setting"):
        postgres.Server()
    assert len(made) == 1
    assert not Path(made[0]).exists()


def remembered(function, answers):
    def call(*args, **kwargs):
        answers.append(function(*args, **kwargs))
        return answers[-1]

    return call


def test_the_newest_server_is_found_outside_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "SYSTEM", tmp_path)
    with pytest.raises(postgres.Missing, match="no PostgreSQL server found"):
        postgres.binaries()
    for version, programs in (("9", postgres.NEEDED), ("15", postgres.NEEDED), ("16", ["pg_ctl"])):
        (tmp_path / version / "bin").mkdir(parents=True)
        for name in programs:
            (tmp_path / version / "bin" / name).touch()
    assert postgres.binaries() == tmp_path / "15" / "bin"


WITHOUT = """
from tests.ledger import postgres

def missing():
    raise postgres.Missing("none here")

postgres.binaries = missing
"""
ON_BOTH = "test_the_kinds_are_what_they_are_called"


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_without_postgresql_a_test_is_skipped_unless_all_must_run(required, outcome, tmp_path):
    for name in (
        "ledger/conftest.py",
        "ledger/kit.py",
        "ledger/postgres.py",
        "ledger/test_postgres_fixture.py",
        "conftest.py",
    ):
        copy = tmp_path / "tests" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((FOLDER.parent / name).read_text() + (WITHOUT if name == "ledger/conftest.py" else ""))
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\naddopts = --import-mode=importlib\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfEs", "-k", ON_BOTH, "tests"],
        cwd=tmp_path,
        env={**os.environ, "EXPUNGE_REQUIRE_ALL": required},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout
    assert outcome in done.stdout
    assert "none here" in done.stdout
