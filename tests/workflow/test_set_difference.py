"""What training read against what it should have read: liars are found, and nothing of theirs is released."""

import hashlib
import hmac
import json
import sqlite3
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from expunge import Request, Retrain, Sisa
from expunge.core.claim import Claim
from expunge.core.errors import Corrupt
from expunge.core.events import Retrained
from expunge.core.records import Records
from expunge.learn.training import train
from expunge.ledger.recordset import RecordSet
from expunge.unlearn.method import Done, Method
from expunge.workflow.witness import Witness
from tests.workflow import kit

ANN, BOB = kit.owners_of(kit.digits())[:2]


@dataclass(frozen=True, kw_only=True)
class Liar(Method):
    """Trains on other rows than those that stay, and claims to be exact."""

    claim = Claim.EXACT
    read: Any = field(compare=False)
    exactness = "pathwise"

    def _apply(self, task, *, rng):
        trained = train(task.trained.recipe, self.read(task), tally=task.tally)
        return Done(trained=trained, events=(Retrained(part=-1, rows=len(task.retain)),))


def swapped(records, place, other, at, *, owner=None):
    """These records, with the content of another's row in the place of one."""
    x, y = records.x.clone(), records.y.clone()
    x[place], y[place] = other.x[at], other.y[at]
    owners = list(records.owners)
    owners[place] = owner or owners[place]
    return Records(x, y, records.ids, owners, classes=records.classes)


def stranger(records):
    return Records(torch.ones(1, 8, 8), torch.tensor([1]), ["who-is-this"], ["nobody"], classes=records.classes)


def under_another_id(task):
    """A retained row, a second time, under the id of a removed one."""
    row = task.retain.select([0])
    return task.retain.plus(Records(row.x, row.y, task.forget.ids[:1], row.owners, classes=10))


LIARS = {
    "a removed row": (lambda task: task.retain.plus(task.forget.select([0])), "stands on 1 records that were to be"),
    "all removed rows": (lambda task: task.retain.plus(task.forget), "records that were to be removed"),
    "a row not in the set": (lambda task: task.retain.plus(stranger(task.retain)), "a row that is not in the set"),
    "a retained row under a removed id": (under_another_id, "another row in the place of a record"),
    "a removed row under a retained id": (
        lambda task: swapped(task.retain, 3, task.forget, 0),
        "another row in the pl",
    ),
    "a retained row under another id": (lambda task: swapped(task.retain, 3, task.retain, 4), "another row in the pl"),
    "a row of another owner": (lambda t: swapped(t.retain, 3, t.retain, 3, owner="eve"), "content or owner are not"),
    "one row fewer": (
        lambda task: task.retain.select(range(1, len(task.retain))),
        "left out 1 records that were to st",
    ),
}


@pytest.mark.parametrize("lie", LIARS, ids=[name.replace(" ", "-") for name in LIARS])
def test_a_method_that_trains_on_other_rows_is_found_and_nothing_is_released(place, lie):
    here = place("whole")
    read, why = LIARS[lie]
    before, asked = here.served().digest(), here.ask(Request.remove_owner(ANN))
    assert here.run(method=Liar(read=read)).failed == (asked,)
    assert why in here.filed(asked).why
    assert here.served().digest() == before
    assert here.versions() == ["v0001"]
    assert "switched" not in here.kinds()
    assert kit.holding(here.root / "models", [b"who-is-this", *(name.encode() for name in kit.digits().ids)]) == []
    assert not any(name in here.filed(asked).why for name in (*kit.digits().ids, "who-is-this", ANN))
    here.ledger.requests.release(asked)
    assert here.run().completed == (asked,)
    assert here.checked(asked).passed


def test_a_method_that_is_no_liar_is_let_by(place):
    here = place("whole")
    asked = here.honour(Request.remove_owner(ANN), method=Liar(read=lambda task: task.retain))
    assert here.checked(asked).passed
    assert here.said(asked)["dataset"]["rowsRead"] == here.said(asked)["dataset"]["after"]


@dataclass(frozen=True, kw_only=True)
class Idle(Sisa):
    """Says that no shard had to be trained anew."""

    def _apply(self, task, *, rng):
        return Done(trained=replace(task.trained))


@dataclass(frozen=True, kw_only=True)
class HalfDone(Sisa):
    """Trains one touched shard anew, and hands back the others as they were."""

    def _apply(self, task, *, rng):
        done = super()._apply(task, rng=rng)
        kept = done.events[1].part
        parts = list(done.trained.parts)
        parts[kept] = task.trained.parts[kept]
        return Done(trained=replace(done.trained, parts=tuple(parts)), events=done.events[:1])


@pytest.mark.parametrize("method", [Idle(), HalfDone()], ids=["idle", "half done"])
def test_a_shard_that_should_have_been_trained_anew_is_missed(place, method):
    here, records = place("shards"), kit.digits()
    sharding = kit.trained().recipe.sharding
    other = next(one for one in kit.owners_of(records) if sharding.shard_of(one) != sharding.shard_of(ANN))
    ids = [*records.of_owner(ANN).ids, *records.of_owner(other).ids]
    asked = here.ask(Request.remove(ids))
    assert here.run(method=method).failed == (asked,)
    assert "were to be removed" in here.filed(asked).why
    assert here.versions() == ["v0001"]


class Foreign:
    """A method from elsewhere whose books are not kept."""

    claim = Claim.NONE
    needs = frozenset()

    def __init__(self, books):
        self.books = books

    def supports(self, trained):
        return None

    def __call__(self, trained, records, request, *, rng):
        answer = kit.fine_tune()(trained, records, request, rng=rng)
        return replace(answer, trained=replace(answer.trained, seal=None, **self.books(trained, answer.trained)))


BOOKS = {
    "nothing is gone": lambda before, after: {"ids": before.ids, "gone": before.gone},
    "gone is forgotten": lambda before, after: {"gone": before.gone},
    "one more": lambda before, after: {"ids": after.ids | {"who-is-this"}},
}


@pytest.mark.parametrize("books", BOOKS.values(), ids=[name.replace(" ", "-") for name in BOOKS])
def test_a_method_that_keeps_other_books_is_refused(place, books):
    here = place("whole")
    asked = here.ask(Request.remove_owner(ANN))
    assert here.run(method=Foreign(books)).failed == (asked,)
    assert "the method's model" in here.filed(asked).why
    assert here.versions() == ["v0001"]


class Elsewhere(Foreign):
    """A method from elsewhere that is exact, says it."""

    claim = Claim.EXACT

    def __call__(self, trained, records, request, *, rng):
        return Retrain()(trained, records, request, rng=rng)


def test_a_method_from_elsewhere_is_not_watched_and_the_certificate_says_so(place):
    here = place("whole")
    asked = here.honour(Request.remove_owner(ANN), method=Elsewhere(None))
    assert here.said(asked)["claim"]["level"] == "exact"
    assert here.said(asked)["dataset"]["rowsRead"] is None
    assert "NOT witnessed" in str(here.checked(asked))


def test_a_proxy_record_put_into_the_set_after_it_was_anchored_is_refused(place):
    here = place("whole")
    asked, before = here.ask(Request.remove_owner(ANN)), here.served().digest()
    row = ("digits", "f" * 32, hashlib.sha256(b"proxy").digest(), b"k" * 32, None)
    with sqlite3.connect(here.root / "ledger.db") as base:
        base.execute("INSERT INTO record (model, name, commitment, key, run) VALUES (?, ?, ?, ?, ?)", row)
    base.close()
    assert here.run().failed == (asked,)
    assert "was put in or taken out" in here.filed(asked).why
    assert here.served().digest() == before
    with sqlite3.connect(here.root / "ledger.db") as base:
        base.execute("DELETE FROM record WHERE name = ?", ("f" * 32,))
    base.close()
    here.ledger.requests.release(asked)
    assert here.run().completed == (asked,)


def test_a_record_taken_out_behind_the_logs_back_is_missed(place):
    here = place("whole")
    asked, name = here.ask(Request.remove_owner(ANN)), kit.KEYS.pseudonym(kit.digits().of_owner(BOB).ids[0])
    with sqlite3.connect(here.root / "ledger.db") as base:
        assert base.execute("DELETE FROM record WHERE name = ?", (name,)).rowcount == 1
    base.close()
    assert here.run().failed == (asked,)
    assert "was put in or taken out" in here.filed(asked).why


class TwoFaced:
    """A data set that shows one row while it is registered, and another when it is trained on."""

    def __init__(self, records):
        self.x, self.y, self.lies = records.x, records.y, False

    def __len__(self):
        return len(self.x)

    def __getitem__(self, place):
        return (self.x[place] + 1 if self.lies and place == 5 else self.x[place]), self.y[place]


@pytest.mark.parametrize("lies", [False, True], ids=["honest", "lies"])
def test_what_a_data_set_says_of_itself_is_not_believed_but_the_bytes_that_were_read(place, lies):
    here, plain = place("whole"), kit.digits()
    source = TwoFaced(plain)
    streamed = Records.from_dataset(source, plain.ids, plain.owners, classes=10)
    source.lies = lies
    asked = here.ask(Request.remove(plain.ids[:1]))
    progress = here.run(records=streamed)
    if lies:
        assert progress.failed == (asked,)
        assert kit.KEYS.pseudonym(plain.ids[5]) in here.filed(asked).why
        assert here.versions() == ["v0001"]
    else:
        assert progress.completed == (asked,)
        assert here.checked(asked).passed
        assert here.said(asked)["dataset"]["rowsRead"]["count"] == len(plain) - 1


def content_digest(row, label):
    """As the format of commitments has it, written out."""
    header = json.dumps([row.numpy().dtype.str, list(row.shape), "<i8", []], separators=(",", ":")).encode()
    data = row.contiguous().numpy().tobytes() + int(label).to_bytes(8, "little", signed=True)
    return hashlib.sha256(len(header).to_bytes(4, "little") + header + data).hexdigest()


def members(here, records):
    """The commitments to these records, from their bytes and the keys in the database alone."""
    with sqlite3.connect(here.root / "ledger.db") as base:
        keys = dict(base.execute("SELECT name, key FROM record"))
    base.close()
    made = []
    for record_id, owner, row, label in zip(records.ids, records.owners, records.x, records.y, strict=True):
        said = json.dumps(["expunge-record/1", owner, content_digest(row, label)], separators=(",", ":")).encode()
        made.append(hmac.digest(keys[kit.KEYS.pseudonym(record_id)], said, "sha256"))
    return made


@pytest.mark.parametrize("kind", ["shards", "slices", "whole"])
def test_the_witnessed_set_is_that_of_the_commitments_to_the_rows_that_stay(place, kind):
    here, records = place(kind), kit.digits()
    stays = records.where(lambda _, owner: owner != ANN)
    asked = here.honour(Request.remove_owner(ANN))
    said = here.said(asked)["dataset"]
    assert said["rowsRead"] == RecordSet(members(here, stays)).root().to_json()
    assert said["before"] == RecordSet(members(here, records)).root().to_json()
    removed = json.loads(here.ledger.certificates.bundle(asked))["removed"]["commitments"]
    assert removed == sorted(one.hex() for one in members(here, records.of_owner(ANN)))
    again = here.honour(Request.remove_owner(BOB))
    said = here.said(again)["dataset"]
    assert said["rowsRead"] == RecordSet(members(here, stays.where(lambda _, owner: owner != BOB))).root().to_json()


def test_untouched_shards_are_carried_over_and_only_the_others_are_read(place, monkeypatch):
    here, records, watched = place("shards"), kit.digits(), []
    honest = Witness.commitments

    def watching(self, keys, openings, carried=()):
        carried = list(carried)
        watched.append((set(self.seen), set(carried)))
        return honest(self, keys, openings, carried)

    monkeypatch.setattr(Witness, "commitments", watching)
    here.honour(Request.remove_owner(ANN))
    sharding = kit.trained().recipe.sharding
    home = sharding.shard_of(ANN)
    touched = records.where(lambda _, owner: sharding.shard_of(owner) == home and owner != ANN)
    others = records.where(lambda _, owner: sharding.shard_of(owner) != home)
    assert watched == [(set(touched.ids), set(map(kit.KEYS.pseudonym, others.ids)))]


def test_a_record_that_was_read_as_two_rows_is_odd():
    records, witness = kit.digits().select([0, 1]), Witness(due=frozenset(kit.digits().ids[:2]))
    x, y = records.x, records.y
    witness.saw(records, torch.tensor([0, 1]), x, y)
    assert (witness.rows_read, witness.gradients) == (2, 2)
    witness.saw(records, torch.tensor([0]), x[:1], y[:1])
    assert witness.odd == set()
    witness.saw(records, torch.tensor([0]), x[:1], y[:1] + 1)
    with pytest.raises(Corrupt, match="1 records with changing content"):
        witness.commitments(kit.KEYS, {})


def test_retraining_without_shards_reads_every_row_that_stays(place):
    here = place("shards")
    asked = here.honour(Request.remove_owner(ANN), method=Retrain())
    assert here.said(asked)["dataset"]["rowsRead"]["count"] == len(kit.digits().where(lambda _, o: o != ANN))
    assert here.checked(asked).passed
