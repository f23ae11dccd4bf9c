"""Tiny random-weight models in ordinary Hugging Face folders: what the tests feed to normtune.

Everything is built offline with transformers' own classes and `save_pretrained`, so a folder made here is
laid out as one from the hub is. Sizes: hidden 32, 2 layers (encoders 3), patches of 8 in images of 32 x 32.
The tokenizer is a real byte-level BPE trained on a few sentences: any text round-trips through it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The plainest of templates: every role alike."""

CHATML_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
"""Qwen2's: `messages[0]` decides whether a default system turn is written."""

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Llama 2's: the system text moves into the first user turn, `loop.index0`, no generation prompt of its own."""

TEXT = """The small red circle is left of the big blue square. There is a green triangle above the circle.
USER: What is in the image? ASSISTANT: A red circle and a blue square. How many shapes are there? Three shapes.
Is there a yellow star in the image? No. Is there a green triangle? Yes. user assistant system
Describe the image in one sentence. A cat sits on a mat, and a dog runs over the grass. Answer the question."""

_LLM_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
_GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}


def tiny_tokenizer(
    template: str | None = CHATML, *, pad: bool = True, bos: bool = False, image: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens. `bos=True` writes `<s>` before every text, as Llama's does;
    `image=True` has an `<image>` token already."""
    special = ["<unk>", "<s>", "</s>"]
    special += ["<pad>"] if pad else []
    special += ["<image>"] if image else []
    extra = ["<|im_start|>", "<|im_end|>"] if template is not None and "<|im_start|>" in template else []
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special + extra,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=extra or None,
        **({"pad_token": "<pad>"} if pad else {}),
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llm(
    folder: Path,
    kind: str = "llama",
    *,
    template: str | None = CHATML,
    tied: bool = False,
    pad: bool = True,
    bos: bool = False,
    spare: int = 0,
    seed: int = 0,
    image: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a random causal LLM (any transformers model type: llama, qwen2, qwen3, gemma2, gpt2, ...) and its
    tokenizer. `spare` embedding rows lie beyond the tokenizer's vocabulary; `config` overrides fields."""
    tokenizer = tiny_tokenizer(template, pad=pad, bos=bos, image=image)
    sizes = _GPT2_SIZES if kind == "gpt2" else _LLM_SIZES
    fields = {
        **sizes,
        "vocab_size": len(tokenizer) + spare,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config,
    }
    model = _build(AutoModelForCausalLM, AutoConfig.for_model(kind, **fields), seed).to(dtype)
    ends = [tokenizer.eos_token_id]
    if template is not None and "<|im_end|>" in template:
        ends.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vision(folder: Path, kind: str = "clip", *, seed: int = 1, **config: Any) -> Path:
    """Save a random vision encoder and its image processor (32 x 32 pixels, patches of 8: 16 patch tokens).

    clip, siglip: the full two-tower model as on the hub; clip_vision, siglip_vision: the vision tower alone;
    siglip2_naflex: variable shapes, unusable in LLaVA; dinov2, dinov2_registers (4 registers): their
    configuration says 48 x 48 while the processor crops to 32 x 32, as the hub's 518 and 224."""
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 8,
        "image_size": 32,
        **config,
    }
    text = {**_LLM_SIZES, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32}
    text |= {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    del text["num_key_value_heads"], text["head_dim"]
    square = {"height": 32, "width": 32}
    processor: Any = SiglipImageProcessorPil(size=square)
    if kind in ("clip", "clip_vision"):
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
        full = AutoConfig.for_model("clip", text_config=text, vision_config=vision, projection_dim=32)
    elif kind in ("siglip", "siglip_vision"):
        full = AutoConfig.for_model("siglip", text_config=text, vision_config=vision)
    elif kind == "siglip2_naflex":
        del vision["image_size"]
        full = AutoConfig.for_model("siglip2", text_config=text, vision_config={**vision, "num_patches": 16})
        processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    elif kind in ("dinov2", "dinov2_registers"):
        vision |= {"image_size": 48, "mlp_ratio": 2}
        registers = {"num_register_tokens": 4} if kind == "dinov2_registers" else {}
        name = "dinov2_with_registers" if registers else "dinov2"
        full = AutoConfig.for_model(name, **{**vision, **registers, **config})
        processor = BitImageProcessorPil(
            size={"shortest_edge": 36}, crop_size=square, do_resize=True, do_center_crop=True, do_convert_rgb=True
        )
    else:
        raise ValueError(f"no tiny vision encoder of kind {kind!r}")
    if kind.endswith("_vision"):
        full = full.vision_config
    _build(AutoModel, full, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_mllm(
    folder: Path, *, kind: str = "llama", vision: str = "clip", connector: str = "mlp", **kwargs: Any
) -> Path:
    """Assemble a tiny LLM and a tiny encoder with `normtune.model` and save the result; `kwargs` go to `tiny_llm`.

    The two parts stay beside it in `FOLDER-llm` and `FOLDER-vision`."""
    from normtune.model import assemble, save

    llm = tiny_llm(folder.with_name(folder.name + "-llm"), kind, **kwargs)
    encoder = tiny_vision(folder.with_name(folder.name + "-vision"), vision)
    model, processor = assemble(str(llm), str(encoder), connector=connector)
    save(model, processor, folder)
    return folder


def _build(auto: Any, config: Any, seed: int) -> Any:
    """Random weights from `seed`, all of them: gains too, since a test on gains of 1 would see nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = parameter.data + 0.1 * noise if parameter.ndim == 1 else 0.1 * noise
    model.tie_weights()
    return model
