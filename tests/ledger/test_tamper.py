"""Whoever can write the database changes it: what is noticed, by what name, and what cannot be."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from expunge.core.errors import Corrupt
from expunge.ledger import check
from expunge.ledger.log import Entry, fault_of
from expunge.ledger.tables import entry, metadata
from expunge.ledger.tree import Tree
from tests.ledger import worked as w

COVERED = {
    "meta": {"value"},
    "request": {
        *("id", "seq", "key_mac", "body_mac", "model", "kind", "state", "regime", "received_at", "due_at", "extended"),
        *("paused_at", "paused_s", "exact", "run", "updated_at"),
    },
    "body": {"request", "data"},
    "entry": {"idx", "request", "kind", "at", "body", "leaf"},
    "outbox": {"request", "topic", "data", "at"},
    "model": {"name", "version", "digest"},
    "record": {"model", "commitment", "run"},
    "run": {"id", "model", "difference"},
    "certificate": {"request", "idx", "payload", "removed", "run", "envelope"},
    "checkpoint": {"size", "note"},
}
"""What `verify` sees changed, whatever it is changed to; but of an extension's message not `at` nor the reason."""

NOT_COVERED = {
    "meta.name": "another name makes a new ledger's origin, which the checkpoints then refuse at the next opening",
    "request.why": "a person's or a program's note, not in the log; but the reason of a denial is, and is covered",
    "outbox.id": "by it receivers drop repeats; drawn anew for each message, and not in the log",
    "outbox.sent_at": "whether a message was delivered is not in the log: who sets it keeps it from being sent",
    "model.folder": "only the weights' digest is in the log, by which whoever loads them must check them",
    "record.name": "no pseudonym is right or wrong without the record's id; one that is gone is noticed at its removal",
    "record.key": "whether it opens its commitment cannot be told without the row; noticed when the row is next read",
    "run.state": "who holds a run is not in the log; but `done` must agree with it, and is covered",
    "run.step": "how far an active run has come is its worker's note",
    "run.exact": "covered while the run is active; afterwards nothing depends on it",
    "run.worker": "who holds the lease",
    "run.fence": "how often the lease was taken",
    "run.lease_until": "when the lease runs out",
    "run.detail": "a worker's note to the next step",
}
"""What it does not see, and why that is borne."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> w.Worked:
    """A worked ledger that nobody changes."""
    return w.build(tmp_path_factory.mktemp("built"))


@pytest.fixture
def own(built: w.Worked, tmp_path: Path) -> w.Worked:
    """A copy to be changed."""
    return w.reopened(built, tmp_path / "own")


def test_every_column_of_every_table_is_judged() -> None:
    columns = {f"{table.name}.{column.name}" for table in metadata.tables.values() for column in table.columns}
    covered = {f"{table}.{column}" for table, names in COVERED.items() for column in names}
    assert covered | set(NOT_COVERED) == columns
    assert not covered & set(NOT_COVERED)


def flipped(value: Any, chance: random.Random) -> Any:
    """Another value of the same kind, one bit away if it can be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ 1 << chance.randrange(8)
    if isinstance(value, str) and value:
        place = chance.randrange(len(value))
        return value[:place] + chr(ord(value[place]) ^ 1) + value[place + 1 :]
    if isinstance(value, bytes) and value:
        place = chance.randrange(len(value))
        return value[:place] + bytes([value[place] ^ 1 << chance.randrange(8)]) + value[place + 1 :]
    return "x"


def cells(own: w.Worked) -> list[tuple[str, str, int, Any]]:
    """(table, column, row, value) of everything that is covered."""
    found = []
    extensions = {row for (row,) in own.sql("SELECT rowid FROM outbox WHERE topic = 'extended'")}
    for table, columns in COVERED.items():
        for column in sorted(columns):
            for row, value in own.sql(f"SELECT rowid, {column} FROM {table} ORDER BY rowid"):
                if isinstance(metadata.tables[table].c[column].type, sa.Boolean):
                    value = bool(value)
                if (table, column) != ("outbox", "at") or row not in extensions:
                    found.append((table, column, row, value))
    return found


UNIQUE = {column.name for table in metadata.tables.values() for column in table.columns if column.primary_key}
UNIQUE |= {"seq", "key_mac"}


def tells(said: list[str], table: str, names: list[str]) -> bool:
    """True if a message names the table and the row; of records, which are nobody's, the model or the run."""
    return any(table in one and any(name in one for name in names) for one in said)


def set_cell(own: w.Worked, table: str, column: str, row: int, value: Any) -> None:
    own.sql(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", value, row)


def row_of(own: w.Worked, table: str, row: int) -> dict[str, Any]:
    names = [column.name for column in metadata.tables[table].columns]
    (values,) = own.sql(f"SELECT {', '.join(names)} FROM {table} WHERE rowid = ?", row)
    return dict(zip(names, values, strict=True))


def names_of(table: str, row: dict[str, Any]) -> list[str]:
    """What a message may call the row by."""
    keys = {
        "entry": ("idx",),
        "record": ("model", "run"),
        "outbox": ("id", "request"),
        "run": ("id",),
        "meta": ("value",),
        "checkpoint": ("size",),
    }
    first = {"body": "request", "certificate": "request", "request": "id", "model": "name"}
    return [str(row[name]) for name in keys.get(table, (first.get(table, ""),)) if row[name] is not None]


def test_one_flip_in_any_covered_column_is_noticed_by_a_message_that_names_the_row(own: w.Worked) -> None:
    """At least one cell of every covered column, and 200 in all."""
    chance, there = random.Random(11), cells(own)
    by_column: dict[tuple[str, str], list[tuple[str, str, int, Any]]] = {}
    for one in there:
        by_column.setdefault(one[:2], []).append(one)
    assert {f"{table}.{column}" for table, column in by_column} == {
        f"{t}.{c}" for t, names in COVERED.items() for c in names
    }
    chosen = [chance.choice(by_column[column]) for column in sorted(by_column)]
    chosen += chance.sample(there, 200 - len(chosen))
    missed = []
    for table, column, row, value in chosen:
        taken = {one[0] for one in own.sql(f"SELECT {column} FROM {table}")} if column in UNIQUE else {value}
        other = next(other for other in (flipped(value, chance) for _ in range(999)) if other not in taken)
        before = row_of(own, table, row)
        set_cell(own, table, column, row, other)
        names = names_of(table, before) + names_of(table, {**before, column: other})
        said = faults_of(own)
        if not tells(said, table, names):
            missed.append((table, column, value, other, said))
        set_cell(
            own, table, column, other if table in ("entry", "checkpoint") and column in ("idx", "size") else row, value
        )  # those are the rowid
    assert not missed
    assert own.ledger.verify() == []


def faults_of(own: w.Worked) -> list[str]:
    """What is said at the opening, if it does not open, and by `verify`."""
    value = own.sql("SELECT value FROM meta")[0][0]
    own.ledger.log.origin = value
    said = own.ledger.verify()
    if value != "expunge/ledger":
        return [f"meta {value}: {one}" for one in said if one.startswith("checkpoint")]
    return said


def columns_of(table: str) -> str:
    return ", ".join(column.name for column in metadata.tables[table].columns)


def marks(count: int) -> str:
    return ", ".join("?" * count)


def all_rows(own: w.Worked) -> Iterator[tuple[str, int]]:
    for table in COVERED:
        for (row,) in own.sql(f"SELECT rowid FROM {table} ORDER BY rowid"):
            yield table, row


def test_every_row_taken_out_is_noticed_by_a_message_that_names_it(own: w.Worked) -> None:
    """But not a checkpoint: nothing counts them, and the last one is kept outside. Nor the origin, made anew."""
    missed = []
    for table, row in list(all_rows(own)):
        if table in ("checkpoint", "meta") or (table == "record" and row % 5):
            continue
        before = row_of(own, table, row)
        own.sql(f"DELETE FROM {table} WHERE rowid = ?", row)
        said = own.ledger.verify()
        if not tells(said, table, names_of(table, before)):
            missed.append((table, before, said))
        own.sql(
            f"INSERT INTO {table} (rowid, {columns_of(table)}) VALUES ({marks(len(before) + 1)})",
            row,
            *before.values(),
        )
    assert not missed
    assert own.ledger.verify() == []


FRESH: dict[str, dict[str, Any]] = {
    "request": {"id": "forged", "seq": 99, "key_mac": "f" * 64},
    "body": {"request": "forged"},
    "entry": {"idx": 99},
    "outbox": {"id": "forged", "request": "forged"},
    "model": {"name": "forged"},
    "record": {"name": "forged", "commitment": bytes(31) + b"\x01"},
    "run": {"id": "forged", "state": "done"},
    "certificate": {"request": "forged"},
    "checkpoint": {"size": 99},
}


@pytest.mark.parametrize("table", FRESH)
def test_a_row_put_in_is_noticed_by_a_message_that_names_its_table(own: w.Worked, table: str) -> None:
    row = {**row_of(own, table, own.sql(f"SELECT min(rowid) FROM {table}")[0][0]), **FRESH[table]}
    own.sql(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks(len(row))})", *row.values())
    assert any(one.startswith(table) for one in own.ledger.verify())


def test_a_record_said_to_have_been_removed_by_a_run_that_never_was_is_noticed(own: w.Worked) -> None:
    row = {**row_of(own, "record", 1), **FRESH["record"], "run": "forged"}
    own.sql(f"INSERT INTO record ({', '.join(row)}) VALUES ({marks(len(row))})", *row.values())
    assert own.ledger.verify() == ["record: some of model digits were removed by run forged, and it has no such run"]


@pytest.mark.parametrize("value", [None, 7007, "x", b"x", "{}"], ids=repr)
def test_values_of_another_kind_are_faults_and_not_errors(own: w.Worked, value: Any) -> None:
    for table, columns in COVERED.items():
        if table == "meta":
            continue
        for column in sorted(columns):
            if value is None and not metadata.tables[table].c[column].nullable:
                continue
            row = own.sql(f"SELECT {'min' if table == 'outbox' else 'max'}(rowid) FROM {table}")[0][0]
            (old,) = own.sql(f"SELECT {column} FROM {table} WHERE rowid = ?", row)[0]
            if isinstance(metadata.tables[table].c[column].type, sa.Boolean):
                continue  # whatever is not zero is true
            if old is None or (table, column) in (("entry", "idx"), ("checkpoint", "size")):
                continue
            set_cell(own, table, column, row, value)
            assert any(one.startswith(table) for one in own.ledger.verify()), (table, column)
            set_cell(own, table, column, row, old)
    assert own.ledger.verify() == []


@pytest.mark.parametrize(
    ("column", "state"), [("why", "denied"), ("exact", "running"), ("state", "completed"), ("state", "running")]
)
def test_what_is_covered_in_some_states_only_is_covered_there(own: w.Worked, column: str, state: str) -> None:
    if column == "why":
        own.sql("UPDATE request SET why = 'too_many_requests' WHERE state = ?", state)
    elif column == "exact":
        own.sql("UPDATE run SET exact = 0 WHERE state = 'active'")
    elif state == "completed":
        own.sql("UPDATE run SET state = 'failed' WHERE state = 'done'")
    else:
        own.sql("UPDATE run SET state = 'done' WHERE state = 'active'")
    assert any(f"{column} is" in one for one in own.ledger.verify())


def test_what_is_not_covered_is_indeed_not_noticed(own: w.Worked) -> None:
    """So that the table above stays true: what comes to be covered must move there."""
    for cell in NOT_COVERED:
        table, column = cell.split(".")
        if cell in ("meta.name", "request.why", "run.state", "run.exact"):
            continue
        (row, old) = own.sql(f"SELECT rowid, {column} FROM {table} ORDER BY rowid LIMIT 1")[0]
        set_cell(
            own, table, column, row, "x" if isinstance(old, str) or old is None else flipped(old, random.Random(1))
        )
        assert own.ledger.verify() == [], cell
        set_cell(own, table, column, row, old)


def test_any_column_changed_in_any_of_ten_thousand_entries_is_noticed_at_its_leaf(tmp_path: Path) -> None:
    own, chance = w.Worked(tmp_path), random.Random(3)
    events = [("received", f"id-{i}", {"kind": "remove", "body_mac": w.drawn(i).hex()}) for i in range(10_000)]
    with own.ledger.database.write() as connection:
        own.ledger.log.append(connection, events, "2026-03-02T09:00:00.000000Z")
    columns = sorted(COVERED["entry"])
    with own.ledger.database.read() as connection:
        rows = connection.execute(sa.select(entry).order_by(entry.c.idx)).mappings().all()
    assert len(rows) == 10_000
    for row in rows:
        column = columns[row["idx"] % len(columns)]
        bad = Row({**dict(row), column: flipped(row[column], chance)})
        assert fault_of(bad) == f"entry {bad.idx}: its columns do not give its leaf hash"


class Row:
    """A row of a table, of which a column was changed."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.__dict__.update(columns)
        self.idx: int


def rewrite(own: w.Worked) -> int:
    """Change one signed entry as a thief of the database would, leaf hash and all; returns its place."""
    idx, body = own.sql("SELECT idx, body FROM entry WHERE kind = 'denied'")[0]
    changed = {**json.loads(body), "reason": "too_many_requests"}
    request, at = own.sql("SELECT request, at FROM entry WHERE idx = ?", idx)[0]
    leaf = Entry(index=idx, kind="denied", request=request, at=at, body=changed).leaf()
    own.sql("UPDATE entry SET body = ?, leaf = ? WHERE idx = ?", check.canonical(changed).decode(), leaf, idx)
    own.sql("UPDATE request SET why = 'too_many_requests' WHERE id = ?", request)
    own.sql("UPDATE outbox SET data = ? WHERE request = ?", '{"reason":"too_many_requests"}', request)
    return int(idx)


def test_a_rewritten_history_is_refused_by_verification_at_the_opening_and_by_consistency(own: w.Worked) -> None:
    size = len(own.ledger.log)
    signed, honest = own.ledger.log.last_note(), own.ledger.log.tree().root()
    changed = rewrite(own)
    wanted = [
        f"{name}: the first {size} entries are not those that were signed"
        for name in (f"checkpoint {size}", "checkpoint outside")
    ]
    assert own.ledger.verify() == wanted
    leaves = [leaf for (leaf,) in own.sql("SELECT leaf FROM entry ORDER BY idx")]
    assert changed < size == len(leaves)
    forged = Tree([*leaves, check.leaf_hash(b"one more")])
    proof = {
        "format": check.CONSISTENCY_FORMAT,
        "old": signed,
        "new": own.keys.sign_checkpoint(check.Checkpoint("expunge/ledger", size + 1, forged.root())),
        "proof": [one.hex() for one in forged.consistency(size)],
    }
    outcome = check.check_consistency(check.canonical(proof), own.keys.trusted)
    assert (outcome.check, outcome.passed) == ("consistency", False)
    assert not check.proves_consistency(size, size + 1, honest, forged.root(), forged.consistency(size))
    own.ledger.close()
    with pytest.raises(Corrupt, match="history was rewritten"):
        own.open()


def test_without_the_file_outside_the_last_checkpoint_in_the_database_still_tells(own: w.Worked) -> None:
    rewrite(own)
    own.ledger.close()
    (own.folder / "anchor").unlink()
    assert any(one.startswith("checkpoint") for one in own.open(replace_anchor=True).verify())


def test_without_the_file_outside_a_ledger_that_has_signed_does_not_open(own: w.Worked, tmp_path: Path) -> None:
    """Else an old backup would open as soon as the file is lost, or its disk is not mounted."""
    own.ledger.close()
    (own.folder / "anchor").unlink()
    with pytest.raises(Corrupt, match="the last checkpoint is missing from"):
        own.open()
    size = len(own.open(replace_anchor=True).log)
    own.ledger.close()
    assert check.open_note((own.folder / "anchor").read_text(encoding="utf-8"), own.keys.trusted).size == size
    assert own.open().verify() == []


def test_an_old_backup_put_in_the_place_of_the_database_does_not_open(own: w.Worked, tmp_path: Path) -> None:
    own.ledger.close()
    shutil.copy(own.path, tmp_path / "backup.db")
    own.open()
    own.file("after the backup")
    own.ledger.log.checkpoint()
    own.ledger.close()
    shutil.copy(tmp_path / "backup.db", own.path)
    for beside in ("-wal", "-shm"):
        own.path.with_name(own.path.name + beside).unlink(missing_ok=True)
    with pytest.raises(Corrupt, match="rolled back"):
        own.open()


def test_a_log_whose_tail_was_cut_off_does_not_open(own: w.Worked) -> None:
    size = len(own.ledger.log)
    own.sql("DELETE FROM entry WHERE idx = ?", size - 1)
    missing = f"{size} entries were signed, and entry {size - 1} and all after it are missing"
    assert {f"checkpoint {size}: {missing}", f"checkpoint outside: {missing}"} <= set(own.ledger.verify())
    own.ledger.close()
    with pytest.raises(Corrupt, match="rolled back"):
        own.open()


def test_an_entry_missing_in_the_middle_does_not_open(own: w.Worked) -> None:
    own.sql("DELETE FROM entry WHERE idx = 3")
    assert own.ledger.verify()[0] == "entry 3: missing"
    own.ledger.close()
    with pytest.raises(Corrupt, match="entry 3 is missing"):
        own.open()


@pytest.mark.parametrize("place", range(0, 130, 13))
def test_a_changed_checkpoint_outside_is_noticed(own: w.Worked, place: int) -> None:
    path = own.folder / "anchor"
    note = path.read_bytes()
    path.write_bytes(note[:place] + bytes([note[place] ^ 1]) + note[place + 1 :])
    assert any(one.startswith("checkpoint outside: ") for one in own.ledger.verify())
    own.ledger.close()
    with pytest.raises(Corrupt, match="not one of this ledger"):
        own.open()


def test_entries_after_the_last_checkpoint_can_be_rewritten_unseen(own: w.Worked) -> None:
    """The limit of what is promised: whatever must not be changed must be signed for."""
    own.ledger.requests.deny(own.file("late"), "no_match")
    last = own.sql("SELECT max(idx) FROM entry WHERE kind = 'denied'")[0][0]
    own.sql("UPDATE entry SET kind = 'set aside' WHERE kind = 'denied' AND idx < ?", last)
    rewrite(own)
    own.sql("UPDATE entry SET kind = 'denied' WHERE kind = 'set aside'")
    assert own.ledger.verify() == []
    own.ledger.log.checkpoint()
    rewrite(own)
    assert own.ledger.verify() != []
