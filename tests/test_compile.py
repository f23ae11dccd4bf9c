"""Blocks compiled one by one: no graph breaks, no graph for each block or length, the same step, and a way out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from normtune.kernels.compiling import Compiled, compile_each
from normtune.kernels.segments import recomputed, segments
from normtune.strategy import apply, lean, leaning, restore, tuning
from stubs import inputs, text_model
from test_memory import SHAPES, make_batch, make_model, saved_bytes

QUICK = "aot_eager"  # everything but the generation of code
B, S, H = 2, 128, 256


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compile_model(model: Any, backend: str = QUICK) -> Any:
    compile_each([model.get_submodule(name) for name in tuning(model).anatomy.blocks], backend=backend)
    return model


def is_compiled(model: Any) -> list[bool]:
    blocks = [model.get_submodule(name) for name in tuning(model).anatomy.blocks]
    return [isinstance(vars(block).get("_compiled_call_impl"), Compiled) for block in blocks]


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and all gradients in one vector."""
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def words(length: int, rows: int = B) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    assert (a - b).float().norm() <= tolerance * b.float().norm()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "activations"),
    [
        ("llama, grouped", "exact"),
        pytest.param("gpt2", "exact", marks=pytest.mark.slow),
        pytest.param("gemma3", "8bit", marks=pytest.mark.slow),
        pytest.param("phi3", "8bit", marks=pytest.mark.slow),
    ],
)
def test_all_blocks_and_lengths_share_their_graphs(name: str, activations: Any) -> None:
    model = make_model(SHAPES[name][0], 3)
    apply(model, "layernorm-simple")
    plain = copy.deepcopy(model)
    for some in (model, plain):
        lean(some, activations)
    compile_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing falls back
        for length in (50, 40, 27, 64):
            for got, wanted in zip(gradients(model, words(length)), gradients(plain, words(length)), strict=True):
                assert_close(got, wanted, 0.01)
    assert all(is_compiled(model)) and graphs() == 2  # the first block has no gradient to pass on


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_and_checkpointing(checkpointed: bool) -> None:
    model = text_model("llama").train()
    apply(model, "layernorm-simple")
    plain = copy.deepcopy(model)
    for some in (model, plain):
        lean(some)
        if checkpointed:
            some.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
    compile_model(model)
    for lengths in ([5, 7, 6], [9, 4, 8, 3]):
        ids = torch.randint(3, 90, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        found = []
        for some in (model, plain):
            with segments(torch.tensor(lengths)):
                found.append(gradients(some, batch))
        for got, wanted in zip(*found, strict=True):
            assert_close(got, wanted, 1e-5)
    assert all(is_compiled(model)) and graphs() <= 2  # checkpointing lets the first input have a gradient, too


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activations"), [("llama", "exact"), ("llama", "8bit")])
def test_the_code_of_the_compiler_keeps_the_floor(
    name: str, activations: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config, floor = SHAPES[name]
    sizes = []
    for blocks in (2, 3):
        model = make_model(config, blocks)
        apply(model, "layernorm-simple")
        plain = copy.deepcopy(model)
        lean(model, activations)
        compile_model(model, "inductor")
        sizes.append(saved_bytes(model, make_batch(model, padded=True)))
        assert all(is_compiled(model))
        if blocks == 2:
            _, got = gradients(model, words(S))
            _, wanted = gradients(plain, words(S))
            assert_close(got, wanted, 0.03)  # bf16, rounded in other places
    units = (sizes[1] - sizes[0]) / (2 * B * S * H)
    assert units <= (8.8 if activations == "8bit" else floor * 1.03)


def test_generation_evaluation_and_caches_run_the_blocks_as_they_are() -> None:
    model = text_model("llama")
    apply(model, "layernorm-simple")
    ids = inputs(model)["input_ids"]
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    compile_model(model)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), wanted)
    model(ids, use_cache=False)
    with torch.no_grad():
        model.train()(ids, use_cache=False)
    model(ids, use_cache=True).logits.sum().backward()
    assert graphs() == 0


def broken(graph: Any, example: Any) -> Any:
    raise RuntimeError("no compiler\nat all")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_where_it_cannot_be_compiled_the_step_is_done_with_one_warning(checkpointed: bool) -> None:
    model = text_model("llama").train()
    apply(model, "layernorm-simple")
    lean(model)
    wanted = gradients(model, inputs(model))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_model(model, broken)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="the blocks run without it") as caught:
        got = gradients(model, inputs(model))
        gradients(model, inputs(model))
    assert len([one for one in caught if one.category is RuntimeWarning]) == 1
    assert "\n" not in str(caught[0].message)
    assert all(map(torch.equal, got, wanted)) and not any(is_compiled(model))


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama")
    monkeypatch.setattr(leaning, "no_compiler", lambda device: "InvalidCxxCompiler: none")
    line = leaning.compile_blocks(model)
    assert line == "compile: the blocks run without it: InvalidCxxCompiler: none" and not any(is_compiled(model))


def test_restore_takes_compilation_away() -> None:
    model = text_model("llama")
    lean(model)
    assert leaning.compile_blocks(model) is None and all(is_compiled(model))
    assert not any(is_compiled(copy.deepcopy(model)))  # as with torch's own Module.compile
    restore(model)
    assert not any("_compiled_call_impl" in vars(module) for module in model.modules())
