"""Verification as a stage: what was recorded is replayed, and what was not is never shown as passed."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from expunge import Recipe, Sharding, Sisa, generator, train
from expunge.core.errors import Misuse
from expunge.core.protocols import Failed, Held, Job, NotDone, Passed
from expunge.learn.shards import first_unclean_slices, shards_of
from expunge.testing.case import digits
from expunge.verify import Share, Tolerance, Transcript, VerifyStage, record, stage
from expunge.verify.tolerance import EXACT

CASE = digits()
RECIPE = Recipe(model="mlp", model_args={"hidden": [8]}, epochs=1, batch_size=32, seed=7)
SHARDS = replace(RECIPE, sharding=Sharding(shards=3))


@pytest.fixture(scope="module")
def before():
    return train(RECIPE, CASE.records)


@pytest.fixture
def made(tmp_path, before):
    """A job whose model was retrained with a transcript, and the stage that finds it."""
    after = record(RECIPE, CASE.retain, tmp_path / "told", every=2)
    after = replace(after, gone=frozenset(CASE.forget.ids))
    job = Job(requests=(CASE.request,), before=before, after=after, records=CASE.records)
    return job, VerifyStage(folder=tmp_path / "told")


def test_a_recorded_retraining_passes_and_its_verdicts_are_the_evidence(made):
    job, check = made
    answer = check(job, rng=generator(0))
    assert isinstance(answer, Passed)
    assert len(answer.evidence["verdicts"]) == 7
    assert answer.evidence["commitment"] == Transcript.open(check.folder).commitment
    json.dumps(answer.evidence, allow_nan=False)


def test_a_journey_names_the_folder_unless_one_was_given(made):
    job, check = made
    free = replace(check, folder=None)
    assert isinstance(free(job, rng=generator(0)), NotDone)
    assert isinstance(free.at(check.folder)(job, rng=generator(0)), Passed)
    assert check.at(check.folder / "elsewhere") is check


def test_without_a_transcript_or_a_model_it_is_not_done(made):
    job, check = made
    assert isinstance(check(replace(job, after=None), rng=generator(0)), NotDone)
    answer = replace(check, folder=check.folder / "elsewhere")(job, rng=generator(0))
    assert isinstance(answer, NotDone)
    assert "no transcript" in answer.why


def test_the_old_model_under_the_new_ones_transcript_is_held(made, before):
    job, check = made
    stale = replace(before, ids=job.after.ids, gone=job.after.gone)
    answer = check(replace(job, after=stale), rng=generator(0))
    assert isinstance(answer, Held)
    assert answer.why == "final model: fail, the served model is another than that after the last step"


def test_rows_that_should_be_gone_are_held_by_name(tmp_path, before):
    wrong = record(RECIPE, CASE.records, tmp_path / "told", every=2)
    wrong = replace(wrong, ids=frozenset(CASE.retain.ids), gone=frozenset(CASE.forget.ids))
    job = Job(requests=(CASE.request,), before=before, after=wrong, records=CASE.records)
    answer = VerifyStage(folder=tmp_path / "told")(job, rng=generator(0))
    assert isinstance(answer, Held)
    assert "removal: fail" in answer.why


def test_a_torn_transcript_is_a_failure(made):
    job, check = made
    (check.folder / "transcript.json").write_text("{")
    assert isinstance(check(job, rng=generator(0)), Failed)


@pytest.fixture
def tolerances(monkeypatch):
    """The tolerances that transcripts were replayed with, in order; the first of them finds a fault in `replay`."""
    asked = []

    class Elsewhere(stage.Replay):
        def __call__(self, *given, **named):
            asked.append(self.tolerance)
            found = super().__call__(*given, **named)
            if len(asked) > 1:
                return found
            return tuple(replace(one, outcome="fail") if one.check == "replay" else one for one in found)

    monkeypatch.setattr(stage, "Replay", Elsewhere)
    return asked


def test_only_a_replay_that_ends_elsewhere_is_judged_by_a_measured_tolerance(made, tolerances):
    job, check = made
    assert isinstance(check(job, rng=generator(0)), Passed)
    assert tolerances == [EXACT, None]


def test_a_tolerance_that_was_given_is_the_only_one(made, tolerances):
    job, check = made
    tight = Tolerance(parameter=1e-5, buffer=1e-5, optimiser=1e-5)
    assert isinstance(replace(check, tolerance=tight)(job, rng=generator(0)), Held)
    assert tolerances == [tight]


def test_a_share_of_the_segments_is_drawn_anew_for_each_transcript_and_holds_the_largest(made, tmp_path):
    told = Transcript.open(made[1].folder)
    many = len(told.segments)
    assert many > 3
    assert Share(1).choose(told, rng=generator(0)) == set(range(many))
    drawn = [Share(0.01).choose(told, rng=generator(seed)) for seed in range(20)]
    assert {len(one) for one in drawn} == {1, 2}
    (largest,) = frozenset.intersection(*drawn)
    assert len(set(drawn)) > 2
    record(RECIPE, CASE.retain, tmp_path / "again", every=2)  # under another salt
    other = Transcript.open(tmp_path / "again")
    assert [Share(0.01).choose(other, rng=generator(seed)) for seed in range(20)] != drawn
    assert all(largest in Share(0.01).choose(other, rng=generator(seed)) for seed in range(20))


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(Misuse, match="above 0 and at most 1"):
        Share(share)


@pytest.fixture(scope="module")
def sharded():
    return train(SHARDS, CASE.records)


@pytest.fixture
def shards(tmp_path, sharded):
    """A job whose touched shards were trained again with transcripts, and the stage that finds them."""
    after = Sisa()(sharded, CASE.records, CASE.request, rng=generator(0)).trained
    recipe = sharded.recipe
    rows = shards_of(CASE.retain, recipe.sharding)
    touched = sorted(first_unclean_slices(sharded, CASE.forget))
    for one in touched:
        place = tmp_path / "told" / f"part-{one:04d}"
        record(recipe.part(one), rows[one], place, stage="slice-0", every=2)
    job = Job(requests=(CASE.request,), before=sharded, after=after, records=CASE.records)
    return job, VerifyStage(folder=tmp_path / "told"), touched


def test_honest_shards_under_another_aggregate_are_held(shards):
    job, check, _ = shards
    foreign = copy.deepcopy(job.after.module)
    with torch.no_grad():
        next(foreign.parameters()).add_(1.0)
    answer = check(replace(job, after=replace(job.after, module=foreign)), rng=generator(0))
    assert isinstance(answer, Held)
    assert answer.why == "final model: fail, the served model is not its shards put together as the recipe says"


def test_of_shards_those_that_were_trained_anew_are_replayed(shards):
    job, check, touched = shards
    answer = check(job, rng=generator(0))
    assert isinstance(answer, Passed)
    assert {one["check"].partition(",")[0] for one in answer.evidence["verdicts"]} == {f"shard {i}" for i in touched}
    assert list(answer.evidence["commitment"]) == [str(one) for one in touched]
    json.dumps(answer.evidence, allow_nan=False)


def test_a_shard_that_was_trained_anew_without_a_transcript_is_held(shards):
    job, check, touched = shards
    shutil.rmtree(check.folder / f"part-{touched[0]:04d}")
    answer = check(job, rng=generator(0))
    assert isinstance(answer, Held)
    assert answer.why == f"shard {touched[0]}, commitment: fail, it was trained anew, and there is no transcript of it"


def test_a_shard_that_is_another_than_its_transcript_says_is_held(shards):
    job, check, touched = shards
    parts = list(job.after.parts)
    parts[touched[0]] = replace(job.before.parts[touched[0]], ids=parts[touched[0]].ids)
    answer = check(replace(job, after=replace(job.after, parts=tuple(parts))), rng=generator(0))
    assert isinstance(answer, Held)
    assert answer.why.startswith(f"shard {touched[0]}, final model: fail")


def test_shards_of_several_slices_are_not_done_with_the_reason(shards):
    job, check, _ = shards
    sliced = replace(job.before, recipe=replace(SHARDS, sharding=Sharding(shards=3, slices=2)))
    answer = check(replace(job, before=sliced), rng=generator(0))
    assert isinstance(answer, NotDone)
    assert "one slice each" in answer.why


def test_where_no_shard_changed_there_is_nothing_to_replay(shards):
    job, check, _ = shards
    assert isinstance(check(replace(job, after=job.before, requests=()), rng=generator(0)), NotDone)


def test_another_number_of_shards_fails(shards):
    job, check, _ = shards
    fewer = replace(job.after, parts=job.after.parts[:-1])
    assert isinstance(check(replace(job, after=fewer), rng=generator(0)), Failed)
