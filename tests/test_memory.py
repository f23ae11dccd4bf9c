"""What backward keeps, in bytes: a property of the code, counted without a clock.

Units of DESIGN: hidden-size bf16 values per token and block, the slope between models of 4 and 8 blocks. The floor of a
shape is what must be kept if no matmul is done twice: inputs of norms, q, k, v, the output of attention, gate and up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from normtune.strategy import apply, lean

B, S, H, HEAD = 2, 128, 256, 32
HEADS = H // HEAD
SIZES = {
    "hidden_size": H,
    "intermediate_size": 688,
    "num_attention_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": 64,
    "pad_token_id": 0,
}
I_PER_H = 688 / 256
LSE = HEADS * 4 / (2 * H)  # log-sum-exp of attention, fp32 per head

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE, PATCHES = 63, 4
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SCALES = 2 / 172  # bytes of a bf16 scale per 8-bit value: 688 = 4 groups of 172

# name: (config, floor in units)
SHAPES: dict[str, tuple[dict[str, Any], float]] = {
    # two norms, q, k, v, output, gate and up
    "llama": ({"model_type": "llama", "num_key_value_heads": 8}, 2 + 3 + 1 + 2 * I_PER_H + LSE),
    "llama, grouped": ({"model_type": "llama", "num_key_value_heads": 2}, 2 + 1.5 + 1 + 2 * I_PER_H + LSE),
    "mistral": ({"model_type": "mistral", "num_key_value_heads": 4}, 2 + 2 + 1 + 2 * I_PER_H + LSE),
    "phi3": ({"model_type": "phi3", "num_key_value_heads": 8}, 2 + 3 + 1 + 2 * I_PER_H + LSE),
    # q and k before their norms as well
    "qwen3": ({"model_type": "qwen3", "num_key_value_heads": 4}, 2 + 1.5 + 2 + 1 + 2 * I_PER_H + LSE),
    # four norms: the outputs of attention and MLP are inputs of two of them
    "gemma3": ({"model_type": "gemma3_text", "num_key_value_heads": 4}, 4 + 1.5 + 2 + 1 + 2 * I_PER_H + LSE),
    "qwen2": ({"model_type": "qwen2", "num_key_value_heads": 4}, 2 + 2 + 1 + 2 * I_PER_H + LSE),
    # through the whole model: vision encoder, connector, LLM
    "llava": ({"model_type": "llava", "num_key_value_heads": 4}, 2 + 2 + 1 + 2 * I_PER_H + LSE),
    # LayerNorms, no gate
    "gpt2": ({"model_type": "gpt2", "n_inner": 688, **NO_DROPOUT}, 2 + 3 + 1 + I_PER_H + LSE),
    "gpt_neox": ({"model_type": "gpt_neox"}, 2 + 3 + 1 + I_PER_H + LSE),
}


def saved_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch, use_cache=False)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def make_model(config: dict[str, Any], blocks: int) -> Any:
    sizes = {**SIZES, **config, "num_hidden_layers": blocks}
    if config["model_type"] != "llava":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).bfloat16().train()
    text = {**sizes, "model_type": "llama"}
    made = AutoConfig.for_model("llava", text_config=text, vision_config=VISION, image_token_id=IMAGE)
    return AutoModelForImageTextToText.from_config(made).bfloat16().train()


def make_batch(model: Any, padded: bool) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.zeros(B, S, dtype=torch.long), "attention_mask": torch.ones(B, S, dtype=torch.long)}
    batch["attention_mask"][0, : 10 if padded else 0] = 0
    if hasattr(model.config, "vision_config"):
        batch["input_ids"][:, 20 : 20 + PATCHES] = IMAGE
        batch["pixel_values"] = torch.zeros(B, 3, 16, 16, dtype=torch.bfloat16)
    return batch


def slope(config: dict[str, Any], strategy: str, padded: bool, activations: Any = "exact") -> float:
    """Units per token and block; `activations` None: the model's own backward."""
    sizes = []
    for blocks in (4, 8):
        model = make_model(config, blocks)
        apply(model, strategy)
        if activations is not None:
            lean(model, activations)
        sizes.append(saved_bytes(model, make_batch(model, padded)))
    return (sizes[1] - sizes[0]) / 4 / (2 * B * S * H)


@pytest.mark.heavy
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", SHAPES)
def test_backward_keeps_the_floor(name: str, padded: bool) -> None:
    config, floor = SHAPES[name]
    assert slope(config, "layernorm-simple", padded) <= floor * 1.03


@pytest.mark.heavy
@pytest.mark.parametrize("name", SHAPES)
def test_8_bit_gate_and_up_take_half(name: str) -> None:
    config, floor = SHAPES[name]
    values = I_PER_H * (1 if name.startswith("gpt") else 2)
    assert slope(config, "layernorm-simple", True, "8bit") <= (floor - values / 2 + values * SCALES / 2) * 1.03


def test_the_llama_shape_meets_the_design() -> None:
    config, _ = SHAPES["llama"]
    assert slope(config, "layernorm-simple", padded=True) <= 11.6
    assert slope(config, "layernorm-simple", padded=True, activations="8bit") <= 8.8
    assert slope(config, "layernorm-simple", padded=True, activations=None) > 18.0  # what it would be


def test_norms_that_do_not_train_cost_no_more() -> None:
    config, floor = SHAPES["llama"]
    assert slope(config, "layernorm", padded=True) <= floor * 1.03
