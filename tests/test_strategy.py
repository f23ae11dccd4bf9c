"""Anatomy by structure, strategies, fp32 trainables on any base: rows of architecture x strategy x dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from normtune.errors import InputError
from normtune.recipe import schema
from normtune.strategy import STRATEGIES, apply, tuning
from normtune.structure import PART_NAMES, anatomy
from stubs import inputs, llava, text_model, vision_config

L = "model.language_model.layers"
EXPECTED_NORMS = {
    "llama": (4, 1, 0),
    "qwen2": (4, 1, 0),
    "qwen3": (4, 1, 4),
    "gemma": (4, 1, 0),
    "gpt2": (4, 1, 0),
    "opt": (4, 1, 0),
}


@pytest.mark.parametrize("kind", EXPECTED_NORMS)
def test_norms_of_text_llms(kind: str) -> None:
    found = anatomy(text_model(kind))
    assert (len(found.norms), len(found.final_norm), len(found.qk_norms)) == EXPECTED_NORMS[kind]
    assert len(found.blocks) == 2 and len(found.mlp) >= 2 and found.embed and found.head
    assert not found.vision and not found.connector


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "opt"])
def test_projections_have_their_roles(kind: str) -> None:
    found = anatomy(text_model(kind))
    for role in "qkv":
        assert [n.rpartition(".")[2] for n in getattr(found, f"attn_{role}")] == [f"{role}_proj"] * 2
    assert [n.rpartition(".")[2] for n in found.attn_o] == ["out_proj" if kind == "opt" else "o_proj"] * 2


def test_llava_has_every_part() -> None:
    found = anatomy(llava())
    assert found.norms == [f"{L}.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    assert found.final_norm == ["model.language_model.norm"]
    assert found.vision == ["model.vision_tower"] and found.connector == ["model.multi_modal_projector"]
    assert len(found.vision_norms) == 6
    assert found.embed == ["model.language_model.embed_tokens"] and found.head == ["lm_head"]


def test_recipe_and_code_know_the_same_names() -> None:
    assert set(STRATEGIES) == set(schema.STRATEGIES)
    assert set(PART_NAMES) == set(schema.PARTS)


PAPER = {  # share of trainable parameters in percent, PAPER: table 1 and arithmetic on its configs
    ("layernorm", 32): 3.78,
    ("layernorm", 40): 2.50,
    ("layernorm-simple", 32): 0.0037,
    ("layernorm-simple", 40): 0.0031,
    ("attn-qv", 32): 19.02,
    ("attn-qv", 40): 18.24,
    ("attn-mlp", 32): 65.21,
    ("attn-mlp", 40): 66.24,
}


@pytest.mark.parametrize(("strategy", "layers"), PAPER)
def test_share_of_the_paper(strategy: str, layers: int) -> None:
    hidden, inner, heads = (4096, 11008, 32) if layers == 32 else (5120, 13824, 40)
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )
    vision = type(vision_config())(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, projector_hidden_act="linear")
        )
    report = apply(model, strategy)
    assert report.percent == pytest.approx(PAPER[strategy, layers], rel=2e-3, abs=4.9e-5)
    if strategy == "layernorm-simple":
        assert report.parameters == (262_144 if layers == 32 else 409_600)


CASES = [
    *STRATEGIES,
    ["norms", "connector"],
    ["norms", "lora"],
    ["mlp", "lora"],
    ["norms", "final_norm", "vision_norms"],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("strategy", CASES, ids=str)
def test_trainables_are_fp32_and_all_get_gradients(strategy: Any, tied: bool, dtype: torch.dtype) -> None:
    model = llava(tied, "linear").to(dtype)
    before = model(**inputs(model)).logits
    report = apply(model, strategy, rank=4)
    batch = inputs(model)
    output = model(**batch)
    assert output.logits.dtype == dtype
    torch.testing.assert_close(output.logits, before, atol=0.15 if dtype == torch.bfloat16 else 1e-6, rtol=0.05)
    output.loss.backward()
    last = ("model.vision_tower.encoder.layers.1.", "model.vision_tower.post_layernorm")  # LLaVA reads layer -2
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in report.trainable)
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None or name.startswith(last)
        elif not any(part in name for part in ("norm", "lora")):
            assert parameter.dtype == dtype
    assert report.bytes == 4 * report.parameters
    assert not any("linear_2" in name for name in report.trainable)


def test_identity_layer_is_not_counted() -> None:
    linear, mlp = llava(act="linear"), llava(act="gelu")
    counted = [apply(model, "connector") for model in (linear, mlp)]
    assert counted[0].parameters == 32 * 32 + 32 and counted[1].parameters == 2 * (32 * 32 + 32)
    assert counted[1].total - counted[0].total == 32 * 32 + 32


def test_tied_head_counts_once() -> None:
    untied, tied = apply(llava(False), "layernorm"), apply(llava(True), "layernorm")
    assert untied.parameters - tied.parameters == 100 * 32
    assert "lm_head.weight" not in tied.trainable and tied.skipped == []


def test_last_strategy_holds_and_untouched_tensors_go_back() -> None:
    model = llava().bfloat16()
    reference = {n: p.clone() for n, p in model.named_parameters()}
    apply(model, "full")
    apply(model, "lora", rank=4)
    report = apply(model, "layernorm-simple")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in report.trainable)
        assert parameter.dtype == (torch.float32 if name in report.trainable else torch.bfloat16)
        assert torch.equal(parameter.bfloat16(), reference[name])
    assert tuning(model).tuned == report.trainable


def test_tensors_tuned_by_an_earlier_strategy_stay_fp32_and_frozen() -> None:
    model = llava().bfloat16()
    apply(model, "connector")
    train_steps(model, 2)
    apply(model, "layernorm-simple")
    weight = model.get_submodule("model.multi_modal_projector.linear_1").weight
    assert weight.dtype == torch.float32 and not weight.requires_grad
    assert "model.multi_modal_projector.linear_1.weight" in tuning(model).tuned
    assert model(**inputs(model)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [1e-5, 1e-3])
def test_every_gain_of_a_bf16_base_moves(rate: float) -> None:
    model = llava().bfloat16()
    report = apply(model, "layernorm-simple")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in report.trainable}
    train_steps(model, 20, rate)
    moved = [(p != before[n]).float().mean().item() for n, p in model.named_parameters() if n in before]
    assert moved == [1.0] * 4


@pytest.mark.parametrize("strategy", ["layernorm", "full", "attn-mlp"])
def test_bf16_gradients_are_those_of_a_bf16_model_in_fp32(strategy: str) -> None:
    """The cast layers give the gradient that autograd gives through the same cast."""
    model = llava().bfloat16()
    reference = copy.deepcopy(model)
    apply(model, strategy)
    model(**inputs(model)).loss.backward()
    reference(**inputs(reference)).loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            a, b = parameter.grad, wanted[name].grad.float()
            assert (a - b).norm() <= 0.06 * b.norm() + 1e-6, name


def test_cast_linear_saves_no_copy_of_the_weight() -> None:
    from normtune.kernels.precision import CastLinear

    weight = torch.randn(64, 32, requires_grad=True)
    x = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = CastLinear.apply(x, weight, None)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_apply_costs_only_the_trainable_tensors() -> None:
    model = llava().bfloat16()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    report = apply(model, "layernorm-simple")
    after = sum(p.numel() * p.element_size() for p in model.parameters())
    assert after - before == report.bytes // 2


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("layernrom", ["'layernrom'", "'layernorm'"]),
        (["norm"], ["'norm'", "'norms'"]),
        ([], ["empty"]),
        (["qk_norms"], ["no part 'qk_norms'", "norms"]),
        (["regex:nothing_like_it"], ["matches no parameter"]),
        (["regex:("], ["no regular expression"]),
    ],
)
def test_wrong_strategy_says_what_to_do(strategy: Any, words: list[str]) -> None:
    model = llava()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError) as error:
        apply(model, strategy)
    assert all(word in str(error.value) for word in words), error.value
    assert [p.requires_grad for p in model.parameters()] == before


def test_text_llm_skips_the_connector_and_fused_attention_is_explained() -> None:
    assert apply(text_model("llama"), "layernorm").skipped == ["connector"]
    with pytest.raises(InputError, match="fused"):
        apply(text_model("gpt2"), ["attn_qv"])
    with pytest.raises(InputError, match="no part 'connector'"):
        apply(text_model("llama"), ["connector"])


def test_model_without_gains_is_refused() -> None:
    model = text_model("llama")
    for block in model.model.layers:
        block.input_layernorm = torch.nn.Identity()
        block.post_attention_layernorm = torch.nn.LayerNorm(32, elementwise_affine=False)
    with pytest.raises(InputError, match="no norm with a learned gain"):
        anatomy(model)


def train_steps(model: Any, steps: int, rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**inputs(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
