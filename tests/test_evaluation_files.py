"""Evaluation into files: interruptions, official predictions, comparisons, likelihoods, ties, wrong input."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import evaluation as benchmark

from asked import IMAGES, picture, write_benchmarks
from command import run
from normtune.adapter import save_adapter
from normtune.chat import Chat, Turn
from normtune.errors import InputError, JobError
from normtune.evaluation import (
    Settings,
    answering,
    ask,
    engines,
    evaluate_into,
    evaluate_model,
    journal,
    prefixes,
    questions,
    read_measured,
)
from normtune.evaluation.formats import Predictions
from normtune.evaluation.journal import Given
from normtune.evaluation.questions import Asked
from normtune.images import open_image
from normtune.model import load
from normtune.strategy import apply
from normtune.tasks import RULES, TASKS, Rules, caption_scores, mme

pytestmark = pytest.mark.heavy

FIVE = "pope,mme,vqav2,coco,flickr30k,text"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pair(mllm_folder: Path) -> Any:
    return load(mllm_folder)


def into(target: Path, pair: Any, data: Path, names: str = "pope", **options: Any) -> dict[str, Any]:
    own = {key: options.pop(key) for key in ("batch_size", "against", "progress") if key in options}
    return evaluate_into(target, *pair, Settings(tuple(names.split(",")), **options), data, **own)


def lasting(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "time"}


def written(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- interruptions -----------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from normtune.cli import main
from normtune.evaluation.journal import Journal
left, when, log = int(sys.argv[1]), sys.argv[2], open(sys.argv[3], "a")
add = Journal.add
def counted(self, name, batch):
    global left
    print(*(f"{name}:{self.items[name][place].id}" for place, _ in batch), file=log, flush=True)
    left -= 1
    if not left and when == "before": os.kill(os.getpid(), signal.SIGKILL)
    add(self, name, batch)
    if not left: os.kill(os.getpid(), signal.SIGKILL)
Journal.add = counted
main(sys.argv[4:])
"""


@pytest.mark.heavy
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_as_never_killed(
    when: str, mllm_folder: Path, pair: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a batch is answered, before or after it is in the journal: only that batch can be answered twice."""
    size, log = 5, tmp_path / "log"
    words = ["evaluate", str(mllm_folder), "--benchmarks", FIVE, "--data", str(data), "--batch-size", str(size)]
    child = [sys.executable, "-c", CHILD, "7", when, str(log), *words, "--out", str(tmp_path / "cut" / "r.json")]
    killed = subprocess.run(child, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "cut" / "r.json").exists()
    add = journal.Journal.add

    def counted(self: Any, name: str, batch: Any) -> None:
        with log.open("a") as file:
            print(*(f"{name}:{self.items[name][place].id}" for place, _ in batch), file=file)
        add(self, name, batch)

    monkeypatch.setattr(journal.Journal, "add", counted)
    assert run(*words, "--out", str(tmp_path / "cut" / "r.json")) == 0
    answered = Counter(log.read_text().split())
    monkeypatch.undo()
    assert run(*words, "--out", str(tmp_path / "whole" / "r.json")) == 0
    twice = [key for key, times in answered.items() if times > 1]
    assert max(answered.values()) <= 2
    assert 0 < len(twice) <= size if when == "before" else not twice
    assert len(answered) == sum(len(TASKS[name].load(data)) for name in FIVE.split(","))
    documents = [json.loads((tmp_path / name / "r.json").read_text()) for name in ("cut", "whole")]
    assert lasting(documents[0]) == lasting(documents[1])
    assert written(tmp_path / "cut" / "r") == written(tmp_path / "whole" / "r")


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_line_costs_its_batch_alone(cut: int, pair: Any, data: Path, tmp_path: Path) -> None:
    whole = into(tmp_path / "r.json", pair, data, batch_size=4)
    path = tmp_path / "r" / "journal.jsonl"
    full = path.read_bytes()
    path.write_bytes(full[:-cut])
    asked: list[int] = []
    again = into(tmp_path / "r.json", pair, data, batch_size=4, progress=lambda name, done, of: asked.append(done))
    assert asked == [24] and path.read_bytes() == full and lasting(again) == lasting(whole)


def test_another_batch_size_goes_on_too(pair: Any, data: Path, tmp_path: Path) -> None:
    whole = into(tmp_path / "whole.json", pair, data, batch_size=24)
    into(tmp_path / "r.json", pair, data, batch_size=4)
    path = tmp_path / "r" / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    asked: list[int] = []
    again = into(tmp_path / "r.json", pair, data, batch_size=24, progress=lambda name, done, of: asked.append(done))
    assert asked == [24] and again["scores"] == whole["scores"]


def test_a_finished_evaluation_asks_nothing(pair: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = into(tmp_path / "r.json", pair, data)
    monkeypatch.setattr(type(pair[0]), "generate", lambda *a, **k: pytest.fail("asked again"))
    assert lasting(into(tmp_path / "r.json", pair, data)) == lasting(first)


def test_answers_under_other_settings_are_not_mixed(pair: Any, data: Path, tmp_path: Path) -> None:
    into(tmp_path / "r.json", pair, data, limit=4)
    before = written(tmp_path)
    gain = pair[0].model.language_model.layers[0].input_layernorm.weight
    changes: dict[str, Any] = {
        "limit (4 then, 8 now)": {"limit": 8},
        "rules": {"rules": "lmms-eval"},
        "mode ('generate' then": {"mode": "likelihood"},
        "baseline": {"baseline": "blind"},
        "split": {"split": {"pope": "popular"}},
        "benchmarks": {"names": "pope,text"},
    }
    for words, options in changes.items():
        with pytest.raises(InputError, match="other settings") as error:
            into(tmp_path / "r.json", pair, data, **{"limit": 4, **options})
        assert words in str(error.value)
    gain.data[0] += 1
    try:
        with pytest.raises(InputError, match="these differ: model"):
            into(tmp_path / "r.json", pair, data, limit=4)
    finally:
        gain.data[0] -= 1
    other = write_benchmarks(tmp_path / "other")
    path = other / "pope" / "coco_pope_random.json"
    path.write_text(path.read_text().replace("Is thing", "Was thing"))
    with pytest.raises(InputError, match="these differ: questions"):
        into(tmp_path / "r.json", pair, other, limit=4)
    assert {name: text for name, text in written(tmp_path).items() if not name.startswith("other/")} == before


@pytest.mark.parametrize("what", ["pixels", "image tokens", "tokens"])
def test_answers_after_other_preprocessing_are_not_mixed(
    what: str, mllm_folder: Path, data: Path, tmp_path: Path
) -> None:
    pair = load(mllm_folder)
    into(tmp_path / "r.json", pair, data, limit=4)
    into(tmp_path / "r.json", load(mllm_folder), data, limit=4)  # loaded again it is the same
    before = written(tmp_path)
    processor = pair[1]
    if what == "pixels":
        processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    elif what == "image tokens":
        processor.vision_feature_select_strategy = "full"
    else:
        processor.tokenizer.add_tokens(["thing"])
    with pytest.raises(InputError, match="these differ: preprocessing"):
        into(tmp_path / "r.json", pair, data, limit=4)
    assert written(tmp_path) == before


def test_two_evaluations_do_not_write_into_one_folder(pair: Any, data: Path, tmp_path: Path) -> None:
    def second(name: str, done: int, total: int) -> None:
        with pytest.raises(InputError, match="being written by another evaluation"):
            into(tmp_path / "r.json", pair, data)

    assert into(tmp_path / "r.json", pair, data, progress=second)["scores"]["pope"]["n"] == 24


def test_a_file_that_is_no_journal_is_left_alone(pair: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "journal.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="not a journal of this version"):
        into(tmp_path / "r.json", pair, data)
    assert (tmp_path / "r" / "journal.jsonl").read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize(
    "content", ["my notes\n", "[" * 100_000 + "\n", "my notes", '{"mine": 1}', "[1]\n{}", '{"format": 1}\n\x00\x00\n']
)
def test_foreign_files_keep_their_bytes(content: str, pair: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "journal.jsonl").write_text(content)
    with pytest.raises(InputError, match="journal"):
        into(tmp_path / "r.json", pair, data)
    assert written(tmp_path) == {"r/journal.jsonl": content.encode()}


def test_a_damaged_line_amid_the_journal_is_named(pair: Any, data: Path, tmp_path: Path) -> None:
    into(tmp_path / "r.json", pair, data, batch_size=4)
    path = tmp_path / "r" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    harmed = b"".join([*lines[:3], b"\x00" * 20 + b"\n", *lines[4:]])
    path.write_bytes(harmed)
    for options in ({}, {"against": tmp_path / "r.json"}):
        with pytest.raises(InputError, match="line 4 is damaged"):
            into(tmp_path / "r.json", pair, data, **options)
    assert path.read_bytes() == harmed


@pytest.mark.parametrize(
    "line", ["{}", '{"benchmark": "pope", "answers": 3}', '{"benchmark": "pope", "answers": [{}]}']
)
def test_against_a_journal_with_other_records(line: str, pair: Any, data: Path, tmp_path: Path) -> None:
    into(tmp_path / "r.json", pair, data, limit=4)
    path = tmp_path / "r" / "journal.jsonl"
    path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        into(tmp_path / "s.json", pair, data, limit=4, against=tmp_path / "r.json")


@pytest.mark.parametrize("kept", [0, 1, 30, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_torn_first_line_is_written_anew(kept: int, pair: Any, data: Path, tmp_path: Path) -> None:
    whole = into(tmp_path / "r.json", pair, data, limit=4)
    path = tmp_path / "r" / "journal.jsonl"
    full = path.read_bytes()
    path.write_bytes(full.splitlines(keepends=True)[0][:kept])
    assert lasting(into(tmp_path / "r.json", pair, data, limit=4)) == lasting(whole) and path.read_bytes() == full


def test_a_file_of_something_else_is_not_overwritten(pair: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(InputError, match="exists already"):
        into(tmp_path / "r.json", pair, data)
    assert (tmp_path / "r.json").read_text() == "{}"


# ---- what is written ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_normtune_score_reads_the_predictions(
    pair: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(caption_scores, "has_java", lambda: False)  # METEOR takes its time
    scores = into(tmp_path / "r.json", pair, data, "pope,mme,vqav2,coco,flickr30k", batch_size=3)["scores"]
    files = {
        "pope": (".", data / "pope"),
        "mme": (".", data / "mme"),
        "vqav2": ("results.json", data / "vqav2" / "v2_mscoco_val2014_annotations.json"),
        "coco": ("results.json", data / "coco" / "captions_val2014.json"),
        "flickr30k": ("results.json", data / "flickr30k" / "dataset_flickr30k.json"),
    }
    for name, (predictions, truth) in files.items():
        words = ["--predictions", str(tmp_path / "r" / name / predictions), "--annotations", str(truth), "--json"]
        assert run("score", name, *words) == 0, name
        found = json.loads(capsys.readouterr().out)
        own = {key: value for key, value in scores[name].items() if key not in ("ties", "baseline", "n", "intervals")}
        assert {key: found[key] for key in own} == json.loads(json.dumps(own)), name


def test_predictions_are_in_the_official_order(pair: Any, data: Path, tmp_path: Path) -> None:
    """POPE's program pairs lines by position, MME's by twos; batches are in another order."""
    into(tmp_path / "r.json", pair, data, "pope,mme", batch_size=3)
    for split in ("random", "popular", "adversarial"):
        lines = (tmp_path / "r" / "pope" / f"coco_pope_{split}.jsonl").read_text().splitlines()
        labels = (data / "pope" / f"coco_pope_{split}.json").read_text().splitlines()
        ours, theirs = ([json.loads(line) for line in part] for part in (lines, labels))
        assert [(x["question_id"], x["question"]) for x in ours] == [(x["question_id"], x["text"]) for x in theirs]
    rows = [line.split("\t") for line in (tmp_path / "r" / "mme" / "count.txt").read_text().splitlines()]
    assert [(row[0], row[2]) for row in rows] == [(f"{n}.png", label) for n in range(2) for label in ("Yes", "No")]


def test_predictions_grow_with_the_answers(pair: Any, data: Path, tmp_path: Path) -> None:
    sizes: list[int] = []

    def look(name: str, done: int, total: int) -> None:
        found = json.loads((tmp_path / "r" / "vqav2" / "results.json").read_text())
        sizes.append(len({record["question_id"] for record in found}))

    into(tmp_path / "r.json", pair, data, "vqav2", batch_size=3, progress=look)
    assert sizes == [3, 6, 8]


@pytest.mark.parametrize(
    "text, line",
    [
        ("a\tb", "a b"),
        ("yes\nno", "yes no"),
        ("a\u2028b\r\nc", "a b  c"),
        ("", ""),
        ("No", "No"),
        ("\n\nNo\n", "  No "),
    ],
)
def test_a_response_cannot_break_mmes_lines(text: str, line: str, data: Path) -> None:
    from normtune.evaluation.formats import ROWS

    item = TASKS["mme"].load(data)[0]
    name, row = ROWS["mme"](item, text)
    assert name == "existence.txt" and row.split("\t")[3] == line and len(row.split("\t")) == 4


@pytest.mark.parametrize("rules", RULES)
def test_mmes_file_scores_as_the_answers_do(rules: Rules, data: Path, tmp_path: Path) -> None:
    """Also where white space decides whether a yes is among the first four characters."""
    breaks = [chr(code) for code in range(sys.maxunicode + 1) if len(f"a{chr(code)}b".splitlines()) > 1]
    spaces = [*breaks, "\t", "\r\n"]
    before = [f"{space * count}Yes." for space in spaces for count in (1, 2, 3)]
    texts = [*before, *(f"n{space}yes" for space in spaces), *(f"Y{space}" for space in spaces)]
    (item,) = TASKS["mme"].load(data, "count")[:1]
    items = [replace(item, id=f"count/{k // 2}.png/{k % 2}", image=Path(f"{k // 2}.png")) for k in range(len(texts))]
    items = [replace(one, question=f"Is it {k}?") for k, one in enumerate(items)]
    assert len(texts) % 2 == 0
    given = Given(len(texts))
    for place, text in enumerate(texts):
        given.put(place, text, False)
    Predictions(tmp_path, Asked("mme", items, [None] * len(items)), given)
    found = mme.join([tmp_path], [], split="count")
    assert mme.measure(found.items, found.answers, rules).scores == mme.measure(items, texts, rules).scores


def test_score_takes_the_files_of_llavas_questions(data: Path, tmp_path: Path) -> None:
    official = TASKS["mme"].load(data, "count")
    records = [
        {
            "question_id": item.id,
            "category": "count",
            "image": f"count/{item.image and item.image.name}",
            "text": item.question.replace(
                " Please answer yes or no.", "\nAnswer the question using a single word or phrase."
            ),
        }
        for item in official
    ]
    shutil.copytree(data / "mme" / "count", tmp_path / "data" / "mme" / "count")
    path = tmp_path / "data" / "mme" / "llava_mme.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    items = TASKS["mme"].load(tmp_path / "data")
    assert all("single word" in item.question for item in items) and len(items) == len(official)
    given = Given(len(items))
    for place, item in enumerate(items):
        given.put(place, item.answer, False)
    Predictions(tmp_path / "out", Asked("mme", items, [None] * len(items)), given)
    found = mme.join([tmp_path / "out"], [data / "mme"], split="count")
    assert mme.measure(found.items, found.answers).scores["score"] == 1


def test_the_document_says_what_it_depends_on(pair: Any, data: Path, tmp_path: Path) -> None:
    document = into(tmp_path / "r.json", pair, data, "pope,coco", limit=8, baseline="shuffled")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(document))
    assert document["settings"]["limit"] == 8 and document["settings"]["baseline"] == "shuffled"
    assert document["generation"]["max_new_tokens"] == {"pope": 128, "coco": 64}
    assert "<|im_end|>" in document["generation"]["stop_tokens"]
    files = document["data"]["pope"]["files"]
    assert sorted(files) == [f"pope/coco_pope_{split}.json" for split in ("adversarial", "popular", "random")]
    assert document["model"]["dtype"] == "float32" and len(document["model"]["fingerprint"]) == 64
    assert {"torch", "transformers", "normtune", "numpy", "pillow"} <= document["versions"].keys()
    assert ("pycocoevalcap" in document["versions"]) == bool(importlib.util.find_spec("pycocoevalcap"))
    assert document["preprocessing"]["vocabulary"] == len(pair[1].tokenizer)
    assert document["device"] == "cpu" and document["threads"] >= 1 and document["time"]["seconds"] > 0
    for facts in document["scores"].values():
        low, high = facts["intervals"]["score"]
        assert low <= facts["score"] <= high
    assert "predictions" not in document["scores"]["pope"]


def test_fingerprint_knows_any_training(pair: Any) -> None:
    from normtune.evaluation.results import fingerprint

    model, before = pair[0], fingerprint(pair[0])
    assert fingerprint(load(pair[0].name_or_path)[0]) == before
    for parameter in (model.model.multi_modal_projector.linear_1.bias, model.lm_head.weight):
        kept = parameter.data.clone()
        parameter.data *= 1.01
        assert fingerprint(model) != before
        parameter.data = kept
    assert fingerprint(model) == before


# ---- comparisons -------------------------------------------------------------------------------------------


def test_a_gate_is_said_to_be_left_out(
    mllm_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load(mllm_folder)
    apply(model, "layernorm-simple")
    base = {"model": {"path": str(mllm_folder)}, "seed": 0}
    for gate, said in (("image", True), ("none", False)):
        folder = save_adapter(model, tmp_path / gate, base=base, gate=gate)
        words = ["--benchmarks", "pope", "--data", str(data), "--limit", "2", "--out", str(tmp_path / f"{gate}.json")]
        assert run("evaluate", str(folder), *words) == 0
        assert ("gate is left out of account" in capsys.readouterr().err) == said


def test_against_itself_nothing_differs(pair: Any, data: Path, tmp_path: Path) -> None:
    into(tmp_path / "a.json", pair, data, "pope,mme")
    found = into(tmp_path / "b.json", pair, data, "pope,mme,vqav2", against=tmp_path / "a.json")["against"]
    assert found["differences"]["vqav2"] is None
    for name in ("pope", "mme"):
        for one in found["differences"][name].values():
            assert one == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_against_a_baseline(pair: Any, data: Path, tmp_path: Path) -> None:
    blind = into(tmp_path / "blind.json", pair, data, "coco", baseline="blind")["scores"]["coco"]
    ours = into(tmp_path / "r.json", pair, data, "coco", against=tmp_path / "blind.json")
    found = ours["against"]["differences"]["coco"]["words"]
    assert found["difference"] == pytest.approx(ours["scores"]["coco"]["words"] - blind["words"])
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]


@pytest.mark.parametrize("rules", ["official", "lmms-eval"])
def test_a_result_can_be_measured_again(rules: Any, pair: Any, data: Path, tmp_path: Path) -> None:
    settings = Settings(("pope", "mme", "vqav2", "coco", "text"), rules=rules)
    scores = evaluate_into(tmp_path / "r.json", *pair, settings, data)["scores"]
    found = read_measured(tmp_path / "r.json", ask(settings, data), rules)
    assert found.keys() == scores.keys()
    for name, measured in found.items():
        assert measured.with_intervals().items() <= scores[name].items() and len(measured.statistics.units)
    only = read_measured(tmp_path / "r.json", ask(Settings(("pope", "flickr30k")), data), rules)
    assert list(only) == ["pope"]


def test_against_needs_the_same_questions(pair: Any, data: Path, tmp_path: Path) -> None:
    into(tmp_path / "a.json", pair, data, limit=4)
    into(tmp_path / "text.json", pair, data, "text")
    (tmp_path / "plain.json").write_text("{}")
    wrong = {"a": "not about the same questions", "text": "has none of pope", "plain": "no result", "none": "no result"}
    for name, words in wrong.items():
        with pytest.raises(InputError, match=words):
            into(tmp_path / "b.json", pair, data, against=tmp_path / f"{name}.json")
    assert not (tmp_path / "b").exists()
    (tmp_path / "a" / "journal.jsonl").unlink()
    with pytest.raises(InputError, match="needs the answers"):
        into(tmp_path / "b.json", pair, data, limit=4, against=tmp_path / "a.json")


# ---- likelihood and ties -----------------------------------------------------------------------------------


def test_likelihoods_are_the_models(pair: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair
    monkeypatch.setitem(prefixes._shares, model, False)
    widths: list[tuple[int, ...]] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: widths.append(tuple(args[0].shape[:2])))
    try:
        document = into(tmp_path / "r.json", pair, data, mode="likelihood", batch_size=5)
    finally:
        hook.remove()
    assert widths == [(5, 1)] * 4 + [(4, 1)]  # one pass a batch, the head on the last position alone
    records = {}
    for line in (tmp_path / "r" / "journal.jsonl").read_text().splitlines()[1:]:
        records |= {record["id"]: record for record in json.loads(line)["answers"]}
    tokens = [processor.tokenizer.encode(text, add_special_tokens=False) for text in ("Yes", "No")]
    assert len(set(map(tuple, tokens))) == 2
    for item in TASKS["pope"].load(data)[:6]:
        text = processor.apply_chat_template(
            [{"role": "user", "content": f"<image>\n{item.question}"}], add_generation_prompt=True, tokenize=False
        )
        assert item.image is not None
        image = open_image(item.image, "")
        inputs = processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            logs = model(**inputs).logits[0, -1].log_softmax(-1)
        wanted = [float(logs[ids[0]]) for ids in tokens]
        assert records[item.id]["log_probabilities"] == pytest.approx(wanted, abs=1e-4)
        assert records[item.id]["answer"] == ("Yes" if wanted[0] > wanted[1] else "No")
    assert document["generation"]["method"] == "log P of Yes and No"
    header = json.loads((tmp_path / "r" / "journal.jsonl").read_text().splitlines()[0])
    assert "max_new_tokens" not in document["generation"] and "max_new_tokens" not in header["settings"]


def test_choices_that_begin_alike_are_told_apart_later(pair: Any) -> None:
    """After a shared first token the prompt goes on with it; masks and kinds of tokens, too."""
    chat = Chat.from_processor(pair[1])
    real = chat.encode

    class Alike:
        prompt = staticmethod(chat.prompt)

        @staticmethod
        def encode(turns: Any, images: Any) -> Any:
            return real([turns[0], Turn("assistant", {"Yes": "A red", "No": "A green"}[turns[1].text])], images)

    start, (first, second) = answering.choice_tokens(Alike())  # type: ignore[arg-type]
    assert start and first != second
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": ids, "pixel_values": ids[0]}
    longer = answering.continued(inputs, [3, 4])
    assert longer["input_ids"].tolist() == [[0, 5, 6, 3, 4], [7, 8, 9, 3, 4]]
    assert longer["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert longer["token_type_ids"][:, 3:].eq(0).all() and longer["pixel_values"] is inputs["pixel_values"]


def test_ties_are_reported(mllm_folder: Path, data: Path, tmp_path: Path) -> None:
    model, processor = load(mllm_folder)
    assert into(tmp_path / "a.json", (model, processor), data)["scores"]["pope"]["ties"]["count"] < 24
    with torch.no_grad():  # two rows of the head that always lead, and always by the same
        model.lm_head.weight[:] = 0
    found = into(tmp_path / "b.json", (model, processor), data)["scores"]["pope"]["ties"]
    assert found["count"] == 24 and len(found["ids"]) == 20 and found["ids"][0] == "random/0"


def test_margins_are_the_smallest_lead_up_to_the_end(pair: Any) -> None:
    model, processor = pair
    requests = [engines.Request((Turn("user", "How many" + " shapes" * k + "?"),), (), "") for k in range(3)]
    for batch in answering.generate(model, processor, requests, 6, 2):
        for place, found in batch:
            ids = Chat.from_processor(processor).prompt(requests[place].turns, [])
            leads = []
            with torch.inference_mode():
                for _ in range(6):
                    best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
                    leads.append(float(best.values[0] - best.values[1]))
                    ids = [*ids, int(best.indices[0])]
                    if ids[-1] in answering.stop_tokens(model, Chat.from_processor(processor)):
                        break
            assert found.margin == pytest.approx(min(leads), abs=1e-4)


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_and_images_live_for_a_window(pair: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is alive at once is bounded by batches, whatever the number of questions."""
    images: list[Any] = []
    requests: list[Any] = []
    most: list[int] = []

    def noted(make: Any, where: list[Any]) -> Any:
        def call(*arguments: Any) -> Any:
            found = make(*arguments)
            where.append(weakref.ref(found))
            return found

        return call

    monkeypatch.setattr(engines, "opened", noted(engines.opened, images))
    monkeypatch.setattr(questions, "Request", noted(engines.Request, requests))

    def look(name: str, done: int, total: int) -> None:
        most.extend(sum(ref() is not None for ref in kind) for kind in (images, requests))

    evaluate_model(*pair, ["pope"], data, batch_size=1, progress=look)
    assert len(most) == 2 * 24 and len(requests) >= 24 and max(most) <= engines.WINDOW + 1


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_the_questions(
    mllm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark as a program: memory of 100 and of 2,000 questions, and answers as those of plain transformers."""
    words = ["--run", str(mllm_folder), "--threads", "1", "--limit", "4", "--one-by-one", "4"]
    words += ["--counts", "100", "2000", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["evaluation", *words])
    benchmark.main()
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["memory"]["growth"] < 0.05, found
    rows = found["throughput"]["benchmarks"]
    compared = [row for name, row in rows.items() if name != "all"]
    assert len(compared) == 5 and all(row["answers_compared"] == 4 for row in compared)
    assert all(row["answers_that_differ"] == row["of_these_ties"] for row in compared)
    assert "growth" in capsys.readouterr().out


# ---- wrong input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--benchmarks", "popes"], ["'popes'", "'pope'"]),
        (["--baseline", "deaf"], ["baseline 'deaf'", "blind"]),
        (["--rules", "mine"], ["rules 'mine'", "lmms-eval"]),
        (["--mode", "likely"], ["mode 'likely'", "likelihood"]),
        (["--benchmarks", "coco", "--mode", "likelihood"], ["coco", "--mode generate"]),
        (["--split", "popula"], ["no split 'popula'", "'popular'"]),
        (["--split", "coco=val2014"], ["'coco' is not asked"]),
        (["--device", "tpu"], ["device tpu"]),
        (["--against", "nothing.json"], ["nothing.json"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--batch-size", "0"], ["batch-size"]),
    ],
)
def test_wrong_words_exit_2(
    words: list[str],
    message: list[str],
    mllm_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--benchmarks": "pope", "--data": str(data)} | dict(zip(words[::2], words[1::2], strict=True))
    assert run("evaluate", str(mllm_folder), *(word for pair in given.items() for word in pair)) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in message), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["notes.txt", "notes.txt/deeper/r.json", "notes.json", "x" * 300])
def test_out_where_nothing_can_be_written_exits_2(
    out: str, mllm_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    before = written(tmp_path)
    assert run("evaluate", str(mllm_folder), "--benchmarks", "pope", "--data", str(data), "--out", out) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and "another --out" in error and "free some space" not in error
    assert written(tmp_path) == before


@pytest.mark.parametrize(
    "code, kind", [(errno.EACCES, InputError), (errno.EROFS, InputError), (errno.ENOSPC, JobError)]
)
def test_a_full_disk_is_another_matter(
    code: int, kind: type[Exception], pair: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(kind, match=os.strerror(code)) as error:
        into(tmp_path / "r.json", pair, data)
    assert ("free some space" in str(error.value)) == (code == errno.ENOSPC)


FAULTS: dict[str, tuple[str, str, list[str]]] = {
    # name: (file, its new content, words of the message)
    "empty labels": ("pope/coco_pope_random.json", "", ["coco_pope_random.json"]),
    "no json": ("pope/coco_pope_random.json", "{oops\n", ["coco_pope_random.json, line 1"]),
    "no label": (
        "pope/coco_pope_random.json",
        '{"question_id": 1, "image": "x.jpg", "text": "?"}',
        ["line 1", "label"],
    ),
    "odd mme file": ("mme/count/0.txt", "Is it?\tYes\n", ["0.txt", "1 lines, not 2"]),
    "broken image": ("val2014/COCO_val2014_000000000001.jpg", "no image", ["item '", "000000000001.jpg", "Replace"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_exit_2_with_the_place(
    fault: str, mllm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, content, words = FAULTS[fault]
    data = write_benchmarks(tmp_path / "data")
    (data / path).write_text(content)
    name = "mme" if path.startswith("mme") else "pope"
    out = ["--out", str(tmp_path / "out")]
    assert run("evaluate", str(mllm_folder), "--benchmarks", name, "--data", str(data), *out) == 2
    error = capsys.readouterr().err
    message = error[error.index("normtune:") :]
    assert all(word in message for word in words) and 1 <= len(message.strip().splitlines()) <= 3, message
    if fault == "broken image":  # the same command goes on where it was
        picture(1).save(data / path)
        assert run("evaluate", str(mllm_folder), "--benchmarks", name, "--data", str(data), *out) == 0
        assert IMAGES == 4


def test_splits_by_benchmark(pair: Any, data: Path) -> None:
    found = evaluate_model(*pair, ["pope", "mme"], data, split={"pope": "popular", "mme": "count"})
    assert list(found["pope"]["splits"]) == ["popular"] and list(found["mme"]["subtasks"]) == ["count"]
    assert math.isclose(found["pope"]["mean_f1"], found["pope"]["splits"]["popular"]["f1"])
