"""Training that is killed and goes on: the bytes and the log of a training that nobody disturbed."""

import json
import random
import signal
from dataclasses import replace

import pytest
import torch

from expunge.core import store
from expunge.core.coins import generator
from expunge.core.errors import Misuse, Stopped
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.learn import resume as module
from expunge.learn.build import build
from expunge.learn.loop import Keep, Tally, fit
from expunge.learn.resume import Saver
from expunge.learn.training import train

RECIPES = {
    "momentum": {"model": "mlp", "model_args": {"hidden": [6]}, "schedule": {"kind": "cosine"}},
    "adam": {"model": "mlp", "optimiser": "adam", "optimiser_args": {"lr": 0.01}, "weight_decay": 0.01},
    "dropout": {"model": "code"},
    "batch norm": {"model": "mlp", "model_args": {"hidden": [6], "norm": "batch"}, "dtype": "float64"},
    "iterative": {
        "model": "code",
        "optimiser_args": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
        "weight_decay": 0.01,
        "schedule": {"kind": "cosine"},
        "pruning": {"sparsity": 0.5, "rounds": 2, "rewind": 1},
    },
    "synflow": {
        "model": "mlp",
        "model_args": {"hidden": [6], "norm": "batch"},
        "optimiser": "adam",
        "optimiser_args": {"lr": 0.01},
        "pruning": {"sparsity": 0.5, "by": "synflow", "iterations": 5},
    },
    "shards": {"model": "code", "sharding": {"shards": 3, "slices": 2, "salt": "s"}},
    "adam shards": {
        "model": "softmax",
        "optimiser": "adam",
        "optimiser_args": {"lr": 0.01},
        "sharding": {"shards": 2, "salt": "s"},
    },
}

# Trains in a process of its own; told `die_at`, it kills itself in the middle of the step that reads that row.
CODE = """
import os, random, signal
import torch
import expunge
from expunge.core.digest import digest_tensors
from expunge.learn.loop import Tally

class Bomb(Tally):
    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "rows_read" and given.get("die_at") and value >= given["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

def drops(shape, outputs):
    return torch.nn.Sequential(torch.nn.Linear(shape[0], 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, outputs))

given["recipe"]["model"] = {"code": expunge.allow_code(drops)}.get(given["recipe"]["model"], given["recipe"]["model"])
recipe = expunge.Recipe.from_json({"epochs": 6, "batch_size": 16, **given["recipe"]})
x = torch.randn(90, 4, generator=expunge.generator(0))
rows = list(range(90))
random.Random(given.get("shuffle")).shuffle(rows)
x, y, owners = x[rows], [i % 3 for i in rows], [f"o{i % 13}" for i in rows]
if given.get("streamed"):
    records = expunge.Records.from_dataset(list(zip(x, y)), owners=owners)
else:
    records = expunge.Records(x, y, owners=owners)
how = {"resume": given.get("folder"), "save_every": given.get("every", 4), "tally": Bomb()}
trained = expunge.train(recipe, records, keep=expunge.Keep(every=7), **how)
logs = [part.log for part in trained.parts or (trained,)]
slices = [digest_tensors(state) for log in logs for state in log.slices]
checkpoints = [[step, digest_tensors(state)] for log in logs for step, state in log.checkpoints.items()]
answer = [trained.digest(), [log.losses for log in logs], [log.steps for log in logs], slices, checkpoints]
"""


@pytest.fixture(scope="module")
def undisturbed(forks):
    return {name: forks(CODE, recipe=recipe) for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_training_goes_on_to_the_same_bytes(forks, undisturbed, tmp_path, name):
    """Killed three times on its way, each time at a random moment after another save, in real processes."""
    coin = random.Random()
    total = undisturbed[name][2]
    rows_each_life = 90 * (16 if name == "iterative" else 6) // 4
    folder, deaths = tmp_path / "resume", []
    for life in range(4):
        die_at = coin.randint(4 * 16 + 1, rows_each_life) if life < 3 else None
        got = forks.run(
            CODE, recipe=RECIPES[name], folder=str(folder), every=coin.randint(1, 3), die_at=die_at, shuffle=life
        )
        if die_at:
            assert got == {"signal": signal.SIGKILL}, (got, deaths)
            assert list(folder.rglob("*.safetensors")), deaths  # there is something to go on from
            deaths.append(die_at)
    assert got == {"answer": undisturbed[name]}, f"killed after {deaths} rows"
    assert sum(total) >= 36
    assert not folder.exists()


@pytest.mark.soak
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("every", [1, 5, 11])
def test_a_training_killed_at_any_step_goes_on_to_the_same_bytes(forks, undisturbed, tmp_path, name, every):
    for die_at in range(1, 90 * (16 if name == "iterative" else 6), 23):
        folder = str(tmp_path / f"{die_at}")
        assert forks.run(CODE, recipe=RECIPES[name], folder=folder, every=every, die_at=die_at) == {"signal": 9}
        assert forks(CODE, recipe=RECIPES[name], folder=folder, every=every) == undisturbed[name], die_at


def test_a_killed_training_on_a_data_set_goes_on_to_the_same_bytes(forks, undisturbed, tmp_path):
    """The loader of a data set must not draw from the coins that dropout draws from."""
    folder = str(tmp_path / "resume")
    given = {"recipe": RECIPES["dropout"], "streamed": True}
    assert forks.run(CODE, **given, folder=folder, every=2, die_at=200) == {"signal": signal.SIGKILL}
    assert forks(CODE, **given, folder=folder, every=2) == undisturbed["dropout"]


def records(n=40):
    return Records(
        torch.randn(n, 4, generator=generator(0)), [i % 2 for i in range(n)], owners=[f"o{i % 7}" for i in range(n)]
    )


WANTED = Recipe(model="softmax", epochs=4, batch_size=8)


class Halt(Exception):
    """Stands for a crash."""


class Bomb(Tally):
    """Crashes when so many rows are read."""

    limit = 10**9

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "rows_read" and value >= self.limit:
            raise Halt


def interrupted(folder, rows=100, wanted=WANTED, given=None, **more):
    bomb = Bomb()
    bomb.limit = rows
    with pytest.raises(Halt):
        train(wanted, given or records(), resume=folder, save_every=3, tally=bomb, **more)


def test_another_training_in_the_same_folder_is_refused(tmp_path):
    interrupted(tmp_path / "r")
    rows = records()
    others = [
        (replace(WANTED, seed=1), rows, Keep()),
        (WANTED, rows.without(["3"]), Keep()),
        (WANTED, Records(rows.x + 1, rows.y, owners=rows.owners), Keep()),
        (WANTED, Records(rows.x, 1 - rows.y, owners=rows.owners), Keep()),
        (WANTED, Records(rows.x, rows.y), Keep()),  # owners decide the order, and the shards
        (WANTED, rows, Keep(every=2)),  # the checkpoints before the crash would be missing
    ]
    for wanted, given, keep in others:
        with pytest.raises(Misuse, match=r"r holds the state of another training \(.*\); resume into a new folder$"):
            train(wanted, given, resume=tmp_path / "r", keep=keep)
    torch.set_num_threads(2)
    try:
        with pytest.raises(Misuse, match=r"thread count"):
            train(WANTED, rows, resume=tmp_path / "r")
    finally:
        torch.set_num_threads(1)
    renamed = Records(rows.x, rows.y, [f"id{i}" for i in range(40)], rows.owners).select(range(39, -1, -1))
    assert train(WANTED, renamed, resume=tmp_path / "r").digest() == train(WANTED, rows).digest()


@pytest.mark.parametrize("name", ["thesis.tex", "training.json", ".hidden"])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(Misuse, match=r"resume into a new folder$"):
        train(WANTED, records(), resume=tmp_path)
    assert (tmp_path / name).read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_empty_folder_and_what_an_early_crash_leaves_are_taken(tmp_path):
    (tmp_path / ".training.json.0a1b2c3d.part").write_text("{")
    train(WANTED, records(), resume=tmp_path)
    (tmp_path / "empty").mkdir(parents=True)
    train(WANTED, records(), resume=tmp_path / "empty")


@pytest.mark.parametrize("every", [0, -1])
def test_saving_needs_a_number_of_steps(tmp_path, every):
    with pytest.raises(Misuse, match=rf"^save_every must be >= 1, got {every}$"):
        train(WANTED, records(), resume=tmp_path / "r", save_every=every)


@pytest.mark.parametrize("rows", [1, 25, 40, 41, 100, 160])
def test_checkpoints_batches_and_losses_of_a_resumed_training(tmp_path, rows):
    keep = Keep(batches=True, every=2)
    interrupted(tmp_path / "r", rows, keep=keep)
    again, whole = train(WANTED, records(), resume=tmp_path / "r", keep=keep), train(WANTED, records(), keep=keep)
    for name in ("steps", "rows_read", "threads", "losses", "batches"):
        assert getattr(again.log, name) == getattr(whole.log, name)
    assert list(again.log.checkpoints) == list(whole.log.checkpoints) == list(range(2, 21, 2))
    for step, state in whole.log.checkpoints.items():
        assert all(torch.equal(value, again.log.checkpoints[step][name]) for name, value in state.items())
    assert again.digest() == whole.digest()


PRUNED = Recipe(
    model="mlp",
    model_args={"hidden": [6]},
    optimiser_args={"lr": 0.05, "momentum": 0.9},
    weight_decay=0.01,
    epochs=4,
    batch_size=8,
    pruning=Pruning(sparsity=0.6, rounds=2, rewind=2),
)


@pytest.mark.parametrize("save_every", [1, 3, 100])
def test_a_pruned_training_that_is_interrupted_in_any_stage_goes_on_to_the_same_bytes(tmp_path, save_every):
    """Of 320 rows, the dense training reads 160 (rewound to after 80), and each sparse one 80."""
    keep = Keep(batches=True, every=4)
    whole = train(PRUNED, records(), keep=keep)
    for rows in (79, 81, 161, 200, 241, 319):
        folder, bomb = tmp_path / str(rows), Bomb()
        bomb.limit = rows
        with pytest.raises(Halt):
            train(PRUNED, records(), resume=folder, save_every=save_every, keep=keep, tally=bomb)
        seen = Tally()
        again = train(PRUNED, records(), resume=folder, save_every=save_every, keep=keep, tally=seen)
        assert again.digest() == whole.digest()
        for name in ("steps", "rows_read", "losses", "batches"):
            assert getattr(again.log, name) == getattr(whole.log, name)
        assert list(again.log.checkpoints) == list(whole.log.checkpoints) == [4, 8]
        for step, state in whole.log.checkpoints.items():
            assert all(torch.equal(value, again.log.checkpoints[step][name]) for name, value in state.items())
        finished = 160 * (rows > 160) + 80 * (rows > 240)  # trainings that were done before are not done again
        assert seen.rows_read <= 320 - max(finished, rows - 8 * (save_every + 1) if save_every < 100 else 0)
        assert not folder.exists()


def test_another_pruning_in_the_same_folder_is_refused(tmp_path):
    interrupted(tmp_path / "r", wanted=PRUNED)
    for other in (replace(PRUNED, pruning=None), replace(PRUNED, pruning=Pruning(sparsity=0.6, rewind=2))):
        with pytest.raises(Misuse, match=r"r holds the state of another training"):
            train(other, records(), resume=tmp_path / "r")


def test_a_crash_while_saving_leaves_what_was_saved_before(tmp_path, monkeypatch):
    writes = []

    def torn(handle):
        writes.append(handle)
        if len(writes) == 9:
            raise Halt

    fsync = store.os.fsync
    monkeypatch.setattr(store.os, "fsync", lambda handle: (torn(handle), fsync(handle)))
    with pytest.raises(Halt):
        train(WANTED, records(), resume=tmp_path / "r", save_every=1, keep=Keep(every=1))
    monkeypatch.undo()
    again = train(WANTED, records(), resume=tmp_path / "r", keep=Keep(every=1))
    assert again.digest() == train(WANTED, records()).digest()
    assert list(again.log.checkpoints) == list(range(1, 21))


@pytest.mark.parametrize("steps", [7, 10, 12])
def test_a_finished_partial_training_is_not_trained_again(tmp_path, steps):
    wanted = WANTED.completed(records())
    modules = [build(wanted) for _ in range(3)]
    whole = fit(modules[0], wanted, records(), steps=steps)
    saver = Saver(tmp_path / "r", wanted, records(), every=3)
    for module_ in modules[1:]:
        tally = Tally()
        log = fit(module_, wanted, records(), steps=steps, saver=saver, tally=tally)
        assert (log.steps, log.losses, log.rows_read) == (whole.steps, whole.losses, whole.rows_read)
        assert all(torch.equal(a, b) for a, b in zip(module_.parameters(), modules[0].parameters(), strict=True))
    assert tally.rows_read == 0


def test_finished_shards_are_not_trained_again(tmp_path):
    wanted = replace(WANTED, sharding=Sharding(shards=3, salt="s"))
    interrupted(tmp_path / "r", rows=120, wanted=wanted)
    tally = Tally()
    again = train(wanted, records(), resume=tmp_path / "r", tally=tally)
    assert again.digest() == train(wanted, records()).digest()
    assert tally.rows_read < 160 - 60


def test_what_is_saved_holds_no_row_and_no_id(tmp_path):
    secret = Records(
        torch.full((40, 4), 0.123456), [0, 1] * 20, [f"id-{i}-secret" for i in range(40)], ["owner-secret"] * 40
    )
    interrupted(tmp_path / "r", given=secret)
    written = b"".join(path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert torch.full((4,), 0.123456).numpy().tobytes() not in written
    assert b"secret" not in written
    assert json.loads((tmp_path / "r" / "training.json").read_text())["format"] == "expunge-resume/1"


def test_an_interrupt_keeps_the_last_saved_state(tmp_path, monkeypatch):
    calls = []

    def interrupt(self, stage, *rest):
        calls.append(stage)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(self, stage, *rest)

    save = module.Saver.save
    monkeypatch.setattr(module.Saver, "save", interrupt)
    with pytest.raises(Stopped, match=r"^interrupted at step 9; go on with the same command and --resume"):
        train(WANTED, records(), resume=tmp_path / "r", save_every=3)
    monkeypatch.undo()
    assert train(WANTED, records(), resume=tmp_path / "r").digest() == train(WANTED, records()).digest()
