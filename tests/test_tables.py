"""Parquet files and `datasets` folders, images inside or beside them: the samples of the same data as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from normtune.data import index, read_samples, tables
from normtune.errors import InputError
from normtune.recipe import DataSource
from test_data import GOOD, source, talk


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a.png and b.jpg in an images folder; the cache is beside it."""
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for n, name in enumerate(("a.png", "b.jpg")):
        Image.new("RGB", (8 + n, 6), (40 * n, 90, 200)).save(tmp_path / "images" / name)
    return tmp_path


def table(folder: Path, given: list[dict[str, Any]]) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(given), folder / "x.parquet")
    return str(folder / "x.parquet")


def rows(folder: Path) -> list[dict[str, Any]]:
    """In the columns of a table, images embedded."""
    raw = {name: (folder / "images" / name).read_bytes() for name in ("a.png", "b.jpg")}
    held = [{"bytes": data, "path": name} for name, data in raw.items()]
    return [
        {"id": "1", "images": held[:1], "conversations": talk("<image>\nQ", "A")["conversations"]},
        {"id": "2", "images": held, "conversations": talk("Q", "A", "R", "B")["conversations"]},
        {"id": "3", "images": [], "conversations": talk("Text alone", "A")["conversations"]},
        {"id": "4", "images": held[1:], "conversations": talk("Q", "D")["conversations"]},
    ]


def saved(folder: Path, kind: str) -> Path:
    """`rows` as a table."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    given = rows(folder)
    path = folder / {"parquet": "set.parquet", "datasets": "set", "several parquet files": "several"}[kind]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(given), path, row_group_size=3)
    elif kind == "datasets":
        features = datasets.Features(
            {
                "id": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
            }
        )
        datasets.Dataset.from_list(given, features=features).save_to_disk(path, num_shards=2)
    else:
        path.mkdir()
        for n in (0, 1):
            parquet.write_table(pyarrow.Table.from_pylist(given[2 * n : 2 * n + 2]), path / f"part-{n}.parquet")
    return path


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "datasets", "several parquet files"])
def test_tables_with_images_inside(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, large: bool) -> None:
    if large:
        monkeypatch.setattr(index, "LARGE", 0)
    path = saved(folder, kind)
    samples = read_samples(DataSource(path=str(path)))
    wanted = [{**row, "images": [image["path"] for image in row["images"]]} for row in rows(folder)]
    plain = read_samples(source(folder, wanted, "x.json"))
    assert [s.turns for s in samples] == [s.turns for s in plain] and [s.id for s in samples] == ["1", "2", "3", "4"]
    for own, other in zip(samples, plain, strict=True):
        assert [p.read_bytes() for p in own.images] == [p.read_bytes() for p in other.images]
    assert samples[1].where == f"{path}, row 2 (id '2')" and {s.kind for s in samples} == {path.stem}
    kept = {file for file in (folder / "cache" / "tables" / "images").rglob("*") if file.is_file()}
    assert kept == {image for sample in samples for image in sample.images} and len(kept) == 2

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_rows", None)  # not read again
        assert list(read_samples(DataSource(path=str(path)))) == list(samples)
    assert len(read_samples(DataSource(path=str(path), limit=2))) == 2
    for file in tables._files(path):
        os.utime(file, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_rows", lambda path, files: iter([GOOD]))
        assert len(read_samples(DataSource(path=str(path)))) == 1


def test_table_with_names_of_images(folder: Path) -> None:
    given = [{"image": "a.png", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    given.append({**given[0], "image": None})
    samples = read_samples(DataSource(path=table(folder, given), images=str(folder / "images")))
    assert [s.images for s in samples] == [(folder / "images" / "a.png",), ()]
    with pytest.raises(InputError, match=r"x\.parquet, row 1: it has an image, but"):
        read_samples(DataSource(path=str(folder / "x.parquet")))


def test_dictionary_of_lists_is_a_list_of_dictionaries() -> None:
    assert tables._turns({"from": ["human", "gpt"], "value": ["Q", "A"]}) == GOOD["conversations"]


def test_splits_are_not_mixed(folder: Path) -> None:
    """A folder as the Hub has it, in which questions of a test stand beside the training's."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (folder / "hub").mkdir(exist_ok=True)
        os.replace(table(folder, [GOOD]), folder / "hub" / f"{name}.parquet")
    with pytest.raises(InputError, match="hub holds several splits, test, train: give"):
        read_samples(DataSource(path=str(folder / "hub")))
    (folder / "hub" / "test-00000-of-00001.parquet").unlink()
    assert len(read_samples(DataSource(path=str(folder / "hub")))) == 2


def test_images_are_on_the_disk_before_their_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure must not leave rows, which are never read again, of images that are empty files."""
    synced: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: synced.append(any((folder / "cache" / "tables").glob("*.jsonl"))))
    read_samples(DataSource(path=str(saved(folder, "parquet"))))
    assert synced == [False]


def test_what_a_kill_left_of_a_table_is_removed(folder: Path) -> None:
    (folder / "cache" / "tables").mkdir(parents=True)
    old, new = (folder / "cache" / "tables" / f".{name}.part" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (1, 1))
    read_samples(DataSource(path=table(folder, [GOOD])))
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("kind", ["page", "text"])
def test_damage_within_a_table(folder: Path, kind: str) -> None:
    """The table is at fault, not the disk that its rows are copied to; and no exception of pyarrow's gets through."""
    path = folder / "x.parquet"
    table(folder, [{"id": "ZZZZZZZZ", **GOOD}])
    data = path.read_bytes()
    page = data[4:].replace(b"ZZZZ", b"\xff\xfe\xff\xff") if kind == "text" else b"\xff" * 8 + data[12:]
    path.write_bytes(b"PAR1" + page if kind == "text" else data[:4] + page)
    with pytest.raises(InputError, match=r"x\.parquet: it cannot be read as a table: \S"):
        read_samples(DataSource(path=str(path)))


def test_bad_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    with pytest.raises(InputError, match=r"x\.parquet: it has no column `conversations` or `messages`, but text"):
        read_samples(DataSource(path=table(folder, [{"text": "Q"}])))
    lost = {"image": {"bytes": None, "path": None}, "conversations": GOOD["conversations"]}
    held = {"image": rows(folder)[0]["images"][0], "conversations": GOOD["conversations"]}
    with pytest.raises(InputError, match=r"x\.parquet, row 2: .image. or .images. must be a file name"):
        read_samples(DataSource(path=table(folder, [held, lost])))
    bad: list[Any] = []
    assert len(read_samples(DataSource(path=table(folder, [held, lost])), lambda *of: bad.append(of))) == 1
    assert bad[0][0].endswith("x.parquet, row 2")
    escape = {**held, "image": {"bytes": None, "path": "../../x.png"}}
    with pytest.raises(InputError, match=r"row 2: image .* leads out of the images folder"):
        read_samples(DataSource(path=table(folder, [held, escape])))
    (folder / "y.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(InputError, match=r"y\.parquet: it cannot be read as a table"):
        read_samples(DataSource(path=str(folder / "y.parquet")))
    with pytest.raises(InputError, match=r"data file .*z\.parquet .*cannot be read: No such file"):
        read_samples(DataSource(path=str(folder / "z.parquet")))
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(folder / "splits")
    with pytest.raises(InputError, match=r"several splits; give one of train: .*splits/train"):
        read_samples(DataSource(path=str(folder / "splits")))
    assert len(read_samples(DataSource(path=str(folder / "splits" / "train")))) == 1
    (folder / "splits" / "train" / "state.json").write_text("[]")
    with pytest.raises(InputError, match="does not list the files"):
        read_samples(DataSource(path=str(folder / "splits" / "train")))
    (folder / "new.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="need pyarrow; pip install"):
        read_samples(DataSource(path=str(folder / "new.parquet")))
