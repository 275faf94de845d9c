"""The public coin: bound before it is thrown, thrown once, and every choice follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expunge.core.errors import Corrupt, Misuse, NotNow
from expunge.core.recipe import Sharding
from expunge.core.records import Records
from expunge.learn.loop import reading_order
from expunge.learn.shards import retrain_shards, shards_of
from expunge.verify.coin import Coin, CoinRegistry, advantage, commit
from expunge.verify.recorded import record
from expunge.verify.reproduce import Replay, accepted, replay_shards
from expunge.verify.rows import data_root
from expunge.verify.transcript import Transcript
from tests.verify.transcripts import EVERY, FORGET, RECIPE, RETAIN, SALT, TIGHT, Pages, cheat, failed, plan

EVERYTHING = RETAIN.plus(FORGET)
BOUND = commit(RECIPE, EVERYTHING, FORGET, salt=SALT)
NONCE = "c0" * 32
COIN = Coin(commitments=BOUND, nonce=NONCE)
VERIFY = Replay(agreed=RECIPE, coin=COIN, tolerance=TIGHT)


def test_commitments_bind_all_rows_those_to_forget_and_those_that_stay():
    assert BOUND.data == data_root(EVERYTHING, SALT)
    assert BOUND.retained == data_root(RETAIN, SALT)
    assert len(BOUND.members) == len(FORGET)
    assert commit(RECIPE, EVERYTHING, FORGET, salt=SALT) == BOUND
    assert commit(replace(RECIPE, seed=99), EVERYTHING, FORGET, salt=SALT) == BOUND


def test_a_proof_of_other_sets_is_refused():
    for change in (
        {"retained": BOUND.data},
        {"data": BOUND.retained},
        {"forget": BOUND.data},
        {"members": BOUND.members[1:]},
        {"members": ("zz",)},
        {"proof": BOUND.proof[1:]},
        {"salt": "short"},
    ):
        with pytest.raises(Misuse):
            replace(BOUND, **change)


def test_rows_that_are_not_held_cannot_be_forgotten():
    with pytest.raises(Misuse, match="held"):
        commit(RECIPE, RETAIN, FORGET, salt=SALT)


def test_of_two_copies_of_one_owner_one_can_be_forgotten():
    one = RETAIN.select([0])
    copy = Records(one.x, one.y, ["copy"], one.owners, classes=10)
    bound = commit(RECIPE, RETAIN.plus(copy), copy, salt=SALT)
    assert bound.retained == data_root(RETAIN, SALT)


def test_all_coins_follow_from_commitments_and_nonce():
    assert COIN.seed == Coin(commitments=BOUND, nonce=NONCE, tries=3).seed
    others = [
        Coin(commitments=BOUND, nonce="c1" * 32),
        Coin(commitments=commit(RECIPE, EVERYTHING, FORGET.select([0]), salt=SALT), nonce=NONCE),
        Coin(commitments=commit(replace(RECIPE, batch_size=31), EVERYTHING, FORGET, salt=SALT), nonce=NONCE),
    ]
    assert len({COIN.seed, *(coin.seed for coin in others)}) == 4
    assert len({COIN.salt, *(coin.salt for coin in others)}) == 4
    assert all(0 <= coin.seed < 2**63 for coin in others)
    assert COIN.recipe(RECIPE).seed == COIN.seed
    assert COIN.recipe(replace(RECIPE, sharding=Sharding(shards=2))).sharding.salt == COIN.salt


def test_a_training_by_the_coin_passes_and_says_which_coin(tmp_path):
    trained = record(RECIPE, RETAIN, tmp_path / "t", every=EVERY, coin=COIN)
    told = Transcript.open(tmp_path / "t")
    verdicts = VERIFY(told, RETAIN, forget=FORGET, served=trained)
    assert all(verdict.passed for verdict in verdicts)
    assert trained.recipe.seed == COIN.seed
    assert told.contract.coin == COIN.to_json()
    other = replace(VERIFY, coin=Coin(commitments=BOUND, nonce="c1" * 32))
    assert "contract" in failed(other(told, RETAIN, forget=FORGET, served=trained))


def test_another_order_than_the_coins_fails_the_sampler_alone(tmp_path):
    recipe = COIN.recipe(RECIPE)
    cheat(tmp_path / "t", plan(replace(recipe, seed=1), RETAIN), trained=recipe, said=recipe, coin=COIN)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["sampler"]


def test_two_rows_exchanged_between_batches_fail_the_sampler_alone(tmp_path):
    recipe = COIN.recipe(RECIPE)
    batches = plan(recipe, RETAIN)
    one, two = batches[0][1][1], batches[0][6][1]
    one[0], two[0] = int(two[0]), int(one[0])
    cheat(tmp_path / "t", batches, trained=recipe, said=recipe, coin=COIN)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET)) == ["sampler"]


def test_other_rows_than_were_committed_to_fail_the_commitment_alone(tmp_path):
    fewer, also = RETAIN.select(range(1, len(RETAIN))), FORGET.plus(RETAIN.select([0]))
    cheat(tmp_path / "t", plan(COIN.recipe(RECIPE), fewer), trained=COIN.recipe(RECIPE), said=COIN.recipe(RECIPE),
          records=fewer, coin=COIN)  # fmt: skip
    told = Transcript.open(tmp_path / "t")
    assert failed(VERIFY(told, fewer, forget=also)) == ["commitment"]


def test_rows_to_forget_other_than_those_committed_to_fail_the_commitment_alone(tmp_path):
    record(RECIPE, RETAIN, tmp_path / "t", every=EVERY, coin=COIN)
    assert failed(VERIFY(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET.select([0, 1]))) == ["commitment"]


def test_a_coin_of_another_recipe_or_other_rows_is_refused_when_recording(tmp_path):
    with pytest.raises(Misuse, match="another recipe"):
        record(replace(RECIPE, epochs=3), RETAIN, tmp_path / "t", coin=COIN)
    with pytest.raises(Misuse, match="other rows"):
        record(RECIPE, EVERYTHING, tmp_path / "t", coin=COIN)
    with pytest.raises(Misuse, match="salt"):
        record(RECIPE, RETAIN, tmp_path / "t", coin=COIN, salt="00" * 16)


def test_a_coin_that_was_drawn_for_another_recipe_fails_the_contract_alone(tmp_path):
    slower = replace(RECIPE, optimiser_args={"lr": 0.01, "momentum": 0.9})
    coin = Coin(commitments=commit(slower, EVERYTHING, FORGET, salt=SALT), nonce=NONCE)
    recipe = coin.recipe(RECIPE)
    made = cheat(tmp_path / "t", plan(recipe, RETAIN), trained=recipe, said=recipe, coin=coin)
    verdicts = replace(VERIFY, coin=coin)(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET, served=made)
    assert failed(verdicts) == ["contract"]


def test_a_coin_that_was_drawn_for_other_rows_that_stay_fails_the_commitment_alone(tmp_path):
    fewer = EVERYTHING.without(RETAIN.ids[:1])
    coin = Coin(commitments=commit(RECIPE, fewer, FORGET, salt=SALT), nonce=NONCE)
    recipe = coin.recipe(RECIPE)
    made = cheat(tmp_path / "t", plan(recipe, RETAIN), trained=recipe, said=recipe, coin=coin)
    verdicts = replace(VERIFY, coin=coin)(Transcript.open(tmp_path / "t"), RETAIN, forget=FORGET, served=made)
    assert failed(verdicts) == ["commitment"]


def test_rows_under_another_salt_than_the_coins_fail_by_name(tmp_path):
    recipe = COIN.recipe(RECIPE)
    cheat(tmp_path / "t", plan(recipe, RETAIN), trained=recipe, said=recipe)
    pages = Pages(tmp_path / "t")
    pages.manifest["contract"]["salt"] = "a5" * 16
    pages.manifest["contract"]["coin"] = COIN.to_json()
    pages.rechain()
    verdicts = VERIFY(Transcript.open(pages.write(tmp_path / "salted")), RETAIN, forget=FORGET)
    assert {"contract", "commitment"} <= set(failed(verdicts))
    assert "another salt" in verdicts[0].why


def test_shards_keep_the_coin_of_the_first_training_and_untouched_ones_their_bytes(tmp_path):
    recipe = replace(RECIPE, sharding=Sharding(shards=3))
    coin = Coin(commitments=commit(recipe, EVERYTHING, salt=SALT), nonce=NONCE)
    first = record(recipe, EVERYTHING, tmp_path / "first", every=EVERY, coin=coin)
    own = first.recipe
    gone = EVERYTHING.of_owner(EVERYTHING.owners[0])
    touched = own.sharding.shard_of(gone.owners[0])
    retain = EVERYTHING.without(gone.ids)
    rows = shards_of(retain, own.sharding)
    again = record(own.part(touched), rows[touched], tmp_path / "again", every=EVERY, coin=coin, stage="slice-0")
    after = retrain_shards(first, retain, {touched: 0})
    assert again.digest() == after.parts[touched].digest()
    places = {index: tmp_path / "first" / f"part-{index:04d}" for index in range(3)} | {touched: tmp_path / "again"}
    told = {index: Transcript.open(place) for index, place in places.items()}
    verify = Replay(agreed=recipe, coin=coin, tolerance=TIGHT)
    found = replay_shards(verify, told, retain, forget=gone, served=after)
    assert [accepted(found[index]) for index in range(3)] == [True, True, True]
    stale = replay_shards(verify, told, retain, forget=gone, served=first)
    assert {index: failed(verdicts) for index, verdicts in stale.items() if failed(verdicts)} == {
        touched: ["final model"]
    }
    forgetful = replay_shards(verify, told, retain, served=after)
    assert all(failed(verdicts) == ["commitment"] for verdicts in forgetful.values())
    told.pop(touched)
    assert failed(replay_shards(verify, told, retain, forget=gone, served=after)[touched]) == ["commitment"]
    with pytest.raises(Misuse, match="no shards"):
        replay_shards(VERIFY, told, retain)


def test_the_order_is_a_function_of_the_coin_and_of_rows_committed_to_before():
    orders = {
        tuple(reading_order(Coin(commitments=BOUND, nonce=f"{n:064x}").recipe(RECIPE), RETAIN, "whole", 0).tolist())
        for n in range(20)
    }
    assert len(orders) == 20


# The registry


def test_a_nonce_comes_only_after_the_commitments(tmp_path):
    registry = CoinRegistry(tmp_path / "coins.json")
    with pytest.raises(NotNow, match="anchor"):
        registry.draw(BOUND, "request-1")
    registry.anchor(BOUND, "request-1")
    registry.anchor(BOUND, "request-1")
    with pytest.raises(NotNow, match="anchor"):
        registry.draw(BOUND, "request-2")
    one, two = registry.draw(BOUND, "request-1"), registry.draw(BOUND, "request-1")
    assert one.nonce != two.nonce
    assert (one.tries, two.tries) == (1, 2)


def test_tries_are_counted_by_subject_whatever_is_committed_to_anew(tmp_path):
    registry = CoinRegistry(tmp_path / "coins.json")
    fresh = commit(RECIPE, EVERYTHING, FORGET)
    assert fresh.digest() != BOUND.digest()
    for bound in (BOUND, fresh):
        registry.anchor(bound, "request-1")
        coin = registry.draw(bound, "request-1")
    assert coin.tries == registry.tries("request-1") == 2
    assert CoinRegistry(tmp_path / "coins.json").tries("request-1") == 2
    assert registry.tries("request-2") == 0


def test_a_nonce_serves_once(tmp_path):
    registry = CoinRegistry(tmp_path / "coins.json")
    registry.anchor(BOUND, "request-1")
    registry.draw(BOUND, "request-1", nonce=NONCE)
    with pytest.raises(Misuse, match="given out"):
        registry.draw(BOUND, "request-1", nonce=NONCE)
    with pytest.raises(Misuse, match="hexadecimal"):
        registry.draw(BOUND, "request-1", nonce="00")
    assert registry.tries("request-1") == 1


def test_a_coin_is_spent_on_one_transcript(tmp_path):
    registry = CoinRegistry(tmp_path / "coins.json")
    registry.anchor(BOUND, "request-1")
    first = registry.draw(BOUND, "request-1")
    second = registry.draw(BOUND, "request-1")
    with pytest.raises(NotNow, match="later nonce"):
        registry.spend(first, "aa" * 32)
    assert registry.spend(second, "aa" * 32) == 2
    assert registry.spend(second, "aa" * 32) == 2
    with pytest.raises(NotNow, match="serves once"):
        registry.spend(second, "bb" * 32)
    with pytest.raises(NotNow, match="not drawn"):
        registry.spend(COIN, "aa" * 32)


def test_a_registry_that_is_none_is_refused(tmp_path):
    for text in ("{", "[]", '{"format":"expunge-coins/1","entries":[{"kind":"drawn"}]}', '{"format":"x","entries":[]}'):
        (tmp_path / "coins.json").write_text(text)
        with pytest.raises(Corrupt, match="registry"):
            CoinRegistry(tmp_path / "coins.json")


def test_the_registry_leaves_no_half_written_files(tmp_path):
    registry = CoinRegistry(tmp_path / "coins.json")
    registry.anchor(BOUND, "request-1")
    registry.draw(BOUND, "request-1")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_many_tries_are_worth_no_more_than_their_number():
    assert advantage(0.01, 1) == pytest.approx(0.01)
    assert advantage(0.01, 50) == pytest.approx(1 - 0.99**50)
    assert advantage(0.01, 50) < 50 * 0.01
    assert advantage(1.0, 3) == 1.0
    with pytest.raises(Misuse):
        advantage(1.2, 1)
    with pytest.raises(Misuse, match="counted from 1"):
        Coin(commitments=BOUND, nonce=NONCE, tries=0)
