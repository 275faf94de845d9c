"""The store: what is written whole, what is checked when read, and that everything derived from a record is found."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core import store as module
from expunge.core.digest import sha256_hex
from expunge.core.errors import Corrupt, UnknownRecord
from expunge.core.store import Artefact, Store, write_atomically


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def files(root):
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())


def test_round_trip(store):
    put = store.put(b"some bytes", "checkpoint", records=["a", "b"])
    assert put == Artefact(sha256_hex(b"some bytes"), "checkpoint", 10, put.lineage)
    again = Store(store.root)
    assert again.get(put.digest) == b"some bytes"
    assert again.about(put.digest) == put
    assert list(again.artefacts()) == [put]
    assert again.records_of(put.digest) == {"a", "b"}
    assert files(store.root / "objects") == [f"{put.digest[:2]}/{put.digest}"]


def test_artefacts_of_the_same_records_share_their_lineage(store):
    first, second = (store.put(data, "x", records=ids) for data, ids in ((b"1", "ab"), (b"2", "ba")))
    assert first.lineage == second.lineage
    assert len(files(store.root / "lineage")) == 1
    store.delete(first.digest)
    assert store.records_of(second.digest) == {"a", "b"}
    store.delete(second.digest)
    assert files(store.root) == []


@pytest.mark.parametrize("byte", [0, 4, 9])
def test_a_flipped_byte_is_found_when_read(store, byte):
    digest = store.put(b"some bytes", "x", records=["a"]).digest
    path = store.root / "objects" / digest[:2] / digest
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(
        Corrupt, match=rf"^artefact {digest} in .* holds other bytes than were written; restore or delete"
    ):
        store.get(digest)
    store.put(b"some bytes", "x")
    assert store.get(digest) == b"some bytes"


@pytest.mark.parametrize("damage", [lambda p: p.write_text('["b"]'), lambda p: p.write_bytes(b"\xff"), Path.unlink])
def test_a_changed_lineage_is_found_when_read(store, damage):
    put = store.put(b"data", "x", records=["a"])
    damage(store.root / "lineage" / f"{put.lineage}.json")
    for look in (lambda: store.records_of(put.digest), lambda: store.derived_from(["a"])):
        with pytest.raises(Corrupt, match=r"^the lineage of artefact .* is lost or changed; restore the folder$"):
            look()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"parents": [], "colour": 1}'])
def test_a_description_that_cannot_be_read_is_corrupt(store, text):
    put = store.put(b"data", "x")
    (store.root / "about" / f"{put.digest}.json").write_text(text)
    with pytest.raises(Corrupt, match=r"^what .* knows of artefact .* cannot be read; restore the folder$"):
        store.about(put.digest)


def test_lineage_is_closed_over_parents(store):
    rows = store.put(b"rows", "batch", records=["a", "b"])
    model = store.put(b"model", "checkpoint", records=["c"], parents=[rows.digest])
    picture = store.put(b"picture", "plot", parents=[model.digest])
    other = store.put(b"other", "plot", records=["d"])
    assert store.records_of(picture.digest) == {"a", "b", "c"}
    assert {a.digest for a in store.derived_from(["a"])} == {rows.digest, model.digest, picture.digest}
    assert {a.digest for a in store.derived_from(["c"])} == {model.digest, picture.digest}
    assert store.derived_from(["d"]) == [other]
    assert store.derived_from(["z"]) == store.derived_from([]) == []
    store.delete(rows.digest, model.digest)
    assert store.records_of(picture.digest) == {"a", "b", "c"}  # a lost parent takes no lineage with it


def test_the_same_bytes_stored_twice_join_their_lineages(store):
    parent = store.put(b"parent", "x", records=["p"])
    first = store.put(b"same", "x", records=["a"])
    child = store.put(b"child", "x", parents=[first.digest])
    grandchild = store.put(b"grandchild", "x", parents=[child.digest])
    second = store.put(b"same", "x", records=["b"], parents=[parent.digest])
    assert first.digest == second.digest
    assert store.records_of(first.digest) == {"a", "b", "p"}
    assert store.about(first.digest).parents == (parent.digest,)
    for derived in (child, grandchild):  # made from bytes that derive from b too
        assert store.records_of(derived.digest) == {"a", "b", "p"}
        assert store.about(derived.digest).parents
    assert len(files(store.root / "lineage")) == 2
    assert store.put(b"same", "x") == second


def test_bytes_may_be_their_own_parent(store):
    first = store.put(b"same", "x", records=["a"])
    assert store.put(b"same", "x", records=["b"], parents=[first.digest]).parents == (first.digest,)
    assert store.records_of(first.digest) == {"a", "b"}


def test_delete_removes_all_or_nothing(store):
    first, second = store.put(b"1", "x", records=["a"]), store.put(b"2", "x", records=["b"])
    before = files(store.root)
    with pytest.raises(UnknownRecord, match=r"^no artefact 0{64} in .*; list them with"):
        store.delete(first.digest, "0" * 64)
    assert files(store.root) == before
    store.delete(first.digest)
    with pytest.raises(UnknownRecord, match=r"^no artefact"):
        store.get(first.digest)
    assert first.digest not in " ".join(files(store.root))
    assert first.lineage not in " ".join(files(store.root))
    assert store.get(second.digest) == b"2"


TRICKS = ["../../secret", "..", "", "/etc/passwd", "a" * 63, "A" * 64, "0" * 63 + "/", "0" * 63 + "\n", "é" * 64]


@pytest.mark.parametrize("name", TRICKS)
def test_path_tricks_are_refused(store, tmp_path, name):
    (tmp_path / "secret").write_bytes(b"keep me")
    (tmp_path / "secret.json").write_text("{}")
    tries = [store.get, store.about, store.records_of, store.delete]
    tries.append(lambda digest: store.put(b"x", "x", parents=[digest]))
    for act in tries:
        with pytest.raises(UnknownRecord, match=r"^an artefact is named by 64 hexadecimal digits, got "):
            act(name)
    assert (tmp_path / "secret").read_bytes() == b"keep me"


def test_an_unknown_parent_is_refused_and_nothing_written(store):
    with pytest.raises(UnknownRecord, match=r"^no artefact"):
        store.put(b"x", "x", parents=["0" * 64])
    assert files(store.root) == []


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, name, fail)
    with pytest.raises(OSError, match=r"disk full"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["deep/file"]


def test_writing_is_durable_before_it_is_visible(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(module.os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "file", b"data")
    assert done == ["fsync", "replace", "fsync"]  # the file, the name, the folder


@pytest.mark.parametrize("crash", range(1, 4))
def test_at_no_crash_do_bytes_lie_there_that_no_lineage_finds(store, monkeypatch, crash):
    writes = []

    def write(path, data):
        writes.append(path)
        if len(writes) == crash:
            raise KeyboardInterrupt
        write_atomically(path, data)

    monkeypatch.setattr(module, "write_atomically", write)
    with pytest.raises(KeyboardInterrupt):
        store.put(b"content of a row", "x", records=["a"])
    monkeypatch.undo()
    found = {artefact.digest for artefact in store.derived_from(["a"])}
    assert {path.name for path in (store.root / "objects").rglob("*") if path.is_file()} <= found
    store.delete(*found)
    assert store.put(b"content of a row", "x", records=["b"]).size_bytes == 16
    assert [a.kind for a in store.derived_from(["b"])] == ["x"]


names = st.sampled_from("abcd")
steps = st.lists(
    st.tuples(st.integers(0, 5), st.sets(names, max_size=3), st.lists(st.integers(0, 5), max_size=2), st.booleans()),
    max_size=12,
)


@given(steps)
@settings(max_examples=25, deadline=None, print_blob=True)
def test_any_history_against_a_model_of_sets(tmp_path_factory, history):
    """Bytes are numbered 0 to 5; the model holds for each its records and parents, and closes them after each step."""
    root = tmp_path_factory.mktemp("store")
    store, lineage, links = Store(root), {}, {}
    digests = [sha256_hex(str(number).encode()) for number in range(6)]
    for number, records, parents, delete in history:
        if delete and number in lineage:
            store.delete(digests[number])
            del lineage[number], links[number]
            for others in links.values():
                others.discard(number)
        elif not delete:
            known = [parent for parent in parents if parent in lineage]
            store.put(str(number).encode(), "x", records=records, parents=[digests[parent] for parent in known])
            lineage.setdefault(number, set()).update(records)
            links.setdefault(number, set()).update(known)
        for _ in lineage:  # as often as a path can be long
            for child, parents_ in links.items():
                lineage[child].update(*(lineage[parent] for parent in parents_))
    assert {a.digest: store.records_of(a.digest) for a in store.artefacts()} == {
        digests[number]: records for number, records in lineage.items()
    }
    for name in "abcd":
        found = {artefact.digest for artefact in store.derived_from([name])}
        assert found == {digests[number] for number, records in lineage.items() if name in records}
    assert {path.stem for path in (root / "lineage").iterdir()} == {a.lineage for a in store.artefacts()}
