"""Envelopes, notes and keys: what other programs make of them, and what a new key must not change."""

from __future__ import annotations

import base64
import copy
import hashlib
import shutil
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from expunge.core.errors import Corrupt, Misuse, UnreadableFile
from expunge.ledger import check
from expunge.ledger.keys import Keys
from expunge.ledger.tree import Tree
from tests.ledger import worked as w


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> w.Worked:
    """A worked ledger that nobody changes."""
    return w.build(tmp_path_factory.mktemp("built"))


def test_a_worked_ledger_has_no_fault_and_its_bundles_are_accepted(built: w.Worked) -> None:
    assert built.ledger.verify() == []
    for request in built.completed:
        checked = check.check_bundle(built.ledger.certificates.bundle(request), built.keys.trusted)
        assert checked.passed, str(checked)
        assert [one.check for one in checked.outcomes] == [
            "encoding",
            "signature",
            "log",
            "removed set",
            "set difference",
        ]


def theirs_of(public: Ed25519PublicKey) -> SSlibKey:
    """The key as securesystemslib has it, under our id: of itself it would hash a description of the key in JSON."""
    own = SSlibKey.from_crypto(public)
    assert own.keyid != check.key_id(public)
    return SSlibKey(check.key_id(public), own.keytype, own.scheme, own.keyval)


def test_a_key_id_is_the_hash_of_the_key_as_openssl_writes_it() -> None:
    public = w.keys().signing.public_key()
    body = b"".join(w.keys().public_pem().splitlines()[1:-1])
    assert check.key_id(public) == hashlib.sha256(base64.b64decode(body)).hexdigest()


def test_another_program_verifies_our_envelopes_and_refuses_changed_ones(built: w.Worked) -> None:
    public = built.keys.signing.public_key()
    theirs = theirs_of(public)
    envelope = check.parse(built.ledger.certificates.get(built.completed[0]).envelope)
    assert theirs.keyid in Envelope.from_dict(copy.deepcopy(envelope)).verify([theirs], 1)
    payload = base64.b64decode(envelope["payload"])
    for place in range(0, len(payload), 97):
        bad = payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]
        changed = {**envelope, "payload": base64.b64encode(bad).decode()}
        with pytest.raises(VerificationError):
            Envelope.from_dict(copy.deepcopy(changed)).verify([theirs], 1)
        with pytest.raises(check.Refused, match="signature"):
            check.open_envelope(changed, [public])
    with pytest.raises(VerificationError):
        Envelope.from_dict({**copy.deepcopy(envelope), "payloadType": "text/plain"}).verify([theirs], 1)


def test_our_checker_takes_an_envelope_that_another_program_signed() -> None:
    signer = CryptoSigner(w.keys().signing, theirs_of(w.keys().signing.public_key()))
    statement = w.case().statement("id-1", w.members(3), 1, "a" * 64, "b" * 64)
    envelope = Envelope(check.canonical(statement), check.PAYLOAD_TYPE, {})
    envelope.sign(signer)
    made = check.parse(check.canonical({**envelope.to_dict()}))
    assert made == w.keys().sign_statement(check.canonical(statement))
    assert check.open_envelope(made, w.keys().trusted)[0] == statement


def read_note(note: str, key: Ed25519PublicKey) -> tuple[str, int, bytes]:
    """A signed note (C2SP) read from its description: text, an empty line, lines of a dash, a name and base64."""
    data = note.encode("utf-8")
    assert data.endswith(b"\n")
    cut = data.rindex(b"\n\n") + 1
    text, signatures = data[:cut], data[cut + 1 :]
    dash, name, packed = signatures.removesuffix(b"\n").split(b" ")
    assert dash == "\N{EM DASH}".encode()
    signature = base64.b64decode(packed, validate=True)
    assert signature[:4] == hashlib.sha256(name + b"\n" + b"\x01" + key.public_bytes_raw()).digest()[:4]
    key.verify(signature[4:], text)
    origin, size, root, rest = text.split(b"\n")
    assert not rest
    assert origin == name
    assert str(int(size)).encode() == size
    return origin.decode(), int(size), base64.b64decode(root, validate=True)


def test_checkpoints_are_signed_notes_as_described_elsewhere(built: w.Worked) -> None:
    note = built.ledger.log.last_note()
    leaves = [entry.leaf() for entry in built.ledger.log.entries()]
    assert read_note(note, built.keys.signing.public_key()) == ("expunge/ledger", len(leaves), Tree(leaves).root())
    assert (built.folder / "anchor").read_text(encoding="utf-8") == note


def changed_notes(note: str) -> list[str]:
    text, line = note.split("\n\n")
    origin, size, root = text.split("\n")
    dash, name, packed = line.removesuffix("\n").split(" ")
    made = [
        f"{origin}x\n{size}\n{root}\n\n{dash} {origin}x {packed}\n",
        f"{origin}\n{size}\n{root}\n\n{dash} x {packed}\n",
    ]
    for other in (
        f"0{size}",
        f"+{size}",
        f"{size} ",
        f" {size}",
        "",
        "-1",
        "\u0663",
        "1" * 5000,
        str(1 << 64),
        f"{size}.0",
    ):
        made.append(f"{origin}\n{other}\n{root}\n\n{line}")
    for other in (root[:-1], root + "=", root[:-2] + "B=", "AAAA", "", root.replace("=", "")):
        made.append(f"{origin}\n{size}\n{other}\n\n{line}")
    for other in (packed[:-4], packed + "AAAA", "AAAA", "", packed.swapcase()):
        made.append(f"{text}\n\n{dash} {name} {other}\n")
    made += [
        note[:-1],
        note + "\n",
        note + line,
        f"{text}\nmore\n\n{line}",
        f"{text}\n{line}",
        f"{text}\n\n- {name} {packed}\n",
    ]
    return [*made, note.replace("\n", "\r\n"), "\ufeff" + note, "", "\n\n", "\n\n\n\n"]


def test_every_other_note_is_refused(built: w.Worked) -> None:
    note = built.ledger.log.last_note()
    assert check.open_note(note, built.keys.trusted).origin == "expunge/ledger"
    for bad in changed_notes(note):
        with pytest.raises(check.Refused):
            check.open_note(bad, built.keys.trusted)
    with pytest.raises(check.Refused, match="no signature by a trusted key"):
        check.open_note(note, w.keys("another").trusted)
    with pytest.raises(check.Refused, match="no signature by a trusted key"):
        check.open_note(note, [])


def test_keys_are_kept_from_others(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    keys = w.keys()
    keys.save(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("signing.pem", "pseudonyms.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert not [one for one in folder.iterdir() if one.name.endswith(".part")]
    loaded = Keys.load(folder)
    assert (loaded.pepper, loaded.public_pem()) == (keys.pepper, keys.public_pem())
    assert check.raw_key(check.read_public_key(folder / "expunge.pub")) == check.raw_key(keys.signing.public_key())
    with pytest.raises(Misuse, match="holds keys already"):
        keys.save(folder)


@pytest.mark.parametrize("name", ["signing.pem", "pseudonyms.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_keys_that_others_can_read_are_refused(tmp_path: Path, name: str, mode: int) -> None:
    w.keys().save(tmp_path / "keys")
    (tmp_path / "keys" / name).chmod(mode)
    with pytest.raises(UnreadableFile, match="can be read by others"):
        Keys.load(tmp_path / "keys")


@pytest.mark.parametrize("name", ["signing.pem", "pseudonyms.key"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_keys_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    w.keys().save(tmp_path / "keys")
    path = tmp_path / "keys" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 20 if damage == "cut" else 0])
    with pytest.raises(UnreadableFile, match="restore it"):
        Keys.load(tmp_path / "keys")


@pytest.fixture
def rotated(built: w.Worked, tmp_path: Path) -> tuple[w.Worked, w.Worked]:
    """The same ledger before and after its signing key was replaced."""
    built.keys.save(tmp_path / "keys")
    new = Keys.load(tmp_path / "keys").rotate(tmp_path / "keys")
    again = Keys.load(tmp_path / "keys")
    assert [check.key_id(key) for key in again.trusted] == [check.key_id(key) for key in new.trusted]
    copy = w.reopened(built, tmp_path / "copy")
    copy.ledger.close()
    after = w.Worked(tmp_path / "copy", again, copy.seconds, completed=copy.completed)
    return built, after


def test_what_the_old_key_signed_still_counts_after_a_rotation(rotated: tuple[w.Worked, w.Worked]) -> None:
    before, after = rotated
    assert check.key_id(after.keys.signing.public_key()) != check.key_id(before.keys.signing.public_key())
    assert after.keys.pseudonym("r-1") == before.keys.pseudonym("r-1")
    assert after.ledger.verify() == []
    assert after.ledger.certificates.get(after.completed[0]) == before.ledger.certificates.get(after.completed[0])
    bundle = after.ledger.certificates.bundle(after.completed[0])
    assert check.check_bundle(bundle, after.keys.trusted).passed
    assert check.check_bundle(bundle, before.keys.trusted).passed


def test_a_bundle_of_both_keys_needs_both(rotated: tuple[w.Worked, w.Worked]) -> None:
    before, after = rotated
    after.file("one more")
    after.ledger.log.checkpoint()
    bundle = after.ledger.certificates.bundle(after.completed[0])
    old, new = before.keys.signing.public_key(), after.keys.signing.public_key()
    assert check.check_bundle(bundle, [old, new]).passed
    assert check.check_bundle(bundle, [new, old]).passed
    assert check.check_bundle(bundle, [old]).outcomes[-1].check == "checkpoint"
    assert check.check_bundle(bundle, [new]).outcomes[-1].check == "signature"
    assert check.check_bundle(bundle, []).outcomes[-1].check == "signature"
    assert after.ledger.verify() == []


def test_a_consistency_proof_between_checkpoints_of_two_keys_needs_both(rotated: tuple[w.Worked, w.Worked]) -> None:
    before, after = rotated
    after.file("one more")
    after.ledger.log.checkpoint()
    old, new = before.keys.signing.public_key(), after.keys.signing.public_key()
    sizes = [size for (size,) in after.sql("SELECT size FROM checkpoint ORDER BY size")]
    proof = after.ledger.log.consistency(sizes[0], sizes[-1])
    assert check.check_consistency(proof, [old, new]).passed
    assert not check.check_consistency(proof, [old]).passed
    assert not check.check_consistency(proof, [new]).passed


def test_a_ledger_with_keys_that_never_signed_it_does_not_open(built: w.Worked, tmp_path: Path) -> None:
    built.ledger.close()
    shutil.copytree(built.folder, tmp_path / "copy")
    with pytest.raises(Corrupt, match="not one of this ledger"):
        w.Worked(tmp_path / "copy", w.keys("another"))
