"""Lean forwards: outputs stay bit for bit, gradients are autograd's, and every module gets its own forward back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from normtune.adapter import load_adapter, merge, save_adapter
from normtune.errors import InputError
from normtune.kernels.attention import LeanAttention, additive, repeat
from normtune.kernels.functions import kept, quantize
from normtune.kernels.lean import swap
from normtune.kernels.mlp import find_mlp
from normtune.strategy import apply, lean, restore
from stubs import inputs, llava, text_model

NOT_RECOGNIZED = "not recognized as an MLP"


def outcome(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: Any, batch: dict[str, torch.Tensor]) -> None:
    logits, grads = outcome(ours, batch)
    wanted_logits, wanted = outcome(theirs, batch)
    assert torch.equal(logits, wanted_logits)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-12, name


@pytest.mark.heavy
@pytest.mark.parametrize("name", zoo.common_first())
def test_gradients_of_gains_are_those_of_autograd(name: str) -> None:
    ours = zoo.model(name)
    theirs = copy.deepcopy(ours)
    apply(ours, "layernorm-simple")
    apply(theirs, "layernorm-simple")
    swaps = lean(ours)
    assert swaps.norms > 0
    assert_same(ours, theirs, zoo.batch(name))


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["full", "lora", "attn-mlp", ["norms", "qk_norms", "final_norm"]], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_neox", "llava"])
def test_other_strategies_get_the_same_gradients(name: str, strategy: Any) -> None:
    if name in ("llama", "llava", "gpt_neox") and "qk_norms" in strategy:
        pytest.skip("no QK-norms there")
    ours = zoo.model(name)
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        apply(model, strategy, rank=2, dropout=0.0)
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:  # zero at first: no gradient would reach A
                nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    lean(ours)
    assert_same(ours, theirs, zoo.batch(name))


@pytest.mark.parametrize("strategy", ["layernorm-simple", "layernorm"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "llava"])
def test_8_bit_activations_move_gradients_by_less_than_a_percent(name: str, strategy: str) -> None:
    ours = zoo.model(name)
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        apply(model, strategy)
    assert lean(ours, "8bit").mlps > 0
    logits, grads = outcome(ours, zoo.batch(name))
    wanted_logits, wanted = outcome(theirs, zoo.batch(name))
    assert torch.equal(logits, wanted_logits)
    ours_flat, wanted_flat = (torch.cat([d[key].flatten() for key in wanted]) for d in (grads, wanted))
    assert 0 < (ours_flat - wanted_flat).norm() <= 0.01 * wanted_flat.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "size"), [(688, 172), (11008, 172), (14336, 128), (64, 64), (10, 10), (331, 331)])
def test_quantization_is_off_by_half_a_step_at_most(width: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, width, generator=generator) * 10.0 ** torch.randint(-4, 4, (3, 5, 1), generator=generator)
    x[0] = 0
    x = x.to(dtype)
    values, scale = quantize(x)
    assert values.dtype == torch.int8 and scale.dtype == dtype and values.shape == (3, 5, width // size, size)
    assert int(values.abs().max()) <= 127
    back, steps = kept((values, scale)).float(), scale.float().expand(values.shape).flatten(-2)
    rounding = 2 * torch.finfo(dtype).eps * x.float().abs()  # of x / scale and of values * scale
    assert ((back - x.float()).abs() <= 0.5 * steps + rounding).all()
    assert torch.equal(back[0], torch.zeros(5, width))


def test_activations_are_exact_or_8bit() -> None:
    model = text_model("llama")
    with pytest.raises(InputError, match="exact or 8bit"):
        lean(model, "4bit")  # type: ignore[arg-type]
    lean(model, "8bit")
    apply(model, "layernorm-simple")  # swaps the forwards once more, with the same choice
    assert vars(model.model.layers[0].mlp)["forward"].args[-1] is True


COMMON = ("llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt2", "phi", "lfm2", "llava", "qwen2_vl")


@pytest.mark.parametrize("name", COMMON)
def test_mlps_of_common_models_are_recognized(name: str) -> None:
    assert not [what for what in lean(zoo.model(name)).left if NOT_RECOGNIZED in what]


def test_what_is_not_recognized_is_left_alone_and_named() -> None:
    model = zoo.model("mixtral")
    assert lean(model).left == ["2 x MixtralSparseMoeBlock: not recognized as an MLP"]
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


class Odd(nn.Module):
    """A gated MLP with something in between that changes its result."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act, self.scale = nn.SiLU(), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x) * self.scale)  # type: ignore[no-any-return]


def test_an_mlp_is_known_by_what_it_computes() -> None:
    assert find_mlp(Odd(1.0)) is not None and find_mlp(Odd(1.5)) is None
    found = find_mlp(Odd(1.0))
    assert found is not None and (found.gate, found.up, found.down) == ("gate", "up", "down")


def test_dropout_behind_the_mlp_stays() -> None:
    model = text_model("gpt2").train()
    found = find_mlp(model.transformer.h[0].mlp)
    assert found is not None and found.dropout == "dropout"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
def test_attention_with_grouped_keys(kind: str, groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, *kv = (torch.randn(2, heads, 9, 8, generator=generator).to(dtype) for heads in (4, 4 // groups, 4 // groups))
    mask = None if kind == "causal" else (torch.rand(2, 1, 9, 9, generator=generator) > 0.3) | torch.eye(9).bool()
    mask = additive(mask, dtype) if kind == "additive" else mask
    results = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (q, *kv)]
        if ours:
            out = LeanAttention.apply(*leaves, mask, mask is None, 0.3)
        else:
            keys, values = (repeat(t, groups) for t in leaves[1:])
            out = nn.functional.scaled_dot_product_attention(
                leaves[0], keys, values, mask, is_causal=mask is None, scale=0.3
            )
        out.square().sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if a is results[0][0] else 2e-2, atol=0 if a is results[0][0] else 1e-2)


def test_restore_gives_every_forward_back() -> None:
    model = llava()
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    lean(model)
    assert any("forward" in vars(module) for module in model.modules())
    restore(model)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == before
    assert not any("_normtune_lean" in vars(module) for module in model.modules())


def test_lean_holds_through_other_strategies_adapters_and_a_merge(tmp_path: Any) -> None:
    model = llava().bfloat16()
    lean(model)
    apply(model, "layernorm-simple")
    norm = model.model.language_model.layers[0].input_layernorm
    assert type(vars(norm)["forward"]).__name__ == "Lean"
    model(**inputs(model)).loss.backward()
    assert norm.weight.grad.dtype == torch.float32
    apply(model, "connector")  # the norm is bf16 again, and still lean
    assert norm.weight.dtype == torch.bfloat16 and type(vars(norm)["forward"]).__name__ == "Lean"
    apply(model, "layernorm-simple")
    with torch.no_grad():
        norm.weight.add_(0.25)
    folder = save_adapter(model, tmp_path / "a")
    other = llava().bfloat16()
    lean(other)
    load_adapter(other, folder)
    with torch.no_grad():
        assert torch.equal(other(**inputs(other)).logits, model(**inputs(model)).logits)
    merge(model, torch.float32)
    assert not any("forward" in vars(module) for module in model.modules())


def test_copies_generation_and_checkpointing() -> None:
    model = text_model("llama")
    apply(model, "layernorm-simple")
    plain = copy.deepcopy(model)
    lean(model)
    twin = copy.deepcopy(model)
    ids = inputs(model)["input_ids"]
    wanted = plain.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    with torch.no_grad():
        twin.model.layers[0].input_layernorm.weight.mul_(2)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, plain.train(), inputs(model))


class Clamped(nn.Module):
    """An MLP that bounds its gate: DeepSeek V4's and GLM 5's do, at 10."""

    def __init__(self, limit: float = 10.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act, self.limit = nn.SiLU(), limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)
        return self.down_proj(self.act(gate) * self.up_proj(x))


def test_a_clamp_that_small_values_do_not_reach_is_seen() -> None:
    assert find_mlp(Clamped()) is None
    assert find_mlp(Clamped(limit=torch.inf)) is not None


def test_mlps_that_print_alike_are_told_apart() -> None:
    model = nn.ModuleList([Clamped(limit=torch.inf), Clamped(limit=1.0)])
    x = 10 * torch.randn(4, 32)
    before = [layer(x) for layer in model]
    assert swap(model, {}, ["0", "1"], []).mlps == 1
    assert all(torch.equal(layer(x), y) for layer, y in zip(model, before, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_lean_under_autocast_on_a_float32_base(name: str) -> None:
    model = zoo.model(name)
    apply(model, "layernorm-simple")
    batch = zoo.batch(name)
    gains = [p for p in model.parameters() if p.requires_grad]
    found = []
    for leaned in (False, True):
        if leaned:
            lean(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).logits.float().square().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, gains)]))
    assert (found[1] - found[0]).norm() <= 0.03 * found[0].norm()
