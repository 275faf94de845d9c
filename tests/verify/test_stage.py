"""Verification as a stage: what was recorded is replayed, and what was not is never shown as passed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from expunge import Recipe, generator, train
from expunge.core.protocols import Failed, Held, Job, NotDone, Passed
from expunge.testing.case import digits
from expunge.verify import Tolerance, record
from expunge.verify.stage import VerifyStage

CASE = digits()
RECIPE = Recipe(model="mlp", model_args={"hidden": [8]}, epochs=1, batch_size=32, seed=7)
TIGHT = Tolerance(parameter=1e-5, buffer=1e-5, optimiser=1e-5)


@pytest.fixture(scope="module")
def before():
    return train(RECIPE, CASE.records)


@pytest.fixture
def made(tmp_path, before):
    """A job whose model was retrained with a transcript, and the stage that finds it."""
    after = record(RECIPE, CASE.retain, tmp_path / "told", every=5)
    after = replace(after, gone=frozenset(CASE.forget.ids))
    (tmp_path / "told").rename(tmp_path / after.digest())
    job = Job(requests=(CASE.request,), before=before, after=after, records=CASE.records)
    return job, VerifyStage(folder=tmp_path, tolerance=TIGHT)


def test_a_recorded_retraining_passes_and_its_verdicts_are_the_evidence(made):
    job, stage = made
    answer = stage(job, rng=generator(0))
    assert isinstance(answer, Passed)
    assert len(answer.evidence["verdicts"]) == 7
    json.dumps(answer.evidence, allow_nan=False)


def test_without_a_transcript_or_a_model_it_is_not_done(made, before):
    job, stage = made
    assert isinstance(stage(replace(job, after=None), rng=generator(0)), NotDone)
    answer = stage(replace(job, after=before), rng=generator(0))
    assert isinstance(answer, NotDone)
    assert "no transcript" in answer.why


def test_the_old_model_under_the_new_ones_transcript_is_held(made, before):
    job, stage = made
    shutil.copytree(stage.folder / job.after.digest(), stage.folder / before.digest())
    stale = replace(before, ids=job.after.ids, gone=job.after.gone)
    answer = stage(replace(job, after=stale), rng=generator(0))
    assert isinstance(answer, Held)
    assert answer.why == "final model: fail, the served model is another than that after the last step"


def test_rows_that_should_be_gone_are_held_by_name(tmp_path, before):
    wrong = record(RECIPE, CASE.records, tmp_path / "told", every=5)
    wrong = replace(wrong, ids=frozenset(CASE.retain.ids), gone=frozenset(CASE.forget.ids))
    (tmp_path / "told").rename(tmp_path / wrong.digest())
    job = Job(requests=(CASE.request,), before=before, after=wrong, records=CASE.records)
    answer = VerifyStage(folder=tmp_path, tolerance=TIGHT)(job, rng=generator(0))
    assert isinstance(answer, Held)
    assert "removal: fail" in answer.why


def test_a_torn_transcript_is_a_failure(made):
    job, stage = made
    (stage.folder / job.after.digest() / "transcript.json").write_text("{")
    assert isinstance(stage(job, rng=generator(0)), Failed)
