"""Stand-ins for forgotten rows: right distances, right sizes, never a forgotten row, and the nearest where promised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge import Recipe, Records, generator
from expunge.attack.selectors import (
    Gap,
    GreedyMatching,
    LastLayerNeighbour,
    Outer,
    RandomOfM,
    assign,
    gradient,
    undisturbed,
)
from expunge.attack.selectors_nearest import NearestNeighbour, nearest_table
from expunge.core.errors import Misuse
from expunge.learn.build import build
from expunge.learn.loop import row_losses
from expunge.testing.case import digits

CASE = digits()
ROWS = CASE.records
RECIPE = Recipe(model="mlp", model_args={"hidden": [16]}, seed=3).completed(ROWS)
FORGOTTEN = torch.tensor(ROWS.positions(CASE.forget.ids))
POOL = torch.tensor(ROWS.positions(CASE.retain.ids))
SELECTORS = {
    "random of 5": RandomOfM(5),
    "last layer": LastLayerNeighbour(),
    "last layer, whole pool": LastLayerNeighbour(candidates=None),
    "last layer, any class": LastLayerNeighbour(candidates=None, same_class=False),
    "greedy": GreedyMatching(),
    "nearest by cosine": NearestNeighbour(),
    "nearest by l2": NearestNeighbour(metric="l2"),
}
every_selector = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)


def gap(count=7, *, reuse=False, recipe=RECIPE, records=ROWS, pool=POOL, module=None):
    module = (module or build(recipe)).train()
    batch = torch.cat([POOL[-3:], FORGOTTEN[:count]])
    spots = torch.arange(3, 3 + count)
    return Gap(module=module, recipe=recipe, records=records, batch=batch, spots=spots, pool=pool, reuse=reuse)


def explicit(one, positions):
    """Each row's gradient in the last layer by autograd, row after row, in float64."""
    head = one.module.head
    answer = []
    for position in positions.tolist():
        x, y = one.read(torch.tensor([position]))
        loss = row_losses(one.recipe)(one.module(x), y).sum()
        grads = torch.autograd.grad(loss, [head.weight, head.bias])
        answer.append(torch.cat([grad.flatten() for grad in grads]).double())
    return torch.stack(answer)


# What holds of all of them


@every_selector
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_size_is_kept_and_no_forgotten_row_is_returned(selector, reuse, count):
    one = gap(count, reuse=reuse)
    found = selector(one, rng=generator(0))
    assert found.shape == (count,)
    assert found.dtype == torch.int64
    assert set(found.tolist()) <= set(POOL.tolist())
    assert not set(found.tolist()) & set(FORGOTTEN.tolist())
    if not reuse:
        assert len(set(found.tolist())) == count


@every_selector
def test_a_pool_that_is_just_large_enough_is_used_up(selector):
    found = selector(gap(9, pool=POOL[:9]), rng=generator(0))
    assert sorted(found.tolist()) == sorted(POOL[:9].tolist())


@every_selector
def test_one_row_stands_in_for_all_where_rows_may_be_reused(selector):
    found = selector(gap(5, pool=POOL[:1], reuse=True), rng=generator(0))
    assert found.tolist() == [int(POOL[0])] * 5


@every_selector
def test_the_same_coins_choose_the_same_rows(selector):
    assert torch.equal(selector(gap(), rng=generator(4)), selector(gap(), rng=generator(4)))


@every_selector
def test_the_coming_step_is_not_disturbed(selector):
    recipe = replace(RECIPE, model_args={**RECIPE.model_args, "norm": "batch"})
    one = gap(recipe=recipe)
    one.module.body.append(nn.Dropout(0.3))
    before = {name: value.clone() for name, value in one.module.state_dict().items()}
    coins = torch.get_rng_state()
    selector(one, rng=generator(0))
    assert all(torch.equal(value, before[name]) for name, value in one.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), coins)
    assert all(parameter.grad is None for parameter in one.module.parameters())
    assert one.module.training


def test_without_that_care_buffers_and_coins_would_move():
    recipe = replace(RECIPE, model_args={**RECIPE.model_args, "norm": "batch"})
    one = gap(recipe=recipe)
    before = {name: value.clone() for name, value in one.module.state_dict().items()}
    gradient(one.module, recipe, *one.read(POOL[:8]))
    assert any(not torch.equal(value, before[name]) for name, value in one.module.state_dict().items())
    before, coins = {name: value.clone() for name, value in one.module.state_dict().items()}, torch.get_rng_state()
    with undisturbed(one.module):
        gradient(one.module, recipe, *one.read(POOL[:8]))
        torch.rand(1)
    assert all(torch.equal(value, before[name]) for name, value in one.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), coins)


@every_selector
def test_regression_has_stand_ins_too(selector):
    rows = Records(ROWS.x, ROWS.y.float(), ROWS.ids, ROWS.owners)
    recipe = Recipe(model="mlp", model_args={"hidden": [8]}, loss="mse").completed(rows)
    found = selector(gap(recipe=recipe, records=rows), rng=generator(0))
    assert len(set(found.tolist()) & set(POOL.tolist())) == 7


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(Misuse, match="larger pool"):
        gap(5, pool=POOL[:4])
    with pytest.raises(Misuse, match="larger pool"):
        gap(0)
    for made in (RandomOfM, LastLayerNeighbour, GreedyMatching):
        with pytest.raises(Misuse, match="candidate"):
            made(0)
    with pytest.raises(Misuse, match="metric"):
        NearestNeighbour(metric="l1")


# Random of M


def mismatch_of(one, chosen):
    goal = gradient(one.module, one.recipe, *one.read(one.forgotten))
    return float((gradient(one.module, one.recipe, *one.read(chosen)) - goal).norm())


def test_more_nested_draws_never_have_a_larger_mismatch():
    one = gap()
    for seed in range(4):
        off = [mismatch_of(one, RandomOfM(m)(one, rng=generator(seed))) for m in (1, 2, 3, 5, 8, 13, 40)]
        assert off == sorted(off, reverse=True)
        assert off[-1] < off[0]


def test_under_batch_norm_whole_batches_are_compared_as_the_coming_step_will_see_them():
    recipe = replace(RECIPE, model_args={**RECIPE.model_args, "norm": "batch"})
    one = gap(1, recipe=recipe)

    def off(chosen):
        with undisturbed(one.module):
            goal = gradient(one.module, recipe, *one.read(one.batch))
            return float((gradient(one.module, recipe, *one.read(one.filled(chosen))) - goal).norm())

    found = [off(RandomOfM(m)(one, rng=generator(1))) for m in (1, 4, 16)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_draws_that_are_not_nested_may_have_a_larger_one():
    one = gap()
    off = [mismatch_of(one, RandomOfM(1)(one, rng=generator(seed))) for seed in range(6)]
    assert off != sorted(off, reverse=True)


# The last layer


def test_last_layer_distances_are_those_of_explicit_gradients():
    one = gap(12)
    with torch.no_grad():
        found = Outer.of(one, FORGOTTEN[:12]).squared_distances(Outer.of(one, POOL[:50])).sqrt()
    true = torch.cdist(explicit(one, FORGOTTEN[:12]), explicit(one, POOL[:50]))
    assert float((found - true).abs().max()) < 1e-5 < float(true.min())


def test_distances_without_the_bias_are_others():
    one = gap(12)
    with torch.no_grad():
        mine = Outer.of(one, FORGOTTEN[:12])
        theirs = Outer.of(one, POOL[:50])
    cut = [Outer(part.slope, part.features[:, :-1]) for part in (mine, theirs)]
    true = torch.cdist(explicit(one, FORGOTTEN[:12]), explicit(one, POOL[:50]))
    assert float((cut[0].squared_distances(cut[1]).sqrt() - true).abs().max()) > 1e-3


def test_no_row_of_the_pool_is_nearer_in_the_last_layer_than_the_one_chosen():
    one = gap(20, reuse=True)
    chosen = LastLayerNeighbour(candidates=None, same_class=False)(one, rng=generator(0))
    true = torch.cdist(explicit(one, one.forgotten), explicit(one, POOL))
    taken = (explicit(one, chosen) - explicit(one, one.forgotten)).norm(dim=1)
    assert float((taken - true.min(1).values).abs().max()) < 1e-5
    own = LastLayerNeighbour(candidates=None)(one, rng=generator(0))
    assert torch.equal(ROWS.y[own], ROWS.y[one.forgotten])


def test_a_module_that_is_no_network_is_hooked():
    class Plain(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.body, self.head = of.body, of.head

        def forward(self, x):
            return self.head(self.body(x.flatten(1)))

    network = build(RECIPE)
    whole = LastLayerNeighbour(candidates=None)
    chosen = whole(gap(module=Plain(network)), rng=generator(0))
    assert torch.equal(chosen, whole(gap(module=network), rng=generator(0)))


def test_greedy_sums_are_nearer_than_random_ones():
    one = gap(25)
    goal = explicit(one, one.forgotten).sum(0)

    def off(selector, seed):
        return float((explicit(one, selector(one, rng=generator(seed))).sum(0) - goal).norm())

    assert max(off(GreedyMatching(), seed) for seed in range(5)) < min(off(RandomOfM(1), seed) for seed in range(5))


def test_distinct_rows_are_dealt_to_the_nearest_first():
    scores = torch.tensor([[0.1, 0.2, 0.9], [0.05, 0.5, 0.6], [0.3, 0.4, 0.5]])
    rows = torch.tensor([[7, 8, 9]] * 3)
    assert assign(scores, rows, reuse=False).tolist() == [8, 7, 9]
    assert assign(scores, rows, reuse=True).tolist() == [7, 7, 7]


# Nearest neighbours by raw values


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_table_holds_what_a_loop_over_all_pairs_finds(metric, monkeypatch):
    monkeypatch.setattr("expunge.attack.selectors_nearest._ASKED", 7)
    monkeypatch.setattr("expunge.attack.selectors_nearest._POOL", 13)
    x, y = ROWS.x.flatten(1).double().numpy(), ROWS.y.numpy()
    table = nearest_table(ROWS, FORGOTTEN, POOL, metric)
    assert table.dtype == torch.int32
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for row, found in zip(FORGOTTEN.tolist(), table.tolist(), strict=True):
        same = [other for other in POOL.tolist() if y[other] == y[row]]
        assert found == min(same, key=lambda other: np.linalg.norm(x[other] - x[row]))


def test_no_row_is_its_own_neighbour_and_identical_twins_are_each_others():
    twins = Records(
        torch.cat([ROWS.x[:50], ROWS.x[:50], 2 * ROWS.x[:50]]), torch.cat([ROWS.y[:50]] * 3), classes=ROWS.classes
    )
    everything = torch.arange(150)
    for metric in ("cosine", "l2"):
        table = nearest_table(twins, everything, everything, metric)
        assert table[:50].tolist() == list(range(50, 100))
        assert table[50:100].tolist() == list(range(50))


def test_a_class_that_is_gone_is_stood_in_for_by_others():
    label = int(ROWS.y[FORGOTTEN[0]])
    pool = POOL[ROWS.y[POOL] != label]
    for reuse in (False, True):
        found = NearestNeighbour()(gap(7, pool=pool, reuse=reuse), rng=generator(0))
        assert set(found.tolist()) <= set(pool.tolist())
        others = ROWS.y[FORGOTTEN[:7]] != label
        assert torch.equal(ROWS.y[found][others], ROWS.y[FORGOTTEN[:7]][others])


def test_a_row_with_no_other_row_is_refused():
    with pytest.raises(Misuse, match="no other row"):
        nearest_table(ROWS, POOL[:1], POOL[:1])


def test_a_prepared_table_is_looked_up_and_says_what_it_lacks():
    ready = NearestNeighbour().prepared(ROWS, FORGOTTEN[:5], POOL)
    assert torch.equal(ready(gap(5, reuse=True), rng=generator(0)), nearest_table(ROWS, FORGOTTEN[:5], POOL).long())
    with pytest.raises(Misuse, match="prepare"):
        ready(gap(6, reuse=True), rng=generator(0))


def test_pixels_are_compared_as_the_model_reads_them():
    pixels = Records((ROWS.x * 16).to(torch.uint8), ROWS.y, ROWS.ids, ROWS.owners, classes=10)
    assert torch.equal(nearest_table(pixels, FORGOTTEN, POOL, "l2"), nearest_table(ROWS, FORGOTTEN, POOL, "l2"))
