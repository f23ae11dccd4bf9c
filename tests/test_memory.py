"""What backward keeps, in bytes: a property of the code, counted without a clock.

Units of DESIGN: hidden-size bf16 values per token and block, the slope between models of 4 and 8 blocks. The floor of a
shape is what must be kept if no matmul is done twice: inputs of norms, q, k, v, the output of attention, gate and up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    # LayerNorms, no gate
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


def slope(config: dict[str, Any], strategy: str, padded: bool, leaned: bool = True) -> float:
    """Units per token and block."""
    sizes = []
    for blocks in (4, 8):
        made = AutoConfig.for_model(**{**SIZES, **config, "num_hidden_layers": blocks})
        model = AutoModelForCausalLM.from_config(made).bfloat16().train()
        apply(model, strategy)
        if leaned:
            lean(model)
        mask = torch.ones(B, S, dtype=torch.long)
        mask[0, : 10 if padded else 0] = 0
        sizes.append(saved_bytes(model, {"input_ids": torch.zeros(B, S, dtype=torch.long), "attention_mask": mask}))
    return (sizes[1] - sizes[0]) / 4 / (2 * B * S * H)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", SHAPES)
def test_backward_keeps_the_floor(name: str, padded: bool) -> None:
    config, floor = SHAPES[name]
    assert slope(config, "layernorm-simple", padded) <= floor * 1.03


def test_the_llama_shape_meets_the_design() -> None:
    config, _ = SHAPES["llama"]
    assert slope(config, "layernorm-simple", padded=True) <= 11.6
    assert slope(config, "layernorm-simple", padded=True, leaned=False) > 18.0  # what it would be


def test_norms_that_do_not_train_cost_no_more() -> None:
    config, floor = SHAPES["llama"]
    assert slope(config, "layernorm", padded=True) <= floor * 1.03
