"""The checker alone: run by itself, and every bundle refused that is not exactly what was written."""

from __future__ import annotations

import ast
import base64
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.ledger import check
from expunge.ledger.recordset import RecordSet
from tests.ledger import worked as w

CHECKS = {"encoding", "format", "signature", "checkpoint", "log", "removed set", "set difference"}
TRUSTED = w.keys().trusted
GOOD = w.by_hand(w.case(12, 3, 2), w.members(12)[:2])


def refused_by(data: bytes) -> str:
    """The name of the check that refused these bytes; empty if none did."""
    checked = check.check_bundle(data, TRUSTED)
    assert checked.not_proved
    failed = [one.check for one in checked.outcomes if not one.passed]
    assert len(failed) <= 1
    assert bool(failed) != checked.passed
    assert str(checked).count("\n") == len(checked.outcomes) + 1 + len(checked.not_proved)
    return failed[0] if failed else ""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> w.Worked:
    """A worked ledger that nobody changes."""
    return w.build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def alone(built: w.Worked, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a copy of check.py in a folder with nothing but a bundle, keys and a proof in it."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(check.__file__, folder / "check.py")
    request = built.completed[0]
    data = built.ledger.certificates.bundle(request)
    (folder / "good.json").write_bytes(data)
    (folder / "bad.json").write_bytes(data.replace(b'"kind":"completed"', b'"kind":"cancelled"'))
    (folder / "keys.json").write_bytes(built.ledger.certificates.record_keys(request))
    (folder / "a.pub").write_bytes(built.keys.public_pem())
    (folder / "b.pub").write_bytes(w.keys("another").public_pem())
    tree = built.ledger.log.tree()
    for name, cut in (("proof.json", 0), ("forged.json", 1)):
        sign = built.keys.sign_checkpoint
        old, new = (check.Checkpoint("expunge/ledger", size, tree.root(size)) for size in (5, 9))
        proof = [one.hex() for one in tree.consistency(5, 9)][cut:]
        made = {"format": check.CONSISTENCY_FORMAT, "old": sign(old), "new": sign(new), "proof": proof}
        (folder / name).write_bytes(check.canonical(made))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "check.py", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={})

    run.folder = folder  # type: ignore[attr-defined]
    return run


def test_it_accepts_a_good_bundle_by_itself_and_says_what_is_not_proved(alone: Callable[..., Any]) -> None:
    done = alone("good.json", "--key", "a.pub")
    assert (done.returncode, done.stderr) == (0, "")
    verdict, _, rest = done.stdout.partition("This certificate does not prove:\n")
    assert verdict.endswith("verdict: every check passed\n")
    assert "backups: they expire in 30 days" in rest
    assert "copies that others made" in rest
    assert "others see the same log" in rest


ROW = w.content(8)
WORDS = {
    "a changed bundle": (1, "bad.json --key a.pub"),
    "another key": (1, "good.json --key b.pub"),
    "one of two keys": (0, "good.json --key b.pub --key a.pub"),
    "rows of the owner": (
        0,
        f"good.json --key a.pub --keys keys.json --owner owner-0 --row {w.content(0)} --row {ROW}",
    ),
    "one row twice": (1, f"good.json --key a.pub --keys keys.json --owner owner-0 --row {ROW} --row {ROW}"),
    "a row that stays": (1, f"good.json --key a.pub --keys keys.json --owner owner-0 --row {w.content(16)}"),
    "another owner": (1, f"good.json --key a.pub --keys keys.json --owner owner-1 --row {ROW}"),
    "a file that holds no keys": (1, f"good.json --key a.pub --keys proof.json --owner owner-0 --row {ROW}"),
    "consistency": (0, "--consistency proof.json --key a.pub"),
    "inconsistency": (1, "--consistency forged.json --key a.pub"),
    "consistency by another key": (1, "--consistency proof.json --key b.pub"),
    "a bundle for a proof": (1, "--consistency good.json --key a.pub"),
    "nothing to check": (2, "--key a.pub"),
    "two things to check": (2, "good.json --consistency proof.json --key a.pub"),
    "no key": (2, "good.json"),
    "no such bundle": (2, "missing.json --key a.pub"),
    "no such key": (2, "good.json --key missing.pub"),
    "no such keys": (2, f"good.json --key a.pub --keys missing.json --owner owner-0 --row {ROW}"),
    "a key that is none": (2, "good.json --key good.json"),
    "keys without an owner": (2, f"good.json --key a.pub --keys keys.json --row {ROW}"),
    "keys without a row": (2, "good.json --key a.pub --keys keys.json --owner owner-0"),
    "a row without keys": (2, f"good.json --key a.pub --row {ROW}"),
    "an owner without keys": (2, "good.json --key a.pub --owner owner-0"),
    "a row in upper case": (2, f"good.json --key a.pub --keys keys.json --owner owner-0 --row {ROW.upper()}"),
    "keys for a proof": (2, f"--consistency proof.json --key a.pub --keys keys.json --owner owner-0 --row {ROW}"),
}


@pytest.mark.parametrize("name", ["a changed bundle", "rows of the owner", "consistency", "no key", "no such bundle"])
def test_its_exit_code_says_what_it_found_in_a_process_of_its_own(alone: Callable[..., Any], name: str) -> None:
    code, words = WORDS[name]
    done = alone(*words.split())
    assert done.returncode == code
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("code", "words"), WORDS.values(), ids=WORDS)
def test_its_exit_code_says_what_it_found(
    alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    monkeypatch.chdir(alone.folder)  # type: ignore[attr-defined]
    try:
        got = check.main(words.split())
    except SystemExit as end:
        got = int(end.code or 0)
    assert got == code


def test_it_imports_nothing_but_the_standard_library_and_cryptography() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(check.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {one.name.split(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert "cryptography" in imported
    assert imported - {"cryptography"} <= sys.stdlib_module_names


def text(change: Callable[[str], str]) -> bytes:
    return change(GOOD.decode()).encode("utf-8", "surrogatepass")


def replaced(old: str, new: str) -> bytes:
    assert GOOD.decode().count(old) >= 1, old
    return text(lambda good: good.replace(old, new, 1))


def bundle_with(path: str, value: Any) -> bytes:
    """The bundle with one value replaced, canonical if the value is."""
    bundle = json.loads(GOOD)
    at: Any = bundle
    *way, last = [int(word) if word.isdecimal() else word for word in path.split("/")]
    for word in way:
        at = at[word]
    at[last] = value(at[last]) if callable(value) else value
    return json.dumps(bundle, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


def unused_bits(packed: str) -> str:
    """Base64 that decodes to the same bytes, with other bits where none are used."""
    assert packed.endswith("=")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    body = packed.rstrip("=")
    other = body[:-1] + letters[letters.index(body[-1]) + 1] + "=" * (len(packed) - len(body))
    assert base64.b64decode(other) == base64.b64decode(packed)
    return other


SIG = "certificate/signatures/0/sig"
ENCODINGS = {
    "a space": replaced('":', '": '),
    "a line break at the end": GOOD + b"\n",
    "a space before": b" " + GOOD,
    "keys in another order": text(
        lambda good: json.dumps(dict(reversed(json.loads(good).items())), separators=(",", ":"))
    ),
    "a repeated key": replaced('{"anchor"', '{"anchor":1,"anchor"'),
    "a repeated key below": replaced('"index":4', '"index":4,"index":4'),
    "a float": replaced('"index":4', '"index":4.0'),
    "a float in scientific notation": replaced('"index":4', '"index":4e0'),
    "a leading zero": replaced('"index":4', '"index":04'),
    "minus zero": replaced('"index":4', '"index":-0'),
    "a plus sign": replaced('"index":4', '"index":+4'),
    "NaN": replaced('"index":4', '"index":NaN'),
    "infinity": replaced('"index":4', '"index":-Infinity'),
    "an escaped letter": replaced("completed", "\\u0063ompleted"),
    "an escaped slash": replaced("application/vnd", "application\\/vnd"),
    "a lone surrogate, escaped": replaced("completed", "complete\\ud800"),
    "a lone surrogate, raw": replaced("completed", "complete\ud800"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "another encoding": GOOD.decode().encode("utf-16"),
    "no UTF-8": GOOD.replace(b"completed", b"complete\xff"),
    "an overlong zero": GOOD.replace(b"completed", b"complete\xc0\x80"),
    "a whole number of 5,000 digits": replaced('"index":4', '"index":' + "9" * 5000),
    "a whole number of 65 bits": replaced('"index":4', f'"index":{1 << 64}'),
    "nested 100,000 deep": b"[" * 100_000,
    "nested 100,000 deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "objects nested 900 deep": b'{"a":' * 900 + b"1" + b"}" * 900,
    "nested 70 deep in the right place": replaced('"index":4', '"index":' + "[" * 70 + "]" * 70),
    "nothing": b"",
    "cut": GOOD[:-1],
    "two bundles": GOOD + GOOD,
    "base64 without padding": bundle_with(SIG, lambda old: old.rstrip("=")),
    "base64 with other unused bits": bundle_with(SIG, unused_bits),
    "base64 with a line break": bundle_with(SIG, lambda old: old[:8] + "\n" + old[8:]),
    "base64 with other letters": bundle_with(SIG, lambda old: "-_" + old[2:]),
    "base64 with more after its end": bundle_with(SIG, lambda old: old + "AAAA"),
    "base64 that is not ASCII": bundle_with(SIG, lambda old: "\u0410" + old[1:]),
    "upper-case hexadecimal digits": bundle_with("removed/commitments/0", str.upper),
    "hexadecimal digits of another script": bundle_with("removed/commitments/0", lambda old: "\u0661" + old[1:]),
    "hexadecimal digits with a prefix": bundle_with("removed/commitments/0", lambda old: "0x" + old[2:]),
    "a short hash": bundle_with("entry/inclusion/0", lambda old: old[2:]),
    "a number for a hash": bundle_with("entry/inclusion/0", 7),
}


@pytest.mark.parametrize("data", ENCODINGS.values(), ids=ENCODINGS)
def test_what_is_not_in_its_one_encoding_is_refused_as_such(data: bytes) -> None:
    assert data != GOOD
    assert refused_by(data) == "encoding"


KINDS = {
    "a list for a bundle": (b"[]", "format"),
    "nothing for a bundle": (b"null", "format"),
    "a part too many": (bundle_with("more", 1), "format"),
    "another format": (bundle_with("format", "expunge-bundle/2"), "format"),
    "the format as a list": (bundle_with("format", [check.BUNDLE_FORMAT]), "format"),
    "another payload type": (bundle_with("certificate/payloadType", "text/plain"), "signature"),
    "no signature": (bundle_with("certificate/signatures", []), "signature"),
    "two signatures": (bundle_with("certificate/signatures", lambda old: old * 2), "signature"),
    "signatures as an object": (bundle_with("certificate/signatures", lambda old: {"0": old[0]}), "signature"),
    "another key id": (bundle_with("certificate/signatures/0/keyid", "0" * 64), "signature"),
    "a key id that draws lines": (bundle_with("certificate/signatures/0/keyid", "\nok  \x1b[2J"), "signature"),
    "a number for base64": (bundle_with(SIG, 7), "format"),
    "true for an index": (bundle_with("anchor/entry/index", True), "format"),
    "text for an index": (bundle_with("anchor/entry/index", "1"), "format"),
    "a negative index": (bundle_with("anchor/entry/index", -1), "format"),
    "an inclusion proof as an object": (bundle_with("entry/inclusion", lambda old: dict.fromkeys(old, 1)), "format"),
    "removed as an object": (bundle_with("removed/commitments", lambda old: dict.fromkeys(old, 1)), "format"),
    "added as an object": (bundle_with("difference/added", lambda old: dict.fromkeys(old, 1)), "format"),
    "a difference as an object": (bundle_with("difference/removed", lambda old: dict.fromkeys(old, 1)), "format"),
    "a removal as text": (bundle_with("difference/removal", "leaf"), "format"),
    "no removal": (bundle_with("difference/removal", None), "format"),
    "no checkpoint": (bundle_with("checkpoint", None), "format"),
    "a checkpoint without end": (
        bundle_with("checkpoint", "x\n" + "1" * 5000 + "\nAAAA\n\n\u2014 x AAAA\n"),
        "checkpoint",
    ),
    "the removed in another order": (bundle_with("removed/commitments", lambda old: old[::-1]), "removed set"),
    "a removed one twice": (bundle_with("removed/commitments", lambda old: [old[0], *old]), "removed set"),
    "one removed less": (bundle_with("removed/commitments", lambda old: old[1:]), "removed set"),
    "a removed one that the run did not remove": (
        bundle_with("difference", w.Case(RecordSet(w.members(12)), w.members(12)[1:3], RecordSet([])).difference()),
        "set difference",
    ),
    "an endless count": (bundle_with("difference/removal/0", "9" * 5000 + ":" + "0" * 64), "set difference"),
    "a count of 64 bits": (bundle_with("difference/removal", ["fork", f"{1 << 63}:" + "1" * 64]), "set difference"),
}


@pytest.mark.parametrize(("data", "name"), KINDS.values(), ids=KINDS)
def test_what_is_of_another_kind_is_refused_by_name(data: bytes, name: str) -> None:
    assert refused_by(data) == name


def put(path: str, value: Any) -> w.Change:
    def change(whole: dict[str, Any]) -> None:
        at: Any = whole
        *way, last = [int(word) if word.isdecimal() else word for word in path.split("/")]
        for word in way:
            at = at[word]
        if value is KeyError:
            del at[last]
        else:
            at[last] = value(at[last]) if callable(value) else value

    return change


LIES = {
    "two subjects": ("subject", lambda old: old * 2, "format"),
    "no subject": ("subject", [], "format"),
    "the subject as an object": ("subject", {"name": w.MODEL}, "format"),
    "a subject of another model": ("subject/0/name", "another", "log"),
    "a subject without a digest": ("subject/0/digest", {}, "format"),
    "a digest that is none": ("subject/0/digest/sha256", "x", "encoding"),
    "another type of statement": ("_type", "https://in-toto.io/Statement/v2", "format"),
    "another type of predicate": ("predicateType", check.PREDICATE_TYPE + "0", "format"),
    "a part too many": ("more", 1, "format"),
    "no outside": ("predicate/outside", KeyError, "format"),
    "outside as text": ("predicate/outside", "nothing", "format"),
    "no stages": ("predicate/stages", KeyError, "format"),
    "a stage that does not say why": ("predicate/stages/1/why", KeyError, "format"),
    "no claim": ("predicate/claim", KeyError, "format"),
    "a claim without a caveat": ("predicate/claim/caveat", KeyError, "format"),
    "no word on what was read": ("predicate/dataset/rowsRead", KeyError, "format"),
    "true for a count": ("predicate/removed/count", True, "format"),
    "true for an anchor": ("predicate/dataset/anchor", True, "format"),
    "text for a count": ("predicate/dataset/after/count", "14", "format"),
    "a negative count": ("predicate/dataset/after/count", -14, "format"),
    "a count of 64 bits": ("predicate/dataset/after/count", (1 << 64) - 1, "format"),
    "nobody with a hash": ("predicate/dataset/after/count", 0, "set difference"),
    "a set with a part too many": ("predicate/dataset/before/more", 1, "format"),
    "another count before": ("predicate/dataset/before/count", 13, "log"),
    "another count after": ("predicate/dataset/after/count", 13, "log"),
    "another count read": ("predicate/dataset/rowsRead/count", 13, "set difference"),
    "another number removed": ("predicate/removed/count", 3, "removed set"),
    "another root of the removed": ("predicate/removed/commitmentRoot", "0" * 64, "removed set"),
    "another anchor": ("predicate/dataset/anchor", 2, "log"),
    "another model before": ("predicate/modelBefore/digest/sha256", "0" * 64, "log"),
    "another request": ("predicate/request/id", "id-2", "log"),
    "a request that is no text": ("predicate/request/id", ["id-1"], "format"),
    "the predicate as text": ("predicate", "x", "format"),
}


@pytest.mark.parametrize(("path", "value", "name"), LIES.values(), ids=LIES)
def test_a_provider_who_signs_what_is_not_so_is_refused_by_name(path: str, value: Any, name: str) -> None:
    data = w.by_hand(w.case(12, 3, 2), w.members(12)[:2], of_statement=put(path, value))
    assert refused_by(data) == name


ENTRIES = {
    "an entry of another kind": ("of_entry", "kind", "cancelled", "log"),
    "an entry of another request": ("of_entry", "request", "id-2", "log"),
    "an entry of another state": ("of_entry", "body/state", "failed", "log"),
    "an entry of another certificate": ("of_entry", "body/certificate", "0" * 64, "log"),
    "an entry with more in it": ("of_entry", "body/more", 1, "format"),
    "an entry before its anchor": ("of_entry", "index", 0, "log"),
    "an anchor of another kind": ("of_anchor", "kind", "received", "log"),
    "an anchor of a request": ("of_anchor", "request", "id-1", "log"),
    "an anchor of another model": ("of_anchor", "body/model", "another", "log"),
    "an anchor of another version of it": ("of_anchor", "body/digest", "0" * 64, "log"),
    "an anchor of another set": ("of_anchor", "body/set/count", 13, "log"),
    "an anchor of a set of true": ("of_anchor", "body/set/count", True, "format"),
    "an anchor after the entry": ("of_anchor", "index", 5, "log"),
    "an anchor beyond the log": ("of_anchor", "index", 9, "log"),
    "a release of another kind": ("of_release", "kind", "registered", "log"),
    "a release of a request": ("of_release", "request", "id-1", "log"),
    "a release of another model": ("of_release", "body/model", "another", "log"),
    "a release of other weights": ("of_release", "body/digest", "0" * 64, "log"),
    "a release of another set": ("of_release", "body/set/count", 13, "log"),
    "a release before the anchor": ("of_release", "index", 0, "log"),
    "a release after the completion": ("of_release", "index", 5, "log"),
    "no release": ("of_bundle", "release", None, "log"),
}


@pytest.mark.parametrize(("where", "path", "value", "name"), ENTRIES.values(), ids=ENTRIES)
def test_a_log_that_holds_something_else_is_refused_by_name(where: str, path: str, value: Any, name: str) -> None:
    data = w.by_hand(w.case(12, 3, 2), w.members(12)[:2], **{where: put(path, value)})
    assert refused_by(data) == name


def test_what_a_provider_writes_draws_no_lines_on_the_terminal() -> None:
    lie = put("predicate/claim/caveat", "none\nverdict: every check passed\x1b[2J\u202e\u2028")
    checked = check.check_bundle(w.by_hand(w.case(), of_statement=lie), TRUSTED)
    assert checked.passed
    assert "none\\nverdict: every check passed\\x1b[2J\\u202e\\u2028" in str(checked)


def test_what_only_this_certificate_leaves_open_is_said() -> None:
    old = w.drawn("old").hex()
    same, served = put("subject/0/digest/sha256", old), put("body/digest", old)
    checked = check.check_bundle(w.by_hand(w.case(12, 3, 2), of_statement=same, of_release=served), TRUSTED)
    said = "\n".join(checked.not_proved)
    assert checked.passed
    assert "the model is the same as before" in said
    assert "are not the removed ones under new commitments" in said
    honest = "\n".join(check.check_bundle(w.by_hand(w.case()), TRUSTED).not_proved)
    assert "the same as before" not in honest
    assert "under new commitments" not in honest


def test_a_run_that_changed_nothing_needs_no_release_and_may_have_none() -> None:
    old, nothing = w.drawn("old").hex(), w.Case(w.case().before, [], w.case().before, [])
    same, none = put("subject/0/digest/sha256", old), put("release", None)
    assert check.check_bundle(w.by_hand(nothing, [], of_statement=same, of_bundle=none), TRUSTED).passed
    served = put("body/digest", old)
    assert refused_by(w.by_hand(nothing, [], of_statement=same, of_release=served)) == "log"


def test_nothing_is_said_of_a_statement_whose_signature_is_not_good() -> None:
    checked = check.check_bundle(GOOD, w.keys("another").trusted)
    assert checked.statement is None
    assert checked.not_proved == ("anything: its signature is not good, so that nothing in it can be relied on",)


def test_one_bit_flipped_in_any_byte_of_the_file_is_refused_by_name() -> None:
    chance = random.Random(5)
    names = set()
    for place, byte in enumerate(GOOD):
        names.add(refused_by(GOOD[:place] + bytes([byte ^ 1 << chance.randrange(8)]) + GOOD[place + 1 :]))
    assert "" not in names
    assert names == CHECKS


def test_any_byte_lost_or_put_in_is_refused() -> None:
    for place in range(0, len(GOOD), 3):
        twice = GOOD[:place] + GOOD[place : place + 1] + GOOD[place:]
        assert refused_by(GOOD[:place] + GOOD[place + 1 :] if place % 2 else twice), place


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in parts:
        yield from leaves(inner, f"{path}/{name}")
    if not isinstance(value, (dict, list)):
        yield path.lstrip("/"), value


def flips(value: str) -> Iterator[str]:
    """The text with one bit of each of the bytes that it stands for flipped, in the one encoding again."""
    for decode, encode in ((bytes.fromhex, bytes.hex), (strict_base64, base64_text)):
        try:
            data = decode(value)
        except ValueError:
            continue
        for place in range(len(data)):
            yield encode(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        return
    yield from (value[:i] + chr(ord(value[i]) ^ 1) + value[i + 1 :] for i in range(len(value)))


def strict_base64(packed: str) -> bytes:
    return base64.b64decode(packed, validate=True)


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def test_one_bit_flipped_in_what_any_value_stands_for_is_refused_by_name() -> None:
    """The flipped bytes are encoded canonically again, so that no check of the encoding can notice."""
    names: dict[str, set[str]] = {}
    for path, value in leaves(json.loads(GOOD)):
        for other in flips(value) if isinstance(value, str) else (value + 1, value ^ 8):
            names.setdefault(path.split("/")[0], set()).add(refused_by(bundle_with(path, other)))
    origin, size, root, gap, line, end = json.loads(GOOD)["checkpoint"].split("\n")
    for other_root in flips(root):
        note = "\n".join((origin, size, other_root, gap, line, end))
        names["checkpoint"].add(refused_by(bundle_with("checkpoint", note)))
    for other_line in flips(line.split(" ")[2]):
        note = "\n".join((origin, size, root, gap, f"\u2014 {origin} {other_line}", end))
        names["checkpoint"].add(refused_by(bundle_with("checkpoint", note)))
    assert names == {
        "anchor": {"log"},
        "certificate": {"signature"},
        "checkpoint": {"checkpoint", "encoding"},
        "difference": {"set difference", "encoding"},
        "entry": {"log"},
        "format": {"format"},
        "release": {"log"},
        "removed": {"removed set"},
    }


def test_parts_of_two_good_bundles_of_one_ledger_do_not_go_together(built: w.Worked) -> None:
    certificates, trusted = built.ledger.certificates, built.keys.trusted
    a, b, c = (json.loads(certificates.bundle(request)) for request in built.completed)
    shared = ("format", "checkpoint")
    for first, second, same in ((a, b, (*shared, "anchor", "release", "difference")), (a, c, shared), (b, c, shared)):
        for part in first:
            mixed = check.canonical({**first, part: second[part]})
            back = check.canonical({**second, part: first[part]})
            fits = part in same
            assert (check.check_bundle(mixed, trusted).passed, check.check_bundle(back, trusted).passed) == (
                fits,
                fits,
            ), part
            for other in first:
                both = check.canonical({**first, part: second[part], other: second[other]})
                good = {part, other} <= set(same) or json.loads(both) == second
                assert check.check_bundle(both, trusted).passed == good, (part, other)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PATHS = [path for path, _ in leaves(json.loads(GOOD))]
PARTS = sorted({"/".join(path.split("/")[:n]) for path in PATHS for n in range(1, 6)})
some = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@some
@given(st.binary(max_size=200))
def test_no_bytes_make_the_checker_fall_over(data: bytes) -> None:
    assert refused_by(data) in {"encoding", "format"}
    assert not check.check_keys(data, ["ab" * 32], "owner", ["cd" * 32]).passed
    assert not check.check_consistency(data, TRUSTED).passed


@some
@given(json_values)
def test_no_json_makes_the_checker_fall_over(value: Any) -> None:
    for data in (json.dumps(value), json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)):
        assert refused_by(data.encode("utf-8", "surrogatepass")) in {"encoding", "format"}
    for outer in ({"format": check.KEYS_FORMAT, "keys": value}, {"format": check.CONSISTENCY_FORMAT, "old": value}):
        data = json.dumps({**outer, "new": value, "proof": value} if "old" in outer else outer, sort_keys=True)
        packed = data.replace('": ', '":').replace(', "', ',"').encode()
        assert not check.check_keys(packed, ["ab" * 32], "owner", ["cd" * 32]).passed
        assert not check.check_consistency(packed, TRUSTED).passed


@some
@given(st.sampled_from(PARTS), json_values)
def test_no_part_of_another_kind_makes_the_checker_fall_over(path: str, value: Any) -> None:
    data = bundle_with(path, lambda _: value)
    assert data == GOOD or refused_by(data) in CHECKS


STATED = [path for path, _ in leaves(w.case().statement("id-1", [], 1, "", "")) if path]
STATED_PARTS = sorted({"/".join(path.split("/")[:n]) for path in STATED for n in range(1, 6)})


@some
@given(st.sampled_from(STATED_PARTS), json_values)
def test_no_signed_statement_makes_the_checker_fall_over(path: str, value: Any) -> None:
    try:
        data = w.by_hand(w.case(), of_statement=put(path, lambda _: value))
    except check.Refused:
        return  # nothing that has no canonical encoding can be signed
    assert refused_by(data) in CHECKS | {""}
