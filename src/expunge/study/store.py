"""The folder of a study: what it is, and one line for every cell that is finished."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from expunge.core.digest import canonical_json, sha256_hex
from expunge.core.errors import Corrupt, Misuse, Overtaken
from expunge.core.store import write_atomically

Key = tuple[str | int | float, ...]
Line = dict[str, Any]
_FORMAT = "expunge-study/1"


class Cells:
    """Finished cells by their key, in memory and, if there is a folder, on disk."""

    def __init__(self, known: Mapping[Key, Line], file: BinaryIO | None = None) -> None:
        """Cells known so far, and the open file to append to."""
        self.known: dict[Key, Line] = dict(known)
        self._file = file

    def __contains__(self, key: object) -> bool:
        return key in self.known

    def __getitem__(self, key: Key) -> Line:
        return self.known[key]

    def add(self, key: Key, line: Line) -> None:
        """Keep a finished cell: when this returns, it is on the disk. A cell is kept once."""
        if key in self.known:
            raise Misuse(f"cell {list(key)} is finished already; each is worked out once")
        data = canonical_json({"key": list(key), **line}) + b"\n"
        if self._file is not None:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.known[key] = json.loads(data)


@contextmanager
def opened(folder: Path | None, about: Mapping[str, Any]) -> Iterator[Cells]:
    """The cells of the study in this folder, which is made if it is not there; without a folder, nothing is kept.

    Args:
        folder: new, empty, or this very study's.
        about: all that the study is; another study's folder is refused.

    Raises:
        Misuse: if the folder holds another study, or something else.
        Overtaken: if another process is at work in it.
        Corrupt: if a finished line cannot be read.
    """
    if folder is None:
        yield Cells({})
        return
    _claim(folder, about)
    with (folder / "cells.jsonl").open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Overtaken(f"another process is at work in {folder}; wait for it, or name another folder") from None
        yield Cells(_read(file, folder), file)


def read(folder: Path) -> tuple[dict[str, Any], dict[Key, Line]]:
    """What the study in this folder is, and its finished cells so far; nothing is changed or locked.

    Raises:
        Misuse: if there is no study.
        Corrupt: if it cannot be read.
    """
    if not (folder / "study.json").is_file():
        raise Misuse(f"there is no study in {folder}; make one with: expunge compare --folder {folder} ...")
    about = _about(folder / "study.json")
    cells = folder / "cells.jsonl"
    data = cells.read_bytes() if cells.exists() else b""
    return {name: one for name, one in about.items() if name not in ("format", "digest")}, _parsed(data, folder)


def _about(path: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        about["digest"], about["format"]  # must be there
    except (ValueError, TypeError, KeyError):
        raise Corrupt(f"{path} cannot be read; remove the folder to begin the study anew") from None
    return about


def _claim(folder: Path, about: Mapping[str, Any]) -> None:
    path, digest = folder / "study.json", sha256_hex(canonical_json(about))
    if folder.exists() and not folder.is_dir():
        raise Misuse(f"{folder} is a file; name a folder for the study")
    if not path.exists():
        if folder.exists() and any(not one.name.endswith(".part") for one in folder.iterdir()):
            raise Misuse(f"{folder} holds something other than a study; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write = {"format": _FORMAT, "digest": digest, **about}
        write_atomically(path, json.dumps(write, indent=1, allow_nan=False).encode("utf-8"))
        return
    before = _about(path)
    if (before["format"], before["digest"]) != (_FORMAT, digest):
        differ = ", ".join(_differences(before, dict(about))) or "its format"
        raise Misuse(
            f"{folder} holds another study, which differs in {differ}; give the same settings, or name a new folder"
        )


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Names of the settings that differ, without those above them."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [name]
    inner = [key for key in {**now, **before} if name or key not in ("format", "digest")]
    return [one for key in inner for one in _differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]


def _read(file: BinaryIO, folder: Path) -> dict[Key, Line]:
    """The finished cells; a last line that was torn while it was written is cut off, and its cell is done again."""
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return _parsed(data, folder)


def _parsed(data: bytes, folder: Path) -> dict[Key, Line]:
    found: dict[Key, Line] = {}
    for number, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(text)
            found[tuple(line["key"])] = line
        except (ValueError, TypeError, KeyError):
            where = f"line {number} of {folder / 'cells.jsonl'}"
            raise Corrupt(f"{where} cannot be read; remove that line, and its cell is done again") from None
    return found
