"""Runs the migrations. Apart from `database`, because Alembic takes a third of a second to import."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from expunge.core.errors import Unsupported

HEAD = "0001"
_HERE = Path(__file__).parent / "migrations"


def version_of(connection: Connection) -> str | None:
    """Which migration the tables stand at; None for an empty database."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return version


def run(connection: Connection, target: str = HEAD) -> None:
    """Bring the tables up to `target` within the connection's transaction.

    Raises:
        Unsupported: if they were written by a newer release.
    """
    found = version_of(connection)
    if found == target:
        return
    if found is not None and found > target:
        raise Unsupported(f"this ledger is of form {found} and this release knows {target}; upgrade expunge")
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_HERE))
    config.attributes["connection"] = connection
    command.upgrade(config, target)
