"""Retraining is replayed before the release: what is honest passes, what lies is withheld by name, nothing is left."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass, replace

import pytest

from expunge import Records, Request, Retrain, Sisa, datasets
from expunge.core.errors import Unwritable
from expunge.core.protocols import Passed
from expunge.unlearn.method import Done
from expunge.verify import Recorder, Replay, Share, Transcript, VerifyStage, accepted, replay_shards
from expunge.workflow import AFTER, BEFORE, Leftovers, Workspace, erasure, transcripts
from tests.workflow import crashes, kit

ANN, BOB, CAT = kit.owners_of(kit.digits())[:3]
ALL = {"stages": [VerifyStage()]}
HONEST = transcripts.record


def without(*owners):
    return kit.digits().where(lambda _, owner: owner not in owners)


def told(here):
    """Where the transcript of the served version lies."""
    return here.root / here.ledger.models.served(kit.MODEL).folder / "transcript"


def books(here):
    """What is written beside the served model's parameters and those of its parts, less what is drawn anew."""
    home = told(here).parent
    read = [json.loads(path.read_text()) for path in sorted(home.rglob("trained.json"))]
    return [{name: one[name] for name in one if name not in ("seal", "check", "files")} for one in read]


def strays(here):
    """What there is of transcripts anywhere but in the version that is served."""
    found = [path for path in here.root.rglob("*") if "transcript" in path.name or ".told" in path.name]
    found += list(here.root.rglob("*.part"))
    return [path for path in found if told(here) not in (path, *path.parents)]


def test_a_retraining_is_replayed_and_its_certificate_says_so(place):
    here = place("whole", replay=1.0)
    asked = here.honour(Request.remove_owner(ANN), **ALL)
    assert here.stages(asked) == {one: "passed" if one == "verify" else "not done" for one in (*BEFORE, *AFTER)}
    assert here.checked(asked).passed
    assert not any(line.startswith("stage verify") for line in here.checked(asked).not_proved)
    assert here.said(asked)["dataset"]["rowsRead"]["count"] == len(without(ANN))
    assert strays(here) == []
    assert here.sound()


@pytest.mark.parametrize("kind", ["whole", "shards", "mlp"])
def test_the_result_and_what_is_said_of_the_method_are_those_without_a_transcript(place, kind):
    plain, here = place(kind), place(kind, replay=1.0)
    said = [one.said(one.honour(Request.remove_owner(ANN), **ALL)) for one in (plain, here)]
    assert here.stages(here.ledger.requests.find()[0].id)["verify"] == "passed"
    assert plain.stages(plain.ledger.requests.find()[0].id)["verify"] == "not done"
    assert here.served().digest() == plain.served().digest()
    for one, other in zip(books(here), books(plain), strict=True):
        assert one == other
    assert said[0]["method"] == said[1]["method"]
    assert said[0]["claim"] == said[1]["claim"]
    assert str(here.root) not in str(said[1])


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_the_share_of_the_policy_is_what_is_trained_again(place, monkeypatch, share):
    drawn = []
    choose = Share.choose
    monkeypatch.setattr(Share, "choose", lambda *given, **how: drawn.append(choose(*given, **how)) or drawn[-1])
    here = place("whole", replay=share)
    asked = here.honour(Request.remove_owner(ANN), stages=[VerifyStage(budget=Share(share))])
    many = len(Transcript.open(told(here)).segments)
    assert here.stages(asked)["verify"] == "passed"
    assert [len(one) for one in drawn] == [many] if share == 1 else 1 <= len(drawn[0]) <= 2 < many


def test_an_auditor_accepts_the_transcript_that_is_kept(place):
    here = place("whole", replay=0.1)
    here.honour(Request.remove_owner(ANN), **ALL)
    verify = Replay(agreed=kit.recipe())
    found = verify(Transcript.open(told(here)), without(ANN), forget=kit.digits().of_owner(ANN), served=here.served())
    assert accepted(found)


def test_once_every_shard_was_trained_anew_the_transcripts_are_of_all(place):
    here = place("shards", replay=1.0)
    for owner in (one for one in kit.owners_of(kit.digits()) if any(one in part for part in untold(here))):
        asked = here.honour(Request.remove_owner(owner), **ALL)
        assert here.stages(asked)["verify"] == "passed"
        assert strays(here) == []
        if not untold(here):
            break
    gone = kit.digits().take(sorted(here.served().gone))
    opened = {int(path.name[5:]): Transcript.open(path) for path in told(here).iterdir()}
    verify = Replay(agreed=kit.trained("shards").recipe)
    found = replay_shards(verify, opened, kit.digits().without(gone.ids), forget=gone, served=here.served())
    assert len(found) == 4
    assert all(map(accepted, found.values()))


def untold(here):
    """The owners in each shard that there is no transcript of."""
    parts = enumerate(here.served().parts)
    home = told(here)
    mine = (part.ids for index, part in parts if not (home / f"part-{index:04d}").is_dir())
    return [set(kit.digits().take(sorted(ids)).owners) for ids in mine]


def test_all_shards_trained_anew_by_retraining_leave_a_transcript_each(place):
    here = place("shards", replay=1.0)
    asked = here.honour(Request.remove_owner(ANN), method=Retrain(), **ALL)
    assert here.stages(asked)["verify"] == "passed"
    assert len(list(told(here).iterdir())) == 4
    plain = place("shards")
    plain.honour(Request.remove_owner(ANN), method=Retrain())
    assert here.served().digest() == plain.served().digest()
    assert [part.seal for part in here.served().parts] == [part.seal for part in plain.served().parts]


def test_a_shard_whose_rows_have_all_gone_needs_no_transcript(place):
    here = place("shards", replay=1.0)
    fewest = min(here.served().parts, key=lambda part: len(part.ids))
    other = next(part for part in here.served().parts if part is not fewest)
    asked = here.honour(Request.remove([*fewest.ids, min(other.ids)]), **ALL)
    assert here.stages(asked)["verify"] == "passed"
    lone = min((part for part in here.served().parts if part.ids), key=lambda part: len(part.ids))
    again = here.honour(Request.remove(sorted(lone.ids)), **ALL)
    assert here.stages(again)["verify"] == "not done"
    left = kit.digits().take(sorted(here.served().ids))
    assert here.served().digest() == kit.from_scratch(here.served().recipe, left).digest()


@dataclass(frozen=True, kw_only=True)
class Own(Retrain):
    """A retraining in a way of its own."""

    def _apply(self, task, *, rng):
        return Done(trained=super()._apply(task, rng=rng).trained)


LEAVE_NONE = {
    "no policy": ("whole", 0.0, Retrain()),
    "other coins": ("whole", 1.0, Retrain(coins="fresh")),
    "approximate": ("whole", 1.0, kit.fine_tune()),
    "own way": ("whole", 1.0, Own()),
    "slices": ("slices", 1.0, Sisa()),
    "slices retrained": ("slices", 1.0, Retrain()),
}


@pytest.mark.parametrize("what", LEAVE_NONE, ids=[what.replace(" ", "-") for what in LEAVE_NONE])
def test_what_leaves_no_transcript_is_not_done_and_never_passed(place, what):
    kind, share, method = LEAVE_NONE[what]
    here = place(kind, replay=share)
    asked = here.honour(Request.remove_owner(ANN), method=method, **ALL)
    assert here.stages(asked)["verify"] == "not done"
    assert not told(here).exists()
    assert strays(here) == []


def test_a_model_with_noise_in_its_past_leaves_none(tmp_path):
    plain = kit.trained("whole")
    told = {}
    for name, trained in (("plain", plain), ("noised", replace(plain, releases=("noise",)))):
        with transcripts.transcribing(Retrain(), trained, tmp_path / "v0002", tmp_path / "v0001", 1.0) as (
            _,
            told[name],
        ):
            pass
    assert told == {"plain": tmp_path / ".v0002.told" / "transcript", "noised": None}


def test_after_an_approximate_method_the_transcript_of_the_version_before_is_no_witness(place):
    here = place("whole", replay=1.0)
    here.honour(Request.remove_owner(ANN), **ALL)
    asked = here.honour(Request.remove_owner(BOB), method=kit.fine_tune(), **ALL)
    assert here.stages(asked)["verify"] == "not done"
    assert list(here.root.rglob("transcript.json")) == []


def test_a_request_for_what_is_gone_finds_the_transcript_that_is_there(place):
    here = place("whole", replay=1.0)
    mine = kit.digits().of_owner(ANN).ids
    here.honour(Request.remove_owner(ANN), **ALL)
    kept = told(here)
    asked = here.ask(Request.remove(sorted(mine)[:1]))
    assert here.run(records=without(ANN), **ALL).completed == (asked,)
    assert (here.stages(asked)["verify"], told(here)) == ("passed", kept)


def retold(recipe, records, folder, **how):
    """The liar: trains on the rows that should be gone, and tells so; the witness is shown an honest training."""
    shadow = folder.with_name("shadow")
    HONEST(recipe, records, shadow, **how)
    shutil.rmtree(shadow)
    lie = HONEST(recipe, kit.digits(), folder, **{**how, "tally": None})
    return replace(lie, ids=frozenset(records.ids))


def stale(recipe, records, folder, **how):
    """The liar: hands back the old model, and tells of an honest training."""
    honest = HONEST(recipe, records, folder, **how)
    return replace(kit.trained("whole"), ids=honest.ids)


def seedy(recipe, records, folder, **how):
    """The liar: has other coins than were agreed on, as one who draws them until the result pleases."""
    return replace(HONEST(replace(recipe, seed=11), records, folder, **how), recipe=recipe)


def spliced(recipe, records, folder, **how):
    """The liar: its last steps lead elsewhere than the recipe does."""
    step, steps = Recorder.step, []

    def nudged(self, rows, positions, module, optimiser):
        steps.append(1)
        if len(steps) == 7:
            next(module.parameters()).data.mul_(1.01)
        return step(self, rows, positions, module, optimiser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "step", nudged)
        return HONEST(recipe, records, folder, **how)


LIARS = {
    "old model": (stale, "final model: fail, the served model is another than that after the last step"),
    "rows left in": (retold, "removal: fail, "),
    "other coins": (seedy, "contract: fail, seed is 11, agreed 0"),
    "other steps": (spliced, "replay: fail, "),
}


@pytest.mark.parametrize("what", LIARS, ids=[what.replace(" ", "-") for what in LIARS])
def test_a_training_that_lies_is_withheld_by_name_and_released_to_an_exact_method(place, monkeypatch, what):
    here = place("whole", replay=1.0)
    before, (liar, why) = here.served().digest(), LIARS[what]
    asked = here.ask(Request.remove_owner(ANN))
    with monkeypatch.context() as patch:
        patch.setattr(transcripts, "record", liar)
        assert here.run(**ALL).withheld == (asked,)
    assert why in here.filed(asked).why
    assert here.filed(asked).why.startswith("verify: ")
    assert here.served().digest() == before
    assert here.versions() == ["v0001"]
    assert list(here.root.rglob("transcript*")) == []
    here.ledger.requests.release(asked, exact=True)
    assert here.run(**ALL).completed == (asked,)
    assert here.stages(asked)["verify"] == "passed"
    assert here.served().digest() == kit.from_scratch(kit.recipe(), without(ANN)).digest()


def test_without_the_stage_the_liar_comes_through(place, monkeypatch):
    """What the tests above would look like if nothing were replayed."""
    here = place("whole", replay=1.0)
    monkeypatch.setattr(transcripts, "record", stale)
    asked = here.honour(Request.remove_owner(ANN))
    assert here.served().digest() == kit.trained("whole").digest()
    assert here.stages(asked)["verify"] == "not done"


def test_a_torn_transcript_fails_the_run(place, monkeypatch):
    here = place("whole", replay=1.0)

    def torn(recipe, records, folder, **how):
        made = HONEST(recipe, records, folder, **how)
        (folder / "steps.safetensors").write_bytes(b"\x80\x04")
        return made

    asked = here.ask(Request.remove_owner(ANN))
    with monkeypatch.context() as patch:
        patch.setattr(transcripts, "record", torn)
        assert here.run(**ALL).failed == (asked,)
    assert here.filed(asked).why.startswith("verify: the transcript cannot be replayed")
    here.ledger.requests.release(asked)
    assert here.run(**ALL).completed == (asked,)


def test_a_later_removal_takes_the_version_with_its_transcript(place):
    here = place("whole", replay=1.0)
    here.honour(Request.remove_owner(ANN), **ALL)
    first = told(here)
    salt = Transcript.open(first).contract.salt
    theirs = Transcript.open(first).rows
    asked = here.honour(Request.remove_owner(BOB), **ALL)
    assert not first.parent.exists()
    assert told(here) != first
    assert here.said(asked)["sweep"]["clean"] is True
    assert {"what": "model version", "name": f"{kit.MODEL}/{first.parent.name}"} in here.said(asked)["retired"]
    assert Transcript.open(told(here)).contract.salt != salt
    assert len(Transcript.open(told(here)).rows) < len(theirs)
    assert kit.holding(here.root / "models", {salt.encode(), *(row.tobytes() for row in theirs)}) == []


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_transcripts_hold_no_ids_owners_rows_or_digests(place, kind):
    here = place(kind, replay=1.0)
    here.honour(Request.remove_owner(ANN), **ALL)
    assert list(told(here).rglob("steps.safetensors"))
    assert kit.holding(told(here), kit.traces(kit.digits())) == []
    names = {here.workspace.keys.pseudonym(one).encode() for one in kit.digits().ids}
    assert kit.holding(told(here), names) == []


@pytest.fixture
def numbered(tmp_path):
    """A workspace whose ids are the numbers of steps, and whose first owners are words of a transcript."""
    rows = datasets.get("optdigits").train.select(range(96))
    ids = [f"{i:09d}" if i in (4, 8, 12) else str(i) for i in range(96)]
    words = ["parameter", "checkpoint", "links", "transcript"]
    owners = [words[i] if i < 4 else f"person-{i}" for i in range(96)]
    records = Records(rows.x, rows.y, ids, owners, classes=10)
    workspace = Workspace.init(tmp_path / "ws", keys=kit.KEYS)
    how = kit.recipe(batch_size=8, optimiser_args={"lr": 0.01, "momentum": 0.9})
    workspace.register(kit.MODEL, kit.from_scratch(how, records), records)
    workspace.close()
    kit.settle(tmp_path / "ws", replay=1.0)
    here = kit.Place(tmp_path / "ws", records)
    yield here
    here.close()


def test_names_that_are_words_and_steps_of_every_transcript_are_no_leftovers_there(numbered):
    ids = numbered.records.ids
    for gone in (ids[:4], ids[4:14]):
        asked = numbered.honour(Request.remove(gone), **ALL)
        assert numbered.stages(asked)["verify"] == "passed"
    steps = transcripts.steps_told(numbered.root)
    assert {"000000004", "000000012", "6", "10"} <= steps


@pytest.mark.parametrize("what", ["steps_told", "_files_of_transcripts"])
def test_were_they_not_known_as_ours_nothing_could_be_certified(numbered, monkeypatch, what):
    monkeypatch.setattr(erasure, what, lambda _: set())
    numbered.ask(Request.remove(numbered.records.ids[:14]))
    with pytest.raises(Leftovers, match="models/digits/v0002"):
        numbered.run(**ALL)


def test_names_that_are_steps_of_a_transcript_are_leftovers_elsewhere(numbered):
    numbered.honour(Request.remove(["2"]), **ALL)
    assert "16" in transcripts.steps_told(numbered.root)
    (numbered.root / "notes.txt").write_text('"16" was removed')
    again = numbered.ask(Request.remove(["16"]))
    with pytest.raises(Leftovers, match=r"notes\.txt"):
        numbered.run(**ALL)
    (numbered.root / "notes.txt").unlink()
    assert numbered.run(**ALL).completed == (again,)


def test_a_record_that_goes_by_the_name_of_a_shards_stage_is_no_leftover_in_transcripts(tmp_path):
    rows = datasets.get("optdigits").train.select(range(96))
    ids = [f"slice-{i}" for i in range(96)]
    records = Records(rows.x, rows.y, ids, [f"person-{i}" for i in range(96)], classes=10)
    workspace = Workspace.init(tmp_path / "ws", keys=kit.KEYS)
    how = replace(kit.trained("shards").recipe, batch_size=8)
    workspace.register(kit.MODEL, kit.from_scratch(how, records), records)
    workspace.close()
    kit.settle(tmp_path / "ws", replay=1.0)
    here = kit.Place(tmp_path / "ws", records)
    asked = here.honour(Request.remove(ids[:2]), method=Sisa(), **ALL)
    assert here.stages(asked)["verify"] == "passed"
    assert transcripts.steps_told(here.root) & set(ids) == {"slice-0"}
    here.close()


class Died(BaseException):
    """The worker died here."""


def dies(point):
    def failpoint(name):
        if name == point:
            raise Died

    return failpoint


@pytest.mark.parametrize("point", ["after save", "after switch", "after erase"])
@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_a_worker_that_dies_at_a_named_instant_leaves_no_stray_transcript(place, monkeypatch, kind, point):
    here = place(kind, replay=1.0)
    asked = here.ask(Request.remove_owner(ANN))
    with monkeypatch.context() as patch:
        patch.setattr("expunge.workflow.steps.failpoint", dies(point))
        with pytest.raises(Died):
            here.run(**ALL)
    assert list(here.root.rglob("transcript"))
    assert here.run("another", **ALL).completed == (asked,)
    assert here.stages(asked)["verify"] == "passed"
    assert len(here.versions()) == 1
    assert told(here).is_dir()
    assert strays(here) == []


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_a_worker_that_dies_amid_the_recording_leaves_nothing(place, monkeypatch, kind):
    here = place(kind, replay=1.0)
    asked = here.ask(Request.remove_owner(ANN))
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "finish", lambda *_: (_ for _ in ()).throw(Died()))
        with pytest.raises(Died):
            here.run(**ALL)
    assert here.versions() == ["v0001"]
    assert here.run("another", **ALL).completed == (asked,)
    assert here.stages(asked)["verify"] == "passed"


def test_what_a_killed_worker_left_of_a_transcript_goes_with_the_next_run(place):
    here = place("whole", replay=1.0)
    left = here.root / "models" / kit.MODEL / ".v0002-00000000-1.told" / ".transcript.0123abcd.part"
    left.mkdir(parents=True)
    (left / "checkpoint-000000000.safetensors").write_bytes(b"x")
    assert here.run(**ALL).completed == ()
    assert here.versions() == ["v0001"]


def test_what_is_still_written_while_it_is_deleted_goes_in_the_end(place, monkeypatch):
    """A worker that was stopped and taken over goes on recording; the certificate calls its files no version."""
    here = place("whole", replay=1.0)
    left = here.root / "models" / kit.MODEL / ".v0002-00000000-1.told"
    rmtree, written = shutil.rmtree, []

    def beaten(folder, *given, **how):
        rmtree(folder, *given, **how)
        if folder == left and len(written) < 2:
            left.mkdir(parents=True)
            written.append((left / f"checkpoint-{len(written)}").write_bytes(b"x"))
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    monkeypatch.setattr(shutil, "rmtree", beaten)
    monkeypatch.setattr("expunge.workflow.steps.failpoint", lambda name: name == "after switch" and left.mkdir())
    asked = here.honour(Request.remove_owner(ANN), **ALL)
    assert len(written) == 2
    assert not left.exists()
    assert {"what": "unfinished files", "name": f"{kit.MODEL}/{left.name}"} in here.said(asked)["retired"]


def test_a_full_disk_is_said_so_and_the_run_goes_on_when_there_is_room(place, monkeypatch):
    here = place("whole", replay=1.0)
    asked = here.ask(Request.remove_owner(ANN))

    def full(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("expunge.verify.recorder.write_state", full)
        with pytest.raises(Unwritable, match=r"no transcript could be written in .*No space left") as caught:
            here.run(**ALL)
    assert "\n" not in str(caught.value)
    assert here.versions() == ["v0001"]
    assert here.run(**ALL).completed == (asked,)


def test_a_worker_that_is_killed_after_the_save_is_gone_on_from(tmp_path):
    crashes.begin(tmp_path / "w", replay=1.0)
    asked = crashes.requests(2)
    crashes.file(str(tmp_path / "w"), list(asked), 2)
    forker = crashes.Forker()
    given = {"root": str(tmp_path / "w"), "worker": "a", "seconds": 60.0}
    try:
        assert forker.play(crashes.Job(crashes.work, given, fail_at="after save")) == ["killed"]
    finally:
        forker.close()
    assert list((tmp_path / "w").rglob("transcript"))
    workspace = crashes.opened(tmp_path / "w")
    crashes.journey(workspace, stages=[VerifyStage()]).run("a")
    served = workspace.ledger.models.served(kit.MODEL)
    assert list((tmp_path / "w" / "models" / kit.MODEL).iterdir()) == [tmp_path / "w" / served.folder]
    assert (tmp_path / "w" / served.folder / "transcript").is_dir()
    workspace.close()
    assert list(crashes.faults(tmp_path / "w", asked)) == []


def test_a_copy_for_a_registry_elsewhere_holds_no_transcript(place, tmp_path):
    mlflow = pytest.importorskip("expunge.workflow.mlflow")
    here = place("whole", replay=1.0)
    here.honour(Request.remove_owner(ANN), **ALL)
    mirror = object.__new__(mlflow.MlflowMirror)
    object.__setattr__(mirror, "model", "digits")
    object.__setattr__(mirror, "artifacts", tmp_path / "copies")
    mirror._place(told(here).parent, "copy")
    names = {path.name for path in (tmp_path / "copies").rglob("*")}
    assert "trained.json" in names
    assert not names & {"transcript", "transcript.json"}


def test_the_journey_puts_the_stage_where_the_version_is_and_leaves_others_alone(place):
    here, other = place("whole", replay=1.0), kit.Says("verify", [Passed(why="fine")])
    asked = here.honour(Request.remove_owner(ANN), stages=[other])
    assert here.stages(asked)["verify"] == "passed"
    assert len(other.jobs) == 1
