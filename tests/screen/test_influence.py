"""Influence on probes: against gradients written out, against what removal does, and joint where rows act together."""

import pytest
import torch

from expunge import InfluenceUnlearning, Misuse, Recipe, Records, Request, Retrain, train
from expunge.calculus import FisherDual, Objective, row_gradients
from expunge.core.coins import child, generator
from expunge.screen import Asked, GradientInfluence, Scene
from expunge.screen.probes import choose, falls, margins
from tests.screen import kit


def test_effects_are_inner_products_of_gradients_with_preconditioned_ones():
    scene, probes = kit.scene("softmax"), kit.unseen().select(range(8))
    read = GradientInfluence(probes=probes, damping=0.5, sample=64).prepare(scene, rng=generator(3))
    x, y = next(scene.batches(scene.rows, 1000))
    xp, yp = next(scene.batches(read.probes, 100))
    fall = Objective(scene.module, falls("cross_entropy")).gradients(xp, yp)
    order = torch.randperm(480, generator=child(child(generator(3), "influence"), "sample"))[:64].sort().values
    fisher = FisherDual(row_gradients(scene.objective, x[order], y[order]), 0.5)
    wanted = scene.objective.gradients(x, y) @ torch.stack([fisher.solve(one) for one in fall]).T / 480
    assert torch.allclose(read.effects, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    asked = Asked.of(kit.records(), [3, 50, 400])
    found = read(asked)
    assert torch.allclose(found.rows.float(), wanted[[3, 50, 400]].max(1).values, rtol=1e-3, atol=1e-5)
    joint = GradientInfluence(probes=probes, damping=0.5, sample=64, by="fall").prepare(scene, rng=generator(3))(asked)
    assert joint.whole == pytest.approx(float(wanted[[3, 50, 400]].sum(0).max()), rel=1e-3)


def test_without_damping_it_is_a_first_order_step():
    scene = kit.scene("softmax")
    read = GradientInfluence(probes=kit.unseen().select(range(4)), damping=None).prepare(scene, rng=generator(0))
    asked = Asked.of(kit.records(), [5, 6])
    x, y = next(scene.batches(kit.records().select([5, 6]), 10))
    step = 1e-3
    move = step * scene.objective.gradient(x, y) / 480
    xp, yp = next(scene.batches(read.probes, 10))
    here = scene.objective.vector().double()
    worse, module = falls("cross_entropy"), Objective(_double(scene.module), falls("cross_entropy"))
    before = worse(module.outputs(here, xp.double()), yp)
    after = worse(module.outputs(here + move.double(), xp.double()), yp)
    assert torch.allclose(read._look_up(asked).sum(0).double(), (after - before) / step, rtol=1e-3, atol=1e-6)


def _double(module):
    import copy

    return copy.deepcopy(module).double()


def test_what_is_predicted_of_the_whole_is_what_retraining_shows():
    whole = kit.records()
    recipe = Recipe(model="softmax", epochs=60, batch_size=480, weight_decay=0.05, optimiser_args={"lr": 0.5})
    trained = train(recipe, whole)
    probes = kit.unseen().select(range(60))
    scene = Scene(trained, whole)
    read = GradientInfluence(probes=probes, by="fall", damping=1.0, sample=480).prepare(scene, rng=generator(0))
    asked = Asked.of(whole, range(0, 480, 8))
    after = train(recipe, whole.without(asked.ids))
    measured = margins(scene, scene.module, read.probes) - margins(scene, after.module, read.probes)
    predicted = read._look_up(asked).sum(0)
    pairs = torch.stack([measured.double(), predicted.double()])
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.6


def test_a_probe_is_no_witness_of_its_own_going():
    read = GradientInfluence(probes=30).prepare(kit.scene(), rng=generator(0))
    for column, record in enumerate(read.probes.ids):
        assert float(read.effects[kit.records().positions([record])[0], column]) == 0


def test_probes_are_answered_rightly_and_half_of_those_drawn_lie_near_the_boundary():
    scene = kit.scene()
    probes = choose(scene, 40, generator(0))
    assert len(set(probes.ids)) == len(probes) == 40
    found = margins(scene, scene.module, probes)
    assert float(found.min()) > 0
    everywhere = margins(scene, scene.module, scene.rows)
    assert float(found[:20].mean()) < float(everywhere.mean()) / 2
    some = kit.unseen().select(range(5))
    wrong = Records(some.x, (some.y + 1) % 10, classes=10)
    with pytest.raises(Misuse, match="answered rightly"):
        choose(scene, wrong, generator(0))


def test_ranks_of_random_rows_average_one_and_picked_rows_score_more():
    scene = kit.scene()
    read = GradientInfluence().prepare(scene, rng=generator(0))
    every = read(Asked.of(kit.records(), range(480)))
    assert every.whole == pytest.approx(1.0, abs=0.05)
    benign = sorted(
        read(Asked.of(kit.records(), torch.randperm(480, generator=generator(draw))[:20])).whole for draw in range(200)
    )
    found = [read(one).whole for one in kit.picked()]
    assert sum(one > benign[190] for one in found) >= 0.9 * len(found)


def test_through_a_method_the_fall_is_the_one_that_the_method_brings_about():
    scene, whole = kit.scene("softmax"), kit.records()
    probes = kit.unseen().select(range(20))
    screen = GradientInfluence(probes=probes, through=Retrain())
    read = screen.prepare(scene, rng=generator(0))
    asked = kit.picked("softmax")[0]
    found = read(asked)
    after = train(kit.RECIPES["softmax"], whole.without(asked.ids))
    fall = margins(scene, scene.module, read.probes) - margins(scene, after.module, read.probes)
    assert found.whole == pytest.approx(float(fall.max()), rel=1e-4)
    assert "tentative model" in found.reason(0)
    judged = screen(scene.trained, whole, Request.remove(asked.ids), rng=generator(0))
    assert [one.record for one in judged] == list(asked.ids)
    quick = GradientInfluence(probes=probes, through=InfluenceUnlearning()).prepare(scene, rng=generator(0))(asked)
    assert quick.whole > 0


def test_replacing_a_row_by_itself_changes_nothing_and_by_another_does():
    whole = kit.records()
    read = GradientInfluence(probes=20).prepare(kit.scene(), rng=generator(0))
    same = Asked.of(whole, range(5), whole.select(range(5)))
    clear = [row for row in range(5) if whole.ids[row] not in read.probes.ids]
    assert read(same).rows[clear].abs().max() < 1e-4
    other = Asked.of(whole, range(5), Records(1 - whole.x[:5], whole.y[:5], whole.ids[:5], classes=10))
    assert float(read(other).rows.min()) > 0.1


def test_strangers_are_scored_by_what_removing_them_would_do():
    from expunge.screen import understand

    whole, far = kit.records(), 1 - kit.records().x[:2]
    asked = understand(kit.trained(), whole, Request.remove_rows("nobody", far, whole.y[:2]))
    for screen in (GradientInfluence(probes=10), GradientInfluence(probes=10, through=Retrain())):
        found = screen.prepare(kit.scene(), rng=generator(0))(asked)
        assert len(found.rows) == 2
        assert isinstance(found.reason(1), str)


def test_regression_is_judged_by_the_rise_of_squared_errors():
    x = torch.randn(60, 3, generator=generator(1))
    records = Records(x, x.sum(1) + 0.1 * torch.randn(60, generator=generator(2)))
    recipe = Recipe(model="softmax", loss="mse", epochs=20, batch_size=20, optimiser_args={"lr": 0.05})
    judged = GradientInfluence(probes=10)(
        train(recipe, records), records, Request.remove(records.ids[:4]), rng=generator(0)
    )
    assert len(judged) == 4
    assert "turn" not in judged[0].reason
    assert not any(one.flagged for one in judged)


@pytest.mark.parametrize("wrong", [{"probes": 0}, {"damping": 0.0}, {"sample": 1}, {"by": "votes"}])
def test_an_influence_that_means_nothing_is_refused(wrong):
    with pytest.raises(Misuse):
        GradientInfluence(**wrong)


@pytest.mark.parametrize("kind", ["mlp", "shards"])
def test_of_models_too_large_the_last_layers_stand_for_all(kind, monkeypatch):
    monkeypatch.setattr("expunge.screen.influence._MOST", 1)
    read = GradientInfluence(probes=5).prepare(kit.scene(kind), rng=generator(0))
    heads = 1 if kind == "mlp" else 3
    assert len(read.names) == 2 * heads
    assert all("head" in name for name in read.names)
    found = read(Asked.of(kit.records(), [1, 2, 3]))
    assert float(found.rows.abs().max()) > 0
    assert "probes" in found.reason(0)
