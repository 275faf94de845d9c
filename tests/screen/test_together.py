"""Coalitions and near-duplicates: what isolation does not see."""

import pytest
import torch

from expunge import Misuse, Records, Request
from expunge.core.coins import generator
from expunge.screen import Asked, Coalition, Isolation, Membership, Scene
from expunge.screen.coalition import largest, linked
from expunge.screen.nearest import nearest, others_within, spread
from tests.screen import kit


def block(sizes):
    """Cosines of groups of copies that have nothing to do with one another."""
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (label[:, None] == label[None]).double()


@pytest.mark.parametrize("sizes", [[1] * 7, [4, 1, 1], [3, 3, 5, 1], [140, 60]])
def test_a_group_of_copies_scores_its_size(sizes):
    assert largest(block(sizes)) == pytest.approx(max(sizes), rel=1e-6)


def test_opposite_rows_are_no_coalition():
    assert largest(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == pytest.approx(1.0)


def test_chains_of_links_are_one_group():
    angles = torch.tensor([0.0, 0.3, 0.6, 0.9, 2.5, 2.6])
    cosines = torch.cos(angles[:, None] - angles[None])
    assert linked(cosines, 0.95).tolist() == [0, 0, 0, 0, 1, 1]
    assert linked(cosines, 0.999).tolist() == [0, 1, 2, 3, 4, 5]


def test_near_copies_stand_out_in_coalition_and_hide_from_isolation():
    whole = kit.records()
    read = Coalition().prepare(kit.scene(), rng=generator(0))
    base = read(Asked.of(whole, range(20))).whole
    copies = whole.x[[0]].repeat(10, 1) + 0.01 * torch.rand(10, 64, generator=generator(1))
    new = Records(1 - copies, whole.y[[0]].repeat(10), whole.ids[:10], classes=10)
    asked = Asked.of(whole, range(10), new)
    found = read(asked)
    assert found.whole > base
    assert bool(found.flagged.any())
    alone = Isolation().prepare(kit.scene(), rng=generator(0))(asked)
    assert int(alone.flagged.sum()) < int(found.flagged.sum())


def test_pull_is_the_norm_of_the_summed_gradient():
    scene = kit.scene("softmax")
    x, y = next(scene.batches(kit.records().select(range(9)), 100))
    wanted = float(scene.objective.gradient(x, y).norm())
    read = Coalition(by="pull").prepare(scene, rng=generator(0))
    assert read(Asked.of(kit.records(), range(9))).whole == pytest.approx(wanted, rel=1e-4)
    one = Coalition().prepare(scene, rng=generator(0))(Asked.of(kit.records(), [4]))
    assert (one.whole, one.rows.tolist(), one.flagged.tolist()) == (pytest.approx(1.0), [0.0], [False])


def brute(rows, owners, reach):
    apart = torch.cdist(rows.double(), rows.double())
    apart[owners[:, None] == owners[None]] = torch.inf
    distance, row = apart.min(1)
    return torch.where(distance <= reach, row, -1), distance


@pytest.mark.parametrize("reach", [0.5, 1.2, 5.0])
def test_near_rows_of_other_owners_are_those_of_a_full_search(reach):
    rows = torch.randn(5000, 40, generator=generator(0)) * torch.linspace(1, 0.05, 40)
    rows[100:160] = rows[:60] + 0.01
    owners = torch.arange(5000) % 300
    owners[100:110] = owners[:10]
    found = others_within(rows, owners, reach, generator(1))
    row, distance = brute(rows, owners, reach)
    assert torch.equal(found.row, row)
    near = row >= 0
    assert int(near.sum()) >= 50
    assert torch.allclose(found.distance[near].double(), distance[near], atol=1e-3)
    assert bool(found.distance[~near].isinf().all())


def test_the_nearest_row_leaves_out_what_is_forbidden():
    rows = torch.tensor([[0.0], [1.0], [5.0]])
    assert nearest(torch.tensor([[0.9]]), rows).row.tolist() == [1]
    assert nearest(torch.tensor([[0.9]]), rows, torch.tensor([[False, True, False]])).row.tolist() == [0]
    assert nearest(torch.tensor([[0.9]]), rows, torch.tensor([[True, True, True]])).row.tolist() == [-1]


def test_spread_is_the_distance_of_two_random_rows():
    rows = torch.randn(400, 6, generator=generator(0))
    wanted = torch.cdist(rows, rows).square().mean().sqrt()
    assert spread(rows) == pytest.approx(float(wanted), rel=1e-4)


def test_membership_names_the_neighbour_and_flags_who_asks_for_anothers():
    whole = kit.records()
    x = whole.x.clone()
    x[400] = x[3] + 0.005
    owners = [f"o{i % 40}" for i in range(480)]
    near = Records(x, whole.y, whole.ids, owners, classes=10)
    trained, screen = kit.trained("softmax"), Membership()
    judged = screen(trained, near, Request.remove(["row-003", "row-200"]), rng=generator(0))
    assert '"row-400" of another owner' in judged[0].reason
    assert (judged[0].flagged, judged[1].flagged) == (True, False)
    assert 0 < screen.whole(judged) < 1
    theirs = screen(trained, near, Request.remove(["row-200"], asked_by="o1"), rng=generator(0))
    assert theirs[0].flagged
    assert screen.whole(theirs) >= 1
    mine = screen(trained, near, Request.remove(["row-200"], asked_by="o0"), rng=generator(0))
    assert not mine[0].flagged
    clerk = screen(trained, near, Request.remove(["row-200"], asked_by="a clerk"), rng=generator(0))
    assert not clerk[0].flagged


def test_membership_sees_copies_within_a_request_and_rows_nobody_trained_on():
    whole = kit.records()
    x = whole.x[[7, 7, 7]] * torch.tensor([[1.0], [0.99], [0.3]])
    judged = Membership()(
        kit.trained("softmax"), whole, Request.remove_rows(whole.owners[7], x, whole.y[[7, 7, 7]]), rng=generator(0)
    )
    assert [one.record for one in judged] == ["row-007", "asked-1", "asked-2"]
    assert "of this request" in judged[0].reason
    assert [one.score >= 1 for one in judged] == [False, True, True]
    new = Records(whole.x[20:23] + 0.001, whole.y[20:23], whole.ids[:3], classes=10)
    copied = Membership().prepare(Scene(kit.trained("softmax"), whole), rng=generator(0))(
        Asked.of(whole, [0, 1, 2], new)
    )
    assert bool(copied.flagged.all())


@pytest.mark.parametrize(
    ("screen", "wrong"),
    [(Membership, {"near": 0}), (Coalition, {"by": "x"}), (Coalition, {"alike": 0}), (Coalition, {"smallest": 1})],
)
def test_settings_that_mean_nothing_are_refused(screen, wrong):
    with pytest.raises(Misuse):
        screen(**wrong)
