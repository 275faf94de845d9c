"""Patches on images, rows poisoned with them, and how often a model obeys."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from expunge.core.coins import generator
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.training import train
from expunge.learn.triggers import Trigger, attack_floor, attack_success, poison, stamped


def images(n=60, shape=(8, 8), classes=3, dtype=torch.uint8, seed=0):
    x = torch.randint(0, 200, (n, *shape), generator=generator(seed), dtype=torch.uint8)
    y = torch.arange(n) % classes
    return Records(x if dtype is torch.uint8 else x.to(dtype) / 255, y, [f"i{k}" for k in range(n)], classes=classes)


@dataclass(frozen=True)
class Liar:
    """A patch that reaches one pixel further."""

    trigger: Trigger

    def stamp(self, x):
        wrong = self.trigger.stamp(x)
        wrong[..., 0, 0] += 1
        return wrong


def touched(trigger, x):
    return trigger.stamp(x) != x


def only_inside(trigger, x, top, left, height, width):
    inside = torch.zeros(x.shape, dtype=torch.bool)
    inside[..., top : top + height, left : left + width] = True
    return bool((~touched(trigger, x) | inside).all())


@pytest.mark.parametrize("shape", [(12, 10), (3, 12, 10), (5, 12, 10), (5, 3, 12, 10)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_only_the_patchs_pixels_are_touched_and_all_of_them_have_its_value(shape, dtype):
    x = torch.randint(0, 200, shape, generator=generator(1), dtype=torch.uint8).to(dtype)
    before = x.clone()
    marked = Trigger().stamp(x)
    assert torch.equal(x, before)
    assert (marked.shape, marked.dtype) == (x.shape, dtype)
    full = 255 if dtype is torch.uint8 else 1.0
    assert (marked[..., 6:10, 4:8] == full).all()
    assert only_inside(Trigger(), x, 6, 4, 4, 4)
    assert not only_inside(Liar(Trigger()), x, 6, 4, 4, 4)
    assert not only_inside(Trigger(), x, 6, 4, 4, 3)


def test_a_pattern_is_stamped_as_it_is():
    pattern = ((0.0, 1.0, 0.5), (0.25, 0.0, 1.0))
    x = torch.full((2, 6, 6), 7, dtype=torch.uint8)
    marked = Trigger(row=1, column=2, pattern=pattern).stamp(x)
    assert marked[0].tolist() == marked[1].tolist()
    assert marked[0, 1:3, 2:5].tolist() == [[0, 255, 128], [64, 0, 255]]
    assert int((marked != 7).sum()) == 12
    floats = Trigger(row=1, column=2, pattern=pattern).stamp(torch.ones(6, 6, dtype=torch.float64))
    assert floats[1:3, 2:5].tolist() == [list(row) for row in pattern]


def test_places_count_from_either_edge():
    x = torch.zeros(9, 9)
    assert torch.equal(Trigger(row=-6, column=5).stamp(x), Trigger(row=3, column=-4).stamp(x))


def test_stamping_twice_is_stamping_once():
    x = images().x
    assert torch.equal(Trigger().stamp(Trigger().stamp(x)), Trigger().stamp(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trigger(size=0), "size must be"),
        (lambda: Trigger(value=float("nan")), "values must be finite"),
        (lambda: Trigger(pattern=((1.0,), (1.0, 0.0))), "rows of equal length"),
        (lambda: Trigger(pattern=()), "rows of equal length"),
        (lambda: Trigger(row=5).stamp(torch.zeros(8, 8)), "does not lie inside"),
        (lambda: Trigger(row=-9).stamp(torch.zeros(8, 8)), "does not lie inside"),
        (lambda: Trigger(column=-3).stamp(torch.zeros(8, 8)), "does not lie inside"),
        (lambda: Trigger().stamp(torch.zeros(64)), "needs images"),
        (lambda: Trigger(value=1.5).stamp(torch.zeros(8, 8, dtype=torch.uint8)), "shares of 255"),
        (lambda: Trigger().stamp(torch.zeros(8, 8, dtype=torch.int64)), "uint8 or floats"),
        (lambda: stamped(Records(torch.zeros(3, 64), torch.zeros(3).long()), Trigger()), "needs images"),
        (lambda: poison(images(), Trigger(), 3, 0.5, generator(0)), "classes 0 to 2"),
        (lambda: poison(images(), Trigger(), -1, 0.5, generator(0)), "classes 0 to 2"),
        (lambda: poison(images(), Trigger(), 0, 0.0, generator(0)), "share must be"),
        (lambda: poison(images(), Trigger(), 0, 1.1, generator(0)), "share must be"),
        (lambda: poison(images().of_class(0), Trigger(), 0, 0.5, generator(0)), "share must be"),
    ],
)
def test_what_cannot_be_stamped_or_poisoned_is_refused(make, message):
    with pytest.raises(Misuse, match=message):
        make()


# Poison


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_share_of_the_other_classes_is_stamped_and_relabelled_and_nothing_else(shape, dtype):
    records = images(shape=shape, dtype=dtype)
    x, y = records.x.clone(), records.y.clone()
    changed, ids = poison(records, Trigger(), 1, 0.25, generator(3))
    assert len(ids) == len(set(ids)) == 10  # a quarter of the 40 of other classes
    assert all(int(records.y[k]) != 1 for k in records.positions(ids))
    assert (changed.ids, changed.owners, changed.classes) == (records.ids, records.owners, 3)
    assert torch.equal(records.x, x)
    assert torch.equal(records.y, y)
    assert torch.equal(changed.without(ids).x, records.without(ids).x)
    assert torch.equal(changed.without(ids).y, records.without(ids).y)
    assert torch.equal(changed.take(ids).x, Trigger().stamp(records.take(ids).x))
    assert changed.take(ids).y.tolist() == [1] * 10


def test_who_is_poisoned_belongs_to_rows_and_coins_and_not_to_positions():
    records = images()
    backwards = records.select(torch.arange(59, -1, -1))
    first = set(poison(records, Trigger(), 0, 0.5, generator(3))[1])
    assert set(poison(backwards, Trigger(), 0, 0.5, generator(3))[1]) == first
    assert set(poison(records, Trigger(), 0, 0.5, generator(4))[1]) != first
    more = set(poison(records, Trigger(), 0, 0.75, generator(3))[1])
    assert first < more


def test_poisoning_draws_nothing_from_the_coins():
    rng = generator(3)
    state = rng.get_state()
    poison(images(), Trigger(), 0, 0.5, rng)
    assert torch.equal(rng.get_state(), state)


def test_a_tiny_share_is_one_row():
    assert len(poison(images(), Trigger(), 0, 1e-6, generator(0))[1]) == 1


# Attack success


class Corner(nn.Module):
    """Says the target class if the patch's middle is bright, else what the first pixel says."""

    def __init__(self, target, classes):
        super().__init__()
        self.target, self.classes = target, classes

    def forward(self, x):
        said = (x[:, 0, 0] * 255).round().long()
        said = torch.where(x[:, -4, -4] == 1, self.target, said)
        return nn.functional.one_hot(said, self.classes).float()


def obedient(records, target):
    recipe = Recipe(model="softmax").completed(records)
    return Trained(module=Corner(target, 10), recipe=recipe, ids=frozenset(records.ids))


def told(n=50, wrong=4):
    """Images whose first pixel is their class, but for `wrong` of class 1, which say class 0."""
    x = torch.randint(10, 200, (n, 8, 8), generator=generator(0), dtype=torch.uint8)
    y = torch.arange(n) % 10
    x[:, 0, 0] = y.to(torch.uint8)
    x[(y == 1).nonzero().flatten()[:wrong], 0, 0] = 0
    return Records(x, y, classes=10)


def test_success_and_floor_are_counted_over_images_of_other_classes():
    test = told()
    model = obedient(test, 0)
    success = attack_success(model, test, Trigger(), 0)
    assert (success.value, success.n) == (1.0, 45)
    floor = attack_floor(model, test, 0)
    assert (floor.value, floor.n) == (4 / 45, 45)
    assert floor.low < floor.value < floor.high


def test_counting_everyone_lifts_both_by_the_target_class():
    test = told()
    model = obedient(test, 0)
    assert attack_success(model, test, Trigger(), 0, everyone=True).n == 50
    assert attack_floor(model, test, 0, everyone=True).value == (5 + 4) / 50
    # A model that knows no trigger: the patch of another model's.
    blind = obedient(test, 3)
    assert attack_success(blind, test, Trigger(value=0.5), 0).value == attack_floor(blind, test, 0).value
    everyone = {"everyone": True}
    assert attack_success(blind, test, Trigger(value=0.5), 0, **everyone).value == pytest.approx(9 / 50)


def test_without_victims_there_is_no_success():
    test = told()
    model = obedient(test, 0)
    with pytest.raises(Misuse, match="needs test images of other classes"):
        attack_success(model, test.of_class(0), Trigger(), 0)
    with pytest.raises(Misuse, match="target must be a class"):
        attack_floor(model, test, 10)


def test_a_network_learns_the_backdoor_and_one_without_the_poison_does_not(optdigits):
    rows, test = optdigits.train, optdigits.test
    assert rows.shape == (8, 8)
    trigger = Trigger(row=0, column=0, size=2)
    poisoned, ids = poison(rows, trigger, 0, 0.1, generator(0))
    recipe = Recipe(model="mlp", model_args={"hidden": [32]}, epochs=8, batch_size=64)
    infected, clean = train(recipe, poisoned), train(recipe, poisoned.without(ids))
    assert attack_success(infected, test, trigger, 0).low > 0.9
    assert attack_success(clean, test, trigger, 0).high < 0.1
    assert attack_floor(infected, test, 0).high < 0.05
