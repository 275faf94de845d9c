"""The witness's place in training: told of every row of every step, before the step, as the bytes that were read."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from expunge import FineTune, Recipe, Records, Request, Retrain, Sharding, Sisa, generator, train
from expunge.core.errors import Stopped
from expunge.learn.build import build
from expunge.learn.loop import Keep, Tally, fit


@dataclass
class Noting(Tally):
    """Notes which rows a step is made on, and what the parameters were then."""

    steps: list = field(default_factory=list)
    rows: dict = field(default_factory=dict)
    module: torch.nn.Module | None = None
    states: list = field(default_factory=list)

    def saw(self, records, positions, x, y):
        super().saw(records, positions, x, y)
        self.steps.append(tuple(records.ids[i] for i in positions.tolist()))
        for place, position in enumerate(positions.tolist()):
            self.rows[records.ids[position]] = (x[place].clone(), y[place].clone())
        if self.module is not None:
            self.states.append(torch.cat([p.detach().flatten().clone() for p in self.module.parameters()]))


def records(dtype=torch.uint8):
    x = torch.randint(0, 256, (50, 4), generator=generator(3)).to(dtype)
    return Records(x, [i % 3 for i in range(50)], [f"r{i}" for i in range(50)], [f"o{i % 10}" for i in range(50)])


RECIPE = Recipe(model="softmax", epochs=3, batch_size=8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
def test_every_row_is_seen_once_an_epoch_with_the_bytes_that_are_stored(dtype):
    rows, tally = records(dtype), Noting()
    trained = train(RECIPE, rows, keep=Keep(batches=True), tally=tally)
    assert Counter(name for step in tally.steps for name in step) == dict.fromkeys(rows.ids, 3)
    assert tuple(tally.steps) == trained.log.batches
    assert (tally.rows_read, tally.gradients) == (150, 150)
    for place, name in enumerate(rows.ids):
        x, y = tally.rows[name]
        assert x.dtype is dtype
        assert torch.equal(x, rows.x[place])
        assert int(y) == int(rows.y[place])


def test_it_is_told_before_the_step_is_made():
    rows = records()
    recipe = RECIPE.completed(rows)
    module = build(recipe)
    tally = Noting(module=module)
    first = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    fit(module, recipe, rows, tally=tally)
    assert torch.equal(tally.states[0], first)
    assert not torch.equal(tally.states[1], first)


def test_it_changes_nothing_of_what_is_trained():
    rows = records()
    assert train(RECIPE, rows, tally=Noting()).digest() == train(RECIPE, rows).digest()


def test_rows_that_are_streamed_are_seen_as_they_are_handed_out():
    plain = records()

    class Stream:
        def __init__(self):
            self.lies = False

        def __len__(self):
            return len(plain)

        def __getitem__(self, place):
            return plain.x[place] + (1 if self.lies and place == 7 else 0), plain.y[place]

    source, tally = Stream(), Noting()
    streamed = Records.from_dataset(source, plain.ids, plain.owners, classes=3)
    source.lies = True
    train(RECIPE, streamed, tally=tally)
    assert torch.equal(tally.rows["r7"][0], plain.x[7] + 1)
    assert torch.equal(tally.rows["r8"][0], plain.x[8])


@pytest.mark.parametrize("slices", [1, 2])
def test_of_shards_only_the_touched_ones_are_read_again_and_all_of_their_rows(slices):
    rows, tally = records(), Noting()
    trained = train(Recipe(model="softmax", epochs=2, batch_size=8, sharding=Sharding(shards=2, slices=slices)), rows)
    answer = Sisa()(trained, rows, Request.remove_owner("o3"), rng=generator(0), tally=tally)
    sharding = trained.recipe.sharding
    home = sharding.shard_of("o3")
    stays = {i for i, o in zip(rows.ids, rows.owners, strict=True) if sharding.shard_of(o) == home and o != "o3"}
    assert {name for step in tally.steps for name in step} == stays == answer.trained.parts[home].ids


@pytest.mark.parametrize("method", [Retrain(), FineTune(epochs=1, lr=0.01)], ids=["retrain", "fine-tune"])
def test_no_removed_row_is_seen(method):
    rows, tally = records(), Noting()
    answer = method(train(RECIPE, rows), rows, Request.remove_owner("o3"), rng=generator(0), tally=tally)
    seen = {name for step in tally.steps for name in step}
    if isinstance(method, Retrain):  # others tell how many rows they read, not which: they are not witnessed
        assert seen == answer.trained.ids
    assert not seen & set(rows.of_owner("o3").ids)
    assert tally.rows_read == answer.cost.rows_read > 0


def test_after_an_interruption_only_what_is_read_from_then_on_is_seen(tmp_path):
    rows, first = records(), Noting()

    def stop(stage, done, steps):
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        train(RECIPE, rows, resume=tmp_path / "saved", save_every=1, report=stop, tally=first)
    second = Noting()
    trained = train(RECIPE, rows, resume=tmp_path / "saved", save_every=1, tally=second)
    assert trained.digest() == train(RECIPE, rows).digest()
    assert len(second.steps) < 21 == len(train(RECIPE, rows, keep=Keep(batches=True)).log.batches)
