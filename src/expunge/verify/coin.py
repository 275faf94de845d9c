"""The public coin: every random choice of a training follows from what was committed to, and a nonce drawn after.

For exact methods only. What this excludes, and what it does not, is stated and proved in ``docs/verify.md``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from expunge.core.coins import seed_of
from expunge.core.digest import canonical_json, sha256_hex
from expunge.core.errors import Corrupt, Misuse, NotNow
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.store import write_atomically
from expunge.ledger.check import Refused, after_removal
from expunge.ledger.recordset import RecordSet
from expunge.verify.rows import numbered, root_of, row_commitments, salt_bytes

_FORMAT = "expunge-coins/1"


@dataclass(frozen=True, kw_only=True)
class Commitments:
    """What a provider is bound to before it learns the nonce: all rows, those to forget, and those that stay.

    Roots are ``count:hash``. Discloses nothing of a row to who has not the salt. Anchor `digest()` where it cannot be
    taken back before a nonce is drawn.

    Attributes:
        salt: keys the rows' commitments, in hexadecimal digits; known to the provider and its auditor.
        data: root of all rows.
        forget: root of the rows to forget; of none, when a training set is anchored for the first time.
        retained: root of the rows that stay.
        members: the forgotten rows' members of the set `data`, sorted, in hexadecimal digits.
        proof: that `data` without `members` is `retained`.
        contract: digest of the recipe agreed on, seed and salt left out; it is fixed before the nonce too.
    """

    salt: str
    data: str
    forget: str
    retained: str
    members: tuple[str, ...]
    proof: tuple[str, ...]
    contract: str

    def __post_init__(self) -> None:
        salt_bytes(self.salt)
        try:
            members = [bytes.fromhex(member) for member in self.members]
            before, after = after_removal(members, self.proof)
        except (Refused, ValueError) as error:
            raise Misuse(f"the set-difference proof does not hold ({error}); commit to the rows anew") from None
        said = (_text(before), _text(after), root_of(members))
        if said != (self.data, self.retained, self.forget):
            raise Misuse("the set-difference proof is of other sets than are committed to; commit to the rows anew")

    def digest(self) -> str:
        """SHA-256 over all of them: what is anchored."""
        return sha256_hex(canonical_json({"v": "expunge-commitments/1", **asdict(self)}))


def commit(recipe: Recipe, records: Records, forget: Records | None = None, *, salt: str | None = None) -> Commitments:
    """Commit to a recipe, to all rows before a removal, and to those of them that are forgotten.

    Args:
        recipe: what will be trained; its seed, and the salt of its shards, are left to the coin.
        records: all rows, the forgotten ones among them.
        forget: what goes; matched by owner and content, with multiplicities. None: nothing, for a first training.
        salt: at least 32 hexadecimal digits; fresh and random if None.

    Raises:
        Misuse: if a row to forget is not among the records.

    Cost: about 20 microseconds a row.
    """
    salt = secrets.token_hex(16) if salt is None else salt
    names = row_commitments(records, salt)
    gone = [] if forget is None else row_commitments(forget, salt)
    held = Counter(names)
    whole = RecordSet(numbered(names))
    members = sorted(numbered(gone, held))
    return Commitments(
        salt=salt,
        data=_text((whole.root().count, whole.root().root)),
        forget=root_of(members),
        retained=root_of(numbered((held - Counter(gone)).elements())),
        members=tuple(member.hex() for member in members),
        proof=tuple(whole.removal(members)),
        contract=_without_coins(recipe.completed(records)),
    )


@dataclass(frozen=True, kw_only=True)
class Coin:
    """A nonce that was drawn after the commitments, and all that follows from both.

    Attributes:
        commitments: what was committed to.
        nonce: at least 16 bytes in hexadecimal digits, from an auditor or a beacon; never from the provider.
        tries: how many nonces were asked for until this one, this one included. What counts is the registry's count.
    """

    commitments: Commitments
    nonce: str
    tries: int = 1

    def __post_init__(self) -> None:
        salt_bytes(self.nonce)
        if self.tries < 1:
            raise Misuse(f"tries are counted from 1, got {self.tries}")

    @property
    def seed(self) -> int:
        """The recipe's seed: 63 bits of SHA-256 over the commitments' digest and the nonce."""
        return int.from_bytes(self._bytes("seed")[:8], "little") >> 1

    @property
    def salt(self) -> str:
        """What the shards of a sharded recipe are drawn with."""
        return self._bytes("shards").hex()[:32]

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with every coin drawn from here: its seed, and the salt of its shards if it has any."""
        sharding = None if recipe.sharding is None else replace(recipe.sharding, salt=self.salt)
        return replace(recipe, seed=self.seed, sharding=sharding)

    def agrees(self, recipe: Recipe) -> bool:
        """True if the recipe, but for its coins, is the one that was committed to."""
        return _without_coins(recipe) == self.commitments.contract

    def to_json(self) -> dict[str, str]:
        """What a transcript says of its coin."""
        return {"commitments": self.commitments.digest(), "nonce": self.nonce}

    def _bytes(self, what: str) -> bytes:
        fixed = ["expunge-coin/1", what, self.commitments.digest()]
        return hashlib.sha256(canonical_json(fixed) + bytes.fromhex(self.nonce)).digest()


class CoinRegistry:
    """An auditor's file of who committed to what, and which nonce each got; shared by processes under a lock.

    Keep it where the provider cannot write. A nonce is given once; commitments come before it; every draw is counted.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or begin the file; Corrupt if it is not as it was written."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._read()

    def anchor(self, commitments: Commitments, subject: str) -> None:
        """Take in commitments for a subject: whatever names what is answered, such as the request's id.

        The same commitments twice is no error. The subject is what tries are counted by, since a provider can
        commit to the same rows under a fresh salt as often as it likes.
        """
        with self._open() as entries:
            one = {"kind": "anchored", "subject": subject, "commitments": commitments.digest()}
            if one not in entries:
                entries.append(one)

    def draw(self, commitments: Commitments, subject: str, *, nonce: str | None = None) -> Coin:
        """A nonce for anchored commitments, and its coin.

        Args:
            commitments: anchored for this subject.
            subject: as when they were anchored.
            nonce: of an external beacon, published after the anchoring, which the caller vouches for; None draws one.

        Raises:
            NotNow: if the commitments were not anchored before.
            Misuse: for a nonce that was given out already.
        """
        nonce = secrets.token_hex(32) if nonce is None else nonce
        salt_bytes(nonce)
        with self._open() as entries:
            digest = commitments.digest()
            if {"kind": "anchored", "subject": subject, "commitments": digest} not in entries:
                raise NotNow(f'these commitments were not anchored for "{subject}"; anchor them before asking a nonce')
            if any(one.get("nonce") == nonce for one in entries):
                raise Misuse("this nonce was given out already and serves once; take a fresh one")
            entries.append({"kind": "drawn", "subject": subject, "commitments": digest, "nonce": nonce})
            return Coin(commitments=commitments, nonce=nonce, tries=_drawn(entries, subject))

    def tries(self, subject: str) -> int:
        """How many nonces were asked for this subject, whatever was committed to."""
        return _drawn(self._read(), subject)

    def spend(self, coin: Coin, transcript: str) -> int:
        """Accept one transcript (by its commitment) for a coin; how many nonces its subject had asked for by then.

        Accepting the same transcript again is no error. The coin of a sharded model serves all its shards and their
        later trainings, and is not spent.

        Raises:
            NotNow: for a coin that this registry never gave, that is not its subject's last, or that another
                transcript was accepted for.
        """
        with self._open() as entries:
            told = coin.to_json()
            mine = [one for one in entries if one["kind"] == "drawn" and one["nonce"] == told["nonce"]]
            if not mine or mine[0]["commitments"] != told["commitments"]:
                raise NotNow("this coin was not drawn from this registry; draw one for the anchored commitments")
            subject = mine[0]["subject"]
            if [one for one in entries if one["kind"] == "drawn" and one["subject"] == subject][-1] != mine[0]:
                raise NotNow(f'a later nonce was asked for "{subject}"; only the last one counts')
            spent = {"kind": "spent", "nonce": told["nonce"], "transcript": transcript}
            if any(one["kind"] == "spent" and one["nonce"] == told["nonce"] and one != spent for one in entries):
                raise NotNow("another transcript was accepted for this coin, which serves once; draw a fresh one")
            if spent not in entries:
                entries.append(spent)
            return _drawn(entries, subject)

    @contextmanager
    def _open(self) -> Iterator[list[dict[str, str]]]:
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self._read()
            known = len(entries)
            yield entries
            if len(entries) > known:
                write_atomically(self.path, canonical_json({"format": _FORMAT, "entries": entries}))

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            data: Any = json.loads(self.path.read_bytes())
            entries = data["entries"]
            fine = data["format"] == _FORMAT and isinstance(entries, list)
            fine = fine and all(set(one) == _FIELDS[one["kind"]] for one in entries)
        except (ValueError, KeyError, TypeError, RecursionError):
            fine = False
        if not fine:
            raise Corrupt(f"{self.path} is no registry of coins, or not as it was written; restore it")
        found: list[dict[str, str]] = entries
        return found


_FIELDS = {
    "anchored": {"kind", "subject", "commitments"},
    "drawn": {"kind", "subject", "commitments", "nonce"},
    "spent": {"kind", "nonce", "transcript"},
}


def still_anchored(coin: Coin, records: Records, forget: Records | None) -> bool:
    """True if the rows that stay and those that were forgotten since are together what was anchored before the coin.

    What must hold of a sharded model, whose one coin serves all later removals: no row may have come in since.
    """
    salt = coin.commitments.salt
    names = row_commitments(records, salt) + ([] if forget is None else row_commitments(forget, salt))
    return root_of(numbered(names)) == coin.commitments.data


def advantage(chance: float, tries: int) -> float:
    """Chance that one of `tries` nonces gives what an honest draw gives with this chance: 1 - (1 - p)^k."""
    if not 0 <= chance <= 1 or tries < 1:
        raise Misuse(f"need a chance between 0 and 1 and tries >= 1, got {chance} and {tries}")
    return float(1 - (1 - chance) ** tries)


def _drawn(entries: list[dict[str, str]], subject: str) -> int:
    return sum(one["kind"] == "drawn" and one["subject"] == subject for one in entries)


def _text(counted: tuple[int, bytes]) -> str:
    return f"{counted[0]}:{counted[1].hex()}"


def _without_coins(recipe: Recipe) -> str:
    sharding = None if recipe.sharding is None else replace(recipe.sharding, salt="")
    return replace(recipe, seed=seed_of("public coin"), sharding=sharding).digest()
