"""After `nt.apply`: fp32 gains and weights in models of any precision, under everything that people do with a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normtune as nt
import zoo

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FEW = ("llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "llava")
TAKES_SLICES = pytest.mark.xfail(
    reason="the parent of its experts slices their parameters itself; train its experts on a float32 base",
    raises=RuntimeError,
    strict=True,
)


def model_of(kind: str, dtype: torch.dtype) -> Any:
    return zoo.model(kind).to(dtype)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return {name: p.grad for name, p in trainable(model).items() if p.grad is not None}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@contextmanager
def streams(model: nn.Module) -> Iterator[list[torch.dtype]]:
    """The dtype of what every block of the LLM returns."""
    seen: list[torch.dtype] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).dtype)

    hooks = [model.get_submodule(name).register_forward_hook(note) for name in nt.anatomy(model).blocks]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=TAKES_SLICES if k == "dbrx" else zoo.beyond_common(k)) for k in zoo.ZOO]
)
def test_full_tuning_of_a_bf16_base_keeps_its_stream_and_has_fp32_gradients(kind: str) -> None:
    """Every kind of module that can hold a parameter, in one strategy."""
    model, batch = model_of(kind, BF16), zoo.batch(kind, BF16)
    with streams(model) as before, torch.no_grad():
        wanted = model(**batch).logits
    nt.apply(model, "full")
    with streams(model) as after:
        output = model(**batch)
    assert after == before and output.logits.dtype == wanted.dtype
    # as large as the rounding of the base's own norms: routing and gates can turn on it
    assert distance(output.logits.detach(), wanted) < 0.15
    output.loss.backward()
    found = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    assert found and all(g.dtype == F32 and g.isfinite().all() for g in found.values())
    assert all(p.dtype == F32 for p in trainable(model).values())


@pytest.mark.heavy
@pytest.mark.parametrize("kind", zoo.common_first())
def test_each_norm_is_as_exact_as_its_original_and_has_its_gradient(kind: str) -> None:
    """Output in bf16 against fp64; gradient of the gain against autograd through the original module in fp32."""
    model = model_of(kind, BF16)
    names = nt.anatomy(model).norms
    originals = {name: copy.deepcopy(model.get_submodule(name)) for name in names}
    nt.apply(model, "layernorm-simple")
    torch.manual_seed(0)
    for name, original in originals.items():
        ours = model.get_submodule(name)
        shape = next(original.parameters()).shape
        x = torch.randn(4096 // shape.numel() + 1, *shape).to(BF16)
        exact = copy.deepcopy(original).double()(x.double())
        output = ours(x)
        assert output.dtype == BF16
        errors = [(y.detach().double() - exact).square().mean().sqrt().item() for y in (output, original(x))]
        assert errors[0] <= errors[1] * (1 + 1e-6)  # a tie may round either way

        reference = copy.deepcopy(original).float()
        grad = torch.randn_like(output)
        ours.zero_grad(set_to_none=True)  # one norm can have several names (zamba2)
        output.backward(grad)
        reference(x.float()).backward(grad.float())
        for key, parameter in ours.named_parameters():
            wanted = reference.get_parameter(key).grad
            assert parameter.grad is not None and wanted is not None and parameter.grad.dtype == F32
            assert distance(parameter.grad, wanted) <= 1e-5, (name, key)


@pytest.mark.heavy
@pytest.mark.parametrize("rate", [1e-5, pytest.param(1e-4, marks=pytest.mark.slow), 1e-3])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_100_steps_move_every_gain_of_a_bf16_base(kind: str, rate: float) -> None:
    model, batch = model_of(kind, BF16), zoo.batch(kind, BF16)
    nt.apply(model, "layernorm-simple")
    gains = trainable(model)
    before = {name: p.detach().clone() for name, p in gains.items()}
    optimizer = torch.optim.AdamW(gains.values(), lr=rate)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = torch.cat([(p != before[name]).flatten() for name, p in gains.items()])
    assert moved.all(), f"{moved.float().mean():.1%} of the gains moved"
    rounded = torch.cat([(p.bfloat16() != before[name].bfloat16()).flatten() for name, p in gains.items()])
    assert rate > 1e-5 or not rounded.all()  # bf16 storage would have lost some


AUTOCAST = {"fp32-in-bf16": (F32, BF16), "fp32-in-fp16": (F32, F16), "bf16-in-bf16": (BF16, BF16)}


@pytest.mark.heavy
@pytest.mark.parametrize(("base", "autocast"), AUTOCAST.values(), ids=list(AUTOCAST))
@pytest.mark.parametrize("strategy", ["layernorm-simple", "layernorm", "full"])
@pytest.mark.parametrize("kind", FEW)
def test_autocast_around_a_tuned_model(kind: str, strategy: str, base: torch.dtype, autocast: torch.dtype) -> None:
    model, batch = model_of(kind, base), zoo.batch(kind, base)
    nt.apply(model, strategy)
    wanted = gradients(model, batch)
    model.zero_grad(set_to_none=True)
    for inside in (False, True):  # backward belongs outside of autocast; inside it works too
        with torch.autocast("cpu", autocast):
            loss = model(**batch).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    assert loss.isfinite()
    found = {name: p.grad / 2 for name, p in trainable(model).items() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(grad.dtype == F32 and grad.isfinite().all() for grad in found.values())
    whole = [torch.cat([grads[name].flatten() for name in wanted]) for grads in (found, wanted)]
    assert distance(*whole) < 0.1


def test_fp16_autocast_on_a_bf16_base_is_refused_by_torch_itself() -> None:
    """Why there is no fourth row above; the docs say so."""
    model = model_of("gpt2", BF16)
    with torch.autocast("cpu", F16), pytest.raises(RuntimeError):
        model(**zoo.batch("gpt2", BF16)).loss.backward()


@pytest.mark.parametrize("strategy", ["layernorm-simple", "full"])
@pytest.mark.parametrize("kind", FEW)
def test_generate_after_apply(kind: str, strategy: str) -> None:
    model = model_of(kind, F32)
    batch = {k: v for k, v in zoo.batch(kind).items() if k != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(**batch, **options)
    nt.apply(model, strategy)
    assert torch.equal(model.generate(**batch, **options), wanted)
    model = model_of(kind, BF16)
    batch = {k: v for k, v in zoo.batch(kind, BF16).items() if k != "labels"}
    nt.apply(model, strategy)
    assert model.generate(**batch, **options).shape == wanted.shape


@pytest.mark.parametrize("base", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", FEW)
def test_save_pretrained_holds_the_tuned_values(kind: str, base: torch.dtype, tmp_path: Path) -> None:
    model, batch = model_of(kind, base), zoo.batch(kind, F32)
    nt.apply(model, "layernorm-simple")
    with torch.no_grad():
        for gain in trainable(model).values():
            gain.add_(2**-12)  # lost in bf16
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=F32)
    values = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, values[name].float()), name
    if base == F32:
        assert torch.equal(again(**batch).logits, model(**batch).logits)


REENTRANT = {"plain": False, "reentrant": True}


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("base", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["layernorm-simple", "full"])
@pytest.mark.parametrize("kind", FEW)
def test_gradient_checkpointing_changes_no_gradient(
    kind: str, strategy: str, base: torch.dtype, reentrant: str
) -> None:
    model, batch = model_of(kind, base).train(), zoo.batch(kind, base)
    nt.apply(model, strategy)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wanted = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": REENTRANT[reentrant]})
    if REENTRANT[reentrant]:
        # reentrant checkpoints see a gradient only where their input has one, and the embedding is frozen
        model.enable_input_require_grads()
    found = gradients(model, batch)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert torch.equal(grad, wanted[name]), name


COMPILED = [
    ("llama", "full", "aot_eager"),
    pytest.param("gpt2", "full", "aot_eager", marks=pytest.mark.slow),
    pytest.param("mixtral", "layernorm-simple", "aot_eager", marks=pytest.mark.slow),
    pytest.param("llama", "layernorm-simple", "aot_eager", marks=pytest.mark.slow),
    pytest.param("gpt2", "layernorm-simple", "aot_eager", marks=pytest.mark.slow),
    pytest.param("mixtral", "full", "aot_eager", marks=pytest.mark.slow),
    pytest.param("llama", "layernorm-simple", "inductor", marks=pytest.mark.slow),
    pytest.param("mixtral", "full", "inductor", marks=pytest.mark.slow),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "strategy", "backend"), COMPILED)
def test_torch_compile_traces_the_whole_model(
    kind: str, strategy: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, batch = model_of(kind, BF16), zoo.batch(kind, BF16)
    nt.apply(model, strategy)
    batch.pop("labels")  # transformers' loss function logs, which cannot be traced for every kind
    torch._dynamo.reset()
    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad(set_to_none=True)
        run(**batch, use_cache=False).logits.float().square().mean().backward()
        grads.append({name: p.grad for name, p in trainable(model).items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        assert grad.dtype == F32 and distance(grad, grads[0][name]) < 0.1, name


def test_no_autocast_is_needed_and_grad_scaling_works() -> None:
    """fp16 autocast with a GradScaler, as mixed precision trainers run it."""
    model, batch = model_of("llama", F32), zoo.batch("llama")
    nt.apply(model, "layernorm-simple")
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for context in (torch.autocast("cpu", F16), nullcontext()):
        with context:
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all((p != before[name]).all() for name, p in trainable(model).items())
