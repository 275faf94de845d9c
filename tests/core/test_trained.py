"""Models on disk: bit for bit there and back, whole or not there, and never a pickle opened."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from expunge.core import trained as module
from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import BadRecords, CodeNotAllowed, Misuse, UnreadableFile, Unsupported
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records
from expunge.core.trained import Trained, copy_state, read_state, write_state
from expunge.learn.build import allow_code, build
from expunge.learn.loop import Keep
from expunge.learn.training import adopt, load, train


def records(n=60, owners=9, **more):
    x = torch.randn(n, 4, generator=generator(0))
    return Records(x, [i % 3 for i in range(n)], owners=[f"o{i % owners}" for i in range(n)], **more)


RECIPE = Recipe(model="mlp", model_args={"hidden": [5]}, epochs=4, batch_size=16)
SHARDED = Recipe(
    model="mlp", model_args={"hidden": [5]}, epochs=3, batch_size=16, sharding=Sharding(shards=4, slices=2, salt="b")
)
TWO_OWNERS = SHARDED.sharding.shard_of("o0"), SHARDED.sharding.shard_of("o1")


@pytest.fixture(scope="module")
def single():
    return train(RECIPE, records(), keep=Keep(batches=True, every=5))


@pytest.fixture(scope="module")
def sharded():
    """Two owners in four shards, so that some are empty."""
    return train(SHARDED, records(owners=2), keep=Keep(batches=True, every=2))


def same_states(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def same(one, other):
    assert (one.recipe, one.ids, one.gone, one.standing) == (other.recipe, other.ids, other.gone, other.standing)
    assert one.digest() == other.digest()
    same_states(one.module.state_dict(), other.module.state_dict())
    assert [part.training for part in one.module.modules()] == [part.training for part in other.module.modules()]
    assert (one.log is None) == (other.log is None)
    if one.log is not None:
        for name in ("steps", "rows_read", "threads", "losses", "batches"):
            assert getattr(one.log, name) == getattr(other.log, name)
        assert list(one.log.checkpoints) == list(other.log.checkpoints)
        for step, state in one.log.checkpoints.items():
            same_states(state, other.log.checkpoints[step])
        assert len(one.log.slices) == len(other.log.slices)
        for first, second in zip(one.log.slices, other.log.slices, strict=True):
            same_states(first, second)
    assert len(one.parts) == len(other.parts)
    for first, second in zip(one.parts, other.parts, strict=True):
        same(first, second)


def test_round_trip_of_a_single_model(single, tmp_path):
    assert len(single.log.checkpoints) == 3
    assert len(single.log.batches) == single.log.steps == 16
    folder = single.save(tmp_path / "deep" / "model")
    same(single, load(folder))
    same(single, load(str(folder)))
    x = records().x
    assert torch.equal(single.module(x), load(folder).module(x))


def test_round_trip_of_shards_some_empty(sharded, tmp_path):
    assert len(set(TWO_OWNERS)) == 2
    assert sorted(bool(part.ids) for part in sharded.parts) == [False, False, True, True]
    assert [len(part.log.slices) for part in sharded.parts if part.ids] == [2, 2]
    again = load(sharded.save(tmp_path / "model"))
    same(sharded, again)
    x = records().x
    assert torch.equal(sharded.module(x), again.module(x))
    assert torch.equal(sharded.module.votes(x), again.module.votes(x))


def test_round_trip_of_books_without_a_log(single, tmp_path):
    before = Trained(
        module=single.module,
        recipe=single.recipe,
        ids=frozenset(["ä", "b"]),
        gone=frozenset(['"c"', "d\n"]),
        standing=Claim.CERTIFIED,
        secret={"weight": torch.full((3,), 0.123456)},
    )
    after = load(before.save(tmp_path / "model"))
    same(before, after)
    assert not after.secret
    written = b"".join(path.read_bytes() for path in (tmp_path / "model").iterdir())
    assert torch.full((3,), 0.123456).numpy().tobytes() not in written


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip_of_buffers_and_strange_numbers(tmp_path, dtype):
    recipe = Recipe(model="mlp", model_args={"hidden": [4], "norm": "batch"}, epochs=1, dtype=dtype)
    before = train(recipe, records())
    with torch.no_grad():
        before.module.head.bias[:3] = torch.tensor([-0.0, torch.inf, 5e-324])
    same(before, load(before.save(tmp_path / "model")))
    assert any("num_batches_tracked" in name for name in before.module.state_dict())


def test_a_loaded_model_is_in_evaluation_mode(single, tmp_path):
    assert not single.module.training
    assert not load(single.save(tmp_path / "model")).module.training


def test_a_folder_that_is_there_is_left_alone(single, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(Misuse, match=r"^.*model is there already; name a new folder, or remove it first$"):
        single.save(tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize("fail_at", [1, 3, 6])
def test_nothing_half_written_stays(sharded, tmp_path, monkeypatch, fail_at):
    calls = []

    def write(path, state, note=None):
        calls.append(path)
        if len(calls) == fail_at:
            path.write_bytes(b"half")
            raise OSError("disk full")
        write_state(path, state, note)

    monkeypatch.setattr(module, "write_state", write)
    with pytest.raises(OSError, match=r"disk full"):
        sharded.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    same(sharded, load(sharded.save(tmp_path / "model")))


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "executed"))


def plant(path, target, how):
    if how == "torch":
        torch.save({"bomb": Bomb(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(target), protocol=4 if how == "pickle" else 0))


def test_the_bomb_is_live(tmp_path):
    plant(tmp_path / "bomb", tmp_path / "harm", "pickle")
    pickle.loads((tmp_path / "bomb").read_bytes())  # noqa: S301 -- the test plants it itself
    assert (tmp_path / "harm").read_text() == "executed"


@pytest.mark.parametrize("how", ["torch", "pickle", "old pickle"])
@pytest.mark.parametrize("name", ["model", "checkpoint-5", "part-0000/model", "part-0000/slice-1", "trained.json"])
def test_a_pickle_is_never_opened(single, sharded, tmp_path, how, name):
    which = sharded if "part" in name else single
    if "part" in name:
        name = name.replace("0000", f"{TWO_OWNERS[0]:04d}")
    folder = which.save(tmp_path / "model")
    path = folder / (name if name.endswith("json") else f"{name}.safetensors")
    assert path.exists()
    plant(path, tmp_path / "harm", how)
    with pytest.raises(UnreadableFile) as caught:
        load(folder)
    if how != "old pickle" and path.suffix != ".json":
        assert str(caught.value).startswith(f"{path} is a pickle, which can run code and is never opened; save it with")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def every_file(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_damaged_file_is_refused_in_one_line(request, tmp_path, kind):
    trained = request.getfixturevalue(kind)
    whole = trained.save(tmp_path / "whole")
    damages = {
        "cut": lambda data: data[: len(data) * 2 // 3],
        "empty": lambda data: b"",
        "last": lambda data: data[:-1],
        "early": lambda data: flipped(data, 2),
        "middle": lambda data: flipped(data, len(data) // 2),
        "late": lambda data: flipped(data, len(data) - 3),
        "gone": None,
    }
    for path in every_file(whole):
        data = path.read_bytes()
        for how, damage in damages.items():
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage(data))
            with pytest.raises(UnreadableFile) as caught:
                load(whole)
            assert "\n" not in str(caught.value), (path, how)
        path.write_bytes(data)
    same(trained, load(whole))


def flipped(data, place):
    data = bytearray(data)
    data[place] ^= 1
    return bytes(data)


def test_files_of_another_model_are_refused(single, tmp_path):
    folder = single.save(tmp_path / "model")
    shutil.copy(folder / "checkpoint-5.safetensors", folder / "model.safetensors")  # fits the module, and is another
    with pytest.raises(UnreadableFile, match=r"holds other bytes than were saved there; fetch it again$"):
        load(folder)


def test_a_model_that_does_not_fit_its_recipe(single, tmp_path):
    folder = single.save(tmp_path / "model")

    def wider(recipe, parts=()):
        return build(Recipe(**{**recipe.to_json(), "model_args": {**recipe.model_args, "hidden": [6]}}), parts)

    with pytest.raises(UnreadableFile, match=r"does not fit its recipe: .*size mismatch") as caught:
        Trained.load(folder, wider)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no trained model .*; make one with: expunge train"),
        ("{", "is no trained model .*"),
        ("[]", "is not of format expunge-trained/1; make one with: expunge train"),
        ('{"format": "other"}', "is not of format expunge-trained/1; .*"),
        ('{"format": "expunge-trained/1"}', 'lacks "digest"; it was not written by expunge'),
    ],
)
def test_folders_that_are_no_model(tmp_path, text, message):
    if text is not None:
        (tmp_path / "trained.json").write_text(text)
    with pytest.raises(UnreadableFile, match=rf"^.* {message}$"):
        load(tmp_path)


def test_a_hand_written_description_is_refused(single, tmp_path):
    folder = single.save(tmp_path / "model")
    about = json.loads((folder / "trained.json").read_text())
    about["gone"], about["ids"] = [], [*about["ids"], "one more"]
    (folder / "trained.json").write_text(json.dumps(about))
    with pytest.raises(UnreadableFile, match=r"trained.json is not as it was written; fetch it again$"):
        load(folder)


def make_net(shape, outputs):
    return nn.Sequential(nn.Linear(shape[0], outputs))


def test_code_named_in_a_recipe_is_refused_without_leave(tmp_path):
    unknown = f"{__name__}:make_other_net"
    recipe = Recipe(model=unknown, epochs=1)
    with pytest.raises(CodeNotAllowed, match=rf"^the recipe names code, {unknown}; if you trust it: --allow-code, or"):
        train(recipe, records())
    name = allow_code(make_net)
    trained = train(Recipe(model=name, epochs=1), records())
    folder = trained.save(tmp_path / "model")
    same(trained, load(folder))


def test_code_named_in_a_saved_model_does_not_run_in_another_process(tmp_path, forks):
    (tmp_path / "planted.py").write_text(
        "from pathlib import Path\nimport torch\nPath(__file__).with_name('harm').touch()\n"
        "def net(shape, outputs): return torch.nn.Linear(shape[0], outputs)\n"
    )
    code = """
import sys
sys.path.insert(0, given["folder"])
import torch
import expunge
from pathlib import Path
records = expunge.Records(torch.eye(4), [0, 1, 0, 1])
def act():
    if given["act"] == "train":
        expunge.train(expunge.Recipe(model="planted:net", epochs=1), records).save(given["folder"] + "/model")
    else:
        expunge.load(given["folder"] + "/model")
try:
    if given["allow"]:
        expunge.allow_code("planted:net")
    act()
    answer = "ran"
except expunge.CodeNotAllowed as error:
    answer = str(error)
"""
    for act in ("train", "load"):
        refused = forks(code, folder=str(tmp_path), act=act, allow=False)
        assert refused.startswith(
            "the recipe names code, planted:net; if you trust it: --allow-code, or expunge.allow_code("
        )
        assert not (tmp_path / "harm").exists()
        assert forks(code, folder=str(tmp_path), act=act, allow=True) == "ran"
        (tmp_path / "harm").unlink()


def test_a_model_from_elsewhere_keeps_its_weights_and_has_no_beginning(tmp_path):
    net = make_net((4,), 3)
    trained = adopt(net, RECIPE, records())
    assert trained.module is net
    with pytest.raises(
        Unsupported, match=r"^a model trained elsewhere cannot be made anew; when loading it, give load"
    ):
        load(trained.save(tmp_path / "model"))


def test_no_record_is_both_trained_on_and_gone(single):
    with pytest.raises(BadRecords, match=r'^record "b" cannot be both trained on and gone; gone stays gone$'):
        Trained(module=single.module, recipe=single.recipe, ids=frozenset("abc"), gone=frozenset("bcd"))


def test_the_digest_sees_every_bit_of_parameters_and_buffers():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    trained = Trained(module=net, recipe=RECIPE, ids=frozenset("a"))
    digests = {trained.digest()}
    for name, tensor in copy_state(net).items():
        with torch.no_grad():
            net.state_dict()[name].add_(1)
        digests.add(trained.digest())
        net.load_state_dict({**net.state_dict(), name: tensor})
    assert len(digests) == 1 + len(net.state_dict())
    assert trained.digest() in digests


def test_states_of_tied_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "tied": base, "b": base.t(), "c": base[:, 1], "half": base.bfloat16(), "empty": base[:0]}
    write_state(tmp_path / "state.safetensors", state, {"note": "x"})
    same_states(state, read_state(tmp_path / "state.safetensors"))
    with pytest.raises(
        UnreadableFile, match=r"other.safetensors is missing; point to a folder that `expunge train` wrote$"
    ):
        read_state(tmp_path / "other.safetensors")
