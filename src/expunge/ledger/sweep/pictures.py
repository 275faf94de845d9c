"""Look for removed pictures inside pictures, at any place and at whole-numbered enlargements."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from expunge.ledger.sweep.needles import Needles, Picture

Array = np.ndarray[Any, np.dtype[np.uint8]]

LARGEST = 1 << 26  # pixels
_ENLARGED = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20)
_FORMATS = ("PNG", "GIF", "TIFF", "JPEG", "BMP", "PPM", "WEBP", "ICO")
_LOSSY = frozenset({"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"})


class NotRead(Exception):
    """Bytes are no picture that can be read."""


def frames_of(data: bytes) -> tuple[bool, list[list[Array]]]:
    """Whether the format is lossy, and of each frame its planes of pixels, (height, width) uint8, without repeats.

    Raises:
        NotRead: if it is no picture, a broken one, or one of more than 67 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                frames = []
                count = getattr(image, "n_frames", 1)
                if image.width * image.height * count > LARGEST:
                    raise NotRead(f"a picture of {image.width} x {image.height} pixels and {count} frames")
                for frame in range(count):
                    image.seek(frame)
                    frames.append(_planes(image))
                return image.format in _LOSSY, frames
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, Image.DecompressionBombError) as error:
        raise NotRead("a picture that cannot be decoded") from error


def _planes(image: Image.Image) -> list[Array]:
    stored = np.asarray(image)
    found = [stored] if stored.dtype == np.bool_ else []
    if stored.dtype.kind in "iuf" and stored.dtype.itemsize > 1:
        found += [np.clip(stored, 0, 255), np.clip(stored // 256, 0, 255), np.clip(stored // 257, 0, 255)]
    elif stored.dtype == np.uint8:
        found += [stored]
    if image.mode not in ("L", "RGB", "RGBA", "LA") and not found[1:]:
        found += [np.asarray(image.convert("RGBA"))]
    planes: dict[bytes, Array] = {}
    for array in found:
        bytes_ = array.astype(np.uint8) * (255 if array.dtype == np.bool_ else 1)
        for plane in [bytes_] if bytes_.ndim == 2 else np.moveaxis(bytes_, 2, 0):
            whole = np.ascontiguousarray(plane)
            if whole.size and whole.min() != whole.max():
                planes.setdefault(whole.tobytes(), whole)
    return list(planes.values())


def shown_in(planes: list[Array], needles: Needles) -> Iterator[Picture]:
    """All removed pictures that stand in these planes. Cost: about one pass over the pixels for each enlargement."""
    seen: set[int] = set()
    for scale in _ENLARGED:
        thin = [_thinned(plane, scale) for plane in planes]
        for picture in _unenlarged(thin, needles):
            if id(picture) not in seen:
                seen.add(id(picture))
                yield picture


def _thinned(plane: Array, scale: int) -> Array:
    """(scale * scale, height, width): every scale-th pixel of every scale-th line, from each first one on."""
    height, width = (-(-size // scale) for size in plane.shape)
    padded = np.zeros((height * scale, width * scale), np.uint8)
    padded[: plane.shape[0], : plane.shape[1]] = plane
    split = padded.reshape(height, scale, width, scale).transpose(1, 3, 0, 2)
    return np.ascontiguousarray(split).reshape(scale * scale, height, width)


def _unenlarged(planes: list[Array], needles: Needles) -> Iterator[Picture]:
    for thin in planes:
        for place, picture in needles.in_lines(thin.tobytes()):
            which, inside = divmod(place, thin.shape[1] * thin.shape[2])
            y, x = divmod(inside, thin.shape[2])
            y -= picture.line
            _, height, width = picture.pixels.shape
            there = [one[which, y : y + height, x : x + width] for one in planes]
            if y >= 0 and all(any(np.array_equal(colour, one) for one in there) for colour in picture.pixels):
                yield picture
