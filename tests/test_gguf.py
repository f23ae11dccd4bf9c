"""Norm adapters on GGUF files: the ratio rule, files of several shapes and number types, what is refused, llama.cpp's
second file. The `gguf` package writes the bases and reads the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from normtune.adapter.loading import capture
from normtune.errors import InputError
from normtune.exporting import apply_to_gguf
from normtune.exporting.gguf_base import MARK, positions, tolerance
from normtune.exporting.gguf_files import open_gguf
from normtune.exporting.gguf_rule import ratio_rule
from normtune.strategy import apply, witnesses
from normtune.structure import anatomy
from stubs import SIZES, llava, randomized, text_model

ARCHITECTURES = {
    "llava": "llama",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "cohere": "command-r",
    "phi": "phi2",
    "qwen3_moe": "qwen3moe",
}
"""Kind of model in transformers -> architecture of its GGUF file, where the names differ."""
ZOO = ("gemma2", "gemma3_text", "olmo2", "qwen3_moe", "starcoder2", "gpt_neox", "gpt2", "phi", "cohere", "glm4")


def architecture(kind: str) -> str:
    return ARCHITECTURES.get(kind, kind)


def write_base(path: Path, model: Any, kind: str = "llama", matrices: Type = Type.F32, **changes: Any) -> Path:
    """A GGUF file of a text model as llama.cpp's converter lays one out: names by the package's table, norms F32 (and
    1 + w where the norm computes so), matrices in `matrices`, some metadata."""
    config = getattr(model.config, "text_config", model.config)
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture(kind))
    table = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    order = changes.get("order", gguf.GGUFEndian.LITTLE)
    writer = gguf.GGUFWriter(path, changes.get("architecture", architecture(kind)), endianess=order)
    writer.add_block_count(changes.get("blocks", config.num_hidden_layers))
    writer.add_embedding_length(config.hidden_size)
    if "parts" in changes:
        writer.add_uint16("split.count", changes["parts"])
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_float32("a.number", 0.125)
    offset = float("gemma" in kind)
    for name, parameter in model.named_parameters():
        name = name.replace("model.language_model.", "model.")
        own = table.get_name(name, (".weight", ".bias"))
        if own is None or ".vision_tower." in name or "multi_modal" in name:
            continue
        value = parameter.detach().float().numpy()
        if value.ndim == 1:
            factor = changes.get("factors", {}).get(own, 1.0)
            writer.add_tensor(changes.get("rename", {}).get(own, own), ((value + offset) * factor).astype(np.float32))
        else:
            value = value[: changes.get("rows", len(value))] if own == "token_embd.weight" else value
            writer.add_tensor(own, gguf.quantize(value, matrices), raw_dtype=matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tuned(model: Any, strategy: Any = ("norms", "final_norm", "qk_norms"), size: float = 0.1) -> Any:
    """`model` with what the strategy trains moved by random amounts."""
    parts = [part for part in strategy if anatomy(model).modules(part)] if isinstance(strategy, tuple) else strategy
    apply(model, parts)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def bases(kind: str) -> Any:
    """A model with random weights, gains and biases."""
    if kind in ("llava", "llama", "gemma", "qwen3"):
        return llava() if kind == "llava" else text_model(kind)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100} if kind == "gpt2" else {**SIZES, "head_dim": 8}
    more = {"use_qk_norm": True} if kind == "cohere" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file: (key -> value, name -> (type, shape, bytes))."""
    reader = gguf.GGUFReader(path)
    facts = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    return facts, {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


def gains(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors if t.name.endswith("norm.weight")}


@pytest.mark.parametrize(
    ("kind", "matrices"),
    [("llama", Type.F32), ("llama", Type.F16), ("llama", Type.Q8_0), ("llama", Type.Q4_0), ("llama", Type.BF16),
     ("gemma", Type.F32), ("gemma", Type.Q8_0), ("qwen3", Type.Q8_0), ("llava", Type.Q8_0)],
)  # fmt: skip
def test_only_norms_change_and_follow_the_rule(kind: str, matrices: Type, tmp_path: Path) -> None:
    base, target = write_base(tmp_path / "base.gguf", bases(kind), kind, matrices), tmp_path / "tuned.gguf"
    model = tuned(bases(kind))
    done = apply_to_gguf(model, base, target)
    (facts, before), (new_facts, after) = read(base), read(target)
    assert {key: new_facts[key] for key in facts} == facts and new_facts.keys() - facts.keys() == {
        MARK,
        "normtune.adapter.strategy",
    }
    assert list(before) == list(after)
    differing = {name for name in before if before[name] != after[name]}
    assert differing == set(done.changed) and not done.scaled
    assert differing == {name for name in before if name.endswith("norm.weight")}
    assert all(after[name][:2] == before[name][:2] for name in before)
    adapter, offset = capture(model), float(kind == "gemma")
    expected = sorted(
        (t.double() + offset).float().numpy().tobytes() for n, t in adapter.tensors.items() if "vision" not in n
    )
    assert sorted(after[name][2] for name in differing) == expected
    first = next(n for n in adapter.tensors if n.endswith("layers.1.post_attention_layernorm.weight"))
    assert after["blk.1.ffn_norm.weight"][2] == (adapter.tensors[first] + offset).numpy().tobytes()


@pytest.mark.parametrize("kind", ZOO)
def test_every_norm_finds_its_place(kind: str, tmp_path: Path) -> None:
    """Post-norms, QK-norms (also one gain per head and channel), biases, 1 + g: each tensor gets its values."""
    base = write_base(tmp_path / "base.gguf", bases(kind), kind)
    model = tuned(bases(kind))
    done = apply_to_gguf(model, base, tmp_path / "tuned.gguf")
    adapter, offset, new = capture(model), float("gemma" in kind), read(tmp_path / "tuned.gguf")[1]
    expected = {
        ((t.double() + (offset if n.endswith("weight") else 0)).float()).numpy().tobytes()
        for n, t in adapter.tensors.items()
    }
    assert {new[name][2] for name in done.changed} == expected and len(done.changed) == len(adapter.tensors)
    assert not done.scaled
    assert "blk.1.attn_norm.weight" in done.changed or kind == "olmo2"  # which has norms behind attention and MLP only


def test_folded_scales_survive(tmp_path: Path) -> None:
    """A quantizer moved factors into two norms: the tuned file has them, too."""
    factors = {f"blk.0.{n}_norm.weight": np.geomspace(0.3, 3, 32) for n in ("attn", "ffn")}
    plain = write_base(tmp_path / "plain.gguf", text_model())
    scaled = write_base(tmp_path / "scaled.gguf", text_model(), factors=factors)
    model = tuned(text_model())
    apply_to_gguf(model, plain, tmp_path / "a.gguf")
    done = apply_to_gguf(model, scaled, tmp_path / "b.gguf")
    assert len(done.scaled) == 2
    a, b = gains(tmp_path / "a.gguf"), gains(tmp_path / "b.gguf")
    for name in a:
        np.testing.assert_allclose(b[name], a[name] * factors.get(name, 1.0), rtol=1e-5)


number = st.floats(-4, 4, width=32).filter(lambda v: abs(v) > 1e-3)
vector = st.lists(number, min_size=4, max_size=4).map(np.array)


@settings(max_examples=200, deadline=None)
@given(vector, vector, st.floats(0.01, 100), st.sampled_from([0.0, 1.0]))
def test_ratio_rule(base: np.ndarray, new: np.ndarray, factor: float, offset: float) -> None:
    """Whatever factor a file's gains have, they have it afterwards; without one they are the tuned gains exactly."""
    base, new = base - offset, new - offset
    held = factor * (offset + base)
    np.testing.assert_allclose(ratio_rule(held, base, new, offset), factor * (offset + new), rtol=0.01)
    np.testing.assert_array_equal(ratio_rule(offset + base, base, new, offset), (offset + new).astype(np.float32))
    np.testing.assert_allclose(ratio_rule(held, base, base, offset), held, rtol=0.01)


def test_a_base_gain_of_zero() -> None:
    base, new = np.array([0.0, 1.0, 2.0]), np.array([0.5, 1.5, 2.5])
    np.testing.assert_array_equal(ratio_rule(base, base, new, 0.0), new.astype(np.float32))
    np.testing.assert_array_equal(ratio_rule(3 * base, base, np.array([0.0, 2.0, 2.0]), 0.0), [0, 6, 6])
    with pytest.raises(ZeroDivisionError):
        ratio_rule(3 * base, base, new, 0.0)


def test_places_of_witnesses() -> None:
    """The values that are compared are those that adapters hold."""
    model = text_model()
    weight = model.get_input_embeddings().weight.detach()
    held = witnesses(model)["model.embed_tokens.weight#64"]
    assert torch.equal(weight.reshape(-1)[positions(weight.numel())], held)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q5_0, Type.Q5_1, Type.Q4_0, Type.Q4_1])
def test_tolerances_hold_for_what_rounding_does(kind: Type, tmp_path: Path) -> None:
    """Normal and heavy-tailed values: rounding stays below half of what is allowed; another base is far above."""
    generator = np.random.default_rng(0)
    for values in (generator.normal(size=(64, 256)), generator.standard_t(4, size=(64, 256))):
        values = values.astype(np.float32)
        rounded = gguf.dequantize(gguf.quantize(values, kind), kind)
        tensor = type("Tensor", (), {"tensor_type": kind})
        deviation = np.linalg.norm(rounded - values) / np.linalg.norm(values)
        assert deviation < tolerance(tensor) / 1.5 < 0.5, deviation


def other(**options: Any) -> Any:
    return lambda folder: write_base(folder / "base.gguf", text_model(seed=1), **options)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "another base": (("norms",), other(), "another base.*embedding"),
    "another base, rounded": (("norms",), other(matrices=Type.Q4_0), "another base.*embedding.*Q4_0 allows"),
    "number of blocks": (("norms",), lambda f: write_base(f / "base.gguf", text_model(), blocks=3), "3 blocks"),
    "few rows": (("norms",), lambda f: write_base(f / "base.gguf", text_model(), rows=10), "another base: .*10 rows"),
    "embedding": (("norms", "embed"), lambda f: write_base(f / "base.gguf", text_model()), "the embedding.*norms only"),
    "head": (("norms", "head"), lambda f: write_base(f / "base.gguf", text_model()), "the head.*norms only"),
    "projections": (("norms", "attn_q"), lambda f: write_base(f / "base.gguf", text_model()), "other weights"),
    "LoRA": (["norms", "lora"], lambda f: write_base(f / "base.gguf", text_model()), "LoRA"),
    "no file": (("norms",), lambda f: f / "none.gguf", "no GGUF file"),
    "one of several parts": (
        ("norms",),
        lambda f: write_base(f / "base.gguf", text_model(), parts=2),
        "one part of several",
    ),
    "other byte order": (
        ("norms",),
        lambda f: write_base(f / "base.gguf", text_model(), order=gguf.GGUFEndian.BIG),
        "other byte order",
    ),
    "a folder": (("norms",), lambda f: f, "no GGUF file"),
    "no GGUF": (("norms",), lambda f: Path(__file__), "is no GGUF file"),
    "missing norm": (
        ("norms",),
        lambda f: write_base(f / "base.gguf", text_model(), rename={"blk.1.ffn_norm.weight": "blk.1.x.weight.y"}),
        "no place for model.layers.1.post_attention_layernorm.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    strategy, make, message = REFUSED[case]
    model, base = tuned(text_model(), strategy), make(tmp_path)
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        apply_to_gguf(model, base, tmp_path / "out.gguf")
    assert len(str(caught.value).splitlines()) <= 3 and not (tmp_path / "out.gguf").exists()


def test_applied_twice_is_refused_with_and_without_the_mark(tmp_path: Path) -> None:
    base, model = write_base(tmp_path / "base.gguf", text_model()), tuned(text_model())
    apply_to_gguf(model, base, tmp_path / "once.gguf")
    with pytest.raises(InputError, match="an adapter in it already"):
        apply_to_gguf(model, tmp_path / "once.gguf", tmp_path / "twice.gguf")
    converted = write_base(tmp_path / "merged.gguf", model)
    with pytest.raises(InputError, match="holds the tuned gains already"):
        apply_to_gguf(model, converted, tmp_path / "twice.gguf")
    assert not (tmp_path / "twice.gguf").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tuned_gains_that_were_merged_and_rounded_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where one of the norms has hardly moved."""
    model, merged = tuned(text_model(), ("norms",)), text_model()
    still = model.model.layers[0].input_layernorm.weight.data
    still.copy_(merged.model.layers[0].input_layernorm.weight.data * (1 + 1e-7))
    merged.load_state_dict({name: value.to(dtype).float() for name, value in model.state_dict().items()})
    with pytest.raises(InputError, match="holds the tuned gains already"):
        apply_to_gguf(model, write_base(tmp_path / "merged.gguf", merged), tmp_path / "twice.gguf")


def test_other_gains_under_the_base_s_embedding(tmp_path: Path) -> None:
    """Gains in another order are no folded scale."""
    model = text_model()
    gain = model.model.layers[0].input_layernorm.weight.detach().numpy()
    factors = {"blk.0.attn_norm.weight": gain[::-1] / gain}
    base = write_base(tmp_path / "base.gguf", model, factors=factors)
    with pytest.raises(InputError, match="in another order"):
        apply_to_gguf(tuned(text_model()), base, tmp_path / "out.gguf")


def test_names_that_the_table_does_not_know_are_found_by_value(tmp_path: Path) -> None:
    rename = {"blk.1.ffn_norm.weight": "blk.1.strange_norm.weight"}
    base = write_base(tmp_path / "base.gguf", text_model(), rename=rename, architecture="brandnew")
    done = apply_to_gguf(tuned(text_model()), base, tmp_path / "out.gguf")
    assert "blk.1.strange_norm.weight" in done.changed and len(done.changed) == 5


def test_another_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and so on")
    with pytest.raises(InputError, match=r"a\.png is no GGUF file") as error:
        open_gguf(tmp_path / "a.png")
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.999])
def test_a_file_that_is_cut_off_is_refused(share: float, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", text_model())
    base.write_bytes(base.read_bytes()[: int(share * base.stat().st_size)])
    with pytest.raises(InputError, match="damaged or cut off"):
        apply_to_gguf(tuned(text_model()), base, tmp_path / "out.gguf")


def tuned_biases() -> Any:
    """A model whose adapter holds the biases of norms alone."""
    model = text_model("gpt2")
    names = [name for name, _ in model.named_parameters() if "ln_" in name and name.endswith("bias")]
    apply(model, ["bias"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data.add_(0.25)
    vars(model)["_normtune"].tuned = names
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [(tuned_biases, "holds the tuned gains already"), (lambda: text_model("gpt2"), "holds other values than")],
    ids=["merged", "other biases"],
)
def test_biases_of_another_model_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    factors = {} if make is tuned_biases else {"blk.1.ffn_norm.bias": 1.5}
    base = write_base(tmp_path / "base.gguf", make(), "gpt2", factors=factors)
    with pytest.raises(InputError, match=message):
        apply_to_gguf(tuned_biases(), base, tmp_path / "out.gguf")


def test_biases_alone_are_shifted(tmp_path: Path) -> None:
    """An adapter may hold the biases of norms and not their gains; a folded scale multiplies the shift."""
    base = tuned_biases()
    factors = {"blk.0.attn_norm.weight": 2.0, "blk.0.attn_norm.bias": 2.0}
    plain = text_model("gpt2")
    path = write_base(tmp_path / "base.gguf", plain, "gpt2", factors=factors)
    done = apply_to_gguf(base, path, tmp_path / "out.gguf")
    before, after = (
        {t.name: np.array(t.data) for t in gguf.GGUFReader(p).tensors} for p in (path, tmp_path / "out.gguf")
    )
    assert len(done.changed) == 5 and all(name.endswith("norm.bias") for name in done.changed)
    for name in done.changed:
        shift = 0.5 if name == "blk.0.attn_norm.bias" else 0.25
        np.testing.assert_allclose(after[name], before[name] + shift, atol=1e-6)
