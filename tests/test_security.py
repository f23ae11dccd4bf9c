"""Files that nobody vouches for: what normtune refuses to open, to run and to reach. SECURITY.md is the list.

Plan: images as attackers make them (bombs, links, pipes, odd formats), each refused with one reason and within limits
of memory; a model folder's code runs only where the recipe names the folder; no pickle; no network.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from network_guard import REFUSED, is_local
from PIL import Image

import normtune
from normtune import images, tuned
from normtune.errors import InputError
from normtune.images import find_image, open_image
from normtune.pretrained import locate, trusted
from normtune.recipe import ModelRecipe, load_recipe
from normtune.runlog import read_json
from normtune.tasks import pope
from normtune.tasks.files import stored_image
from normtune.tuned import build

# --- network


@pytest.mark.parametrize("host", ["93.184.216.34", "example.org", b"example.org", "10.0.0.1", "::2", "0.0.0.0"])
def test_addresses_beyond_this_machine(host: Any) -> None:
    assert not is_local(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "", None, socket.gethostname()])
def test_addresses_of_this_machine(host: Any) -> None:
    assert is_local(host)


def test_addresses_of_the_interfaces_of_this_machine() -> None:
    psutil = pytest.importorskip("psutil")
    own = [one.address for all_ in psutil.net_if_addrs().values() for one in all_ if one.family == socket.AF_INET]
    assert own and all(map(is_local, own))


TRIES = {
    "connect": lambda: socket.create_connection(("93.184.216.34", 80), timeout=1),
    "look up": lambda: socket.getaddrinfo("example.org", 80),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("93.184.216.34", 53)),
}


@pytest.mark.parametrize("name", TRIES)
def test_the_suite_is_offline(name: str) -> None:
    with pytest.raises(RuntimeError, match="the tests are offline"):
        TRIES[name]()
    assert REFUSED.pop().startswith("socket.")  # or else the fixture fails this very test


def test_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
    for end in socket.socketpair():
        end.close()


def test_children_are_offline() -> None:
    code = "import socket; socket.create_connection(('93.184.216.34', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the tests are offline" in done.stderr


# --- names and links


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """pictures/ with a.png and sub/b.png, beside it secret/c.png."""
    for name in ("pictures/a.png", "pictures/sub/b.png", "secret/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "pictures"


LINKS = {  # name of the link, where it leads, the image's name, whether that is within the folder
    "file within": ("x.png", "a.png", "x.png", True),
    "folder within": ("other", "sub", "other/b.png", True),
    "file outside": ("x.png", "../secret/c.png", "x.png", False),
    "folder outside": ("other", "../secret", "other/c.png", False),
    "through a folder and back": ("other", "../pictures/sub", "other/b.png", True),
    "chain": ("x.png", "sub/y.png", "x.png", False),
    "a folder whose name only begins alike": ("x.png", "../pictures2/c.png", "x.png", False),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_stay_in_the_folder(folder: Path, name: str) -> None:
    link, target, image, inside = LINKS[name]
    (folder / "sub" / "y.png").symlink_to("../../secret/c.png")
    (folder.parent / "pictures2").mkdir()
    Image.new("RGB", (4, 4)).save(folder.parent / "pictures2" / "c.png")
    (folder / link).symlink_to(target)
    if inside:
        assert find_image(folder, image, "item 1") == folder / image
    else:
        with pytest.raises(InputError, match=r"item 1: image .* is behind a link that leads out of the images folder"):
            find_image(folder, image, "item 1")


def test_the_folder_itself_may_be_a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "linked").symlink_to("pictures")
    monkeypatch.chdir(folder.parent)
    for root in (folder.parent / "linked", Path("linked"), Path("./linked/../linked")):
        assert find_image(root, "sub/b.png", "item 1") == root / "sub/b.png"


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a.png/b", "pipe", "sub", "gone", "."])
def test_what_is_no_file_is_missing(folder: Path, name: str) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "gone").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"item 1: there is no image"):
        find_image(folder, name, "item 1")


@pytest.mark.parametrize("name", ["\udcff.png", "\ud800.png", "\ud800/../a.png"])
def test_what_is_no_text_is_no_name(folder: Path, name: str) -> None:
    """Else the message could not be printed, and neither a log nor a report could hold the path."""
    (folder / "\udcff.png").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(InputError, match=r"item 1: image .* is no text") as caught:
        find_image(folder, name, "item 1")
    str(caught.value).encode()


NAMES = ("../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", "..", "a\0.jpg")


@pytest.mark.parametrize("name", NAMES)
def test_images_of_benchmarks_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    """Rows that hold their image have it written to a file of the name that they give."""
    folder = tmp_path / "images"
    with pytest.raises(InputError, match=r"x\.parquet, row 3: image .* leads out of"):
        stored_image({"image": {"bytes": b"evil"}}, name, (tmp_path / "val2014", folder), "x.parquet, row 3")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "labels.json").write_text(json.dumps({"question_id": 1, "image": name, "text": "Q", "label": "yes"}))
    with pytest.raises(InputError, match="leads out of"):
        pope.read_labels(tmp_path / "labels.json", "random", folder)


# --- pixels


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size, with the compressed `data`."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"\x2c" + bytes(4) + b"\xff\xff\xff\xff\0\x08"


def webp(width: int, height: int) -> bytes:
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sizes


BOMBS = {
    "png": png(65000, 65000, zlib.compress(bytes(1000))),
    "png just above": png(2**13, 2**13 + 1),
    "bmp": bmp(2**30, 2**30),
    "bmp just above": bmp(2**13, 2**13 + 1),
    "gif": gif(65000, 65000),
    "webp": webp(16384, 16384),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(image: Any) -> Any:
        raise AssertionError("a decoder was asked for pixels")

    monkeypatch.setattr(images, "upright", never)
    path = tmp_path / "x.png"
    path.write_bytes(BOMBS[name])
    with pytest.raises(InputError, match=r"item 1: image .*x\.png has more than 67,108,864 pixels; scale it down"):
        open_image(path, "item 1")


def tiled(width: int, height: int, data: bytes) -> bytes:
    """A TIFF of 64 x 64 pixels in one tile of that size."""
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 130, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(130, b"\0") + data


def test_tiles_larger_than_their_image(tmp_path: Path) -> None:
    """They are decoded whole: a few kilobytes would become gigabytes."""
    (tmp_path / "x.tif").write_bytes(tiled(256, 256, zlib.compress(bytes(2**16))))
    assert open_image(tmp_path / "x.tif", "item 1").size == (64, 64)
    (tmp_path / "x.tif").write_bytes(tiled(8192, 8192, zlib.compress(bytes(2**16))))
    with pytest.raises(InputError, match=r"cannot be read: its tiles of 8,192 x 8,192 pixels are larger"):
        open_image(tmp_path / "x.tif", "item 1")


def test_jpegs_of_scan_upon_scan(tmp_path: Path) -> None:
    """A scan of a few bytes goes through all pixels: a megabyte of them would take a decoder minutes."""
    whole = encoded("JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 200)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert images._scans(whole) == whole.count(b"\xff\xda") - 200 < 12
    (tmp_path / "x.jpg").write_bytes(whole + b"\xff\xda" * 200)  # what stands behind the end is nobody's
    assert open_image(tmp_path / "x.jpg", "item 1").size == (8, 8)
    (tmp_path / "x.jpg").write_bytes(whole[:-2] + last * 100 + whole[-2:])
    with pytest.raises(InputError, match=r"cannot be read: it has more than 100 scans"):
        open_image(tmp_path / "x.jpg", "item 1")


def test_a_lower_limit_holds_before_memory_is_taken(tmp_path: Path) -> None:
    """Pillow takes memory for a WebP's whole canvas when it opens the file."""
    (tmp_path / "x.webp").write_bytes(webp(5000, 5000))
    with pytest.raises(InputError, match="more than 16,777,216 pixels"):
        open_image(tmp_path / "x.webp", "item 1", 2**24)


@pytest.mark.parametrize("size", [(1, 201), (402, 1), (2, 401)])
def test_lines_are_no_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    """What scales the shorter side to 336 pixels would need gigabytes for the longer one."""
    Image.new("RGB", size).save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"cannot be read: .* pixels are a line, not a picture"):
        open_image(tmp_path / "x.png", "item 1")
    Image.new("RGB", (1, 200)).save(tmp_path / "y.png")
    assert open_image(tmp_path / "y.png", "item 1").size == (1, 200)


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "JPEG2000", "EPS", "PDF", "ICNS", "DDS", "AVIF", "PCX", "SGI"])
def test_formats_off_the_list_are_refused_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(kind))
    with pytest.raises(InputError, match="it is no image that Pillow knows as JPEG, PNG, WEBP, GIF, BMP or TIFF"):
        open_image(path, "item 1")


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats_on_the_list_are_opened_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(encoded(kind))
    assert np.abs(np.asarray(open_image(path, "item 1"), dtype=int) - (255, 0, 0)).max() <= 2


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    with path.open("wb") as file:
        file.write(encoded("WEBP"))
        file.truncate(2**29 + 1)  # a hole: takes no space
    with pytest.raises(InputError, match=r"cannot be read: its file is larger than 536,870,912 bytes"):
        open_image(path, "item 1")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F", "P"])
def test_strips_give_what_the_whole_gives(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transparency and wide greys are computed in strips of rows; the pixels do not depend on how many."""
    noise = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
    elif mode in ("I;16", "F"):
        image = Image.fromarray(noise[..., 0].astype(np.uint16 if mode == "I;16" else np.float32) * 77)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x.tif" if mode == "F" else tmp_path / "x.png")
    (path,) = tmp_path.iterdir()
    whole = np.asarray(open_image(path, ""))
    monkeypatch.setattr(images, "STRIP", 50)
    assert np.array_equal(np.asarray(open_image(path, "")), whole) and len(np.unique(whole)) > 10


# --- code and pickles

CODE = """
import pathlib
from transformers import PreTrainedTokenizerFast
pathlib.Path({marker!r}).write_text("ran")
class Own(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An LLM whose tokenizer comes with code of its own, and the file that this code writes when it runs."""
    folder, marker = tmp_path / "llm", tmp_path / "ran"
    shutil.copytree(llm_folder, folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, marker


def recipe_of(llm: Path, vision: Path, *names: Path) -> ModelRecipe:
    return ModelRecipe(
        llm=str(llm), vision=str(vision), dtype="float32", trust_remote_code=[str(name) for name in names]
    )


def test_code_of_a_model_runs_only_where_the_recipe_names_it(own_code: tuple[Path, Path], vision_folder: Path) -> None:
    folder, marker = own_code
    with contextlib.suppress(InputError):  # some transformers versions fall back to their own tokenizer class
        build(recipe_of(folder, vision_folder))
    with contextlib.suppress(InputError):  # another folder's name is no permission
        build(recipe_of(folder, vision_folder, vision_folder))
    assert not marker.exists()
    build(recipe_of(folder, vision_folder, folder))
    assert marker.read_text() == "ran"
    marker.unlink()
    sys.modules.pop(next(name for name in sys.modules if name.startswith("transformers_modules.") and ".own" in name))
    assert trusted(str(folder)) == {"trust_remote_code": False}  # the permission ended with the build


def test_unknown_code_is_refused_in_words(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "never-heard-of", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match="comes with custom code, which is not run") as caught:
        build(recipe_of(folder, vision_folder))
    assert f"model.trust_remote_code: [{folder}]" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_an_adapter_grants_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Adapters are passed around: one that says whose code may run is not believed."""
    asked: list[ModelRecipe] = []

    def stop(recipe: ModelRecipe, seed: int) -> Any:
        asked.append(recipe)
        raise InputError("seen enough")

    (tmp_path / "adapter.json").write_text("{}")
    base = {"model": {"path": "evil/model", "trust_remote_code": ["evil/model"]}}
    monkeypatch.setattr(tuned, "read_adapter", lambda folder: ({}, {"base": base}))
    monkeypatch.setattr(tuned, "build", stop)
    with pytest.raises(InputError, match="seen enough"):
        tuned.open_tuned(tmp_path)
    assert asked[0].path == "evil/model" and asked[0].trust_remote_code == []


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "ran")


def test_pickled_weights_are_refused(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError, match=r"weights in pickles \(pytorch_model.bin\), which may run any code"):
        build(recipe_of(folder, vision_folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ['{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\xff"}'])
def test_what_json_stumbles_over_is_named(llm_folder: Path, tmp_path: Path, text: str) -> None:
    own = shutil.copytree(llm_folder, tmp_path / "own")
    (own / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"LLM: .*tokenizer_config\.json cannot be read"):
        locate(own, "LLM")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(own / "tokenizer_config.json", "model")


def test_shards_stay_in_their_folder(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no table 'weight_map' of file names"):
        build(recipe_of(folder, vision_folder))


YAMLS = ("!!python/object/apply:os.system ['touch {}']", "x: !!python/object/new:os.system ['touch {}']", "&a [*a]")


@pytest.mark.parametrize("text", YAMLS)
def test_yaml_is_data(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text.format(tmp_path / "ran"))
    with pytest.raises(InputError):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(InputError):
        load_recipe(tmp_path / "missing.yaml", ["seed=!!python/object/apply:os.getcwd []"])
    assert not (tmp_path / "ran").exists()


# --- the source itself

SOURCE = Path(normtune.__file__).parent
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "joblib.load", "yaml.load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "subprocess.getoutput", "eval", "exec", "compile", "tarfile.open", "zipfile.ZipFile"),
    *("urllib.request.urlopen", "requests.get", "requests.post", "socket.socket", "socket.create_connection"),
}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_source_opens_nothing_that_could_run(path: Path) -> None:
    """No pickle, no unsafe YAML, no shell, no archive, no connection; tensors by safetensors, pictures by images.py."""
    own = path.match("world/*.py") or path.match("cli/demo_runs.py")  # they read what this package itself has made
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        place = f"{path}, line {node.lineno}: {name}"
        assert name not in FORBIDDEN, place
        assert given.get("shell", "False") == "False", place
        if name == "torch.load":
            assert given.get("weights_only") == "True", place
        if name.endswith("np.load"):
            assert given.get("allow_pickle", "False") == "False", place
        if name == "Image.open" and not own:
            assert path.name == "images.py", f"{place}: open_image has the limits"
        if name.endswith("from_pretrained") and not own:
            assert any("trusted(" in value or "checked(" in value or value == "options" for value in given.values()), (
                place
            )
