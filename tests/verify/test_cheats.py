"""Cheats that are built by hand: each fails the check that is named after it, or is refused in one line."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch

from expunge.core.coins import generator
from expunge.core.errors import Corrupt, Misuse, UnreadableFile
from expunge.core.recipe import Sharding
from expunge.core.records import Records
from expunge.learn.build import build
from expunge.learn.shards import assemble, shards_of
from expunge.verify import states, transcript
from expunge.verify.coin import Coin, CoinRegistry, commit
from expunge.verify.recorded import record
from expunge.verify.reproduce import Replay, put_together, replay_shards
from expunge.verify.served import hits_of
from expunge.verify.spot import All, Both, Random, TopQ, at_random
from expunge.verify.states import same_coins
from expunge.verify.tolerance import EXACT
from expunge.verify.transcript import Transcript, checkpoint_name, next_link
from tests.verify.transcripts import (
    EVERY,
    FORGET,
    RECIPE,
    RETAIN,
    SALT,
    TIGHT,
    cheat,
    failed,
    forged,
    plan,
)

VERIFY = Replay(agreed=RECIPE, tolerance=TIGHT)
EVERYTHING = RETAIN.plus(FORGET)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest") / "transcript"
    return folder, record(RECIPE, RETAIN, folder, every=EVERY, salt=SALT)


def why(verdicts, check):
    return next(verdict.why for verdict in verdicts if verdict.check == check)


def figures(verdicts, check):
    return next(verdict.figures for verdict in verdicts if verdict.check == check)


# What the provider says of itself must buy it nothing.


def test_a_provider_that_names_another_build_has_no_freedom_at_the_start_at_tolerance_zero(honest, tmp_path):
    def elsewhere(pages):
        pages.manifest["contract"]["build"] = "torch 9 abacus"
        pages.states[0]["parameter/body.1.weight"].view(-1)[0] += 1e-7

    told = Transcript.open(forged(honest[0], elsewhere, tmp_path / "forged", rechain=True))
    assert "initialisation" not in failed(VERIFY(told, RETAIN, forget=FORGET))
    assert "initialisation" in failed(replace(VERIFY, tolerance=EXACT)(told, RETAIN, forget=FORGET))


def test_on_the_same_build_the_start_is_the_seeds_to_the_bit_at_any_tolerance(honest, tmp_path):
    def shifted(pages):
        pages.states[0]["parameter/body.1.weight"].view(-1)[0] += 1e-7

    told = Transcript.open(forged(honest[0], shifted, tmp_path / "forged", rechain=True))
    assert "initialisation" in failed(VERIFY(told, RETAIN, forget=FORGET))


def test_dropouts_coins_begin_where_the_seed_does(honest, tmp_path):
    def others(pages):
        pages.states[0]["coins/cpu"][100] += 1

    told = Transcript.open(forged(honest[0], others, tmp_path / "forged", rechain=True))
    assert "initialisation" in failed(VERIFY(told, RETAIN, forget=FORGET))


def test_the_largest_updates_alone_are_foreseen_and_lower_no_chance_of_missing(honest):
    told = Transcript.open(honest[0])
    for budget, drawn, missed in (
        (TopQ(2), 0, 1.0),
        (Random(1), 1, 0.75),
        (Both((TopQ(2), Random(1))), 1, 0.75),
        (Both((Random(1), Random(2))), 2, 0.5),
        (Random(9), 4, 0.0),
        (All(), 4, 0.0),
    ):
        chosen = budget.choose(told, rng=generator(5))
        assert at_random(chosen) == drawn
        found = figures(replace(VERIFY, budget=budget)(told, RETAIN, forget=FORGET, rng=generator(5)), "replay")
        assert found["replayed"] == len(chosen)
        if len(chosen) < 4:
            assert (found["drawn"], found["miss_one"], found["miss_5_percent"]) == (drawn, missed, missed)
        else:
            assert (found["drawn"], found["miss_one"]) == (4, 0)
    assert at_random(frozenset({0, 1})) == 0


def test_segments_whose_files_cannot_be_read_are_replayed_first(honest, tmp_path):
    told = Transcript.open(forged(honest[0], lambda pages: None, tmp_path / "t", rechain=False))
    (told.folder / checkpoint_name(21)).unlink()
    assert TopQ(2).choose(told, rng=generator()) == {2, 3}
    assert "commitment" in failed(replace(VERIFY, budget=TopQ(1))(told, RETAIN, forget=FORGET))


def test_checkpoints_lie_as_far_apart_as_the_contract_says(honest, tmp_path):
    def fewer(pages):
        pages.states.pop(14)
        pages.manifest["checkpoints"].pop("14")

    def closer(pages):
        pages.manifest["contract"]["every"] = 3

    for change in (fewer, closer):
        with pytest.raises(UnreadableFile, match="other checkpoints than one each"):
            Transcript.open(forged(honest[0], change, tmp_path / change.__name__, rechain=True))


def test_no_steps_at_all_fail_the_sampler_alone(tmp_path):
    made = cheat(tmp_path / "t", [])
    verdicts = VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET, served=made)
    assert failed(verdicts) == ["sampler"]


def test_a_row_that_is_listed_twice_is_still_one_row(honest, tmp_path):
    def listed_twice(pages):
        steps = pages.steps
        place = int(steps["batch"][-1])
        steps["rows"] = torch.cat([steps["rows"], steps["rows"][place : place + 1]])
        steps["batch"][-1] = len(steps["rows"]) - 1

    told = Transcript.open(forged(honest[0], listed_twice, tmp_path / "forged", rechain=False))
    assert failed(VERIFY(told, RETAIN, forget=FORGET, served=honest[1])) == []

    def used_twice(pages):
        listed_twice(pages)
        pages.steps["batch"][-2] = pages.steps["batch"][-1]

    told = Transcript.open(forged(honest[0], used_twice, tmp_path / "again", rechain=True))
    assert "sampler" in failed(VERIFY(told, RETAIN, forget=FORGET))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3e38])
def test_enormous_states_fail_the_replay_alone(honest, tmp_path, value):
    def enormous(pages):
        pages.states[14]["parameter/body.1.weight"].view(-1)[0] = value

    told = Transcript.open(forged(honest[0], enormous, tmp_path / "forged", rechain=True))
    assert failed(VERIFY(told, RETAIN, forget=FORGET, served=told.final)) == ["replay"]


def test_a_strangers_words_cannot_steer_a_terminal(honest, tmp_path):
    def steering(pages):
        pages.manifest["contract"]["stage"] = "\x1b[2Jaccepted\u202e\x07"

    told = Transcript.open(forged(honest[0], steering, tmp_path / "forged", rechain=True))
    verdicts = VERIFY(told, RETAIN, forget=FORGET)
    assert failed(verdicts) == ["contract"]
    assert "accepted" in why(verdicts, "contract")
    assert all(one.why.isprintable() for one in verdicts)


# Files


def test_a_manifest_that_is_no_plain_file_is_not_read(honest, tmp_path, monkeypatch):
    for name, make in (
        ("endless", lambda path: path.symlink_to("/dev/zero")),
        ("elsewhere", lambda path: path.symlink_to(honest[0] / "transcript.json")),
        ("pipe", os.mkfifo),
        ("folder", lambda path: path.mkdir()),
    ):
        place = forged(honest[0], lambda pages: None, tmp_path / name, rechain=False)
        (place / "transcript.json").unlink()
        make(place / "transcript.json")
        with pytest.raises(UnreadableFile, match="no plain file"):
            Transcript.open(place)
    monkeypatch.setattr(transcript, "_MOST_JSON_BYTES", 100)
    with pytest.raises(UnreadableFile, match="larger than any"):
        Transcript.open(honest[0])


def test_a_checkpoint_of_numbers_that_no_training_keeps_fails_the_commitment_alone(honest, tmp_path):
    def narrow(pages):
        pages.states[14]["parameter/body.1.weight"] = torch.zeros(3).to(torch.float8_e4m3fn)

    told = Transcript.open(forged(honest[0], narrow, tmp_path / "t", rechain=False))
    assert failed(VERIFY(told, RETAIN, forget=FORGET, served=told.final)) == ["commitment"]


def test_a_checkpoint_that_points_elsewhere_is_not_read(honest, tmp_path):
    place = forged(honest[0], lambda pages: None, tmp_path / "t", rechain=False)
    (place / checkpoint_name(7)).rename(tmp_path / "elsewhere")
    (place / checkpoint_name(7)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreadableFile, match="no transcript's"):
        Transcript.open(place)


def test_a_registry_without_a_list_is_refused(tmp_path):
    for entries in ('""', "{}", "null"):
        (tmp_path / "coins.json").write_text(f'{{"format":"expunge-coins/1","entries":{entries}}}')
        with pytest.raises(Corrupt, match="registry"):
            CoinRegistry(tmp_path / "coins.json")


# What is served


def test_a_served_buffer_that_was_changed_fails_the_final_model_alone(honest):
    module = copy.deepcopy(honest[1].module)
    next(one for name, one in module.named_buffers() if name.endswith("running_mean")).add_(0.5)
    verdicts = VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, served=replace(honest[1], module=module))
    assert failed(verdicts) == ["final model"]


def test_the_same_weights_in_another_architecture_fail_the_final_model_alone(honest):
    other = replace(RECIPE, model_args={**RECIPE.model_args, "norm": "none"})
    served = replace(honest[1], recipe=other)
    assert served.digest() == honest[1].digest()
    verdicts = VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, served=served)
    assert failed(verdicts) == ["final model"]
    assert "model_args" in why(verdicts, "final model")


def test_a_recipe_written_with_tuples_is_the_same_architecture(honest):
    same = replace(honest[1].recipe, model_args={**RECIPE.model_args, "hidden": (16,)})
    verdicts = VERIFY(Transcript.open(honest[0]), RETAIN, forget=FORGET, served=replace(honest[1], recipe=same))
    assert failed(verdicts) == []


@pytest.mark.parametrize("answer", [torch.tensor(1), torch.zeros(3, 0), torch.zeros(3, 2, 2), [1, 2, 3], None])
def test_answers_that_are_none_are_refused_in_one_line(answer):
    with pytest.raises(Misuse, match="predict must answer"):
        hits_of(lambda x: answer, [Stamp()], torch.zeros(3, 2))


class Stamp:
    target = 0

    def stamp(self, x):
        return x


def test_rows_to_forget_cannot_be_among_those_that_stay(tmp_path):
    old = record(replace(RECIPE, seed=7), EVERYTHING, tmp_path / "t", every=EVERY)
    with pytest.raises(Misuse, match="among those that stay"):
        VERIFY(Transcript.open(tmp_path / "t"), EVERYTHING, forget=FORGET, served=old)


def test_identical_rows_of_other_owners_have_names_of_their_own(tmp_path):
    twin = Records(RETAIN.x[:1], RETAIN.y[:1], ["twin"], ["another owner"], classes=10)
    records = RETAIN.plus(twin)
    batches = plan(RECIPE, records)
    for _, batch in batches[0]:
        batch[batch == 0] = len(RETAIN)  # the twin stands in for the row, and so is used twice
    cheat(tmp_path / "t", batches, records=records)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), records, forget=FORGET)) == ["sampler"]


def test_a_forgotten_row_under_a_new_id_is_the_same_row(tmp_path):
    renamed = Records(FORGET.x[:1], FORGET.y[:1], ["as if new"], FORGET.owners[:1], classes=10)
    mixed, batches = RETAIN.plus(renamed), plan(RECIPE, RETAIN)
    batches[1][2] = (mixed, torch.cat([batches[1][2][1][1:], torch.tensor([len(RETAIN)])]))
    cheat(tmp_path / "t", batches)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["removal"]


# The chain and the draw


def test_a_link_says_where_the_rows_of_its_step_end():
    a, b, c = (bytes([byte]) * 32 for byte in (1, 2, 3))
    assert next_link(a, 1, [a, b], c) != next_link(a, 1, [a], b, c)
    assert next_link(a, 1, [a], c) != next_link(a, 2, [a], c)


def test_spot_checks_are_drawn_anew_for_each_transcript(honest):
    told = Transcript.open(honest[0])
    links = told.links.copy()
    links[-1, 0] ^= 1
    other = replace(told, links=links)
    pairs = [[Random(1).choose(one, rng=generator(seed)) for one in (told, other)] for seed in range(20)]
    assert any(first != second for first, second in pairs)


# A GPU's coins


def test_the_coins_of_a_gpu_count_for_a_model_that_lies_there(monkeypatch):
    module = build(RECIPE)
    now = {"coins/cpu": torch.zeros(4, dtype=torch.uint8), "coins/cuda": torch.zeros(4, dtype=torch.uint8)}
    other = {**now, "coins/cuda": torch.ones(4, dtype=torch.uint8)}
    lacking = {"coins/cpu": now["coins/cpu"]}
    drops = torch.nn.Sequential(module, torch.nn.Dropout(0.5))
    assert same_coins(other, now, module)  # on a CPU
    assert same_coins(lacking, now, drops)
    monkeypatch.setattr(states, "device_of", lambda _: torch.device("cuda"))
    assert same_coins(now, now, drops)
    assert not same_coins(other, now, module)
    assert same_coins(lacking, now, module)
    assert not same_coins(lacking, now, drops)


# Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A recipe of three shards, its coin, the model, and the transcripts of its shards."""
    folder = tmp_path_factory.mktemp("shards")
    recipe = replace(RECIPE, sharding=Sharding(shards=3))
    coin = Coin(commitments=commit(recipe, RETAIN, salt=SALT), nonce="c0" * 32)
    made = record(recipe, RETAIN, folder / "t", every=EVERY, coin=coin)
    return recipe, coin, made, {i: Transcript.open(folder / "t" / f"part-{i:04d}") for i in range(3)}


def verified(shards, served=None, coin=None, agreed=None, told=None):
    recipe, own, made, transcripts = shards
    verify = Replay(agreed=agreed or recipe, coin=coin or own, tolerance=TIGHT)
    nobody = Records(RETAIN.x[:0], RETAIN.y[:0], [], [], classes=10)
    found = replay_shards(verify, told or transcripts, RETAIN, forget=nobody, served=served or made)
    return {index: failed(verdicts) for index, verdicts in found.items()}


def test_an_aggregate_that_is_not_its_parts_fails_every_final_model(shards):
    _, _, made, _ = shards
    assert verified(shards) == {0: [], 1: [], 2: []}
    final = {index: ["final model"] for index in range(3)}
    other = copy.deepcopy(made.module)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert verified(shards, served=replace(made, module=other)) == final
    assert verified(shards, served=replace(made, parts=())) == final
    assert verified(shards, served=replace(made, parts=(*made.parts, made.parts[0]))) == final
    silent = (replace(made.parts[0], ids=frozenset()), *made.parts[1:])
    assert verified(shards, served=assemble(made.recipe, silent)) == final
    mean = replace(made.recipe, sharding=replace(made.recipe.sharding, aggregate="mean"))
    assert verified(shards, served=assemble(mean, made.parts)) == final
    assert put_together(made, made.recipe, shards_of(RETAIN, made.recipe.sharding))


def test_a_coin_of_another_recipe_fails_the_contract_of_every_shard(shards, tmp_path):
    recipe, _, _, _ = shards
    slower = replace(recipe, optimiser_args={"lr": 0.01, "momentum": 0.9})
    coin = Coin(commitments=commit(slower, RETAIN, salt=SALT), nonce="c0" * 32)
    drawn = coin.recipe(recipe.completed(RETAIN))
    told = {}
    for index, rows in enumerate(shards_of(RETAIN, drawn.sharding)):  # as record() refuses what was not agreed on
        record(drawn.part(index), rows, tmp_path / str(index), every=EVERY, coin=coin, stage="slice-0")
        told[index] = Transcript.open(tmp_path / str(index))
    found = verified(shards, coin=coin, told=told)
    assert all("contract" in names for names in found.values())


def test_transcripts_of_shards_that_are_not_there_are_refused_and_missing_ones_fail(shards):
    told = shards[3]
    with pytest.raises(Misuse, match="3 shards and a transcript of shard 3"):
        verified(shards, told={**told, 3: told[0]})
    assert verified(shards, told={0: told[0], 2: told[2]}) == {0: [], 1: ["commitment"], 2: []}
    doubled = verified(shards, told={**told, 1: told[0]})
    assert {"contract", "commitment"} <= set(doubled[1])
    assert (doubled[0], doubled[2]) == ([], [])
