"""Assembling, loading and saving models; transformers itself is the reference throughout."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from models import CHATML, CHATML_SYSTEM, LLAMA2, tiny_llm, tiny_mllm, tiny_tokenizer, tiny_vision
from normtune import templates
from normtune.errors import InputError, JobError
from normtune.model import assemble, load, save

ENCODERS = {  # kind -> special tokens, feature strategy, tokens per image (16 patches)
    "clip": (1, "default", 16),
    "clip_vision": (1, "default", 16),
    "siglip": (0, "full", 16),
    "siglip_vision": (0, "full", 16),
    "dinov2": (1, "default", 16),
    "dinov2_registers": (5, "default", 20),
}
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[5, 8, 100, 200, 300]])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_vision(folder / kind, kind) for kind in (*ENCODERS, "siglip2_naflex")}


def photo(seed: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def inputs(processor: Any, messages: list[dict[str, Any]], images: list[Image.Image] | None = None) -> Any:
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)


def check_against_transformers(model: Any, processor: Any, llm: Path, vision: Path, folder: Path) -> None:
    """The promises that hold for every pair of parts: same text, same features, same again from disk."""
    batch = inputs(processor, QUESTION, [photo()])
    with torch.no_grad():
        logits = model(**batch).logits
        reference = AutoModelForCausalLM.from_pretrained(llm, dtype=model.dtype)
        vocabulary = reference.config.vocab_size
        torch.testing.assert_close(
            model(input_ids=IDS).logits[..., :vocabulary], reference(IDS).logits, atol=1e-6, rtol=0
        )

        pixels = AutoImageProcessor.from_pretrained(vision)(photo(), return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["pixel_values"], pixels)
        tower = AutoModel.from_pretrained(vision, dtype=model.dtype)
        tower = getattr(tower, "vision_model", tower)
        states = tower(pixels.to(model.dtype), output_hidden_states=True).hidden_states[-2]
        states = states[:, 1:] if model.config.vision_feature_select_strategy == "default" else states
        features = model.get_image_features(batch["pixel_values"]).pooler_output[0]
        torch.testing.assert_close(features, model.model.multi_modal_projector(states)[0])
        assert len(features) == int((batch["input_ids"] == model.config.image_token_id).sum())

        save(model, processor, folder)
        again, its_processor = (
            AutoModelForImageTextToText.from_pretrained(folder),
            AutoProcessor.from_pretrained(folder),
        )
        assert type(again) is LlavaForConditionalGeneration and type(its_processor) is LlavaProcessor
        same = inputs(its_processor, QUESTION, [photo()])
        assert all(torch.equal(batch[key], same[key]) for key in batch)
        assert torch.equal(again(**same).logits, logits)
        answer = again.generate(**same, min_new_tokens=2, max_new_tokens=2, do_sample=False)
        assert torch.equal(answer[:, :-2], batch["input_ids"])


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llms")
    return {
        "untied-template": tiny_llm(folder / "a"),
        "tied-bare": tiny_llm(folder / "b", "qwen2", tied=True, template=None, pad=False),
    }


@pytest.mark.heavy
@pytest.mark.parametrize("llm", ["untied-template", "tied-bare"])
@pytest.mark.parametrize("connector", ["mlp", pytest.param("linear", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder(
    kind: str, connector: str, llm: str, encoders: dict[str, Path], llms: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = assemble(llms[llm], encoders[kind], connector)
    special, strategy, length = ENCODERS[kind]
    assert processor.num_additional_image_tokens == special
    assert processor.vision_feature_select_strategy == model.config.vision_feature_select_strategy == strategy
    assert model.config.image_seq_length == length
    assert processor._get_num_multimodal_tokens([(40, 50)])["num_image_tokens"] == [length]
    assert (processor.patch_size, model.config.vision_feature_layer) == (8, -2)
    assert not model.training and not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    assert processor.image_processor.__class__.__name__.endswith("Pil")
    check_against_transformers(model, processor, llms[llm], encoders[kind], tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "options", "tied", "rows"),
    [
        ("llama", {}, False, 401),
        ("llama", {"tied": True}, True, 401),
        ("llama", {"tied": True, "template": None, "pad": False}, True, None),
        ("llama", {"template": LLAMA2, "pad": False, "bos": True}, False, None),
        ("llama", {"spare": 24}, False, 424),
        ("llama", {"tied": True, "image": True}, True, 400),
        ("qwen2", {"tied": True, "spare": 24, "template": CHATML_SYSTEM}, True, 424),
        ("qwen3", {"tied": True}, True, 401),
        ("gemma3_text", {"tied": True}, True, 401),
        ("mistral", {"dtype": torch.bfloat16}, False, 401),
        ("mixtral", {"num_local_experts": 4}, False, 401),
        ("gpt2", {"template": None}, False, None),
        ("gpt2", {"tied": True, "template": None}, False, None),  # no `embed_tokens`: stock LLaVA cannot tie it
        ("opt", {"tied": True}, False, 401),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_every_llm(
    kind: str, options: dict[str, Any], tied: bool, rows: int | None, vision_folder: Path, tmp_path: Path
) -> None:
    llm = tiny_llm(tmp_path / "llm", kind, **options)
    before = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    old = before.get_input_embeddings().weight.shape[0]
    model, processor = assemble(llm, vision_folder)
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight

    assert (head is embedding) == tied
    assert model.config.tie_word_embeddings == model.config.text_config.tie_word_embeddings == tied
    assert len(embedding) == len(head) == model.config.text_config.vocab_size == (rows or old + 1)
    assert processor.image_token_id == model.config.image_token_id < len(embedding)
    for weight, was in ((embedding, before.get_input_embeddings().weight), (head, before.lm_head.weight)):
        assert torch.equal(weight[:old], was)
        if len(weight) > old:
            torch.testing.assert_close(weight[old:], was.mean(0).expand(len(weight) - old, -1))
    assert any("copy" in note for note in model.notes) == (bool(options.get("tied")) and not tied)
    check_against_transformers(model, processor, llm, vision_folder, tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


def test_bfloat16_casts_every_weight_and_nothing_else(
    llm_folder: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    model, processor = assemble(llm_folder, encoders["dinov2"], dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == model.config.text_config.dtype == model.config.vision_config.dtype == torch.bfloat16
    stored = load_file(llm_folder / "model.safetensors")
    for name, parameter in model.model.language_model.named_parameters():
        was = stored[f"model.{name}"].bfloat16()
        assert torch.equal(parameter[: len(was)], was)
    check_against_transformers(model, processor, llm_folder, encoders["dinov2"], tmp_path / "out")
    loaded, _ = load(tmp_path / "out", "bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_hub_ids_come_from_the_cache(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, folder in (("llm", llm_folder), ("vision", vision_folder)):
        repository, commit = tmp_path / f"models--someone--{name}", "0" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    model, _ = assemble("someone/llm", "someone/vision")
    expected = assemble(llm_folder, vision_folder)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert model.config.text_config.name_or_path == "someone/llm"


def test_an_encoder_of_one_layer_gives_that_layer(llm_folder: Path, tmp_path: Path) -> None:
    vision = tiny_vision(tmp_path / "vision", "clip_vision", num_hidden_layers=1)
    model, processor = assemble(llm_folder, vision)
    assert model.config.vision_feature_layer == -1
    pixels = processor.image_processor(photo(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = AutoModel.from_pretrained(vision)(pixels, output_hidden_states=True).hidden_states[1]
        features = model.get_image_features(pixels).pooler_output[0]
        torch.testing.assert_close(features, model.model.multi_modal_projector(states)[0, 1:])


def test_saved_weights_have_the_names_of_published_checkpoints(mllm_folder: Path) -> None:
    with safe_open(mllm_folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
    } <= names
    assert (mllm_folder / "preprocessor_config.json").is_file()


def test_nothing_of_this_machine_is_saved(mllm_folder: Path) -> None:
    for file in (*mllm_folder.glob("*.json"), *mllm_folder.glob("*.jinja")):
        assert str(mllm_folder.parent) not in file.read_text(), file.name


# --- connector


def test_linear_connector_is_one_layer(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    model, processor = assemble(llm_folder, vision_folder, "linear")
    projector = model.model.multi_modal_projector
    assert model.config.projector_hidden_act == "linear"
    frozen = [name for name, p in projector.named_parameters() if not p.requires_grad]
    assert frozen == ["linear_2.weight", "linear_2.bias"]
    features = torch.randn(3, 32)
    torch.testing.assert_close(projector(features), projector.linear_1(features))
    save(model, processor, tmp_path / "out")
    loaded, _ = load(tmp_path / "out")
    assert not any(p.requires_grad for p in loaded.model.multi_modal_projector.linear_2.parameters())
    assert all(p.requires_grad for p in loaded.model.multi_modal_projector.linear_1.parameters())


def test_seed_alone_decides_the_connector(llm_folder: Path, vision_folder: Path) -> None:
    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]

    def connector(seed: int) -> list[torch.Tensor]:
        before = state()
        projector = assemble(llm_folder, vision_folder, seed=seed)[0].model.multi_modal_projector
        assert state() == before
        return list(projector.parameters())

    first = connector(1)
    torch.manual_seed(99)
    again, other = connector(1), connector(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(0.05 < p.std() < 0.15 and p.abs().max() <= 32**-0.5 for p in first)


# --- tokenizer, template, generation

MACRO = (
    "{% macro show(m) %}[{{ m['role'] }}] {{ m['content'] }}{% endmacro %}"
    "{% for message in messages %}{{ show(message) }}{{ loop.index0 }}/{{ messages|length }}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "system": CHATML_SYSTEM,
    "llama2": LLAMA2,
    "macro": MACRO,
    "vicuna": templates.default_template(tiny_tokenizer(None)),
    "begins with a line break": "\n" + CHATML,
    "begins with blanks before a tag": "  {% if true %}\n  x{% endif %}" + CHATML,
    "begins with trimming": "\n {%- if true %}x{% endif -%} " + CHATML,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_list_content_renders_as_the_string_would(name: str) -> None:
    tokenizer, template = tiny_tokenizer(CHATML), TEMPLATES[name]
    text = "<image>\nWhat is it?"
    cases: list[tuple[Any, str]] = [
        ([{"type": "image"}, {"type": "text", "text": "What is it?"}], text),
        ([{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "image"}], "Look: <image>\n<image>\n"),
        ([{"type": "text", "text": "No image."}], "No image."),
        ([], ""),
        (text, text),
        ("", ""),
    ]
    for content, string in cases:
        for system in ([], [{"role": "system", "content": "Be brief."}]):
            for prompt in (False, True):
                answer = {"role": "assistant", "content": "A cat."}
                last = {"role": "user", "content": "Sure?"}
                given = [*system, {"role": "user", "content": content}, answer, last]
                plain = [*system, {"role": "user", "content": string}, answer, last]
                expected = templates.render(tokenizer, template, plain, prompt)
                assert templates.render(tokenizer, templates.with_parts(template), given, prompt) == expected
    assert templates.with_parts(templates.with_parts(template)) == templates.with_parts(template)


def test_other_fields_and_missing_content_reach_the_template() -> None:
    source = templates.with_parts(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] if m['content'] is defined else 'none' }}:"
        "{{ m['name'] }}:{{ m['tool_calls'][0]['function'] if m['tool_calls'] is defined }};{% endfor %}"
    )
    messages = [
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "name": "Bot", "tool_calls": [{"function": "f"}]},
    ]
    assert templates.render(tiny_tokenizer(), source, messages) == "user:hi:Ann:;assistant:none:Bot:f;"
    with pytest.raises(Exception, match="text or image"):
        templates.render(tiny_tokenizer(), source, [{"role": "user", "content": [{"type": "video"}]}])


def test_default_template(vision_folder: Path, tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path / "llm", template=None, bos=True)
    model, processor = assemble(llm, vision_folder)
    answered = [*QUESTION, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    text = processor.apply_chat_template(answered, add_generation_prompt=True)
    assert text == "<s>USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert any("Vicuna" in note for note in model.notes)
    # transformers' own path from messages to ids does not double the beginning-of-text token
    ids = processor.apply_chat_template(QUESTION, tokenize=True, processor_kwargs={"images": [photo()]})[0]
    assert ids[:2] != [1, 1] and ids[0] == 1


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CHATML, ["</s>", "<|im_end|>"]), (LLAMA2, ["</s>"]), (None, ["</s>"])],
    ids=["chatml", "llama2", "none"],
)
def test_generation_stops_at_the_end_of_a_turn(
    template: str | None, ends: list[str], vision_folder: Path, tmp_path: Path
) -> None:
    llm = tiny_llm(tmp_path / "llm", template=template)
    # As many published ones: the end of a turn missing, and a temperature that greedy decoding ignores.
    (llm / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9}')
    model, processor = assemble(llm, vision_folder)
    save(model, processor, tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").generation_config
    eos = again.eos_token_id if isinstance(again.eos_token_id, list) else [again.eos_token_id]
    assert processor.tokenizer.convert_ids_to_tokens(eos) == ends
    assert (again.bos_token_id, again.pad_token_id) == (1, processor.tokenizer.pad_token_id)
    assert not again.do_sample


def test_pad_token(vision_folder: Path, tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path / "llm", pad=False)
    model, processor = assemble(llm, vision_folder)
    assert processor.tokenizer.pad_token == "<unk>" and any("'<unk>'" in note for note in model.notes)
    config = json.loads((llm / "tokenizer_config.json").read_text())
    (llm / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "unk_token"}))
    _, processor = assemble(llm, vision_folder)
    assert processor.tokenizer.pad_token == "</s>"


def test_image_token_in_the_vocabulary_is_reused(vision_folder: Path, tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path / "llm", image=True)
    own = AutoTokenizer.from_pretrained(llm).convert_tokens_to_ids("<image>")
    model, processor = assemble(llm, vision_folder)
    assert model.config.image_token_id == own
    assert processor.tokenizer("a <image>b", add_special_tokens=False).input_ids.count(own) == 1
    assert processor.tokenizer.decode([own], skip_special_tokens=True) == ""


def test_batch_of_text_and_images(mllm_folder: Path) -> None:
    model, processor = load(mllm_folder)
    texts = ["<image>\nWhat is it?", "Just a text.", "<image> and <image>"]
    batch = processor(text=texts, images=[photo(1), photo(2), photo(3)], return_tensors="pt", padding=True)
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert processor.tokenizer.decode([model.config.image_token_id], skip_special_tokens=True) == ""
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [16, 0, 32]
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


# --- load


def test_load_any_image_text_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "paligemma",
        text_config={"model_type": "gemma", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 402},
        vision_config={"model_type": "siglip_vision_model", **SMALL, "patch_size": 8, "image_size": 32},
        projection_dim=32,
        image_token_index=401,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "m")
    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    pixels.image_seq_length = 16
    PaliGemmaProcessor(pixels, tiny_tokenizer(image=True)).save_pretrained(tmp_path / "m")
    model, processor = load(tmp_path / "m", "bfloat16")
    assert model.config.model_type == "paligemma" and model.dtype == torch.bfloat16 and not model.training
    assert type(processor) is PaliGemmaProcessor


def test_load_counts_tokens_for_folders_without_a_processor_config(mllm_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mllm_folder, tmp_path / "old"))
    (folder / "processor_config.json").unlink()
    _, expected = load(mllm_folder)
    model, processor = load(folder)
    batch, reference = (inputs(p, QUESTION, [photo()]) for p in (processor, expected))
    assert torch.equal(batch["input_ids"], reference["input_ids"])
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


# --- bad input


def rejected(call: Callable[[], Any], *words: str, error: type[Exception] = InputError) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 3, message
    assert all(len(line) < 500 for line in message.splitlines()), message
    for word in words:
        assert word in message, message


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[max(tensors)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "config missing": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "config not JSON": (
        lambda f: (f / "config.json").write_text('{\n  "model_type": "llama",\n  oops\n}'),
        ("config.json", "line 3, column 3"),
    ),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "list")),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json",)),
    "model type unknown": (lambda f: edit(f / "config.json", lambda c: c.update(model_type="nope")), ("nope",)),
    "model type missing": (lambda f: edit(f / "config.json", lambda c: c.pop("model_type")), ("Unrecognized",)),
    "code of its own": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="own", auto_map={"AutoConfig": "code.Own"})),
        ("custom code",),
    ),
    "quantized": (
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        ("quantized",),
    ),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), ("no weights",)),
    "weights truncated": (lambda f: cut(f / "model.safetensors"), ("model.safetensors", "truncated")),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ("model.safetensors", "truncated")),
    "weights a Git LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ("git lfs pull",),
    ),
    "a shard missing": (shard, ("model-00001-of-00002.safetensors", "missing")),
    "a tensor missing": (lose_a_tensor, ("1 weights are missing",)),
    "generation config not JSON": (
        lambda f: (f / "generation_config.json").write_text("{"),
        ("generation_config.json", "line 1, column 2"),
    ),
    "tokenizer cut": (lambda f: cut(f / "tokenizer.json"), ("tokenizer.json", "line")),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damaged_folders(fault: str, llm_folder: Path, mllm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[fault]
    llm, mllm = (Path(shutil.copytree(f, tmp_path / f.name)) for f in (llm_folder, mllm_folder))
    damage(llm)
    damage(mllm)
    rejected(lambda: assemble(llm, vision_folder), "LLM", *words)
    rejected(lambda: load(mllm), "model", *words)


PATHS = {
    "/no/such/folder": "does not exist",
    "./missing": "does not exist",
    "~/missing-normtune-model": "does not exist",
    "runs/a/b": "does not exist",
    "missing/": "does not exist",
    "missing": "no such folder here",
    "someone/missing": "offline",
    "two words": "no such folder here",
    "": "empty",
    __file__: "is a file",
}


@pytest.mark.parametrize("path", PATHS)
def test_missing_folders(path: str, llm_folder: Path, vision_folder: Path) -> None:
    rejected(lambda: assemble(path, vision_folder), "LLM", path, PATHS[path])
    rejected(lambda: assemble(llm_folder, path), "vision encoder", path, PATHS[path])
    rejected(lambda: load(path), "model", path, PATHS[path])


def test_parts_in_the_wrong_place(llm_folder: Path, vision_folder: Path, mllm_folder: Path) -> None:
    rejected(lambda: assemble(vision_folder, vision_folder), "LLM", "no causal language model")
    rejected(lambda: assemble(mllm_folder, vision_folder), "LLM", "`path`")
    rejected(lambda: assemble(llm_folder, llm_folder), "vision encoder", "takes no images")
    rejected(lambda: load(llm_folder), "(llama) takes no images")
    rejected(lambda: load(vision_folder), "takes no images")
    rejected(lambda: assemble(llm_folder, vision_folder, connector="mpl"), "'mpl'", "mlp, linear")
    for call in (lambda d: assemble(llm_folder, vision_folder, dtype=d), lambda d: load(mllm_folder, dtype=d)):
        for dtype in ("float16", "fp8"):
            rejected(lambda call=call, dtype=dtype: call(dtype), dtype, "float32", "nf4")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "config", "word"),
    [
        ("gemma2", {}, "caps"),  # final_logit_softcapping 30
        ("granite", {"logits_scaling": 8.0}, "scales"),
        ("cohere", {}, "scales"),
        ("phi", {}, "without bias"),
        ("opt", {"word_embed_proj_dim": 16}, "hidden size"),
        ("mamba", {"state_size": 4}, "does not run inside LLaVA"),
        ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "BartDecoder"),
        ("llama", {"max_position_embeddings": 16}, "one image takes 16"),
    ],
)
def test_llms_that_stock_llava_cannot_express(
    kind: str, config: dict[str, Any], word: str, vision_folder: Path, tmp_path: Path
) -> None:
    llm = tiny_llm(tmp_path / "llm", kind, **config)
    rejected(lambda: assemble(llm, vision_folder), str(llm), word)


def test_encoders_that_llava_cannot_use(encoders: dict[str, Path], llm_folder: Path, tmp_path: Path) -> None:
    rejected(lambda: assemble(llm_folder, encoders["siglip2_naflex"]), "NaFlex", "pixel_attention_mask")

    def changed(name: str, kind: str, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
        folder = Path(shutil.copytree(encoders[kind], tmp_path / name))
        edit(folder / file, change)
        return folder

    loose = changed("loose", "clip", "preprocessor_config.json", lambda c: c.update(do_center_crop=False))
    rejected(lambda: assemble(llm_folder, loose), "different sizes", "preprocessor_config.json")
    large = changed("large", "clip", "preprocessor_config.json", lambda c: c.update(crop_size=64, size=64))
    rejected(lambda: assemble(llm_folder, large), "does not run")
    bare = Path(shutil.copytree(encoders["clip"], tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    rejected(lambda: assemble(llm_folder, bare), "image processor", "bare")


@pytest.mark.parametrize(
    ("kind", "config", "word"),
    [
        (
            "swin",
            {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
            "one shape",
        ),
        ("convnext", {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}, "[B, T, H]"),
        ("pixtral", {**SMALL, "patch_size": 8}, "[B, T, H]"),  # all images in one row
        ("vit_mae", {**SMALL, "patch_size": 8}, "no grid of its patches"),  # drops three quarters at random
        ("vivit", {**SMALL}, "does not run"),  # videos
    ],
)
def test_encoders_of_another_shape(
    kind: str, config: dict[str, Any], word: str, encoders: dict[str, Path], llm_folder: Path, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        AutoModel.from_config(AutoConfig.for_model(kind, image_size=32, **config)).save_pretrained(tmp_path)
    shutil.copy(encoders["siglip"] / "preprocessor_config.json", tmp_path)
    rejected(lambda: assemble(llm_folder, tmp_path), "vision encoder", word)


def test_tokenizers_and_templates_that_cannot_be_used(vision_folder: Path, llm_folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(llm_folder, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    rejected(lambda: assemble(bare, vision_folder), "tokenizer", "bare")
    for name, template, word in (
        ("syntax", "{% for message in %}", "line 1"),
        ("deaf", "{{ 'hello' }}", "drops"),
        ("refuses", "{{ raise_exception('only in Latin') }}", "only in Latin"),
    ):
        rejected(lambda: assemble(tiny_llm(tmp_path / name, template=template), vision_folder), "template", word)  # noqa: B023
    no_end = tiny_llm(tmp_path / "no_end", template=None)
    edit(no_end / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    rejected(lambda: assemble(no_end, vision_folder), "eos_token")


# --- save


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes: writing fails as on a full disk, within this process only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 2000, 20_000, 200_000])
def test_a_full_disk_leaves_nothing(size: int, mllm_folder: Path, tmp_path: Path) -> None:
    model, processor = load(mllm_folder)
    with small_disk(size):
        rejected(lambda: save(model, processor, tmp_path / "out"), str(tmp_path / "out"), error=JobError)
    assert list(tmp_path.iterdir()) == []
    save(model, processor, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in mllm_folder.iterdir())


def test_save_refuses_what_exists(mllm_folder: Path, tmp_path: Path) -> None:
    model, processor = load(mllm_folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("full", "file"):
        rejected(lambda: save(model, processor, tmp_path / name), "exists already")  # noqa: B023
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    save(model, processor, tmp_path / "empty")
    save(model, processor, tmp_path / "a" / "b")
    assert load(tmp_path / "empty")[0].config.model_type == load(tmp_path / "a" / "b")[0].config.model_type == "llava"


def test_tiny_mllm_takes_the_helpers_options(tmp_path: Path) -> None:
    folder = tiny_mllm(tmp_path / "m", kind="qwen2", vision="siglip", connector="linear", tied=True, template=None)
    model, processor = load(folder)
    assert model.config.text_config.model_type == "qwen2" and model.config.tie_word_embeddings
    assert "USER: " in processor.apply_chat_template(QUESTION)
