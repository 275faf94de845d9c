"""Gradients in factors equal gradients in full."""

import pytest
import torch

from expunge import Misuse, Request
from expunge.core.coins import generator
from expunge.learn.models import head_of
from expunge.screen import Asked, GradientNorm, understand
from expunge.screen.isolation import distances
from tests.screen import kit


def full(scene, records, *, names=None):
    """(n, p) gradients, by every parameter or those of the last layer."""
    from expunge.calculus import Objective

    x, y = next(scene.batches(records, 1000))
    return Objective(scene.module, scene.objective.row_losses, names=names).gradients(x, y)


@pytest.mark.parametrize("kind", ["mlp", "softmax"])
def test_the_last_layers_inner_products_are_those_of_its_gradients(kind):
    scene = kit.scene(kind)
    rows = scene.rows.select(range(12))
    head = head_of(scene.module)[0]
    wanted = full(scene, rows, names=[one for one in scene.objective.names if one.startswith(head)])
    found = scene.last(rows)
    assert torch.allclose(found.cross(found), wanted @ wanted.T, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.squares(), wanted.square().sum(1), rtol=1e-4, atol=1e-6)
    apart = torch.cdist(wanted, wanted)
    assert torch.allclose(distances(found), apart, rtol=1e-3, atol=2e-3)


def test_a_replacement_is_the_difference_of_two_gradients():
    scene, whole = kit.scene(), kit.records()
    request = Request.replace_rows(whole.ids[:6], 1 - whole.x[:6], whole.y[:6])
    asked = understand(scene.trained, whole, request)
    head = head_of(scene.module)[0]
    names = [one for one in scene.objective.names if one.startswith(head)]
    wanted = full(scene, asked.new, names=names) - full(scene, whole.select(range(6)), names=names)
    found = scene.of(asked)
    assert torch.allclose(found.cross(found), wanted @ wanted.T, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.squares(), wanted.square().sum(1), rtol=1e-4, atol=1e-5)
    some = found.take(torch.tensor([4, 1]))
    assert torch.allclose(some.cross(found), (wanted @ wanted.T)[[4, 1]], rtol=1e-4, atol=1e-5)
    norms = (full(scene, asked.new) - full(scene, whole.select(range(6)))).norm(dim=1)
    judged = GradientNorm()(scene.trained, whole, request, rng=generator(0))
    assert [one.score for one in judged] == pytest.approx(norms.tolist(), rel=1e-4)


def test_norms_are_those_of_all_parameters_and_the_fence_is_the_quartiles():
    scene = kit.scene()
    norms = full(scene, scene.rows).norm(dim=1)
    asked = Asked.of(kit.records(), range(480))
    found = GradientNorm().prepare(scene, rng=generator(0))(asked)
    assert torch.allclose(found.rows.float(), norms, rtol=1e-4, atol=1e-6)
    ordered = norms.sort().values
    low, high = float(ordered[120]), float(ordered[360])
    assert torch.equal(found.flagged, norms > high + 1.5 * (high - low))
    assert 0 < int(found.flagged.sum()) < 240
    assert found.whole == pytest.approx(float(norms.mean()), rel=1e-4)
    share = GradientNorm(quantile=0.9, layers="last").prepare(scene, rng=generator(0))(asked).flagged
    assert int(share.sum()) == 47


def test_a_sharded_model_that_votes_is_seen_as_the_mean_of_its_shards():
    scene = kit.scene("shards")
    assert not scene.headed
    found = scene.last(scene.rows)
    assert found.h is None
    assert float(found.squares().max()) > 0
    assert float(scene.squares.min()) > 0


@pytest.mark.parametrize("wrong", [{"quantile": 1.0}, {"layers": "first"}])
def test_a_norm_of_nothing_is_refused(wrong):
    with pytest.raises(Misuse):
        GradientNorm(**wrong)
