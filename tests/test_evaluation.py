"""Evaluation: batching, shared image features, baselines, limits, and what is left as it was found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from asked import IMAGES, picture, write_benchmarks
from models import tiny_mllm
from normtune.chat import Chat, Turn
from normtune.errors import InputError
from normtune.evaluation import answer, answering, engines, evaluate_model, prefixes, select, shuffled_images
from normtune.evaluation.selection import images_shown
from normtune.tasks import TASKS, Item

BENCHMARKS = list(TASKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pair(mllm_folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    from normtune.model import load

    return load(mllm_folder)


def conversations() -> list[tuple[list[Turn], list[Image.Image]]]:
    """Prompts of many lengths about three images, one about none, one of two images and several turns."""
    pictures = [picture(n) for n in range(3)]
    asked = [([Turn("user", "<image>\nIs there" + " a red" * k + " circle?")], [pictures[k % 3]]) for k in range(9)]
    turns = [Turn("user", "<image><image>\nAlike?"), Turn("assistant", "Yes."), Turn("user", "Why?")]
    return [*asked, (turns, pictures[:2]), ([Turn("user", "How many shapes are there?")], [])]


# ---- answers -----------------------------------------------------------------------------------------------


def test_batches_do_not_change_answers(pair: Any) -> None:
    one_by_one = answer(*pair, conversations(), 12, batch_size=1)
    assert len(set(one_by_one)) > 3  # the model does look at its prompt
    for size in (2, 5, 64):
        assert answer(*pair, conversations(), 12, batch_size=size) == one_by_one


def test_answers_are_those_of_plain_transformers(pair: Any) -> None:
    model, processor = pair
    turns, pictures = conversations()[4]
    text = processor.apply_chat_template(
        [{"role": "user", "content": turns[0].text}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=text, images=pictures, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer(model, processor, conversations(), 12)[4] == expected


def test_shared_features_give_identical_logits(pair: Any) -> None:
    model, processor = pair
    engine = engines.Shared(model, processor, Chat.from_processor(processor))
    requests = [engines.Request(tuple(t), tuple(i), "") for t, i in conversations()]
    with torch.inference_mode():
        inputs = engine.inputs([inner for _, inner in engine.prepare(requests, 64)])
        shared = model(**inputs).logits
        del inputs["mm_encoder_outputs"]
        every = [image for request in requests for image in request.images]
        pixels = processor.image_processor(images=every, return_tensors="pt")["pixel_values"]
        direct = model(**inputs, pixel_values=pixels).logits
    assert torch.equal(shared, direct)


def test_engines_agree(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = answer(*pair, conversations()[:9], 12, batch_size=4)
    monkeypatch.setattr(engines, "takes_features", lambda *both: False)
    assert answer(*pair, conversations()[:9], 12, batch_size=4) == shared


def about_two_images() -> list[tuple[list[Turn], list[Image.Image]]]:
    pictures = [picture(n) for n in range(2)]
    return [([Turn("user", "<image>\nIs there" + " a red" * (k % 5) + "?")], [pictures[k // 6]]) for k in range(12)]


def asked_with(pair: Any, shares: bool | None, size: int = 5) -> tuple[list[tuple[str, float]], int]:
    """Answers with margins, and how many positions went through the LLM, the beginnings shared or not (None: tried)."""
    model, processor = pair
    prefixes._shares.pop(model, None)
    if shares is not None:
        prefixes._shares[model] = shares
    positions: list[int] = []

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        positions.append(kwargs["inputs_embeds"].shape[:2].numel())

    hook = model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    requests = [engines.Request(tuple(turns), tuple(images), "") for turns, images in about_two_images()]
    try:
        found = dict(answer for batch in answering.generate(model, processor, requests, 1, size) for answer in batch)
    finally:
        hook.remove()
    return [(found[n].text, found[n].margin) for n in range(12)], sum(positions)


def test_what_questions_share_is_run_once_a_batch(pair: Any) -> None:
    shared, fewer = asked_with(pair, True)
    apart, more = asked_with(pair, False)
    assert [text for text, _ in shared] == [text for text, _ in apart]
    assert [lead for _, lead in shared] == pytest.approx([lead for _, lead in apart], abs=1e-5)
    assert more - fewer >= (12 - 4) * 16  # three batches see four images of 16 tokens
    tried, _ = asked_with(pair, None)
    assert tried == shared and prefixes._shares[pair[0]]


@pytest.mark.parametrize("kind, options", [("mistral", {"sliding_window": 8}), ("gpt2", {}), ("qwen3", {})])
def test_models_are_tried_before_beginnings_are_shared(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    from normtune.model import load

    own = load(tiny_mllm(tmp_path / "mllm", kind=kind, **options))
    tried, _ = asked_with(own, None)
    assert prefixes._shares[own[0]] == (kind != "mistral")
    alone, _ = asked_with(own, False, size=1)
    assert [text for text, _ in tried] == [text for text, _ in alone]


def test_a_model_that_computes_otherwise_is_asked_as_usual(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prefixes._inputs

    def wrong(*arguments: Any) -> dict[str, Any]:
        inputs = real(*arguments)
        inputs["past_key_values"].layers[0].values *= 1.01
        return inputs

    monkeypatch.setattr(prefixes, "_inputs", wrong)
    asked_with(pair, None)
    assert prefixes._shares[pair[0]] is False
    prefixes._shares.pop(pair[0])


def test_an_image_is_opened_and_encoded_once(pair: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    encoded: list[int] = []
    real_open, real_features = engines.open_image, type(pair[0]).get_image_features

    def count_open(path: Path, where: str) -> Image.Image:
        opened[path.name] += 1
        return real_open(path, where)

    def count_features(self: Any, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        encoded.append(len(pixel_values))
        return real_features(self, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(engines, "open_image", count_open)
    monkeypatch.setattr(type(pair[0]), "get_image_features", count_features)
    evaluate_model(*pair, ["pope"], data)
    assert set(opened.values()) == {1} and len(opened) == IMAGES and encoded == [IMAGES]


def test_bfloat16(mllm_folder: Path) -> None:
    from normtune.model import load

    assert len(answer(*load(mllm_folder, "bfloat16"), conversations(), 4)) == len(conversations())


def test_stops_at_the_models_own_stop_tokens_too(pair: Any) -> None:
    model, processor = pair
    asked = [([Turn("user", "How many shapes are there?")], [])]
    (plain,) = answer(model, processor, asked, 12)
    ids = processor.tokenizer.encode(plain, add_special_tokens=False)
    before, settings = model.generation_config.eos_token_id, model.generation_config
    settings.eos_token_id = [*(before if isinstance(before, list) else [before]), ids[-1]]
    try:
        (shorter,) = answer(model, processor, asked, 12)
    finally:
        settings.eos_token_id = before
    assert len(shorter) < len(plain) and plain.startswith(shorter)


@pytest.mark.parametrize("images", [0, 2])
def test_images_must_match_their_places(pair: Any, images: int) -> None:
    with pytest.raises(InputError, match="item 0: 1 '<image>' in the text for"):
        answer(*pair, [([Turn("user", "<image>\nWhat?")], [picture(0)] * images)])


# ---- the model is left as it was ---------------------------------------------------------------------------


def test_modes_settings_and_random_state_are_kept(pair: Any) -> None:
    model, processor = pair
    plain = answer(model, processor, conversations(), 8)
    settings = model.generation_config
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    state, side = torch.get_rng_state(), processor.tokenizer.padding_side
    settings.repetition_penalty, settings.max_length = 5.0, 7
    try:
        assert answer(model, processor, conversations(), 8) == plain  # the penalty is not obeyed
        assert model.generation_config is settings and settings.repetition_penalty == 5.0
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state) and processor.tokenizer.padding_side == side
        assert all(p.requires_grad for p in model.parameters())
    finally:
        settings.repetition_penalty = settings.max_length = None
        model.eval()


def test_modes_are_restored_after_an_error(pair: Any, tmp_path: Path) -> None:
    model, processor = pair
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    model.train()
    with pytest.raises(InputError, match="item 0"):
        answer(model, processor, [([Turn("user", "<image>\nWhat?")], [tmp_path / "broken.jpg"])])
    assert model.training
    model.eval()


# ---- evaluate_model, with a model that looks the answers up -------------------------------------------------


class Oracle(nn.Module):
    """Finds the question in its prompt and gives the answer from a table, then a stop token, then rubbish."""

    def __init__(self, processor: LlavaProcessor, table: dict[str, str]) -> None:
        super().__init__()
        self.tokenizer, self.image_id, self.table = processor.tokenizer, processor.image_token_id, table
        self.embedding = nn.Embedding(2, 2)
        self.generation_config: Any = SimpleNamespace()
        self.prompts: list[str] = []
        self.features = 0

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_image_features(self, pixel_values: torch.Tensor, return_dict: bool) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=[torch.zeros(3, 2) for _ in pixel_values])

    def forward(self, input_ids: torch.Tensor, mm_encoder_outputs: Any = None) -> None:
        raise AssertionError("only generate is called")

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_processor: Any,
        mm_encoder_outputs: Any = None,
    ) -> torch.Tensor:
        features = mm_encoder_outputs["image"].pooler_output if mm_encoder_outputs else []
        assert sum(map(len, features)) == (input_ids == self.image_id).sum()
        self.features += len(features)
        rows = []
        stop = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompt = self.tokenizer.decode(ids[mask.index(1) :])
            self.prompts.append(prompt)
            reply = next(reply for question, reply in self.table.items() if question in prompt)
            tokens = [*self.tokenizer.encode(f" {reply}\n", add_special_tokens=False), stop]
            rows.append([*tokens, *self.tokenizer.encode("No no", add_special_tokens=False)])
        width = max(map(len, rows))
        for _ in range(width):
            logits_processor(input_ids, torch.tensor([[1.0, 0.0]]).expand(len(rows), 2))
        replies = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, replies], dim=1)


@pytest.fixture
def oracle(mllm_folder: Path, data: Path) -> tuple[Oracle, LlavaProcessor]:
    processor = LlavaProcessor.from_pretrained(mllm_folder)
    table = {}
    for name in ("pope", "mme", "vqav2", "text"):
        for item in TASKS[name].load(data):
            truth = TASKS[name].truth(item)
            table[item.question.split("?")[0]] = truth if isinstance(truth, str) else truth[0]
    return Oracle(processor, table | {"caption": "A red shape."}), processor


def test_right_answers_score_one(oracle: Any, data: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = evaluate_model(
        *oracle,
        BENCHMARKS,
        data,
        batch_size=5,
        progress=lambda *step: steps.append(step),
        predictions=True,
    )
    assert {name: result["score"] for name, result in found.items()} == dict.fromkeys(BENCHMARKS, 1.0)
    sizes = {"pope": 24, "mme": 8, "vqav2": 8, "coco": 4, "flickr30k": 4, "text": 5}
    assert {name: result["n"] for name, result in found.items()} == sizes
    assert [done for name, done, _ in steps if name == "pope"] == [5, 10, 15, 20, 24]
    assert found["mme"]["perception"] == 400.0 and found["pope"]["f1"] == 1.0
    first = found["vqav2"]["predictions"][0]
    assert first["id"] == "0" and first["answer"] == "red" and first["truth"] == ["red"] * 10
    assert [p["id"] for p in found["pope"]["predictions"]] == [i.id for i in TASKS["pope"].load(data)]
    json.dumps(found)
    assert "predictions" not in evaluate_model(*oracle, ["text"], data)["text"]


def test_image_comes_before_the_question(oracle: Any, data: Path) -> None:
    evaluate_model(*oracle, ["pope"], data, limit=1)
    assert oracle[0].features == len(oracle[0].prompts) == 2
    assert all("<|im_start|>user\n<image><image><image>\nIs thing" in prompt for prompt in oracle[0].prompts)


def test_blind_prompts_have_no_image(oracle: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "pope").symlink_to(data / "pope")  # no images there, and none needed
    found = evaluate_model(*oracle, ["pope"], tmp_path, baseline="blind")
    assert found["pope"]["score"] == 1.0 and found["pope"]["baseline"] == "blind"
    assert oracle[0].features == 0 and not any("<image>" in prompt for prompt in oracle[0].prompts)
    assert all("<|im_start|>user\nIs thing" in prompt for prompt in oracle[0].prompts)


def test_shuffled_shows_other_images(pair: Any, oracle: Any, data: Path) -> None:
    found = evaluate_model(*oracle, BENCHMARKS, data, baseline="shuffled")
    assert found["pope"]["baseline"] == "shuffled" and found["pope"]["score"] == 1.0
    assert oracle[0].features == 24 + 8 + 8 + 4 + 4
    told = evaluate_model(*pair, ["coco"], data, predictions=True)["coco"]["predictions"]
    other = evaluate_model(*pair, ["coco"], data, baseline="shuffled", predictions=True)["coco"]["predictions"]
    swap = shuffled_images([item.image for item in TASKS["coco"].load(data) if item.image])
    names = [item.image for item in TASKS["coco"].load(data)]
    by_image = {name: p["answer"] for name, p in zip(names, told, strict=True)}
    assert [p["answer"] for p in other] == [by_image[swap[name]] for name in names if name]


# ---- which questions, which images -------------------------------------------------------------------------


def items(groups: int, images: int, each: int) -> list[Item]:
    """Questions of `groups` strata about the same images, `each` per image, half yes and half no."""
    return [
        Item(f"{g}/{i}/{k}", Path(f"{i}.jpg"), "?", "yes" if k % 2 else "no", str(g))
        for g in range(groups)
        for i in range(images)
        for k in range(each)
    ]


@pytest.mark.parametrize("limit", [1, 6, 7, 18, 20, 90, 179])
def test_limit_takes_whole_images(limit: int) -> None:
    every = items(3, 10, 6)
    chosen = select(every, limit)
    assert limit <= len(chosen) < limit + 6
    assert chosen == [item for item in every if item in chosen]  # in order
    units = Counter((item.group, item.image) for item in chosen)
    assert set(units.values()) == {6}
    assert Counter(item.answer for item in chosen)["yes"] * 2 == len(chosen)  # balance
    sizes = Counter(item.group for item in chosen).values()
    assert max(sizes) - min(sizes) <= 6


def test_limit_shares_images_between_groups() -> None:
    assert len({item.image for item in select(items(3, 50, 6), 90)}) == 5


def test_limit_depends_on_the_seed_only() -> None:
    every = items(1, 50, 1)
    assert select(every, 10, 1) == select(every, 10, 1) != select(every, 10, 2)
    assert set(select(every, 10)) < set(select(every, 20))  # a larger part holds the smaller
    assert select(every, None) == select(every, 1000) == every


def test_limit_keeps_mme_pairs(oracle: Any, data: Path) -> None:
    found = evaluate_model(*oracle, ["mme"], data, limit=3)["mme"]
    assert found["n"] == 4 and set(found["subtasks"]) == {"existence", "count"} and found["score"] == 1.0


def test_limit_without_images(oracle: Any, data: Path) -> None:
    assert evaluate_model(*oracle, ["text"], data, limit=3)["text"]["n"] == 3


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_is_a_derangement(tmp_path: Path, seed: int) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(9)]
    for n, path in enumerate(paths):
        picture(n % 6).save(path)  # three pictures lie there twice
    swap = shuffled_images(paths, seed)
    assert set(swap) == set(paths) and swap == shuffled_images(paths, seed)
    assert all(old.read_bytes() != new.read_bytes() for old, new in swap.items())
    assert len({new.read_bytes() for new in swap.values()}) == 6


def test_shuffled_differs_by_seed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.bin" for n in range(20)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes(n))
    assert shuffled_images(paths, 0) != shuffled_images(paths, 1)


def test_shuffled_knows_a_photograph_under_two_names(data: Path) -> None:
    every = TASKS["mme"].load(data)
    shown = images_shown("mme", every, "shuffled")
    own = [item.image.read_bytes() for item in every if item.image]
    assert all(image and image.read_bytes() != before for image, before in zip(shown, own, strict=True))


def test_shuffled_needs_two_pictures(oracle: Any, data: Path) -> None:
    with pytest.raises(InputError, match="fewer than two distinct images"):
        evaluate_model(*oracle, ["coco"], data, limit=1, baseline="shuffled")


# ---- wrong input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"benchmarks": ["text", "popes"]}, r"benchmark 'popes' is unknown \(did you mean 'pope'"),
        ({"baseline": "deaf"}, "baseline 'deaf' is unknown"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"data": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_wrong_arguments(oracle: Any, data: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_model(*oracle, **({"benchmarks": ["text"], "data": data} | change))


def test_missing_images_are_found_before_the_first_question(oracle: Any, data: Path, tmp_path: Path) -> None:
    for folder in ("pope", "text"):
        (tmp_path / folder).symlink_to(data / folder)
    with pytest.raises(InputError, match=r"pope, item 'random/0': no image .*\(4 of 4 images are missing\)"):
        evaluate_model(*oracle, ["text", "pope"], tmp_path)
    assert oracle[0].prompts == []


def test_broken_image_names_its_item(pair: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "coco").symlink_to(data / "coco")
    (tmp_path / "val2014").mkdir()
    for path in (data / "val2014").iterdir():
        (tmp_path / "val2014" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match="coco, item '2'"):
        evaluate_model(*pair, ["coco"], tmp_path)


def test_a_think_block_is_no_answer() -> None:
    assert answering._THOUGHT.sub("", "<think>\n\n</think>\n\nNo").strip() == "No"
    assert answering._THOUGHT.sub("", "No <think>") == "No <think>"
