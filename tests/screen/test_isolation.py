"""Facility location against brute force, and isolation class by class."""

import itertools
import math

import pytest
import torch

from expunge import Misuse, Request
from expunge.core.coins import generator
from expunge.screen import Asked, Isolation, cover, understand
from expunge.screen.facility import value
from expunge.screen.isolation import distances
from expunge.screen.scene import Gradients
from tests.screen import kit


def similar(n, m, seed):
    return torch.rand(n, m, generator=generator(seed), dtype=torch.float64)


def plain(matrix, budget):
    """Greedy without any short cut."""
    chosen = []
    for _ in range(budget):
        gains = [value(matrix, [*chosen, j]) if j not in chosen else -1 for j in range(matrix.shape[1])]
        chosen.append(max(range(matrix.shape[1]), key=lambda j: (gains[j], -j)))
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_lazy_greedy_chooses_what_greedy_chooses(seed):
    matrix = similar(9 + seed, 10, seed)
    chosen, gains = cover(matrix, 5)
    assert chosen == plain(matrix, 5)
    assert float(gains.sum()) == pytest.approx(value(matrix, chosen))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gains.tolist()))


@pytest.mark.parametrize("seed", range(10))
def test_t4_greedy_reaches_its_share_of_the_best_choice(seed):
    matrix = similar(10, 10, 100 + seed) ** 4
    for budget in (1, 2, 3, 4):
        best = max(value(matrix, list(chosen)) for chosen in itertools.combinations(range(10), budget))
        found = value(matrix, cover(matrix, budget)[0])
        assert (1 - 1 / math.e) * best <= found <= best + 1e-12
        if budget == 1:
            assert found == pytest.approx(best)


def test_greedy_is_not_always_the_best_so_that_the_bound_says_something():
    matrix = torch.tensor([[2.0, 2.9, 0.0], [2.0, 0.0, 2.9], [0.1, 0.0, 0.0]])
    assert value(matrix, cover(matrix, 2)[0]) < max(
        value(matrix, list(pair)) for pair in itertools.combinations(range(3), 2)
    )


@pytest.mark.parametrize("budget", [0, 11])
def test_a_budget_that_cannot_be_spent_is_refused(budget):
    with pytest.raises(Misuse, match="1 to 10"):
        cover(similar(10, 10, 0), budget)


def test_negative_similarities_are_refused():
    with pytest.raises(Misuse, match=">= 0"):
        cover(-similar(3, 3, 0), 1)


def unbalanced():
    """Classes of 150, 50 and 100 rows, so that budgets are 30, 10 and 20; one loner in each, far from the others."""
    torch.manual_seed(0)
    parts, labels = [], []
    for label, many in enumerate((150, 50, 100)):
        centres = torch.randn(5, 3, generator=generator(label)) * 3
        rows = centres[torch.arange(many) % 5] + 0.02 * torch.randn(many, 3, generator=generator(9 + label))
        rows[7] = 40.0 + 10 * label
        parts.append(rows)
        labels += [label] * many
    return torch.cat(parts), torch.tensor(labels)


def test_classes_of_other_sizes_do_not_shift_the_clusters():
    rows, labels = unbalanced()
    loners = {7, 157, 207}
    screen = Isolation(budget=0.2)
    found, budgets = {}, []
    for label in range(3):
        inside = (labels == label).nonzero().flatten()
        block = screen.block(Gradients(r=rows, h=None), inside)
        budgets.append(len(block.medoids))
        found |= dict(zip(inside.tolist(), block.sizes.tolist(), strict=True))
        assert torch.equal(block.sizes, torch.bincount(block.cluster)[block.cluster])
    assert budgets == [30, 10, 20]
    assert all(found[row] == 1 for row in loners)
    # What the published code does: offset by class sizes, count over all classes together.
    ids, sizes = [], []
    for label in range(3):
        inside = (labels == label).nonzero().flatten()
        block = screen.block(Gradients(r=rows, h=None), inside)
        ids.append(block.cluster + label * budgets[label])
        sizes.append(torch.bincount(block.cluster, minlength=budgets[label]))
    wrong = torch.cat(sizes)[torch.cat(ids).clamp_max(59)]
    right = torch.tensor([found[row] for row in range(300)])
    assert [label * budgets[label] for label in range(3)] == [0, 10, 40]  # where 0, 30, 40 are right
    assert not torch.equal(wrong, right)


def test_the_scores_of_a_request_are_those_of_its_rows_whoever_else_is_asked_for():
    scene = kit.scene()
    read = Isolation().prepare(scene, rng=generator(0))
    whole = read(Asked.of(kit.records(), range(480)))
    some = read(Asked.of(kit.records(), [4, 90, 300]))
    assert torch.equal(some.rows, whole.rows[[4, 90, 300]])
    assert some.whole == pytest.approx(float(whole.rows[[4, 90, 300]].mean()))
    assert torch.equal(whole.flagged, whole.rows == 1)
    assert 0 < int(whole.flagged.sum()) < 240


def test_large_classes_are_cut_into_blocks_and_every_row_is_in_one():
    scene = kit.scene()
    read = Isolation(most=20).prepare(scene, rng=generator(0))
    found = read(Asked.of(kit.records(), range(480)))
    assert float(found.rows.min()) >= 1 / 20
    again = Isolation(most=20).prepare(scene, rng=generator(0))(Asked.of(kit.records(), range(480)))
    assert torch.equal(found.rows, again.rows)


def test_a_row_that_came_with_the_request_stands_alone_if_it_is_far_and_not_if_it_is_a_copy():
    rows, labels = unbalanced()
    gradients = Gradients(r=rows, h=None)
    screen, inside = Isolation(), (labels == 0).nonzero().flatten()
    block = screen.block(gradients, inside)
    far = Gradients(r=torch.tensor([[-90.0, 0.0, 0.0]]), h=None)
    assert screen.joining(gradients, block, far).tolist() == [1]
    copies = Gradients(r=torch.tensor([[-90.0, 0.0, 0.0]]).repeat(4, 1), h=None)
    assert screen.joining(gradients, block, copies).tolist() == [4] * 4
    near = screen.joining(gradients, block, Gradients(r=rows[[0]], h=None))
    assert near.item() > 1


def test_strangers_and_replacements_are_judged_beside_their_class():
    whole = kit.records()
    request = Request.replace_rows(whole.ids[:5], 1 - whole.x[:5], whole.y[:5])
    judged = Isolation()(kit.trained(), whole, request, rng=generator(0))
    assert [one.record for one in judged] == list(whole.ids[:5])
    judged = Isolation()(
        kit.trained(), whole, Request.remove_rows("nobody", 1 - whole.x[:5], whole.y[:5]), rng=generator(0)
    )
    assert len(judged) == 5
    assert all(0 < one.score <= 1 for one in judged)
    assert len(understand(kit.trained(), whole, request)) == 5


def test_distances_of_a_row_to_itself_are_zero():
    found = kit.scene().whole
    assert float(distances(found).diagonal().max()) == 0


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"budget": 1.1}, {"smallest": 0}, {"most": 0}])
def test_an_isolation_that_means_nothing_is_refused(wrong):
    with pytest.raises(Misuse):
        Isolation(**wrong)
