"""Evaluation of models that normtune did not make: folders of random weights as they lie on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from asked import picture, write_benchmarks
from command import run
from models import CHATML, tiny_tokenizer
from normtune.chat import Turn
from normtune.evaluation import answer, evaluate_model
from normtune.evaluation.results import preprocessing
from normtune.model import load

pytestmark = pytest.mark.heavy

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PINPOINTS = [[32, 64], [64, 32]]


def template(image: str) -> str:
    """ChatML that writes `image` for an image part."""
    content = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    start = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + content + "<|im_end|>\n{% endfor %}"
    return start + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def tokenizer_with(*tokens: str, image: str) -> Any:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *tokens]})
    tokenizer.chat_template = template(image)
    return tokenizer


def save(folder: Path, model: type[Any], config: Any, seed: int = 0) -> None:
    """Random weights large enough that answers depend on the prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(config)
        for parameter in made.parameters():
            parameter.data = 0.1 * torch.randn_like(parameter) + (parameter.ndim == 1)
    made.generation_config.eos_token_id = config.text_config.eos_token_id
    made.save_pretrained(folder)


def text_config(kind: str, tokenizer: Any) -> Any:
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1, "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(kind, **TEXT, vocab_size=len(tokenizer), **ids)


def llava_next(folder: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML, image=True)
    square = {"height": 32, "width": 32}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=PINPOINTS, do_pad=True
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template("<image>\n"),
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    config = LlavaNextConfig(
        text_config=text_config("llama", tokenizer),
        vision_config=AutoConfig.for_model("clip_vision_model", **VISION, image_size=32, patch_size=8),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    save(folder, LlavaNextForConditionalGeneration, config)


def idefics3(folder: Path, kind: str = "idefics3") -> None:
    grid = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    tokenizer = tokenizer_with(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *grid, image="<image>"
    )
    smol = kind == "smolvlm"
    made = SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil
    images = made(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    if smol:  # as on the hub; the processor class itself cannot be made here
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
        (folder / "processor_config.json").write_text(
            json.dumps({"processor_class": "SmolVLMProcessor", "image_seq_len": 4})
        )
    else:
        Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template).save_pretrained(
            folder
        )
    config = (SmolVLMConfig if smol else Idefics3Config)(
        text_config=text_config("llama", tokenizer),
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    save(folder, SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration, config)


def smolvlm(folder: Path) -> None:
    idefics3(folder, "smolvlm")


def qwen2_vl(folder: Path) -> None:
    """As on the hub: preprocessor_config.json names the processor, whose video part needs torchvision."""
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tokenizer_with(*tokens, image=seen)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        min_pixels=28 * 28, max_pixels=56 * 56, patch_size=8, merge_size=2, temporal_patch_size=2
    ).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    named = {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": 1,
        },
        vision_config={
            **{"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
            **{"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        **dict(zip(names, ids, strict=True)),
    )
    save(folder, Qwen2VLForConditionalGeneration, config)


MAKERS: dict[str, Callable[[Path], None]] = {
    "llava_next": llava_next,
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
    "smolvlm": smolvlm,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / request.param
    path.mkdir()
    MAKERS[request.param](path)
    if request.param == "smolvlm":  # spells the number of a video's frames
        monkeypatch.setattr(processing_smolvlm, "num2words", str)
    return path


def questions() -> list[tuple[list[Turn], list[Any]]]:
    """Images of several shapes, prompts of several lengths, one without an image."""
    asked = [([Turn("user", "<image>\nWhat" + " now" * k)], [picture(k).resize((40 + 16 * k, 40))]) for k in range(4)]
    return [*asked, ([Turn("user", "How many shapes are there?")], [])]


@pytest.mark.parametrize("folder", MAKERS, indirect=True)
def test_any_folder_is_evaluated(folder: Path, data: Path) -> None:
    model, processor = load(folder)
    processor.tokenizer.padding_side = "right"
    before = preprocessing(processor)
    one_by_one = answer(model, processor, questions(), 6, batch_size=1)
    assert len(set(one_by_one)) > 1
    assert answer(model, processor, questions(), 6, batch_size=5) == one_by_one
    assert processor.tokenizer.padding_side == "right"
    assert preprocessing(processor) == before == preprocessing(load(folder)[1])
    found = evaluate_model(model, processor, ["pope", "coco", "text"], data, limit=3, batch_size=4)
    assert found["pope"]["n"] == 4 and found["coco"]["n"] == 3
    likely = evaluate_model(model, processor, ["pope"], data, mode="likelihood", limit=3)["pope"]
    assert likely["n"] == 4 and all(part["other"] == 0 for part in likely["splits"].values())


def test_the_command_takes_a_stock_llava_folder(
    mllm_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--benchmarks", "pope,text", "--data", str(data), "--limit", "4", "--json", "--dtype", "bfloat16"]
    assert run("evaluate", str(mllm_folder), *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["dtype"] == "bfloat16"
    assert document["model"]["architecture"] == "LlavaForConditionalGeneration"
    assert Path(document["result"]) == Path("evaluations") / mllm_folder.name / "pope-text-limit4.json"
    assert document["prompts"]["pope"].startswith("<|im_start|>user\n<image>\nIs thing")


@pytest.mark.parametrize("folder", ["smolvlm"], indirect=True)
def test_what_a_processor_lacks_is_said(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    assert run("evaluate", str(folder), "--benchmarks", "pope", "--data", str(data)) == 2
    assert "num2words" in capsys.readouterr().err
