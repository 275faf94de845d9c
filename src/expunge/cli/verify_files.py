"""What verifiers keep in files: coins, commitments and trigger keys, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.records import Records
from expunge.core.store import write_atomically
from expunge.verify import Coin, Columns, Commitments, Pixels, TriggerKey


def write_json(path: Path, value: Any, *, secret: bool = False) -> None:
    """Write a new file; what is secret is for its owner's eyes only. Misuse if the file is there already."""
    if path.exists():
        raise Misuse(f"{path} is there already; name a new file, or remove it first")
    data = json.dumps(value, indent=1, allow_nan=False).encode()
    if not secret:
        write_atomically(path, data)
        return
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def read_json(path: Path, what: str) -> Any:
    """The value in a file. Raises UnreadableFile if it holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UnreadableFile(f"{path} cannot be read as JSON; give the file of {what}") from None


def read_commitments(path: Path) -> Commitments:
    """The commitments that `expunge verify commit` wrote."""
    return _commitments(read_json(path, "commitments that expunge verify commit wrote"), path)


def coin_json(coin: Coin) -> dict[str, Any]:
    """All of a coin as plain JSON values."""
    return {"commitments": asdict(coin.commitments), "nonce": coin.nonce, "tries": coin.tries}


def read_coin(path: Path) -> Coin:
    """The coin that `expunge verify draw` wrote."""
    data = read_json(path, "a coin that expunge verify draw wrote")
    if not isinstance(data, dict) or set(data) != {"commitments", "nonce", "tries"} or type(data["tries"]) is not int:
        raise UnreadableFile(f"{path} holds no coin; give the file that expunge verify draw wrote")
    return Coin(commitments=_commitments(data["commitments"], path), nonce=data["nonce"], tries=data["tries"])


def _commitments(data: Any, path: Path) -> Commitments:
    lists = ("members", "proof")
    fine = isinstance(data, Mapping) and set(data) == {field.name for field in fields(Commitments)}
    if not fine or not all(_texts(data[name]) if name in lists else isinstance(data[name], str) for name in data):
        raise UnreadableFile(f"{path} holds no commitments; give the file that expunge verify wrote")
    given: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in data.items()}
    return Commitments(**given)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def read_keys(paths: Sequence[Path]) -> tuple[TriggerKey, ...]:
    """Owners' trigger keys, one in a file."""
    found = []
    for path in paths:
        data = read_json(path, "the key that expunge verify plant wrote")
        if not isinstance(data, dict):
            raise UnreadableFile(f"{path} holds no trigger key; give the file that expunge verify plant wrote")
        found.append(TriggerKey.from_json(data))
    return tuple(found)


def family_of(rows: Records, places: int) -> Pixels | Columns:
    """What triggers look like on such rows: pixels on images, observed values on tables."""
    if len(rows.shape) == 1:
        return Columns.of(rows, count=places)
    return Pixels(shape=rows.shape, count=places, levels=17 if rows.x.is_floating_point() else 256)


def parts_in(folder: Path) -> dict[int, Path]:
    """The transcripts of shards in a folder, by shard; none if it is the transcript of one training.

    Raises:
        UnreadableFile: if anything else lies beside them.
    """
    if not any(folder.glob("part-*")):
        return {}
    found = {}
    for path in sorted(folder.iterdir()):
        number = path.name.removeprefix("part-")
        if not (number.isascii() and number.isdigit() and path.name == f"part-{int(number):04d}" and path.is_dir()):
            raise UnreadableFile(f"{folder} holds {path.name!r:.80}, which is no shard's transcript; take it out")
        found[int(number)] = path
    return found
