"""Banks: each row of a batch on its own adapter, bit for bit as if the whole batch were on it."""

from __future__ import annotations

import copy
import json
import re
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import normtune as nt
from command import run
from normtune.adapter import Adapter, load_adapter
from normtune.adapter.loading import capture
from normtune.bank import Bank, Entry, planned
from normtune.bank.banks import KEPT
from normtune.errors import InputError
from normtune.recipe import load_recipe
from normtune.structure import anatomy
from normtune.training.evaluating import base_facts
from stubs import IMAGE, llava, text_model
from zoo import model as zoo_model

BF16 = torch.bfloat16
ROWS: list[str | None] = ["a", None, "b", "a"]
# After a fused LayerNorm: 1 + g, a norm per head, gains [heads, size], a gated norm in groups, flattened heads
NORMS = ["llama", "gemma3_text", "gpt_neox", "nemotron", "stablelm_qk", "cohere_qk", "falcon_h1", "qwen3_next"]


def made_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name != "torch_rms":
        return zoo_model(name).to(dtype)
    model = text_model("llama")
    for place in (*anatomy(model).norms, *anatomy(model).final_norm):
        norm = nn.RMSNorm(32, eps=1e-5)
        norm.weight = model.get_submodule(place).weight
        model.set_submodule(place, norm)
    return model.to(dtype)


def adapter(model: Any, seed: int, strategy: Any = "layernorm-simple", size: float = 0.2) -> Adapter:
    """An adapter of the model with random changes; the model is not touched."""
    tuned = copy.deepcopy(model)
    nt.apply(tuned, strategy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return capture(tuned)


def norms_of(model: Any) -> list[str]:
    return [part for part in ("norms", "final_norm", "qk_norms") if anatomy(model).modules(part)]


def words(rows: int = 4, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs).logits  # type: ignore[no-any-return]


def by_row(bank: Bank, names: list[str | None], images: list[int] | tuple[int, ...] = (), **inputs: Any) -> Any:
    with bank.rows([bank.entry(name) for name in names], images):
        return logits(bank.model, **inputs)


def with_adapter(model: Any, made: Adapter, folder: Path, **inputs: Any) -> torch.Tensor:
    load_adapter(model, made.write(folder, replace=True))
    return logits(model, **inputs)


def check_rows(model: Any, bank: Bank, adapters: dict[str, Adapter], folder: Path, **inputs: Any) -> None:
    """Each row of a mixed batch against a batch of its adapter, in the bank and by `load_adapter`, and the base's."""
    base = logits(copy.deepcopy(model), **inputs)
    images = inputs.pop("images", ())
    mixed = by_row(bank, ROWS, images, **inputs)
    assert torch.equal(by_row(bank, [None] * 4, images, **inputs), base)
    assert torch.equal(logits(model, **inputs), base)
    for row, name in enumerate(ROWS):
        alike = base if name is None else by_row(bank, [name] * 4, images, **inputs)
        assert torch.equal(mixed[row], alike[row]), f"row {row}"
    loaded = {name: with_adapter(fresh(model), made, folder, **inputs) for name, made in adapters.items()}
    for row, name in enumerate(ROWS):
        if name is not None:
            assert torch.equal(mixed[row], loaded[name][row]), f"row {row}"
            assert not torch.equal(mixed[row], base[row])


def fresh(model: Any) -> Any:
    """A copy without the bank's forwards."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        vars(module).pop("forward", None)
    return copied


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*NORMS, "torch_rms"])
def test_a_row_has_the_bits_of_a_batch_of_its_adapter(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made_model(name, dtype)
    adapters = {key: adapter(model, seed, norms_of(model)) for seed, key in enumerate("ab")}
    check_rows(model, nt.bank(model, adapters), adapters, tmp_path / "a", input_ids=words())


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategies", [("layernorm", "layernorm"), (["norms"], ["final_norm", "head"])], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma", "tied"])
def test_rows_with_embedding_head_and_part_of_the_norms(
    kind: str, strategies: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = text_model("llama" if kind == "tied" else kind, tied=kind == "tied").to(dtype)
    made = zip("ab", (1, 2), strategies, strict=True)
    adapters = {key: adapter(model, seed, strategy) for key, seed, strategy in made}
    check_rows(model, nt.bank(model, adapters), adapters, tmp_path / "a", input_ids=words())


def pictures(model: Any, texts: int = 10, images: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows that begin with 16 image tokens, the last ones without."""
    ids = words(4, 16 + texts, seed)
    ids[:images, :16] = IMAGE
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, 32, 32, generator=generator).to(model.dtype)
    return {"input_ids": ids, "pixel_values": pixels}


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["layernorm", ["connector"], ["norms", "connector"]], ids=str)
def test_rows_have_connectors_of_their_own(strategy: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llava().to(dtype)
    adapters = {key: adapter(model, seed, strategy) for seed, key in enumerate("ab")}
    bank = nt.bank(model, adapters)
    given = pictures(model)
    base = logits(fresh(model), **given)
    mixed = by_row(bank, ROWS, range(4), **given)  # type: ignore[arg-type]
    for row, name in enumerate(ROWS):
        alike = by_row(bank, [name] * 4, **given)
        loaded = base if name is None else with_adapter(fresh(model), adapters[name], tmp_path / "a", **given)
        assert torch.equal(alike, loaded)
        assert torch.equal(mixed[row], alike[row])
    with pytest.raises(InputError, match="images"):
        by_row(bank, ROWS, **given)


def test_an_entry_connects_each_image_on_its_own() -> None:
    model = llava()
    bank = nt.bank(model, {"a": adapter(model, 1, "connector")})
    features = torch.randn(3, 16, 32)
    with torch.no_grad():
        alone = bank.connect(bank.entry("a"), features[1:2])
        assert torch.equal(bank.connect(bank.entry("a"), features)[1:2], alone)
        base = bank.connect(bank.entry(None), features)
        torch.testing.assert_close(base, model.model.multi_modal_projector(features))
        assert not torch.allclose(base[1:2], alone)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt_neox"])
def test_alone_and_in_company_the_same_answer(kind: str) -> None:
    model = made_model(kind)
    bank = nt.bank(model, {key: adapter(model, seed, norms_of(model)) for seed, key in enumerate("ab")})
    ids = words()
    options: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = bank.generate(adapters=ROWS, input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    mixed = by_row(bank, ROWS, input_ids=ids)
    for row, name in enumerate(ROWS):
        one = ids[row : row + 1]
        alone = bank.generate(adapters=[name], input_ids=one, attention_mask=torch.ones_like(one), **options)[0]
        assert together[row].tolist()[: len(alone)] == alone.tolist()
        torch.testing.assert_close(by_row(bank, [name], input_ids=one)[0], mixed[row], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="one adapter per row"):
        bank.generate(adapters=["a"], input_ids=ids)
    with pytest.raises(InputError, match="num_beams"):
        bank.generate(adapters=ROWS, input_ids=ids, num_beams=2)


def test_images_find_their_rows_and_their_token_is_never_sampled() -> None:
    model = llava()
    with torch.no_grad():
        model.lm_head.weight[IMAGE] *= 30  # what it says where nobody forbids it
    bank = nt.bank(model, {key: adapter(model, seed, ["norms", "connector"]) for seed, key in enumerate("ab")})
    given = pictures(model, images=3)
    given["input_ids"] = given["input_ids"][[3, 0, 1, 2]]  # the first row has no image
    names = [None, "a", "b", None]
    options: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answers = bank.generate(adapters=names, **given, **options)[:, -4:]
    assert IMAGE in model.generate(**given, **options)[:, -4:] and IMAGE not in answers
    assert bank.never_sampled == [IMAGE]
    for row, name in enumerate(names):
        pixels = {"pixel_values": given["pixel_values"][row - 1 : row]} if row else {}
        one = bank.generate(adapters=[name], input_ids=given["input_ids"][row : row + 1], **pixels, **options)
        assert one[0, -4:].tolist() == answers[row].tolist()


@pytest.mark.parametrize("gate", ["none", "image"])
def test_gate_leaves_text_to_the_base(gate: Any) -> None:
    model = llava()
    made = adapter(model, 1, ["norms", "connector"])
    made.record["gate"] = gate
    bank = nt.bank(model, {"a": made})
    entry = bank.entry("a")
    assert entry.for_request(True) is entry
    assert entry.for_request(False) is (bank.entry(None) if gate == "image" else entry)
    given = pictures(model, images=2)
    options: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    scores: Any = {"return_dict_in_generate": True, "output_logits": True}
    base: Any = fresh(model).generate(**given, **options, **scores, suppress_tokens=[IMAGE])
    found: Any = bank.generate(adapters=["a"] * 4, **given, **options, **scores)
    for ours, bases in zip(found.logits, base.logits, strict=True):
        assert torch.equal(ours[2:], bases[2:]) == (gate == "image")
    assert not torch.equal(found.logits[0][:2], base.logits[0][:2])
    bank.add("always", made, gate="none")
    assert bank.entry("always").for_request(False).name == "always"
    with pytest.raises(InputError, match="neither none nor image"):
        bank.add("odd", made, gate="text")  # type: ignore[arg-type]


def test_a_mixed_batch_runs_each_norm_once() -> None:
    model = text_model("llama")
    bank = nt.bank(model, {str(seed): adapter(model, seed) for seed in range(16)})
    entries = [bank.entry(str(row)) for row in range(16)]
    ids = words(16)
    assert bank.select(entries) is bank.select(list(entries))
    with bank.rows(entries):
        logits(model, input_ids=ids)
        with Operations() as mixed:
            logits(model, input_ids=ids)
    with Operations() as base:
        logits(model, input_ids=ids)
    assert mixed.found == base.found


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


REFUSED: dict[str, tuple[Any, str]] = {
    "LoRA": ("lora", "LoRA"),
    "attention": ("attn-qv", "trains weights beside"),
    "everything": ("full", "merge it"),
    "vision": (["norms", "vision_norms"], "trains the vision encoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_rows_cannot_have_of_their_own(case: str) -> None:
    strategy, why = REFUSED[case]
    model = llava()
    with nt.bank(model) as bank:
        with pytest.raises(InputError, match=why) as error:
            bank.add("x", adapter(model, 1, strategy))
        assert "model of its own" in str(error.value) and bank.names == []


def test_wrong_names_and_bases_leave_the_bank_as_it_was(tmp_path: Path) -> None:
    model = text_model("llama")
    made = adapter(model, 1)
    bank = nt.bank(model, {"medical": made.write(tmp_path / "a")})
    with pytest.raises(InputError, match="did you mean 'medical'"):
        bank.entry("medcal")
    with pytest.raises(InputError, match="no adapter 'x'"):
        bank.remove("x")
    with pytest.raises(InputError, match="already"):
        bank.add("medical", made)
    with pytest.raises(InputError, match="needs a name"):
        bank.add("", made)
    with pytest.raises(InputError, match="another base"):
        bank.add("b", adapter(text_model("llama", seed=3), 1))
    foreign = Adapter({**made.tensors, "model.layers.9.input_layernorm.weight": torch.ones(4)}, made.base)
    with pytest.raises(InputError, match=r"another base: this model has no model\.layers\.9"):
        bank.add("b", foreign)
    larger = text_model("llama")
    larger.resize_token_embeddings(104, mean_resizing=False)
    with pytest.raises(InputError, match="does not fit this model"):
        bank.add("c", Adapter(adapter(larger, 1, ["embed", "head"]).tensors))
    with pytest.raises(InputError, match="no adapter in"):
        bank.add("d", tmp_path / "nothing")
    assert bank.names == ["medical"]


def test_bases_that_are_none() -> None:
    tuned = text_model("llama")
    nt.apply(tuned, "layernorm-simple")
    with torch.no_grad():
        tuned.model.layers[0].input_layernorm.weight.add_(1)
    nt.apply(tuned, "layernorm-simple")
    with pytest.raises(InputError, match="tuned in the model"):
        nt.bank(tuned)
    with_lora = text_model("llama")
    nt.apply(with_lora, "lora", rank=2)
    with pytest.raises(InputError, match="LoRA"):
        nt.bank(with_lora)
    model = text_model("llama")
    nt.bank(model)
    with pytest.raises(InputError, match="has a bank already"):
        nt.bank(model)


def test_a_model_with_an_active_adapter_is_no_base(tmp_path: Path) -> None:
    model = text_model("llama")
    load_adapter(model, adapter(model, 1).write(tmp_path / "a"), "a")
    with pytest.raises(InputError, match="adapter 'a' is active"):
        nt.bank(model)
    nt.set_adapter(model, None)
    nt.bank(model)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_closing_gives_the_model_back(dtype: torch.dtype) -> None:
    model = text_model("llama").to(dtype)
    state, before = copy.deepcopy(model.state_dict()), logits(model, input_ids=words())
    with nt.bank(model, {"a": adapter(model, 1, "layernorm")}) as bank:
        by_row(bank, ["a"] * 4, input_ids=words())
        assert bank.bytes > 0
        entries = [bank.entry("a")]
    with pytest.raises(InputError, match="closed"), bank.rows(entries):
        pass
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, input_ids=words()), before) and bank.names == []
    with pytest.raises(InputError):
        nt.bank(model, {"a": "nowhere"})
    assert not any("forward" in vars(module) for module in model.modules())


def test_adding_replacing_and_removing_while_another_thread_generates() -> None:
    model = text_model("llama")
    versions = [adapter(model, seed, size=2.0) for seed in range(3)]
    bank = nt.bank(model, {"still": versions[0], "moving": versions[1]})
    ids, options = words(3), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def answers(names: list[str | None]) -> list[list[int]]:
        return bank.generate(adapters=names, input_ids=ids, **options).tolist()  # type: ignore[no-any-return]

    allowed = []
    for version in versions[1:]:
        bank.add("moving", version, replace=True)
        allowed.append(answers(["still", "moving", None]))
    assert allowed[0] != allowed[1] and allowed[0][0] == allowed[1][0]
    stop, changes = threading.Event(), Counter[str]()

    def change() -> None:
        while not stop.is_set():
            bank.add("moving", versions[1 + changes["replaced"] % 2], replace=True)
            bank.add("other", versions[2])
            bank.remove("other")
            changes["replaced"] += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        found = [answers(["still", "moving", None]) for _ in range(12)]
    finally:
        stop.set()
        thread.join()
    assert all(answer in allowed for answer in found) and changes["replaced"] > 1


def test_threads_run_on_their_own_selections() -> None:
    model = text_model("llama")
    bank = nt.bank(model, {key: adapter(model, seed) for seed, key in enumerate("ab")})
    wanted = {name: by_row(bank, [name] * 4, input_ids=words()) for name in ("a", "b", None)}
    wrong: list[str | None] = []

    def run(name: str | None) -> None:
        for _ in range(20):
            if not torch.equal(by_row(bank, [name] * 4, input_ids=words()), wanted[name]):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_norm_that_the_model_does_not_call_as_a_module() -> None:
    model = text_model("llama")
    bank = nt.bank(model, {"a": adapter(model, 1)})
    norm = model.model.layers[0].input_layernorm
    model.model.layers[0].input_layernorm.__class__ = type("Direct", (type(norm),), {"__call__": type(norm).forward})
    with pytest.raises(InputError, match="input_layernorm is no module that the model calls"):
        bank.generate(adapters=["a"] * 4, input_ids=words(), max_new_tokens=1, pad_token_id=0)


def test_a_request_keeps_the_adapter_that_it_began_with() -> None:
    model = text_model("llama")
    bank = nt.bank(model, {"a": adapter(model, 1)})
    entry: Entry = bank.entry("a")
    before = by_row(bank, ["a"] * 4, input_ids=words())
    bank.add("a", adapter(model, 2), replace=True)
    bank.remove("a")
    with bank.rows([entry] * 4):
        assert torch.equal(logits(model, input_ids=words()), before)
    with pytest.raises(InputError, match="4 rows where 2"), bank.rows([entry] * 2):
        logits(model, input_ids=words(4, 7))


def test_gathered_gains_of_the_past_are_let_go() -> None:
    model = text_model("llama")
    bank = nt.bank(model, {"a": adapter(model, 1)})
    entries = [bank.entry("a"), bank.entry(None)]
    for number in range(40):
        bank.select([entries[number >> bit & 1] for bit in range(6)])
    assert len(bank._selections) == KEPT
    gone = weakref.ref(entries.pop(0))
    bank.remove("a")
    assert gone() is None


@pytest.mark.heavy
def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import bank as program

    target = tmp_path / "bank.json"
    options = ["--shapes", "tiny", "--dtypes", "float32", "--rounds", "2", "--steps", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["bank", *options, "--json", str(target)])
    program.main()
    found = json.loads(target.read_text())
    assert found["provenance"]["versions"]["torch"] and "bank, 16 adapters" in capsys.readouterr().out
    (shape,) = found["shapes"].values()
    assert len(shape["rows"]) == 5 and shape["rows"][0]["decode_ratio"] == [1.0, 1.0, 1.0]
    assert shape["switching"].keys() == {"bank_composition_ms", "bank_add_ms", "set_adapter_ms"}


def test_gains_in_bfloat16_take_half_and_are_rounded() -> None:
    model = text_model("llama")
    made = adapter(model, 1)
    whole = nt.bank(copy.deepcopy(model), {"a": made})
    half = nt.bank(model, {"a": made}, dtype=BF16)
    assert half.bytes * 2 == whole.bytes
    rounded = Adapter({n: t.to(BF16).float() for n, t in made.tensors.items()}, made.base, made.record)
    whole.add("rounded", rounded)
    same = [torch.equal(half.entry("a").gains.float(), whole.entry(n).gains.to(BF16).float()) for n in ("a", "rounded")]
    assert same == [True, True]


def test_a_quantized_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from models import tiny_mllm

    model, _ = nt.load(str(tiny_mllm(tmp_path / "m", hidden_size=64, head_dim=16)), dtype="nf4")
    folder = tmp_path / "a"
    given = {"input_ids": words()}
    base = logits(model, **given)
    nt.apply(model, "layernorm-simple")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.2)
    made, tuned = capture(model), logits(model, **given)
    made.write(folder)
    fresh_model, _ = nt.load(str(tmp_path / "m"), dtype="nf4")
    bank = nt.bank(fresh_model, {"a": folder})
    mixed = by_row(bank, ["a", None, "a", None], **given)
    assert torch.equal(mixed[::2], tuned[::2]) and torch.equal(mixed[1::2], base[1::2])


def test_planned_memory_of_a_thousand_adapters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # Llama-2-7B's shape
    found = planned(model, 1000)
    assert found.gains == 65 * 4096
    assert (found.bytes(4), found.bytes(2)) == (1_064_960_000, 532_480_000)
    assert "1.06 GB in float32" in str(found) and "connector" not in str(found)
    small = llava()
    assert planned(small, 2).bytes(4) == sum(
        entry.gains.nbytes for entry in nt.bank(small, {k: adapter(small, 1) for k in "ab"})._entries.values()
    )


@pytest.mark.parametrize("vision", [False, True])
def test_plan_prints_the_memory_of_adapters(
    vision: bool, llm_folder: Path, vision_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--llm", str(llm_folder), *(["--vision", str(vision_folder)] if vision else []), "--adapters", "1000"]
    assert run("plan", *options) == 0
    shown = capsys.readouterr().out
    assert "1,000 adapters of 160 gains: 640 kB in float32, 320 kB in bfloat16" in shown
    assert ("with a connector each" in shown) == vision
    assert run("plan", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["bytes_bfloat16"] == 320_000
    assert run("plan", *options, "--batch", "2") == 2


def test_page_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = llava()
    for seed, name in enumerate("abc"):
        adapter(model, seed, "layernorm").write(f"runs/{name}/adapter")
    page = Path(__file__).parents[1] / "docs" / "adapters.md"
    (code,) = [found for found in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "nt.bank" in found]
    given = pictures(model, images=3)
    inputs = {"input_ids": given["input_ids"][:3], "pixel_values": given["pixel_values"], "max_new_tokens": 2}
    names: dict[str, Any] = {"model": model, "inputs": inputs, "two_rows": {"input_ids": words(2)}}
    exec(compile(code, page.name, "exec"), names)
    assert len(names["ids"]) == 3 and len(names["logits"]) == 2


@pytest.mark.parametrize("gate", ["none", "image"])
def test_a_recipe_gates_its_adapter(gate: str, tmp_path: Path) -> None:
    data = [{"path": "d.json"}]
    stage = {"name": "s", "strategy": "layernorm-simple", "learning_rate": 1e-3, "data": data}
    recipe = load_recipe({"model": {"path": "m"}, "stages": [stage], "gate": gate})
    model = text_model("llama")
    tuned = copy.deepcopy(model)
    nt.apply(tuned, "layernorm-simple")
    with torch.no_grad():
        tuned.model.layers[0].input_layernorm.weight.add_(1)
    folder = nt.save_adapter(tuned, tmp_path / "a", **base_facts(recipe))
    assert nt.bank(model, {"a": folder}).entry("a").gate == gate
    assert Adapter.read(folder).scale(0.5).record["gate"] == gate
