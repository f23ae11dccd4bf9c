"""Anatomy by structure, strategies, fp32 trainables on any base: rows of architecture x strategy x dtype."""

from __future__ import annotations

import contextlib
import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

import zoo
from normtune.accounting import denominator, shares
from normtune.errors import InputError
from normtune.recipe import ModelRecipe, schema
from normtune.skeletons import assembled_skeleton
from normtune.strategy import (
    STRATEGIES,
    Movement,
    apply,
    base_gains,
    check_step_size,
    is_lora,
    movement,
    parameter_groups,
    settle,
    tuning,
)
from normtune.structure import PART_NAMES, anatomy
from stubs import inputs, llava, text_model


def test_recipe_and_code_know_the_same_names() -> None:
    assert set(STRATEGIES) == set(schema.STRATEGIES)
    assert set(PART_NAMES) == set(schema.PARTS)


PAPER = {  # share of trainable parameters in percent: the paper's table 1, and arithmetic on its configs
    "7B": {
        "layernorm": 3.78,
        "layernorm-simple": 0.0037,
        "attn-qv": 19.02,
        "attn-mlp": 65.21,
        ("lora", 32): 4.86,
        ("lora", 64): 5.92,
    },
    "13B": {
        "layernorm": 2.50,
        "layernorm-simple": 0.0031,
        "attn-qv": 18.24,
        "attn-mlp": 66.24,
        ("lora", 32): 3.41,
        ("lora", 64): 4.30,
    },
}


@pytest.mark.heavy
@pytest.mark.parametrize("size", ["7B", pytest.param("13B", marks=pytest.mark.slow)])
def test_shares_of_the_paper_from_configs_alone(size: str, tmp_path: Path) -> None:
    hidden, inner, layers = (4096, 11008, 32) if size == "7B" else (5120, 13824, 40)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=32000,
    ).save_pretrained(tmp_path / "llm")
    CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ).save_pretrained(tmp_path / "vision")
    recipe = ModelRecipe(llm=str(tmp_path / "llm"), vision=str(tmp_path / "vision"), connector="linear")
    model = assembled_skeleton(recipe)
    parts = denominator(model)
    assert parts["LLM"] == (6_738_415_616 if size == "7B" else 13_015_864_320)
    assert parts["vision encoder"] == 303_179_776 and parts["connector"] == 1024 * hidden + hidden
    for key, percent in PAPER[size].items():
        name, rank = key if isinstance(key, tuple) else (key, 64)
        ((share,), _) = shares(model, [name], rank)
        assert share.percent == pytest.approx(percent, rel=2e-3, abs=4.9e-5), key
        if name != "lora":
            assert share.total == sum(parts.values())
        if name == "layernorm-simple":
            assert share.trainable == (262_144 if size == "7B" else 409_600)


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


def live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    found = {}
    for tensor in tensors:
        with contextlib.suppress(RuntimeError):  # wrappers that compilation leaves behind have no storage
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(size for address, size in found.items() if address)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, id="fp32", marks=pytest.mark.slow), pytest.param(torch.bfloat16, id="bf16")]
)
@pytest.mark.parametrize(
    "strategy",
    ["layernorm-simple", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layernorm", "full"))],
)
def test_apply_allocates_the_trainable_tensors_and_nothing_else(strategy: str, dtype: torch.dtype) -> None:
    """bf16: an fp32 tensor for each trainable one; gains leave their old tensor as the base's value, others free it.
    fp32: nothing but that copy of the trainable gains. In both: a sample of at most 4096 values of other tensors."""
    model = llava().to(dtype)
    tuning(model)
    held = live_tensors()  # so that nothing of other tests is freed meanwhile
    before = storage_bytes(held)
    report = apply(model, strategy)
    grown = storage_bytes(live_tensors()) - before
    grown -= sum(t.nbytes for t in tuning(model).samples.values())
    assert all(t.numel() <= 4096 for t in tuning(model).samples.values())
    gains = sum(p.numel() for n, p in model.named_parameters() if n in tuning(model).base)
    assert gains >= 4 * 32
    if dtype == torch.float32:
        assert grown == 4 * gains
    else:
        assert grown == report.bytes - 2 * (report.parameters - gains)


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


def test_text_llm_skips_the_connector() -> None:
    assert apply(text_model("llama"), "layernorm").skipped == ["connector"]
    with pytest.raises(InputError, match="no part 'connector'"):
        apply(text_model("llama"), ["connector"])


@pytest.mark.parametrize("strategy", ["attn-qv", ["attn_qv"], ["attn_q"]], ids=str)
def test_fused_attention_is_explained(strategy: Any) -> None:
    model = text_model("gpt2")
    with pytest.raises(InputError, match=r"(?s)fused projection \(transformer\.h\.0\.attn\.c_attn\).*\[attn_qkv\]"):
        apply(model, strategy)
    report = apply(model, ["attn_qkv"])
    assert report.trainable == [f"transformer.h.{i}.attn.c_attn.{k}" for i in (0, 1) for k in ("weight", "bias")]


def without_gains() -> Any:
    model = text_model("llama")
    for block in model.model.layers:
        block.input_layernorm = torch.nn.Identity()
        block.post_attention_layernorm = torch.nn.LayerNorm(32, elementwise_affine=False)
    return model


@pytest.mark.parametrize("strategy", ["layernorm", "layernorm-simple", ["norms", "head"]], ids=str)
def test_model_without_gains_is_refused(strategy: Any) -> None:
    words = r"(?s)no norm with a learned gain.*LayerNorm.*strategies that work on it: attn-qv, attn-mlp, lora, full"
    with pytest.raises(InputError, match=words):
        anatomy(without_gains())
    with pytest.raises(InputError, match=words):
        apply(without_gains(), strategy)


@pytest.mark.parametrize("strategy", ["attn-qv", "attn-mlp", "lora", "full"])
def test_what_the_refusal_offers_works(strategy: str) -> None:
    model = without_gains()
    assert apply(model, strategy, rank=2).parameters > 0
    model(**inputs(model)).loss.backward()


def test_float16_base_is_refused_and_untouched() -> None:
    model = llava().half()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=r"(?s)float16.*bfloat16"):
        apply(model, "layernorm-simple")
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["attn_q", "attn_v"], {"q_proj", "v_proj"}),
        (["mlp"], {"gate_proj", "up_proj", "down_proj"}),
        (["regex:layers.0.*down", "attn_o"], {"down_proj", "o_proj"}),
    ],
    ids=["all", "q-v", "mlp", "regex-o"],
)
def test_lora_targets(targets: list[str] | None, leaves: set[str]) -> None:
    model = llava()
    report = apply(model, ["lora"], rank=2, targets=targets)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in report.trainable} == leaves


@pytest.mark.heavy
@pytest.mark.parametrize("name", zoo.common_first())
def test_lora_adapts_every_linear_layer_and_leaves_no_trace(name: str) -> None:
    model = zoo.model(name)
    modules = [key for key, _ in model.named_modules()]
    linears = anatomy(model).linears
    report = apply(model, ["lora"], rank=2)
    adapted = {key.split(".lora_")[0] for key in report.trainable}
    assert adapted == set(linears) and anatomy(model).linears == linears
    model(**zoo.batch(name), use_cache=False).loss.backward()
    reached = [key for key, p in model.named_parameters() if ".lora_B." in key and p.grad is not None]
    assert reached
    apply(model, "layernorm-simple")
    assert [key for key, _ in model.named_modules()] == modules


@pytest.mark.parametrize(("targets", "words"), [(["atn_q"], "did you mean 'attn_q'"), (["embed"], "no linear layer")])
def test_wrong_lora_targets(targets: list[str], words: str) -> None:
    model = llava()
    with pytest.raises(InputError, match=words):
        apply(model, ["lora"], targets=targets)
    assert not any(is_lora(name) for name, _ in model.named_parameters())


def test_lora_on_transposed_layers_starts_as_the_base() -> None:
    model = text_model("gpt2")
    before = model(**inputs(model)).logits
    report = apply(model, ["lora"], rank=2)
    assert torch.equal(model(**inputs(model)).logits, before) and len(report.trainable) == 2 * 2 * 4


def test_parameter_groups() -> None:
    model = llava()
    with pytest.raises(InputError, match=r"normtune\.apply"):
        parameter_groups(model, 1e-3)
    apply(model, ["norms", "lora", "connector"], rank=2)
    groups = parameter_groups(
        model, 1e-3, learning_rates={"norms": 1e-2}, weight_decay=0.1, weight_decays={"lora": 0.0, "norms": 0.5}
    )
    found = {(g["part"], g["lr"], g["weight_decay"]) for g in groups}
    assert found == {("norms", 1e-2, 0.0), ("lora", 1e-3, 0.0), ("connector", 1e-3, 0.1), ("connector", 1e-3, 0.0)}
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match=r"mlp, which is not trained"):
        parameter_groups(model, 1e-3, weight_decays={"mlp": 0.1})


def test_gains_with_two_dimensions_do_not_decay() -> None:
    model = zoo.model("cohere_qk")
    apply(model, ["qk_norms", "mlp"])
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert {(g["part"], g["weight_decay"]) for g in groups} == {("qk_norms", 0.0), ("mlp", 0.1)}
    assert {p.dim() for g in groups if g["part"] == "qk_norms" for p in g["params"]} == {2}


def test_loose_parameters_go_with_the_connector() -> None:
    model = zoo.model("llava_next")
    report = apply(model, "connector")
    assert report.part_of["model.image_newline"] == "connector"
    assert denominator(model)["connector"] == report.parameters


def test_a_specific_part_wins_over_the_llm() -> None:
    report = apply(text_model("llama"), ["llm", "norms"])
    assert sorted(set(report.part_of.values())) == ["llm", "norms"]
    assert sum(part == "norms" for part in report.part_of.values()) == 4


def test_an_encoder_inside_the_llm_is_no_part_of_it() -> None:
    model = text_model("llama")
    model.model.eyes = llava().model.vision_tower
    report = apply(model, ["llm"])
    assert anatomy(model).vision == ["model.eyes"] and not any("eyes" in name for name in report.trainable)
    assert denominator(model)["vision encoder"] == sum(p.numel() for p in model.model.eyes.parameters())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_denominator_is_the_whole_model(name: str) -> None:
    with torch.device("meta"):
        model = zoo.skeleton(name)
    assert sum(denominator(model).values()) == sum(p.numel() for p in model.parameters())


def test_experts_that_lora_does_not_reach_are_counted() -> None:
    model = zoo.model("qwen3_moe")
    experts = [p for p in model.parameters() if p.dim() == 3]
    (note,) = apply(model, ["lora"], rank=2).notes
    assert f"{len(experts)} stacked expert tensors ({sum(p.numel() for p in experts):,} weights)" in note


class MeanAbsoluteNorm(torch.nn.Module):
    """A norm of its own kind: x * g / mean |x|."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight / x.abs().mean(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_norm_of_no_known_formula_trains_and_is_reported(dtype: torch.dtype) -> None:
    model = text_model("llama")
    for block in model.model.layers:
        block.input_layernorm = MeanAbsoluteNorm(32)
    model.to(dtype)
    report = apply(model, "layernorm-simple")
    assert report.formulas == {"own": 2, "rms*g": 2}
    (note,) = report.notes
    assert note.startswith("2 norms (MeanAbsoluteNorm) follow no known formula (nearest: rms*g, off by 0.")
    train_steps(model, 1)
    assert movement(model)["norms"]["moved"] == 100.0


def test_the_dtype_of_a_base_that_is_cast_before_it_is_tuned() -> None:
    model = text_model("llama").half()
    with pytest.raises(InputError, match="float16"):
        apply(model, "layernorm-simple")
    model.bfloat16()
    apply(model, "layernorm-simple")
    assert tuning(model).dtype == torch.bfloat16


def test_trained_lora_is_not_thrown_away() -> None:
    model = llava()
    apply(model, ["lora"], rank=2)
    apply(model, "layernorm-simple")  # nothing has been trained yet
    apply(model, ["lora"], rank=2)
    train_steps(model, 1)
    for strategy, rank in (("layernorm-simple", 2), ("lora", 4)):
        with pytest.raises(InputError, match=r"(?s)throw away the LoRA.*normtune\.merge"):
            apply(model, strategy, rank=rank)
    before = model(**inputs(model)).logits
    apply(model, ["norms", "lora"], rank=2)
    assert torch.equal(model(**inputs(model)).logits, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2.5}, "rank 2.5"),
        ({"alpha": 0}, "alpha 0"),
        ({"dropout": 1.5}, "dropout 1.5"),
        ({"targets": []}, "empty list of targets"),
        ({"targets": ["regex:("]}, "no regular expression"),
    ],
    ids=str,
)
def test_wrong_lora_options_change_nothing(options: dict[str, Any], words: str) -> None:
    model = llava()
    apply(model, ["lora"], rank=2)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=words):
        apply(model, ["lora"], **options)
    assert [name for name, _ in model.named_modules()] == modules and tuning(model).lora is not None


@pytest.mark.parametrize("strategy", [None, [1], 7], ids=str)
def test_what_is_no_strategy(strategy: Any) -> None:
    with pytest.raises(InputError, match=r"strategy|unknown part"):
        apply(llava(), strategy)


def test_a_regex_part_means_the_same_with_lora_in_the_model() -> None:
    model = llava()
    pattern = r"regex:language_model.*q_proj\.weight"
    alone = apply(model, [pattern]).parameters
    report = apply(model, [pattern, "lora"], rank=2)
    assert report.by_part(model)[pattern] == alone
    assert all(report.part_of[name] == "lora" for name in report.trainable if is_lora(name))


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(text_model("llama"))
    with pytest.raises(InputError, match=r"offloaded.*\n.*without offloading"):
        apply(model, "layernorm-simple")


def test_movement_is_measured_against_the_base() -> None:
    model = llava().bfloat16()
    with pytest.raises(InputError, match=r"normtune\.apply"):
        movement(model)
    apply(model, ["norms", "final_norm", "connector"])
    whole = Movement(model)
    assert movement(model) == {part: {"moved": 0.0, "max_change": 0.0} for part in ("norms", "final_norm")}
    with torch.no_grad():
        model.model.language_model.norm.weight[:8] += 0.5
        model.model.multi_modal_projector.linear_1.weight.add_(1)
    assert movement(model)["final_norm"] == {"moved": 25.0, "max_change": 0.5}
    assert movement(model)["norms"]["moved"] == 0.0
    assert 0 < whole.measure()["connector"]["moved"] < 100.0


@pytest.mark.parametrize(
    ("dtype", "value", "rate", "fits"),
    [
        (torch.float32, 1.0, 5e-8, False),
        (torch.float32, 1.0, 7e-8, True),
        (torch.bfloat16, 1.0, 3e-3, False),
        (torch.bfloat16, 1.0, 5e-3, True),
        (torch.bfloat16, 0.01, 4e-5, True),
        (torch.float32, 0.0, 1e-12, True),
    ],
    ids=str,
)
def test_a_step_that_would_be_rounded_away_is_told_beforehand(
    dtype: torch.dtype, value: float, rate: float, fits: bool
) -> None:
    weight = torch.nn.Parameter(torch.full((64,), value, dtype=dtype))
    stepped = (weight.double() + rate).to(dtype)
    assert bool((stepped != weight).all()) == fits  # the claim itself
    groups = [{"params": [weight], "lr": rate, "part": "norms"}]
    if fits:
        check_step_size(groups)
    else:
        with pytest.raises(InputError, match=r"rounded away: 100% of part norms.*(raise it|normtune\.apply)"):
            check_step_size(groups)


def test_values_written_behind_torch_are_seen() -> None:
    """DeepSpeed and others write through `.data`, which torch does not count as a change."""
    model = llava().bfloat16()
    apply(model, "connector")
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] += 1
    apply(model, "layernorm-simple")
    assert "model.multi_modal_projector.linear_1.weight" in tuning(model).tuned
    assert "model.multi_modal_projector.linear_2.weight" not in tuning(model).tuned


def test_settle_gives_the_base_back() -> None:
    model = llava().bfloat16()
    reference = copy.deepcopy(model)
    gains = base_gains(model)
    for strategy in ("full", "layernorm", "lora"):
        apply(model, strategy, rank=2)
    apply(model, "layernorm-simple")
    settle(model)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
        assert not p.requires_grad
    assert not any("forward" in vars(module) for module in model.modules())
    assert {n: t.tolist() for n, t in base_gains(model).items()} == {n: t.tolist() for n, t in gains.items()}


def test_base_tensors_that_are_fp32_on_purpose_stay_as_they_are() -> None:
    model = llava().bfloat16()
    norm = model.model.vision_tower.pre_layrnorm
    norm.float()
    apply(model, "layernorm-simple")
    assert "forward" not in vars(norm) and norm.weight.dtype == torch.float32
    apply(model, ["vision_norms"])
    settle(model)
    assert norm.weight.dtype == torch.float32


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
