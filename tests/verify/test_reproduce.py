"""Every fault of a transcript is rejected by the check that is named after it, and by no other."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import Corrupt, EmptyRetain, Impossible, Misuse, Unsupported
from expunge.core.events import GaussianNoise
from expunge.core.recipe import Pruning, Recipe, Sharding
from expunge.core.records import Records
from expunge.learn.build import allow_code, build, seeded
from expunge.learn.loop import threads
from expunge.learn.shards import shards_of
from expunge.learn.training import train
from expunge.verify import reproduce, states
from expunge.verify.recorded import record
from expunge.verify.recorder import Recorder, recording
from expunge.verify.reproduce import Replay, accepted
from expunge.verify.spot import All, Both, Random, TopQ, chance_of_missing
from expunge.verify.tolerance import EXACT, ForgeableWarning, Tolerance, calibrate_tolerance
from expunge.verify.transcript import Transcript
from tests.verify.transcripts import (
    EVERY,
    FORGET,
    RECIPE,
    RETAIN,
    SALT,
    TIGHT,
    Pages,
    cheat,
    failed,
    flip,
    forged,
    outcomes,
    plan,
)

VERIFY = Replay(agreed=RECIPE, tolerance=TIGHT)
ALL_PASS = dict.fromkeys(
    ("contract", "commitment", "initialisation", "removal", "sampler", "replay", "final model"), "pass"
)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest") / "transcript"
    return folder, record(RECIPE, RETAIN, folder, every=EVERY, salt=SALT)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def figure(verdicts, check, name):
    return next(verdict for verdict in verdicts if verdict.check == check).figures[name]


def test_an_honest_training_passes_every_check_to_the_bit(honest):
    folder, trained = honest
    verdicts = Replay(agreed=RECIPE, tolerance=EXACT)(Transcript.open(folder), RETAIN, forget=FORGET, served=trained)
    assert outcomes(verdicts) == ALL_PASS
    assert accepted(verdicts)
    for group in ("parameter", "buffer", "optimiser"):
        assert figure(verdicts, "replay", f"worst_{group}") == 0.0


def test_verifying_twice_says_the_same_and_leaves_every_byte_of_the_transcript(honest):
    folder, trained = honest
    before, transcript = bytes_of(folder), Transcript.open(folder)
    digest = transcript.digest()
    first, second = (VERIFY(transcript, RETAIN, forget=FORGET, served=trained) for _ in range(2))
    assert first == second
    assert transcript.digest() == digest
    assert bytes_of(folder) == before


def test_state_that_an_optimiser_shares_with_the_evidence_is_noticed(honest, monkeypatch):
    def aliased(state, module, optimiser):
        restore(state, module, optimiser)
        parameters = [one for group in optimiser.param_groups for one in group["params"]]
        for index, parameter in enumerate(parameters):
            for name in optimiser.state[parameter]:
                optimiser.state[parameter][name] = state[f"optimiser/{index}/{name}"]

    restore = states.restore
    monkeypatch.setattr("expunge.verify.tolerance.restore", aliased)
    with pytest.raises(Corrupt, match="changed the checkpoint"):
        VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET)


def test_torch_itself_would_share_it():
    module = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    kept = optimiser.state_dict()
    optimiser.load_state_dict(kept)
    buffer = optimiser.state[module.weight]["momentum_buffer"]
    assert buffer.data_ptr() == kept["state"][0]["momentum_buffer"].data_ptr()


# Faults of a folder that was changed after an honest training: (name, change, with a new chain, the check it fails).


def low_bit(pages):
    flip(pages.states[14]["parameter/body.1.weight"], 0)


def high_bit(pages):
    flip(pages.states[14]["parameter/body.1.weight"], 31)


def momentum(pages):
    pages.states[14]["optimiser/0/momentum_buffer"][0] += 0.01


def some_momentum_lost(pages):
    pages.states[14].pop("optimiser/0/momentum_buffer")


def all_momentum_lost(pages):
    pages.states[14] = {name: one for name, one in pages.states[14].items() if "momentum" not in name}


def wide_momentum(pages):
    pages.states[14]["optimiser/0/momentum_buffer"] = pages.states[14]["optimiser/0/momentum_buffer"].double()


def foreign_state(pages):
    pages.states[14]["optimiser/99/momentum_buffer"] = torch.zeros(1)


def short_coins(pages):
    pages.states[14]["coins/cpu"] = pages.states[14]["coins/cpu"][:16].clone()


def invalid_coins(pages):
    pages.states[14]["coins/cpu"].fill_(255)


def dropouts_coins(pages):
    pages.states[14]["coins/cpu"][100] += 1


def buffer(pages):
    name = next(name for name in pages.states[28] if name.endswith("running_mean"))
    pages.states[28][name][0] += 0.01


def swap(pages):
    batch = pages.steps["batch"]
    batch[[3, 70]] = batch[[70, 3]]


def swap_within_a_batch(pages):
    batch = pages.steps["batch"]
    batch[[3, 4]] = batch[[4, 3]]


def drop(pages):
    sizes = pages.steps["sizes"].tolist()
    batches = list(pages.steps["batch"].split(sizes))
    del batches[9], sizes[9]
    pages.steps["batch"], pages.steps["sizes"] = torch.cat(batches), torch.tensor(sizes, dtype=torch.int32)
    keep = [index for index in range(len(pages.steps["links"])) if index != 10]
    for name in ("digests", "links"):
        pages.steps[name] = pages.steps[name][keep].clone()
    last = len(sizes)
    pages.states[last] = pages.states.pop(last + 1)
    pages.manifest["checkpoints"][str(last)] = pages.manifest["checkpoints"].pop(str(last + 1))


def rate(pages):
    pages.manifest["contract"]["recipe"]["optimiser_args"]["lr"] = 0.06


def epochs(pages):
    pages.manifest["contract"]["recipe"]["epochs"] = 3


def build_name(pages):
    pages.manifest["contract"]["build"] = "torch 9 abacus"


def root(pages):
    count, _, digits = pages.manifest["contract"]["data_root"].partition(":")
    pages.manifest["contract"]["data_root"] = f"{count}:{'0' * len(digits)}"


def unknown_row(pages):
    pages.steps["rows"][0] = 0


def link(pages):
    pages.steps["links"][5, 0] ^= 1


def passed_by(pages):
    pages.steps["digests"][5, 0] ^= 1


def sign_of_a_zero(pages):
    state = pages.states[14]
    name = next(name for name in state if name.endswith("momentum_buffer") and bool((state[name] == 0).any()))
    flat = state[name].view(-1)
    flat[(flat == 0).nonzero()[0]] *= -1


def not_a_number(pages):
    pages.states[14]["parameter/body.1.weight"].view(-1)[0] = float("nan")


def other_shape(pages):
    pages.states[14]["parameter/body.1.weight"] = torch.zeros(3)


def start(pages):
    pages.states[0]["parameter/body.1.weight"].view(-1)[0] += 1e-3


def start_momentum(pages):
    weight = pages.states[0]["parameter/body.1.weight"]
    pages.states[0]["optimiser/0/momentum_buffer"] = torch.full_like(weight, 1e-6)


FORGERIES = [
    ("a low bit of a weight", low_bit, False, "commitment"),
    ("the sign of a weight", high_bit, False, "commitment"),
    ("the sign of a weight, chained anew", high_bit, True, "replay"),
    ("momentum", momentum, False, "commitment"),
    ("momentum, chained anew", momentum, True, "replay"),
    ("some momentum lost, chained anew", some_momentum_lost, True, "replay"),
    ("all momentum lost, chained anew", all_momentum_lost, True, "replay"),
    ("momentum in float64, chained anew", wide_momentum, True, "replay"),
    ("momentum of no parameter, chained anew", foreign_state, True, "replay"),
    ("coins of another size, chained anew", short_coins, True, "replay"),
    ("coins that are none, chained anew", invalid_coins, True, "replay"),
    ("dropout's coins, chained anew", dropouts_coins, True, "replay"),
    ("a buffer", buffer, False, "commitment"),
    ("a buffer, chained anew", buffer, True, "replay"),
    ("two ids swapped", swap, False, "commitment"),
    ("two ids swapped, chained anew", swap, True, "replay"),
    ("two ids swapped within a batch", swap_within_a_batch, False, "commitment"),
    ("a step dropped", drop, False, "commitment"),
    ("learning rate", rate, False, "contract"),
    ("learning rate, chained anew", rate, True, "contract"),
    ("epochs, chained anew", epochs, True, "contract"),
    ("build", build_name, False, "commitment"),
    ("data root, chained anew", root, True, "commitment"),
    ("a row that nobody has, chained anew", unknown_row, True, "commitment"),
    ("a link", link, False, "commitment"),
    ("a model on the way, chained anew", passed_by, True, "replay"),
    ("the sign of a zero, chained anew", sign_of_a_zero, True, "replay"),
    ("not a number, chained anew", not_a_number, True, "replay"),
    ("another shape, chained anew", other_shape, True, "replay"),
]


@pytest.mark.parametrize(
    ("change", "rechain", "name"), [row[1:] for row in FORGERIES], ids=[row[0] for row in FORGERIES]
)
def test_a_changed_folder_is_rejected_by_the_named_check_alone(honest, tmp_path, change, rechain, name):
    folder, trained = honest
    told = Transcript.open(forged(folder, change, tmp_path / "forged", rechain=rechain))
    served = told.final if name == "replay" else trained
    verdicts = VERIFY(told, RETAIN, forget=FORGET, served=served)
    assert failed(verdicts) == [name]


def test_a_folder_that_was_not_changed_passes_through_the_forgers_hands(honest, tmp_path):
    told = Transcript.open(forged(honest[0], lambda pages: None, tmp_path / "forged", rechain=True))
    assert outcomes(VERIFY(told, RETAIN, forget=FORGET, served=honest[1])) == ALL_PASS
    assert told.commitment == Transcript.open(honest[0]).commitment


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_single_byte_of_a_transcript_is_changed_it_is_not_accepted(honest, tmp_path, data):
    folder, trained = honest
    pages = Pages(folder)
    rechain = data.draw(st.booleans())
    places = [] if rechain else [("steps", name) for name in sorted(pages.steps)]
    places += [(step, name) for step in sorted(pages.states) for name in sorted(pages.states[step])]
    where, name = data.draw(st.sampled_from(places))
    tensor = (pages.steps if where == "steps" else pages.states[where])[name]
    view = tensor.view(-1).view(torch.uint8)
    view[data.draw(st.integers(0, len(view) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if rechain:
        pages.rechain()
    try:
        told = Transcript.open(pages.write(tmp_path / "forged"))
    except Misuse:
        return
    verify = replace(VERIFY, tolerance=EXACT)
    assert not accepted(verify(told, RETAIN, forget=FORGET, served=trained))


# Cheats that really train: the chain holds, as the provider made it itself.


def test_a_model_other_than_the_last_state_fails_the_final_model_alone(honest):
    other = train(replace(RECIPE, seed=8), RETAIN)
    verdicts = VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, served=other)
    assert failed(verdicts) == ["final model"]
    assert figure(verdicts, "replay", "worst_parameter") == 0.0


def test_a_training_at_another_learning_rate_than_it_says_fails_the_replay_alone(tmp_path):
    faster = replace(RECIPE, optimiser_args={"lr": 0.06, "momentum": 0.9})
    cheat(tmp_path / "t", plan(RECIPE, RETAIN), trained=faster)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["replay"]


def test_a_training_at_another_learning_rate_that_says_so_fails_the_contract_alone(tmp_path):
    faster = replace(RECIPE, optimiser_args={"lr": 0.06, "momentum": 0.9})
    record(faster, RETAIN, tmp_path / "t", every=EVERY)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["contract"]


def test_a_step_that_was_never_made_fails_the_sampler_alone(tmp_path):
    batches = plan(RECIPE, RETAIN)
    del batches[1][9]
    cheat(tmp_path / "t", batches)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["sampler"]


def test_a_last_epoch_that_was_never_made_fails_the_sampler_alone(tmp_path):
    cheat(tmp_path / "t", plan(RECIPE, RETAIN)[:1])
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["sampler"]


def test_a_row_used_twice_in_an_epoch_in_place_of_another_fails_the_sampler_alone(tmp_path):
    batches = plan(RECIPE, RETAIN)
    batches[1][2][1][0] = int(batches[1][0][1][0])
    cheat(tmp_path / "t", batches)
    verdicts = VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)
    assert failed(verdicts) == ["sampler"]
    assert figure(verdicts, "sampler", "most_uses") == 2


def test_another_order_passes_unless_the_coins_order_is_asked_for_and_then_fails_the_sampler_alone(tmp_path):
    batches = plan(replace(RECIPE, seed=99), RETAIN)
    cheat(tmp_path / "t", batches)
    told = Transcript.open(tmp_path / "t")
    assert failed(VERIFY(told, RETAIN, forget=FORGET)) == []
    assert failed(replace(VERIFY, order=True)(told, RETAIN, forget=FORGET)) == ["sampler"]


def test_another_beginning_fails_the_initialisation_alone(tmp_path):
    cheat(tmp_path / "t", plan(RECIPE, RETAIN), trained=replace(RECIPE, seed=99))
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["initialisation"]


def test_warm_momentum_or_a_changed_weight_at_the_beginning_fails_the_initialisation(honest, tmp_path):
    for change in (start, start_momentum):
        told = Transcript.open(forged(honest[0], change, tmp_path / change.__name__, rechain=True))
        assert "initialisation" in failed(VERIFY(told, RETAIN, forget=FORGET))


def test_a_forgotten_row_in_one_batch_fails_the_removal_alone(tmp_path):
    batches = plan(RECIPE, RETAIN)
    mixed = RETAIN.plus(FORGET)
    batches[1][2] = (mixed, torch.cat([batches[1][2][1][1:], torch.tensor([len(RETAIN)])]))
    cheat(tmp_path / "t", batches)
    verdicts = VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)
    assert failed(verdicts) == ["removal"]
    assert outcomes(verdicts) == {
        **ALL_PASS,
        "removal": "fail",
        "sampler": "inconclusive",
        "final model": "inconclusive",
    }


def twins_of(forget):
    names = [f"twin-{name}" for name in forget.ids]
    return Records(forget.x, forget.y, names, [f"twin-{owner}" for owner in forget.owners], classes=10)


def test_an_honest_training_on_identical_rows_of_other_owners_passes_everything(tmp_path):
    records = RETAIN.plus(twins_of(FORGET))
    trained = record(RECIPE, records, tmp_path / "t", every=EVERY)
    verdicts = VERIFY(Transcript.open(tmp_path / "t"), records, forget=FORGET, served=trained)
    assert outcomes(verdicts) == ALL_PASS


def test_a_twin_in_place_of_each_forgotten_row_gives_the_old_model_and_is_caught_by_multiplicities_alone(tmp_path):
    recipe, retain = replace(RECIPE, schedule={"kind": "constant"}), RETAIN.plus(twins_of(FORGET))
    everything = retain.plus(FORGET)
    ids = everything.ids
    instead = torch.tensor([ids.index(f"twin-{name}") if name in FORGET else i for i, name in enumerate(ids)])
    batches = [[(everything, instead[rows]) for _, rows in epoch] for epoch in plan(recipe, everything)]
    made = cheat(tmp_path / "t", batches, trained=recipe, said=recipe, records=retain)
    assert made.digest() == train(recipe, everything).digest()
    verify = replace(VERIFY, agreed=recipe)
    verdicts = verify(Transcript.open(tmp_path / "t"), retain, forget=FORGET, served=made)
    assert outcomes(verdicts) == {**ALL_PASS, "sampler": "fail"}
    assert figure(verdicts, "sampler", "most_uses") >= 2


def test_an_owners_copy_that_stays_may_be_used_as_often_as_it_stays_and_no_more(tmp_path):
    name = RETAIN.ids[0]
    twice = RETAIN.take([name])
    copy = Records(twice.x, twice.y, ["copy"], twice.owners, classes=10)
    record(RECIPE, RETAIN, tmp_path / "fair", every=EVERY)
    assert outcomes(VERIFY(Transcript.open(tmp_path / "fair"), RETAIN, forget=copy))["removal"] == "pass"
    batches = plan(RECIPE, RETAIN)
    position, other = 0, batches[0][3][1]
    other[0 if int(other[0]) != position else 1] = position
    cheat(tmp_path / "unfair", batches)
    assert "removal" in failed(VERIFY(Transcript.open(tmp_path / "unfair"), RETAIN, forget=copy))


def test_the_transcript_of_the_training_before_does_not_pass_for_the_one_after(tmp_path):
    everything = RETAIN.plus(FORGET)
    old = record(RECIPE, everything, tmp_path / "t", every=EVERY)
    verdicts = VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET, served=old)
    assert {"contract", "commitment", "removal"} <= set(failed(verdicts))


def test_a_transcript_other_than_the_one_committed_to_fails_the_commitment_alone(honest, tmp_path):
    batches = plan(replace(RECIPE, seed=99), RETAIN)
    cheat(tmp_path / "t", batches)
    committed = Transcript.open(honest[0]).commitment
    verdicts = VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET, committed=committed)
    assert failed(verdicts) == ["commitment"]
    assert failed(VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, committed=committed)) == []


# Round trips


class Dropping(nn.Module):
    def __init__(self, shape, outputs):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, outputs)
        )

    def forward(self, x):
        return self.layers(x)


ROUND_TRIPS = {
    "plain": {"model": "softmax", "optimiser_args": {"lr": 0.1}},
    "nesterov": {"model": "mlp", "optimiser_args": {"lr": 0.05, "momentum": 0.9, "nesterov": True}},
    "adam": {"model": "mlp", "optimiser": "adam", "optimiser_args": {"lr": 0.001}, "weight_decay": 1e-3},
    "schedule": {"model": "mlp", "schedule": {"kind": "steps", "at": [1], "factor": 0.1}},
    "dropout": {"model": "dropping", "optimiser_args": {"lr": 0.05, "momentum": 0.9}},
    "norm bound": {"model": "mlp", "max_norm": 3.0},
    "float64": {"model": "mlp", "dtype": "float64"},
}


@pytest.mark.parametrize("settings", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_every_kind_of_state_survives_the_round_trip_to_the_bit(tmp_path, settings):
    model = allow_code(Dropping) if settings["model"] == "dropping" else settings["model"]
    recipe = Recipe(**{**settings, "model": model}, epochs=2, batch_size=32, seed=3)
    records = RETAIN.select(range(160))
    trained = record(recipe, records, tmp_path / "t", every=4)
    assert trained.digest() == train(recipe, records).digest()
    verdicts = Replay(agreed=recipe, tolerance=EXACT)(
        Transcript.open(tmp_path / "t"), records, forget=FORGET, served=trained
    )
    assert outcomes(verdicts) == ALL_PASS


def test_honest_replays_differ_by_less_than_a_millionth_across_thread_counts(tmp_path):
    recipe = Recipe(model="mlp", model_args={"hidden": [256]}, epochs=2, batch_size=256).completed(RETAIN)
    record(recipe, RETAIN, tmp_path / "t")
    told = Transcript.open(tmp_path / "t")
    verdicts = Replay(agreed=recipe, tolerance=TIGHT, threads=2)(told, RETAIN, forget=FORGET)
    assert failed(verdicts) == []
    assert figure(verdicts, "replay", "worst_parameter") < 1e-6
    same = Replay(agreed=recipe, tolerance=EXACT, threads=1)(told, RETAIN, forget=FORGET)
    assert figure(same, "replay", "worst_parameter") == 0.0


def test_the_measured_tolerance_is_ten_times_the_largest_honest_error_and_lets_the_honest_pass(honest):
    tolerance = calibrate_tolerance(RECIPE, RETAIN, every=EVERY)
    assert tolerance.honest["1 threads"] == 0.0
    assert 0 < tolerance.honest["float64"] < 1e-5
    assert tolerance.parameter == 10 * max(tolerance.honest.values())
    measured = Replay(agreed=RECIPE)(Transcript.open(honest[0]), RETAIN, forget=FORGET)
    assert failed(measured) == []
    assert figure(measured, "replay", "forgeable") == 0


def test_the_ceiling_bounds_what_is_allowed_by_a_thousandth_of_a_step():
    tolerance = Tolerance(parameter=1.0, buffer=1.0, optimiser=1.0)
    assert tolerance.limit("parameter", 0.5) == pytest.approx(5e-4)
    assert not tolerance.forgeable(0.5)
    assert not replace(tolerance, ceiling=1e-2).forgeable(0.5)
    assert replace(tolerance, ceiling=0.011).forgeable(0.5)
    with pytest.raises(Misuse, match="tolerances"):
        Tolerance(parameter=float("nan"), buffer=0.0, optimiser=0.0)


def test_a_loose_tolerance_lets_a_forged_step_pass_and_warns(honest, tmp_path):
    told = Transcript.open(forged(honest[0], momentum, tmp_path / "forged", rechain=True))
    loose = Tolerance(parameter=100.0, buffer=100.0, optimiser=100.0, ceiling=100.0)
    with pytest.warns(ForgeableWarning, match="1 % of a step"):
        verdicts = Replay(agreed=RECIPE, tolerance=loose)(told, RETAIN, forget=FORGET)
    assert failed(verdicts) == []
    assert figure(verdicts, "replay", "forgeable") == 1


def test_honest_errors_beyond_the_ceiling_are_warned_of():
    with pytest.warns(ForgeableWarning, match="more often"):
        calibrate_tolerance(RECIPE, RETAIN, every=5, segments=1, ceiling=1e-9)


# Spot checks


def test_random_checks_miss_as_often_as_the_hypergeometric_says(honest, tmp_path):
    told = Transcript.open(honest[0])
    assert len(told.segments) == 4
    missed = sum(2 not in Random(2).choose(told, rng=generator(seed)) for seed in range(400))
    expected = chance_of_missing(4, 1, 2)
    assert expected == 0.5 <= (1 - 1 / 4) ** 2
    assert abs(missed / 400 - expected) < 4 * (0.25 / 400) ** 0.5
    assert chance_of_missing(4, 1, 4) == 0.0
    assert chance_of_missing(100, 5, 45) == pytest.approx(55 * 54 * 53 * 52 * 51 / (100 * 99 * 98 * 97 * 96))
    with pytest.raises(Misuse, match="faulty"):
        chance_of_missing(4, 5, 1)


def test_a_spot_check_replays_what_it_drew_and_says_what_it_may_miss(honest, tmp_path):
    told = Transcript.open(forged(honest[0], high_bit, tmp_path / "forged", rechain=True))
    faulty = {1, 2}  # the segments that end and begin at step 14
    for seed in range(4):
        spot = replace(VERIFY, budget=Random(1))
        verdicts = spot(told, RETAIN, forget=FORGET, rng=generator(seed))
        hit = bool(Random(1).choose(told, rng=generator(seed)) & faulty)
        assert failed(verdicts) == (["replay"] if hit else [])
        assert figure(verdicts, "replay", "miss_5_percent") == figure(verdicts, "replay", "miss_one") == 0.75
        assert figure(verdicts, "replay", "replayed") == 1


def test_the_largest_updates_are_found_and_budgets_join(honest):
    told = Transcript.open(honest[0])
    sizes = [states.distance(told.checkpoint(begin), told.checkpoint(end), "parameter") for begin, end in told.segments]
    largest = sizes.index(max(sizes))
    assert TopQ(1).choose(told, rng=generator()) == {largest}
    assert Both((TopQ(1), Random(1))).choose(told, rng=generator(3)) == {largest} | Random(1).choose(
        told, rng=generator(3)
    )
    assert All().choose(told, rng=generator()) == {0, 1, 2, 3}
    with pytest.raises(Misuse, match="at least one"):
        Random(0)


def test_one_leap_to_the_old_model_is_found_by_the_largest_update_and_by_chance_only_as_often_as_is_said(tmp_path):
    recipe = replace(RECIPE, epochs=4)
    old = train(recipe, RETAIN.plus(FORGET))
    recorder = Recorder(tmp_path / "t", recipe, RETAIN, every=EVERY, salt=SALT)
    with recording(recorder), seeded(recipe.seed, "dropout", "whole"):
        stepper = states.Stepper(build(recipe), recipe)
        recorder.begin(stepper.module, stepper.optimiser)
        for epoch, batches in enumerate(plan(recipe, RETAIN)):
            for source, rows in batches:
                x, y = next(iter(source.batches([rows])))
                stepper.step(x, y, epoch)
                if epoch == 1 and rows is batches[3][1]:
                    stepper.module.load_state_dict(old.module.state_dict())
                recorder.step(source, rows, stepper.module, stepper.optimiser)
        recorder.finish()
    told = Transcript.open(tmp_path / "t")
    verify = replace(VERIFY, agreed=recipe)
    assert failed(replace(verify, budget=TopQ(1))(told, RETAIN, forget=FORGET)) == ["replay"]
    found = [
        bool(failed(replace(verify, budget=Random(2))(told, RETAIN, forget=FORGET, rng=generator(seed))))
        for seed in range(12)
    ]
    assert 0 < sum(found) < 12


# Refusals


def test_a_certified_model_is_refused(honest):
    release = GaussianNoise(parameters=("head.weight",), sensitivity=1.0, sigma=1.0)
    noisy = replace(honest[1], releases=(release,), standing=Claim.CERTIFIED)
    with pytest.raises(Impossible, match="replayable noise"):
        VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, served=noisy)
    secret = replace(honest[1], secret={"head.weight": torch.zeros(1)})
    with pytest.raises(Impossible, match="replayable noise"):
        VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, served=secret)


def test_a_pruned_or_whole_sharded_recipe_is_refused():
    told = None
    for recipe in (replace(RECIPE, pruning=Pruning(sparsity=0.5)), replace(RECIPE, sharding=Sharding(shards=2))):
        with pytest.raises(Unsupported, match="dense models"):
            Replay(agreed=recipe)(told, RETAIN)


def test_every_shard_of_a_sharded_model_is_verified_by_itself(tmp_path):
    recipe = replace(RECIPE, sharding=Sharding(shards=2, salt="x"))
    trained = record(recipe, RETAIN, tmp_path / "t", every=EVERY)
    for index, rows in enumerate(shards_of(RETAIN, recipe.sharding)):
        verify = replace(VERIFY, agreed=recipe, shard=index)
        told = Transcript.open(tmp_path / "t" / f"part-{index:04d}")
        assert outcomes(verify(told, rows, forget=FORGET, served=trained.parts[index])) == ALL_PASS
        assert "contract" in failed(replace(verify, shard=1 - index)(told, rows, forget=FORGET))


def test_what_is_not_known_is_inconclusive_and_not_passed(honest):
    verdicts = VERIFY(Transcript.open(honest[0]), RETAIN)
    assert outcomes(verdicts) == {**ALL_PASS, "removal": "inconclusive", "final model": "inconclusive"}
    assert not accepted(verdicts)


def test_threads_are_as_they_were_after_verifying(honest):
    with threads(2), warnings.catch_warnings():
        VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET)
        assert torch.get_num_threads() == 2


def test_on_another_build_weights_may_begin_off_by_rounding_and_no_more(honest, tmp_path):
    for off, name in ((1e-8, []), (1e-4, ["initialisation"])):

        def elsewhere(pages, off=off):
            build_name(pages)
            pages.states[0]["parameter/body.1.weight"].view(-1)[0] += off

        told = Transcript.open(forged(honest[0], elsewhere, tmp_path / f"forged-{off}", rechain=True))
        assert [check for check in failed(VERIFY(told, RETAIN, forget=FORGET)) if check != "replay"] == name


def test_nothing_can_be_verified_without_rows_that_stay(honest):
    with pytest.raises(EmptyRetain):
        VERIFY(Transcript.open(honest[0]), RETAIN.select([]), forget=FORGET)


def test_a_served_digest_must_be_one(honest):
    with pytest.raises(Misuse, match="64"):
        VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, served="abc")


def test_the_checks_are_named():
    assert [check.name for check in VERIFY.checks()] == list(ALL_PASS)
    assert reproduce.Reexecution.name == "replay"
