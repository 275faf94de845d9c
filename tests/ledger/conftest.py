"""Databases for the ledger: a file of SQLite, and a PostgreSQL server that lives as long as the test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from expunge.ledger.ledger import Ledger
from tests.ledger import kit, postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    """The one server of this test process, started by the first test that asks for it."""
    try:
        server = postgres.Server()
    except postgres.Missing as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: postgres.Server) -> Iterator[str]:
    """An empty PostgreSQL database of the test's own, as SQLAlchemy's URL; dropped after the test."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of the test's own, as SQLAlchemy's URL: the test runs once with each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def time() -> kit.Time:
    """A clock that stands still until it is told."""
    return kit.Time()


@pytest.fixture(scope="module")
def shared_postgres_url(postgres_server: postgres.Server) -> Iterator[str]:
    """Emptied before each test: making a database takes a second where disks are slow."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    return kit.emptied(request.getfixturevalue("shared_postgres_url"))


@pytest.fixture
def ledger(url: str, time: kit.Time) -> Iterator[Ledger]:
    """A ledger with a registered model, on each kind of database."""
    with_rows = kit.opened(url, now=time)
    kit.register(with_rows)
    yield with_rows
    with_rows.close()
