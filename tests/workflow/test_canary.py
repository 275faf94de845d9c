"""A canary owner: after completion nothing of it is found by a naive search, and whatever is planted is."""

import base64
import io
import json
import re
import sqlite3
import zipfile

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from expunge import Records, Request, Sharding, datasets
from expunge.workflow import Leftovers, Workspace
from tests.workflow import kit

CANARY = "canary-of-the-mine"
KEPT = "somebody-else"


def named(records, theirs, copied=0):
    """These records with some of them the canary's, and one of its rows held by somebody else too."""
    owners = [CANARY if i in theirs else f"person-{i % 40:02d}" for i in range(len(records))]
    ids = [f"{'mine' if i in theirs else 'row'}-{i:05d}-x" for i in range(len(records))]
    first = records.select([copied])
    made = Records(records.x, records.y, ids, owners, classes=records.classes)
    return made.plus(Records(first.x, first.y, ["row-copied-x"], [KEPT], classes=records.classes))


@pytest.fixture(scope="module")
def pictures():
    """Pictures of the canary among others, all unlike each other but one pair."""
    return named(datasets.get("mnist").train.select(range(160)), {0, 17, 40, 41, 99})


@pytest.fixture(scope="module")
def table():
    """Rows of a census, with text for ids."""
    return named(datasets.get("adult").train.select(range(200)), {0, 5, 80, 120})


def serve(root, records, shards=None):
    """A workspace that serves a model trained on these records."""
    sharding = Sharding(shards=shards) if shards else None
    trained = kit.from_scratch(kit.recipe(sharding=sharding, epochs=1), records)
    workspace = Workspace.init(root, keys=kit.KEYS)
    workspace.register(kit.MODEL, trained, records)
    workspace.close()
    return kit.Place(root, records)


def mine(records):
    """What must not be found: all of the canary's but the row that somebody else holds too."""
    canary = records.of_owner(CANARY)
    found = kit.traces(canary) - kit.traces(records.of_owner(KEPT))
    assert len(found) > 8 * (len(canary) - 1)
    return found


@pytest.mark.parametrize("kind", ["pictures", "table"])
def test_after_completion_nothing_of_the_canary_is_found(request, tmp_path, kind):
    records = request.getfixturevalue(kind)
    here = serve(tmp_path / "ws", records, shards=3)
    asked = here.ask(Request.remove_owner(CANARY), key=f"letter of {CANARY}")
    assert kit.holding(here.root, mine(records)) != []  # what was asked names the owner
    assert here.run().completed == (asked,)
    assert kit.holding(here.root, mine(records)) == []
    assert here.said(asked)["removed"]["count"] == len(records.of_owner(CANARY))
    assert here.said(asked)["sweep"]["clean"] is True
    assert here.said(asked)["sweep"]["files"] > 5
    assert not any(one in here.ledger.certificates.bundle(asked) for one in mine(records))
    here.close()
    assert kit.holding(here.root, mine(records)) == []


@pytest.mark.parametrize("kind", ["pictures", "table"])
def test_a_workspace_never_holds_ids_or_owners_of_what_is_registered(request, tmp_path, kind):
    records = request.getfixturevalue(kind)
    here = serve(tmp_path / "ws", records, shards=3)
    asked = here.ask(Request.remove_class(1))
    here.run()
    here.honour(Request.remove(sorted(here.served().ids)[:3]))
    here.close()
    assert here.said(asked)["removed"]["count"] > 0
    names = {name.encode() for name in (*records.ids, *records.owners)}
    assert kit.holding(here.root, names | {digest.tobytes() for digest in records.digests()}) == []


def test_asking_again_for_what_is_gone_leaves_no_trace_either(tmp_path, copied, pictures):
    here = copied(tmp_path / "ws")
    here.honour(Request.remove_owner(CANARY))
    again = here.ask(Request.remove_owner(CANARY), key="again")
    assert here.run().completed == (again,)
    assert kit.holding(here.root, mine(pictures)) == []


def test_where_nothing_was_looked_for_no_sweep_is_called_clean(tmp_path, copied):
    here = copied(tmp_path / "ws")
    assert here.said(here.honour(Request.remove_owner(CANARY)))["sweep"]["clean"] is True
    again = here.said(here.honour(Request.remove_owner(CANARY)))["sweep"]
    assert again is None or again["files"] > 0 or not again["clean"]


@pytest.mark.parametrize("end", ["cancel", "deny"])
def test_a_request_that_ended_otherwise_leaves_no_name_behind(tmp_path, copied, end):
    here = copied(tmp_path / "ws")
    asked = here.ask(Request.remove(["ghost-of-the-mine"]))
    assert here.run().held == (asked,)
    requests = here.ledger.requests
    _ = requests.cancel(asked) if end == "cancel" else requests.deny(asked, "no_match")
    here.close()
    assert kit.holding(here.root, [b"ghost-of-the-mine"]) == []


def png(row):
    out = io.BytesIO()
    Image.fromarray(row.numpy()).save(out, "PNG")
    return out.getvalue()


def base_with(path, row):
    """A database whose write-ahead log alone holds the row."""
    base = sqlite3.connect(path)
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA wal_autocheckpoint=0")
    base.execute("CREATE TABLE cache (data BLOB)")
    base.commit()
    base.execute("INSERT INTO cache VALUES (?)", (row.numpy().tobytes(),))
    base.commit()
    return base


def packed(row):
    out = io.BytesIO()
    np.savez_compressed(out, rows=row.numpy()[None])
    return out.getvalue()


def checkpoint(path, row):
    save_file({"buffer": row.float() / 255}, path)


PLANTED = {
    "checkpoint": lambda p, row, name: checkpoint(p / "checkpoint-4.safetensors", row),
    "slice": lambda p, row, name: save_file({"x": row}, p / "slice-0.safetensors"),
    "batch log": lambda p, row, name: (p / "batches.json").write_text(json.dumps([["row-1", name]])),
    "transcript": lambda p, row, name: (p / "transcript.jsonl").write_text(json.dumps({"said": f"asked by {CANARY}"})),
    "scores": lambda p, row, name: (p / "scores.csv").write_text(f"id,score\n{name},0.5\n"),
    "judgement": lambda p, row, name: (p / "judgement.json").write_text(json.dumps({"record": name, "flagged": True})),
    "picture": lambda p, row, name: (p / "shown.png").write_bytes(png(row)),
    "report": lambda p, row, name: (p / "report.html").write_text(
        f'<img src="data:image/png;base64,{base64.b64encode(png(row)).decode()}">'
    ),
    "unfinished": lambda p, row, name: (p / "upload.part").write_bytes(row.numpy().tobytes()),
    "packed": lambda p, row, name: (p / "cache.npz").write_bytes(packed(row)),
    "id alone": lambda p, row, name: (p / "notes.txt").write_text(f"look at {name} again"),
    "name of a file": lambda p, row, name: (p / f"{name}.txt").write_text("empty"),
}


@pytest.mark.parametrize("what", PLANTED, ids=[what.replace(" ", "-") for what in PLANTED])
def test_a_leftover_that_is_planted_holds_up_the_certificate_until_it_is_deleted(tmp_path, copied, pictures, what):
    here = copied(tmp_path / "ws")
    canary = pictures.of_owner(CANARY)
    home = here.root / "reports"
    home.mkdir()
    PLANTED[what](home, canary.x[1], canary.ids[1])
    asked = here.ask(Request.remove_owner(CANARY))
    with pytest.raises(Leftovers) as caught:
        here.run()
    assert "reports/" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(name in str(caught.value) for name in (*canary.ids, CANARY))
    assert here.state(asked) == "verifying"
    assert "completed" not in here.kinds()
    assert here.ledger.requests.outbox() == []
    for path in home.iterdir():
        path.unlink()
    assert here.run().completed == (asked,)
    assert kit.holding(here.root, mine(pictures)) == []
    assert here.checked(asked).passed


def test_a_leftover_in_another_databases_write_ahead_log_is_found(tmp_path, copied, pictures):
    here, canary = copied(tmp_path / "ws"), pictures.of_owner(CANARY)
    base = base_with(here.root / "cache.db", canary.x[1])
    asked = here.ask(Request.remove_owner(CANARY))
    with pytest.raises(Leftovers, match=r"cache\.db"):
        here.run()
    base.close()
    for path in here.root.glob("cache.db*"):
        path.unlink()
    assert here.run().completed == (asked,)


def test_a_request_body_that_was_left_in_the_ledger_is_found(tmp_path, copied, pictures):
    here, canary = copied(tmp_path / "ws"), pictures.of_owner(CANARY)
    body = json.dumps(Request.remove_rows(CANARY, canary.x[1:2], canary.y[1:2]).to_json()).encode()
    with sqlite3.connect(here.root / "ledger.db") as base:
        base.execute("INSERT INTO body (request, data) VALUES ('00000000-0000-4000-8000-000000000000', ?)", (body,))
    base.close()
    asked = here.ask(Request.remove_owner(CANARY))
    with pytest.raises(Leftovers, match=r"ledger\.db"):
        here.run()
    with sqlite3.connect(here.root / "ledger.db") as base:
        base.execute("PRAGMA secure_delete=ON")
        base.execute("DELETE FROM body")
    base.close()
    assert here.run().completed == (asked,)
    assert kit.holding(here.root, mine(pictures)) == []


def test_files_that_were_never_finished_are_our_own_to_delete(tmp_path, copied, pictures):
    here, canary = copied(tmp_path / "ws"), pictures.of_owner(CANARY)
    torn = here.root / "store" / "objects" / ".ab.0123abcd.part"
    torn.write_bytes(canary.x[1].numpy().tobytes())
    here.honour(Request.remove_owner(CANARY))
    assert not torn.exists()


def test_artefacts_that_derive_from_the_canary_are_deleted_and_the_others_stay(tmp_path, copied, pictures):
    here, canary = copied(tmp_path / "ws"), pictures.of_owner(CANARY)
    store, name = here.workspace.store, here.workspace.keys.pseudonym
    theirs = store.put(canary.x.numpy().tobytes(), "scores", records=map(name, canary.ids))
    derived = store.put(b"a report", "report", parents=[theirs.digest])
    kept = store.put(b"scores of others", "scores", records=[name(pictures.of_owner(KEPT).ids[0])])
    asked = here.honour(Request.remove_owner(CANARY))
    assert [one.digest for one in store.artefacts()] == [kept.digest]
    assert {"what": "artefacts", "name": "2 that derived from removed records"} in here.said(asked)["retired"]
    assert store.get(kept.digest) == b"scores of others"
    assert theirs.digest != derived.digest


def test_the_same_row_of_another_owner_stays_and_is_no_leftover(tmp_path, copied, pictures):
    here = copied(tmp_path / "ws")
    other = pictures.of_owner(KEPT)
    (here.root / "shown.bin").write_bytes(other.x.numpy().tobytes())
    asked = here.honour(Request.remove_owner(CANARY))
    assert set(other.ids) <= here.served().ids
    assert here.said(asked)["removed"]["count"] == len(pictures.of_owner(CANARY))
    assert (here.root / "shown.bin").read_bytes() == other.x.numpy().tobytes()


def test_what_cannot_be_searched_holds_up_the_certificate_too(tmp_path, copied):
    here = copied(tmp_path / "ws")
    (here.root / "elsewhere").symlink_to(tmp_path)
    asked = here.ask(Request.remove_owner(CANARY))
    with pytest.raises(Leftovers, match=r"elsewhere could not be searched \(a symbolic link\)"):
        here.run()
    (here.root / "elsewhere").unlink()
    assert here.run().completed == (asked,)


def test_the_naive_search_finds_what_is_planted(tmp_path, pictures):
    canary = pictures.of_owner(CANARY)
    forms = {
        "raw": canary.x[1].numpy().tobytes(),
        "float": (canary.x[1].float() / 255).numpy().tobytes(),
        "owner": f"by {CANARY}.".encode(),
        "digest": canary.digests()[1].tobytes().hex().encode(),
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(b"x" + data)
    (tmp_path / canary.ids[1]).mkdir()
    found = {path for path, _ in kit.holding(tmp_path, mine(pictures))}
    assert found == {*forms, canary.ids[1]}


def test_with_zip_files_the_whole_archive_is_read(tmp_path, copied, pictures):
    here, canary = copied(tmp_path / "ws"), pictures.of_owner(CANARY)
    with zipfile.ZipFile(here.root / "old.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.json", json.dumps({"rows": canary.x[1].flatten().tolist()}))
    asked = here.ask(Request.remove_owner(CANARY))
    with pytest.raises(Leftovers, match=re.escape("old.zip")):
        here.run()
    (here.root / "old.zip").unlink()
    assert here.run().completed == (asked,)


@pytest.fixture(scope="module")
def original(tmp_path_factory, pictures):
    """A workspace with the canary in it, to copy."""
    here = serve(tmp_path_factory.mktemp("canary") / "ws", pictures)
    here.close()
    return here.root


@pytest.fixture
def copied(original, pictures):
    """``copied(folder)`` is a workspace of the test's own that serves pictures."""
    opened = []

    def of(root, **settings):
        opened.append(kit.Place(kit.copied(original, root, **settings), pictures))
        return opened[-1]

    yield of
    for one in opened:
        one.close()
