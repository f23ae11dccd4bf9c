"""Image files to RGB: found when the data is read, opened when a batch needs them.

Scope: where an image of a sample lies, and its pixels as 8-bit RGB the right way up, whatever mode the file has.
Non-scope: resizing and normalization, which are the image processor's. Source: Pillow's modes and EXIF rules.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from normtune.errors import InputError


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
    inside = os.path.normpath(name)
    if not name or "\0" in name or os.path.isabs(name) or inside.split(os.sep)[0] == os.pardir:
        raise InputError(
            f"{where}: image {_short(name)} leads out of the images folder {folder}.\n"
            "Give names relative to the folder that `images` names."
        )
    path = folder / inside
    if not path.is_file():
        raise InputError(f"{where}: there is no image {path}.\nCheck `images`, the folder that names are relative to.")
    return path


def open_image(path: Path, where: str) -> Image.Image:
    """The image at `path` in mode RGB, turned as its EXIF data says; of several frames the first.

    Transparent pixels are laid on white; 16-bit and wider greys are scaled to 8 bits, floating-point ones from 0..1
    if they lie there. InputError, beginning with `where`, for a file that is missing, broken or no image, or larger
    than twice Pillow's `MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(path) as file:
            return to_rgb(_upright(file))
    except FileNotFoundError as error:
        raise InputError(f"{where}: there is no image {path}") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{where}: image {path} has more than {limit:,} pixels; scale it down") from error
    except Exception as error:  # Pillow's decoders let through whatever a broken file makes them stumble over
        reason = "it is no image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise InputError(f"{where}: image {path} cannot be read: {reason or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data: the pixels are good all the same, as every viewer shows them
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in mode RGB, as `open_image` does it."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Greys wider than 8 bits, [h, w], as uint8. The scale follows the range that the values occupy: 8 or 16 bits,
    more than that by their largest value, 0..1 for floating point."""
    values = np.nan_to_num(pixels.astype(np.float64))
    top = float(values.max(initial=0.0))
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        scale = 255 / 65535
    elif top <= 1.0 and np.issubdtype(pixels.dtype, np.floating):
        scale = 255.0
    elif top <= 255:
        scale = 1.0
    else:
        scale = 255 / max(top, 65535.0)
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
