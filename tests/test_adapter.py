"""Adapters: what is written, what a base must be, what merging into bf16 leaves of a tuning."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from normtune import runlog
from normtune.adapter import load_adapter, merge, remove_adapter, save_adapter, survival
from normtune.errors import InputError, JobError
from normtune.strategy import apply
from stubs import inputs, llava, text_model
from test_strategy import train_steps

STRATEGIES: list[Any] = ["connector", "layernorm", "layernorm-simple", "attn-qv", "attn-mlp", "lora", "full"]
CASES = [*STRATEGIES, ["norms", "lora"]]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


def tuned(strategy: Any, dtype: torch.dtype, rate: float = 1e-2, steps: int = 3) -> Any:
    model = llava().to(dtype)
    apply(model, strategy, rank=4, dropout=0.0)
    train_steps(model, steps, rate)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", CASES, ids=str)
def test_saved_loaded_removed(strategy: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tuned(strategy, dtype)
    save_adapter(model, tmp_path / "a", base={"model": "x"})
    other = llava().to(dtype)
    before = logits(other)
    record = load_adapter(other, tmp_path / "a")
    assert record["base"] == {"model": "x"} and record["provenance"]["versions"]["torch"]
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(other), before)
    remove_adapter(other)
    assert torch.equal(logits(other), before)
    assert all(p.dtype == dtype for p in other.parameters()) or dtype == torch.float32


@pytest.mark.parametrize("strategy", CASES, ids=str)
def test_merged_model_is_plain_and_equal(strategy: Any) -> None:
    model = tuned(strategy, torch.float32)
    wanted = logits(model)
    merge(model)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert not any("forward" in vars(module) for module in model.modules())
    lora = "lora" in strategy
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5 if lora else 0)


def test_adapter_holds_the_trained_tensors_and_the_gains_of_the_base(tmp_path: Path) -> None:
    model = tuned("layernorm-simple", torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter.safetensors")
    trained = {n: t for n, t in tensors.items() if not n.startswith("base.")}
    assert len(trained) == 4 and all(t.dtype == torch.float32 for t in trained.values())
    size = (tmp_path / "a" / "adapter.safetensors").stat().st_size
    assert size < 2 * 4 * 4 * 32 + 4096  # both sets of gains and the header
    for name in trained:
        assert torch.equal(tensors["base." + name], dict(llava().named_parameters())[name].bfloat16().float())


def test_earlier_stage_goes_into_the_adapter(tmp_path: Path) -> None:
    model = llava()
    apply(model, "connector")
    train_steps(model, 1)
    apply(model, "layernorm-simple")
    train_steps(model, 1)
    save_adapter(model, tmp_path / "a")
    names = [n for n in load_file(tmp_path / "a" / "adapter.safetensors") if not n.startswith("base.")]
    assert sum("multi_modal_projector" in n for n in names) == 4 and len(names) == 8


def test_wrong_base_is_refused_unless_forced(tmp_path: Path) -> None:
    save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    other = llava()
    with torch.no_grad():
        other.model.language_model.norm.weight.mul_(1.5)
    with pytest.raises(InputError, match=r"another base.*language_model\.norm\.weight"):
        load_adapter(other, tmp_path / "a")
    load_adapter(other, tmp_path / "a", force=True)
    with pytest.raises(InputError, match="another base"):
        load_adapter(text_model(), tmp_path / "a")


def test_bf16_copy_of_the_same_base_is_accepted(tmp_path: Path) -> None:
    save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    load_adapter(llava().bfloat16(), tmp_path / "a")


@pytest.mark.parametrize("what", ["nothing", "json", "format", "tensors", "no tensors"])
def test_damaged_adapter(what: str, tmp_path: Path) -> None:
    folder = save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    if what == "nothing":
        folder = tmp_path / "nowhere"
    elif what == "json":
        (folder / "adapter.json").write_text('{"format": 1,\n oops')
    elif what == "format":
        (folder / "adapter.json").write_text('{"format": 99}')
    elif what == "tensors":
        data = (folder / "adapter.safetensors").read_bytes()
        (folder / "adapter.safetensors").write_bytes(data[: len(data) // 2])
    else:
        (folder / "adapter.safetensors").unlink()
    with pytest.raises(InputError) as error:
        load_adapter(llava(), folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_merge_refuses_what_bf16_rounds_away() -> None:
    model = llava().bfloat16()
    apply(model, "layernorm-simple")
    train_steps(model, 2, 1e-5)
    kept = survival(model, torch.bfloat16)
    assert kept.gains == 128 and kept.differing < 0.2 and kept.survived < 0.2
    wanted = logits(model)
    with pytest.raises(JobError, match=r"(?s)round the tuning away.*float32"):
        merge(model)
    assert torch.equal(logits(model), wanted)  # untouched
    result = merge(model, torch.float32)
    assert result.differing == 1.0 and result.survived == 1.0
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_merge_into_bf16_where_the_tuning_is_large() -> None:
    model = llava().bfloat16()
    apply(model, "layernorm-simple")
    train_steps(model, 20, 5e-2)
    result = merge(model)
    assert result.worst > 0.9
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_forced_merge_rounds() -> None:
    model = llava().bfloat16()
    apply(model, "layernorm-simple")
    train_steps(model, 1, 1e-5)
    assert merge(model, force=True).differing < 0.5


def test_nothing_tuned_and_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tuned tensors"):
        save_adapter(llava(), tmp_path / "a")
    model = tuned("layernorm-simple", torch.float32)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(InputError, match="exists already"):
        save_adapter(model, tmp_path / "a")


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runlog, "sync_tree", full)
    with pytest.raises(JobError, match="No space left"):
        save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
