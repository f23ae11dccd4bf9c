"""Large data files: read as a stream as `json` reads them whole, and by an index exactly as from memory."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune.data import Mixture, Sample, entries, index, read_samples, scan
from normtune.errors import InputError, JobError
from normtune.recipe import DataSource
from test_data import BAD_FILES, BAD_ITEMS, DIALECTS, GOOD, source, talk

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.jpg", "sub/c.png", "..d.png")):
        Image.new("RGB", (8 + n, 6), (40 * n, 90, 200)).save(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as a large one."""
    monkeypatch.setattr(index, "LARGE", 0)


# --- the stream

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
DUMPS = st.fixed_dictionaries(
    {"indent": st.sampled_from([None, 0, 2]), "ensure_ascii": st.booleans()},
    optional={"separators": st.just((" , ", "\r\n:\t"))},
)


@pytest.fixture(params=[1, 7, 64])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So few bytes at a time that every token is cut somewhere."""
    monkeypatch.setattr(entries, "CHUNK", request.param)
    return int(request.param)


@many
@given(values=st.lists(JSON, max_size=5), how=DUMPS, mark=st.booleans())
def test_stream_gives_what_json_gives(chunk: int, tmp_path: Path, values: list[Any], how: Any, mark: bool) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps(values, **how).encode("utf-8-sig" if mark else "utf-8"))
    found = list(entries.read_entries(path))
    assert [(entry.number, entry.value) for entry in found] == list(enumerate(values, 1))
    data = path.read_bytes()
    assert [json.loads(data[entry.start : entry.start + entry.length]) for entry in found] == values


@many
@given(
    values=st.lists(JSON, max_size=4),
    how=DUMPS,
    place=st.integers(0, 1000),
    removed=st.integers(0, 2),
    put=st.sampled_from(
        ["", "[", "]", "{", "}", ",", ":", '"', "\\", "\\u12", "-", "1e", "nul", "\n", "\0", "é", " x"]
    ),
)
def test_stream_refuses_what_json_refuses(
    chunk: int, tmp_path: Path, values: list[Any], how: Any, place: int, removed: int, put: str
) -> None:
    text = json.dumps(values, **how)
    place %= len(text) + 1
    text = text[:place] + put + text[place + removed :]
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    wanted: Any
    try:
        wanted = json.loads(path.read_bytes().decode())
        message = "" if isinstance(wanted, list) else "expected a list of samples"
    except json.JSONDecodeError as error:
        message = f"line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}"
        message = message.replace("Illegal trailing comma before end of array", "")  # since Python 3.13
    try:
        found = [entry.value for entry in entries.read_entries(path)]
    except InputError as error:
        assert message and message in str(error)
    else:
        assert not message and found == wanted


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_no_text(chunk: int, tmp_path: Path, bad: bytes, mark: bytes) -> None:
    before = mark + '["é", "日本", "'.encode()
    (tmp_path / "x.json").write_bytes(before + bad + b'"]')
    with pytest.raises(InputError, match=rf"not UTF-8 text \(byte {len(before)}\)"):
        list(entries.read_entries(tmp_path / "x.json"))
    (tmp_path / "x.jsonl").write_bytes(mark + "{}\n\n1é\n".encode() + bad + b"\n2")
    found = list(entries.read_entries(tmp_path / "x.jsonl"))
    assert [(e.number, e.value, e.problem is None) for e in found] == [
        (1, {}, True),
        (3, None, False),
        (4, None, False),
        (5, 2, True),
    ]
    assert f"not UTF-8 text (byte {len(mark) + 8})" in str(found[2].problem)


def test_memory_is_that_of_a_window(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, indexed: None
) -> None:
    monkeypatch.setattr(entries, "CHUNK", 1 << 15)
    given = source(folder, [talk("Q", "long " * 400, id=n) for n in range(2000)], "x.json")
    size = os.path.getsize(given.path)
    read_samples(DataSource(path=str(folder / "x.json"), limit=1))  # imports and the like
    tracemalloc.start()
    samples = read_samples(given)
    assert len([sample for sample in samples if sample.images]) == 0 and len(samples) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 4e6 and peak < 8e5


# --- one file, two ways


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("x.json", '{"data": [' + "1, " * 400 + "1]}", "line 1, column 1: more than .* are no sample; expected a list"),
        ("x.json", "[1,\n" + "[" + "1, " * 400 + "1]]", "line 2, column 1: more than .* are no sample"),
        ("x.jsonl", "1\n[" + "1, " * 400 + "1]", r"line 2: more than .* \(is it one list\? Then name it \.json\)"),
    ],
)
def test_an_entry_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, why: str) -> None:
    """A list within an object, or a list by the name of lines: not read to its end, which would take gigabytes."""
    monkeypatch.setattr(entries, "CHUNK", 64)
    monkeypatch.setattr(entries, "MOST", 1000)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=why):
        list(entries.read_entries(tmp_path / name))


def outcome(given: DataSource, skips: bool) -> tuple[list[Sample], list[tuple[str, str]], str]:
    """The samples, what was left out, and the message of what was raised."""
    bad: list[tuple[str, str]] = []
    try:
        return list(read_samples(given, (lambda where, why: bad.append((where, why))) if skips else None)), bad, ""
    except InputError as error:
        return [], bad, str(error)


ITEMS = [item for item, _, _ in DIALECTS.values()]
BAD = [item for item, _ in BAD_ITEMS.values()]


@many
@given(
    items=st.lists(st.sampled_from(ITEMS) | st.sampled_from(ITEMS) | st.sampled_from(BAD), max_size=8),
    suffix=st.sampled_from(["json", "jsonl"]),
    limits=st.tuples(*[st.none() | st.integers(1, 6)] * 2),
    skips=st.tuples(st.booleans(), st.booleans()),
    tail=st.sampled_from(["", "", "{", "\n3"]),
)
def test_an_index_changes_nothing(
    folder: Path, items: list[Any], suffix: str, limits: tuple[int | None, ...], skips: tuple[bool, ...], tail: str
) -> None:
    before, given = (source(folder, items, f"x.{suffix}", limit=limit) for limit in limits)
    with open(given.path, "a") as file:
        file.write(tail)
    wanted = outcome(given, skips[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LARGE", 0)
        outcome(before, skips[0])  # which may leave an index of other samples
        first = outcome(given, skips[1])
        assert first == wanted
        assert outcome(given, skips[1]) == wanted  # from the cache


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_index_changes_no_message(folder: Path, indexed: None, name: str) -> None:
    file, content, message = BAD_FILES[name]
    with pytest.raises(InputError, match=message):
        read_samples(source(folder, content, file))
    assert not list(folder.rglob("*.idx"))


def test_a_large_file_that_cannot_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_size", lambda file: index.LARGE)
    with pytest.raises(InputError, match=r"data file .*x\.json .*cannot be read: No such file"):
        read_samples(DataSource(path=str(folder / "x.json")))


# --- the second start


@pytest.fixture
def two(folder: Path) -> DataSource:
    return source(folder, [talk("Q", "A", image="a.png", id=1), talk("Q", "B", image="sub/c.png"), GOOD], "x.json")


def built(monkeypatch: pytest.MonkeyPatch, given: DataSource) -> bool:
    """Whether the file is read as a whole."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(index, "read_entries", lambda path: seen.append(path) or entries.read_entries(path))
        read_samples(given)
    return bool(seen)


def test_second_start_reads_nothing(two: DataSource, indexed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [built(monkeypatch, two) for _ in range(2)] == [True, False]
    some = two.model_copy(update={"limit": 2})
    assert not built(monkeypatch, some) and len(read_samples(some)) == 2
    assert built(monkeypatch, two.model_copy(update={"images": str(Path(two.images or "") / ".")})) is False
    elsewhere = two.model_copy(update={"kind": "other"})
    assert not built(monkeypatch, elsewhere) and {s.kind for s in read_samples(elsewhere)} == {"other"}


def test_content_is_that_of_the_files(
    folder: Path, two: DataSource, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same from memory, from a new index and from an old one, which does not read the file again."""
    small = Mixture([two]).content
    monkeypatch.setattr(index, "LARGE", 0)
    assert Mixture([two]).content == small
    with monkeypatch.context() as patch:
        patch.setattr(index, "file_hash", None)
        assert Mixture([two]).content == small
    copied = shutil.copy(two.path, folder / "y.json")
    assert Mixture([two.model_copy(update={"path": str(copied)})]).content == small != Mixture([two, two]).content
    Path(two.path).write_text(Path(two.path).read_text().replace('"B"', '"C"'))
    assert Mixture([two]).content != small


def test_an_index_serves_from_any_folder(
    folder: Path, two: DataSource, indexed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert built(monkeypatch, DataSource(path="x.json", images="images"))
    monkeypatch.chdir(folder / "images")
    here = DataSource(path="../x.json", images=".")
    assert not built(monkeypatch, here)
    assert (
        read_samples(here)[0].images == (Path("a.png"),) and read_samples(here)[0].where == "../x.json, item 1 (id 1)"
    )


def test_an_index_of_some_serves_no_more(two: DataSource, indexed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = two.model_copy(update={"limit": 2})
    assert [built(monkeypatch, first), built(monkeypatch, first), built(monkeypatch, two)] == [True, False, True]
    assert len(read_samples(two)) == 3


CHANGES = {
    "content": lambda folder: (folder / "x.json").write_text(json.dumps([talk("Q", "C")])),
    "time": lambda folder: os.utime(folder / "x.json", (1, 1)),
    "an image more": lambda folder: Image.new("RGB", (2, 2)).save(folder / "images" / "sub" / "z.png"),
    "damaged": lambda folder: next(folder.rglob("*.idx")).write_bytes(b"{"),
    "cut": lambda folder: os.truncate(next(folder.rglob("*.idx")), 300),
    "lost": lambda folder: next(folder.rglob("*.idx")).unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_index_is_made_again(
    folder: Path, two: DataSource, indexed: None, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert built(monkeypatch, two) and not built(monkeypatch, two)
    CHANGES[change](folder)
    assert built(monkeypatch, two) and not built(monkeypatch, two)


def test_an_image_that_is_lost_between_two_starts(folder: Path, two: DataSource, indexed: None) -> None:
    samples = read_samples(two)
    (folder / "images" / "sub" / "c.png").unlink()
    with pytest.raises(InputError, match=r"item 2: there is no image .*c\.png"):
        read_samples(two)
    assert samples[1].images == (folder / "images" / "sub" / "c.png",)  # who opens it says so


def test_a_file_that_vanishes_or_is_replaced_stays_open(folder: Path, two: DataSource, indexed: None) -> None:
    samples = read_samples(two)
    before = list(samples)
    os.replace(source(folder, [GOOD], "y.json").path, two.path)
    assert list(samples) == before and samples[-1] == before[-1] and samples[1:] == before[1:]
    os.unlink(two.path)
    assert list(samples) == before


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 3), lambda path: os.utime(path, (1, 1))])
def test_a_file_that_is_written_over_is_told(two: DataSource, indexed: None, change: Any) -> None:
    samples = read_samples(two)
    change(two.path)
    with pytest.raises(JobError, match=r"x\.json: it changed while it was in use"):
        samples[0]


def test_a_file_that_grows_while_it_is_read(two: DataSource, indexed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(path: Path) -> Iterator[entries.Entry]:
        yield from entries.read_entries(path)
        with path.open("a") as file:
            file.write(" ")

    monkeypatch.setattr(index, "read_entries", growing)
    with pytest.raises(JobError, match="it changed while it was read"):
        read_samples(two)


def test_without_a_cache_the_index_stays_in_memory(
    two: DataSource, cache: Path, indexed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("no folder")
    assert len(read_samples(two)) == 3
    assert "is not kept: cannot write" in capsys.readouterr().err


def test_what_is_left_out_is_said_at_every_start(folder: Path, indexed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source(folder, [GOOD, 3, talk("Q", "A", image="z.png", id=9), GOOD], "x.json")
    first, second = outcome(given, True), outcome(given, True)
    assert first == second and len(first[0]) == 2
    path = folder / "x.json"
    assert first[1][0] == (f"{path}, item 2", "expected an object, found a number")
    assert first[1][1][0] == f"{path}, item 3 (id 9)" and first[1][1][1].startswith("there is no image")
    with pytest.raises(InputError, match="item 2: expected an object"):
        read_samples(given)

    def enough(where: str, why: str) -> None:
        raise JobError("too many")

    with pytest.raises(JobError, match="too many"):
        read_samples(given, enough)


def test_scan_goes_on_after_what_is_wrong(folder: Path) -> None:
    lines = "\n".join([json.dumps(GOOD), '{"a": }', "", json.dumps(talk("Q", "")), json.dumps(GOOD), json.dumps(GOOD)])
    found = list(scan(source(folder, lines, "x.jsonl", limit=2)))
    assert [one.where.rpartition(", ")[2] for one in found] == ["line 1", "line 2", "line 4", "line 5"]
    assert [one.sample is None for one in found] == [False, True, True, False]
    assert found[1].reason.startswith("column 7: no valid JSON")
    assert found[2].reason == "`conversations`, turn 2 (assistant): its text is empty"


def test_mixture_is_a_sequence(folder: Path, indexed: None) -> None:
    one = source(folder, [talk(f"Q{n}", "A", image="a.png") for n in range(3)], "one.json")
    two = source(folder, [talk(f"R{n}", "A") for n in range(4)], "two.jsonl")
    mixed = Mixture([one, two])
    assert [s.turns[0].text[-2:] for s in mixed] == ["Q0", "Q1", "Q2", "R0", "R1", "R2", "R3"]
    assert mixed[-1] == mixed[6] and [mixed[i] for i in (2, 3)] == mixed[2:4]
    with pytest.raises(IndexError):
        mixed[7]
    assert mixed.has_images and not Mixture([two]).has_images
    path = folder / "one.json"
    assert list(mixed.images()) == [(folder / "images" / "a.png", f"{path}, item {n}") for n in (1, 2, 3)]
    late = source(folder, [GOOD, talk("Q", "A", image="a.png")], "late.json")
    assert Mixture([late]).has_images and not Mixture([late.model_copy(update={"limit": 1})]).has_images
