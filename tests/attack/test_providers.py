"""What each cheating provider gets past, and which check finds it; and that honest ones pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expunge import Recipe, Records, Request, datasets, generator, train
from expunge.attack.forging import DriftingForger, ForgingAdversary
from expunge.attack.providers import FineTuneToPass, HonestRetrain, HonestSisa, Lazy, NoiseAdder
from expunge.attack.providers_hiding import SelectiveServer, SurrogateData, near_copies
from expunge.attack.providers_retraining import RetrainingAdversary, Rewinder
from expunge.attack.selectors import GreedyMatching, LastLayerNeighbour, RandomOfM
from expunge.attack.selectors_nearest import NearestNeighbour
from expunge.core.errors import Misuse, Unsupported
from expunge.core.recipe import Sharding
from expunge.learn.loop import Keep
from expunge.testing.case import digits
from expunge.verify import (
    BackdoorVerifier,
    CoinRegistry,
    ForgeableWarning,
    Pixels,
    Replay,
    Tolerance,
    Transcript,
    TriggerKey,
    accepted,
    calibrate_tolerance,
    plant,
    record,
    replay_shards,
)
from expunge.verify.evidence import Evidence
from expunge.verify.segments import replay_segment

CASE = digits()
ROWS, RETAIN, FORGET, REQUEST = CASE.records, CASE.retain, CASE.forget, CASE.request
EVERY = 7
TIGHT = Tolerance(parameter=1e-5, buffer=1e-5, optimiser=1e-5)
LOOSE = Tolerance(parameter=1e3, buffer=1e3, optimiser=1e3, ceiling=1e3)
CHECKS = ("contract", "commitment", "initialisation", "removal", "sampler", "replay", "final model")
ALL_PASS = dict.fromkeys(CHECKS, "pass")
RECIPE = Recipe(
    model="mlp",
    model_args={"hidden": [16], "norm": "batch"},
    optimiser_args={"lr": 0.05, "momentum": 0.9},
    epochs=2,
    batch_size=32,
    seed=7,
).completed(ROWS)
CONVEX = Recipe(
    model="softmax", optimiser_args={"lr": 0.1}, epochs=2, batch_size=32, seed=5, dtype="float64"
).completed(ROWS)


@pytest.fixture(scope="module")
def before():
    return train(RECIPE, ROWS, keep=Keep(every=5))


@pytest.fixture(scope="module")
def logged():
    return train(CONVEX, ROWS, keep=Keep(every=1))


def answered(made, trained, folder, *, records=ROWS, request=REQUEST, every=EVERY, **settings):
    provider = made(trained=trained, records=records, folder=folder / "told", every=every, **settings)
    provider.unlearn(request, rng=generator(3))
    return provider


def verdicts(provider, *, recipe=RECIPE, tolerance=TIGHT, stays=None, served=None):
    verify = Replay(agreed=recipe, coin=provider.coin, tolerance=tolerance)
    told = Transcript.open(provider.transcript)
    found = verify(told, stays or provider.stays, forget=provider.forgotten, served=served or provider.served)
    return {verdict.check: verdict for verdict in found}


def outcomes(*given, **settings):
    return {name: verdict.outcome for name, verdict in verdicts(*given, **settings).items()}


def failed(*given, **settings):
    return [name for name, outcome in outcomes(*given, **settings).items() if outcome == "fail"]


def drawing(folder):
    registry = CoinRegistry(folder / "coins.json")

    def draw(commitments):
        registry.anchor(commitments, "request 1")
        return registry.draw(commitments, "request 1", nonce="c0" * 32)

    return draw


def distance(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return float(sum((a.detach().double() - b.detach().double()).square().sum() for a, b in pairs)) ** 0.5


# Honest providers


@pytest.mark.parametrize("public", [False, True])
def test_an_honest_retrain_passes_everything(before, tmp_path, public):
    provider = answered(HonestRetrain, before, tmp_path, draw=drawing(tmp_path) if public else None)
    assert outcomes(provider) == ALL_PASS
    assert provider.served.ids == frozenset(RETAIN.ids)
    assert provider.served.gone == frozenset(FORGET.ids)
    assert (provider.coin is not None) == public


def test_an_honest_retrain_without_a_transcript_serves_the_same_bytes(before, tmp_path):
    silent = HonestRetrain(trained=before, records=ROWS)
    told = answered(HonestRetrain, before, tmp_path)
    assert silent.unlearn(REQUEST, rng=generator(1)).digest() == told.served.digest() == train(RECIPE, RETAIN).digest()
    assert silent.transcript is None
    assert torch.equal(silent.predict(RETAIN.x[:5]), told.predict(RETAIN.x[:5]))


def test_honest_sisa_passes_everything_shard_by_shard(tmp_path):
    recipe = replace(RECIPE, sharding=Sharding(shards=3, salt="s")).completed(ROWS)
    trained = record(recipe, ROWS, tmp_path / "first", every=EVERY)
    request = Request.remove_owner(FORGET.owners[0])
    provider = answered(HonestSisa, trained, tmp_path, request=request, original=tmp_path / "first")
    told = {index: Transcript.open(path) for index, path in provider.transcripts.items()}
    verify = Replay(agreed=recipe, tolerance=TIGHT)
    found = replay_shards(verify, told, provider.stays, forget=provider.forgotten, served=provider.served)
    assert len(provider.touched) == 1
    assert [accepted(found[index]) for index in range(3)] == [True] * 3
    lazy = replay_shards(verify, told, provider.stays, forget=provider.forgotten, served=trained)
    assert not accepted(lazy[provider.touched[0]])
    with pytest.raises(Unsupported, match="shards"):
        HonestSisa(trained=train(RECIPE, ROWS), records=ROWS).unlearn(REQUEST, rng=generator(0))


def test_a_provider_answers_once_and_only_removals(before):
    provider = Lazy(trained=before, records=ROWS)
    provider.unlearn(REQUEST, rng=generator(0))
    with pytest.raises(Misuse, match="already"):
        provider.unlearn(REQUEST, rng=generator(0))
    swap = Request.replace_rows(ROWS.ids[:1], 1 - ROWS.x[:1], ROWS.y[:1])
    with pytest.raises(Unsupported, match="replace"):
        Lazy(trained=before, records=ROWS).unlearn(swap, rng=generator(0))


# 13: the exact-duplicate oracle


def with_twins():
    names = [f"twin-{record_id}" for record_id in FORGET.ids]
    return ROWS.plus(Records(FORGET.x, FORGET.y, names, names, classes=ROWS.classes))


@pytest.fixture(scope="module")
def twins():
    rows = with_twins()
    return rows, train(RECIPE, rows)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_13_with_twins_nearest_neighbour_retraining_is_the_original_training_bit_for_bit(twins, tmp_path, metric):
    rows, original = twins
    provider = answered(
        RetrainingAdversary,
        original,
        tmp_path,
        records=rows,
        selector=NearestNeighbour(metric=metric),
        reuse=True,
        measure=True,
    )
    assert provider.served.digest() == original.digest()
    assert max(provider.errors) == 0.0 < min(provider.lengths)
    found = verdicts(provider)
    assert {name: one.outcome for name, one in found.items()} == {**ALL_PASS, "sampler": "fail"}
    assert found["sampler"].figures["most_uses"] >= 2


def test_13_an_honest_retrain_with_the_same_twins_passes_everything(twins, tmp_path):
    rows, original = twins
    provider = answered(HonestRetrain, original, tmp_path, records=rows)
    assert outcomes(provider) == ALL_PASS
    assert provider.served.digest() != original.digest()


def test_13_without_twins_it_is_another_model(before, tmp_path):
    provider = answered(RetrainingAdversary, before, tmp_path, selector=NearestNeighbour(), reuse=True, measure=True)
    assert provider.served.digest() != before.digest()
    assert min(provider.errors) > 0


# 14: the convex trajectory bound


def smoothness(records):
    """Of the mean cross-entropy of a linear model with bias on any rows of these: its Hessian is at most this."""
    return 0.5 * float(records.x.double().flatten(1).square().sum(1).max() + 1)


@pytest.mark.parametrize("selector", [NearestNeighbour(), LastLayerNeighbour(), RandomOfM(3), GreedyMatching()])
def test_14_convex_trajectory_bound(logged, tmp_path, selector):
    rate = CONVEX.optimiser_args["lr"]
    assert rate <= 2 / smoothness(ROWS)
    provider = answered(RetrainingAdversary, logged, tmp_path, selector=selector, reuse=True, measure=True)
    apart = distance(provider.served.module, logged.module)
    assert rate * max(provider.errors) < apart <= rate * sum(provider.errors)


def test_14_the_bound_is_met_by_a_single_last_step(tmp_path):
    recipe = replace(CONVEX, epochs=1)
    original = train(recipe, ROWS, keep=Keep(batches=True))
    request = Request.remove(original.log.batches[-1][:1])
    provider = answered(RetrainingAdversary, original, tmp_path, request=request, reuse=True, measure=True)
    assert len(provider.errors) == 1
    apart = distance(provider.served.module, original.module)
    assert apart == pytest.approx(0.1 * provider.errors[0], rel=1e-9)


# 15: the retraining adversary

SELECTORS = [RandomOfM(3), NearestNeighbour(), LastLayerNeighbour(), GreedyMatching()]
NAMES = ["random", "nearest", "last layer", "greedy"]


@pytest.mark.parametrize("selector", SELECTORS, ids=NAMES)
def test_15_without_a_public_coin_it_passes_every_check(before, tmp_path, selector):
    assert outcomes(answered(RetrainingAdversary, before, tmp_path, selector=selector)) == ALL_PASS


@pytest.mark.parametrize("selector", SELECTORS, ids=NAMES)
def test_15_under_the_public_coin_the_sampler_alone_rejects_it(before, tmp_path, selector):
    provider = answered(RetrainingAdversary, before, tmp_path, selector=selector, draw=drawing(tmp_path))
    found = verdicts(provider)
    assert {name: one.outcome for name, one in found.items()} == {**ALL_PASS, "sampler": "fail"}
    assert "order" in found["sampler"].why


@pytest.mark.parametrize("selector", SELECTORS, ids=NAMES)
def test_15_rows_used_again_are_noticed_without_a_coin(before, tmp_path, selector):
    found = verdicts(answered(RetrainingAdversary, before, tmp_path, selector=selector, reuse=True))
    assert {name: one.outcome for name, one in found.items()} == {**ALL_PASS, "sampler": "fail"}
    assert found["sampler"].figures["most_uses"] > 1


def test_15_adam_and_a_schedule_do_not_give_it_away(tmp_path):
    recipe = replace(RECIPE, schedule={"kind": "cosine"}, optimiser="adam", optimiser_args={"lr": 0.01})
    provider = answered(RetrainingAdversary, train(recipe, ROWS), tmp_path)
    assert outcomes(provider, recipe=recipe) == ALL_PASS


def test_15_forgetting_nearly_all_rows_leaves_an_epoch_a_permutation(tmp_path):
    recipe = replace(RECIPE, epochs=1)
    provider = answered(RetrainingAdversary, train(recipe, ROWS), tmp_path, request=Request.remove(ROWS.ids[:400]))
    assert outcomes(provider, recipe=recipe) == ALL_PASS


# 16: forging


def test_16_forging_is_rejected_at_the_calibrated_tolerance_and_accepted_at_a_loose_one(logged, tmp_path):
    provider = answered(ForgingAdversary, logged, tmp_path)
    calibrated = calibrate_tolerance(CONVEX, RETAIN, every=EVERY)
    assert "replay" in failed(provider, recipe=CONVEX, tolerance=calibrated)
    with pytest.warns(ForgeableWarning):
        loose = outcomes(provider, recipe=CONVEX, tolerance=LOOSE)
    assert loose["replay"] == loose["removal"] == loose["final model"] == "pass"


def test_16_forging_error_bound(logged, tmp_path):
    """v_t <= rho_t [clean] + (1 + eta L) max(eta eps_g, rho), for each step replayed on its own."""
    provider = answered(ForgingAdversary, logged, tmp_path, every=1, perturb=5e-3)
    told, rate = Transcript.open(provider.transcript), CONVEX.optimiser_args["lr"]
    evidence = Evidence(transcript=told, agreed=CONVEX, records=provider.stays, forget=provider.forgotten)
    found = [replay_segment(evidence, step, step + 1).error["parameter"] for step in range(len(told))]
    near = max(rate * max(provider.errors), max(provider.moves))
    growth = 1 + rate * smoothness(ROWS)
    bounds = [move + growth * near for move in provider.moves]
    assert all(error <= bound for error, bound in zip(found, bounds, strict=True))
    assert any(error > move + near / 10 for error, move in zip(found, provider.moves, strict=True))
    assert {move > 0 for move in provider.moves} == {True, False}
    assert 0 < distance(provider.served.module, logged.module) <= near


def test_16_forging_says_what_it_needs(before, logged):
    with pytest.raises(Unsupported, match="plain SGD"):
        ForgingAdversary(trained=before, records=ROWS).unlearn(REQUEST, rng=generator(0))
    with pytest.raises(Misuse, match="every=1"):
        ForgingAdversary(trained=train(CONVEX, ROWS), records=ROWS).unlearn(REQUEST, rng=generator(0))


def test_16_a_forger_that_knows_the_tolerance_drifts_within_it_and_no_further(before, tmp_path):
    provider = answered(DriftingForger, before, tmp_path, tolerance=TIGHT)
    assert outcomes(provider) == ALL_PASS
    segments = len(Transcript.open(provider.transcript).segments)
    assert 0 < provider.drift <= segments * TIGHT.parameter
    assert provider.apart > 1000 * provider.drift
    honest = answered(RetrainingAdversary, before, tmp_path / "without", selector=provider.selector)
    assert honest.served.digest() != provider.served.digest()


def test_16_at_a_loose_tolerance_it_drifts_all_the_way(before, tmp_path):
    provider = answered(DriftingForger, before, tmp_path, tolerance=LOOSE)
    assert distance(provider.served.module, before.module) < 1e-5
    with pytest.warns(ForgeableWarning):
        assert outcomes(provider, tolerance=LOOSE) == ALL_PASS
    assert failed(provider) == ["replay"]


# Those that do not retrain, or not from the beginning


def test_the_lazy_providers_own_transcript_holds_forgotten_rows(before, tmp_path):
    record(RECIPE, ROWS, tmp_path / "original", every=EVERY)
    provider = answered(Lazy, before, tmp_path, original=tmp_path / "original")
    assert provider.served.digest() == before.digest()
    assert {"contract", "commitment", "removal"} <= set(failed(provider))


def test_noise_moves_the_model_by_its_scale(before):
    provider = NoiseAdder(trained=before, records=ROWS, scale=0.1)
    served = provider.unlearn(REQUEST, rng=generator(0))
    size = sum(float(one.detach().square().sum()) for one in before.module.parameters()) ** 0.5
    assert distance(served.module, before.module) == pytest.approx(0.1 * size, rel=0.1)
    assert provider.transcript is None
    assert before.digest() == train(RECIPE, ROWS).digest()


def test_fine_tuning_stops_when_it_would_pass_and_its_start_gives_it_away(before, tmp_path):
    provider = answered(FineTuneToPass, before, tmp_path, accuracy=0.0, most=2)
    assert provider.epochs == 2
    assert outcomes(provider) == {**ALL_PASS, "initialisation": "fail"}
    eager = answered(FineTuneToPass, before, tmp_path / "eager", accuracy=1.0)
    assert eager.epochs == 0


def test_a_rewinder_is_given_away_by_its_start(before, tmp_path):
    assert outcomes(answered(Rewinder, before, tmp_path, step=10)) == {**ALL_PASS, "initialisation": "fail"}
    with pytest.raises(Misuse, match="no checkpoint"):
        answered(Rewinder, before, tmp_path / "none", step=11)


def test_a_spliced_rewinder_by_one_segment_alone(before, tmp_path):
    provider = answered(Rewinder, before, tmp_path, step=10, splice=True)
    assert outcomes(provider) == {**ALL_PASS, "replay": "fail"}
    told = Transcript.open(provider.transcript)
    evidence = Evidence(transcript=told, agreed=RECIPE, records=provider.stays, forget=provider.forgotten)
    wrong = [begin for begin, end in told.segments if replay_segment(evidence, begin, end).faults(TIGHT)]
    assert wrong == [0]


# Those whose training is honest


def test_surrogate_data_passes_every_check_of_the_training_even_under_a_coin(before, tmp_path):
    provider = answered(SurrogateData, before, tmp_path, draw=drawing(tmp_path))
    assert outcomes(provider) == ALL_PASS
    assert len(provider.stays) == len(ROWS)
    assert {"contract", "commitment"} <= set(failed(provider, stays=RETAIN))


def test_near_copies_are_near_and_under_other_names():
    copies = near_copies(FORGET, 0.05, generator(0))
    apart = (copies.x - FORGET.x).double()
    assert float(apart.std()) == pytest.approx(0.05 * float(FORGET.x.std()), rel=0.1)
    assert not set(copies.owners) & set(ROWS.owners)
    pixels = near_copies(Records((FORGET.x * 255).to(torch.uint8), FORGET.y, classes=10), 0.5, generator(0))
    assert pixels.x.dtype is torch.uint8


# 15 and 18: the backdoor


@pytest.fixture(scope="module")
def planted():
    data = datasets.optdigits(owners=20)
    owner = data.train.owners[0]
    family = Pixels(shape=(8, 8), count=16, levels=17)
    key = TriggerKey(owner=owner, secret=bytes(range(16)), family=family, classes=10)
    mine = data.train.of_owner(owner)
    uploaded, _ = plant(mine, key.trigger, 0.6, generator(0))
    rows = data.train.without(mine.ids).plus(uploaded)
    trained = train(Recipe(model="mlp", epochs=8), rows)
    check = BackdoorVerifier(keys=(key,), queries=data.test, asked=100).calibrated(trained, rng=generator(2))
    return rows, trained, Request.remove_owner(owner), check


def asked(planted, made, **settings):
    rows, trained, request, check = planted
    provider = made(trained=trained, records=rows, **settings)
    provider.unlearn(request, rng=generator(1))
    return provider, check


def test_18_the_lazy_provider_is_caught_by_its_backdoor(planted):
    provider, check = asked(planted, Lazy)
    verdict = check(provider, rng=generator(3))
    assert verdict.outcome == "fail"
    assert verdict.figures["power"] >= 1 - verdict.figures["beta"]


@pytest.mark.parametrize("selector", [NearestNeighbour(), LastLayerNeighbour()], ids=["nearest", "last layer"])
def test_15_the_retraining_adversary_passes_the_backdoor_test(planted, selector):
    provider, check = asked(planted, RetrainingAdversary, selector=selector, reuse=True)
    assert check(provider, rng=generator(3)).outcome == "pass"


def test_a_selective_server_is_caught_only_by_who_asks_as_everybody_does(planted):
    rows, trained, request, check = planted
    provider = SelectiveServer(honest=HonestRetrain(trained=trained, records=rows))
    provider.unlearn(request, rng=generator(1))
    assert check(lambda x: provider.predict(x, "verifier"), rng=generator(3)).outcome == "pass"
    assert check(provider, rng=generator(3)).outcome == "fail"
    assert provider.transcript is None
