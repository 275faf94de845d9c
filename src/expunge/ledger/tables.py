"""The tables. No personal data but in `body`, which is erased when its request is done."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

meta = sa.Table(
    "meta", metadata, sa.Column("name", sa.String(40), primary_key=True), sa.Column("value", sa.Text, nullable=False)
)

request = sa.Table(
    "request",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("seq", sa.Integer, nullable=False, unique=True),
    sa.Column("key_mac", sa.String(64), nullable=False, unique=True),
    sa.Column("body_mac", sa.String(64), nullable=False),
    sa.Column("model", sa.String(80), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("regime", sa.String(16), nullable=False),
    sa.Column("received_at", sa.String(27), nullable=False),
    sa.Column("due_at", sa.String(27), nullable=False),
    sa.Column("extended", sa.Boolean, nullable=False, default=False),
    sa.Column("paused_at", sa.String(27)),
    sa.Column("paused_s", sa.Integer, nullable=False, default=0),
    sa.Column("exact", sa.Boolean, nullable=False, default=False),
    sa.Column("run", sa.String(36)),
    sa.Column("why", sa.Text),
    sa.Column("updated_at", sa.String(27), nullable=False),
    sa.Index("request_by_state", "model", "state", "seq"),
)

body = sa.Table(
    "body",
    metadata,
    sa.Column("request", sa.String(36), primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

entry = sa.Table(
    "entry",
    metadata,
    sa.Column("idx", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("request", sa.String(36), nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("at", sa.String(27), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("leaf", sa.LargeBinary, nullable=False),
    sa.Index("entry_by_request", "request"),
    sa.Index(
        "one_completion",
        "request",
        unique=True,
        sqlite_where=sa.text("kind = 'completed'"),
        postgresql_where=sa.text("kind = 'completed'"),
    ),
)

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("request", sa.String(36), nullable=False),
    sa.Column("topic", sa.String(20), nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("at", sa.String(27), nullable=False),
    sa.Column("sent_at", sa.String(27)),
    sa.UniqueConstraint("request", "topic"),
)

model = sa.Table(
    "model",
    metadata,
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
)

record = sa.Table(
    "record",
    metadata,
    sa.Column("model", sa.String(80), primary_key=True),
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("commitment", sa.LargeBinary, nullable=False),
    sa.Column("key", sa.LargeBinary),
    sa.Column("run", sa.String(36)),
    sa.Index("record_by_run", "run"),
)

run = sa.Table(
    "run",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("model", sa.String(80), nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("step", sa.String(20), nullable=False),
    sa.Column("exact", sa.Boolean, nullable=False),
    sa.Column("worker", sa.String(80), nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("lease_until", sa.Float, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("difference", sa.LargeBinary),
    sa.Index(
        "one_active_run",
        "model",
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    ),
)

certificate = sa.Table(
    "certificate",
    metadata,
    sa.Column("request", sa.String(36), primary_key=True),
    sa.Column("idx", sa.Integer, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("removed", sa.LargeBinary, nullable=False),
    sa.Column("run", sa.String(36), nullable=False),
    sa.Column("envelope", sa.LargeBinary),
)

checkpoint = sa.Table(
    "checkpoint",
    metadata,
    sa.Column("size", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("note", sa.Text, nullable=False),
)
