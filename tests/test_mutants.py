"""Mutated data files and images through everything that reads them: the loader, `data check`, the collator, a step.

Each mutant is refused with a reason or accepted and trained on: nothing else is raised, no mutant takes a second of CPU
time or a gigabyte. Mutants are files that were good, with bytes changed, cut, doubled and put in. 300 in the quick
tests, 10,000 in the slow ones; what makes them is Hypothesis, which also finds the smallest mutant that fails.
"""

from __future__ import annotations

import io
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune.data import Collator, Mixture
from normtune.data.checking import Checker
from normtune.errors import InputError, NormtuneError
from normtune.images import look_at, open_image
from normtune.model import assemble
from normtune.recipe import DataSource, Stage

QUICK, MANY = 150, 5000  # of data files and of images, each
NUMBERS = count()


# --- good files to begin with


def conversations() -> list[dict[str, Any]]:
    """Samples of both dialects: with images, with several, without."""
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red, as ö and 色 say."}]
    parts = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Red."},
    ]
    text = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}] * 2
    return [
        {"id": "a", "image": "0.png", "conversations": turns},
        {"id": 7, "images": ["sub/1.png"], "messages": messages},
        {"id": None, "conversations": text},
    ]


def data_files() -> list[tuple[str, bytes]]:
    items = conversations()
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    return [
        ("json", json.dumps(items).encode()),
        ("json", json.dumps(items, indent=1, ensure_ascii=False).encode("utf-8-sig")),
        ("jsonl", lines.encode()),
        ("jsonl", (lines + "\r\n").encode()),
    ]


def image_files() -> list[tuple[str, bytes]]:
    """One of each way to store pixels: formats, modes, compressions, EXIF, several frames."""
    noise = Image.effect_noise((24, 16), 120).convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "red")]}
    kinds: list[tuple[str, str, Image.Image, dict[str, Any]]] = [
        ("PNG", "png", noise, {}),
        ("PNG", "png", noise.convert("RGBA"), {"exif": exif}),
        ("PNG", "png", noise.quantize(8), {"transparency": 3}),
        ("PNG", "png", noise.convert("L").convert("I;16"), {}),
        ("PNG", "png", noise, frames),
        ("JPEG", "jpg", noise, {"exif": exif}),
        ("JPEG", "jpg", noise, {"progressive": True}),
        ("JPEG", "jpg", noise.convert("CMYK"), {}),
        ("GIF", "gif", noise, frames),
        ("WEBP", "webp", noise, {"exif": exif}),
        ("WEBP", "webp", noise.convert("RGBA"), {"lossless": True, **frames}),
        ("BMP", "bmp", noise.convert("P"), {}),
        ("BMP", "bmp", noise, {}),
        ("TIFF", "tif", noise, {"compression": "tiff_lzw"}),
        ("TIFF", "tif", noise.convert("F"), {}),
        ("TIFF", "tif", noise.convert("1"), {"compression": "group4"}),
        ("TIFF", "tif", noise, {"compression": "jpeg"}),
    ]
    files = []
    for kind, suffix, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append((suffix, buffer.getvalue()))
    return files


# --- mutants

JSON_BITS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"-1e999", b"NaN", b"\\u0000", b"\\ud800", b"\\"),
    *(b'"image":"../../x"', b'"image":"/etc/passwd"', b'"image":"a\\u0000b"', b'"from":"robot"', b"<image>", b"\xff"),
    *(
        b"[" * 3000,
        b"9" * 5000,
        b'{"a":' * 1500,
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b"\xe2\x80\xa8",
        b"<|im_end|>",
        b" " * 999,
    ),
)
IMAGE_BITS = (
    *(b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff\xd8", b"\xff\xd9", b"\xff\xda"),
    *(b"IDAT", b"IEND", b"acTL", b"fcTL", b"iCCP", b"zTXt", b"VP8X", b"ANMF", b"EXIF", b"II*\0", b"MM\0*", b"GIF89a"),
)


@st.composite
def mutants(draw: Any, files: list[tuple[str, bytes]], bits: tuple[bytes, ...]) -> tuple[str, bytes]:
    """A file of `files` after one to eight changes; `bits` are what a change may put in."""
    suffix, start = draw(st.sampled_from(files))
    data = bytearray(start)
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(1, 40))
        match draw(st.sampled_from(("byte", "byte", "cut", "double", "bit", "over", "end"))):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del data[at : at + size]
            case "double":
                data[at:at] = data[at : at + size]
            case "bit":
                data[at:at] = draw(st.sampled_from(bits))
            case "over":
                new = draw(st.sampled_from(bits))
                data[at : at + len(new)] = new
            case "end":
                del data[at:]
    return suffix, bytes(data)


# --- what a mutant goes through


@dataclass
class Ground:
    """A folder with images/0.png and images/sub/1.png, and the tiny model that reads and learns."""

    folder: Path
    model: Any
    processor: Any
    checker: Checker
    accepted: int = 0
    refused: int = 0

    def stage(self, name: str) -> Stage:
        source = DataSource(path=str(self.folder / name), images=str(self.folder / "images"))
        return Stage(name="s", strategy="connector", learning_rate=1e-3, max_length=200, data=[source])

    def data(self, mutant: tuple[str, bytes]) -> None:
        path = self.folder / f"{next(NUMBERS)}.{mutant[0]}"
        path.write_bytes(mutant[1])
        try:
            self.judge(path.name)
        finally:
            path.unlink()

    def image(self, mutant: tuple[str, bytes]) -> None:
        """Whatever opens it says the same; then it goes through as the picture of a sample."""
        name = f"{next(NUMBERS)}.{mutant[0]}"
        path = self.folder / "images" / name
        path.write_bytes(mutant[1])
        opened, looked = tried(lambda: open_image(path, "here").size), tried(lambda: look_at(path, "here")[0])
        assert opened == looked
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps([{**conversations()[0], "image": name}]))
        try:
            self.judge(file.name)
        finally:
            path.unlink()
            file.unlink()

    def judge(self, name: str) -> None:
        """Loader, check and collator say the same about a file, and what they accept has a finite loss."""
        stage, reasons = self.stage(name), dict[str, str]()
        found = self.checker.check(stage)
        if found.unreadable:
            ((_, why),) = found.unreadable
            assert explained(why)
            with pytest.raises(InputError):
                Mixture(stage.data, on_bad=lambda where, why: None)
            self.refused += 1
            return
        collator = Collator.__new__(Collator)  # its check of the processor once, not ten thousand times
        collator.__dict__.update(self.checker.collator.__dict__, max_length=200, on_bad=reasons.__setitem__)
        samples = tried(lambda: Mixture(stage.data, on_bad=reasons.__setitem__))
        if isinstance(samples, str):  # nothing in it
            assert found.entries == found.bad
            self.refused += 1
            return
        rows = collator.encode(samples)
        good = [row for row in rows if any(row.supervised)]
        assert len(good) == found.entries - found.bad and all(map(explained, reasons.values()))
        assert bool(reasons) == (found.bad > found.faults["nothing to learn"])
        self.accepted += len(good)
        self.refused += found.bad
        if good:
            loss = self.model(**collator.padded(good)).loss
            assert torch.isfinite(loss)


def explained(why: str) -> bool:
    return 1 <= len(why.splitlines()) <= 3 and len(why) > 10


def tried(call: Callable[[], Any]) -> Any:
    """What a call returns, or the message of its error; any other exception is a failure."""
    try:
        return call()
    except NormtuneError as error:
        assert explained(str(error))
        return str(error)


@contextmanager
def bounded() -> Iterator[None]:
    """No second of CPU time (another job on the machine changes nothing in that), no gigabyte."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.fixture(scope="module")
def ground(llm_folder: Path, vision_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "images" / "sub").mkdir(parents=True)
    for name in ("0.png", "sub/1.png"):
        Image.new("RGB", (24, 16), "red").save(folder / "images" / name)
    model, processor = assemble(llm_folder, vision_folder)
    ready = Ground(folder, model, processor, Checker(processor))
    for suffix, content in data_files():  # the files themselves are good
        ready.data((suffix, content))
    for suffix, content in image_files():
        ready.image((suffix, content))
    assert (ready.accepted, ready.refused) == (3 * len(data_files()) + len(image_files()), 0)
    return ready


def put(ground: Ground, judge: Callable[[Any], None], kind: Any, number: int) -> None:
    """So many mutants of a kind through `judge`; a share of them is accepted, and a share refused."""
    ground.accepted = ground.refused = 0
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=number, deadline=None, database=None, derandomize=True, suppress_health_check=checks)
    @given(kind)
    def each(mutant: tuple[str, bytes]) -> None:
        with bounded():
            judge(mutant)

    each()
    assert ground.accepted > number / 20 and ground.refused > number / 20


NUMBER = pytest.mark.parametrize(
    "number", [pytest.param(QUICK, marks=pytest.mark.heavy), pytest.param(MANY, marks=pytest.mark.slow)]
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on EXIF data and TIFF tags
@NUMBER
def test_data_files(ground: Ground, number: int) -> None:
    put(ground, ground.data, mutants(data_files(), JSON_BITS), number)


@pytest.mark.filterwarnings("ignore::UserWarning")
@NUMBER
def test_images(ground: Ground, number: int) -> None:
    put(ground, ground.image, mutants(image_files(), IMAGE_BITS), number)
