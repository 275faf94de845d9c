"""The keys of a workspace: one that signs, one that makes pseudonyms. Readable by their owner alone."""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from expunge.core.coins import generator
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.store import write_atomically
from expunge.ledger import check

_SIGNING, _PEPPER, _PUBLIC = "signing.pem", "pseudonyms.key", "expunge.pub"


@dataclass(frozen=True)
class Keys:
    """What signs certificates and checkpoints, and what names people and records without naming them.

    Attributes:
        signing: signs; its public half is what owners are given.
        pepper: 32 bytes from which pseudonyms are made. Who holds it can tell whether a guessed name is behind a
            pseudonym; who does not cannot.
        retired: public keys that signed before; still trusted for what they signed.
    """

    signing: Ed25519PrivateKey
    pepper: bytes
    retired: tuple[Ed25519PublicKey, ...] = ()

    @classmethod
    def generate(cls) -> Keys:
        """New keys from the system's cryptographic generator."""
        return cls(Ed25519PrivateKey.generate(), secrets.token_bytes(32))

    @classmethod
    def load(cls, folder: str | Path) -> Keys:
        """Read what `save` wrote.

        Raises:
            UnreadableFile: if a key is missing, damaged, or readable by others than its owner.
        """
        folder = Path(folder)
        for name in (_SIGNING, _PEPPER):
            path = folder / name
            if not path.is_file():
                raise UnreadableFile(
                    f"{path} is missing; without it nothing can be signed: restore it from your backup"
                )
            if path.stat().st_mode & 0o077:
                raise UnreadableFile(f"{path} can be read by others; run: chmod 600 {path}")
        try:
            signing = load_pem_private_key((folder / _SIGNING).read_bytes(), password=None)
        except ValueError as error:
            raise UnreadableFile(f"{folder / _SIGNING} holds no private key ({error}); restore it") from None
        pepper = (folder / _PEPPER).read_bytes()
        if not isinstance(signing, Ed25519PrivateKey) or len(pepper) != 32:
            raise UnreadableFile(f"{folder} must hold an Ed25519 key and 32 bytes for pseudonyms; restore it")
        retired = tuple(check.read_public_key(path) for path in sorted(folder.glob("retired-*.pub")))
        keys = cls(signing, pepper, retired)
        public = folder / _PUBLIC
        if not public.exists() or public.read_bytes() != keys.public_pem():  # a rotation did not get to its end
            write_atomically(public, keys.public_pem())
        return keys

    def save(self, folder: str | Path) -> None:
        """Write the keys into a folder of mode 0700, files of mode 0600, and the public key beside them.

        Raises:
            Misuse: if there are keys already: replacing them would make all that they signed worthless.
        """
        folder = Path(folder)
        if (folder / _SIGNING).exists():
            raise Misuse(f"{folder} holds keys already; keys are made once, use `rotate` for a new signing key")
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        _write_secret(folder / _PEPPER, self.pepper)
        self._save_signing(folder)

    def _save_signing(self, folder: Path) -> None:
        for number, key in enumerate(self.retired):
            write_atomically(folder / f"retired-{number:03d}.pub", _pem(key))
        private = self.signing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_secret(folder / _SIGNING, private)
        write_atomically(folder / _PUBLIC, self.public_pem())

    def rotate(self, folder: str | Path) -> Keys:
        """A new signing key, saved in the stead of the old one, which stays trusted for what it signed."""
        new = Keys(Ed25519PrivateKey.generate(), self.pepper, (*self.retired, self.signing.public_key()))
        new._save_signing(Path(folder))
        return new

    @property
    def trusted(self) -> list[Ed25519PublicKey]:
        """All public keys whose signatures count, the present one first."""
        return [self.signing.public_key(), *self.retired]

    def public_pem(self) -> bytes:
        """The public key as a PEM file, to be handed to owners by a way of its own."""
        return _pem(self.signing.public_key())

    def pseudonym(self, name: str) -> str:
        """32 hexadecimal digits that stand for a record's or a person's name, the same each time."""
        return hmac.digest(self.pepper, b"name\0" + name.encode("utf-8"), "sha256").hex()[:32]

    def coins(self, *names: str) -> torch.Generator:
        """Coins that only who holds these keys can throw again: what they decide cannot be undone by a reader."""
        data = b"coins\0" + check.canonical(list(names))
        return generator(int.from_bytes(hmac.digest(self.pepper, data, "sha256")[:8], "big") >> 1)

    def mac(self, data: bytes) -> str:
        """A digest of a request's body or key, of no use to who does not hold these keys."""
        return hmac.digest(self.pepper, b"body\0" + data, "sha256").hex()

    def sign_statement(self, payload: bytes) -> dict[str, Any]:
        """The DSSE envelope of a payload. Signing the same bytes again gives the same envelope."""
        signature = self.signing.sign(check.pae(payload))
        return {
            "payload": _base64(payload),
            "payloadType": check.PAYLOAD_TYPE,
            "signatures": [{"keyid": check.key_id(self.signing.public_key()), "sig": _base64(signature)}],
        }

    def sign_checkpoint(self, checkpoint: check.Checkpoint) -> str:
        """The signed note of a checkpoint."""
        text = checkpoint.text()
        key_hash = check.note_key_hash(checkpoint.origin, self.signing.public_key())
        signature = key_hash + self.signing.sign(text.encode("utf-8"))
        return f"{text}\n\u2014 {checkpoint.origin} {_base64(signature)}\n"


def record_keys() -> Iterator[bytes]:
    """32 fresh random bytes, again and again."""
    while True:
        yield secrets.token_bytes(32)


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _write_secret(path: Path, data: bytes) -> None:
    """Write a file that at no time anybody else can read."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
