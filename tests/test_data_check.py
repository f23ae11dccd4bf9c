"""`normtune data check` on files with every fault planted by hand, the policy for bad samples in training, and mutants.

Plan: a data file in which each fault occurs a known number of times, and every count, name and cut that comes back;
figures against the collator that trains; the command's exit codes; a training that leaves out what the check named;
thousands of mutated data files and images through loader, check and collator.
"""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from browser import SCHEMES, WIDTHS, chromium, opened
from command import run
from normtune.cli.data_report import page
from normtune.data import Collator, Mixture
from normtune.data.checking import Checker, Exam
from normtune.data.findings import DROPPED, FIRST, KINDS, Findings, judge, kind_of
from normtune.data.skipping import Skipped
from normtune.errors import InputError, JobError
from normtune.model import assemble
from normtune.recipe import DataSource, ModelRecipe, Stage
from normtune.tuned import processor_of
from toys import toy_data, toy_recipe

LIMIT = 100


def talk(*texts: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def swapped(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "conversations": item["conversations"][::-1]}


GOOD = [talk("<image>\nWhat is it?", f"It is {n}.", image=f"{n}.png", id=f"good{n}") for n in range(4)]
FAULTS: dict[str, list[Any]] = {
    "malformed": [3, {"id": "x"}, {"conversations": ["Q"]}],
    "unknown role": [{"conversations": [{"from": "robot", "value": "Q"}]}],
    "turns out of order": [swapped(talk("Q", "A")), talk("Q", "A", "Q")],
    "empty answer": [talk("Q", " ")],
    "empty question": [talk("", "A")],
    "<image> and images do not match": [talk("<image><image>", "A", image="0.png"), talk("<image>", "A")],
    "<image> in an answer": [talk("Q", "<image>", image="0.png")],
    "missing image": [talk("Q", "A", image="gone.png")],
    "image outside its folder": [talk("Q", "A", image="../x.png"), talk("Q", "A", image="link.png")],
    "image is an address": [talk("Q", "A", image="https://x.org/y.png")],
    "broken image": [talk("Q", "A", image="torn.jpg"), talk("Q", "A", image="text.png")],
    "huge image": [talk("Q", "A", image="bomb.png")],
    "nothing to learn": [talk("long " * LIMIT, "A")],
}
NOTES: dict[str, list[Any]] = {
    "duplicate": [talk("Is it the same?", "Yes."), talk("Is it the same?", "Yes."), talk("Is it the same?", "Yes.")],
    "image of the evaluation": [talk("Exam?", "A", image="exam.png")],
    "animated image": [talk("Moves?", "A", image="moving.gif")],
    "longer than the limit": [talk("One?", "answer " * LIMIT), talk("Q", "A", "Two?", "B " * LIMIT)],
    "image cut off": [talk("<image>Q", "A", "<image>and " + "long " * LIMIT, "B", images=["0.png", "1.png"])],
}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """images/ and data.json with GOOD, FAULTS and NOTES in it, exam.png beside it."""
    from test_security import png

    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(4):
        Image.new("RGB", (20 + n, 30), (60 * n, 0, 0)).save(folder / f"{n}.png")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 90).save(whole)
    (folder / "torn.jpg").write_bytes(whole.read_bytes()[:700])
    (folder / "text.png").write_text("no picture")
    (folder / "bomb.png").write_bytes(png(2**14, 2**14))
    (folder / "link.png").symlink_to("../whole.jpg")
    Image.new("RGB", (9, 9), "green").save(folder / "exam.png")
    shutil.copy(folder / "exam.png", tmp_path / "asked.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    items = [*GOOD, *(item for group in (*FAULTS.values(), *NOTES.values()) for item in group)]
    (tmp_path / "data.json").write_text(json.dumps(items))
    return tmp_path


@pytest.fixture(scope="module")
def processor(llm_folder: Path, vision_folder: Path) -> Any:
    return processor_of(ModelRecipe(llm=str(llm_folder), vision=str(vision_folder)))


def stage(folder: Path, name: str = "data.json", **changes: Any) -> Stage:
    source = DataSource(path=str(folder / name), images=str(folder / "images"))
    fields = {"name": "align", "strategy": "connector", "learning_rate": 1e-3, "max_length": LIMIT, "data": [source]}
    return Stage(**{**fields, **changes})


def test_the_processor_is_that_of_training(processor: Any, llm_folder: Path, vision_folder: Path) -> None:
    """It is put together without the LLM's weights, and makes the same tokens and pixels."""
    _, trained = assemble(llm_folder, vision_folder)
    image = Image.new("RGB", (40, 30), "red")
    ours, theirs = (p(text="USER: <image> Hello", images=[image]) for p in (processor, trained))
    assert ours["input_ids"] == theirs["input_ids"] and processor.chat_template == trained.chat_template
    assert (ours["pixel_values"][0] == theirs["pixel_values"][0]).all()
    assert processor.tokenizer.pad_token == trained.tokenizer.pad_token


def test_every_fault_is_counted_and_named(planted: Path, processor: Any) -> None:
    checker = Checker(processor, Exam([planted / "asked.png"]))
    found = checker.check(stage(planted))
    assert dict(found.faults) == {kind: len(items) for kind, items in FAULTS.items()}
    expected = {kind: len(items) for kind, items in NOTES.items()}
    expected |= {"duplicate": 2, "longer than the limit": 3}  # the first is no duplicate; a cut image is a cut sample
    assert dict(found.notes) == expected
    assert found.entries == len(GOOD) + sum(map(len, (*FAULTS.values(), *NOTES.values())))
    places = {kind: [where for where, _ in named] for kind, named in found.first.items()}
    at = len(GOOD)
    for kind, items in FAULTS.items():
        numbers = range(at + 1, at + len(items) + 1)
        assert [where.split(" (id")[0] for where in places[kind]] == [f"{planted}/data.json, item {n}" for n in numbers]
        at += len(items)
    why = found.first["image cut off"][0][1]
    assert why == "1 of its 2 images are cut off"
    assert "asked.png" in found.first["image of the evaluation"][0][1]
    assert found.first["duplicate"][0][1].endswith(f"item {at + 1}")
    assert json.loads(json.dumps(found.document()))["bad"] == sum(map(len, FAULTS.values())) == found.bad


def test_figures_are_those_of_training(planted: Path, processor: Any) -> None:
    """Tokens, supervised tokens and cuts of what is good, against the collator that opens and batches it."""
    found = Checker(processor).check(stage(planted))
    left: list[str] = []
    mixture = Mixture(stage(planted).data, on_bad=lambda where, why: left.append(where))
    collator = Collator(processor, LIMIT, on_bad=lambda where, why: left.append(where))
    rows = collator.encode(list(mixture))
    counts = collator.counts
    lost = counts["dropped"]  # rows of one token
    assert found.bad == len(left) + 1 and lost == counts["bad"] + 1
    assert found.tokens == counts["tokens"] - lost and found.supervised == counts["supervised"]
    dropped = 2  # turns of the sample of which nothing can be learned
    assert found.cut["turns"] == counts["cut_turns"] - dropped
    assert found.entries - found.bad == sum(any(row.supervised) for row in rows)
    assert sum(found.lengths.values()) == found.entries - found.bad + 1
    assert found.longest == max(len(row) for row in Collator(processor, None, on_bad=lambda *_: None).encode(mixture))


def test_rows_name_their_samples(planted: Path, processor: Any) -> None:
    mixture = Mixture(stage(planted).data, on_bad=lambda where, why: None)
    rows = Collator(processor, LIMIT, on_bad=lambda where, why: None).encode(list(mixture))
    assert [row.where for row in rows] == [sample.where for sample in mixture]


@pytest.mark.parametrize("kind", sorted({kind for _, kind in KINDS} | {"malformed"}))
def test_every_kind_is_planted(kind: str) -> None:
    assert kind in FAULTS or kind in ("no JSON", "no images folder")


def test_the_first_of_many_and_lengths() -> None:
    found = Findings("align", 64)
    for n in range(20):
        found.fault("broken image", f"item {n}", "torn")
    assert [where for where, _ in found.first["broken image"]] == [f"item {n}" for n in range(FIRST)]
    for tokens in (1, 2, 3, 4, 5, 64, 65):
        found.length(tokens)
    assert dict(found.lengths) == {1: 1, 2: 1, 4: 2, 8: 1, 64: 1, 128: 1} and found.longest == 65
    assert kind_of("f.json, item 3: something new") == "malformed"


@pytest.mark.parametrize(
    ("bad", "most", "too_many"),
    [(0, 0, False), (1, 0, True), (2, 2, False), (3, 2, True), (1, 0.01, False), (2, 0.01, True), (100, 1.0, True)],
)
def test_thresholds(bad: int, most: int | float, too_many: bool) -> None:
    def stages(numbers: range, kind: str) -> list[Findings]:
        found = [Findings("align", 64, entries=40), Findings("instruct", 64, entries=60)]
        for n in numbers:
            found[n >= 40].fault(kind, f"item {n}", "torn")
        return found

    spread = range(0, 100, 100 // max(1, bad))[:bad]  # over both stages: the bound is that of a training
    found = stages(spread, "broken image")
    assert judge(found, most) == ("a training would stop" if too_many else "")
    found[0].unreadable.append(("x.json", "torn"))
    assert judge(found, most)
    short = stages(spread, DROPPED)  # a training goes on with what it cannot learn from, but not with that alone
    assert judge(short, most) == ("" if not too_many else "a training would stop" if bad == 100 else "that is too many")


def test_a_sample_of_two_stages_counts_once(tmp_path: Path) -> None:
    found = [Findings("align", 64, entries=40), Findings("instruct", 64, entries=60)]
    for one in found:
        one.fault("broken image", "item 1", "torn")
    assert judge(found, 1) == "" and judge(found, 0)


@pytest.mark.parametrize(
    ("items", "weight", "why"),
    [([3, []], 1.0, "it holds no samples"), (GOOD, 0.01, r"weight 0\.01 of 4 samples leaves none")],
)
def test_what_a_mixture_refuses_is_found(
    planted: Path, processor: Any, items: list[Any], weight: float, why: str
) -> None:
    """Whatever the bound: such a file stops a training."""
    (planted / "none.json").write_text(json.dumps(items))
    none = DataSource(path=str(planted / "none.json"), images=str(planted / "images"), weight=weight)
    two = stage(planted, data=[*stage(planted).data, none])
    found = Checker(processor).check(two)
    assert re.fullmatch(why, found.unreadable[0][1]) and len(found.unreadable) == 1
    assert judge([found], 1.0) == "a training would stop"
    with pytest.raises(InputError, match=why):
        Mixture(two.data, on_bad=lambda where, why: None)


def test_what_comes_before_the_end_of_a_torn_file_counts(planted: Path, processor: Any) -> None:
    text = json.dumps(GOOD)
    (planted / "torn.json").write_text(text[: text.rindex("good3")])
    found = Checker(processor).check(stage(planted, "torn.json"))
    assert (found.entries, found.bad) == (3, 0)
    ((path, why),) = found.unreadable
    assert path.endswith("torn.json") and "no valid JSON" in why
    (planted / "torn.jsonl").write_text("\n".join(map(json.dumps, GOOD)) + '\n{"a": \n')
    found = Checker(processor).check(stage(planted, "torn.jsonl"))
    assert (found.entries, found.bad, dict(found.faults)) == (5, 1, {"no JSON": 1})


# --- the command


def write_recipe(folder: Path, llm: Path, vision: Path, items: Any = None, **changes: Any) -> Path:
    if items is not None:
        (folder / "data.json").write_text(json.dumps(items))
    recipe = toy_recipe(llm, vision, folder, **changes)
    recipe["stages"] = [{**recipe["stages"][0], "max_length": LIMIT}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_command(
    planted: Path, llm_folder: Path, vision_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = write_recipe(planted, llm_folder, vision_folder)
    shown = tmp_path / "check.html"
    assert run("data", "check", str(recipe), "--html", str(shown)) == 1
    out = capsys.readouterr().out
    for kind in (*FAULTS, *NOTES):
        assert kind in out or kind == "image of the evaluation"  # the recipe names none
    assert "a training would stop" in out and "item 5" in out
    html = shown.read_text()
    cards = html.split("<p class='tokens'>")[1:]
    assert unescape("".join(re.findall("<b>(.*?)</b>", cards[0]))) == "It is 0.<|im_end|>"
    assert "<span>&lt;image&gt; x 16 </span>" in cards[0] and len(cards) == 12
    assert "<script" not in html
    assert run("data", "check", str(recipe), "--max-bad", "0.9", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] == [] and document["stages"][0]["bad"] == sum(map(len, FAULTS.values()))
    assert run("data", "check", str(recipe), "bad_samples=skip", "max_bad=0.9") == 0
    assert run("data", "check", str(recipe), "bad_samples=skip", "max_bad=3") == 1
    assert run("data", "check", str(recipe), "--max-bad", "many") == 2
    capsys.readouterr()
    assert run("data", "check", str(recipe), "stages.0.data.0.path=nowhere.json") == 1
    assert "UNREADABLE" in capsys.readouterr().out


@pytest.mark.heavy
def test_the_page_reads_well(planted: Path, processor: Any) -> None:
    """In Chromium, on a phone and on a desktop, light and dark: nothing too wide, nothing pale, nothing asked for."""
    checker = Checker(processor, shown=8)
    found = [checker.check(stage(planted))]
    path = planted / "check.html"
    path.write_text(page("toy", found, checker, 0).to_html())
    with chromium() as browser:
        for width in WIDTHS:
            for scheme in SCHEMES:
                with opened(browser, path, width, scheme) as seen:
                    assert seen.problems() == []


def test_command_on_good_data(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(toy_data(tmp_path / "toys", 8), llm_folder, vision_folder)
    assert run("data", "check", str(recipe)) == 0
    assert "0 of 8 samples are bad" in capsys.readouterr().out


# --- the policy in training


def test_ledger(tmp_path: Path) -> None:
    skipped = Skipped(0.1)
    skipped("f.json, item 3", "torn")
    skipped("f.json, item 3", "torn")  # the next epoch
    skipped.count(19)
    skipped.keep(tmp_path / "skipped.jsonl")
    skipped("f.json, item 4", "gone\nCheck it")
    with pytest.raises(JobError, match=r"3 samples of 20 cannot be used, and max_bad allows 2.*\nf.json, item 5"):
        skipped("f.json, item 5", "gone")
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines[0] == {"what": "f.json, item 3", "why": "torn"} and len(lines) == 3
    again = Skipped(5)
    again("f.json, item 3", "torn")
    again.keep(tmp_path / "skipped.jsonl")
    assert len(again.reasons) == 3 and len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3


def test_ledgers_of_several_processes_are_one(tmp_path: Path) -> None:
    """Each process opens other images: the bound is of all, and each sample is named once."""
    ledgers = [Skipped(3), Skipped(3)]
    for n, ledger in enumerate(ledgers):
        ledger("f.json, item 1", "empty")  # all read the file
        ledger.keep(tmp_path / ("skipped.1.jsonl" if n else "skipped.jsonl"))
    ledgers[0]("f.json, item 2", "torn")
    ledgers[1]("f.json, item 3", "torn")
    ledgers[1]("f.json, item 2", "torn")  # the next epoch gives it to the other one
    with pytest.raises(JobError, match=r"4 samples cannot be used, and max_bad allows 3.*\nf.json, item 4: torn\n"):
        ledgers[0]("f.json, item 4", "torn")
    lines = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert [json.loads(line)["what"][-1] for line in lines["skipped.jsonl"]] == ["1", "2", "4"]
    assert [json.loads(line)["what"][-1] for line in lines["skipped.1.jsonl"]] == ["3"]
    alone = Skipped(3)
    with pytest.raises(JobError, match=r"4 samples .*\n.*\n.* Once they are mended, remove .*skipped\*\.jsonl\."):
        alone.keep(tmp_path / "skipped.jsonl")


def spoiled(folder: Path) -> list[dict[str, Any]]:
    """A sample of which no image opens, one whose answer is empty, in the toys' data."""
    items = json.loads((toy_data(folder) / "data.json").read_text())
    (folder / "images" / "7.png").write_bytes(b"torn")
    items[11]["conversations"][1]["value"] = ""
    return items


def test_training_leaves_out_what_is_bad(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "toys"
    items = spoiled(folder)
    recipe = write_recipe(folder, llm_folder, vision_folder, items, bad_samples="skip", max_bad=0.1)
    assert run("train", str(recipe), "--out", str(tmp_path / "run")) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {line["what"].partition("item ")[2] for line in lines} == {"8 (id '7')", "12 (id '11')"}
    assert all(line["why"] for line in lines)
    assert run("data", "check", str(recipe)) == 0


@pytest.mark.parametrize(
    ("policy", "message"), [({}, "item "), ({"bad_samples": "skip", "max_bad": 1}, "max_bad allows 1")]
)
def test_training_stops(
    llm_folder: Path,
    vision_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    policy: dict[str, Any],
    message: str,
) -> None:
    folder = tmp_path / "toys"
    recipe = write_recipe(folder, llm_folder, vision_folder, spoiled(folder), **policy)
    assert run("train", str(recipe), "--out", str(tmp_path / "run")) != 0
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert run("data", "check", str(recipe)) == 1


def test_broken_images_are_errors_without_a_policy(planted: Path, processor: Any) -> None:
    mixture = Mixture(stage(planted).data, on_bad=lambda where, why: None)
    bad = next(sample for sample in mixture if sample.images and sample.images[0].name == "torn.jpg")
    with pytest.raises(InputError, match=r"item \d+: image .*torn\.jpg cannot be read"):
        Collator(processor, LIMIT).encode([bad])
