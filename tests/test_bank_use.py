"""Banks in use: gains of rows beside others, what is kept and let go, a model that is taken, settings of `generate`."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import normtune as nt
from normtune.adapter import load_adapter, set_adapter
from normtune.bank import Selection
from normtune.bank.banks import KEPT
from normtune.errors import InputError
from stubs import llava, text_model
from test_bank import BF16, adapter, by_row, logits, norms_of, words


def test_gains_in_bfloat16_leave_what_nobody_tuned_as_it_is() -> None:
    """Base rows, and norms that an adapter leaves alone, have the same bits alone and beside other adapters."""
    model = text_model("llama")
    base = logits(copy.deepcopy(model), input_ids=words())
    bank = nt.bank(
        model, {"norms": adapter(model, 1, ["norms"]), "final": adapter(model, 2, ["final_norm"])}, dtype=BF16
    )
    mixed = by_row(bank, ["norms", None, "final", None], input_ids=words())
    assert torch.equal(mixed[1::2], base[1::2])
    assert torch.equal(mixed[0], by_row(bank, ["norms"] * 4, input_ids=words())[0])
    assert torch.equal(mixed[2], by_row(bank, ["final"] * 4, input_ids=words())[2])


def test_gains_are_stored_in_floating_point() -> None:
    with pytest.raises(InputError, match="float32 or bfloat16, not in torch"):
        nt.bank(text_model("llama"), dtype=torch.int8)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma"))])
def test_gains_of_past_compositions_wait_for_no_collector(kind: str, dtype: torch.dtype) -> None:
    """Nor does an adapter with a head of its own, once it was removed."""
    model: Any = text_model(kind).to(dtype)
    bank = nt.bank(model, {name: adapter(model, i, [*norms_of(model), "head"]) for i, name in enumerate("abcd")})
    gc.collect()
    gc.disable()
    try:
        gathered = []
        for names in itertools.islice(itertools.permutations("abcd"), 2 * KEPT):
            selection = bank.select([bank.entry(name) for name in names])
            with bank.rows(selection):
                logits(model, input_ids=words())
            gathered.append(weakref.ref(selection.gains))
            del selection
        assert sum(gains() is not None for gains in gathered) == KEPT
        head = weakref.ref(next(iter(bank.entry("a").modules["lm_head"].parameters())))
        bank.remove("a")
        assert head() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("strategy", ["layernorm-simple", ["norms", "connector"]], ids=str)
def test_gains_of_images_wait_for_no_collector(strategy: Any) -> None:
    model: Any = llava().to(BF16)
    bank = nt.bank(model, {"a": adapter(model, 1, strategy), "b": adapter(model, 2, strategy)})
    pixels = torch.zeros(1, 3, 32, 32, dtype=BF16)
    gc.collect()
    gc.disable()
    try:
        selection = bank.select([bank.entry("a"), bank.entry("b")])
        with bank.rows(selection, [0]):
            model.get_image_features(pixel_values=pixels)
        gone = weakref.ref(selection.gains)
        bank.remove("b")
        del selection
        assert gone() is None
    finally:
        gc.enable()


def test_an_adapter_that_is_gone_is_not_kept_by_those_who_ran_on_it() -> None:
    """A request goes on after its adapter was removed, beside others that come and leave."""
    model: Any = text_model("llama")
    bank = nt.bank(model, {"a": adapter(model, 1, "layernorm"), "b": adapter(model, 2)})
    entry, still = bank.entry("a"), bank.entry("b")
    wanted = by_row(bank, ["a", "b"], input_ids=words(2))
    bank.add("a", adapter(model, 3), replace=True)
    with bank.rows([entry, still]):
        assert torch.equal(logits(model, input_ids=words(2)), wanted)
    assert bank.select([still]) is bank.select([still])
    gone = weakref.ref(entry)
    del entry
    assert gone() is None


def test_what_inference_mode_gathered_serves_autograd_later() -> None:
    model = text_model("llama").requires_grad_(True)
    bank = nt.bank(model, {"a": adapter(model, 1), "b": adapter(model, 2)})
    entries = [bank.entry(name) for name in ("a", None, "b", "a")]
    with torch.inference_mode(), bank.rows(entries):
        wanted = model(input_ids=words()).logits
    with bank.rows(entries):
        found = model(input_ids=words()).logits
    found.sum().backward()
    assert torch.equal(found, wanted)


def test_closing_beneath_a_batch_is_told() -> None:
    """Else its later tokens were the base's, and nobody knew."""
    model = text_model("llama")
    bank = nt.bank(model, {"a": adapter(model, 1)})
    told: list[BaseException] = []
    running, closed = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        running.set()
        closed.wait(60)

    def generate() -> None:
        try:
            bank.generate(adapters=["a"] * 4, input_ids=words(), max_new_tokens=3, do_sample=False, pad_token_id=0)
        except InputError as error:
            told.append(error)

    model.lm_head.register_forward_hook(pause)
    thread = threading.Thread(target=generate)
    thread.start()
    assert running.wait(60)
    bank.close()
    closed.set()
    thread.join(60)
    assert "the bank is closed" in str(told[0])


TAKEN: dict[str, Callable[[Any, Path], object]] = {
    "apply": lambda model, folder: nt.apply(model, "layernorm-simple"),
    "load": lambda model, folder: load_adapter(model, folder),
    "set": lambda model, folder: set_adapter(model, "before"),
    "merge": lambda model, folder: nt.merge(model),
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_model_in_a_bank_is_the_bank_s(what: str, tmp_path: Path) -> None:
    model = text_model("llama")
    folder = adapter(model, 1).write(tmp_path / "a")
    load_adapter(model, folder, "before")
    set_adapter(model, None)
    bank = nt.bank(model, {"a": folder})
    wanted = by_row(bank, ["a", None, "a", None], input_ids=words())
    with pytest.raises(InputError, match="a bank serves this model"):
        TAKEN[what](model, folder)
    assert torch.equal(by_row(bank, ["a", None, "a", None], input_ids=words()), wanted)
    bank.close()
    TAKEN[what](model, folder)


def test_a_batch_of_more_rows_than_adapters_is_refused_without_embedding_and_head_too() -> None:
    model: Any = text_model("llama")
    bank = nt.bank(model, {"a": adapter(model, 1), "b": adapter(model, 2)})
    embedded = model.get_input_embeddings()(words())
    with pytest.raises(InputError, match="4 rows where 2"), bank.rows([bank.entry("a"), bank.entry("b")]):
        model.model(inputs_embeds=embedded)


def test_a_norm_on_flattened_rows_is_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As [B heads, size] in some mixers: the second step does nothing but compute."""
    model: Any = text_model("llama")
    bank = nt.bank(model, {"a": adapter(model, 1), "b": adapter(model, 2)})
    norm, given = model.model.layers[0].input_layernorm, torch.randn(6, 32)
    with torch.no_grad(), bank.rows([bank.entry("a"), bank.entry("b")]):
        wanted = norm(given.view(2, 3, 32)).flatten(0, 1)
        assert torch.equal(norm(given), wanted)
        monkeypatch.setattr(Selection, "forward", None)
        assert torch.equal(norm(given), wanted)


def test_a_copy_of_a_model_in_a_bank_is_free() -> None:
    model = text_model("llama")
    made = adapter(model, 1)
    bank = nt.bank(model, {"a": made})
    wanted = by_row(bank, ["a", None], input_ids=words(2))
    copied = copy.deepcopy(model)
    assert torch.equal(by_row(nt.bank(copied, {"a": made}), ["a", None], input_ids=words(2)), wanted)
    assert torch.equal(by_row(bank, ["a", None], input_ids=words(2)), wanted)
    with pytest.raises(InputError, match="has a bank already"):
        nt.bank(model)


def test_settings_of_generate_hold_in_a_bank() -> None:
    """`generation_config` may ask for beams, which a bank refuses, and suppress tokens beside the image's."""
    model = llava()
    bank, ids = nt.bank(model), words(1)
    first = int(bank.generate(adapters=[None], input_ids=ids, max_new_tokens=1, do_sample=False)[0, -1])
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, suppress_tokens=[first])
    found = bank.generate(adapters=[None], input_ids=ids, generation_config=settings)
    assert int(found[0, -1]) != first and settings.suppress_tokens == [first]
    with pytest.raises(InputError, match="one sequence per row"):
        bank.generate(adapters=[None], input_ids=ids, generation_config=GenerationConfig(num_beams=2))
