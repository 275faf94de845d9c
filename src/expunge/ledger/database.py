"""One way to read and write, on SQLite and on PostgreSQL: whole transactions, one appender at a time, durable."""

from __future__ import annotations

import os
import re
import select
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, make_url

from expunge.core.errors import Misuse, Unsupported, Unwritable
from expunge.ledger.failpoints import failpoint

Now = Callable[[], float]
_APPENDERS = 0x45787075  # any number will do, as long as all workers take the same


def stamp(moment: datetime) -> str:
    """RFC 3339, in UTC, with microseconds: sorts as text."""
    if moment.tzinfo is None:
        raise Misuse(f"times need a zone, got {moment.isoformat()}; use datetime.now(timezone.utc)")
    return moment.astimezone(UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def moment(text: str) -> datetime:
    """What `stamp` wrote."""
    return datetime.fromisoformat(text)


class Database:
    """A SQLite file or a PostgreSQL database, with one writer at a time on either.

    SQLite keeps a write-ahead log, syncs at every commit, and overwrites what is deleted; it belongs on a local disk
    of one machine. Leases on PostgreSQL go by the server's clock, so that workers' clocks need not agree.
    """

    def __init__(self, url: str, *, now: Now | None = None) -> None:
        """Connect to ``sqlite:///path`` or ``postgresql://...`` (by psycopg 3).

        Args:
            url: which; a password may stand in it and is never shown.
            now: seconds since 1970; None takes the system's clock, on PostgreSQL the server's.
        """
        self.url = make_url(url)
        self._now = now
        if self.url.get_backend_name() == "sqlite":
            self.engine = _sqlite(self.url)
        elif self.url.get_backend_name() == "postgresql":
            self.engine = _postgresql(self.url)
        else:
            raise Unsupported(f"ledgers live in SQLite or PostgreSQL, got {self.url.get_backend_name()}; use one")
        driver: Any = sqlite3 if self.on_sqlite else self.engine.dialect.dbapi
        self._driver_error: type[Exception] = driver.Error

    @property
    def on_sqlite(self) -> bool:
        """True on SQLite."""
        return self.url.get_backend_name() == "sqlite"

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Within: one consistent view, however many queries and whoever writes meanwhile."""
        with self._explained(), self._connected() as connection:
            yield connection.execution_options(readonly=True)
            connection.commit()  # after a ROLLBACK psycopg throws away all statements that it had prepared

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Within: one transaction, committed at the end, or undone whole at an error. Writers take turns.

        Raises:
            Unwritable: if the disk is full or read-only, or the database cannot be reached. Nothing was changed, or,
                if the connection was lost at the very commit, nobody knows, and the message says so.
        """
        with self._explained(), self._connected() as connection:
            connection.execution_options(begun_by_lock=True).begin()
            failpoint("before update")
            self.lock_appends(connection)  # first of all: two who took it after other locks could wait for each other
            yield connection
            failpoint("before commit")
            with self._explained("it is not known whether the last change was kept"):
                connection.commit()
        failpoint("after commit")

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """Within: a connection.

        An interruption amid a query may leave psycopg's busy, so that nothing can be undone on it. It is cancelled,
        and the connection thrown away: the server undoes what was not committed.
        """
        with self.engine.connect() as connection:
            try:
                yield connection
            except Exception:
                raise
            except BaseException:
                if not self.on_sqlite:
                    with suppress(sa.exc.SQLAlchemyError, self._driver_error):  # it may be lost already
                        raw: Any = connection.connection.dbapi_connection
                        raw.cancel()
                    connection.invalidate()
                raise

    def lock_appends(self, connection: Connection) -> None:
        """Until the transaction ends, no other writes; held already within `write`.

        On SQLite ``BEGIN IMMEDIATE`` took the only write lock.
        """
        if not self.on_sqlite and not connection.get_execution_options().get("alone"):
            raw: Any = connection.connection.dbapi_connection
            begin = "" if raw.pgconn.transaction_status else f"{_BEGIN}; "
            asked = raw.execute(begin + _LOCK_AND_CLOCK, prepare=False)
            while asked.nextset():
                pass
            connection.execution_options(alone=True, clock=[float(asked.fetchone()[0])])

    def insert(self, connection: Connection, statement: str, rows: Sequence[Mapping[str, Any]]) -> int:
        """Insert rows by a statement with ``:name`` parameters; how many.

        As text for the driver: SQLAlchemy's own inserts take three times as long, and filing must be quick.
        """
        text = _for_driver(statement, self.on_sqlite)
        given: Any = rows[0] if len(rows) == 1 else list(rows)
        return connection.exec_driver_sql(text, given).rowcount

    def now(self, connection: Connection) -> float:
        """Seconds since 1970, by the clock that all workers share."""
        if self._now is not None:
            return self._now()
        if self.on_sqlite:
            return time.time()
        asked: list[float] = connection.get_execution_options().get("clock", [])
        if asked:
            return asked.pop()  # came with the lock; who wants to know it again asks the server
        return float(connection.exec_driver_sql(_CLOCK).scalar_one())

    def utc(self, connection: Connection) -> str:
        """The same as a time stamp."""
        return stamp(datetime.fromtimestamp(self.now(connection), UTC))

    def upgrade(self) -> None:
        """Bring the tables to this release's form, in one transaction. Cost: one query if there is nothing to do.

        Raises:
            Unsupported: if a newer release wrote them.
        """
        from expunge.ledger import upgrades

        done = False
        try:
            with self._explained(), self.engine.begin() as connection:
                self.lock_appends(connection)
                upgrades.run(connection)
            done = True
        finally:
            if not done:  # nobody is given what could not be opened, and so nobody would close it
                self.close()

    def forget_pages(self) -> None:
        """Take deleted content out of what the database itself keeps: SQLite's write-ahead log, PostgreSQL's tables.

        PostgreSQL's own write-ahead log and backups are outside, and certificates say so. There the tables are
        rewritten: nobody can read them meanwhile, and rows that a transaction begun before may still see are kept.

        Raises:
            Unwritable: if on SQLite another process reads the ledger for longer than the timeout.
        """
        with self._explained(), self.engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            if self.on_sqlite:
                busy = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                if busy:
                    raise Unwritable("another process reads the ledger, so its write-ahead log stays; run it again")
            else:
                raw.execute("VACUUM FULL body, record, request, run, outbox")

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()

    @contextmanager
    def _explained(self, changed: str = "nothing was changed") -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        except (sa.exc.DBAPIError, sa.exc.TimeoutError, self._driver_error) as error:
            reason = " ".join(str(getattr(error, "orig", error)).split())
            raise Unwritable(
                f"the ledger at {self} could not be read or written ({reason}); {changed}: mend it and run again"
            ) from error


def _make_private(path: Path) -> None:
    """Make the file for its owner alone; SQLite gives the files beside it the same mode."""
    if not path.exists():
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:  # another process was quicker
            return
        except OSError as error:
            raise Unwritable(
                f"the folder {path.parent} does not take the ledger {path.name} ({error}); mend it"
            ) from None


_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"  # each statement sees all that was committed before it
_CLOCK = "SELECT extract(epoch FROM clock_timestamp())"
_LOCK_AND_CLOCK = f"SELECT pg_advisory_xact_lock({_APPENDERS}); {_CLOCK}"  # one journey to the server, not two


def inserting(table: sa.Table) -> str:
    """The statement that inserts whole rows of a table."""
    names = [column.name for column in table.columns]
    return f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join(':' + name for name in names)})"


@cache
def _for_driver(statement: str, on_sqlite: bool) -> str:
    """The statement with its parameters as the driver marks them: ``:name``, and ``%(name)s`` with psycopg."""
    return statement if on_sqlite else re.sub(r":(\w+)", r"%(\1)s", statement)


_PRAGMAS = ("synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY")


def _log_ahead(raw: Any, patience_s: float) -> None:
    """Have the file keep a write-ahead log: its mode for good, once somebody has said so.

    SQLite does not wait for a lock here, whatever its timeout: of several processes that open a new file at once all
    but one would be told that it is locked.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            raw.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _sqlite(url: sa.URL) -> Engine:
    if not url.database or ":memory:" in url.database or url.query.get("mode") == "memory":
        raise Misuse("a ledger in memory would be lost at once; give a file: sqlite:///path/ledger.db")
    if not url.database.startswith("file:"):
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unwritable(f"the folder {folder} of the ledger could not be made ({error}); mend it") from None
        _make_private(Path(url.database))
    asked = url.query.get("timeout", 30)
    patience_s = float(asked if isinstance(asked, str | int) else asked[0])
    engine = sa.create_engine(url, connect_args={"timeout": patience_s}, hide_parameters=True)

    @sa.event.listens_for(engine, "connect")
    def _prepare(raw: Any, _: object) -> None:
        raw.isolation_level = None  # the driver's own BEGIN comes too late and lets two writers deadlock
        _log_ahead(raw, patience_s)
        for pragma in _PRAGMAS:
            raw.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        readonly = connection.get_execution_options().get("readonly")
        raw: Any = connection.connection.dbapi_connection
        raw.execute("BEGIN" if readonly else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: sa.URL) -> Engine:
    try:
        import psycopg
    except ImportError:
        raise Unsupported(
            "PostgreSQL needs psycopg 3; install it: pip install 'expunge[postgres]', or use SQLite"
        ) from None
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"), connect_args={"autocommit": True}, hide_parameters=True
    )

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        """The driver's own BEGIN goes alone; writers send theirs with the lock."""
        options = connection.get_execution_options()
        if options.get("readonly"):
            connection.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ")
        elif not options.get("begun_by_lock"):
            connection.exec_driver_sql(_BEGIN)

    @sa.event.listens_for(engine, "checkout")
    def _prepare(raw: Any, *_: object) -> None:
        """As the pool's own ping does, but asks the server only if it said something unasked, such as goodbye."""
        if not raw.autocommit:  # SQLAlchemy takes it away when it resets a connection
            raw.autocommit = True
        heard = select.poll()
        heard.register(raw.fileno(), select.POLLIN)
        if heard.poll(0):
            try:
                engine.dialect.do_ping(raw)
            except psycopg.Error as error:
                raise sa.exc.DisconnectionError("the server ended the connection") from error

    return engine
