"""Models of standard shapes made in memory, without files: for tests of structure, strategies and adapters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = 99


def text_config(kind: str = "llama", tied: bool = False) -> Any:
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma": GemmaConfig}
    if kind in configs:
        return configs[kind](**SIZES, tie_word_embeddings=tied)
    if kind == "opt":
        return OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
                         word_embed_proj_dim=32, max_position_embeddings=64, tie_word_embeddings=tied)  # fmt: skip
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64, tie_word_embeddings=tied)


def randomized(model: Any, seed: int = 0) -> Any:
    """Random gains and biases too: ones and zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def text_model(kind: str = "llama", tied: bool = False, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomized(AutoModelForCausalLM.from_config(text_config(kind, tied)))


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )


def llava(tied: bool = False, act: str = "gelu", seed: int = 0) -> Any:
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text_config("llama", tied), image_token_id=IMAGE,
        image_seq_length=16, projector_hidden_act=act, tie_word_embeddings=tied, vision_feature_layer=-2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomized(LlavaForConditionalGeneration(config))


def inputs(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of 16 image tokens (where the model takes images) and 10 words, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 10), generator=generator)
    if not hasattr(model.config, "vision_config"):
        return {"input_ids": ids, "labels": ids}
    ids = torch.cat([torch.full((2, 16), IMAGE), ids], dim=1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(next(model.parameters()).dtype)
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}
