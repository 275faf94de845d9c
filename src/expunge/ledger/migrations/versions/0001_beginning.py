"""The tables as they were at first.

Written out, not taken from `tables`, which says what they are today: an old step must stay what it was.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    text, small, stamp, blob = sa.Text(), sa.String(40), sa.String(27), sa.LargeBinary()
    identity, digest, name = sa.String(36), sa.String(64), sa.String(80)
    op.create_table("meta", sa.Column("name", small, primary_key=True), sa.Column("value", text, nullable=False))
    op.create_table(
        "request",
        sa.Column("id", identity, primary_key=True),
        sa.Column("seq", sa.Integer, nullable=False, unique=True),
        sa.Column("key_mac", digest, nullable=False, unique=True),
        sa.Column("body_mac", digest, nullable=False),
        sa.Column("model", name, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("regime", sa.String(16), nullable=False),
        sa.Column("received_at", stamp, nullable=False),
        sa.Column("due_at", stamp, nullable=False),
        sa.Column("extended", sa.Boolean, nullable=False),
        sa.Column("paused_at", stamp),
        sa.Column("paused_s", sa.Integer, nullable=False),
        sa.Column("exact", sa.Boolean, nullable=False),
        sa.Column("run", identity),
        sa.Column("why", text),
        sa.Column("updated_at", stamp, nullable=False),
    )
    op.create_index("request_by_state", "request", ["model", "state", "seq"])
    op.create_table("body", sa.Column("request", identity, primary_key=True), sa.Column("data", blob, nullable=False))
    op.create_table(
        "entry",
        sa.Column("idx", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("request", identity, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("at", stamp, nullable=False),
        sa.Column("body", text, nullable=False),
        sa.Column("leaf", blob, nullable=False),
    )
    op.create_index("entry_by_request", "entry", ["request"])
    _one_at_most("one_completion", "entry", "request", "kind = 'completed'")
    op.create_table(
        "outbox",
        sa.Column("id", identity, primary_key=True),
        sa.Column("request", identity, nullable=False),
        sa.Column("topic", sa.String(20), nullable=False),
        sa.Column("data", text, nullable=False),
        sa.Column("at", stamp, nullable=False),
        sa.Column("sent_at", stamp),
        sa.UniqueConstraint("request", "topic"),
    )
    op.create_table(
        "model",
        sa.Column("name", name, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", digest, nullable=False),
        sa.Column("folder", text, nullable=False),
    )
    op.create_table(
        "record",
        sa.Column("model", name, primary_key=True),
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("commitment", blob, nullable=False),
        sa.Column("key", blob),
        sa.Column("run", identity),
    )
    op.create_index("record_by_run", "record", ["run"])
    op.create_table(
        "run",
        sa.Column("id", identity, primary_key=True),
        sa.Column("model", name, nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("step", sa.String(20), nullable=False),
        sa.Column("exact", sa.Boolean, nullable=False),
        sa.Column("worker", name, nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("lease_until", sa.Float, nullable=False),
        sa.Column("detail", text, nullable=False),
        sa.Column("difference", blob),
    )
    _one_at_most("one_active_run", "run", "model", "state = 'active'")
    op.create_table(
        "certificate",
        sa.Column("request", identity, primary_key=True),
        sa.Column("idx", sa.Integer, nullable=False),
        sa.Column("payload", blob, nullable=False),
        sa.Column("removed", blob, nullable=False),
        sa.Column("run", identity, nullable=False),
        sa.Column("envelope", blob),
    )
    op.create_table(
        "checkpoint",
        sa.Column("size", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("note", text, nullable=False),
    )


def _one_at_most(name: str, table: str, column: str, where: str) -> None:
    op.create_index(name, table, [column], unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
