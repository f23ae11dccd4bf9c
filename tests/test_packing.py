"""Samples end to end in one row: each is computed as if it were alone, whatever its neighbours are."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import zoo
from normtune.data import Collator, Row, micro_batches
from normtune.kernels import attention_gpu
from normtune.kernels.attention import LeanAttention, attend, attend_backward, trial
from normtune.kernels.segments import ALL, MASKED, current, find_window, recomputed, segments
from normtune.step import positions, supervised_loss
from normtune.strategy import apply, lean
from normtune.strategy.packing import can_pack, pack_length, prefers_packing
from stubs import IMAGE, llava
from test_memory import SIZES, B, H, S, saved_bytes

pytestmark = pytest.mark.heavy

LENGTHS = (9, 1, 14, 5)
# name in the zoo: what differs from its config there
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 3},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {},
}


@pytest.fixture(scope="module")
def collator() -> Collator:
    """One that only collates."""
    made = Collator.__new__(Collator)
    made._pad, made.store = 0, None
    return made


def rows_of(lengths: Any, images: Any = (), seed: int = 0) -> list[Row]:
    """Random words, a third of them supervised; `images` gives for each row the numbers of its images."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    rows = []
    for n, length in enumerate(lengths):
        shown = images[n] if images else ()
        ids = [IMAGE] * (16 * len(shown)) + torch.randint(3, 90, (length,), generator=generator).tolist()
        supervised = [False] * (16 * len(shown)) + [at % 3 > 0 for at in range(length)]
        paths = tuple(Path(f"{k}.png") for k in shown)
        rows.append(Row(ids, supervised, paths, tuple(pixels[k] for k in shown)))
    return rows


def model_of(name: str, attention: str = "sdpa") -> Any:
    made = zoo.model(name)
    config = copy.deepcopy(made.config)
    for key, value in PACKED[name].items():
        setattr(config, key, value)
    config._attn_implementation = attention
    other = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    other.load_state_dict(made.state_dict())
    return other.eval()


def outcome(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of the losses, and the gradients by name."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = supervised_loss(model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-12, name


@pytest.mark.parametrize("way", ["lean", "plain", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_row_is_the_sum_of_its_samples(name: str, way: str, collator: Collator) -> None:
    model = model_of(name, "eager" if way == "eager" else "sdpa")
    apply(model, "layernorm")
    if way == "lean":
        lean(model)
    rows = rows_of(LENGTHS)
    assert can_pack(model) is None
    alone = outcome(model, [collator.padded([row]) for row in rows])
    assert_same(outcome(model, [collator.packed(rows)]), alone)
    assert_same(outcome(model, [collator.padded(rows)]), alone)


def test_samples_with_images_and_accumulation(collator: Collator) -> None:
    """Images once each though they are shown twice; in one micro-batch, in four, packed and padded."""
    model = llava()
    apply(model, "layernorm")
    lean(model)
    rows = rows_of(LENGTHS, images=((0,), (), (1, 0), (1,)))
    alone = outcome(model, [collator.padded([row]) for row in rows])
    packed = collator.packed(rows)
    assert packed["pixel_values"].shape == (2, 3, 32, 32) and packed["image_index"].tolist() == [0, 1, 0, 1]
    assert_same(outcome(model, [packed]), alone)
    for groups in (micro_batches(rows, 2, False, 0), micro_batches(rows, 4, True, 50)):
        assert len(groups) == 2
        assert_same(outcome(model, [collator.padded(group) for group in groups]), alone)
        assert_same(outcome(model, [collator.packed(group) for group in groups]), alone)


def test_what_a_packed_batch_holds(collator: Collator) -> None:
    rows = rows_of((3, 1, 2))
    batch = collator.packed(rows)
    assert "attention_mask" not in batch and batch["lengths"].tolist() == [3, 1, 2]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, *rows[0].input_ids[1:], -100, -100, rows[2].input_ids[1]]]
    assert positions(batch["labels"])[0].tolist() == [0, 1, 4]
    assert collator.packed(rows[:1])["lengths"].tolist() == [3]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_a_sample_does_not_see_its_neighbours(name: str, collator: Collator) -> None:
    model = model_of(name)
    apply(model, "layernorm-simple")
    lean(model)
    rows, others = rows_of(LENGTHS), rows_of(LENGTHS, seed=1)
    with torch.no_grad():
        losses = []
        for changed in ([], [0], [2], [3]):
            row = [others[n] if n in changed else row for n, row in enumerate(rows)]
            batch = collator.packed(row)
            inside = torch.zeros(sum(LENGTHS), dtype=torch.bool)
            inside[10:24] = True  # the third
            batch["labels"] = batch["labels"].where(inside, -100)
            losses.append(float(supervised_loss(model, batch)))
    assert losses[0] == losses[1] == losses[3] != losses[2]


def test_a_cache_would_let_samples_see_one_another(collator: Collator) -> None:
    """Why `step` gives use_cache=False: with it transformers does not look at packed positions, without a word."""
    model = model_of("llama")
    batch = collator.packed(rows_of((9, 14)))
    given = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        wanted = model(input_ids=given["input_ids"][:, 9:], use_cache=False).logits
        right, wrong = (model(**given, use_cache=cached).logits[:, 9:] for cached in (False, True))
    assert (right - wanted).norm() <= 1e-5 * wanted.norm() and (wrong - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("kind", ["llama", "mistral", "grouped", "gemma3_text"])
def test_packing_keeps_no_more_for_backward(kind: str) -> None:
    """Slope between 4 and 8 blocks, in units: packed as unpacked, with a sliding window as without."""
    config: dict[str, Any] = {"num_key_value_heads": 2 if kind == "grouped" else 8}
    config["model_type"] = "llama" if kind == "grouped" else kind
    if kind != "llama" and kind != "grouped":
        config["sliding_window"] = 20
    parts = torch.tensor([100, 28, 120, 8])
    assert int(parts.sum()) == B * S
    pos = torch.cat([torch.arange(int(n)) for n in parts])[None]
    sizes = {}
    for packed in (True, False):
        found = []
        for blocks in (4, 8):
            model = AutoModelForCausalLM.from_config(
                zoo.AutoConfig.for_model(**SIZES, **config, num_hidden_layers=blocks)
            )
            apply(model.bfloat16().train(), "layernorm-simple")
            lean(model)
            ids = torch.zeros(1, B * S, dtype=torch.long)
            with segments(parts if packed else None):
                found.append(saved_bytes(model, {"input_ids": ids, **({"position_ids": pos} if packed else {})}))
        sizes[packed] = (found[1] - found[0]) / 4 / (2 * B * S * H)
    assert sizes[True] <= sizes[False] * 1.002


def test_gradient_checkpointing_sees_the_samples_again(collator: Collator) -> None:
    model = model_of("mistral")
    apply(model, "layernorm-simple")
    lean(model)
    batch = collator.packed(rows_of(LENGTHS))
    wanted = outcome(model, [batch])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
    assert_same(outcome(model, [batch]), wanted)
    assert current() is None


# --- what a mask says


def block_mask(lengths: tuple[int, ...], window: int) -> torch.Tensor:
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.arange(len(owner))
    back = at[:, None] - at
    return ((owner[:, None] == owner) & (back >= 0) & (back < window))[None, None]


def test_the_window_is_read_from_the_mask() -> None:
    lengths = (6, 1, 9)
    padded = torch.tensor([*lengths, 0, 0])
    for window, found in ((99, ALL), (9, ALL), (8, 8), (3, 3), (1, 1)):
        mask = block_mask(lengths, window)
        assert find_window(mask, padded) == found
        bias = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
        assert find_window(bias, padded) == found
        assert find_window(bias.masked_fill(~mask, -1.0), padded) == MASKED  # a bias that hides nothing
    both_ways = block_mask(lengths, 99)
    both_ways[0, 0, 1, 3] = True
    hole = block_mask(lengths, 99)
    hole[0, 0, 5, 2] = False
    for mask in (both_ways, hole, block_mask((16,), 99), block_mask(lengths, 99).expand(2, -1, -1, -1)):
        assert find_window(mask, padded) == MASKED
    assert find_window(block_mask(lengths, 99), torch.tensor([6, 1])) == MASKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["causal", "window", "odd"])
def test_attention_by_samples_is_attention_with_the_whole_mask(kind: str, groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, total = (6, 1, 9), 16
    q, *kv = (torch.randn(1, h, total, 8, generator=generator).to(dtype) for h in (4, 4 // groups, 4 // groups))
    mask = block_mask(lengths, 4 if kind == "window" else 99)
    if kind == "odd":  # inside of samples as it likes
        mask &= (torch.rand(mask.shape, generator=generator) > 0.4) | torch.eye(total, dtype=torch.bool)
    results = []
    for parts in (torch.tensor([*lengths, 0]), None):
        leaves = [t.clone().requires_grad_() for t in (q, *kv)]
        out = LeanAttention.apply(*leaves, mask, False, 0.3, parts)
        out.square().sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * b.norm()


def test_lengths_that_do_not_fill_the_row() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="samples of 4 tokens in all in a row of 5"):
        attend(q, q, q, None, torch.tensor([3, 1]), True, None)


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 2, 0])], ids=["whole", "packed"])
@pytest.mark.parametrize("layout", ["projection", "slice", "dense"])
def test_the_operators_are_well_formed(layout: str, lengths: torch.Tensor | None) -> None:
    """Shapes, strides and side effects as the compiler is told."""
    q, k = (torch.randn(1, 5, heads, 24).transpose(1, 2) for heads in (4, 2))
    q, k = {
        "projection": (torch.randn(1, 5, 4, 8).transpose(1, 2), torch.randn(1, 5, 2, 8).transpose(1, 2)),
        "slice": (q[..., :8], k[..., 8:16]),
        "dense": (torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)),
    }[layout]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(attend, (q, k, k, None, lengths, True, None), test_utils=checks)
    out, logsumexp, window = attend(q, k, k, None, lengths, True, None)
    given = (out, q, k, k, out, logsumexp, None, lengths, window, True, None)
    torch.library.opcheck(attend_backward, given, test_utils=checks)


@pytest.mark.parametrize("kind", ["whole", "packed", "mask", "bias"])
def test_masks_and_bounds_of_the_gpus_kernels(kind: str) -> None:
    """What the kernels are given, checked on the CPU; that they run is checked on each GPU by `proved`."""
    q = torch.randn(2 if kind == "whole" else 1, 4, 5, 8)
    lengths = None if kind == "whole" else torch.tensor([3, 2, 0])
    ends, longest = attention_gpu.bounds(q, lengths)
    assert ends.tolist() == ([0, 5, 10] if kind == "whole" else [0, 3, 5, 5]) and ends.dtype == torch.int32
    assert longest == (5 if kind == "whole" else 3)
    seen = block_mask((5,) if kind == "whole" else (3, 2), 99)
    mask = {"mask": seen, "bias": torch.zeros(seen.shape).masked_fill_(~seen, -1e30)}.get(kind)
    bias = attention_gpu.bias(q, mask, lengths)
    assert bias.shape == (len(q), 4, 5, 5) and bias.stride(2) % 16 == 0
    assert torch.equal(bias == 0, seen.expand_as(bias))
    assert torch.equal(attention_gpu.unflat(attention_gpu.flat(q), len(q)), q)
    with pytest.raises(ValueError, match="in a row of"):
        attention_gpu.bounds(q, torch.tensor([3, 1]))


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_are_compared_with_torchs_before_they_are_used(device: str, dtype: torch.dtype) -> None:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention_gpu.proved(torch.device(device), dtype, trial)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [(lambda q, k, v, mask, lengths: q * v.sum() * k.sum(), "RuntimeError: another result"), (None, "TypeError")],
    ids=["other result", "raises"],
)
def test_kernels_that_differ_are_not_used(wrong: Any, cause: str) -> None:
    with pytest.warns(UserWarning, match=f"falls back to transformers' own on cpu: {cause}"):
        assert not attention_gpu.proved(torch.device("cpu"), torch.float32, wrong)


# --- which models, which micro-batches


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", None),
        ("llava", None),
        ("mamba", "its samples would see one another"),
        ("lfm2", "its samples would see one another"),
        ("bloom", "its samples would see one another"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_models_that_can_pack(name: str, reason: str | None, dtype: torch.dtype) -> None:
    model = zoo.model(name).to(dtype)
    lean(model)
    assert can_pack(model) == reason


def test_asking_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = zoo.model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert can_pack(model) is None
    assert torch.equal(torch.get_rng_state(), state) and current() is None
    assert [module.training for module in model.modules()] == before
    model.forward = lambda **inputs: 1 / 0
    assert can_pack(model) == "ZeroDivisionError: division by zero"
    assert [module.training for module in model.modules()] == before


def test_auto_packs_where_it_was_measured() -> None:
    assert prefers_packing(torch.device("cpu")) and prefers_packing(torch.device("cuda", 1))
    assert not prefers_packing(torch.device("mps")) and pack_length(torch.device("mps")) > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9), st.booleans(), st.integers(1, 60))
def test_micro_batches_hold_every_sample_once(lengths: list[int], size: int, packed: bool, room: int) -> None:
    rows = [Row([n] * length, [True] * length) for n, length in enumerate(lengths)]
    groups = micro_batches(rows, size, packed, room)
    assert sorted(row.input_ids[0] for group in groups for row in group) == list(range(len(rows)))
    assert groups == micro_batches(list(rows), size, packed, room)
    assert all(0 < len(group) <= size for group in groups)
    sums = [sum(map(len, group)) for group in groups]
    if not packed:
        assert len(groups) == -(-len(rows) // size)
        order = [len(row) for group in groups for row in group]
        assert order == sorted(order, reverse=True)  # the least padding
        return
    assert all(total <= room or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    full = [total for total, group in zip(sums, groups, strict=True) if len(group) < size]
    assert all(a + b > room for n, a in enumerate(full) for b in full[n + 1 :])  # no two would fit into one
