"""Which rows a request is about, and which of them the model never saw."""

import pytest
import torch

from expunge import Misuse, Records, Request, UnknownRecord
from expunge.core.coins import generator
from expunge.screen import GradientNorm, understand
from tests.screen import kit


@pytest.fixture(scope="module")
def part():
    """A model trained on all but the last 80 records, one of which was removed before."""
    from dataclasses import replace

    whole = kit.records()
    ids = frozenset(whole.ids[:400])
    return replace(kit.trained("softmax"), ids=ids - {whole.ids[0]}, gone=frozenset(whole.ids[:1]))


def test_trained_rows_stand_in_the_order_of_the_records(part):
    asked = understand(part, kit.records(), Request.remove(["row-030", "row-002"]))
    assert asked.ids == ("row-002", "row-030")
    assert asked.places.tolist() == [2, 30]
    assert asked.strangers is None


def test_a_row_never_trained_on_is_seen_as_such_and_a_gone_one_is_no_longer_asked(part):
    asked = understand(part, kit.records(), Request.remove(["row-450", "row-000", "row-001"]))
    assert asked.ids == ("row-001",)
    assert asked.strangers.ids == ("row-450",)
    assert asked.names == ("row-001", "row-450")
    assert "never trained" in asked.why[0]


def test_an_unknown_id_owner_or_class_is_an_error(part):
    for request in (Request.remove(["nobody"]), Request.remove_owner("nobody"), Request.remove_class(17)):
        with pytest.raises(UnknownRecord):
            understand(part, kit.records(), request)


def test_who_asks_for_all_of_theirs_is_no_stranger_for_what_was_not_used(part):
    whole = kit.records()
    owner = whole.owners[450]
    asked = understand(part, whole, Request.remove_owner(owner))
    assert asked.strangers is None
    assert set(asked.ids) == {i for i, o in zip(whole.ids, whole.owners, strict=True) if o == owner and i in part.ids}


def test_rows_by_content_are_members_only_as_often_as_their_owner_holds_them(part):
    whole = kit.records()
    x, y = whole.x[[5, 5, 6, 450, 0]].clone(), whole.y[[5, 5, 6, 450, 0]]
    x[2, 0] += 0.01
    same = Records(whole.x, whole.y, whole.ids, ["me"] * len(whole), classes=10)
    asked = understand(part, same, Request.remove_rows("me", x, y))
    assert asked.ids == ("row-005",)
    assert asked.strangers.ids == ("asked-1", "asked-2", "asked-3")


def test_a_row_of_another_owner_is_a_stranger_and_the_reason_names_nobody_else(part):
    whole = kit.records()
    other = next(owner for owner in whole.owners if owner != whole.owners[5])
    asked = understand(part, whole, Request.remove_rows(other, whole.x[5:6], whole.y[5:6]))
    assert asked.ids == ()
    assert "another owner does" in asked.why[0]
    assert whole.owners[5] not in asked.why[0]


def test_an_owner_who_holds_nothing_asks_for_strangers_only(part):
    whole = kit.records()
    asked = understand(part, whole, Request.remove_rows("nobody", whole.x[5:6], whole.y[5:6]))
    assert (asked.ids, len(asked.strangers)) == ((), 1)


def test_rows_of_another_shape_or_dtype_are_refused(part):
    whole = kit.records()
    for x in (whole.x[:1, :5], whole.x[:1].double()):
        with pytest.raises(Misuse, match="shape and dtype"):
            understand(part, whole, Request.remove_rows("nobody", x, whole.y[:1]))


def test_replacements_follow_the_order_of_the_records(part):
    whole = kit.records()
    x, y = torch.stack([whole.x[8] * 0, whole.x[8] * 0 + 1]), whole.y[[9, 3]]
    asked = understand(part, whole, Request.replace_rows(["row-009", "row-003"], x, y))
    assert asked.ids == ("row-003", "row-009")
    assert asked.new.x[:, 0].tolist() == [1.0, 0.0]
    assert asked.new.y.tolist() == whole.y[[3, 9]].tolist()
    again = understand(part, whole, asked.request())
    assert torch.equal(again.new.x, asked.new.x)


def test_an_empty_request_has_no_rows_and_no_judgements(part):
    for request in (Request.remove([]), Request.remove(["row-000"])):
        assert len(understand(part, kit.records(), request)) == 0
        assert GradientNorm()(part, kit.records(), request, rng=generator(0)) == ()
