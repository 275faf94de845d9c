"""Transcripts are those of the very training, appear whole or not at all, and are read as a stranger's."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch

from expunge.core.claim import Claim
from expunge.core.errors import EmptyRetain, Impossible, Misuse, Stopped, UnreadableFile, Unsupported
from expunge.core.events import GaussianNoise
from expunge.core.recipe import Pruning, Sharding
from expunge.core.records import Records
from expunge.learn.loop import Tally, reading_order
from expunge.learn.shards import ShardWarning, shards_of
from expunge.learn.training import train
from expunge.verify.recorded import record
from expunge.verify.recorder import Recorder, refuse_certified
from expunge.verify.rows import data_root, numbered, row_commitments
from expunge.verify.transcript import Contract, Transcript, checkpoint_name
from tests.verify.transcripts import EVERY, FORGET, RECIPE, RETAIN, SALT, Pages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("honest") / "transcript"
    record(RECIPE, RETAIN, place, every=EVERY, salt=SALT)
    return place


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_recording_changes_no_byte_of_the_model_and_counts_the_same_work(tmp_path):
    one, two = Tally(), Tally()
    trained = record(RECIPE, RETAIN, tmp_path / "t", every=EVERY, tally=one)
    plain = train(RECIPE, RETAIN, tally=two)
    assert trained.digest() == plain.digest()
    assert (one.gradients, one.rows_read) == (two.gradients, two.rows_read)
    assert trained.ids == plain.ids
    assert trained.log.losses == plain.log.losses
    assert not trained.module.training


def test_a_transcript_names_the_rows_of_every_step_in_order(folder):
    told = Transcript.open(folder)
    names, step = row_commitments(RETAIN, SALT), 0
    for epoch in range(RECIPE.epochs):
        for batch in reading_order(RECIPE, RETAIN, "whole", epoch).split(RECIPE.batch_size):
            step += 1
            assert told.names(step) == [names[place] for place in batch.tolist()]
    assert step == len(told) == 28
    assert [begin for begin, _ in told.segments] == [0, 7, 14, 21]
    assert told.contract.recipe == RECIPE
    assert told.contract.rows == len(RETAIN)
    assert told.contract.data_root == data_root(RETAIN, SALT)


def test_the_last_step_is_kept_even_where_none_is_due(tmp_path):
    trained = record(RECIPE, RETAIN, tmp_path / "t", every=9)
    told = Transcript.open(tmp_path / "t")
    assert sorted(told.kept) == [0, 9, 18, 27, 28]
    assert told.final == trained.digest()


def test_the_same_training_and_salt_give_the_same_transcript_to_the_byte(folder, tmp_path):
    record(RECIPE, RETAIN.select(torch.arange(len(RETAIN)).flip(0)), tmp_path / "t", every=EVERY, salt=SALT)
    one, two = Transcript.open(folder), Transcript.open(tmp_path / "t")
    assert one.commitment == two.commitment


def test_without_a_salt_a_fresh_one_is_drawn(tmp_path):
    rows = RETAIN.select(range(40))
    salts = set()
    for name in "ab":
        record(RECIPE, rows, tmp_path / name)
        salts.add(Transcript.open(tmp_path / name).contract.salt)
    assert len(salts) == 2


def test_the_folder_appears_whole_or_not_at_all(tmp_path):
    def interrupt(stage, done, steps):
        assert not (tmp_path / "t").exists()
        raise KeyboardInterrupt

    with pytest.raises(Stopped, match="no transcript was left"):
        record(RECIPE, RETAIN, tmp_path / "t", report=interrupt)
    assert os.listdir(tmp_path) == []


def test_shards_that_are_interrupted_leave_nothing(tmp_path):
    def interrupt(stage, done, steps):
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        record(replace(RECIPE, epochs=4, sharding=Sharding(shards=2)), RETAIN, tmp_path / "t", report=interrupt)
    assert os.listdir(tmp_path) == []


def test_a_sharded_training_leaves_one_transcript_a_shard_and_a_shard_can_be_recorded_alone(tmp_path):
    recipe = replace(RECIPE, sharding=Sharding(shards=3, salt="s"))
    trained = record(recipe, RETAIN, tmp_path / "t", every=EVERY, salt=SALT)
    assert trained.digest() == train(recipe, RETAIN).digest()
    assert sorted(os.listdir(tmp_path / "t")) == ["part-0000", "part-0001", "part-0002"]
    rows = shards_of(RETAIN, recipe.sharding)[1]
    alone = record(recipe.part(1), rows, tmp_path / "one", every=EVERY, salt=SALT, stage="slice-0")
    assert alone.digest() == trained.parts[1].digest()
    one, two = Transcript.open(tmp_path / "one"), Transcript.open(tmp_path / "t" / "part-0001")
    assert one.commitment == two.commitment


def test_a_shard_without_rows_leaves_no_transcript(tmp_path):
    recipe = replace(RECIPE, sharding=Sharding(shards=3, salt="s"))
    rows = RETAIN.of_owner(RETAIN.owners[0])
    with pytest.warns(ShardWarning):
        trained = record(recipe, rows, tmp_path / "t")
    with pytest.warns(ShardWarning):
        assert trained.digest() == train(recipe, rows).digest()
    assert len(os.listdir(tmp_path / "t")) == 1


def test_what_cannot_be_recorded_is_refused_before_any_work(tmp_path):
    for recipe, match in (
        (replace(RECIPE, pruning=Pruning(sparsity=0.5)), "pruned"),
        (replace(RECIPE, sharding=Sharding(shards=2, slices=2)), "one slice"),
    ):
        with pytest.raises(Unsupported, match=match):
            record(recipe, RETAIN, tmp_path / "t")
    with pytest.raises(EmptyRetain):
        record(RECIPE, RETAIN.select([]), tmp_path / "t")
    with pytest.raises(Misuse, match="every"):
        record(RECIPE, RETAIN, tmp_path / "t", every=0)
    with pytest.raises(Misuse, match="salt"):
        record(RECIPE, RETAIN, tmp_path / "t", salt="short")
    assert os.listdir(tmp_path) == []
    (tmp_path / "t").mkdir()
    for recipe in (RECIPE, replace(RECIPE, sharding=Sharding(shards=2))):
        with pytest.raises(Misuse, match="there already"):
            record(recipe, RETAIN, tmp_path / "t")


def test_a_certified_model_gets_no_transcript(tmp_path):
    trained = train(RECIPE, RETAIN.select(range(40)))
    release = GaussianNoise(parameters=("head.weight",), sensitivity=1.0, sigma=1.0)
    noisy = replace(trained, releases=(release,), standing=Claim.CERTIFIED)
    refuse_certified(trained)
    for one in (noisy, replace(trained, secret={"w": torch.zeros(1)}), replace(trained, parts=(noisy,))):
        with pytest.raises(Impossible, match="replayable noise"):
            refuse_certified(one)
    recorder = Recorder(tmp_path / "t", RECIPE, RETAIN)
    module, optimiser = torch.nn.Linear(1, 1), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    recorder.begin(module, optimiser)
    with pytest.raises(Impossible, match="replayable noise"):
        recorder.finish(noisy)
    recorder.abandon()
    assert os.listdir(tmp_path) == []


def test_a_recorder_is_used_in_its_order(tmp_path):
    recorder = Recorder(tmp_path / "t", RECIPE, RETAIN)
    module, optimiser = torch.nn.Linear(1, 1), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for call in (recorder.finish, lambda: recorder.step(RETAIN, torch.tensor([0]), module, optimiser)):
        with pytest.raises(Misuse, match="begin"):
            call()
    recorder.begin(module, optimiser)
    with pytest.raises(Misuse, match="begun already"):
        recorder.begin(module, optimiser)
    recorder.abandon()


# Folders of strangers


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


def test_a_pickle_is_refused_and_never_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    for name in (checkpoint_name(7), "steps.safetensors", "extra.pkl"):
        place = copied(folder, tmp_path / name)
        (place / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UnreadableFile, match=r"pickle|no transcript's"):
            Transcript.open(place)
        torch.save(Bomb(), place / name)
        with pytest.raises(UnreadableFile, match=r"pickle|no transcript's"):
            Transcript.open(place)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # noqa: S301
    assert (tmp_path / "exploded").exists()  # it would have gone off


def spoil_json(change):
    def spoil(place):
        path = place / "transcript.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return spoil


def spoil_steps(change):
    def spoil(place):
        pages = Pages(place)
        change(pages.steps)
        pages.write(place)

    return spoil


def link_to(name):
    def spoil(place):
        (place / name).rename(place.parent / "elsewhere")
        (place / name).symlink_to(place.parent / "elsewhere")

    return spoil


STRANGE = {
    "no manifest": lambda place: (place / "transcript.json").unlink(),
    "no JSON": lambda place: (place / "transcript.json").write_text("{"),
    "deep JSON": lambda place: (place / "transcript.json").write_text("[" * 100_000),
    "a list": lambda place: (place / "transcript.json").write_text("[]"),
    "other format": spoil_json(lambda data: data.update(format="expunge-transcript/9")),
    "more fields": spoil_json(lambda data: data.update(more=1)),
    "no contract": spoil_json(lambda data: data.update(contract=[])),
    "contract without a field": spoil_json(lambda data: data["contract"].pop("threads")),
    "recipe of text": spoil_json(lambda data: data["contract"].update(recipe="mlp")),
    "recipe with more": spoil_json(lambda data: data["contract"]["recipe"].update(code="x")),
    "recipe without a model": spoil_json(lambda data: data["contract"]["recipe"].pop("model")),
    "rows of text": spoil_json(lambda data: data["contract"].update(rows="many")),
    "true threads": spoil_json(lambda data: data["contract"].update(threads=True)),
    "short salt": spoil_json(lambda data: data["contract"].update(salt="aa")),
    "coin of text": spoil_json(lambda data: data["contract"].update(coin="heads")),
    "coin of numbers": spoil_json(lambda data: data["contract"].update(coin={"commitments": 1, "nonce": 2})),
    "checkpoints as a list": spoil_json(lambda data: data.update(checkpoints=[])),
    "no first checkpoint": spoil_json(lambda data: data["checkpoints"].pop("0")),
    "checkpoint before the first": spoil_json(lambda data: data["checkpoints"].update({"-1": "00" * 32})),
    "digest too short": spoil_json(lambda data: data["checkpoints"].update({"0": "00"})),
    "checkpoint that is missing": spoil_json(lambda data: data["checkpoints"].update({"9": "00" * 32})),
    "checkpoint that is not listed": spoil_json(lambda data: data["checkpoints"].pop("7")),
    "last step not kept": lambda place: (
        spoil_json(lambda data: data["checkpoints"].pop("28"))(place),
        (place / checkpoint_name(28)).unlink(),
    ),
    "a folder within": lambda place: (place / "more").mkdir(),
    "a link": link_to("steps.safetensors"),
    "torn steps": lambda place: (place / "steps.safetensors").write_bytes(b"abc"),
    "torn checkpoint": lambda place: (place / checkpoint_name(7)).write_bytes(b"abc"),
    "more arrays": spoil_steps(lambda steps: steps.update(more=torch.zeros(1))),
    "other dtype": spoil_steps(lambda steps: steps.update(batch=steps["batch"].long())),
    "narrow rows": spoil_steps(lambda steps: steps.update(rows=steps["rows"][:, :31].contiguous())),
    "a place beyond the rows": spoil_steps(lambda steps: steps["batch"].fill_(10_000)),
    "a place before the rows": spoil_steps(lambda steps: steps["batch"].fill_(-1)),
    "an empty step": spoil_steps(lambda steps: steps["sizes"].fill_(0)),
    "sizes that do not add up": spoil_steps(lambda steps: steps["sizes"].fill_(2**31 - 1)),
    "a link too few": spoil_steps(lambda steps: steps.update(links=steps["links"][1:].contiguous())),
    "a digest too few": spoil_steps(lambda steps: steps.update(digests=steps["digests"][1:].contiguous())),
}


@pytest.mark.parametrize("spoil", STRANGE.values(), ids=STRANGE)
def test_a_strange_folder_is_refused_in_one_line(folder, tmp_path, spoil):
    place = copied(folder, tmp_path)
    Transcript.open(place)
    spoil(place)
    with pytest.raises(UnreadableFile) as refused:
        Transcript.open(place)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UnreadableFile, match="is no transcript"):
        Transcript.open(tmp_path / "none")


def test_a_checkpoint_that_is_not_kept_cannot_be_asked_for(folder):
    with pytest.raises(Misuse, match="no checkpoint"):
        Transcript.open(folder).checkpoint(5)


def test_the_size_on_disk_is_counted(folder):
    sizes = Transcript.open(folder).size_mb()
    total = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    assert sizes["all"] == pytest.approx(total) == pytest.approx(sizes["steps"] + sizes["checkpoints"])
    assert sizes["checkpoints"] > sizes["steps"] > 0


def test_a_contract_survives_json(folder):
    contract = Transcript.open(folder).contract
    assert Contract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


# Commitments to rows


def test_a_commitment_depends_on_owner_content_and_salt_and_not_on_the_id():
    one = RETAIN.select([0])
    renamed = Records(one.x, one.y, ["other"], one.owners, classes=10)
    elsewhere = Records(one.x, one.y, one.ids, ["other"], classes=10)
    relabelled = Records(one.x, (one.y + 1) % 10, one.ids, one.owners, classes=10)
    name = row_commitments(one, SALT)
    assert row_commitments(renamed, SALT) == name
    assert name not in (row_commitments(elsewhere, SALT), row_commitments(relabelled, SALT))
    assert row_commitments(one, "00" * 16) != name


def test_the_data_root_is_of_a_multiset():
    one = RETAIN.select([0, 1])
    copy = Records(one.x[:1], one.y[:1], ["copy"], one.owners[:1], classes=10)
    assert data_root(one, SALT) == data_root(one.select([1, 0]), SALT)
    assert data_root(one, SALT) != data_root(one.plus(copy), SALT)
    assert data_root(one.plus(copy), SALT).startswith("3:")
    names = row_commitments(FORGET, SALT)
    assert len(set(numbered(names * 3))) == 3 * len(names)
