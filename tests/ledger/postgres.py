"""A PostgreSQL server to throw away: its own folder, its own socket, gone with the process that started it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

SYSTEM = Path("/usr/lib/postgresql")
NEEDED = ("initdb", "pg_ctl", "postgres")

# The shell outlives a killed test run: the pipe that it reads ends, and it stops the server and removes the folder.
# Nor may its answer to a run that was killed meanwhile end it: hence the trap.
# `pg_ctl` gives the server a log for its output, so nobody but the shell holds the pipes.
_KEEPER = """
trap '' PIPE
"$1/initdb" --pgdata data --username postgres --auth trust --encoding UTF8 --locale C --no-sync >log 2>&1 &&
"$1/pg_ctl" start --pgdata data --log log --wait --timeout 120 --options "$2" >>log 2>&1 && echo ready || cat log
read -r _
"$1/pg_ctl" stop --pgdata data --mode immediate --wait --timeout 120 >>log 2>&1
rm -rf "$PWD"
"""

# No TCP. The time zone is nobody's: a time that is only right where the server keeps UTC is seen to be wrong.
_OPTIONS = "-c listen_addresses= -c timezone=Asia/Kathmandu -c shared_buffers=16MB -k {folder}"


class Missing(Exception):
    """There is no PostgreSQL server on this machine, or none that may be started."""


def binaries() -> Path:
    """The folder of PostgreSQL's programs: the one in PATH, that of `pg_config`, or the newest of Debian's."""
    for folder in _candidates():
        if all((folder / name).is_file() for name in NEEDED):
            return folder
    raise Missing(f"no PostgreSQL server found: {', '.join(NEEDED)} are neither in PATH nor in {SYSTEM}/*/bin")


def _candidates() -> Iterator[Path]:
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent
    if found := shutil.which("pg_config"):
        yield Path(subprocess.run([found, "--bindir"], capture_output=True, text=True, check=True).stdout.strip())
    versions = [folder for folder in SYSTEM.glob("*/bin") if folder.parent.name.isdigit()]
    yield from sorted(versions, key=lambda folder: int(folder.parent.name), reverse=True)


def _user() -> pwd.struct_passwd | None:
    """Whom to run the server as, as PostgreSQL refuses root; None is oneself."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        raise Missing("PostgreSQL does not run as root, and there is no user postgres to run it as") from None


class Server:
    """A running server, with fsync on as a real one has it, that trusts whoever reaches its socket.

    It stops at once, without writing its memory down, when the block ends or this process dies, however it dies.
    Raises `Missing` if there is no PostgreSQL, and `RuntimeError` with the log if it does not start.
    """

    def __init__(self) -> None:
        programs, user = binaries(), _user()
        # Not where TMPDIR says: a socket's path has 107 bytes at most, and `postgres` must be let into the folder.
        self.folder = Path(tempfile.mkdtemp(prefix="expunge-pg-", dir="/tmp"))
        other: dict[str, Any] = {}
        if user:
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            other = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._names = (f"test_{number}" for number in count(1))
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "keeper", programs, _OPTIONS.format(folder=self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"},
            start_new_session=True,  # Ctrl-C is for the tests, which then end the block
            **other,
        )
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        if (said := self._keeper.stdout.readline()) != "ready\n":
            self._keeper.stdin.close()
            with self._keeper:
                raise RuntimeError(f"PostgreSQL did not start:\n{said}{self._keeper.stdout.read()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keeper.communicate(timeout=150)

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL, for SQLAlchemy, of an empty database, dropped afterwards whoever is still connected to it."""
        name = next(self._names)
        self._say(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield f"postgresql+psycopg://postgres@/{name}?host={self.folder}"
        finally:
            self._say(f"DROP DATABASE {name} WITH (FORCE)")

    def _say(self, statement: str) -> None:
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(statement)

    @property
    def conninfo(self) -> str:
        """How psycopg reaches the database that is always there."""
        return f"postgresql://postgres@/postgres?host={self.folder}"


def plain(url: str) -> str:
    """SQLAlchemy's URL as psycopg reads it."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)
