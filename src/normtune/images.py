"""Image files to RGB: found when the data is read, opened when a batch needs them.

Scope: where an image of a sample lies, and its pixels as 8-bit RGB the right way up, whatever mode the file has; what
is refused because nobody vouches for the file: names and links that lead out of the folder, formats off the list, more
pixels than a photograph has. Non-scope: resizing and normalization, which are the image processor's.
Source: Pillow's modes and EXIF rules.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps

from normtune.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened, by content and not by suffix: each further decoder of Pillow is one more that a file can attack."""
MAX_PIXELS = 2**26  # 8192 x 8192: every camera's usual picture; in any mode less than 800 MB while it is decoded
MAX_RATIO = 200  # of the sides: scaled to a side of 336, as processors do before they crop, 67,200 x 336 pixels
MAX_BYTES = 2**29
MAX_TILE = 2**24  # pixels of a tile in a TIFF that is smaller than that
MAX_SCANS = 100  # of a progressive JPEG
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)  # of a JPEG, followed by its length; and the end
_FILTERS = threading.Lock()  # those of warnings are the whole process's
STRIP = 2**20  # pixels that are computed on at a time where a copy of all of them would be large


class ImageSource(Protocol):
    """A `Path`, or an image that lies within another file: `open("rb")` gives its bytes, `str()` its name."""

    def open(self, mode: str, /) -> Any: ...


def image_names(item: dict[str, Any], where: str) -> list[str]:
    """The names under a sample's `image` or `images`, a string or a list; null, "" and [] mean none."""
    single, several = item.get("image") or [], item.get("images") or []
    if single and several and single != several:
        raise InputError(f"{where}: it has both `image` and `images`")
    names = single or several
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{where}: `image` or `images` must be a file name or a list of them")
    return names


def find_image(folder: Path | None, name: str, where: str) -> Path:
    """The file that `name` means below `folder`. InputError, beginning with `where`, if it is none or lies outside."""
    if folder is None:
        raise InputError(f"{where}: it has an image, but the data source names no folder: give it `images: FOLDER`")
    if "://" in name or name.startswith("data:"):
        raise InputError(f"{where}: image {_short(name)} is no file: download it, images are read from a folder")
    try:
        name.encode()
    except UnicodeEncodeError:  # a message, a report and a log could not say it
        raise InputError(f"{where}: image {_short(name)} is no text: half of a surrogate pair") from None
    inside = os.path.normpath(name)
    if not name or "\0" in name or os.path.isabs(name) or inside.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{where}: image {_short(name)} leads out of the images folder {folder}.\n"
            "Give names relative to the folder that `images` names."
        )
    path = folder / inside
    try:
        mode = os.lstat(path).st_mode
        linked = stat.S_ISLNK(mode)
        there = path.is_file() if linked else stat.S_ISREG(mode)  # no pipe, no device: reading them may never end
    except (OSError, ValueError):  # a name that is too long is no file's
        there = linked = False
    if there and not _holds(os.getcwd(), str(folder), inside if linked else os.path.dirname(inside)):
        raise InputError(
            f"{where}: image {_short(name)} is behind a link that leads out of the images folder {folder}.\n"
            "Copy the files there, or give them a data source with `images: FOLDER` of its own."
        )
    if not there:
        raise InputError(f"{where}: there is no image {path}.\nCheck `images`, the folder that names are relative to.")
    return path


@lru_cache(maxsize=4096)
def _holds(current: str, folder: str, inside: str) -> bool:
    """Whether `folder`/`inside` is within `folder` when all links are followed; once for all files of a folder.
    `current` is the current directory, which both are relative to."""
    root = os.path.realpath(os.path.join(current, folder))
    return os.path.commonpath([root, os.path.realpath(os.path.join(root, inside))]) == root


def open_image(source: ImageSource, where: str, limit: int = MAX_PIXELS) -> Image.Image:
    """The image in mode RGB, turned as its EXIF data says; of several frames the first.

    Transparent pixels are laid on white; 16-bit and wider greys are scaled to 8 bits, floating-point ones from 0..1
    if they lie there. InputError, beginning with `where`, for a file that is missing, broken, none of FORMATS, larger
    than MAX_BYTES, longer than MAX_RATIO times its width (or wider), or of more than `limit`, MAX_PIXELS or twice
    Pillow's `MAX_IMAGE_PIXELS` pixels; sizes are told from its header, before memory is taken for them.
    """
    with opened(source, where, limit) as file:
        return to_rgb(upright(file))


def look_at(source: ImageSource, where: str) -> tuple[tuple[int, int], int]:
    """(width, height) as `open_image` gives it, and the number of frames; decodes the first. Raises as `open_image`."""
    with opened(source, where) as file:
        size, frames = upright(file).size, 1
        if file.format != "MPO":  # the other pictures in a phone's JPEG are previews and maps
            with contextlib.suppress(Exception):  # broken further on, which takes nothing from the first
                frames = getattr(file, "n_frames", 1)
        return size, frames


@contextlib.contextmanager
def opened(source: ImageSource, where: str, limit: int = MAX_PIXELS) -> Iterator[Any]:
    """The file as Pillow opens it, of at most `limit` pixels; nothing is decoded yet. InputError for what is wrong with
    it, and for whatever decoding it raises within."""
    limit = min(limit, MAX_PIXELS, 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS))
    too_large = InputError(f"{where}: image {source} has more than {limit:,} pixels; scale it down")
    try:
        with source.open("rb") as stream, _header(stream, limit) as file:
            if file.width * file.height > limit:
                raise too_large
            _check_cost(stream, file)
            if max(file.size) > MAX_RATIO * min(file.size):
                raise ValueError(f"{file.width:,} x {file.height:,} pixels are a line, not a picture")
            yield file
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{where}: there is no image {source}") from error
    except Image.DecompressionBombError as error:
        raise too_large from error
    except Exception as error:  # Pillow's decoders let through whatever a broken file makes them stumble over
        known = f"it is no image that Pillow knows as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        reason = known if isinstance(error, Image.UnidentifiedImageError) else str(error).partition("\n")[0]
        raise InputError(f"{where}: image {source} cannot be read: {reason or type(error).__name__}") from error


def _header(stream: BinaryIO, limit: int) -> Any:
    """The file as Pillow opens it, its pixels not decoded yet."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size > MAX_BYTES:
        raise ValueError(f"its file is larger than {MAX_BYTES:,} bytes")
    start = stream.read(30)
    stream.seek(0)
    if start[8:16] == b"WEBPVP8X":  # Pillow takes memory for the whole canvas when it opens such a file
        width, height = (1 + int.from_bytes(start[place : place + 3], "little") for place in (24, 27))
        if width * height > limit:
            raise Image.DecompressionBombError
    with _FILTERS, warnings.catch_warnings():  # what is large our own limit refuses
        warnings.simplefilter("ignore")
        return Image.open(stream, formats=FORMATS)


def _check_cost(stream: BinaryIO, file: Any) -> None:
    """ValueError for what takes a decoder more than its pixels do: tiles far larger than the image, which are decoded
    whole, and a JPEG of scan upon scan, each of which goes through all of it."""
    if file.format == "TIFF":
        width, height = (int(file.tag_v2.get(tag, 0)) for tag in (322, 323))
        if width * height > max(MAX_TILE, 2 * file.width * file.height):
            raise ValueError(f"its tiles of {width:,} x {height:,} pixels are larger than a tile needs to be")
    elif file.info.get("progressive"):
        place = stream.tell()
        stream.seek(0)
        too_many = _scans(stream.read()) > MAX_SCANS
        stream.seek(place)
        if too_many:
            raise ValueError(f"it has more than {MAX_SCANS} scans; an encoder writes ten or so")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has up to its end; one more than MAX_SCANS stands for any larger number."""
    place, scans = 2, 0
    while scans <= MAX_SCANS and (found := _MARKER.search(data, place)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2])  # its header; then compressed data
    return scans


def upright(image: Image.Image) -> Image.Image:
    """The image decoded, turned as its EXIF data says."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # broken EXIF data: the pixels are good all the same, as every viewer shows them
        return image
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in mode RGB, as `open_image` does it."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey(np.asarray(image)))
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part), (0, top))
    return flat


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Greys wider than 8 bits, [h, w], as uint8. The scale follows the range that the values occupy: 8 or 16 bits,
    more than that by their largest value, 0..1 for floating point."""
    parts = np.array_split(pixels, 1 + pixels.size // STRIP)
    top = max(float(_finite(part).max(initial=0.0)) for part in parts)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        scale = 255 / 65535
    elif top <= 1.0 and np.issubdtype(pixels.dtype, np.floating):
        scale = 255.0
    elif top <= 255:
        scale = 1.0
    else:
        scale = 255 / max(top, 65535.0)
    return np.concatenate([np.clip(np.rint(_finite(part) * scale), 0, 255).astype(np.uint8) for part in parts])


def _finite(pixels: np.ndarray) -> np.ndarray:
    return np.nan_to_num(pixels.astype(np.float64))


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
