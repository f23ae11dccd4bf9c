"""Roles of norms over architectures, written down from their modeling source, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import zoo
from normtune.analysis import ROLES, norm_roles
from normtune.errors import InputError
from normtune.structure import anatomy

IN, POST, MLP = "input", "post_attention", "post_mlp"
TWO = {"input_layernorm": IN, "post_attention_layernorm": POST}
SANDWICH = {**TWO, "pre_feedforward_layernorm": POST, "post_feedforward_layernorm": MLP}

# Norms of a block by their names in it (of block 0, or of the block that is named), in transformers 5.23.
EXPECTED: dict[str, dict[str, str]] = {
    "llama": TWO,
    "qwen3": TWO,
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "olmo2": {"post_attention_layernorm": POST, "post_feedforward_layernorm": MLP},  # none before attention
    "glm4": {**TWO, "post_self_attn_layernorm": POST, "post_mlp_layernorm": MLP},  # the names are misleading
    "gpt2": {"ln_1": IN, "ln_2": POST},
    "opt": {"self_attn_layer_norm": IN, "final_layer_norm": POST},
    "phi": {"input_layernorm": IN},  # parallel: attention and MLP read one norm
    "falcon_new": {"ln_attn": IN, "ln_mlp": IN},  # parallel with two norms: both are called before attention
    "dbrx": {"norm_attn_norm.norm_1": IN, "norm_attn_norm.norm_2": POST},  # a wrapper around norms and attention
    "axk2": {"input_layernorm.norm": IN, "post_attention_layernorm": POST},  # a norm with a gate of its own
    "longcat_flash": {  # two attentions and two MLPs per block
        "input_layernorm.0": IN,
        "post_attention_layernorm.0": POST,
        "input_layernorm.1": IN,
        "post_attention_layernorm.1": POST,
    },
    "modernbert-decoder": {"mlp_norm": POST},  # nothing before the first attention
    "mamba": {"norm": IN},  # a mixer instead of attention
    "jamba": {"input_layernorm": IN, "pre_ff_layernorm": POST},
    "zamba2": {"input_layernorm": IN},
    "llava": TWO,
    "blip-2": {"self_attn_layer_norm": IN, "final_layer_norm": POST},  # the whole does not run without an image
}
OTHERS = {"qwen3": {"qk": 4, "final": 1}, "llava": {"vision": 6, "final": 1}, "gpt2": {"final": 1}}


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_of_the_first_block(name: str) -> None:
    model = zoo.model(name)
    found, roles = anatomy(model), norm_roles(model)
    prefix = found.blocks[0] + "."
    own = {key.removeprefix(prefix): role for key, role in roles.items() if key in found.norms and prefix in key}
    assert own == EXPECTED[name]
    every = [*found.norms, *found.qk_norms, *found.final_norm, *found.vision_norms]
    assert sorted(roles) == sorted(every)
    assert set(roles.values()) <= set(ROLES)
    if name in OTHERS:
        counts = Counter(roles[key] for key in every if key not in found.norms)
        assert counts == OTHERS[name]


def test_every_block_has_its_roles() -> None:
    roles = norm_roles(zoo.model("gemma2"))
    assert Counter(roles.values()) == {"input": 2, "post_attention": 4, "post_mlp": 2, "final": 1}


def test_a_block_shared_by_others_and_one_that_only_an_image_reaches() -> None:
    shared = norm_roles(zoo.model("zamba2"))
    names = {"mamba_decoder.input_layernorm": IN, "shared_transformer.input_layernorm": IN}
    names["shared_transformer.pre_ff_layernorm"] = POST
    for block in (1, 2):
        assert {name: shared[f"model.layers.{block}.{name}"] for name in names} == names
    crossed = norm_roles(zoo.model("mllama"))  # its block 1 attends to the image, and is left out for text
    assert {name: crossed[f"model.language_model.layers.1.{name}"] for name in TWO} == TWO


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2"])
def test_a_skeleton_without_weights_has_the_same_roles(name: str) -> None:
    with torch.device("meta"):
        skeleton = zoo.skeleton(name)
    assert norm_roles(skeleton) == norm_roles(zoo.model(name))
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_the_model_is_left_as_it_was() -> None:
    model = zoo.model("qwen3").train()
    model.model.layers[0].mlp.eval()
    before = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    norm_roles(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="no norm with a learned gain"):
        norm_roles(zoo.model("olmo"))
    model = zoo.model("llama")
    model.model.forward = lambda **_: 1 / 0
    with pytest.raises(InputError, match="does not run on four tokens"):
        norm_roles(model)
    unused = zoo.model("llama")
    unused.model.layers[1].spare = torch.nn.RMSNorm(32)
    with pytest.raises(InputError, match=r"layers\.1\.spare is not called"):
        norm_roles(unused)
