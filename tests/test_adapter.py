"""Adapters: what is written, what a base must be, what merging into bf16 leaves of a tuning."""

from __future__ import annotations

import copy
import errno
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from normtune import runlog
from normtune.adapter import Adapter, load_adapter, merge, remove_adapter, save_adapter, set_adapter, survival
from normtune.errors import InputError, JobError
from normtune.strategy import apply
from stubs import inputs, llava, text_model
from test_strategy import train_steps

STRATEGIES: list[Any] = ["connector", "layernorm", "layernorm-simple", "attn-qv", "attn-mlp", "lora", "full"]
PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
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
    assert size < 2 * 4 * 4 * 32 + 3 * 4 * 64 + 4096  # both sets of gains, the witnesses, and the header
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


@pytest.mark.parametrize("factor", [1.5, 1 + 1e-5])
def test_wrong_base_is_refused_unless_forced(factor: float, tmp_path: Path) -> None:
    save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    other = llava()
    with torch.no_grad():
        other.model.language_model.norm.weight.mul_(factor)
    with pytest.raises(InputError, match=r"another base.*language_model\.norm\.weight"):
        load_adapter(other, tmp_path / "a")
    load_adapter(other, tmp_path / "a", force=True)
    with pytest.raises(InputError, match="another base"):
        load_adapter(text_model(), tmp_path / "a")


COPIES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", COPIES, ids=str)
@pytest.mark.parametrize("trained", COPIES[:2], ids=str)
def test_rounded_copy_of_the_same_base_is_accepted(trained: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter(tuned("layernorm-simple", trained), tmp_path / "a")
    base = llava()
    if trained == torch.bfloat16:  # a bf16 checkpoint in another dtype; of an fp32 one, bf16 and fp16 copies differ
        base = base.bfloat16()
    load_adapter(base.to(dtype), tmp_path / "a")


@pytest.mark.parametrize(
    "what", ["nothing", "json", "list", "format", "tensors", "no tensors", "integers", "lora", "lora options"]
)
def test_damaged_adapter(what: str, tmp_path: Path) -> None:
    folder = save_adapter(tuned(["norms", "lora"], torch.float32), tmp_path / "a")
    model = llava()
    before = facts(model)
    if what == "nothing":
        folder = tmp_path / "nowhere"
    elif what == "list":
        (folder / "adapter.json").write_text("[1]")
    elif what == "integers":
        save_file({"a": torch.ones(2, dtype=torch.int32)}, folder / "adapter.safetensors")
    elif what == "lora":
        weights = load_file(folder / "lora" / "adapter_model.safetensors")
        weights.pop(next(iter(weights)))
        save_file(weights, folder / "lora" / "adapter_model.safetensors")
    elif what == "lora options":
        record = json.loads((folder / "adapter.json").read_text())
        (folder / "adapter.json").write_text(json.dumps({**record, "lora": ["rank"]}))
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
        load_adapter(model, folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) <= 3
    assert_same(model, before)


def facts(model: Any) -> dict[str, Any]:
    """Everything that an adapter may not leave behind: values, dtypes, forwards, modules."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return {"state": state, "forwards": forwards, "modules": [name for name, _ in model.named_modules()]}


def assert_same(model: Any, before: dict[str, Any]) -> None:
    now = facts(model)
    assert now["forwards"] == before["forwards"] and now["modules"] == before["modules"]
    assert now["state"].keys() == before["state"].keys()
    for name, tensor in now["state"].items():
        assert tensor.dtype == before["state"][name].dtype and torch.equal(tensor, before["state"][name]), name


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("strategy", CASES, ids=str)
def test_untrained_strategy_leaves_nothing_behind(strategy: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """apply, load, remove: the base again, bit by bit."""
    base = llava().to(dtype)
    before, wanted = facts(base), logits(base)
    save_adapter(tuned("layernorm-simple", dtype), tmp_path / "a")
    apply(base, strategy, rank=4)
    load_adapter(base, tmp_path / "a")
    assert not any(p.requires_grad for p in base.parameters())
    remove_adapter(base)
    if "lora" not in strategy:  # LoRA that was applied comes back, untrained
        assert_same(base, before)
    assert torch.equal(logits(base), wanted)


PAIRS = [
    ("layernorm-simple", "layernorm-simple"),
    ("layernorm-simple", ["norms", "connector"]),
    (["final_norm"], "layernorm"),
    ("attn-qv", ["vision_norms"]),
    ("layernorm-simple", "lora"),
    (["norms", "lora"], "lora"),
]


@pytest.mark.heavy
@DTYPES
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_switching(pair: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = {}
    for name, strategy, rate in zip("ab", pair, (1e-2, 2e-2), strict=True):
        model = tuned(strategy, dtype, rate)
        save_adapter(model, tmp_path / name)
        wanted[name] = logits(model)
    base = llava().to(dtype)
    before = facts(base)
    wanted[None] = logits(base)
    for name in "ab":
        load_adapter(base, tmp_path / name, name)
        assert torch.equal(logits(base), wanted[name])
    for name in ("a", None, "b", "a", "b", None, "a"):
        set_adapter(base, name)
        assert torch.equal(logits(base), wanted[name]), name
        if name is None:
            assert_same(base, before)
    remove_adapter(base)
    assert_same(base, before)


@DTYPES
def test_switching_moves_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """The adapters' tensors stay where they are, and so does every other one, also back to the base."""
    for name, rate in (("a", 1e-2), ("b", 2e-2)):
        save_adapter(tuned("layernorm-simple", dtype, rate), tmp_path / name)
    model = llava().to(dtype)
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    load_adapter(model, tmp_path / "a", "a")
    trained = Adapter.read(tmp_path / "a").tensors
    loaded = {n: p.data_ptr() for n, p in model.named_parameters()}
    load_adapter(model, tmp_path / "b", "b")
    set_adapter(model, "a")
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == loaded
    assert all(loaded[n] == places[n] for n in places if n not in trained)
    set_adapter(model, None)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places


@DTYPES
@pytest.mark.parametrize("strategy", ["layernorm", ["norms", "final_norm"], "lora"], ids=str)
def test_own_training_comes_back(strategy: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """An adapter takes the place of what was trained on the model itself, and gives it back."""
    save_adapter(tuned("layernorm-simple", dtype), tmp_path / "a")
    fresh = llava().to(dtype)
    load_adapter(fresh, tmp_path / "a")
    model = tuned(strategy, dtype, 3e-2)
    own = facts(model)
    wanted = logits(model)
    load_adapter(model, tmp_path / "a")
    gains = Adapter.read(tmp_path / "a").base
    for name, parameter in fresh.named_parameters():  # gains: base + adapter, whatever was trained
        if name in gains:
            assert torch.equal(dict(model.named_parameters())[name], parameter)
    remove_adapter(model)
    assert_same(model, own)
    assert torch.equal(logits(model), wanted)
    save_adapter(model, tmp_path / "own")
    again = llava().to(dtype)
    load_adapter(again, tmp_path / "own")
    assert torch.equal(logits(again), wanted)


def test_training_in_an_adapter_is_not_lost_unsaid(tmp_path: Path) -> None:
    save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    model = llava()
    load_adapter(model, tmp_path / "a", "a")
    apply(model, "layernorm-simple")
    load_adapter(model, tmp_path / "a", "b")  # nothing was trained yet
    apply(model, "layernorm-simple")
    train_steps(model, 1)
    for switch in (lambda: set_adapter(model, "a"), lambda: load_adapter(model, tmp_path / "a", "c")):
        with pytest.raises(InputError, match=r"(?s)'b' was trained.*layers\.0.*save_adapter"):
            switch()
    save_adapter(model, tmp_path / "more")
    base = Adapter.read(tmp_path / "more").base
    assert all(torch.equal(base[n], t) for n, t in Adapter.read(tmp_path / "a").base.items())
    remove_adapter(model)
    assert torch.equal(logits(model), logits(llava()))


def test_names_of_adapters(tmp_path: Path) -> None:
    model = llava()
    remove_adapter(model)  # nothing to remove, nothing happens
    with pytest.raises(InputError, match=r"no adapter 'a' in the model; none is loaded"):
        set_adapter(model, "a")
    for name, rate in (("first", 1e-2), ("second", 2e-2)):
        save_adapter(tuned("layernorm-simple", torch.float32, rate), tmp_path / name)
        load_adapter(model, tmp_path / name, name)
    for verb in (set_adapter, remove_adapter):
        with pytest.raises(InputError, match=r"no adapter 'secnd'.*did you mean 'second'.*first, second"):
            verb(model, "secnd")
    second = logits(model)
    remove_adapter(model, "first")
    assert torch.equal(logits(model), second)
    load_adapter(model, tmp_path / "first", "second")  # the name is taken over
    assert not torch.equal(logits(model), second)
    remove_adapter(model, "second")
    assert torch.equal(logits(model), logits(llava()))
    assert "_normtune_adapters" not in vars(model)


def test_switched_model_is_copied_whole(tmp_path: Path) -> None:
    save_adapter(tuned("layernorm-simple", torch.bfloat16), tmp_path / "a")
    model = llava().bfloat16()
    load_adapter(model, tmp_path / "a", "a")
    other = copy.deepcopy(model)
    set_adapter(model, None)
    assert not torch.equal(logits(other), logits(model))
    set_adapter(other, None)
    assert torch.equal(logits(other), logits(model))


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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as in the base", "bf16"])
@pytest.mark.parametrize("strategy", ["layernorm-simple", "lora"])
def test_tensors_that_the_base_keeps_in_fp32_stay_so_in_a_merge(strategy: str, dtype: torch.dtype | None) -> None:
    model = llava().bfloat16()
    tower = model.model.vision_tower.float()
    query = model.model.language_model.layers[0].self_attn.q_proj.float()
    apply(model, strategy, rank=2)
    merge(model, dtype, force=True)
    assert {p.dtype for p in tower.parameters()} == {dtype or torch.float32}
    assert query.weight.dtype == (dtype or torch.float32)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_forced_merge_rounds() -> None:
    model = llava().bfloat16()
    apply(model, "layernorm-simple")
    train_steps(model, 1, 1e-5)
    assert merge(model, force=True).differing < 0.5


@pytest.mark.parametrize(
    ("scale", "least", "most"), [(1e-6, 0.15, 0.25), (3e-5, 0.99, 1.01)], ids=["1 to 3000", "1 to 100"]
)
def test_lora_in_bf16(scale: float, least: float, most: float) -> None:
    """What is said to be kept of LoRA is what the merged weights keep of it, computed by hand."""
    model = llava().bfloat16()
    apply(model, ["lora"], rank=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale)
    layers = {name: model.get_submodule(name) for name in vars(model)["_normtune"].anatomy.linears}
    before = {
        n: (layer.base_layer.weight.float(), layer.get_delta_weight("default").detach()) for n, layer in layers.items()
    }
    if least < 0.9:
        with pytest.raises(JobError, match=r"of the LoRA update is kept(?s:.*)float32"):
            merge(model)
    result = merge(model, force=True)
    assert result.gains == 0 and result.lora is not None and least <= result.lora <= most
    kept = whole = 0.0
    for name, (weight, change) in before.items():
        kept += float(((model.get_submodule(name).weight.float() - weight) * change).sum())
        whole += float(change.square().sum())
    assert result.lora == pytest.approx(kept / whole, rel=1e-4)


@pytest.mark.parametrize("rate", [1e-6, 1e-1], ids=["small", "large"])
def test_other_tensors_of_a_loaded_adapter_must_survive_too(rate: float, tmp_path: Path) -> None:
    save_adapter(tuned("connector", torch.bfloat16, rate), tmp_path / "a")
    model = llava().bfloat16()
    load_adapter(model, tmp_path / "a")
    result = survival(model, torch.bfloat16)
    assert result.gains == 0 and result.lora is None and result.rest is not None
    assert survival(model, torch.float32).rest == pytest.approx(1)
    if rate < 1e-3:
        assert result.rest < 0.5
        with pytest.raises(JobError, match="of the other tensors is kept"):
            merge(model)
    else:
        assert merge(model).rest == result.rest > 0.95
        assert "_normtune_adapters" not in vars(model)


def quantized(model: Any) -> str:
    """Makes one attention weight look as bitsandbytes' int8 ones do; returns its name."""
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return name + ".weight"


def test_quantized_base(tmp_path: Path) -> None:
    save_adapter(tuned("attn-qv", torch.float32), tmp_path / "a")
    model = llava()
    name = quantized(model)
    with pytest.raises(InputError, match=rf"{name} is quantized.*bfloat16"):
        load_adapter(model, tmp_path / "a")
    with pytest.raises(InputError, match=rf"(?s)quantized.*{name}.*bfloat16"):
        merge(model)


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


def test_page_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", 1e-2), ("b", 2e-2)):
        save_adapter(tuned("layernorm-simple", torch.float32, rate), f"runs/{name}/adapter")

    def open_tuned(run: str) -> Any:
        model = llava()
        load_adapter(model, f"{run}/adapter")
        return SimpleNamespace(model=model)

    monkeypatch.setattr("normtune.open_tuned", open_tuned)  # these runs have no recipe
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    names: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert (tmp_path / "for-peft" / "adapter_config.json").is_file()
    again = llava()
    load_adapter(again, "mixed")
    assert torch.equal(logits(names["model"]), logits(again))


def test_a_cast_of_the_whole_model_is_no_silent_loss(tmp_path: Path) -> None:
    """Trainer's bf16_full_eval casts the model in place: what training did to the gains is rounded away."""
    model = tuned("layernorm-simple", torch.bfloat16, rate=1e-5)
    model.to(torch.bfloat16)
    for verb in (lambda: save_adapter(model, tmp_path / "a"), lambda: merge(model)):
        with pytest.raises(JobError, match=r"input_layernorm\.weight was fp32 .* bfloat16 now"):
            verb()
    assert not (tmp_path / "a").exists()


def test_verbs_take_a_compiled_model(tmp_path: Path) -> None:
    model = tuned("layernorm-simple", torch.float32)
    compiled = torch.compile(model)
    save_adapter(compiled, tmp_path / "a")
    with pytest.raises(InputError, match="exists already"):
        save_adapter(model, tmp_path / "a")
    other = llava()
    load_adapter(torch.compile(other), tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    apply(torch.compile(other), "connector")
    merge(compiled)
    assert "_normtune" not in vars(model)


@pytest.mark.parametrize("strategy", ["attn-mlp", "connector", ["mlp"]], ids=str)
def test_merge_measures_tensors_that_are_no_gains(strategy: Any) -> None:
    model = llava().bfloat16()
    apply(model, strategy)
    train_steps(model, 2, 1e-7)
    with pytest.raises(JobError, match="of the change of the other tensors is kept"):
        merge(model)
    assert merge(model, torch.float32).rest == pytest.approx(1.0)


def sibling() -> Any:
    """The same gains, other matrices: a finetune by LoRA that was merged."""
    model = llava()
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.q_proj.weight.add_(0.01)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["layernorm-simple", "layernorm", "attn-qv"])
def test_a_sibling_with_the_same_gains_is_another_base(strategy: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter(tuned(strategy, dtype), tmp_path / "a")
    with pytest.raises(InputError, match=r"another base: .*q_proj\.weight \(64 values of it\) differs"):
        load_adapter(sibling(), tmp_path / "a")
    load_adapter(llava().to(dtype), tmp_path / "a")
    load_adapter(sibling(), tmp_path / "a", force=True)


@pytest.mark.parametrize("fault", ["tensors", "base", "values"])
def test_incomplete_adapters_are_told(fault: str, tmp_path: Path) -> None:
    folder = save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    stored = load_file(folder / "adapter.safetensors")
    first = next(name for name in stored if not name.startswith("base."))
    if fault == "values":
        stored[first][0] = float("nan")
    stored = {
        name: tensor
        for name, tensor in stored.items()
        if not (fault == "tensors" and name == first) and not (fault == "base" and name.startswith("base."))
    }
    save_file(stored, folder / "adapter.safetensors")
    with pytest.raises(InputError, match="not finite" if fault == "values" else "incomplete"):
        load_adapter(llava(), folder)


@pytest.mark.parametrize("late", [["lora"], ["final_norm"]], ids=str)
def test_what_was_trained_beside_an_active_adapter_is_not_lost(late: list[str], tmp_path: Path) -> None:
    save_adapter(tuned("layernorm-simple", torch.float32), tmp_path / "a")
    model = llava()
    load_adapter(model, tmp_path / "a", "a")
    apply(model, late, rank=2)
    set_adapter(model, None)  # nothing has been trained yet
    set_adapter(model, "a")
    apply(model, late, rank=2)
    train_steps(model, 1)
    for verb in (lambda: set_adapter(model, None), lambda: load_adapter(model, tmp_path / "a", "b")):
        with pytest.raises(InputError, match=r"trained while adapter 'a' was active"):
            verb()


def test_peft_of_another_tool_is_refused() -> None:
    from peft import LoraConfig

    model = text_model("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"(?s)adapter of PEFT's.*merge_and_unload"):
        apply(model, "layernorm-simple")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_switching_between_alike_adapters_writes_their_values_alone(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {}
    for name, steps in (("a", 2), ("b", 3)):
        model = tuned("layernorm", dtype, steps=steps)
        wanted[name] = logits(model)
        save_adapter(model, tmp_path / name)
    model = llava().to(dtype)
    base = logits(model)
    for name in wanted:
        load_adapter(model, tmp_path / name, name)
    with monkeypatch.context() as patch:
        patch.setattr("normtune.adapter.loading.settle", None)
        for name in ("a", "b", "a"):
            set_adapter(model, name)
            assert torch.equal(logits(model), wanted[name])
    apply(model, "layernorm")  # trainable again: switching freezes
    set_adapter(model, "b")
    assert torch.equal(logits(model), wanted["b"]) and not any(p.requires_grad for p in model.parameters())
    set_adapter(model, None)
    assert torch.equal(logits(model), base)


@DTYPES
@pytest.mark.parametrize("own", [None, "layernorm"], ids=["base", "trained"])
def test_a_change_that_breaks_off_leaves_no_adapter_half_in(
    own: str | None, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or no memory left after some writes: the model as before the first adapter, and every verb goes on."""
    for name, strategy in (("a", "layernorm-simple"), ("b", "layernorm-simple"), ("c", ["norms", "connector", "lora"])):
        save_adapter(tuned(strategy, dtype, steps=1), tmp_path / name)
    model = llava().to(dtype) if own is None else tuned(own, dtype, 3e-2)
    before, wanted = facts(model), {"": logits(model)}
    for name in "abc":
        load_adapter(model, tmp_path / name, name)
        wanted[name] = logits(model)
    copy_, left = torch.Tensor.copy_, [0]

    def breaking(self: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return copy_(self, *given, **options)

    monkeypatch.setattr(torch.Tensor, "copy_", breaking)
    for start, name, writes in (("a", "b", 2), ("a", "c", 5), ("", "c", 20), ("c", "a", 3), ("c", "", 2)):
        set_adapter(model, start or None)
        left[0] = writes
        with pytest.raises(KeyboardInterrupt):
            set_adapter(model, name or None)
        assert torch.equal(logits(model), wanted[""]), (start, name)
        set_adapter(model, name or None)
        assert torch.equal(logits(model), wanted[name]), (start, name)
    set_adapter(model, "a")
    left[0] = 2
    with pytest.raises(KeyboardInterrupt):
        remove_adapter(model)
    remove_adapter(model)
    assert_same(model, before)


def test_a_loaded_adapter_keeps_its_strategy(tmp_path: Path) -> None:
    """In what is saved, and exported, from a model that it was loaded into."""
    save_adapter(tuned(["norms", "connector"], torch.float32, steps=1), tmp_path / "a")
    model = tuned("layernorm-simple", torch.float32, steps=1)
    load_adapter(model, tmp_path / "a", "a")
    save_adapter(model, tmp_path / "again")
    record = Adapter.read(tmp_path / "again").record
    assert (record["strategy"], record["parts"]) == ("norms+connector", ["norms", "connector"])
    apply(model, ["final_norm"])
    save_adapter(model, tmp_path / "more")
    assert Adapter.read(tmp_path / "more").record["strategy"] == "final_norm"
