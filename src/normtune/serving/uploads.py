"""Images of a request: data URLs, read strictly, as Pillow images within the server's limits.

Scope: base64, the type that a client states against the file's own, pixels told from the header before any is decoded.
Non-scope: where remote URLs may lead (`remote`), resizing (the model's image processor). Source: RFC 2397 and RFC 4648;
formats and decoding are `normtune.images`'.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import dataclass

from PIL import Image

from normtune.errors import InputError
from normtune.images import FORMATS, opened, to_rgb, upright
from normtune.serving.limits import ApiError

_DATA_URL = re.compile(r"data:([A-Za-z0-9.+-]+/[A-Za-z0-9.+-]+);base64,", re.ASCII)
_TYPES = {
    **{f"image/{name.lower()}": name for name in FORMATS},
    **{"image/jpg": "JPEG", "image/x-ms-bmp": "BMP", "image/x-bmp": "BMP"},
}


@dataclass(frozen=True)
class Encoded:
    """An image file, the media type that its sender states, and its place in the request."""

    data: bytes
    kind: str
    param: str

    def open(self, mode: str, /) -> io.BytesIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return f"of type {self.kind}"


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def read_data_url(url: str, param: str) -> Encoded:
    """The file within a data URL `data:image/png;base64,...`.

    Raises:
        ApiError: 400 for another form, for characters that are not base64's, and for padding that is missing.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise wrong("The URL must have the form 'data:image/png;base64,...'.", param)
    kind = image_type(head.group(1), param)
    try:
        return Encoded(base64.b64decode(url[head.end() :], validate=True), kind, param)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise wrong(f"The image is not valid base64: {error}.", param) from error


def image_type(stated: str, param: str) -> str:
    """A media type without its parameters, in lower case. Raises ApiError 400 where it is none that is opened."""
    kind = stated.partition(";")[0].strip().lower()
    if kind not in _TYPES:
        known = ", ".join(f"image/{name.lower()}" for name in FORMATS)
        raise wrong(f"Images of type {kind[:100]!r} are not supported; there are {known}.", param)
    return kind


def decode(image: Encoded, max_pixels: int) -> Image.Image:
    """The picture in mode RGB, as `normtune.images.open_image` gives it.

    Raises:
        ApiError: 400 for more than `max_pixels` pixels, a file of another type than stated, what `open_image` refuses.
    """
    try:
        with opened(image, "The request", max_pixels) as file:
            found = "JPEG" if file.format == "MPO" else file.format  # a phone's JPEG with several pictures
            if found != _TYPES[image.kind]:
                raise InputError(f"The image is stated to be {image.kind}, but its content is {found}")
            return to_rgb(upright(file))
    except InputError as error:
        raise wrong(f"{error}.", image.param) from None


def wrong(message: str, param: str) -> ApiError:
    return ApiError(400, message, param, "invalid_image")
