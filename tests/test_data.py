"""Data files to samples to batches: what is read, what is refused and how it is named, and that a batch is the one
the model's own processor makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from models import LLAMA2, tiny_mllm
from normtune.chat import Turn
from normtune.data import Collator, Mixture, Sample, batches, open_image, read_samples
from normtune.errors import InputError
from normtune.recipe import DataSource

COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco-mini"


def talk(*texts: str, **fields: Any) -> dict[str, Any]:
    """An entry in LLaVA's format: texts of the human and of gpt by turns."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An images folder with a.png, b.jpg, sub/c.png and ..d.png."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.jpg", "sub/c.png", "..d.png")):
        Image.new("RGB", (40 + n, 30), (40 * n, 90, 200)).save(tmp_path / "images" / name)
    return tmp_path


def source(folder: Path, items: Any, name: str = "some_kind.json", **fields: Any) -> DataSource:
    path = folder / name
    lines = name.endswith("jsonl") and isinstance(items, list)
    path.write_text(
        items if isinstance(items, str) else "\n".join(map(json.dumps, items)) if lines else json.dumps(items)
    )
    return DataSource(**{"path": str(path), "images": str(folder / "images"), **fields})


def texts(sample: Sample) -> list[str]:
    return [turn.text for turn in sample.turns]


DIALECTS = {
    "llava": (talk("<image>\nQ", "A", "R", "B", image="a.png"), ["<image>\nQ", "A", "R", "B"], ["a.png"]),
    "no placeholder": (talk("Q", "A", image="a.png"), ["<image>\nQ", "A"], ["a.png"]),
    "two without placeholder": (
        talk("Q", "A", images=["a.png", "b.jpg"]),
        ["<image>\n<image>\nQ", "A"],
        ["a.png", "b.jpg"],
    ),
    "several": (
        talk("<image> and <image>", "A", "<image>?", "B", image=["a.png", "sub/c.png", "a.png"]),
        ["<image> and <image>", "A", "<image>?", "B"],
        ["a.png", "sub/c.png", "a.png"],
    ),
    "image and images alike": (talk("Q", "A", image=["a.png"], images=["a.png"]), ["<image>\nQ", "A"], ["a.png"]),
    "no text but an image": (talk("", "A", image="a.png"), ["<image>\n", "A"], ["a.png"]),
    "text only": (talk("Q", "A"), ["Q", "A"], []),
    "null image": (talk("Q", "A", image=None, images=[]), ["Q", "A"], []),
    "path within": (talk("Q", "A", image="sub/../b.jpg"), ["<image>\nQ", "A"], ["b.jpg"]),
    "name that begins with dots": (talk("Q", "A", image="..d.png"), ["<image>\nQ", "A"], ["..d.png"]),
    "messages": (
        {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "Q"), ("assistant", "A"))]},
        ["S", "Q", "A"],
        [],
    ),
    "system first": (
        {"conversations": [{"from": "system", "value": "S"}, *talk("Q", "A")["conversations"]], "image": "a.png"},
        ["S", "<image>\nQ", "A"],
        ["a.png"],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ],
            "images": ["b.jpg"],
        },
        ["<image>\nQ", "A"],
        ["b.jpg"],
    ),
    "parts with names": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "image", "path": "b.jpg"}]},
                {"role": "assistant", "content": "A"},
            ]
        },
        ["<image>\n<image>\n", "A"],
        ["a.png", "b.jpg"],
    ),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", DIALECTS)
def test_dialects(folder: Path, name: str, suffix: str) -> None:
    item, expected, images = DIALECTS[name]
    (sample,) = read_samples(source(folder, [item], f"my_set.{suffix}"))
    assert texts(sample) == expected and sample.kind == "my_set"
    assert [str(path.relative_to(folder / "images")) for path in sample.images] == images
    roles = [turn.role for turn in sample.turns]
    assert roles == (["system"] if roles[0] == "system" else []) + ["user", "assistant"] * (len(roles) // 2)


def test_fields_of_a_sample(folder: Path) -> None:
    items = [talk("Q", "A", id=7), talk("Q", "A", id="x"), talk("Q", "A")]
    samples = read_samples(source(folder, items, kind="detail", limit=3))
    path = folder / "some_kind.json"
    assert [s.where for s in samples] == [f"{path}, item 1 (id 7)", f"{path}, item 2 (id 'x')", f"{path}, item 3"]
    assert [s.id for s in samples] == ["7", "x", f"{path}, item 3"] and {s.kind for s in samples} == {"detail"}
    assert [s.id for s in read_samples(source(folder, items, limit=1))] == ["7"]
    assert len(read_samples(source(folder, items, limit=99))) == 3


def test_lines_blank_lines_and_byte_order_mark(folder: Path) -> None:
    lines = (
        "\ufeff" + json.dumps(talk("Q\u2028", "A"), ensure_ascii=False) + "\r\n\n" + json.dumps(talk("Q", "A", id=1))
    )
    samples = read_samples(source(folder, lines, "x.jsonl"))
    assert [s.where.removeprefix(str(folder)) for s in samples] == ["/x.jsonl, line 1", "/x.jsonl, line 3 (id 1)"]


GOOD = talk("Q", "A")
HUMAN, GPT = GOOD["conversations"]
BAD_ITEMS = {
    "no object": (3, "expected an object, found a number"),
    "no conversations": ({"id": "x", "image": "a.png"}, r"item 2 \(id 'x'\): it has neither `conversations`"),
    "empty conversations": ({"conversations": []}, "`conversations` must be a list of turns, found an empty list"),
    "conversations of another type": ({"messages": "Q"}, "`messages` must be a list of turns, found a string"),
    "turn of another type": ({"conversations": ["Q"]}, "turn 1: expected an object, found a string"),
    "unknown role": (
        {"conversations": [HUMAN, {"from": "robot", "value": "A"}]},
        r"turn 2: unknown role 'robot'.*human",
    ),
    "no role": ({"conversations": [{"value": "Q"}]}, "unknown role None"),
    "no text": (
        {"conversations": [HUMAN, {"from": "gpt", "value": None}]},
        "turn 2: its text must be a string .*nothing",
    ),
    "empty answer": (talk("Q", " "), r"turn 2 \(assistant\): its text is empty"),
    "empty question": (talk("", "A"), r"turn 1 \(user\): its text is empty"),
    "two questions": ({"conversations": [HUMAN, HUMAN, GPT]}, "turn 2: it is the user's; expected the assistant's"),
    "answer first": ({"conversations": [GPT, HUMAN]}, "turn 1: it is the assistant's; expected the user's"),
    "question last": ({"conversations": [HUMAN, GPT, HUMAN]}, "its last turn is the user's"),
    "system alone": ({"messages": [{"role": "system", "content": "S"}]}, "its last turn is the system's"),
    "late system": ({"messages": [HUMAN, GPT, {"role": "system", "content": "S"}]}, "turn 3: it is the system's"),
    "more places": (talk("<image><image>", "A", image="a.png"), "more <image> than images: 2 in the text, 1 given"),
    "places without images": (talk("<image>", "A"), "more <image> than images: 1 in the text, 0 given"),
    "fewer places": (talk("<image>", "A", images=["a.png", "b.jpg"]), "fewer <image> than images: 1 in the text, 2"),
    "place in an answer": (talk("Q", "an <image>", image="a.png"), "turn 2: <image> stands in the assistant's text"),
    "both fields": (talk("Q", "A", image="a.png", images=["b.jpg"]), "both `image` and `images`"),
    "names of another type": (talk("Q", "A", images=[3]), "must be a file name or a list of them"),
    "missing image": (talk("Q", "A", image="z.png", id=9), r"item 2 \(id 9\): there is no image .*z\.png"),
    "a folder": (talk("Q", "A", image="sub"), "there is no image"),
    "out of the folder": (talk("Q", "A", image="../x.png"), "leads out of the images folder"),
    "out by a detour": (talk("Q", "A", image="sub/../../x.png"), "leads out of the images folder"),
    "absolute": (talk("Q", "A", image="/etc/x.png"), "leads out of the images folder"),
    "null byte": (talk("Q", "A", image="a\0.png"), "leads out of the images folder"),
    "address": (talk("Q", "A", image="https://x.org/a.png"), "is no file"),
    "surrogate": (talk("Q \ud800", "A"), r"turn 1: half of a surrogate pair \(\\ud800\)"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part must be"),
    "part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part must be"),
    "names twice": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, GPT], "image": "a.png"},
        "names images both",
    ),
}


def check_message(caught: pytest.ExceptionInfo[InputError]) -> None:
    assert 1 <= len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items_are_named(folder: Path, name: str) -> None:
    item, message = BAD_ITEMS[name]
    with pytest.raises(InputError, match=message) as caught:
        read_samples(source(folder, [GOOD, item]))
    assert str(caught.value).startswith(f"{folder}/some_kind.json, item 2")
    check_message(caught)
    assert len(read_samples(source(folder, [GOOD, item], limit=1))) == 1  # what is not used is not checked


BAD_FILES = {
    "broken": ("x.json", '[\n  {"id": 1,\n   "b" 2}]', r"x\.json, line 3, column 8: no valid JSON: Expecting ':'"),
    "empty": ("x.json", "", "line 1, column 1: no valid JSON"),
    "no list": ("x.json", "{}", "expected a list of samples, found an object"),
    "no samples": ("x.json", "[]", "it holds no samples"),
    "no lines": ("x.jsonl", "\n\n", "it holds no samples"),
    "broken line": ("x.jsonl", json.dumps(GOOD) + '\n{"a": }\n', "line 2, column 7: no valid JSON"),
    "lines by another name": ("x.json", "{}\n{}", "line 2, column 1.*name it .jsonl"),
    "nested without end": ("x.json", "[" * 100000, "no usable JSON"),
    "long number": ("x.json", "[" + "1" * 5000 + "]", "no usable JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(folder: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    with pytest.raises(InputError, match=message) as caught:
        read_samples(source(folder, content, file))
    check_message(caught)


def test_missing_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=r"data file nowhere\.json .*cannot be read: No such file"):
        read_samples(DataSource(path="nowhere.json"))
    with pytest.raises(InputError, match=r"data file images .*cannot be read"):
        read_samples(DataSource(path="images"))
    (folder / "latin.json").write_bytes(b'["\xff"]')
    with pytest.raises(InputError, match="not UTF-8 text \\(byte 2\\)"):
        read_samples(DataSource(path="latin.json"))
    source(folder, [talk("Q", "A", image="a.png")], "x.json")
    with pytest.raises(InputError, match="there is no images folder pictures"):
        read_samples(DataSource(path="x.json", images="pictures"))
    with pytest.raises(InputError, match=r"item 1: it has an image, but .*`images: FOLDER`"):
        read_samples(DataSource(path="x.json"))
    assert read_samples(DataSource(path="x.json", images="images"))[0].images == (Path("images/a.png"),)


@settings(max_examples=150, deadline=None)
@given(
    item=st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["", "Q", "a.png", "<image>", "user", "gpt"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "id",
                        "image",
                        "images",
                        "conversations",
                        "messages",
                        "from",
                        "value",
                        "role",
                        "content",
                        "type",
                        "text",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=25,
    )
)
def test_any_json_gives_a_sample_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, item: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    try:
        samples = read_samples(source(folder, [item]))
    except InputError as error:
        assert 1 <= len(str(error).splitlines()) <= 3
    else:
        assert samples[0].turns[-1].role == "assistant"


# --- pixels


def ramp(width: int = 16, height: int = 8) -> np.ndarray:
    return np.linspace(0, 255, width * height).reshape(height, width)


def corner(rgb: tuple[int, int, int]) -> Image.Image:
    """White, with one corner of another colour: turning it shows."""
    image = Image.new("RGB", (32, 16), "white")
    image.paste(rgb, (0, 0, 8, 8))
    return image


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 0, 0, 0, 0, 255] + [0] * 762)
    image.putpixel((3, 1), 1)
    image.info["transparency"] = 0
    return image


GREY = ramp().astype(np.uint8)
ROUNDED = np.stack([np.rint(ramp())] * 3, -1)
MODES: dict[str, tuple[str, Any, np.ndarray]] = {  # file name, image, expected [h, w, 3]
    "rgb": ("x.png", corner((9, 8, 7)), np.asarray(corner((9, 8, 7)))),
    "grey": ("x.png", Image.fromarray(GREY), np.stack([GREY] * 3, -1)),
    "black and white": ("x.png", Image.fromarray(GREY > 99), np.stack([(GREY > 99) * 255] * 3, -1)),
    "grey with alpha": ("x.png", Image.new("LA", (2, 2), (0, 51)), np.full((2, 2, 3), 204)),
    "rgba": ("x.png", Image.new("RGBA", (3, 2), (255, 0, 0, 0)), np.full((2, 3, 3), 255)),
    "half transparent": ("x.png", Image.new("RGBA", (3, 2), (0, 0, 0, 102)), np.full((2, 3, 3), 153)),
    "palette": ("x.gif", Image.new("P", (3, 2), 0), np.zeros((2, 3, 3))),
    "palette with transparency": (
        "x.png",
        palette_with_transparency(),
        np.array([[[255] * 3] * 4, [[255] * 3] * 3 + [[0, 0, 255]]]),
    ),
    "16 bits": ("x.png", Image.fromarray((ramp() * 257).astype(np.uint16)), ROUNDED),
    "16 bits, big-endian": ("x.tif", Image.fromarray((ramp() * 257).astype(">u2")), ROUNDED),
    "32 bits": ("x.tif", Image.fromarray((ramp() * 257).astype(np.int32)), ROUNDED),
    "32 bits, small values": ("x.tif", Image.fromarray(GREY.astype(np.int32)), np.stack([GREY] * 3, -1)),
    "floating point": ("x.tif", Image.fromarray((ramp() / 255).astype(np.float32)), ROUNDED),
    "cmyk": ("x.tif", Image.new("CMYK", (3, 2), (0, 255, 255, 0)), np.tile([255, 0, 0], (2, 3, 1))),
    "cmyk jpeg": ("x.jpg", Image.new("CMYK", (3, 2), (0, 0, 0, 255)), np.zeros((2, 3, 3))),
    "webp with alpha": ("x.webp", Image.new("RGBA", (3, 2), (0, 0, 0, 0)), np.full((2, 3, 3), 255)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_modes_become_rgb(tmp_path: Path, name: str) -> None:
    file, image, expected = MODES[name]
    image.save(tmp_path / file)
    opened = open_image(tmp_path / file, "item 1")
    assert opened.mode == "RGB" and opened.size == image.size
    assert np.abs(np.asarray(opened, dtype=int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int, suffix: str) -> None:
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's transpositions that undo it
    upright = corner((0, 0, 0))
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif, quality=95, lossless=True)
    opened = np.asarray(open_image(tmp_path / f"x.{suffix}", "item 1"), dtype=int)
    assert opened.shape == (16, 32, 3) and np.abs(opened - np.asarray(upright)).mean() < 2


def test_first_frame_and_broken_exif(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=9)
    assert open_image(tmp_path / "x.gif", "item 1").getpixel((0, 0)) == (255, 0, 0)
    frames[1].save(tmp_path / "y.jpg", exif=b"Exif\0\0nonsense of some length")
    assert open_image(tmp_path / "y.jpg", "item 1").size == (4, 4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_images_name_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "gif", "webp", "tif"):
        path = tmp_path / f"x.{suffix}"
        noise.save(path)
        whole = path.read_bytes()
        for length in (0, 1, 20, len(whole) // 2):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match=rf"^f\.json, item 3: image .*x\.{suffix} cannot be read") as caught:
                open_image(path, "f.json, item 3")
            check_message(caught)
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(InputError, match="no image that Pillow knows"):
        open_image(tmp_path / "x.png", "item 3")
    with pytest.raises(InputError, match=r"item 3: there is no image .*z\.png"):
        open_image(tmp_path / "z.png", "item 3")
    noise.save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(InputError, match=r"item 3: image .*big\.png has more than 4,000 pixels"):
        open_image(tmp_path / "big.png", "item 3")


# --- mixtures


def mixture(folder: Path, *weights: float, n: int = 10) -> Mixture:
    items = [talk(f"Q{k}", "A") for k in range(n)]
    return Mixture([source(folder, items, f"k{j}.json", weight=weight) for j, weight in enumerate(weights)])


def test_mixture_weights(folder: Path) -> None:
    mixed = mixture(folder, 1.0, 0.25, 2.5)
    assert len(mixed) == 30 and [mixed[i].kind for i in (0, 10, 29)] == ["k0", "k1", "k2"]
    drawn = set()
    for epoch in range(40):
        order = mixed.order(3, epoch)
        per_kind = [[i for i in order if mixed[i].kind == kind] for kind in ("k0", "k1", "k2")]
        assert sorted(per_kind[0]) == list(range(10))
        assert len(per_kind[1]) == len(set(per_kind[1])) == 2  # round(2.5) is 2
        assert len(per_kind[2]) == 25 and {per_kind[2].count(i) for i in range(20, 30)} == {2, 3}
        drawn |= set(per_kind[1])
    assert drawn == set(range(10, 20))  # the subset changes by epoch


def test_mixture_order_depends_on_seed_and_epoch_only(folder: Path) -> None:
    one, two = mixture(folder, 1.0, 0.5), mixture(folder, 1.0, 0.5)
    two.order(9, 9)
    assert one.order(1, 2) == two.order(1, 2) == one.order(1, 2)
    assert len({tuple(one.order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert one.order(0, 0)[:5] == [2, 19, 10, 5, 13]  # on any machine
    one.order(1, 2).clear()
    assert len(one.order(1, 2)) == 15
    assert isinstance(one.order(0, 0)[0], int)


def test_mixture_with_a_weight_that_leaves_none(folder: Path) -> None:
    with pytest.raises(InputError, match=r"k0\.json: weight 0\.01 of 10 samples leaves none"):
        mixture(folder, 0.01)


# --- batches

CONVERSATIONS = [
    talk(
        "<image>\nWhat is in the image?", "A red circle.", "How many shapes are there?", "Three shapes.", image="a.png"
    ),
    talk("Is there a green triangle?", "Yes."),
    talk("Compare <image> with <image>.", "A cat and a dog.", images=["b.jpg", "sub/c.png"]),
    {
        "messages": [
            {"role": "system", "content": "Answer the question."},
            {"role": "user", "content": "What is this?<image>"},
            {"role": "assistant", "content": "日本 😀"},
        ],
        "image": "b.jpg",
    },
]


def processor_of(name: str, folder: Path) -> Any:
    kinds: dict[str, dict[str, Any]] = {
        "clip": {},
        "siglip, pad is eos": {"vision": "siglip", "pad": False},
        "dinov2 with registers, llama2": {"vision": "dinov2_registers", "template": LLAMA2, "bos": True},
        "default template": {"template": None, "bos": True},
    }
    return AutoProcessor.from_pretrained(tiny_mllm(folder / "mllm", **kinds[name]))


@pytest.fixture(
    scope="module", params=["clip", "siglip, pad is eos", "dinov2 with registers, llama2", "default template"]
)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_of(request.param, tmp_path_factory.mktemp("collator"))


def test_batch_is_the_processors_own(folder: Path, processor: Any) -> None:
    samples = read_samples(source(folder, CONVERSATIONS))
    collator = Collator(processor, None)
    batch = collator(samples)
    processor.tokenizer.padding_side = "right"
    rendered = [collator.chat.text(sample.turns) for sample in samples]
    images = [open_image(path, "") for sample in samples for path in sample.images]
    bos = processor.tokenizer.bos_token
    own = processor(
        text=rendered,
        images=images,
        padding=True,
        return_tensors="pt",
        add_special_tokens=not rendered[0].startswith(bos),
    )
    torch.testing.assert_close(batch["input_ids"], own["input_ids"])
    torch.testing.assert_close(batch["attention_mask"], own["attention_mask"])
    assert batch.pop("image_index").tolist() == [0, 1, 2, 1]  # b.jpg is shown twice
    torch.testing.assert_close(batch["pixel_values"][[0, 1, 2, 1]], own["pixel_values"])
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "pixel_values": torch.float32,
    }


def test_prompt_is_the_processors_own(folder: Path, processor: Any) -> None:
    collator = Collator(processor, None)
    turns = [Turn("user", "Compare <image> with\n<image>"), Turn("assistant", "No."), Turn("user", "Why?")]
    text = collator.chat.text(turns, prompt=True)
    images = [Image.new("RGB", (50, 40))] * 2
    bos = processor.tokenizer.bos_token
    own = processor(text=text, images=images, add_special_tokens=not text.startswith(bos))["input_ids"][0]
    length = own.count(processor.image_token_id) // 2
    assert collator.chat.prompt(turns, [length, length]) == own
    assert text == processor.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in turns], add_generation_prompt=True
    )


def test_labels_are_the_answers_and_their_ends(folder: Path, processor: Any) -> None:
    samples = read_samples(source(folder, CONVERSATIONS))
    collator = Collator(processor, None)
    batch = collator(samples)
    for sample, ids, labels, mask in zip(
        samples, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        supervised = ids[labels != -100].tolist()
        assert (labels[labels != -100] == ids[labels != -100]).all() and not mask[labels != -100].eq(0).any()
        ends = [token for token in supervised if token in collator.chat.stop_ids]
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        assert len(ends) == len(answers)
        text = processor.tokenizer.decode([token for token in supervised if token not in collator.chat.stop_ids])
        assert "".join(text.split()) == "".join("".join(answers).split())
    assert collator.counts["samples"] == 4 and collator.counts["images"] == 4 and collator.counts["dropped"] == 0
    assert collator.counts["supervised"] == int((batch["labels"] != -100).sum())
    assert collator.counts["tokens"] == int(batch["attention_mask"].sum())


def test_the_model_takes_the_batch(folder: Path, tmp_path: Path) -> None:
    path = tiny_mllm(tmp_path / "mllm")
    model = LlavaForConditionalGeneration.from_pretrained(path).eval()
    collator = Collator(AutoProcessor.from_pretrained(path), None)
    samples = read_samples(source(folder, CONVERSATIONS))
    batch = collator(samples)
    batch["pixel_values"] = batch["pixel_values"][batch.pop("image_index")]
    with torch.inference_mode():
        together = model(**batch)
        alone = [model(**collator([sample])) for sample in samples]
    assert torch.isfinite(together.loss)
    for row, output in zip(together.logits, alone, strict=True):
        torch.testing.assert_close(row[: output.logits.shape[1]], output.logits[0], atol=1e-4, rtol=1e-4)
    assert "pixel_values" not in collator(samples[1:2])


def test_pad_token_that_ends_turns_keeps_its_labels(folder: Path, tmp_path: Path) -> None:
    """Where the pad token is the end of a turn, comparing with it would unlearn how to stop."""
    processor = AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm"))
    processor.tokenizer.pad_token = "<|im_end|>"
    batch = Collator(processor, None)(read_samples(source(folder, CONVERSATIONS)))
    end = processor.tokenizer.pad_token_id
    assert (batch["labels"] == end).sum(1).tolist() == [2, 1, 1, 1]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == end).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_cutting_leaves_images_whole_and_is_counted(folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm"))
    items = [
        talk("<image>a", "b", "<image>c", "d", images=["a.png", "b.jpg"]),
        talk("Q", "a very long answer " * 9),
        talk("<image>" * 4, "A", images=["a.png"] * 4),
        talk("Q", "A", image="sub/c.png"),
    ]
    samples = read_samples(source(folder, items))
    collator = Collator(processor, 45)
    batch = collator(samples)
    assert batch["input_ids"].shape == (4, 45)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 0, 0, 16]
    expected = processor.image_processor(
        [open_image(samples[0].images[0], ""), open_image(samples[3].images[0], "")], return_tensors="pt"
    )
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
    assert (batch["labels"] != -100).any(1).tolist() == [True, True, False, True]
    assert batch["attention_mask"].sum(1).tolist()[1:3] == [45, 1]
    counts = collator.counts
    assert (counts["cut_turns"], counts["cut_images"], counts["dropped"], counts["images"]) == (4, 5, 1, 2)
    assert counts["cut_tokens"] > 0
    collator([samples[2]])
    assert counts["dropped"] == 2 and counts["samples"] == 5


class Stored:
    """Features by path, as from a store on disk: here the number of the path's letters."""

    tokens = 16

    def lookup(self, paths: Sequence[Path]) -> torch.Tensor:
        return torch.tensor([len(path.name) for path in paths]).float()[:, None, None].expand(-1, 16, 8)


def test_an_image_is_opened_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an optimizer step, however often it is shown; not at all where its features are stored."""
    processor = AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm"))
    samples = read_samples(source(folder, CONVERSATIONS * 2))
    opened: list[str] = []

    def counting(path: Path, where: str) -> Image.Image:
        opened.append(path.name)
        return open_image(path, where)

    monkeypatch.setattr(batches, "open_image", counting)
    monkeypatch.setattr(batches, "DECODED", 2)
    collator = Collator(processor, None)
    rows = collator.encode(samples)
    assert opened == ["a.png", "b.jpg", "c.png"]
    assert [len(row.images) for row in rows] == [1, 0, 2, 1] * 2 and collator.counts["images"] == 8
    live = collator.packed(rows[2:5])
    assert live["pixel_values"].shape[0] == 3 and live["image_index"].tolist() == [0, 1, 0, 2]
    assert "image_index" not in collator.packed(rows[2:3])
    stored = Collator(processor, None, Stored())
    batch = stored.packed(stored.encode(samples)[2:5])
    assert len(opened) == 3 and batch["features"][:, 0, 0].tolist() == [5, 5, 5] and "pixel_values" not in batch
    assert all(torch.equal(batch[key], live[key]) for key in live if key != "pixel_values")


def test_faults_in_a_batch_name_the_sample(folder: Path, tmp_path: Path) -> None:
    collator = Collator(AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm")), None)
    samples = read_samples(source(folder, [GOOD, talk("Q", "A", image="a.png", id="y")]))
    (folder / "images" / "a.png").write_bytes((folder / "images" / "a.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"item 2 \(id 'y'\): image .*a\.png cannot be read"):
        collator(samples)
    odd = Sample("z", (Turn("user", "<image>"), Turn("assistant", "A")), (), "k", "f.json, item 5")
    with pytest.raises(InputError, match=r"^f\.json, item 5: 1 <image> in the text, but 0 image"):
        collator([odd])


class Foreign:
    """Not a LlavaProcessor; `layout` is the text that stands for an image."""

    def __init__(self, processor: Any, layout: str) -> None:
        self.own, self.layout = processor, layout
        self.chat_template, self.tokenizer = processor.chat_template, processor.tokenizer
        self.image_processor, self.image_token = processor.image_processor, processor.image_token

    def __call__(self, text: str, images: list[Image.Image], **options: Any) -> dict[str, Any]:
        ids = self.tokenizer(text.replace("<image>", self.layout), **options)["input_ids"]
        return {"input_ids": [ids], "pixel_values": self.image_processor(images)["pixel_values"]}

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]]) -> dict[str, Any]:
        assert all(len(size) == 2 for size in image_sizes)
        return {"num_image_tokens": [self.layout.count("<image>")] * len(image_sizes)}


def test_processors_of_another_class(folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm"))
    samples = read_samples(source(folder, CONVERSATIONS))
    batch = Collator(Foreign(processor, "<image>" * 16), None)(samples)
    assert all(torch.equal(batch[key], value) for key, value in Collator(processor, None)(samples).items())
    with pytest.raises(InputError, match="Foreign is not supported for training yet"):  # as processors that tile do
        Collator(Foreign(processor, "<image>\n<image>"), None)


def test_processors_that_are_not_set_up(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm"))
    processor.image_processor.do_center_crop = False  # images of several sizes, which do not make one tensor
    with pytest.raises(InputError, match="LlavaProcessor is not supported for training yet"):
        Collator(processor, None)
    processor.image_processor.do_center_crop = True
    processor.patch_size = None
    with pytest.raises(InputError, match="patch_size") as caught:
        Collator(processor, None)
    check_message(caught)


def test_a_tokenizer_alone_collates_text(folder: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm"))
    tokenizer: PreTrainedTokenizerFast = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    samples = read_samples(source(folder, CONVERSATIONS[1:2]))
    batch, own = Collator(tokenizer, None)(samples), Collator(processor, None)(samples)
    assert all(torch.equal(batch[key], own[key]) for key in own)
    with pytest.raises(InputError, match="the model's processor takes none"):
        Collator(tokenizer, None)(read_samples(source(folder, CONVERSATIONS)))


@pytest.mark.skipif(not COCO.is_dir(), reason="the photographs are not here")
def test_real_photographs(tmp_path: Path) -> None:
    collator = Collator(AutoProcessor.from_pretrained(tiny_mllm(tmp_path / "mllm")), 512)
    for file in ("align", "conversation"):
        samples = read_samples(DataSource(path=str(COCO / f"{file}.json"), images=str(COCO / "images"), limit=6))
        batch = collator(samples)
        assert batch["pixel_values"].shape == (6, 3, 32, 32)
        assert (batch["labels"] != -100).any(1).all()
