"""Check a deletion certificate offline. This one file stands alone: Python's standard library and `cryptography`.

    python check.py bundle.json --key expunge.pub [--keys keys.json --owner NAME --row DIGEST ...]
    python check.py --consistency proof.json --key expunge.pub

It holds every format that the ledger writes, so that writer and checker cannot drift apart: canonical JSON, the
envelope (DSSE with an in-toto Statement v1), the append-only log (Merkle tree of RFC 6962 and 9162), its checkpoints
(C2SP signed notes, Ed25519), and sets of records (sparse Merkle trees with counts).

Exit codes: 0 all checks passed; 1 a check failed; 2 the arguments or files cannot be used.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import hmac
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://expunge.example/deletion-certificate/v1"
BUNDLE_FORMAT = "expunge-bundle/1"
KEYS_FORMAT = "expunge-keys/1"
CONSISTENCY_FORMAT = "expunge-consistency/1"
NOBODY = (0, bytes(32))
"""Count and hash of the empty set."""

Counted = tuple[int, bytes]

_DEEPEST = 64  # levels of nesting
_LARGEST = 1 << 64  # whole numbers stay below, so that no reader rounds or refuses them
_MOST = 1 << 63  # counts and sizes stay below: eight bytes hold them


class Refused(ValueError):
    """Something is not what it must be. `check` names the check that refused it."""

    def __init__(self, check: str, why: str) -> None:
        """`why` is one line for people."""
        super().__init__(f"{check}: {why}")
        self.check = check
        self.why = why


# Canonical JSON


def canonical(value: Any) -> bytes:
    """The one encoding of a value: UTF-8, sorted keys, no spaces. Floats are refused: other programs round them.

    Raises:
        Refused: for a float, a whole number of more than 64 bits, nesting deeper than 64, and what JSON does not have.
    """
    _refuse_odd(value, 0)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise Refused("encoding", f"a value has no canonical encoding ({error})") from None


def parse(data: bytes) -> Any:
    """Read canonical JSON; a repeated key, a float, a space too many or another order of keys is refused."""
    try:
        value = json.loads(data.decode("utf-8"))
        again = canonical(value)
    except (ValueError, RecursionError) as error:
        raise Refused("encoding", f"this is no canonical JSON ({error})") from None
    if again != data:
        raise Refused("encoding", "this JSON is not in its one canonical encoding, so something rewrote it")
    return value


def _refuse_odd(value: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise Refused("encoding", f"values nest at most {_DEEPEST} deep")
    if isinstance(value, float):
        raise Refused("encoding", f"floats have no canonical encoding, got {value!r}; write them as text")
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise Refused("encoding", "whole numbers have at most 64 bits; write larger ones as text")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise Refused("encoding", f"keys must be text, got {key!r}")
            _refuse_odd(inner, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _refuse_odd(inner, depth + 1)


def from_base64(text: object, what: str) -> bytes:
    """Decode base64, refusing any but the canonical encoding."""
    try:
        data = base64.b64decode(_text(text, what).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise Refused("encoding", f"{what} is no base64 ({error})") from None
    if base64.b64encode(data).decode("ascii") != text:
        raise Refused("encoding", f"{what} is not in its one canonical base64 encoding")
    return data


def from_hex(text: object, what: str, size: int = 32) -> bytes:
    """Decode lower-case hexadecimal digits of so many bytes."""
    if not isinstance(text, str) or len(text) != 2 * size or not set(text) <= set("0123456789abcdef"):
        raise Refused("encoding", f"{what} must be {2 * size} lower-case hexadecimal digits, got {str(text)[:80]!r}")
    return bytes.fromhex(text)


def has_fields(value: object, fields: Iterable[str], what: str) -> dict[str, Any]:
    """The object itself, if it has exactly these fields."""
    wanted = set(fields)
    if not isinstance(value, dict) or set(value) != wanted:
        raise Refused("format", f"{what} must be an object with exactly {', '.join(sorted(wanted))}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise Refused("format", f"{what} must be text, got {type(value).__name__}")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refused("format", f"{what} must be a list, got {type(value).__name__}")
    return value


def _whole(value: object, what: str) -> int:
    """A count, an index or a size. JSON's true is no 1, though Python finds them equal."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise Refused("format", f"{what} must be a whole number from 0 on, got {str(value)[:80]!r}")
    return value


def _hashes(value: object, what: str) -> list[bytes]:
    return [from_hex(text, f"one of {what}") for text in _list(value, what)]


# The append-only log: Merkle tree hash of RFC 6962, proofs of RFC 9162, section 2.1


def leaf_hash(data: bytes) -> bytes:
    """Hash of one entry of the log."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of two subtrees of the log."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes, in order. Cost: one hash a leaf."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:  # an odd last node goes up as it is, which is RFC 6962's split at the largest power of two
        level = [node_hash(level[i], level[i + 1]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]


def proves_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """True if `leaf` is entry `index` of the log of `size` entries with this root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    place, last, node = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and node == root


def proves_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """True if the first `old` of `new` entries are the log that had `old_root` (RFC 9162, 2.1.4.2)."""
    if not 0 < old <= new:
        return False
    if old == new:
        return not proof and old_root == new_root
    if not proof:
        return False
    path = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and before == old_root and after == new_root


# Checkpoints: C2SP signed notes


@dataclass(frozen=True)
class Checkpoint:
    """What a signed note says: the log called `origin` had `size` entries with this `root`."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """The text that is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode('ascii')}\n"


def raw_key(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo, in hexadecimal digits."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def note_key_hash(name: str, key: Ed25519PublicKey) -> bytes:
    """The four bytes by which a note names its key."""
    return hashlib.sha256(name.encode("utf-8") + b"\n\x01" + raw_key(key)).digest()[:4]


def open_note(note: str, keys: Sequence[Ed25519PublicKey]) -> Checkpoint:
    """Read a checkpoint whose one signature is by one of these keys.

    Raises:
        Refused: for any other signature line, and for a text that is not exactly what would have been signed.
    """
    text, gap, line = note.rpartition("\n\n")
    lines = text.split("\n")
    if not gap or len(lines) != 3:
        raise Refused("checkpoint", "a checkpoint has three lines (origin, size, root), a gap and one signature line")
    size, root = _decimal(lines[1]), from_base64(lines[2], "the checkpoint's root")
    if size is None or len(root) != 32:
        raise Refused("checkpoint", "its size must be a whole number without leading zeros, its root 32 bytes")
    checkpoint = Checkpoint(lines[0], size, root)
    for key in keys:
        start = f"\u2014 {checkpoint.origin} "
        if not line.startswith(start) or not line.endswith("\n"):
            break
        signature = from_base64(line[len(start) : -1], "the checkpoint's signature")
        if signature[:4] != note_key_hash(checkpoint.origin, key):
            continue
        _verify(key, signature[4:], checkpoint.text().encode("utf-8"), "checkpoint")
        if f"{checkpoint.text()}\n{line}" != note:
            raise Refused("checkpoint", "its text is not in the one canonical form")
        return checkpoint
    raise Refused("checkpoint", "it carries no signature by a trusted key")


def _decimal(text: str) -> int | None:
    """A whole number of at most 63 bits in its one spelling; None for anything else, however long."""
    if not text.isascii() or not text.isdecimal() or len(text) > 19:
        return None
    return int(text) if str(int(text)) == text and int(text) < _MOST else None


def _verify(key: Ed25519PublicKey, signature: bytes, data: bytes, check: str) -> None:
    try:
        key.verify(signature, data)
    except InvalidSignature:
        raise Refused(check, "the signature does not match: this was changed, or signed by another key") from None


# Envelopes: DSSE with an in-toto Statement


def pae(payload: bytes) -> bytes:
    """The bytes that a DSSE signature signs."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode("ascii"), len(payload), payload)


def open_envelope(envelope: object, keys: Sequence[Ed25519PublicKey]) -> tuple[dict[str, Any], bytes]:
    """The statement in an envelope and its payload; parsed only after its signature was found good.

    The key id must be that of the verifying key, stricter than DSSE, where it is a hint that anybody may change.
    """
    fields = has_fields(envelope, ("payload", "payloadType", "signatures"), "the envelope")
    if fields["payloadType"] != PAYLOAD_TYPE:
        raise Refused("signature", f"the payload type must be {PAYLOAD_TYPE}, got {fields['payloadType']!r}")
    payload = from_base64(fields["payload"], "the payload")
    signatures = fields["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise Refused("signature", "a certificate carries exactly one signature")
    signature = has_fields(signatures[0], ("keyid", "sig"), "the signature")
    key = next((key for key in keys if key_id(key) == signature["keyid"]), None)
    if key is None:
        raise Refused("signature", f"it names key {str(signature['keyid'])[:16]}..., which is not trusted here")
    _verify(key, from_base64(signature["sig"], "the signature"), pae(payload), "signature")
    statement = parse(payload)
    has_fields(statement, ("_type", "subject", "predicateType", "predicate"), "the statement")
    if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise Refused("format", f"it is no {PREDICATE_TYPE}, got {statement['predicateType']!r}")
    return statement, payload


# Sets of records: sparse Merkle trees with counts


def record_message(owner: str, content: str) -> bytes:
    """What a record's commitment commits to: its owner and the SHA-256 of its content, in hexadecimal digits."""
    return canonical(["expunge-record/1", owner, content])


def commitment(key: bytes, owner: str, content: str) -> bytes:
    """HMAC-SHA256 under the record's own random key: without the key it says nothing of owner or content."""
    return hmac.digest(key, record_message(owner, content), "sha256")


def set_leaf(member: bytes) -> Counted:
    """Count and hash of the set of one member."""
    return 1, hashlib.sha256(b"\x00" + member).digest()


def set_node(left: Counted, right: Counted) -> Counted:
    """Count and hash of the union of two sets that part at one bit.

    Both counts are hashed. A set of one has the hash of its member at whatever depth, so that a set's hash depends
    only on what is in it, and removing a member is undone by adding it. Refused for more than 2^63 records.
    """
    if not left[0] or not right[0]:
        lone = left if left[0] else right
        if lone[0] < 2:
            return lone
    count = left[0] + right[0]
    if count >= _MOST:
        raise Refused("set difference", "a set holds fewer than 2^63 records")
    parts = (b"\x01", left[0].to_bytes(8, "big"), left[1], right[0].to_bytes(8, "big"), right[1])
    return count, hashlib.sha256(b"".join(parts)).digest()


def bit(member: bytes, depth: int) -> int:
    """The bit of a member that says on which side it lies at this depth."""
    return member[depth >> 3] >> (7 - (depth & 7)) & 1


def after_removal(members: Sequence[bytes], proof: Sequence[str]) -> tuple[Counted, Counted]:
    """The set that held all these members, and the set without them, as the proof has them; hashing only.

    Args:
        members: distinct, sorted.
        proof: in the order of a walk from the root: where no member lies, ``count:hash`` of the whole subtree; where
            one lies alone in the walk, ``leaf`` if it is alone in the set there, else ``fork``.

    Raises:
        Refused: for a proof that is too long, too short, or not the one canonical proof.
    """
    if list(members) != sorted(set(members)) or any(len(member) != 32 for member in members):
        raise Refused("set difference", "the commitments must be distinct, sorted, and of 32 bytes each")
    words = iter(proof)

    def walk(inside: Sequence[bytes], depth: int) -> tuple[Counted, Counted]:
        if not inside:
            subtree = _counted(next(words, None))
            return subtree, subtree
        if len(inside) == 1:
            word = next(words, None)
            if word == "leaf":
                return set_leaf(inside[0]), NOBODY
            if word != "fork":
                raise Refused("set difference", f'expected "leaf" or "fork" in the proof, got {word!r}')
        if depth == 256:
            raise Refused("set difference", "the proof goes deeper than commitments have bits")
        middle = next((i for i, member in enumerate(inside) if bit(member, depth)), len(inside))
        left, right = walk(inside[:middle], depth + 1), walk(inside[middle:], depth + 1)
        if left[0][0] + right[0][0] < 2:
            raise Refused("set difference", "the proof forks where one member lies alone")
        return set_node(left[0], right[0]), set_node(left[1], right[1])

    before, after = walk(members, 0)
    if next(words, None) is not None:
        raise Refused("set difference", "the proof goes on after its end")
    return before, after


def _counted(word: object) -> Counted:
    count, colon, digest = word.partition(":") if isinstance(word, str) else ("", "", "")
    number = _decimal(count)
    if not colon or number is None:
        raise Refused("set difference", f'expected "count:hash" in the proof, got {str(word)[:80]!r}')
    return _refuse_empty((number, from_hex(digest, "a hash of the set-difference proof")))


def _refuse_empty(found: Counted) -> Counted:
    """The same, unless it says that nobody is in a set with a hash, or somebody in the set without."""
    if (found[0] == 0) != (found[1] == NOBODY[1]):
        raise Refused("set difference", "the empty set, and no other, has a hash of zeros")
    return found


# Bundles


@dataclass(frozen=True)
class Outcome:
    """One check, and what it found in one line."""

    check: str
    passed: bool
    why: str

    def __str__(self) -> str:
        return _line(f"{'ok  ' if self.passed else 'FAIL'} {self.check}: {self.why}")


def _line(text: str) -> str:
    """The text with every line break, control and direction mark spelled out: what is checked must not draw lines."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


@dataclass(frozen=True)
class Checked:
    """All checks of one bundle; what the certificate says, if its signature is good; and what it does not prove."""

    outcomes: tuple[Outcome, ...]
    statement: dict[str, Any] | None
    not_proved: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(outcome.passed for outcome in self.outcomes)

    def __str__(self) -> str:
        verdict = "every check passed" if self.passed else "REFUSED"
        lines = [*map(str, self.outcomes), f"verdict: {verdict}", "This certificate does not prove:"]
        return "\n".join([*lines, *(_line(f"  - {line}") for line in self.not_proved)])


_ALWAYS_OPEN = (
    "that the program reported the rows that it read truly, or that the weights served are those certified: "
    "ask for the model's digest where it is served",
    "that the set before held all that the model was ever trained on: it is the provider's word, given before the run",
    "that no copy of a removed record stood, or stands, in the sets under another commitment",
    "anything about later models: each needs a certificate of its own",
    "that others see the same log: compare its checkpoint with theirs",
)


def check_bundle(data: bytes, keys: Sequence[Ed25519PublicKey]) -> Checked:
    """Check a bundle against trusted keys. Never raises for what the bundle holds: a failed check says what is wrong.

    Cost: some signatures and about 20 hashes, and two for each hash of the set-difference proof.
    """
    outcomes: list[Outcome] = []
    statement: dict[str, Any] | None = None
    bundle: Any = None
    try:
        bundle = parse(data)
        fields = ("format", "certificate", "entry", "anchor", "release", "checkpoint", "removed", "difference")
        has_fields(bundle, fields, "the bundle")
        if bundle["format"] != BUNDLE_FORMAT:
            raise Refused("format", f"this checker reads {BUNDLE_FORMAT}, got {bundle['format']!r}")
        outcomes.append(Outcome("encoding", True, "the bundle is in its one canonical encoding"))
        statement, payload = open_envelope(bundle["certificate"], keys)
        outcomes.append(Outcome("signature", True, f"signed by {bundle['certificate']['signatures'][0]['keyid'][:16]}"))
        check_form(statement)
        outcomes.append(_check_log(bundle, statement, payload, keys))
        outcomes.append(check_removed(bundle, statement))
        outcomes.append(check_difference(bundle, statement))
    except Refused as error:
        outcomes.append(Outcome(error.check, False, error.why))
    except _ODD as error:
        outcomes.append(Outcome("format", False, f"a part is missing or of another kind ({error!r})"))
    return Checked(tuple(outcomes), statement, _open_questions(statement, bundle))


_ODD = (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError)
"""What Python raises for values of another kind than expected."""


def check_form(statement: dict[str, Any]) -> None:
    """That a statement has every part that a certificate must have, each of its kind; parts unknown here may be there.

    Raises:
        Refused: if not. Call it on what is to be signed, too.
    """
    try:
        subject = _list(statement["subject"], "the subject")
        if len(subject) != 1:
            raise Refused("format", f"a certificate is of one model, got {len(subject)} subjects")
        named = has_fields(subject[0], ("name", "digest"), "the subject")
        _text(named["name"], "the model's name")
        from_hex(named["digest"]["sha256"], "the model's digest")
        predicate = statement["predicate"]
        _text(predicate["request"]["id"], "the request's id")
        from_hex(predicate["modelBefore"]["digest"]["sha256"], "the digest of the model before")
        _whole(predicate["removed"]["count"], "the count of the removed")
        from_hex(predicate["removed"]["commitmentRoot"], "the root of the removed")
        _form_of_dataset(predicate["dataset"])
        for part in ("level", "caveat"):
            _text(predicate["claim"][part], f"the {part} of the claim")
        for stage in _list(predicate["stages"], "the stages"):
            for part in ("name", "outcome") if stage["outcome"] == "passed" else ("name", "outcome", "why"):
                _text(stage[part], f"the {part} of a stage")
        for place in _list(predicate["outside"], "what is outside"):
            _text(place, "each place that is outside")
    except (KeyError, TypeError) as error:
        raise Refused("format", f"a part of the statement is missing or of another kind ({error!r})") from None


def _form_of_dataset(dataset: dict[str, Any]) -> None:
    _whole(dataset["anchor"], "the index of the anchor")
    _set(dataset["before"])
    _set(dataset["after"])
    if dataset["rowsRead"] is not None:
        _set(dataset["rowsRead"])


def _check_log(
    bundle: dict[str, Any], statement: dict[str, Any], payload: bytes, keys: Sequence[Ed25519PublicKey]
) -> Outcome:
    checkpoint = open_note(_text(bundle["checkpoint"], "the checkpoint"), keys)
    entry, anchor = _proved(bundle["entry"], checkpoint), _proved(bundle["anchor"], checkpoint)
    body = has_fields(entry["body"], ("certificate", "run", "state"), "the body of the log entry")
    if body["certificate"] != hashlib.sha256(payload).hexdigest():
        raise Refused("log", "the log entry is not of this certificate")
    predicate = statement["predicate"]
    done = ("completed", "completed", predicate["request"]["id"])
    if (entry["kind"], body["state"], entry["request"]) != done:
        raise Refused("log", "the log entry is not the completion of this certificate's request")
    dataset = predicate["dataset"]
    if anchor["kind"] not in ("registered", "switched") or anchor["request"] or anchor["index"] != dataset["anchor"]:
        raise Refused("log", "the set before is not anchored where the certificate says")
    anchored = has_fields(anchor["body"], ("model", "version", "digest", "set"), "the body of the anchor")
    if _set(anchored["set"]) != _set(dataset["before"]) or anchored["model"] != statement["subject"][0]["name"]:
        raise Refused("log", "the set that was anchored is not the set before, or of another model")
    if anchored["digest"] != predicate["modelBefore"]["digest"]["sha256"]:
        raise Refused("log", "the model before is not the one that was anchored")
    if anchor["index"] >= entry["index"]:
        raise Refused("log", "the set before was anchored only after the request was completed")
    released = _check_release(bundle["release"], statement, checkpoint, anchor["index"], entry["index"])
    where = f"entry {entry['index']} of {checkpoint.size} in the log {checkpoint.origin}"
    return Outcome("log", True, f"{where}; the set before stands there as entry {anchor['index']}{released}")


def _check_release(part: object, statement: dict[str, Any], checkpoint: Checkpoint, after: int, before: int) -> str:
    """That the log says, between these entries, that the model was served and what it stands on; where, in words."""
    subject, predicate = statement["subject"][0], statement["predicate"]
    dataset, digest = predicate["dataset"], subject["digest"]["sha256"]
    unchanged = digest == predicate["modelBefore"]["digest"]["sha256"] and _set(dataset["before"]) == _set(
        dataset["after"]
    )
    if part is None and unchanged:
        return ", and nothing was changed"
    if part is None or unchanged:
        raise Refused("log", "the release of the model is missing, or is of a model that was not changed")
    entry = _proved(part, checkpoint)
    body = has_fields(entry["body"], ("model", "version", "digest", "set"), "the body of the release")
    if entry["kind"] != "switched" or entry["request"] or not after < entry["index"] < before:
        raise Refused("log", "the log does not say that the model was served before the request was completed")
    if (body["model"], body["digest"], _set(body["set"])) != (subject["name"], digest, _set(dataset["after"])):
        raise Refused("log", "the model that was served, or what it stands on, is not what is certified")
    return f", the model's release as entry {entry['index']}"


def _proved(part: object, checkpoint: Checkpoint) -> dict[str, Any]:
    """The log entry in a part of the bundle, if its proof leads to the signed root."""
    fields = has_fields(part, ("entry", "inclusion"), "a log entry with its proof")
    entry = has_fields(fields["entry"], ("index", "kind", "request", "at", "body"), "the log entry")
    _whole(entry["index"], "the index of a log entry")
    proof = _hashes(fields["inclusion"], "the hashes of an inclusion proof")
    if not proves_inclusion(leaf_hash(canonical(entry)), entry["index"], checkpoint.size, proof, checkpoint.root):
        raise Refused("log", "the inclusion proof does not lead from the entry to the signed root")
    return entry


def check_removed(bundle: dict[str, Any], statement: dict[str, Any]) -> Outcome:
    """That the commitments of a bundle are those that its certificate names; Refused if not."""
    removed = has_fields(bundle["removed"], ("commitments",), "the removed set")
    members = _hashes(removed["commitments"], "the removed commitments")
    said = statement["predicate"]["removed"]
    if members != sorted(set(members)):
        raise Refused("removed set", "the removed commitments must be distinct and sorted")
    if (_whole(said["count"], "the count of the removed"), said["commitmentRoot"]) != (
        len(members),
        tree_root([leaf_hash(m) for m in members]).hex(),
    ):
        raise Refused("removed set", "the commitments do not give the root that the certificate names")
    return Outcome("removed set", True, f"{len(members):,} commitments give the root that the certificate names")


def check_difference(bundle: dict[str, Any], statement: dict[str, Any]) -> Outcome:
    """That the set after is the set before less the removed plus the new, and what training read; Refused if not."""
    said = statement["predicate"]["dataset"]
    proof = has_fields(bundle["difference"], ("removed", "removal", "added", "addition"), "the set difference")
    gone = _hashes(proof["removed"], "the commitments that the run removed")
    new = _hashes(proof["added"], "the commitments that the run added")
    mine = _hashes(bundle["removed"]["commitments"], "the removed commitments")
    if not set(mine) <= set(gone):
        raise Refused("set difference", "a record of this request is not among those that the run removed")
    if not set(gone).isdisjoint(new):  # else anybody could write a kept record into both lists
        raise Refused("set difference", "a record is said to be both removed and added")
    before, kept = _less(gone, proof["removal"], _set(said["before"]))
    after, also_kept = _less(new, proof["addition"], _set(said["after"]))
    if before != _set(said["before"]) or after != _set(said["after"]):
        raise Refused("set difference", "the proof does not start from the sets that the certificate names")
    if kept != also_kept:
        raise Refused("set difference", "the set before without the removed is not the set after without the added")
    what = f"{before[0]:,} records before, less {len(gone):,} removed, plus {len(new):,} new, are {after[0]:,} after"
    if said["rowsRead"] is None:
        return Outcome("set difference", True, f"{what}; what training read was NOT witnessed")
    if _set(said["rowsRead"]) != after:
        raise Refused("set difference", "the rows that training read are not the set after")
    return Outcome("set difference", True, f"{what}, and training read exactly those")


def _less(members: Sequence[bytes], proof: object, whole: Counted) -> tuple[Counted, Counted]:
    """The set and what it is without the members, as the proof has them; without members there must be no proof."""
    words = _list(proof, "a proof of the set difference")
    if members:
        return after_removal(members, words)
    if words:
        raise Refused("set difference", "there is a proof of nothing")
    return whole, whole


def _set(said: object) -> Counted:
    fields = has_fields(said, ("count", "root"), "a set of records")
    return _refuse_empty((_whole(fields["count"], "the count of a set"), from_hex(fields["root"], "the root of a set")))


def _open_questions(statement: dict[str, Any] | None, bundle: Any) -> tuple[str, ...]:
    if statement is None:
        return ("anything: its signature is not good, so that nothing in it can be relied on",)
    try:
        predicate = statement["predicate"]
        claim = predicate["claim"]
        lines = [f"more than its claim, {claim['level']}: {claim['caveat']}", *_ALWAYS_OPEN]
        lines += [
            f"stage {stage['name']}: {stage['why']}" for stage in predicate["stages"] if stage["outcome"] != "passed"
        ]
        if predicate["dataset"]["rowsRead"] is None:
            lines.append("what rows training read: nobody watched it")
        if statement["subject"][0]["digest"]["sha256"] == predicate["modelBefore"]["digest"]["sha256"]:
            lines.append("that anything was unlearned: the model is the same as before, bit for bit")
        if bundle["difference"]["added"]:
            lines.append("that the records that the run added are not the removed ones under new commitments")
        return (*lines, *(f"anything about {place}" for place in predicate["outside"]))
    except _ODD:
        return ("anything: it is not of the form that this checker knows",)


def check_keys(data: bytes, commitments: Iterable[str], owner: str, rows: Sequence[str]) -> Outcome:
    """That each of the owner's rows (SHA-256 of its content) opens one of the removed commitments, under its key."""
    try:
        keys = has_fields(parse(data), ("format", "keys"), "the keys")
        if keys["format"] != KEYS_FORMAT:
            raise Refused("keys", f"this checker reads {KEYS_FORMAT}, got {keys['format']!r}")
        removed = set(commitments)
        left = {name: from_hex(key, "a record key") for name, key in keys["keys"].items() if name in removed}
        if not rows:
            raise Refused("keys", "no row was given, so nothing is opened")
        for row in rows:
            name = next((n for n, key in left.items() if commitment(key, owner, row).hex() == n), None)
            if name is None:
                raise Refused("keys", f"row {row[:16]}... of this owner opens none of the removed commitments")
            del left[name]
    except Refused as error:
        return Outcome("keys", False, error.why)
    except AttributeError as error:
        return Outcome("keys", False, f"a part is missing or of another kind ({error!r})")
    opened = f"{len(rows):,} of the {len(removed):,} removed commitments were opened, each by a row of its own"
    rest = "" if len(rows) == len(removed) else "; the others were not looked at"
    return Outcome("keys", True, opened + rest)


def check_consistency(data: bytes, keys: Sequence[Ed25519PublicKey]) -> Outcome:
    """That a later checkpoint's log begins with an earlier one's: no entry was changed, taken out or put between."""
    try:
        proof = has_fields(parse(data), ("format", "old", "new", "proof"), "the consistency proof")
        if proof["format"] != CONSISTENCY_FORMAT:
            raise Refused("consistency", f"this checker reads {CONSISTENCY_FORMAT}, got {proof['format']!r}")
        old, new = (open_note(_text(proof[name], "a checkpoint"), keys) for name in ("old", "new"))
        hashes = _hashes(proof["proof"], "the hashes of the consistency proof")
        if old.origin != new.origin:
            raise Refused("consistency", f"the checkpoints are of two logs, {old.origin} and {new.origin}")
        if not proves_consistency(old.size, new.size, old.root, new.root, hashes):
            raise Refused("consistency", f"the log of {new.size} entries does not begin with that of {old.size}")
    except Refused as error:
        return Outcome(error.check, False, error.why)
    return Outcome("consistency", True, f"the first {old.size} of {new.size} entries are the same")


def read_public_key(path: str | Path) -> Ed25519PublicKey:
    """Read a public key from a PEM file.

    Raises:
        Refused: if the file is missing or holds anything else.
    """
    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise Refused("key", f"{path} cannot be read as a public key ({error})") from None
    if not isinstance(key, Ed25519PublicKey):
        raise Refused("key", f"{path} must hold an Ed25519 public key, got {type(key).__name__}")
    return key


def _say(said: object) -> None:
    """Print, spelling out what the terminal cannot show rather than failing there."""
    encoding = sys.stdout.encoding or "ascii"
    print(str(said).encode(encoding, "backslashreplace").decode(encoding))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    words = argparse.ArgumentParser(description="Check a deletion certificate offline.")
    words.add_argument("bundle", nargs="?", help="the bundle to check")
    words.add_argument("--key", action="append", required=True, help="a trusted public key (PEM); may be repeated")
    words.add_argument("--keys", help="the owner's record keys, to open the commitments")
    words.add_argument("--owner", help="with --keys: the owner's name")
    words.add_argument("--row", action="append", default=[], help="with --keys: SHA-256 of a row; may be repeated")
    words.add_argument("--consistency", help="a consistency proof between two checkpoints")
    asked = words.parse_args(arguments)
    if (asked.bundle is None) == (asked.consistency is None):
        words.error("give a bundle, or --consistency with a proof")
    if len({asked.keys is None, asked.owner is None, not asked.row}) > 1:
        words.error("--keys, --owner and at least one --row go together")
    if asked.keys is not None and asked.consistency is not None:
        words.error("--keys opens the commitments of a bundle, and a consistency proof has none")
    if not all(len(row) == 64 and set(row) <= set("0123456789abcdef") for row in asked.row):
        words.error("--row takes a SHA-256 as 64 lower-case hexadecimal digits")
    try:
        trusted = [read_public_key(path) for path in asked.key]
        if asked.consistency is not None:
            outcome = check_consistency(Path(asked.consistency).read_bytes(), trusted)
            _say(outcome)
            return 0 if outcome.passed else 1
        data = Path(asked.bundle).read_bytes()
        opened = None if asked.keys is None else Path(asked.keys).read_bytes()
    except (OSError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    checked = check_bundle(data, trusted)
    if opened is not None and checked.passed:
        removed = parse(data)["removed"]["commitments"]
        extra = check_keys(opened, removed, asked.owner, asked.row)
        checked = Checked((*checked.outcomes, extra), checked.statement, checked.not_proved)
    _say(checked)
    return 0 if checked.passed else 1


if __name__ == "__main__":
    sys.exit(main())
