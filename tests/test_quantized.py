"""NF4 and int8 bases: loaded, tuned, refused where they cannot be trained; the adapter fits the bf16 original."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import normtune as nt
from models import tiny_llm, tiny_vision
from normtune.errors import InputError
from normtune.kernels import is_quantized, keep_differentiable
from stubs import inputs

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quant)"
)
KINDS = ("nf4", "int8")
BF16, F32 = torch.bfloat16, torch.float32


def packed(model: Any) -> dict[str, torch.Tensor]:
    """The quantized weights' own bytes."""
    return {name: p.data for name, p in model.named_parameters() if is_quantized(p)}


def batch(model: Any) -> dict[str, torch.Tensor]:
    found = inputs(model)
    if "pixel_values" in found:
        found["input_ids"] = torch.where(found["input_ids"] == 99, model.config.image_token_id, found["input_ids"])
        found["pixel_values"] = found["pixel_values"].to(BF16)
    return found


def load(path: Path, dtype: str) -> Any:
    return nt.load(path, dtype=dtype)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose matrices are as wide as bitsandbytes repacks them."""
    root = tmp_path_factory.mktemp("quantized")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    llm = tiny_llm(root / "llm", **sizes)
    tiny_llm(root / "qwen2", "qwen2", **sizes)
    vision = tiny_vision(root / "vision")
    model, processor = nt.assemble(llm, vision, dtype="bfloat16")
    nt.save(model, processor, root / "mllm")
    return {path.name: path for path in root.iterdir()}


def assembled(folders: dict[str, Path], dtype: str) -> Any:
    return nt.assemble(folders["llm"], folders["vision"], dtype=dtype)[0]


OPEN: dict[str, Callable[[dict[str, Path], str], Any]] = {
    "assemble": assembled,
    "load": lambda folders, dtype: load(folders["mllm"], dtype),
}


@needs_bitsandbytes
@pytest.mark.parametrize("way", OPEN)
@pytest.mark.parametrize("dtype", KINDS)
def test_only_the_linear_layers_of_the_llms_blocks_are_quantized(
    dtype: str, way: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = OPEN[way](folders, dtype)
    linears = {f"model.language_model.layers.{i}.{name}_proj.weight" for i in (0, 1) for name in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down",
    )}  # fmt: skip
    assert packed(model).keys() == linears
    assert {p.dtype for name, p in model.named_parameters() if name not in linears} == {BF16}
    assert model.is_quantized and model.config.quantization_config.quant_method == "bitsandbytes"
    caplog.clear()
    assert model(**batch(model)).logits.dtype == BF16
    assert not caplog.records


@needs_bitsandbytes
@pytest.mark.parametrize("way", OPEN)
@pytest.mark.parametrize("dtype", KINDS)
def test_a_step_moves_the_gains_and_no_byte_of_the_base(
    dtype: str, way: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = OPEN[way](folders, dtype)
    nt.apply(model, "layernorm-simple")
    model.generate(**{k: v for k, v in batch(model).items() if k != "labels"}, max_new_tokens=2)  # bnb repacks here
    before = {name: data.clone() for name, data in packed(model).items()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad and n not in before}
    gains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in gains.items()}
    assert len(gains) == 4 and all(p.dtype == F32 for p in gains.values())
    optimizer = torch.optim.AdamW(gains.values(), lr=1e-5)
    losses = []
    for _ in range(2):
        loss = model(**batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all((p != start[name]).all() for name, p in gains.items())
    assert all(torch.equal(data, before[name]) for name, data in packed(model).items())
    assert all(torch.equal(model.get_parameter(name), data) for name, data in frozen.items())

    nt.save_adapter(model, tmp_path / "adapter")
    original = OPEN[way](folders, "bfloat16")
    nt.load_adapter(original, tmp_path / "adapter")
    for name, gain in gains.items():
        assert torch.equal(original.get_parameter(name), gain)
    answer = original.generate(**{k: v for k, v in batch(original).items() if k != "labels"}, max_new_tokens=2)
    assert answer.shape[0] == 2


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", KINDS)
def test_a_quantized_base_gives_the_logits_and_gradients_of_its_dequantized_weights(
    dtype: str, folders: dict[str, Path]
) -> None:
    import bitsandbytes as bnb

    model, plain = load(folders["mllm"], dtype), load(folders["mllm"], "float32")
    for name, parameter in model.named_parameters():
        if not is_quantized(parameter):
            value = parameter
        elif dtype == "nf4":
            value = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        else:
            value = parameter.data.float() * parameter.SCB[:, None] / 127
        plain.get_parameter(name).data = value.detach().float()
    found, logits = [], []
    for each in (model, plain):
        nt.apply(each, "layernorm-simple")
        given = batch(each)
        output = each(**{k: v.to(each.dtype) if v.is_floating_point() else v for k, v in given.items()})
        output.loss.backward()
        logits.append(output.logits.detach().float())
        found.append(torch.cat([p.grad for p in each.parameters() if p.requires_grad]))
    assert found[0].dtype == F32
    for a, b in (found, logits):
        assert (a - b).norm() < 0.1 * b.norm()  # bf16; int8 rounds its input, too


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("strategy", ["layernorm", ["norms", "lora"], ["connector"], ["bias"]], ids=str)
def test_what_is_not_quantized_can_be_trained(strategy: Any, dtype: str, folders: dict[str, Path]) -> None:
    if strategy == ["bias"]:  # bitsandbytes casts the bias of its layers in place: ours must stay fp32
        model, _ = nt.assemble(folders["qwen2"], folders["vision"], dtype=dtype)
    else:
        model = load(folders["mllm"], dtype)
    nt.apply(model, strategy)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    for _ in range(2):
        model(**batch(model)).loss.backward()
        optimizer.step()
    assert all(p.dtype == F32 and not torch.equal(p, start[name]) for name, p in trained.items())


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("strategy", ["full", "attn-qv", "attn-mlp", ["mlp"]], ids=str)
def test_training_a_quantized_weight_is_refused(strategy: Any, dtype: str, folders: dict[str, Path]) -> None:
    model = load(folders["mllm"], dtype)
    with pytest.raises(InputError, match="quantized"):
        nt.apply(model, strategy)
    assert not any(p.dtype == F32 for p in model.parameters())


@needs_bitsandbytes
def test_apply_on_a_text_llm_that_transformers_quantized(folders: dict[str, Path], tmp_path: Path) -> None:
    """No step of ours before `apply`; generating comes between it and training."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16)
    model = AutoModelForCausalLM.from_pretrained(folders["llm"], quantization_config=config, dtype=BF16)
    report = nt.apply(model, "layernorm-simple")
    ids = torch.randint(3, 90, (2, 10))
    model.generate(input_ids=ids, max_new_tokens=2)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == report.trainable and all(g.any() for g in grads.values())


@needs_bitsandbytes
def test_a_base_that_bitsandbytes_has_repacked_is_refused(folders: dict[str, Path]) -> None:
    model = load(folders["mllm"], "nf4")
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert not layer.support_avx512bf16_for_cpu
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj: .*\n.*load the model again"):
        keep_differentiable(model)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", KINDS)
def test_a_quantized_model_is_not_saved(dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model, processor = nt.load(folders["mllm"], dtype=dtype)
    with pytest.raises(InputError, match="adapter"):
        nt.save(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_bitsandbytes_and_float16_say_what_to_do(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    for call in (lambda d: assembled(folders, d), lambda d: load(folders["mllm"], d)):
        for dtype in KINDS:
            with pytest.raises(InputError, match=r"pip install 'normtune\[quant\]'"):
                call(dtype)
        with pytest.raises(InputError, match="overflow"):
            call("float16")
