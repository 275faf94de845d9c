"""A model under pseudonyms: every id is renamed, everywhere, and nothing else is changed."""

import json

import pytest
import torch

from expunge import Keep, Recipe, Records, Request, Retrain, Sharding, Sisa, generator, load, train
from expunge.core.errors import BadRecords


def records():
    x = torch.randn(60, 3, generator=generator(1))
    return Records(x, [i % 2 for i in range(60)], [f"id-{i:03d}" for i in range(60)], [f"o{i % 20}" for i in range(60)])


def model(**more):
    recipe = Recipe(model="softmax", epochs=2, batch_size=8, **more)
    trained = train(recipe, records(), keep=Keep(batches=True, every=2))
    method = Sisa() if trained.parts else Retrain()
    return method(trained, records(), Request.remove_owner("o3"), rng=generator(0)).trained


KINDS = {"whole": {}, "shards": {"sharding": Sharding(shards=3)}, "slices": {"sharding": Sharding(shards=2, slices=2)}}


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    return model(**KINDS[request.param])


def secret(name):
    return f"p{hash_of(name):08x}"


def hash_of(name):
    return int(name.removeprefix("id-")) * 2654435761 % 2**32


def every_id(trained):
    """All ids that stand anywhere in a model's books."""
    found = set(trained.ids | trained.gone)
    for batch in trained.log.batches if trained.log else ():
        found.update(batch)
    return found.union(*map(every_id, trained.parts))


def test_every_id_is_renamed_and_nothing_else(trained):
    renamed = trained.renamed(secret)
    assert every_id(renamed) == {secret(name) for name in every_id(trained)}
    assert renamed.ids == {secret(name) for name in trained.ids}
    assert renamed.gone == {secret(name) for name in trained.gone}
    assert len(renamed.gone) == 3
    assert renamed.digest() == trained.digest()
    for name in ("recipe", "standing", "seal", "exactness", "secret"):
        assert getattr(renamed, name) == getattr(trained, name)
    assert len(renamed.parts) == len(trained.parts)
    for one, other in zip(renamed.parts, trained.parts, strict=True):
        assert one.ids == {secret(name) for name in other.ids}
        assert one.digest() == other.digest()
        assert (one.log is None) == (other.log is None)
        if one.log is not None:
            assert (one.log.steps, one.log.losses, one.log.build) == (
                other.log.steps,
                other.log.losses,
                other.log.build,
            )
            assert len(one.log.slices) == len(other.log.slices)


def test_the_model_that_was_given_is_left_as_it_was(trained):
    before = every_id(trained)
    trained.renamed(secret)
    assert every_id(trained) == before
    assert all(name.startswith("id-") for name in before)


def test_there_and_back_is_the_same_model_which_forgets_on(trained):
    names = {secret(name): name for name in records().ids}
    back = trained.renamed(secret).renamed(names.__getitem__)
    assert (back.ids, back.gone) == (trained.ids, trained.gone)
    method = Sisa() if trained.parts else Retrain()
    request = Request.remove_owner("o4")
    one, other = (method(each, records(), request, rng=generator(0)).trained for each in (back, trained))
    assert one.digest() == other.digest()
    assert (one.ids, one.gone) == (other.ids, other.gone)


def test_a_renamed_model_that_was_saved_names_nobody(trained, tmp_path):
    trained.renamed(secret).save(tmp_path / "m")
    for path in (tmp_path / "m").rglob("*"):
        assert path.is_dir() or b"id-0" not in path.read_bytes()
    loaded = load(tmp_path / "m")
    assert loaded.ids == {secret(name) for name in trained.ids}
    assert loaded.digest() == trained.digest()
    about = json.loads((tmp_path / "m" / "trained.json").read_text())
    assert sorted(about["gone"]) == sorted(secret(name) for name in trained.gone)


def test_the_search_above_finds_a_model_that_was_not_renamed(trained, tmp_path):
    trained.save(tmp_path / "m")
    assert any(b"id-0" in path.read_bytes() for path in (tmp_path / "m").rglob("*.json"))


def test_two_records_cannot_take_one_name_if_one_of_them_is_gone(trained):
    with pytest.raises(BadRecords, match="gone stays gone"):
        trained.renamed(lambda _: "same")
