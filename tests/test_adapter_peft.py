"""Interchange with PEFT: what we write, PEFT loads; what its LNTuning writes, we load. PEFT itself is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import zoo
from command import run
from normtune.adapter import export_peft, load_adapter, merge, remove_adapter, save_adapter
from normtune.errors import InputError
from normtune.model import load
from normtune.strategy import apply
from stubs import llava, text_model
from test_adapter import logits
from test_strategy import train_steps

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{begin}")  # PEFT's, about what it cannot know
    for begin in ("Model has `tie_word_embeddings=True`", "Unsupported layer type", "Setting `save_embedding_layers`")
]

BASES = {
    "llama": lambda: text_model("llama"),
    "llama-tied": lambda: text_model("llama", tied=True),
    "qwen3": lambda: text_model("qwen3"),
    "gemma": lambda: text_model("gemma"),
    "gpt2-tied": lambda: text_model("gpt2", tied=True),
    "llava": llava,
    "llava-tied": lambda: llava(tied=True),
}
EXPORTS: list[tuple[str, Any]] = [
    ("llama", "layernorm-simple"),
    ("llama", "layernorm"),
    ("llama", "attn-mlp"),
    ("llama", "lora"),
    ("llama-tied", "layernorm"),
    ("qwen3", ["qk_norms", "final_norm"]),
    ("gemma", "layernorm-simple"),
    ("gpt2-tied", "layernorm"),
    ("gpt2-tied", ["norms", "lora"]),
    ("gpt2-tied", ["bias"]),
    ("llava", "layernorm-simple"),
    ("llava", "layernorm"),
    ("llava", "connector"),
    ("llava", "lora"),
    ("llava", ["norms", "vision_norms", "lora"]),
    ("llava-tied", "layernorm"),
    ("llava-tied", "full"),
]


def tuned(base: str, strategy: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = BASES[base]().to(dtype)
    apply(model, strategy, rank=4, dropout=0.0)
    train_steps(model, 2, 1e-2)
    return model


@pytest.mark.parametrize(("base", "strategy"), EXPORTS, ids=str)
def test_peft_loads_what_we_write(base: str, strategy: Any, tmp_path: Path) -> None:
    model = tuned(base, strategy)
    wanted = logits(model)
    export_peft(model, tmp_path / "peft")
    assert torch.equal(logits(model), wanted)  # the model stays as it is
    plain = BASES[base]()
    assert not torch.equal(logits(plain), wanted)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "peft")
    torch.testing.assert_close(logits(loaded.base_model.model), wanted, rtol=0, atol=0)
    if "lora" not in strategy:
        again = BASES[base]()
        load_adapter(again, tmp_path / "peft")
        assert torch.equal(logits(again), wanted)


HARD = [
    "bloom",
    "gpt_neox",
    "qwen3_moe",
    "deepseek_v3",
    "zamba2",
    "mamba2",
    "cohere_qk",
    "qwen2_vl",
    "idefics3",
    "mllama",
]


@pytest.mark.parametrize("kind", HARD)
def test_there_and_back_on_other_architectures(kind: str, tmp_path: Path) -> None:
    """Ours and PEFT's files, loaded, removed and merged: the same logits, bit by bit, and the base again."""

    def answer(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**zoo.batch(kind)).logits

    model = zoo.model(kind)
    before = answer(model)
    apply(model, "layernorm-simple")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    wanted = answer(model)
    assert not torch.equal(wanted, before)
    save_adapter(model, tmp_path / "ours")
    export_peft(model, tmp_path / "peft")
    assert torch.equal(answer(PeftModel.from_pretrained(zoo.model(kind), tmp_path / "peft").base_model.model), wanted)
    base = zoo.model(kind)
    for folder in ("ours", "peft"):
        load_adapter(base, tmp_path / folder)
        assert torch.equal(answer(base), wanted)
        remove_adapter(base)
        assert torch.equal(answer(base), before)
    merge(model)
    assert torch.equal(answer(model), wanted)


def test_only_tuned_modules_are_written(tmp_path: Path) -> None:
    """Unlike PEFT's own choice of modules for this method, which copies embedding and head."""
    export_peft(tuned("llava", "layernorm-simple"), tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 4 and all(t.dtype == torch.float32 for t in tensors.values())
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LN_TUNING" and config["modules_to_save"] is None
    assert config["target_modules"][0] == "model.language_model.layers.0.input_layernorm"


def test_peft_rounds_to_the_dtype_of_the_base(tmp_path: Path) -> None:
    """As documented: gains in bf16, so that logits are near ours and not equal."""
    model = tuned("llama", "layernorm-simple", torch.bfloat16)
    export_peft(model, tmp_path / "peft")
    loaded = PeftModel.from_pretrained(BASES["llama"]().bfloat16(), tmp_path / "peft")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    ours, theirs = logits(model).float(), logits(loaded.base_model.model).float()
    base = logits(BASES["llama"]().bfloat16()).float()
    assert 0 < (theirs - ours).norm() < 0.6 * (base - ours).norm()


TRAINED_BY_PEFT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    ("llama", {}),  # its own choice
    ("llama-tied", {"target_modules": ["model.norm"], "modules_to_save": ["up_proj"]}),
    ("gpt2-tied", {"target_modules": ["ln_1", "ln_2", "ln_f"]}),
    ("llava", {}),  # its own choice: connector, embedding and head, too
    ("llava", {"target_modules": r".*language_model.*layernorm"}),
]


def trained_by_peft(base: str, config: dict[str, Any], folder: Path) -> Any:
    model = get_peft_model(BASES[base](), LNTuningConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.base_model.model


@pytest.mark.parametrize(("base", "config"), TRAINED_BY_PEFT, ids=str)
def test_we_load_what_peft_trained(base: str, config: dict[str, Any], tmp_path: Path) -> None:
    wanted = logits(trained_by_peft(base, config, tmp_path / "peft"))
    model = BASES[base]()
    before = logits(model)
    record = load_adapter(model, tmp_path / "peft", "theirs")
    assert record["peft"]["peft_type"] == "LN_TUNING"
    assert torch.equal(logits(model), wanted) and not torch.equal(before, wanted)
    remove_adapter(model, "theirs")
    assert torch.equal(logits(model), before)
    load_adapter(model, tmp_path / "peft")
    merge(model)
    assert torch.equal(logits(model), wanted)


def write_config(folder: Path, kind: str) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("prefix tuning", "PREFIX_TUNING; normtune reads LN_TUNING"),
        ("lora", "LORA; normtune reads LN_TUNING"),
        ("no json", r"not valid JSON"),
        ("a list", "type None"),
        ("no weights", "no adapter_model.safetensors"),
        ("a pickle", r"pickle.*safe_serialization"),
        ("cut off", "is damaged"),
        ("other model", r"h\.0\.ln_1\.(weight|bias).*does not fit"),
        ("other width", r"input_layernorm\.weight \(16,\) does not fit"),
    ],
)
def test_wrong_folders(what: str, message: str, tmp_path: Path) -> None:
    folder, model = tmp_path / "peft", text_model()
    trained_by_peft(
        "gpt2-tied" if what == "other model" else "llama", {"target_modules": ["ln_1", "input_layernorm"]}, folder
    )
    weights = folder / "adapter_model.safetensors"
    if what == "prefix tuning":
        config = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        get_peft_model(text_model(), config).save_pretrained(folder)
    elif what == "lora":
        get_peft_model(text_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    elif what == "no json":
        (folder / "adapter_config.json").write_text("{")
    elif what == "a list":
        (folder / "adapter_config.json").write_text("[]")
    elif what == "no weights":
        weights.unlink()
    elif what == "a pickle":
        weights.rename(folder / "adapter_model.bin")
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "other width":
        save_file({name: torch.ones(16) for name in load_file(weights)}, weights)
    before = logits(model)
    with pytest.raises(InputError, match=f"(?s){message}") as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) <= 3
    assert torch.equal(logits(model), before)


def test_tied_tensors_trained_apart_are_refused(tmp_path: Path) -> None:
    trained_by_peft("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}, tmp_path / "peft")
    with pytest.raises(InputError, match=r"embed_tokens\.weight is tied.*two values"):
        load_adapter(BASES["llama-tied"](), tmp_path / "peft")


def test_lora_and_tensors_of_one_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)q_proj has both.*transformers"):
        export_peft(tuned("llama", ["attn_q", "lora"]), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_nothing_tuned_and_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tuned tensors"):
        export_peft(text_model(), tmp_path / "peft")
    model = tuned("llama", "layernorm-simple")
    export_peft(model, tmp_path / "peft")
    with pytest.raises(InputError, match="exists already"):
        export_peft(model, tmp_path / "peft")


def test_command(
    mllm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = load(mllm_folder)
    apply(model, ["norms", "connector"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    base = {"model": {"path": str(mllm_folder), "dtype": "float32"}, "seed": 0}
    save_adapter(model, "adapter", base=base)
    assert run("export", "adapter", "--format", "peft", "--out", "out") == 0
    assert "PeftModel.from_pretrained" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(mllm_folder), "out")
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, model(**ids).logits)
    assert run("export", "adapter", "--format", "peft", "--out", "out") == 2
    assert run("export", "adapter", "--format", "peft", "--out", "new", "--dtype", "bfloat16") == 2
    assert run("export", "out", "--format", "peft", "--out", "new") == 2
    assert "Traceback" not in capsys.readouterr().err and not Path("new").exists()
