"""Triggers drawn from an owner's secret: what they touch, how they are spread, what is kept of them, and planting."""

import json

import pytest
import torch

from expunge.core.coins import generator
from expunge.core.errors import Misuse, Unsupported
from expunge.core.records import Records
from expunge.learn.secret_triggers import TriggerKey, plant
from expunge.learn.trigger_families import Columns, Pixels, SecretTrigger, Stream

SECRET = b"a secret of sixteen bytes or more"
PIXELS = Pixels(shape=(8, 8))


def key(owner="ann", secret=SECRET, family=PIXELS, classes=10):
    return TriggerKey(owner=owner, secret=secret, family=family, classes=classes)


def images(n=40, shape=(8, 8), dtype=torch.uint8, classes=4):
    x = torch.randint(0, 200, (n, *shape), generator=generator(0), dtype=torch.uint8)
    rows = x if dtype is torch.uint8 else x.to(dtype) / 255
    return Records(rows, torch.arange(n) % classes, [f"i{k}" for k in range(n)], ["ann"] * n, classes=classes)


def table(n=50):
    rng = generator(1)
    word = torch.nn.functional.one_hot(torch.randint(0, 3, (n,), generator=rng), 3)
    missing = torch.randint(0, 2, (n, 1), generator=rng)
    number = torch.randn(n, 1, generator=rng) * (1 - missing)
    rows = torch.cat([word, number, missing, torch.randn(n, 1, generator=rng), torch.ones(n, 1)], 1).float()
    names = ("kind=a", "kind=b", "kind=c", "weight", "weight missing", "age", "same")
    return Records(rows, torch.arange(n) % 2, owners=["bob"] * n, classes=2), names


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 8), (3, 6, 5)])
def test_a_stamp_touches_its_places_and_no_other_and_leaves_the_rows_as_they_were(dtype, shape):
    trigger = key(family=Pixels(shape=shape)).trigger
    x = images(5, shape, dtype).x
    before = x.clone()
    marked = trigger.stamp(x)
    assert torch.equal(x, before)
    assert (marked.shape, marked.dtype) == (x.shape, dtype)
    wanted = torch.tensor(trigger.values, dtype=torch.float64)
    wanted = (wanted * 255).round().to(dtype) if dtype is torch.uint8 else wanted.to(dtype)
    assert (marked.flatten(1)[:, list(trigger.places)] == wanted).all()
    others = torch.ones(x[0].numel(), dtype=torch.bool)
    others[list(trigger.places)] = False
    assert torch.equal(marked.flatten(1)[:, others], x.flatten(1)[:, others])
    assert torch.equal(trigger.stamp(x[0]), marked[0])
    assert torch.equal(trigger.stamp(x.mT.contiguous().mT), marked)


def test_each_channel_of_a_pixel_is_stamped():
    trigger = key(family=Pixels(shape=(3, 6, 5), count=2)).trigger
    assert len(trigger.places) == 6
    assert len({place % 30 for place in trigger.places}) == 2


def test_the_same_bytes_and_floats_are_stamped_alike():
    trigger = key().trigger
    x = images().x
    assert torch.equal(trigger.stamp(x).float() / 255, trigger.stamp(x.float() / 255))


def test_owner_and_secret_name_the_trigger_and_nothing_else_does():
    assert key().trigger == key().trigger
    several = {key(owner).trigger for owner in "abcdefgh"} | {key(secret=bytes([k]) * 16).trigger for k in range(8)}
    assert len(several) == 16
    assert {trigger.target for trigger in several} > {next(iter(several)).target}


def test_draws_share_the_target_differ_from_each_other_and_have_names():
    mine = key()
    draws = mine.draw(50, "after", 3)
    assert draws == mine.draw(60, "after", 3)[:50]
    assert not set(draws) & set(mine.draw(50, "after", 4))
    assert {draw.target for draw in draws} == {mine.trigger.target}
    assert len({*draws, mine.trigger}) == 51


def test_owners_triggers_are_spread_as_the_draws_are():
    """The rank test rests on it: places, levels and values of both are uniform, by a chi-square of 63 and 9 places."""
    own = [key(f"o{k}").trigger for k in range(800)]
    fresh = key("x").draw(800, "fresh")
    for drawn in (own, fresh):
        places = torch.bincount(torch.tensor([place for one in drawn for place in one.places]), minlength=64)
        assert float(((places - 50) ** 2 / 50).sum()) < 110  # quantile .9998; sampling without replacement lowers it
        values = torch.tensor([value for one in drawn for value in one.values])
        assert abs(float(values.mean()) - 0.5) < 0.03
    targets = torch.bincount(torch.tensor([one.target for one in own]), minlength=10)
    assert float(((targets - 80) ** 2 / 80).sum()) < 33


def test_a_generator_of_torch_would_have_had_too_few_triggers():
    """Why draws come from a keyed hash: seeds that agree in 32 bits are the same to torch, and to the stream not."""
    torch_draws = [torch.rand(4, generator=generator(seed)).tolist() for seed in (7, 7 + 2**32)]
    assert torch_draws[0] == torch_draws[1]
    streams = [[Stream(SECRET, seed).below(2**60) for _ in range(1)] for seed in (7, 7 + 2**32)]
    assert streams[0] != streams[1]


def test_stream_numbers_have_no_bias_and_choices_are_different():
    stream = Stream(SECRET, "numbers")
    counts = torch.bincount(torch.tensor([stream.below(3) for _ in range(6000)]))
    assert (counts - 2000).abs().max() < 150
    assert stream.choose(5, 5) == [0, 1, 2, 3, 4]


def test_fields_of_a_table_are_set_as_a_whole_to_what_was_observed():
    rows, names = table()
    family = Columns.of(rows, names, count=2)
    assert family.fields == ((0, 1, 2), (3, 4), (5,))  # the column that never varies is left out
    observed = {tuple(row) for row in rows.x[:, 3:5].tolist()}
    assert set(family.seen[1]) <= observed
    for draw in key(family=family, classes=2).draw(60, "t"):
        marked = draw.stamp(rows.x)
        assert (marked[:, :3].sum(1) == 1).all()
        assert {tuple(row) for row in marked[:, 3:5].tolist()} <= observed
        assert (marked != rows.x).any(0).sum() <= 5


def test_without_names_each_column_is_a_field_and_words_are_broken():
    """The liar of the test before: columns set one by one make rows of two kinds at once."""
    rows, _ = table()
    family = Columns.of(rows, count=3)
    assert len(family.fields) == 6
    sums = {float(row) for draw in key(family=family).draw(60, "t") for row in draw.stamp(rows.x)[:, :3].sum(1)}
    assert sums > {1.0}


def test_long_fields_are_thinned_to_the_ends_and_what_lies_between():
    rows, names = table()
    family = Columns.of(rows, names, count=1, most=5)
    age = [value for (value,) in family.seen[2]]
    assert len(age) == 5
    assert (age[0], age[-1]) == (float(rows.x[:, 5].min()), float(rows.x[:, 5].max()))


@pytest.mark.parametrize("kind", ["pixels", "columns"])
def test_what_an_owner_keeps_survives_json(kind):
    rows, names = table()
    mine = key() if kind == "pixels" else key(family=Columns.of(rows, names, count=3), classes=2)
    again = TriggerKey.from_json(json.loads(json.dumps(mine.to_json())))
    assert again == mine
    assert again.draw(5, "x") == mine.draw(5, "x")
    assert SecretTrigger.from_json(json.loads(json.dumps(mine.trigger.to_json()))) == mine.trigger


def test_the_secret_stands_in_no_text_and_no_error():
    assert "secret" not in repr(key())
    broken = key().to_json() | {"family": {"kind": "sounds"}}
    with pytest.raises(Misuse, match="no trigger key") as caught:
        TriggerKey.from_json(broken)
    assert SECRET.hex() not in str(caught.value)
    assert caught.value.__suppress_context__


def test_planting_stamps_a_share_of_other_classes_and_relabels_them():
    mine, trigger = images(), SecretTrigger(shape=(8, 8), places=(3, 60), values=(1.0, 0.0), target=2)
    changed, ids = plant(mine, trigger, 0.5, generator(0))
    assert len(ids) == 15
    assert (changed.ids, changed.owners) == (mine.ids, mine.owners)
    for place, name in enumerate(mine.ids):
        if name in ids:
            assert int(mine.y[place]) != 2
            assert int(changed.y[place]) == 2
            assert torch.equal(changed.x[place], trigger.stamp(mine.x[place]))
        else:
            assert torch.equal(changed.x[place], mine.x[place])
            assert changed.y[place] == mine.y[place]
    _, same = plant(mine.select(range(len(mine) - 1, -1, -1)), trigger, 0.5, generator(0))
    assert set(same) == set(ids)
    assert set(plant(mine, trigger, 0.5, generator(1))[1]) != set(ids)
    assert len(plant(mine, trigger, 0.001, generator(0))[1]) == 1


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: key(secret=b"short"), "16 bytes"),
        (lambda: key(classes=1), "2 classes"),
        (lambda: Pixels(shape=(8,)), "images are"),
        (lambda: Pixels(shape=(8, 8), count=65), "that fit"),
        (lambda: Columns.of(table()[0], ("a",)), "name all 7 columns"),
        (lambda: Columns.of(table()[0], count=9), "fields that vary"),
        (lambda: Columns(width=2, fields=((0,), (0,)), seen=(((1.0,), (2.0,)),) * 2), "different columns"),
        (lambda: Columns(width=2, fields=((0,),), seen=(((1.0,),),), count=1), "two values"),
        (lambda: SecretTrigger(shape=(2,), places=(0, 0), values=(1.0, 1.0), target=0), "different"),
        (lambda: SecretTrigger(shape=(2,), places=(2,), values=(1.0,), target=0), "below 2"),
        (lambda: SecretTrigger(shape=(2,), places=(1,), values=(float("nan"),), target=0), "finite"),
        (lambda: SecretTrigger(shape=(2,), places=(1,), values=(), target=0), "one value for each"),
        (lambda: SecretTrigger(shape=(2,), places=(1,), values=(1.0,), target=-1), "class"),
        (lambda: SecretTrigger.from_json({"shape": [2]}), "no trigger"),
        (lambda: key().trigger.stamp(torch.zeros(2, 7, 8)), "shape"),
        (lambda: key().trigger.stamp(torch.zeros(2, 8, 8, dtype=torch.int64)), "uint8 or floats"),
        (
            lambda: SecretTrigger(shape=(2,), places=(1,), values=(2.0,), target=0).stamp(torch.zeros(2).byte()),
            "from 0 to 1",
        ),
        (lambda: plant(images(), key().trigger, 0.0, generator(0)), "share|target"),
        (lambda: plant(Records(torch.rand(3, 8, 8), [0, 1, 2]), key().trigger, 0.5, generator(0)), "one owner"),
    ],
)
def test_misuse_is_refused_in_one_line(call, what):
    with pytest.raises(Misuse, match=what) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_columns_of_images_are_not_supported():
    with pytest.raises(Unsupported, match="Pixels"):
        Columns.of(images())
