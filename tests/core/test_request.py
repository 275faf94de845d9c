"""Requests: which rows go, which stay, which were gone, and what is refused, against counting by hand."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import BadRecords, EmptyRetain, Misuse, NeverTrained, UnknownRecord
from expunge.core.records import Records
from expunge.core.request import Request

ANN, BOB = "ann", "bob"


def rows(**more):
    x = torch.tensor([[0.0, 1], [1, 1], [2, 2], [2, 2], [2, 2], [3, 3]])
    return Records(x, [0, 1, 2, 2, 2, 1], list("abcdef"), [ANN, BOB, ANN, ANN, BOB, BOB], **more)


def ids(split):
    return "".join(split.forget.ids), "".join(split.retain.ids), split.already


def same(*positions):
    records = rows().select(list(positions))
    return records.x, records.y


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request.remove(["b", "a"]), ("ab", "cdef", 0)),
        (Request.remove([]), ("", "abcdef", 0)),
        (Request.remove_owner(BOB), ("bef", "acd", 0)),
        (Request.remove_class(2), ("cde", "abf", 0)),
        (Request.remove_rows(ANN, *same(2)), ("c", "abdef", 0)),  # one copy only, and not bob's
        (Request.remove_rows(BOB, *same(2)), ("e", "abcdf", 0)),
    ],
    ids=str,
)
def test_what_goes_and_what_stays(request_, expected):
    assert ids(request_.split(rows())) == expected
    assert ids(request_.split(rows(), ids=frozenset("abcdef"))) == expected


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request.remove(["b", "a"]), ("b", "def", 1)),
        (Request.remove(["a", "c"]), ("", "bdef", 2)),
        (Request.remove(["zz"]), ("", "bdef", 1)),  # gone, and its row no longer registered
        (Request.remove_owner(ANN), ("d", "bef", 2)),
        (Request.remove_class(0), ("", "bdef", 1)),
        (Request.remove_rows(ANN, *same(0)), ("", "bdef", 1)),
        (Request.remove_rows(ANN, *same(2)), ("d", "bef", 0)),  # a copy still stands, so that one is meant
    ],
    ids=str,
)
def test_what_is_gone_is_already_removed_and_stays_out(request_, expected):
    gone = frozenset(["a", "c", "zz"])
    assert ids(request_.split(rows(), gone=gone)) == expected
    assert ids(request_.split(rows(), ids=frozenset("bdef"), gone=gone)) == expected


def test_a_row_given_twice_removes_up_to_two_copies():
    pair = torch.tensor([[2.0, 2], [2, 2], [2, 2]]), torch.tensor([2, 2, 2])
    assert ids(Request.remove_rows(ANN, *pair).split(rows())) == ("cd", "abef", 0)
    assert ids(Request.remove_rows(ANN, pair[0][:1], pair[1][:1]).split(rows())) == ("c", "abdef", 0)
    assert ids(Request.remove_rows(ANN, *pair).split(rows(), gone=frozenset("c"))) == ("d", "abef", 1)


@given(
    st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 2)), min_size=2, max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.data(),
)
@settings(max_examples=60, deadline=None, print_blob=True)
def test_rows_are_removed_as_a_multiset(held, asked, data):
    records = Records(
        torch.tensor([[float(v), 0.0] for _, v in held]), [v for _, v in held], owners=[o for o, _ in held], classes=3
    )
    order = data.draw(st.permutations(range(len(held))))
    gone = frozenset(data.draw(st.sets(st.sampled_from(records.ids))))
    request = Request.remove_rows("x", torch.tensor([[float(v), 0.0] for v in asked]), torch.tensor(asked))
    mine = Counter(v for o, v in held if o == "x")
    live = Counter(v for i, (o, v) in enumerate(held) if o == "x" and str(i) not in gone)
    hits = Counter(asked) & mine
    try:
        split = request.split(records.select(order), gone=gone)
    except UnknownRecord:
        assert not hits
        return
    except EmptyRetain:
        assert Counter(asked) & live == Counter(v for i, (o, v) in enumerate(held) if str(i) not in gone)
        return
    assert Counter(split.forget.y.tolist()) == Counter(asked) & live
    assert split.already == (hits - live).total()
    assert set(split.forget.owners) <= {"x"}
    assert sorted(split.forget.ids + split.retain.ids) == sorted(set(records.ids) - gone)


NEW = torch.tensor([[9.0, 9], [8, 8]]), torch.tensor([1, 0])


def test_replace_renames_and_keeps_the_owner():
    split = Request.replace_rows(["e", "a"], *NEW).split(rows())
    assert ids(split)[0] == "ae"
    assert split.retain.ids == ("b", "c", "d", "f", "e~2", "a~2")
    assert split.retain.owners == (BOB, ANN, ANN, BOB, BOB, ANN)
    assert split.retain.x[-2:].tolist() == NEW[0].tolist()
    assert split.retain.y[-2:].tolist() == [1, 0]
    assert split.added == {"e~2", "a~2"}
    assert split.retain.classes == 3


def test_replace_again_and_again_counts_on():
    records, gone = rows(), frozenset()
    for number in (2, 3, 4):
        name = "a" if number == 2 else f"a~{number - 1}"
        split = Request.replace_rows([name], NEW[0][:1] + number, NEW[1][:1]).split(records, gone=gone)
        assert split.added == {f"a~{number}"}
        gone |= frozenset(split.forget.ids)
        records = split.retain
    assert gone == {"a", "a~2", "a~3"}


@pytest.mark.parametrize(
    ("held", "gone", "expected"),
    [("a", "", "a~2"), ("a~2", "", "a~3"), ("a~x", "", "a~x~2"), ("a", "a~2", "a~3"), ("~", "", "~~2")],
)
def test_a_replacement_never_takes_a_name_that_is_or_was_in_use(held, gone, expected):
    records = Records(torch.eye(3), [0, 1, 1], [held, "other", "a~9"])
    split = Request.replace_rows([held], torch.zeros(1, 3), torch.tensor([0])).split(records, gone=frozenset([gone]))
    assert split.added == {expected}
    twin = Records(torch.eye(2), [0, 1], ["a", "a~2"])
    both = Request.replace_rows(["a", "a~2"], torch.zeros(2, 2), torch.tensor([0, 1])).split(twin)
    assert both.added == {"a~3", "a~4"}


def test_replacing_everything_leaves_the_replacements():
    records = rows().select([0, 1])
    split = Request.replace_rows(["a", "b"], *NEW).split(records)
    assert split.retain.ids == ("a~2", "b~2")
    assert split.retain.classes == 3


def test_replacing_what_is_gone_adds_nothing():
    split = Request.replace_rows(["a", "b"], *NEW).split(rows(), gone=frozenset("a"))
    assert (ids(split)[0], split.already, split.added) == ("b", 1, {"b~2"})
    assert split.retain.x[-1].tolist() == [8, 8]  # b's replacement, not a's
    split = Request.replace_rows(["a"], NEW[0][:1], NEW[1][:1]).split(rows(), gone=frozenset("a"))
    assert (ids(split), split.added) == (("", "bcdef", 1), frozenset())


def test_replacements_must_be_rows_like_the_others():
    for x, y in ((NEW[0].to(torch.uint8), NEW[1]), (NEW[0].double(), NEW[1]), (torch.zeros(2, 3), NEW[1])):
        with pytest.raises(BadRecords, match=r"shapes, dtypes and classes must agree$"):
            Request.replace_rows(["a", "b"], x, y).split(rows())
    with pytest.raises(BadRecords, match=r"^label 7 of row 0 is out of range"):
        Request.replace_rows(["a"], NEW[0][:1], torch.tensor([7])).split(rows())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request.remove(["a", "zz"]), 'record "zz" is not among the 6 records; list them with: expunge records'),
        (Request.replace_rows(["a", "zz"], *NEW), 'record "zz" is not among the 6 records; .*'),
        (Request.remove_owner("zoe"), 'owner "zoe" holds no record here; .*'),
        (Request.remove_class(9), "class 9 holds no record here; classes run from 0 to 2"),
        (Request.remove_rows("zoe", *same(0)), 'owner "zoe" holds no record here; .*'),
        (Request.remove_rows(BOB, *same(0)), 'none of the 1 rows is held by owner "bob"; check dtype and shape'),
        (Request.remove_rows(ANN, same(0)[0].double(), same(0)[1]), 'none of the 1 rows is held by owner "ann"; .*'),
        (Request.remove_rows(ANN, same(0)[0], same(0)[1] + 1), 'none of the 1 rows is held by owner "ann"; .*'),
    ],
    ids=str,
)
def test_what_never_was_is_unknown(request_, message):
    with pytest.raises(UnknownRecord, match=rf"^{message}$"):
        request_.split(rows())


def test_a_model_that_stands_on_rows_that_are_not_given():
    with pytest.raises(
        UnknownRecord, match=r'^the model stands on 2 records that are not given, first "x"; give the whole'
    ):
        Request.remove(["a"]).split(rows(), ids=frozenset("abcdefxy"))


NEVER = '^the model was never trained on record "{}"; there is nothing to remove$'


def test_what_was_never_trained_on_is_told_apart():
    trained_on = frozenset("abc")
    for request, first in (
        (Request.remove(["a", "f"]), "f"),
        (Request.remove_class(2), None),
        (Request.remove_owner(BOB), None),
        (Request.remove_rows(BOB, *same(5)), "f"),
        (Request.remove_rows(ANN, *same(2, 3)), None),
    ):
        if first:
            with pytest.raises(NeverTrained, match=NEVER.format(first)):
                request.split(rows(), ids=trained_on)
        else:  # an owner may hold rows that one model saw and another did not; what it saw goes
            split = request.split(rows(), ids=trained_on)
            assert len(split.forget) == 1
            assert split.already == 0
            assert set(split.forget.ids + split.retain.ids) == trained_on
    with pytest.raises(NeverTrained, match=NEVER.format("b")):
        Request.remove_owner(BOB).split(rows(), ids=frozenset("acd"))


def test_a_live_copy_is_meant_before_one_that_was_never_trained_on():
    assert ids(Request.remove_rows(ANN, *same(2)).split(rows(), ids=frozenset("abd"))) == ("d", "ab", 0)


@pytest.mark.parametrize("request_", [Request.remove(list("abcdef")), Request.remove(list("bdf"))])
def test_leaving_nothing_is_refused(request_):
    gone = frozenset("ace") if len(request_.ids) == 3 else frozenset()
    count = len(request_.ids)
    with pytest.raises(EmptyRetain, match=rf"^removing {count} records would leave none to train on; retire the model"):
        request_.split(rows(), gone=gone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request.remove(["a", "b", "a"]), 'id "a" stands more than once in the request; name each record once'),
        (lambda: Request(kind="forget"), 'a request is remove, replace or remove_rows, got "forget"'),
        (
            lambda: Request(kind="remove", ids=("a",), owner=ANN),
            "a request names its records in one way, got ids and owner; file one request for each",
        ),
        (
            lambda: Request(kind="remove", owner=ANN, label=0),
            "a request names its records in one way, got owner and label; file one request for each",
        ),
        (lambda: Request(kind="replace", ids=("a",)), "a replace request needs as many rows x as labels y"),
        (lambda: Request.replace_rows(["a"], *NEW), "a replace request needs one row for each of its 1 ids"),
        (
            lambda: Request.remove_rows(ANN, NEW[0], NEW[1][:1]),
            "a remove_rows request needs as many rows x as labels y",
        ),
    ],
)
def test_requests_that_cannot_be_meant(make, message):
    with pytest.raises(Misuse, match=rf"^{re.escape(message)}$"):
        make()


def test_a_rows_request_needs_an_owner():
    with pytest.raises(Misuse, match=r"^a remove_rows request needs an owner, rows and labels$"):
        Request(kind="remove_rows", x=NEW[0], y=NEW[1]).split(rows())


def test_what_else_is_said_of_a_request_is_kept():
    request = Request.remove(["a"], asked_by="ann", key="k-1")
    assert (request.asked_by, request.key, request.kind, request.ids) == ("ann", "k-1", "remove", ("a",))
    with pytest.raises(TypeError):
        Request.remove(["a"], colour="red")


def test_splitting_copies_no_row():
    records = rows()
    split = Request.remove_owner(ANN).split(records)
    assert split.forget.shared()[0] is records.x
    assert split.retain.shared()[0] is records.x
