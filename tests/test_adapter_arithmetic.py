"""Arithmetic of adapters: its laws on random tensors, what it refuses, and that a model agrees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.adapter import Adapter, load_adapter, save_adapter, weighted_sum
from normtune.adapter.files import Lora
from normtune.errors import InputError
from normtune.strategy import apply
from stubs import inputs, llava
from test_strategy import train_steps

NAMES = ("blocks.0.norm.weight", "blocks.0.norm.bias", "norm.weight")
values = st.floats(-1e4, 1e4, width=32)
law = settings(max_examples=50, deadline=None)
vectors = st.lists(values, min_size=3, max_size=3).map(torch.tensor)
BASE = {name: torch.tensor([1.0, 0.5, -2.0]) for name in NAMES}


@st.composite
def adapters(draw: Any) -> Adapter:
    """Some of three gains trained, all of one base."""
    names = draw(st.sets(st.sampled_from(NAMES), min_size=1))
    return Adapter({name: draw(vectors) for name in sorted(names)}, BASE)


def equal(a: Adapter, b: Adapter, near: float = 0.0) -> bool:
    """Whether two adapters give the same gains; one that an adapter leaves alone has its base's."""
    for name in BASE:
        x, y = a.tensors.get(name, BASE[name]), b.tensors.get(name, BASE[name])
        if not torch.allclose(x, y, rtol=near, atol=near):
            return False
    return True


@law
@given(adapters())
def test_scaled_by_1_is_itself_and_by_0_the_base(a: Adapter) -> None:
    assert equal(a.scale(1), a) and equal(a.scale(0), Adapter({}, BASE))


@law
@given(adapters(), st.floats(-4, 4), st.floats(-4, 4))
def test_scaling_twice_multiplies(a: Adapter, first: float, second: float) -> None:
    for name, tensor in a.scale(first).scale(second).tensors.items():
        wanted = BASE[name].double() + first * second * (a.tensors[name] - BASE[name].double())
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=0.02)  # fp32 in between


@law
@given(adapters(), adapters())
def test_adding_knows_no_order(a: Adapter, b: Adapter) -> None:
    assert equal(a + b, b + a)


@law
@given(adapters(), adapters(), adapters())
def test_adding_knows_no_brackets(a: Adapter, b: Adapter, c: Adapter) -> None:
    assert equal((a + b) + c, a + (b + c), near=0.01)


@law
@given(adapters())
def test_adding_its_opposite_gives_the_base(a: Adapter) -> None:
    assert equal(a + a.scale(-1), Adapter({}, BASE), near=0.01)
    assert equal(a + a.scale(0), a, near=1e-7)


@law
@given(adapters(), adapters(), st.floats(0, 1))
def test_interpolation(a: Adapter, b: Adapter, share: float) -> None:
    assert equal(a.interpolate(b, 0), a) and equal(a.interpolate(b, 1), b)
    assert equal(a.interpolate(a, share), a, near=1e-6)
    middle = a.interpolate(b, share)
    for name, tensor in middle.tensors.items():
        x, y = a.tensors.get(name, BASE[name]), b.tensors.get(name, BASE[name])
        torch.testing.assert_close(tensor, torch.lerp(x, y, share), rtol=1e-5, atol=0.02)
    assert middle.tensors.keys() == a.tensors.keys() | b.tensors.keys()


@law
@given(adapters(), adapters())
def test_diff(a: Adapter, b: Adapter) -> None:
    assert all(row.largest == row.relative == 0 for row in a.diff(a))
    rows = a.diff(b)
    assert [row.name for row in rows] == sorted(a.tensors.keys() | b.tensors.keys())
    for row in rows:
        x, y = (side.tensors.get(row.name, BASE[row.name]).double() for side in (a, b))
        assert row.largest == float((x - y).abs().max())
        assert row.relative == pytest.approx(float((x - y).norm() / x.norm()) if x.any() else math.inf) or x.equal(y)
        assert row.cosine is None or -1.001 <= row.cosine <= 1.001


def test_diff_of_a_change_and_its_double() -> None:
    a = Adapter({"norm.weight": BASE["norm.weight"] + torch.tensor([0.5, 0.0, 0.25])}, BASE)
    (row,) = a.diff(a.scale(2))
    assert row.largest == 0.5 and row.cosine == pytest.approx(1)
    assert a.diff(a.scale(-1))[0].cosine == pytest.approx(-1)
    assert a.diff(a.scale(0))[0].cosine is None  # nothing changed: no direction


@settings(max_examples=20, deadline=None)
@given(adapters(), st.dictionaries(st.text("abc._é ", min_size=1), st.text()))
def test_written_and_read(tmp_path_factory: pytest.TempPathFactory, a: Adapter, facts: dict[str, str]) -> None:
    written = Adapter(a.tensors, a.base, {**a.record, "facts": facts})
    read = Adapter.read(written.write(tmp_path_factory.mktemp("adapter") / "a"))
    assert read.record == written.record and read.lora is None
    for stored, given_ in ((read.tensors, a.tensors), (read.base, a.base)):
        assert stored.keys() == given_.keys() and all(torch.equal(stored[n], given_[n]) for n in given_)


GAIN = {"norm.weight": torch.ones(3)}
CONNECTOR = {"connector.weight": torch.eye(3)}
OTHER = {**BASE, "norm.weight": torch.tensor([9.0, 0.5, -2.0])}
BOTH = Adapter({**GAIN, **CONNECTOR}, BASE)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda: BOTH.scale(0.5), r"(?s)1 tensors.*connector\.weight.*keep_rest=True"),
        (lambda: BOTH.scale(math.nan), "finite"),
        (lambda: Adapter(GAIN, BASE) + Adapter(GAIN, OTHER), r"different bases: first norm\.weight"),
        (lambda: Adapter(GAIN, BASE).interpolate(Adapter(GAIN, OTHER), 0.5), r"different bases: first norm\.weight"),
        (
            lambda: Adapter(GAIN, {**BASE, "a#64": torch.ones(64)}) + Adapter(GAIN, {**BASE, "a#64": torch.zeros(64)}),
            r"first a \(64 values of it\)",
        ),
        (lambda: Adapter(GAIN, BASE).diff(Adapter(GAIN, OTHER)), r"different bases: first norm\.weight"),
        (lambda: Adapter(GAIN, BASE) + Adapter(GAIN, {**BASE, "more.weight": torch.ones(3)}), r"first more\.weight"),
        (lambda: Adapter(GAIN, BASE) + Adapter(GAIN), "holds no gains of its base"),
        (lambda: BOTH + Adapter({"connector.weight": torch.zeros(3, 3)}, BASE), r"(?s)connector\.weight.*interpolate"),
        (lambda: BOTH.interpolate(Adapter(GAIN, BASE), 0.5), r"(?s)only one.*connector\.weight.*keep_rest"),
        (lambda: BOTH.interpolate(Adapter({"connector.weight": torch.eye(2)}, BASE), 0.5), r"\(3, 3\) and \(2, 2\)"),
        (lambda: BOTH.interpolate(BOTH, 50), "share 50"),
        (lambda: Adapter(GAIN, BASE, lora=Lora({}, {})).scale(2), r"(?s)LoRA inside.*merge"),
        (lambda: Adapter(GAIN, BASE) + Adapter(GAIN, BASE, lora=Lora({}, {})), "LoRA inside"),
    ],
    ids=[
        *(
            "scale without base",
            "scale nan",
            "add bases",
            "interpolate bases",
            "add values",
            "diff bases",
            "add layers",
        ),
        *("add no base", "add two connectors", "interpolate one connector", "shapes", "share", "lora", "add lora"),
    ],
)
def test_refused(operation: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        operation()
    assert len(str(error.value).splitlines()) <= 3


def test_tensors_without_a_base() -> None:
    kept = BOTH.scale(2, keep_rest=True)
    assert torch.equal(kept.tensors["connector.weight"], torch.eye(3))
    assert torch.equal(kept.tensors["norm.weight"], torch.tensor([1.0, 1.5, 4.0]))
    assert torch.equal((BOTH + Adapter(GAIN, BASE)).tensors["connector.weight"], torch.eye(3))  # one has it
    assert torch.equal((BOTH + BOTH).tensors["connector.weight"], torch.eye(3))  # both the same
    zero = Adapter({"connector.weight": torch.zeros(3, 3)}, BASE)
    assert torch.equal(BOTH.interpolate(zero, 0.75).tensors["connector.weight"], torch.eye(3) / 4)
    alone = BOTH.interpolate(Adapter(GAIN, BASE), 0.5, keep_rest=True)
    assert torch.equal(alone.tensors["connector.weight"], torch.eye(3))
    assert [row.largest for row in BOTH.diff(Adapter(GAIN, BASE))] == [None, 0.0]


def test_norms_whose_base_only_one_adapter_holds() -> None:
    """Those of a vision encoder: an adapter that leaves them alone does not hold their base, and has its values."""
    vision = {"vision.norm.weight": torch.tensor([3.0, 4.0])}
    seeing = Adapter({**GAIN, "vision.norm.weight": torch.tensor([5.0, 4.0])}, {**BASE, **vision})
    for mixed in (seeing.interpolate(Adapter(GAIN, BASE), 0.75), Adapter(GAIN, BASE).interpolate(seeing, 0.25)):
        assert torch.equal(mixed.tensors["vision.norm.weight"], torch.tensor([3.5, 4.0]))
        assert torch.equal(mixed.base["vision.norm.weight"], vision["vision.norm.weight"])
    assert [row.largest for row in Adapter(GAIN, BASE).diff(seeing)] == [0.0, 2.0]
    half = weighted_sum([Adapter(GAIN, BASE), seeing], [0.75, 0.25])
    assert torch.equal(half.tensors["vision.norm.weight"], torch.tensor([3.5, 4.0]))


def test_values_that_float32_cannot_hold_are_refused() -> None:
    """They would be written, and no reader would take them."""
    both = (Adapter(GAIN, BASE), Adapter(GAIN, BASE))
    for operation in (lambda: both[0].scale(1e39), lambda: weighted_sum(both, [1e39, 1])):
        with pytest.raises(InputError, match=r"norm\.weight gets values that float32 cannot hold"):
            operation()


def test_record_says_what_it_was_made_of(tmp_path: Path) -> None:
    record = {"format": 1, "strategy": "layernorm-simple", "parts": ["norms"], "recipe": "abc", "scores": {"pope": 1}}
    a, b = (Adapter(GAIN, BASE, {**record, "recipe": recipe}) for recipe in ("abc", "def"))
    made = Adapter.read((a.scale(0.5) + b).write(tmp_path / "sum")).record
    assert made["parts"] == ["norms"] and made["parameters"] == 3 and "scores" not in made
    assert made["made"]["how"] == "add" and [s.get("recipe") for s in made["made"]["of"]] == [None, "def"]
    assert made["made"]["of"][0]["made"]["how"] == "scale 0.5"


def test_the_model_agrees(tmp_path: Path) -> None:
    """Two trainings of one base, added and halved: the loaded gains are the sum by hand, the logits at 0 the base's."""
    folders = []
    for part, rate in (("norms", 1e-2), ("final_norm", 2e-2)):
        model = llava()
        apply(model, [part])
        train_steps(model, 2, rate)
        folders.append(save_adapter(model, tmp_path / part))
    a, b = map(Adapter.read, folders)
    base = dict(llava().named_parameters())
    other = llava()
    load_adapter(other, (a.scale(0.5) + b).write(tmp_path / "sum"))
    for name, parameter in other.named_parameters():
        change = sum(f * (s.tensors[name] - base[name]) for f, s in ((0.5, a), (1, b)) if name in s.tensors)
        torch.testing.assert_close(parameter, base[name] + change, rtol=0, atol=1e-7)
    with torch.no_grad():
        wanted = llava()(**inputs(llava())).logits
        load_adapter(other, a.scale(0).write(tmp_path / "zero"))
        assert torch.equal(other(**inputs(other)).logits, wanted)
