"""Heads on extractors of other rows: proved where training anew and comparing rows found it, and never by a flag."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from expunge import Claim, FineTune, Misuse, Recipe, Request, Retrain, Trained, Unsupported, adopt, generator, train
from expunge.certify import DERIVATIONS, Budget, DisjointExtractor, NewtonHead, explain, head_on, recheck, settings_of
from expunge.certify import disjoint as at
from expunge.certify.before_head import CHECKS
from expunge.certify.constants import Derivation, setting
from expunge.core.claim import Constant, Guarantee
from expunge.core.records import Records, seal
from expunge.learn.build import build
from expunge.learn.predict import outputs as predicted
from expunge.testing.case import digits

OTHERS = digits().test.select(range(600))
HEADS = digits().records
TEST = digits().test.select(range(700, 1317))
RECIPE = Recipe(model="mlp", model_args={"hidden": [24]}, epochs=12, batch_size=32, seed=3)
DECAY = 1e-3


@pytest.fixture(scope="module")
def extractor():
    return train(RECIPE, OTHERS)


@pytest.fixture(scope="module")
def method(extractor):
    return method_of(extractor)


@pytest.fixture(scope="module")
def fitted(method):
    return head_on(method, HEADS, weight_decay=DECAY)


def method_of(extractor, rows=OTHERS, **more):
    return NewtonHead(
        sigma=0.01,
        budget=Budget(requests=20),
        extractor=DisjointExtractor(trained=extractor, rows=rows, outputs=10, **more),
    )


def remove(method, trained, *ids, records=HEADS):
    return method(trained, records, Request.remove(list(ids)), rng=generator(0))


def head_with(module, records=HEADS, recipe=RECIPE):
    """A head's model whose body is this module's, as somebody may make one without `head_on`."""
    recipe = replace(recipe, weight_decay=DECAY).completed(records)
    made = build(recipe)
    made.load_state_dict(module.state_dict())
    return Trained(module=made.eval(), recipe=recipe, ids=frozenset(records.ids), seal=seal(records))


def joined(records, x, y=3, name="stranger"):
    """The rows with one more, under an id, label and owner of its own."""
    return records.plus(Records(x, torch.tensor([y]), [name], ["somebody else"], classes=10))


def accuracy(trained, records):
    return float((predicted(trained.module, records).argmax(1) == records.y).float().mean())


def test_a_head_on_an_extractor_of_other_rows_is_proved_and_stays_so_for_all_requests(method, fitted):
    now, said = fitted, []
    for ids in (["row-000"], ["row-001", "row-002"], HEADS.where(lambda _, owner: owner == "owner-03").ids):
        answer = remove(method, now, *ids)
        now = answer.trained
        said.append(answer.guarantee)
        assert answer.claim is Claim.CERTIFIED
        assert answer.guarantee.basis == "proved"
        assert answer.guarantee.outside == ("body.0.weight", "body.0.bias")
        assert recheck(answer.guarantee, DERIVATIONS, settings_of(method, now.recipe), now.releases) == ()
    assert said[-1].transcript.releases == 3
    assert said[0].remarks == said[1].remarks == said[2].remarks
    assert said[0].constants == said[1].constants == said[2].constants


def test_the_extractor_s_bytes_are_those_that_the_other_rows_gave_before_and_after(extractor, method, fitted):
    after = remove(method, fitted, "row-000").trained
    for name in ("body.0.weight", "body.0.bias"):
        for trained in (fitted, after):
            assert torch.equal(trained.module.state_dict()[name], extractor.module.state_dict()[name])
    assert fitted.ids == frozenset(HEADS.ids)
    assert fitted.standing is Claim.CERTIFIED
    assert accuracy(after, TEST) > 0.85


def test_nothing_that_is_said_depends_on_the_rows_under_the_head(method, fitted):
    one, many = remove(method, fitted, "row-000"), remove(method, fitted, *HEADS.ids[:200])
    assert one.guarantee == many.guarantee
    fewer = HEADS.select(range(100, 400))
    other = remove(method, head_on(method, fewer, weight_decay=DECAY), "row-300", records=fewer)
    assert other.guarantee == one.guarantee


@pytest.mark.parametrize(
    "stored",
    [
        lambda levels: levels,
        lambda levels: levels.double() / 255,
        lambda levels: levels.float() / 255,
        lambda levels: levels.float() * (1 / 255),
        lambda levels: (levels.double() / 255).half(),
        lambda levels: levels.float(),
        lambda levels: levels.long(),
        lambda levels: levels.reshape(1, 64) if levels.ndim == 3 else levels[:, None],
    ],
    ids=["bytes", "double", "divided", "multiplied", "half", "levels", "integers", "shape"],
)
def test_one_picture_is_the_same_however_it_is_stored(stored):
    levels = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    known = {one for _, found in at.contents(Records(levels, [1])) for one in found}
    ((_, again),) = at.contents(Records(stored(levels), [2], ["another id"], ["another owner"]))
    assert known & set(again)
    changed = levels.clone()
    changed[0, 0, 0] ^= 1
    ((_, other),) = at.contents(Records(stored(changed), [1]))
    assert not known & set(other)


def test_numbers_that_are_no_pictures_are_compared_as_the_model_sees_them():
    rows = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows[0, 0] = 0.0
    known = {one for _, found in at.contents(Records(rows, [0] * 5)) for one in found}
    again = rows.float()
    again[0, 0] = -0.0
    assert all(known & set(found) for _, found in at.contents(Records(again, [1] * 5)))
    again[:, 3] *= 1 + 1e-5
    assert not any(known & set(found) for _, found in at.contents(Records(again, [0] * 5)))


def test_rows_read_in_several_parts_keep_their_places(monkeypatch):
    whole = dict(at.contents(HEADS))
    monkeypatch.setattr("expunge.certify.contents._AT_ONCE", 64 * 7)
    assert dict(at.contents(HEADS)) == whole
    assert list(whole) == list(range(480))


def test_what_is_found_is_what_comparing_all_pairs_finds():
    """By brute force on few values, of which many rows are equal."""
    rng = np.random.default_rng(0)
    mine, theirs = (torch.from_numpy(rng.choice([0.1, 0.25, 0.7], (60, 4))) for _ in range(2))
    known = {one for _, found in at.contents(Records(theirs.float(), [0] * 60)) for one in found}
    found = [bool(known & set(content)) for _, content in at.contents(Records(mine, [0] * 60))]
    assert found == (mine.float()[:, None] == theirs.float()[None]).all(2).any(1).tolist()
    assert 0 < sum(found) < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_shared_row_is_refused_and_named_whatever_it_is_called(method, dtype):
    x = OTHERS.x[17:18].to(dtype)
    records = joined(Records(HEADS.x.to(dtype), HEADS.y, HEADS.ids, HEADS.owners, classes=10), x)
    with pytest.raises(Misuse, match=f'record "stranger" is by content "{OTHERS.ids[17]}", which the extractor was'):
        head_on(method, records, weight_decay=DECAY)


def test_a_shared_row_that_is_stored_in_bytes_is_refused():
    levels = (HEADS.x * 255).round().to(torch.uint8)
    others = Records(levels[:200].float() / 255, HEADS.y[:200], [f"o{i}" for i in range(200)], classes=10)
    method = method_of(train(replace(RECIPE, epochs=1), others), others)
    clean, mixed = (Records(levels[i:], HEADS.y[i:], HEADS.ids[i:], classes=10) for i in (200, 199))
    assert head_on(method, clean, weight_decay=DECAY).ids == frozenset(HEADS.ids[200:])
    with pytest.raises(Misuse, match='record "row-199" is by content "o199"'):
        head_on(method, mixed, weight_decay=DECAY)


def test_a_shared_row_that_only_the_request_brings_or_takes_is_refused(extractor, method, fitted):
    new = Request.replace_rows(["row-005"], OTHERS.x[3:4], OTHERS.y[3:4])
    with pytest.raises(Misuse, match=f'is by content "{OTHERS.ids[3]}"'):
        method(fitted, HEADS, new, rng=generator(0))
    records = joined(HEADS, OTHERS.x[17:18])
    with pytest.raises(Misuse, match='record "stranger"'):
        remove(method, head_with(extractor.module, records), "stranger", records=records)


def test_rows_that_were_found_apart_once_are_not_compared_again_and_new_ones_are(extractor, monkeypatch):
    method, seen = method_of(extractor), []
    monkeypatch.setattr(at, "contents", lambda records: seen.append(len(records)) or contents(records))
    now = head_on(method, HEADS, weight_decay=DECAY)
    assert seen == [480, 600]
    now = remove(method, now, "row-000").trained
    assert seen == [480, 600]
    copied = Records(HEADS.x.clone(), HEADS.y, HEADS.ids, HEADS.owners, classes=10)
    remove(method, now, "row-001", records=copied)
    assert seen == [480, 600, 478, 1], "those that stay, and the one that leaves"


contents = at.contents


@pytest.mark.parametrize("retouched", ["the head's model", "the extractor"])
@pytest.mark.parametrize("name", ["body.0.weight", "body.0.bias"])
def test_one_bit_of_the_extractor_is_noticed_wherever_it_was_changed(extractor, fitted, retouched, name):
    mine = fitted if retouched == "the head's model" else extractor
    module = build(mine.recipe)
    module.load_state_dict(mine.module.state_dict())
    with torch.no_grad():
        module.state_dict()[name].view(-1).view(torch.int32)[0] ^= 1
    touched = replace(mine, module=module)
    works = {
        "the extractor": lambda: head_on(method_of(touched), HEADS, weight_decay=DECAY),
        "the head's model": lambda: remove(method_of(extractor), touched, "row-000"),
    }
    with pytest.raises(Misuse, match=f'is not what training the extractor anew gives: 1 parts differ, first "{name}"'):
        works[retouched]()


def test_normalisation_is_part_of_the_extractor():
    recipe = replace(RECIPE, model_args={"hidden": [24], "norm": "group"}, epochs=1)
    method = method_of(train(recipe, OTHERS))
    fitted = head_on(method, HEADS, weight_decay=DECAY)
    assert remove(method, fitted, "row-000").guarantee.basis == "proved"
    norms = [name for name in fitted.module.state_dict() if name.startswith("body.1.")]
    assert norms
    for name in norms:
        module = build(fitted.recipe)
        module.load_state_dict(fitted.module.state_dict())
        with torch.no_grad():
            module.state_dict()[name][0] += 1e-6
        with pytest.raises(Misuse, match=f'first "{name}"'):
            remove(method, replace(fitted, module=module), "row-000")
    batch = replace(recipe, model_args={"hidden": [24], "norm": "batch"})
    with pytest.raises(Unsupported, match="group norm"):
        head_on(method_of(train(batch, OTHERS)), HEADS, weight_decay=DECAY)


def test_another_structure_with_the_same_bytes_is_another_extractor(extractor, method, fitted):
    module = build(fitted.recipe)
    module.load_state_dict(fitted.module.state_dict())
    module.body[1] = torch.nn.Tanh()
    with pytest.raises(Misuse, match='1 parts differ, first "structure"'):
        remove(method, replace(fitted, module=module), "row-000")


@pytest.mark.parametrize("how", ["hook", "pre-hook", "features", "forward"])
def test_what_a_layer_computes_beside_its_bytes_is_noticed(method, fitted, how):
    module = build(fitted.recipe)
    module.load_state_dict(fitted.module.state_dict())
    if how == "hook":
        module.body[0].register_forward_hook(lambda layer, args, out: out + 1)
    elif how == "pre-hook":
        module.body[0].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    elif how == "features":
        module.features = lambda x: module.body(x) + 1
    else:
        module.body[0].forward = lambda x: x[:, :24]
    with pytest.raises(Misuse, match='first "structure"'):
        remove(method, replace(fitted, module=module), "row-000")


def test_an_extractor_whose_seal_is_of_other_rows_is_refused(extractor):
    relabelled = Records(OTHERS.x, OTHERS.y.flip(0), OTHERS.ids, OTHERS.owners, classes=10)
    fewer = OTHERS.select(range(599))
    renamed = Records(OTHERS.x, OTHERS.y, [f"other-{i}" for i in range(600)], classes=10)
    for rows in (relabelled, fewer, renamed):
        with pytest.raises(Misuse, match="seal is of other rows"):
            DisjointExtractor(trained=extractor, rows=rows, outputs=10)


def test_a_seal_that_was_written_over_does_not_help():
    """Trained on the head's own rows, and called trained on others: training anew gives other bytes."""
    culprit = train(RECIPE, HEADS)
    liar = replace(culprit, ids=frozenset(OTHERS.ids), seal=seal(OTHERS))
    with pytest.raises(Misuse, match="is not what training the extractor anew gives"):
        head_on(method_of(liar), HEADS, weight_decay=DECAY)
    trusted = head_on(method_of(liar, again=False), HEADS, weight_decay=DECAY)
    answer = remove(method_of(liar, again=False), trusted, "row-000")
    assert answer.guarantee.basis == "conditional", "without training anew somebody vouches for it"
    assert "is said to have been trained on" in answer.guarantee.remarks[0]


def test_what_training_did_not_make_is_refused(extractor):
    tuned = FineTune(epochs=1)(extractor, OTHERS, Request.remove([OTHERS.ids[0]]), rng=generator(0)).trained
    with pytest.raises(Misuse, match="as train made it on its rows, got standing none"):
        DisjointExtractor(trained=tuned, rows=OTHERS.without([OTHERS.ids[0]]), outputs=10)
    with pytest.raises(Misuse, match="no seal"):
        DisjointExtractor(trained=replace(extractor, seal=None), rows=OTHERS, outputs=10)
    with pytest.raises(Unsupported, match="whose making may read anything"):
        DisjointExtractor(trained=adopt(extractor.module, RECIPE, OTHERS), rows=OTHERS, outputs=10)
    with pytest.raises(Unsupported, match="shards"):
        DisjointExtractor(trained=train(replace(RECIPE, epochs=1), OTHERS, shards=2), rows=OTHERS, outputs=10)
    with pytest.raises(Misuse, match="nothing with parameters comes before"):
        DisjointExtractor(trained=train(Recipe(model="softmax", epochs=1), OTHERS), rows=OTHERS, outputs=10)


def test_an_extractor_that_exact_removal_trained_anew_is_one_of_its_remaining_rows(extractor):
    shared = joined(OTHERS, HEADS.x[7:8])
    whole = train(RECIPE, shared)
    with pytest.raises(Misuse, match='record "row-007" is by content "stranger"'):
        head_on(method_of(whole, shared), HEADS, weight_decay=DECAY)
    without = Retrain()(whole, shared, Request.remove(["stranger"]), rng=generator(0)).trained
    method = method_of(without)
    assert remove(method, head_on(method, HEADS, weight_decay=DECAY), "row-000").guarantee.basis == "proved"


def test_no_flag_reaches_proved(extractor, fitted):
    """Every field of both, but the extractor itself: none makes a head on a network proved."""
    for flag in (field.name for field in fields(NewtonHead) if isinstance(field.default, bool)):
        assert remove(NewtonHead(**{flag: True}), fitted, "row-000").guarantee.basis == "conditional"
    for flag in (field.name for field in fields(DisjointExtractor) if isinstance(field.default, bool)):
        weaker = method_of(extractor, **{flag: False})
        assert remove(weaker, fitted, "row-000").guarantee.basis == "conditional", flag
    with pytest.raises(Misuse, match="leave public_extractor out"):
        NewtonHead(public_extractor=True, extractor=DisjointExtractor(trained=extractor, rows=OTHERS, outputs=10))
    with pytest.raises(Misuse, match="must be a DisjointExtractor, got True"):
        NewtonHead(extractor=True)


def test_the_network_trained_whole_on_the_rows_is_refused(method, fitted):
    whole = Retrain()(fitted, HEADS, Request.remove(["row-000"]), rng=generator(0)).trained
    with pytest.raises(Misuse, match="is not what training the extractor anew gives"):
        remove(method, whole, "row-001")


def test_classes_are_said_beforehand_and_not_counted_in_the_rows(extractor, method):
    nines = HEADS.select((HEADS.y < 9).nonzero().flatten())
    inferred = Records(nines.x, nines.y, nines.ids)
    assert inferred.classes == 9
    fitted = head_on(method, inferred, weight_decay=DECAY)
    assert fitted.module.head.out_features == 10
    guarantee = remove(method, fitted, nines.ids[0], records=inferred).guarantee
    assert guarantee.constants["extractor_outputs"] == setting(10, "method.extractor.outputs")
    nine = replace(RECIPE, model_args={**RECIPE.model_args, "outputs": 9})
    short = build(replace(nine, weight_decay=DECAY).completed(inferred))
    body = {name: t for name, t in extractor.module.state_dict().items() if name.startswith("body")}
    short.load_state_dict(body, strict=False)
    with pytest.raises(Misuse, match="the head has 9 outputs, and 10 were said beforehand"):
        remove(method, head_with(short, inferred, nine), inferred.ids[0], records=inferred)
    for wrong in (0, 2.0, "ten"):
        with pytest.raises(Misuse, match="outputs must be"):
            DisjointExtractor(trained=extractor, rows=OTHERS, outputs=wrong)


def test_rows_removed_before_without_comparing_make_it_conditional(extractor, method, fitted, tmp_path):
    """The row that left first was one of the extractor's, and nobody looked."""
    records = joined(HEADS, OTHERS.x[17:18])
    first = remove(NewtonHead(), head_with(extractor.module, records), "stranger", records=records)
    assert first.guarantee.basis == "conditional"
    later = remove(method, first.trained, "row-000", records=records)
    assert later.guarantee.basis == "conditional"
    assert "Rows were removed before that were not compared" in " ".join(later.guarantee.remarks)
    known = remove(method, fitted, "row-000").trained
    loaded = Trained.load(known.save(tmp_path / "model"), build)
    assert remove(method, known, "row-001").guarantee.basis == "proved"
    assert remove(method, loaded, "row-001").guarantee.basis == "conditional", "what was compared is not saved"
    fresh = Trained.load(fitted.save(tmp_path / "fresh"), build)
    assert remove(method, fresh, "row-001").guarantee.basis == "proved", "nothing was removed before"


def test_other_gone_rows_than_were_compared_do_not_pass(method, fitted):
    known = remove(method, fitted, "row-000").trained
    forged = replace(known, gone=known.gone | {"another"})
    assert remove(method, forged, "row-001").guarantee.basis == "conditional"


def test_streamed_rows_are_compared_at_each_request(extractor):
    class Streamed(torch.utils.data.Dataset):
        def __init__(self, records):
            self.x, self.y = records.x, records.y

        def __len__(self):
            return len(self.x)

        def __getitem__(self, index):
            return self.x[index], int(self.y[index])

    method = method_of(extractor)
    rows = Records.from_dataset(Streamed(HEADS), HEADS.ids, HEADS.owners, classes=10)
    fitted = head_on(method, rows, weight_decay=DECAY)
    assert remove(method, fitted, "row-000", records=rows).guarantee.basis == "proved"
    mixed = joined(HEADS, OTHERS.x[17:18])
    with pytest.raises(Misuse, match='record "stranger"'):
        head_on(method, Records.from_dataset(Streamed(mixed), mixed.ids, classes=10), weight_decay=DECAY)


def test_head_on_needs_an_extractor():
    with pytest.raises(Misuse, match="needs a method with an extractor"):
        head_on(NewtonHead(), HEADS, weight_decay=DECAY)


def test_who_holds_the_rows_counts_again(extractor, method, fitted):
    answer = remove(method, fitted, "row-000")
    settings = settings_of(method, answer.trained.recipe)
    rows = HEADS.take(answer.trained.ids)
    counted = method.extractor.counted(answer.trained, rows)
    assert counted == {"extractor_rows_shared": 0.0, "extractor_tensors_changed": 0.0}
    assert recheck(answer.guarantee, DERIVATIONS, settings, counted=counted) == ()
    mixed = joined(rows, OTHERS.x[17:18])
    other = train(replace(RECIPE, seed=4), OTHERS)
    again = method.extractor.counted(replace(answer.trained, module=other.module), mixed)
    assert recheck(answer.guarantee, DERIVATIONS, settings, counted=again) == (
        "extractor_rows_shared is said to be 0, and counted again it is 1",
        "extractor_tensors_changed is said to be 0, and counted again it is 2",
    )
    assert len(recheck(answer.guarantee, DERIVATIONS, settings, counted={})) == 2


LIES = {
    "a count that is not zero": (
        {"extractor_rows_shared": Constant(1.0, "proved", "checked extractor-rows-shared")},
        "extractor_rows_shared is said to be 1, and it must be 0",
    ),
    "a count of something else": (
        {"extractor_rows_shared": Constant(0.0, "proved", "checked extractor-tensors-changed")},
        "which is no count that gives it",
    ),
    "a count that nobody knows": (
        {"extractor_rows_shared": Constant(0.0, "proved", "checked rows")},
        "which is no count that gives it",
    ),
    "a cap that was counted": (
        {"sensitivity": Constant(0.0, "proved", "checked extractor-rows-shared")},
        "which is no count that gives it",
    ),
    "a count that was not made": ({"extractor_tensors_changed": None}, "there is no extractor_tensors_changed"),
    "another number of classes": (
        {"extractor_outputs": setting(7, "method.extractor.outputs")},
        "extractor_outputs is called the setting method.extractor.outputs, which is 10.0",
    ),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_lies_about_the_extractor_are_named(method, fitted, lie):
    guarantee = remove(method, fitted, "row-000").guarantee
    told, problem = LIES[lie]
    constants = {name: one for name, one in {**guarantee.constants, **told}.items() if one is not None}
    found = recheck(replace(guarantee, constants=constants), DERIVATIONS, settings_of(method, fitted.recipe))
    assert any(problem in line for line in found), found


def test_a_conditional_guarantee_whose_condition_was_struck_out_is_noticed(fitted):
    method = NewtonHead()
    guarantee = remove(method, fitted, "row-000").guarantee
    assert recheck(guarantee, DERIVATIONS, settings_of(method, fitted.recipe)) == ()
    left = {name: one for name, one in guarantee.constants.items() if one.source != "supplied"}
    struck = replace(guarantee, constants=left)
    assert struck.basis == "proved"
    (problem,) = recheck(struck, DERIVATIONS, settings_of(method, fitted.recipe))
    assert problem.startswith("body.0.weight is given out without noise, and there is no extractor_rows_shared")


def test_it_is_told_in_words_with_what_is_not_found(method, fitted):
    guarantee = remove(method, fitted, "row-000").guarantee
    assert Guarantee.from_json(guarantee.to_json()) == guarantee
    text = " ".join(explain(guarantee).split())
    assert "Whoever sees this model can tell it" in text
    assert "Given out without noise, as it was made of other rows: body.0.weight, body.0.bias." in text
    assert "but for what was counted on the rows themselves, which only who holds them can count again" in text
    assert "rows under the head that are, by content, rows that the extractor was trained on; counted" in text
    assert "Near copies are not found" in text
    assert "NOT covered" not in text
    vouched = " ".join(explain(remove(NewtonHead(), fitted, "row-000").guarantee).split())
    assert "NOT covered, and given out as well: body.0.weight" in vouched
    assert "the covered part of this model" in vouched


def test_near_copies_are_not_found_and_this_is_known(method):
    """What is not proved, pinned: one level of one pixel, and the extractor saw the rest."""
    near = OTHERS.x[17:18].clone()
    near[0, 27] += 1 / 16
    records = joined(HEADS, near)
    fitted = head_on(method, records, weight_decay=DECAY)
    assert remove(method, fitted, "stranger", records=records).guarantee.basis == "proved"


def test_no_count_is_a_formula():
    assert not {check.name for check in CHECKS} & set(DERIVATIONS)
    assert not any(isinstance(check, Derivation) for check in CHECKS)
