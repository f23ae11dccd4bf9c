"""Captioning on MSCOCO and Flickr30k: one sentence per image against several human ones.

Scope: COCO's `captions_{val2014,val2017,...}.json`, Karpathy's `dataset_{coco,flickr30k}.json`, Flickr30k's
`results_20130124.token`, rows of the Hugging Face data sets, and COCO's results files. CIDEr, BLEU, ROUGE-L and METEOR
are coco-caption's (`caption_scores`); lmms-eval computes the same, so both rules agree. Not here: SPICE, which needs
models to be downloaded.
Source: tylin/coco-caption; Chen et al., arXiv 1504.00325; Karpathy and Fei-Fei, arXiv 1412.2306.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.tasks import caption_scores
from normtune.tasks.bootstrap import Statistics
from normtune.tasks.caption_scores import one_line
from normtune.tasks.files import (
    add_prediction,
    field,
    first_existing,
    read_json,
    read_list,
    read_rows,
    read_text,
    row_files,
    stored_image,
    unique,
    within,
)
from normtune.tasks.items import Item, Joined, Measured, Rules, check_rules, joined, no_split, paired

PROMPT = "Provide a one-sentence caption for the provided image."
COCO_SPLITS = ("val2014", "val2017", "train2014", "train2017")
KARPATHY_SPLITS = ("test", "val", "restval", "train")
TOKEN_FILE = "results_20130124.token"


def load_coco(data: Path, split: str | None = None) -> list[Item]:
    """The images of `split`; by default those of the first file there is of captions_val2014.json,
    captions_val2017.json, Karpathy's dataset_coco.json (test), rows. `answer` is the list of reference captions, one
    line each. InputError for a missing or malformed file, an unknown split, a caption of an unknown image, an image
    without a caption."""
    root = data / "coco"
    files = {s: first_existing(*(f / f"captions_{s}.json" for f in (root, root / "annotations"))) for s in COCO_SPLITS}
    official = [name for name, path in files.items() if path.exists()]
    karpathy = root / "dataset_coco.json"
    rows = row_files(root, ("val", "validation", "test"))
    if split is None:
        split = next(iter([*official, *(["test"] if karpathy.exists() else []), *rows]), COCO_SPLITS[0])
    if split in COCO_SPLITS and (split in official or not (karpathy.exists() or rows or official)):
        folder = first_existing(data / split, root / split)
        path = files[split]
        return unique([Item(str(k), within(folder, n, str(path)), PROMPT, r) for k, n, r in read_coco(path)], path)
    if split in KARPATHY_SPLITS and karpathy.exists():
        found = read_karpathy(karpathy, split)
        return [Item(str(k), within(data, place, str(karpathy)), PROMPT, r) for k, place, r in found]
    if split in rows:
        return unique([i for f in rows[split] for i in _rows(f, (data / "val2014", root / "images"), _coco_id)], root)
    raise no_split(split, [*official, *(KARPATHY_SPLITS if karpathy.exists() else ()), *rows] or COCO_SPLITS, root)


def load_flickr30k(data: Path, split: str | None = None) -> list[Item]:
    """The images of `split`, by default test (1,000 in Karpathy's `flickr30k/dataset_flickr30k.json`), else those of
    `results_20130124.token`, whose splits are lists of ids in SPLIT.txt, else rows. `answer` is the list of raw
    reference captions. InputError for a missing or malformed file or an empty split."""
    root = data / "flickr30k"
    images = root / "flickr30k-images"
    karpathy, tokens = root / "dataset_flickr30k.json", root / TOKEN_FILE
    rows = row_files(root, ("test",))
    if karpathy.exists() or not (tokens.exists() or rows):
        found = read_karpathy(karpathy, split or "test")
        return unique([Item(n, within(images, n, str(karpathy)), PROMPT, r) for _, n, r in found], karpathy)
    if tokens.exists():
        ids = root / f"{split or 'test'}.txt"
        if split is not None and not ids.exists():
            raise no_split(split, [path.stem for path in sorted(root.glob("*.txt"))] or ["none"], root)
        found = read_tokens(tokens, ids if ids.exists() else None)
        return unique([Item(n, within(images, n, str(tokens)), PROMPT, r) for _, n, r in found], tokens)
    if split not in (None, *rows):
        raise no_split(str(split), list(rows), root)
    return unique([i for f in rows["test"] for i in _rows(f, (images,), _flickr_id)], root)


def read_coco(path: Path) -> Iterator[tuple[Any, str, list[str]]]:
    """(id, file name, references) of each image of COCO's format; InputError as `load_coco`."""
    content = read_json(path)
    images: dict[int | str, str] = {}
    for place, record in enumerate(field(content, "images", list, str(path))):
        where = f"{path}, image {place}"
        key = field(record, "id", (int, str), where)
        if key in images:
            raise InputError(f"{where}: id {key} occurs twice.\nRemove one of the two entries.")
        images[key] = field(record, "file_name", str, where) if "file_name" in record else str(key)
    captions: dict[int | str, list[str]] = {key: [] for key in images}
    for place, record in enumerate(field(content, "annotations", list, str(path))):
        where = f"{path}, annotation {place}"
        key = field(record, "image_id", (int, str), where)
        if key not in captions:
            raise InputError(f"{where}: image_id {key} is not among the images.\nAdd the image or remove the caption.")
        captions[key].append(one_line(field(record, "caption", str, where)).strip())
    for key, references in captions.items():
        if not references:
            raise InputError(f"{path}: image {key} has no caption.\nAdd one or remove the image.")
        yield key, images[key], references


def read_karpathy(path: Path, split: str) -> list[tuple[Any, str, list[str]]]:
    """(id, place, references) of each image of a split: `cocoid` and `filepath/filename` for COCO, `imgid` and the file
    name for Flickr30k."""
    found: list[tuple[Any, str, list[str]]] = []
    splits = []
    for place, record in enumerate(field(read_json(path), "images", list, str(path))):
        where = f"{path}, image {place}"
        splits.append(field(record, "split", str, where))
        if splits[-1] != split:
            continue
        name = field(record, "filename", str, where)
        sentences = field(record, "sentences", list, f"{where} ({name})")
        references = [one_line(field(s, "raw", str, f"{where} ({name})")).strip() for s in sentences]
        if not references:
            raise InputError(f"{where} ({name}): no sentences.\nAdd a caption or remove the image.")
        file = f"{record['filepath']}/{name}" if "filepath" in record else name
        found.append((record.get("cocoid", record.get("imgid")), file, references))
    if not found:
        known = ", ".join(dict.fromkeys(splits)) or "none"
        raise InputError(f"{path}: no image of split '{split}'.\nUse Karpathy's file, unchanged; its splits: {known}.")
    return found


def read_tokens(path: Path, ids: Path | None = None) -> list[tuple[Any, str, list[str]]]:
    """(None, file name, references) of each image of Flickr30k's token file, lines of NAME.jpg#K, tab, caption; only
    those whose number is a line of the file `ids`, where one is given."""
    captions: dict[str, list[str]] = {}
    for place, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            name, tab, caption = line.partition("\t")
            if not tab or "#" not in name:
                raise InputError(f"{path}, line {place}: not 'NAME.jpg#K<TAB>caption'.\nUse the official file.")
            captions.setdefault(name.rpartition("#")[0], []).append(one_line(caption).strip())
    if ids is None:
        return [(None, name, references) for name, references in captions.items()]
    wanted = dict.fromkeys(line.strip().removesuffix(".jpg") for line in read_text(ids).split("\n") if line.strip())
    for number in wanted:
        if f"{number}.jpg" not in captions:
            raise InputError(f"{ids}: image {number} has no caption in {path.name}.\nUse matching files.")
    return [(None, f"{number}.jpg", captions[f"{number}.jpg"]) for number in wanted]


def _coco_id(row: dict[str, Any], name: str) -> str:
    number = row.get("cocoid") or Path(name).stem.rpartition("_")[2]
    return str(int(number)) if str(number).isdecimal() else name


def _flickr_id(row: dict[str, Any], name: str) -> str:
    return name


def _rows(path: Path, images: Sequence[Path], key: Callable[[dict[str, Any], str], str]) -> Iterator[Item]:
    """Rows with a list of captions under `answer`, `sentences` or `caption`, and a file name or COCO's question_id."""
    for where, row in read_rows(path):
        name = field(row, "filename" if "filename" in row else "question_id", str, where)
        name += "" if Path(name).suffix else ".jpg"
        own = next((kind for kind in ("answer", "sentences", "caption") if kind in row), "answer")
        given = field(row, own, list, where)
        if not given or not all(isinstance(caption, str) for caption in given):
            raise InputError(f"{where}: field '{own}' is not a list of captions.\nUse the data set's rows, unchanged.")
        references = [one_line(caption).strip() for caption in given]
        yield Item(key(row, name), stored_image(row, name, images, where), PROMPT, references)


def join(
    predictions: Sequence[Path], annotations: Sequence[Path], split: str | None = None, allow_missing: bool = False
) -> Joined:
    """A results file, a list of {image_id, caption}, joined to COCO's captions, Karpathy's file (its `split`, by
    default test) or Flickr30k's token file with, perhaps, a file of ids. On Flickr30k image_id is the file name, its
    number, or Karpathy's imgid. InputError for missing, extra or repeated ids, for ids or captions of another type,
    and where pycocoevalcap is missing."""
    caption_scores.need_library()
    if len(predictions) != 1:
        raise InputError(f"{len(predictions)} files of predictions, not 1.\nGive --predictions once.")
    given: dict[Any, str] = {}
    for where, record in read_list(predictions[0]):
        key = field(record, "image_id", (int, str), where)
        add_prediction(given, key, field(record, "caption", str, f"{where} (image_id {key})"), "image_id", where)
    found, coco = _references(annotations, split)
    items = [Item(str(key if key is not None else name), None, PROMPT, r) for key, name, r in found]
    schemes = [[key for key, _, _ in found]]
    if not coco:
        names = [Path(name) for _, name, _ in found]
        numbers = [int(name.stem) if name.stem.isdecimal() else name.stem for name in names]
        schemes = [[name.name for name in names], numbers, [name.stem for name in names], *schemes]
    keys = next((keys for keys in schemes if set(given) <= set(keys)), schemes[0])
    strange = next((key for key in given if isinstance(key, str)), None)
    if strange is not None and strange not in keys and strange.isdecimal():
        raise InputError(
            f"{predictions[0]}: image_id is the text {strange!r}.\nWrite it as a number, as the official files do."
        )
    return joined(items, given, keys, predictions[0], by="image_id", allow_missing=allow_missing)


def _references(annotations: Sequence[Path], split: str | None) -> tuple[list[tuple[Any, str, list[str]]], bool]:
    """(id, file name, references) of the images, and whether the ids are COCO's."""
    lists = [path for path in annotations if path.suffix == ".txt"]
    files = [path for path in annotations if path.suffix != ".txt"]
    if len(files) != 1 or len(lists) > 1:
        raise InputError(
            f"{len(annotations)} files of annotations.\nGive one (a token file also with its list of ids)."
        )
    path = files[0]
    if path.suffix == ".token":
        return read_tokens(path, lists[0] if lists else None), False
    content = read_json(path)
    if "annotations" in content:
        if split is not None:
            raise InputError(f"{path} holds one split.\nGive the file of split '{split}', without --split.")
        found = list(read_coco(path))
        if not found:
            raise InputError(f"{path}: holds no image.\nUse the official file.")
        return found, True
    karpathy = read_karpathy(path, split or "test")
    return karpathy, content.get("dataset") != "flickr30k" and any("/" in place for _, place, _ in karpathy)


def measure(
    items: Sequence[Item],
    answers: Sequence[str],
    rules: Rules = "official",
    *,
    java: bool | None = None,
    meteor: bool = False,
) -> Measured:
    """`CIDEr`, `Bleu_1` to `Bleu_4`, `ROUGE_L`, `words` (mean length of the captions given) and, if asked for and there
    is Java, `METEOR`; the headline `score` is ROUGE_L. Without pycocoevalcap there are ROUGE_L and words only, and
    `missing` says so. `java` as in `tokenize`.

    N and document frequencies of CIDEr are those of the references given here; a corpus of one image has CIDEr 0 (every
    idf is log 1), nothing to score gives 0.0 everywhere."""
    check_rules(rules)
    pairs = list(paired(items, answers))
    java = caption_scores.has_java() if java is None else java
    tokens = iter(caption_scores.tokenize([text for item, answer in pairs for text in (answer, *item.answer)], java))
    cut = [(next(tokens), [next(tokens) for _ in item.answer]) for item, _ in pairs]
    candidates, references = [own for own, _ in cut], [others for _, others in cut]
    rows = caption_scores.statistics(candidates, references)
    complete = caption_scores.library() is not None

    def figures(totals: Any) -> dict[str, Any]:
        found = caption_scores.figures(totals)
        kept = found if complete else {name: found[name] for name in ("ROUGE_L", "words")}
        return {"score": found["ROUGE_L"]} | kept

    units = [item.unit for item, _ in pairs]
    statistics = Statistics.gather(units, [""] * len(pairs), rows, caption_scores.COLUMNS, figures)
    scores: dict[str, Any] = dict(statistics.totals())
    value = caption_scores.meteor(candidates, references) if meteor else None
    if value is not None:
        scores["METEOR"] = value
    if not complete:
        scores["missing"] = "CIDEr and BLEU: pip install 'normtune[eval]'"
    tokenizer = "PTBTokenizer, Java" if java else "normtune's, without Java"
    return Measured({**scores, "tokenizer": tokenizer, "rules": rules}, statistics)
