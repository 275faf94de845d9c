"""Sets of records against a naive implementation, proofs of removal, and trainings that read what they should not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expunge.core.errors import Misuse
from expunge.ledger import check
from expunge.ledger.recordset import RecordSet
from tests.ledger import worked

NONE = (0, bytes(32))


def naive(members: Sequence[bytes], depth: int = 0) -> tuple[int, bytes]:
    """Count and root, from the definition: a set parts by its members' bits, one alone goes up, all else is hashed."""
    if len(members) < 2:
        return (1, hashlib.sha256(b"\x00" + members[0]).digest()) if members else NONE
    sides: list[list[bytes]] = [[], []]
    for member in members:
        sides[int.from_bytes(member, "big") >> (255 - depth) & 1].append(member)
    halves = [naive(side, depth + 1) for side in sides]
    packed = b"".join(count.to_bytes(8, "big") + root for count, root in halves)
    return len(members), hashlib.sha256(b"\x01" + packed).digest()


def counted(records: RecordSet) -> tuple[int, bytes]:
    return records.root().count, records.root().root


HARD = [
    bytes(32),
    bytes(31) + b"\x01",
    bytes(31) + b"\x02",
    bytes(16) + b"\x80" * 16,
    b"\xff" * 32,
    b"\xff" * 31 + b"\xfe",
]
ONE = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.sampled_from(HARD),
    st.builds(
        lambda cut, tail: (b"\xaa" * 32)[:cut] + tail[cut:], st.integers(0, 31), st.binary(min_size=32, max_size=32)
    ),
)
SETS = st.lists(ONE, unique=True, max_size=10)
some = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@some
@given(SETS, st.randoms(use_true_random=False))
@example(HARD, None)
def test_the_root_is_that_of_the_definition_in_whatever_order(members: list[bytes], random: object) -> None:
    shuffled = list(members)
    if random is not None:
        random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert counted(RecordSet(shuffled)) == counted(RecordSet(members)) == naive(members)


@some
@given(SETS, st.data())
def test_a_removal_proof_gives_exactly_the_root_before_and_the_root_after(
    members: list[bytes], data: st.DataObject
) -> None:
    gone = sorted(data.draw(st.lists(st.sampled_from(members), unique=True)) if members else [])
    proof = RecordSet(members).removal(gone)
    left = [one for one in members if one not in gone]
    assert check.after_removal(gone, proof) == (naive(members), naive(left))
    said = [word for word in proof if word != "0:" + "0" * 64]
    assert not any(one.hex() in word for one in left for word in said)
    alone = {hashlib.sha256(b"\x00" + one).hexdigest() for one in members}
    assert all(word in ("leaf", "fork") or word.split(":")[0] != "1" or word[2:] in alone for word in said)


def roots(gone: Sequence[bytes], proof: Sequence[str]) -> object:
    try:
        return check.after_removal(gone, proof)
    except check.Refused as error:
        return None if error.check in ("set difference", "encoding") else error


def forged(proof: list[str]) -> list[list[str]]:
    """The proof with words dropped, doubled, swapped with the next, or replaced: each word, or some 8 of many."""
    made = []
    for i in range(0, len(proof), max(1, len(proof) // 8)):
        word = proof[i]
        before, after = proof[:i], proof[i + 1 :]
        made += [[*before, *after], [*before, word, word, *after]]
        made += [[*before, after[0], word, *after[1:]]] if after else []
        for other in ("leaf", "fork", "0:" + "0" * 64, "1:" + "0" * 64, "1:" + "ab" * 32, "", "x"):
            made.append([*before, other, *after])
        if ":" in word:
            count, root = word.split(":")
            flipped = root[:-1] + ("0" if root[-1] != "0" else "1")
            odd = (
                f"{int(count) + 1}:{root}",
                f"{count}:{flipped}",
                f"0{word}",
                f" {word}",
                f"+{word}",
                word.upper() + " ",
            )
            made += [[*before, other, *after] for other in odd]
    return [one for one in [*made, [*proof, "leaf"], ["fork", *proof], []] if one != proof]


@settings(some, max_examples=10)
@given(SETS.filter(bool), st.data())
def test_every_other_proof_is_refused_or_leads_to_another_root_before(
    members: list[bytes], data: st.DataObject
) -> None:
    gone = sorted(data.draw(st.lists(st.sampled_from(members), unique=True, min_size=1)))
    proof = RecordSet(members).removal(gone)
    honest = check.after_removal(gone, proof)
    for one in forged(proof):
        got = roots(gone, one)
        assert got is None or got[0] != honest[0]  # type: ignore[index]


def test_a_proof_serves_for_no_other_member() -> None:
    there, absent = worked.members(20), worked.members(3, "absent")
    proof = RecordSet(there).removal(there[:1])
    for other in (*there[1:], *absent):
        got = roots([other], proof)
        assert got is None or got[0] != naive(there)  # type: ignore[index]
    for other in absent:
        with pytest.raises(Misuse, match="is not in the set"):
            RecordSet(there).removal([other])


def test_all_can_be_removed_and_none_can() -> None:
    there = worked.members(9)
    assert check.after_removal(there, RecordSet(there).removal(there)) == (naive(there), NONE)
    assert check.after_removal([], RecordSet(there).removal([])) == (naive(there), naive(there))
    assert counted(RecordSet([])) == NONE
    assert RecordSet([]).removal([]) == ["0:" + "0" * 64]


def test_members_that_stand_twice_or_are_too_short_are_refused() -> None:
    one = worked.members(1)[0]
    with pytest.raises(Misuse, match="twice"):
        RecordSet([one, one])
    with pytest.raises(Misuse, match="32 bytes"):
        RecordSet([one[:31]])
    for gone in ([one, one], [one[:31]], sorted(worked.members(2), reverse=True)):
        with pytest.raises(check.Refused, match=r"distinct, sorted, and of 32 bytes"):
            check.after_removal(gone, ["leaf"])


@pytest.mark.parametrize(
    ("name", "proof"),
    [
        ("a count of more digits than Python reads", ["fork", "leaf", "9" * 5000 + ":" + "ab" * 32]),
        ("a count of 64 bits", ["fork", "leaf", f"{1 << 63}:" + "ab" * 32]),
        ("counts that add up to 64 bits", ["fork", "leaf", f"{(1 << 63) - 1}:" + "ab" * 32]),
        ("somebody without a hash", ["fork", "leaf", "3:" + "0" * 64]),
        ("nobody with a hash", ["fork", "leaf", "0:" + "ab" * 32]),
        ("other digits", ["fork", "leaf", "\u0663:" + "ab" * 32]),
        ("upper case", ["fork", "leaf", "3:" + "AB" * 32]),
        ("a fork below every bit", ["fork"] * 300),
        ("a fork with nobody beside", ["fork", "leaf", "0:" + "0" * 64]),
        ("a number for a word", ["fork", "leaf", 3]),
        ("nothing for a word", [None]),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_odd_proofs_are_refused_as_such(name: str, proof: list[str]) -> None:
    with pytest.raises(check.Refused) as refused:
        check.after_removal([bytes(32)], proof)
    assert refused.value.check in ("set difference", "encoding"), name


def difference(case: worked.Case) -> str:
    """Why the set difference of a bundle with these sets is refused; empty if it is not."""
    outcome = check.check_bundle(worked.by_hand(case), worked.keys().trusted).outcomes[-1]
    assert outcome.check == "set difference"
    return "" if outcome.passed else outcome.why


def test_what_an_honest_training_read_is_accepted() -> None:
    for case in (worked.case(), worked.case(12, 3, 4), worked.case(5, 5), worked.case(5, 0, 2), worked.case(0, 0, 1)):
        assert difference(case) == ""


def test_a_training_that_read_other_rows_than_those_left_is_refused() -> None:
    case = worked.case(12, 3)
    left, extra = worked.members(12)[3:], worked.members(1, "extra")
    for rows in (left + extra, left[1:], [*left[1:], *extra], worked.members(12), [*left, case.gone[0]]):
        case.read = RecordSet(rows)
        assert difference(case) == "the rows that training read are not the set after"


def test_a_proxy_put_in_or_a_row_kept_after_the_root_was_anchored_is_refused() -> None:
    there, proxy = worked.members(12), worked.members(1, "proxy")
    gone = there[:3]
    for after in (there[3:] + proxy, there[4:], there[2:], there):
        case = worked.Case(RecordSet(there), gone, RecordSet(after))
        assert difference(case) == "the set before without the removed is not the set after without the added"


def test_a_set_before_that_is_not_the_anchored_one_is_refused() -> None:
    there, proxy = worked.members(12), worked.members(1, "proxy")
    case = worked.Case(RecordSet(there + proxy), there[:3], RecordSet(there[3:] + proxy))
    anchored = RecordSet(there).root().to_json()
    bundle = worked.by_hand(case, of_anchor=lambda entry: entry["body"].update(set=anchored))
    last = check.check_bundle(bundle, worked.keys().trusted).outcomes[-1]
    assert (last.check, last.passed) == ("log", False)
    assert last.why == "the set that was anchored is not the set before, or of another model"


def test_that_nobody_watched_the_training_is_said() -> None:
    case = worked.case()
    case.witnessed = False
    checked = check.check_bundle(worked.by_hand(case), worked.keys().trusted)
    assert checked.passed
    assert "what rows training read: nobody watched it" in checked.not_proved
    assert "NOT witnessed" in checked.outcomes[-1].why


def test_a_kept_record_written_into_both_lists_is_refused() -> None:
    """Both proofs would hold, so that anybody could say of a kept record that it was removed and came back."""
    there = worked.members(12)
    case = worked.Case(RecordSet(there), there[:4], RecordSet(there[3:]), added=[there[3]])
    assert difference(case) == "a record is said to be both removed and added"
