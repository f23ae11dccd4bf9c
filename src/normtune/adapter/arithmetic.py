"""`Adapter`: trained tensors and the base's gains, in memory; read, written, scaled, added, interpolated, compared.

What training did to a gain is its change, tuned - base, since an adapter holds the base's gains. Scaling multiplies
changes, adding adds them (task vectors: Ilharco et al., arXiv 2212.04089), interpolation mixes values. Tensors whose
base an adapter does not hold (connector, embedding, head, ...) have no change: each operation says what it does with
them. All of it in fp64, stored as fp32. Not here: files (files.py), models (loading.py).
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from normtune.adapter.files import BASE, FORMAT, Lora, read_adapter, read_lora, write_adapter
from normtune.errors import InputError
from normtune.runlog import provenance

Tensors = dict[str, torch.Tensor]
KEPT = ("strategy", "parts", "base", "dtype", "gate")  # what an adapter made of others takes over from the first one


@dataclass(frozen=True)
class Difference:
    """How one tensor of two adapters differs; None where there is nothing to compare.

    Attributes:
        largest: max |a - b|.
        relative: |a - b| / |a|, Euclidean norms.
        cosine: of the changes a - base and b - base, of a gain that both adapters changed.
    """

    name: str
    largest: float | None
    relative: float | None
    cosine: float | None


@dataclass(frozen=True)
class Adapter:
    """The trained tensors of a model, with the identity of the base that they belong to.

    Attributes:
        tensors: name of the model's parameter -> trained values, fp32 on the CPU.
        base: name of a norm's gain or bias -> the base's own values, fp32 on the CPU; of every norm of the LLM,
            trained or not. `NAME#64` -> 64 values spread over a large tensor of the base.
        record: what `adapter.json` holds.
        lora: LoRA matrices, where there are any; arithmetic refuses them.
    """

    tensors: Tensors
    base: Tensors = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=lambda: {"format": FORMAT})
    lora: Lora | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Adapter:
        """An adapter folder.

        Raises:
            InputError: missing or damaged files, or a format of a newer version.
        """
        stored, record = read_adapter(folder)
        tensors = {n: t.float() for n, t in stored.items() if not n.startswith(BASE)}
        base = {n.removeprefix(BASE): t.float() for n, t in stored.items() if n.startswith(BASE)}
        number = sum(tensor.numel() for tensor in tensors.values())
        if "parameters" in record and (number != record["parameters"] or not base):
            raise InputError(
                f"{folder} is incomplete: {number} values, {record.get('parameters')} in its record, {len(base)} "
                "tensors of its base; copy the adapter again"
            )
        odd = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if odd:
            raise InputError(f"{folder}: {odd[0]} holds values that are not finite; train or copy it again")
        return cls(tensors, base, record, read_lora(Path(folder) / "lora") if record.get("lora") else None)

    def write(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Writes the folder, whole or not at all; returns its path.

        Raises:
            InputError: the folder exists and is not empty (unless `replace`).
            JobError: the disk is full.
        """
        stored = {**self.tensors, **{BASE + name: tensor for name, tensor in self.base.items()}}
        return write_adapter(Path(folder), stored, self.record, self.lora, replace)

    def scale(self, factor: float, *, keep_rest: bool = False) -> Adapter:
        """base + factor * change: 0 is the base, 1 this adapter, above 1 exaggerates.

        Raises:
            InputError: LoRA, a factor that is not finite, or tensors without a base here (unless `keep_rest`, which
                keeps them as they are).
        """
        refuse_lora("scale", self)
        if not math.isfinite(factor):
            raise InputError(f"an adapter cannot be scaled by {factor}; give a finite number")
        rest = [name for name in self.tensors if name not in self.base]
        if rest and not keep_rest:
            raise InputError(
                f"{len(rest)} tensors of the adapter have no base in it, so that their change is unknown: first "
                f"{rest[0]};\nkeep_rest=True scales the gains and keeps those as they are"
            )
        scaled = {
            name: mix(self.base[name], tensor, factor) if name in self.base else tensor
            for name, tensor in self.tensors.items()
        }
        return Adapter(scaled, self.base, made_of(f"scale {factor:g}", scaled, self))

    def add(self, other: Adapter) -> Adapter:
        """base + both changes. Tensors without a base are taken where one adapter has them, or both the same.

        Raises:
            InputError: LoRA, two bases, or a tensor without a base that differs.
        """
        refuse_lora("add", self, other)
        check_same_base(self, other)
        total = {**other.tensors, **self.tensors}
        for name in self.tensors.keys() & other.tensors.keys():
            if name in self.base and name in other.base:
                both = self.tensors[name].double() + other.tensors[name].double()
                total[name] = (both - other.base[name].double()).float()
            elif not same(self.tensors[name], other.tensors[name]):
                raise InputError(
                    f"both adapters hold {name} with different values and without its base, so that the changes "
                    "cannot be added;\ninterpolate mixes them"
                )
        return Adapter(total, {**other.base, **self.base}, made_of("add", total, self, other))

    __add__ = add

    def interpolate(self, other: Adapter, share: float, *, keep_rest: bool = False) -> Adapter:
        """(1 - share) * self + share * other, value by value; a gain that one of them leaves alone has its base's.

        Raises:
            InputError: LoRA, two bases, a share outside 0 to 1, or a tensor without a base that only one adapter has
                (unless `keep_rest`, which keeps it as it is).
        """
        refuse_lora("interpolate", self, other)
        if not 0 <= share <= 1:
            raise InputError(f"cannot interpolate with share {share}; give 0 (the first) to 1 (the other)")
        check_same_base(self, other)
        first, second = self.beside(other), other.beside(self)
        mixed = {}
        for name in {**self.tensors, **other.tensors}:
            alone = [side[name] for side in (first, second) if name in side]
            if len(alone) == 1 and not keep_rest:
                raise InputError(
                    f"only one of the adapters holds {name}, and its base is unknown, so that it cannot be mixed;\n"
                    "keep_rest (--keep-rest) keeps such tensors as they are"
                )
            mixed[name] = alone[0] if len(alone) == 1 else mix(first[name], second[name], share)
        return Adapter(mixed, {**other.base, **self.base}, made_of(f"interpolate {share:g}", mixed, self, other))

    def beside(self, other: Adapter) -> Tensors:
        """Its values, next to those of an adapter of the same base: where it leaves a tensor alone, the base's.

        Of a vision encoder's norms an adapter holds the base's values only where it trained them.
        """
        return {**other.base, **self.base, **self.tensors}

    def diff(self, other: Adapter) -> list[Difference]:
        """One row per tensor of either adapter, in the order of the names.

        Raises:
            InputError: LoRA, or two bases.
        """
        refuse_lora("compare", self, other)
        check_same_base(self, other)
        first, second = self.beside(other), other.beside(self)
        rows = []
        for name in sorted({**self.tensors, **other.tensors}):
            if name not in first or name not in second:
                rows.append(Difference(name, None, None, None))
                continue
            a, b = first[name].double(), second[name].double()
            rows.append(
                Difference(
                    name,
                    largest=float((a - b).abs().max()),
                    relative=ratio(float((a - b).norm()), float(a.norm())),
                    cosine=cosine(a - self.base[name], b - other.base[name])
                    if name in self.base and name in other.base
                    else None,
                )
            )
        return rows


def mix(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """(1 - share) a + share b; exactly a at 0 and b at 1."""
    return ((1 - share) * a.double() + share * b.double()).float()


def ratio(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole else math.inf


def cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    lengths = float(a.norm()) * float(b.norm())
    return float((a * b).sum()) / lengths if lengths else None


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fp32 tensors are different and neither is the other one rounded to bf16 or fp16."""
    rounded = (torch.bfloat16, torch.float16)
    return not (same(a, b) or any(same(a.to(d).float(), b) or same(a, b.to(d).float()) for d in rounded))


def refuse_lora(verb: str, *adapters: Adapter) -> None:
    if any(adapter.lora is not None for adapter in adapters):
        raise InputError(
            f"cannot {verb} an adapter with LoRA inside: its change is a product of matrices;\n"
            "merge it into the model (normtune.merge), or train without the lora part"
        )


def check_same_base(a: Adapter, b: Adapter) -> None:
    """Raises InputError, naming the first gain, where two adapters belong to different bases."""
    if not a.base.keys() & b.base.keys():
        raise InputError(
            "one of the adapters holds no gains of its base, so that nobody knows whether they belong together;\n"
            "load it into its base (normtune.load_adapter) and save it from there"
        )
    wrong = other_base(a.base, b.base, {**a.tensors, **b.tensors})
    if wrong is not None:
        raise InputError(f"the adapters belong to different bases: first {shown(wrong)}; give adapters of one base")
    for name in a.tensors.keys() & b.tensors.keys():
        if a.tensors[name].shape != b.tensors[name].shape:
            shapes = f"{tuple(a.tensors[name].shape)} and {tuple(b.tensors[name].shape)}"
            raise InputError(f"the adapters belong to different models: {name} is {shapes}; give adapters of one base")


def other_base(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], trained: Container[str]) -> str | None:
    """The first gain that tells two bases apart, if any; a bf16 or fp16 copy of a base is the same base.

    Adapters hold the gains of all norms of the LLM, but of those of the vision encoder only what was trained.
    """
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            if name not in trained and "#" not in name:  # a quantized base has no such values
                return name
        elif far(a[name], b[name]):
            return name
    return None


def shown(name: str) -> str:
    """A name that `other_base` gives, for a message."""
    return name.replace("#64", " (64 values of it)")


def made_of(how: str, tensors: Tensors, *adapters: Adapter) -> dict[str, Any]:
    """The record of an adapter that arithmetic made: scores and recipes of its sources are not its own.

    Raises:
        InputError: values that float32 cannot hold.
    """
    large = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if large is not None:
        raise InputError(f"{how}: {large} gets values that float32 cannot hold; give smaller numbers")
    first = adapters[0].record
    records = [adapter.record for adapter in adapters]
    sources = [{key: r[key] for key in ("strategy", "recipe", "made") if r.get(key)} for r in records]
    return {
        "format": FORMAT,
        **{key: first.get(key) for key in KEPT},
        "parts": list(dict.fromkeys(part for r in records for part in r.get("parts") or [])),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "lora": None,
        "made": {"how": how, "of": sources},
        "provenance": provenance(),
    }


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float], *, keep_rest: bool = False) -> Adapter:
    """base + sum of weight * change over several adapters of one base; a gain that one leaves alone has none there.

    Tensors without a base here (connector, embedding, head, ...) have no change to weigh. Where all adapters hold the
    same values they stay; where the weights sum to 1 and all hold the tensor, its values are averaged by the weights.

    Raises:
        InputError: LoRA, two bases, fewer than one adapter, as many weights as there are not adapters, a weight that is
            not finite, or tensors without a base in any other case (unless `keep_rest`: the first adapter's stay).
    """
    if not adapters or len(adapters) != len(weights):
        raise InputError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each adapter")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"adapters cannot be weighted by {', '.join(f'{w:g}' for w in weights)}; give finite numbers")
    refuse_lora("add", *adapters)
    for other in adapters[1:]:
        check_same_base(adapters[0], other)
    base = {name: tensor for adapter in reversed(adapters) for name, tensor in adapter.base.items()}
    total: Tensors = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.tensors):
        held = [adapter.tensors[name] for adapter in adapters if name in adapter.tensors]
        whole = len(held) == len(adapters)
        if name in base:
            pairs = [(w, a) for w, a in zip(weights, adapters, strict=True) if name in a.tensors]
            change = [w * (a.tensors[name].double() - a.base.get(name, base[name]).double()) for w, a in pairs]
            total[name] = (base[name].double() + torch.stack(change).sum(0)).float()
        elif whole and all(same(held[0], one) for one in held):
            total[name] = held[0]
        elif whole and abs(sum(weights) - 1) < 1e-6:
            parts = [w * one.double() for w, one in zip(weights, held, strict=True)]
            total[name] = torch.stack(parts).sum(0).float()
        elif keep_rest:
            total[name] = held[0]
        else:
            why = f"the weights sum to {sum(weights):g}, not 1" if whole else "not all adapters hold it"
            raise InputError(
                f"{name} has no base in the adapters, and {why}, so that it cannot be weighed;\n"
                "keep_rest (--keep-rest) keeps the first adapter's"
            )
    how = "sum " + " ".join(f"{weight:g}" for weight in weights)
    return Adapter(total, base, made_of(how, total, *adapters))
