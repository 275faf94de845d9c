"""What a hostile reader found: names that are words of ours, false books, liars that retrain nothing, lost requests."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expunge import Records, Request, Sharding, Sisa
from expunge.core.errors import Corrupt, Misuse
from expunge.core.events import Retrained
from expunge.ledger.ledger import Ledger
from expunge.ledger.sweep import Needles
from expunge.unlearn import FineTune
from expunge.workflow import FallBack, Leftovers, Workspace, erasure
from expunge.workflow.steps import Steps
from tests.workflow import kit

ANN = kit.owners_of(kit.digits())[0]
BOB = kit.owners_of(kit.digits())[1]


class Lazy(Sisa):
    """Trains nothing, and writes the removed ids out of its books."""

    def _apply(self, task, *, rng):
        gone = frozenset(task.forget.ids)
        parts = tuple(replace(part, ids=part.ids - gone) for part in task.trained.parts)
        done = super()._apply(task, rng=rng)
        return replace(done, trained=replace(task.trained, parts=parts), events=())


class Bold(Lazy):
    """Trains nothing, and says that it trained one part anew."""

    def _apply(self, task, *, rng):
        return replace(super()._apply(task, rng=rng), events=(Retrained(part=0, rows=1),))


@pytest.mark.parametrize("liar", [Lazy(), Bold()], ids=["lazy", "bold"])
def test_who_says_exact_and_trains_nothing_is_not_certified(place, liar):
    here = place()
    asked = here.ask(Request.remove_owner(ANN))
    before = here.ledger.models.served(kit.MODEL)
    assert here.run(method=liar).failed == (asked,)
    assert here.ledger.models.served(kit.MODEL) == before


@pytest.mark.parametrize("word", ["model", "completed", "gdpr", "softmax", "ids", kit.MODEL, "expunge"])
def test_an_owner_who_is_called_like_a_word_of_ours_can_be_forgotten(tmp_path, word):
    rows = kit.digits()
    owners = [word if owner == ANN else owner for owner in rows.owners]
    records = Records(rows.x, rows.y, rows.ids, owners, classes=10)
    made = Workspace.init(tmp_path / "w")
    made.register(kit.MODEL, kit.from_scratch(kit.recipe(sharding=Sharding(shards=4)), records), records)
    made.close()
    here = kit.Place(tmp_path / "w", records)
    asked = here.ask(Request.remove_owner(word))
    assert here.run().completed == (asked,)
    second = here.ask(Request.remove_owner(BOB))
    (tmp_path / "w" / "note.txt").write_text(f"{BOB} rang")
    with pytest.raises(Leftovers):
        here.run()
    assert here.state(second) == "verifying"
    here.close()


def test_books_that_were_changed_are_refused(place):
    here = place()
    asked = here.ask(Request.remove_owner(ANN))
    served = here.ledger.models.served(kit.MODEL)
    kept = here.workspace.load(kit.MODEL, here.records)
    gone = frozenset(here.records.of_owner(ANN).ids)
    false = replace(kept, ids=kept.ids - gone, gone=kept.gone | gone)
    shutil.rmtree(here.root / served.folder)
    here.workspace.keep(false, served.folder)
    assert here.run().failed == (asked,)
    assert "and the ledger on others" in here.filed(asked).why


def test_a_fallback_that_was_changed_after_training_is_refused(place):
    here = place()
    model = kit.from_scratch(kit.recipe(), here.records.without(here.records.of_owner(ANN).ids))
    changed = replace(model, standing=FineTune.claim)
    with pytest.raises(Misuse, match="changed after training"):
        FallBack(model=changed)(here.served(), here.records, Request.remove_owner(ANN), rng=torch.Generator())


def test_one_request_that_cannot_be_carried_out_any_more_does_not_take_the_others_with_it(place):
    here = place()
    good, bad = here.ask(Request.remove_owner(ANN)), here.ask(Request.remove_owner(BOB))
    journey = here.journey()
    for filed in here.ledger.requests.find():
        journey.screen(filed)
    honest = here.workspace.asked
    here.workspace.asked = lambda one: Request.remove_owner("nobody") if one == bad else honest(one)
    done = journey.run("w", now=True)
    assert (done.completed, done.failed) == ((good,), (bad,))
    assert here.ledger.verify() == []


def test_coins_cannot_be_thrown_again_by_who_reads_the_certificate(place):
    one = place()
    assert one.workspace.keys.coins("run", "x").initial_seed() == one.workspace.keys.coins("run", "x").initial_seed()
    assert one.workspace.keys.coins("run", "x").initial_seed() != one.workspace.keys.coins("run", "y").initial_seed()


def test_what_was_held_before_any_stage_judged_it_is_screened_when_released(place):
    here = place()
    asked = here.ask(Request.remove_owner("nobody"))
    assert here.run().held == (asked,)
    here.ledger.requests.release(asked)
    assert here.state(asked) == "screening"
    assert here.run().held == (asked,)


def test_two_workspaces_cannot_share_a_database(place):
    here = place()
    with pytest.raises(Misuse, match="two workspaces cannot share one"):
        Ledger(here.ledger.database.url.render_as_string(), here.workspace.keys, origin="expunge/another")


def test_a_copy_of_an_old_model_in_the_workspace_is_a_leftover(place):
    here = place()
    here.workspace.keep(here.served(), "notes/old")
    asked = here.ask(Request.remove_owner(ANN))
    with pytest.raises(Leftovers, match="copy of a model in notes/old"):
        here.run()
    assert here.state(asked) == "verifying"


def test_a_sweep_does_not_give_up_the_locks_that_sqlite_holds(place):
    """POSIX cancels all locks of a process on a file when it closes any descriptor of it; /proc/locks shows them."""
    here = place()
    rows = here.records.of_owner(ANN)
    stays = here.records.without(rows.ids)
    inode = (here.root / "ledger.db-shm").stat().st_ino
    with here.ledger.database.read() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM entry").all()
        before = locks_on(inode)
        erasure._searched(here.workspace, Needles.of(rows, beside=stays))
        assert locks_on(inode) == before != []


def locks_on(inode):
    lines = Path("/proc/locks").read_text().splitlines()
    return sorted(line.split(": ", 1)[1] for line in lines if f":{inode} " in line and f" {os.getpid()} " in line)


def test_the_certificate_says_how_much_was_searched(place):
    here = place()
    asked = here.ask(Request.remove_owner(ANN))
    here.run()
    said = here.ledger.certificates.get(asked).statement(here.workspace.keys)["predicate"]["sweep"]
    assert said["records"] == len(here.records.of_owner(ANN))
    assert said["files"] > 5
    assert said["bytes"] > 10_000
    assert (said["clean"], said["notInSource"]) == (True, 0)


def test_a_removal_from_one_model_leaves_another_over_the_same_rows_alone(place):
    here = place()
    here.workspace.register("other", kit.trained(), here.records)
    here.ask(Request.remove_owner(ANN))
    here.run()
    with here.ledger.database.read() as connection:
        assert len(here.ledger.commitments.present(connection, "other")) == len(here.records)
        assert here.ledger.commitments.gone(connection, "other") == frozenset()
    assert here.ledger.verify() == []


def test_a_worker_that_was_overtaken_cannot_end_the_lease_of_its_successor(place):
    here = place()
    here.ask(Request.remove_owner(ANN))
    journey = here.journey()
    for filed in here.ledger.requests.find():
        journey.screen(filed)
    runs = here.ledger.runs
    first = runs.claim(kit.MODEL, "first", lease_s=0.0)
    second = runs.claim(kit.MODEL, "second", lease_s=60.0)
    runs.let_go(first)
    assert second.fence == first.fence + 1
    assert runs.claim(kit.MODEL, "third") is None


def test_a_corrupt_sum_is_never_certified(place, monkeypatch):
    here = place()
    asked = here.ask(Request.remove_owner(ANN))
    monkeypatch.setattr(Steps, "_difference", lambda *_: {"removed": [], "removal": [], "added": [], "addition": []})
    with pytest.raises(Corrupt, match="does not add up"):
        here.run()
    assert here.state(asked) == "verifying"
    monkeypatch.undo()
    assert here.run().completed == (asked,)
