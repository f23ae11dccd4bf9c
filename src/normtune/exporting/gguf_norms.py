"""A norm adapter on the GGUF file of its LLM, quantized or not: only F32 tensors of norms change.

The file may hold other values than the base's gains: g + 1 where the norm computes with 1 + g, and scales that a
quantizer folded in. So the new value is the stored one times (o + tuned) / (o + base), o being 0 or 1: a factor that
was folded in stays. A bias is shifted by its change times that factor.

Where a gain stands is told by the `gguf` package's table of names, and where that does not know it, by its values. Not
here: the rule itself (gguf_rule.py), whether the base is the right one (gguf_base.py), the file's bytes
(gguf_files.py), connector and vision encoder (mmproj.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from normtune.adapter import Adapter
from normtune.adapter.loading import capture
from normtune.errors import InputError
from normtune.exporting.gguf_base import MARK, check_embedding, check_shape, refuse_twice
from normtune.exporting.gguf_files import fact, gguf_package, open_gguf, rewrite, tensors
from normtune.exporting.gguf_rule import ROUNDING, close, folded, ratio_rule
from normtune.layers import unwrapped
from normtune.strategy import LLM_GAINS, parameters
from normtune.structure import Anatomy, anatomy, formulas


@dataclass(frozen=True)
class Applied:
    """What was written.

    Attributes:
        changed: names of the file's tensors that got new values.
        scaled: of all norms, those whose stored values are not the base's: a scale was folded into them, and stays.
        deviation: of the embedding's values from the base's, relative; `limit` is what its type of number allows.
        sha256: of the adapter's tensors, written into the file's metadata.
    """

    changed: list[str]
    scaled: list[str]
    deviation: float | None
    limit: float | None
    sha256: str


@dataclass(frozen=True)
class Norm:
    """A norm of the LLM: names of its parameters, the number of its block, and o where its formula is known."""

    module: str
    stem: str  # the module's name within the LLM
    gain: str
    bias: str | None
    block: int | None
    offset: float | None


@dataclass(frozen=True)
class Found:
    """The file's tensors of a norm; they hold offset + gain, or that times factors that were folded in (`scaled`)."""

    gain: Any
    bias: Any | None
    offset: float
    scaled: bool = False


def apply_to_gguf(model: nn.Module, base: str | Path, target: str | Path) -> Applied:
    """Writes the GGUF file `base` with the tuned norms of `model` to the file `target`.

    Connector and vision norms of the adapter are left out: they belong into llama.cpp's second file (`write_mmproj`).
    Where no norm of the LLM was tuned the base is checked and nothing is written.

    Raises:
        InputError: something of the LLM was tuned that is no norm (embedding, head, LoRA, projections), or a file that
            cannot be read, that has an adapter in it already, or that is of another base.
        JobError: the disk is full.
    """
    model, base = unwrapped(model), Path(base)
    adapter, found = capture(model), anatomy(model)
    tuned = llm_norms(model, adapter, found)
    reader = open_gguf(base)
    refuse_twice(reader, base)
    check_shape(reader, base, model, found)
    deviation, limit = check_embedding(reader, base, model, adapter, found)
    norms = describe(model, found)
    places = place_all(reader, base, norms, adapter)
    scaled = [n.gain for n in norms if places[n.module].scaled]
    if scaled and deviation is None:
        raise InputError(
            f"{base} is of another base than the adapter: first {scaled[0]} differs, and the adapter holds no "
            "values of its base's embedding to tell by;\ngive the GGUF file of the base"
        )
    refuse_merged(base, norms, places, adapter, tuned)
    values: dict[str, np.ndarray] = {}
    for norm in norms:
        values |= new_values(norm, places[norm.module], adapter, tuned, base)
    sha256 = adapter_hash(adapter)
    if values:
        facts = {MARK: sha256, "normtune.adapter.strategy": str(adapter.record.get("strategy"))}
        rewrite(reader, Path(target), values, facts)
    return Applied(list(values), scaled, deviation, limit, sha256)


def adapter_hash(adapter: Adapter) -> str:
    """SHA-256 over the names and fp32 values of the adapter's tensors, in hex."""
    digest = hashlib.sha256()
    for name in sorted(adapter.tensors):
        digest.update(name.encode() + b"\0" + adapter.tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def llm_norms(model: nn.Module, adapter: Adapter, found: Anatomy) -> set[str]:
    """Names of the tuned gains and biases of the LLM's norms.

    Raises:
        InputError: something was tuned that is neither such, nor of the connector or the vision encoder.
    """
    if adapter.lora is not None:
        raise InputError(
            "the adapter holds LoRA, and a GGUF file takes norms only;\n"
            "export --format transformers, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    own = {p: n for n, p in parameters(model).items()}
    parts = {
        part: {own[p] for p in found.parameters(model, part) if p in own} for part in ("connector", "embed", "head")
    }
    norms = {own[p] for part in LLM_GAINS for p in found.parameters(model, part) if p in own}
    beside = parts["connector"] | {n for n in adapter.tensors if any(n.startswith(f"{root}.") for root in found.vision)}
    for name in adapter.tensors:
        if name not in norms and name not in beside:
            what = next(
                (f"the {part}" for part in ("embed", "head") if name in parts[part]), "other weights of the LLM"
            )
            what = {"the embed": "the embedding"}.get(what, what)
            raise InputError(
                f"the adapter holds {what} ({name}), and a GGUF file takes norms only;\n"
                "export --format transformers, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
            )
    return norms & adapter.tensors.keys()


def describe(model: nn.Module, found: Anatomy) -> list[Norm]:
    """The LLM's norms in the order of the network."""
    modules = [*found.norms, *found.qk_norms, *found.final_norm]
    kinds = formulas(model, modules)
    norms = []
    for module in modules:
        names = [name for name, _ in model.get_submodule(module).named_parameters(recurse=False)]
        block = next((i for i, root in enumerate(found.blocks) if module.startswith(f"{root}.")), None)
        kind = kinds[module].kind
        offset = None if kind == "own" else float("1+g" in kind)
        full = [f"{module}.{name}" for name in names]
        norms.append(
            Norm(
                module, module.removeprefix(f"{found.llm}."), full[0], full[1] if len(full) > 1 else None, block, offset
            )
        )
    return norms


def place_all(reader: Any, base: Path, norms: Iterable[Norm], adapter: Adapter) -> dict[str, Found]:
    """The file's tensors of each norm, by module. Raises InputError where one is missing or cannot be told."""
    table, there = name_table(reader), tensors(reader)
    result: dict[str, Found] = {}
    for norm in norms:
        values = adapter.base[norm.gain].double().numpy().reshape(-1)
        inside = "" if norm.block is None else f"blk.{norm.block}."
        fits = [
            name
            for name, tensor in there.items()
            if name.endswith(".weight")
            and tensor.n_elements == values.size
            and (name.startswith(inside) if inside else not name.startswith("blk."))
        ]
        equal = [name for name in fits if held_offset(there[name], values, norm.offset) is not None]
        named = [name for name in fits if name in by_name(table, norm.stem)]
        chosen = equal if not named or (len(equal) == 1 and named[0] not in equal) else named
        if len(chosen) != 1:
            raise InputError(
                f"{base}: no place for {norm.gain} ({len(chosen)} of its tensors fit by name or value);\n"
                "give the GGUF file of the base, or export --format transformers and convert that"
            )
        gain = there[chosen[0]]
        bias = there.get(gain.name.removesuffix("weight") + "bias") if norm.bias else None
        if not is_f32(gain) or (norm.bias and (bias is None or not is_f32(bias))):
            raise InputError(f"{base}: {gain.name} (or its bias) is not there in F32; convert the base again")
        result[norm.module] = understood(norm, gain, bias, values, base)
    return result


def name_table(reader: Any) -> dict[str, str]:
    """The `gguf` package's table for the file's architecture: name of a module in transformers -> of a tensor."""
    gguf = gguf_package()
    architecture = fact(reader, "general.architecture")
    known = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        return {}
    table = gguf.get_tensor_name_map(known, int(fact(reader, f"{architecture}.block_count"))).mapping
    return {key: name for key, (_, name) in table.items()}


def by_name(table: dict[str, str], stem: str) -> set[str]:
    """Tensors that the table gives a module whose name within the LLM is `stem`, whatever the LLM's own name is."""
    for key in (f"model.{stem}", stem):
        if key in table:
            return {f"{table[key]}.weight"}
    return {f"{name}.weight" for key, name in table.items() if key.endswith(f".{stem}")}


def is_f32(tensor: Any) -> bool:
    return bool(tensor.tensor_type.name == "F32")


def stored(tensor: Any) -> np.ndarray:
    """An F32 tensor of the file, fp64, one dimension."""
    return np.asarray(tensor.data, dtype=np.float64).reshape(-1)


def held_offset(tensor: Any, base: np.ndarray, offset: float | None) -> float | None:
    """o for which the file holds o + base, up to rounding of the base's copy; None where it holds something else."""
    if not is_f32(tensor):
        return None
    for one in (0.0, 1.0) if offset is None else dict.fromkeys((offset, 0.0)):
        if close(stored(tensor), base, one):
            return one
    return None


def understood(norm: Norm, gain: Any, bias: Any | None, base: np.ndarray, path: Path) -> Found:
    """What the file's tensors of a norm hold. Raises InputError where that is nothing of this base."""
    offset = held_offset(gain, base, norm.offset)
    if offset is not None:
        return Found(gain, bias, offset)
    if norm.offset is None:
        raise InputError(
            f"{path}: {gain.name} differs from {norm.gain}, and the norm's formula is unknown;\n"
            "give the GGUF file of the base"
        )
    values, effective = stored(gain), norm.offset + base
    moved = bool(((effective == 0) & (values != 0)).any()) or not np.isfinite(values).all()
    if moved or close(np.sort(values), np.sort(effective), 0.0):
        raise InputError(
            f"{path}: {gain.name} holds the values of {norm.gain} in another order, or other ones where those are 0;\n"
            "give the GGUF file of the base, or export --format transformers and convert that"
        )
    return Found(gain, bias, norm.offset, scaled=True)


def refuse_merged(
    path: Path, norms: Sequence[Norm], places: dict[str, Found], adapter: Adapter, tuned: Container[str]
) -> None:
    """Raises InputError where every tuned gain and bias of the file is the tuned one already, without the mark.

    That is so up to what bf16 rounds, where a tensor is too far from the base's for that; else exactly.
    """
    apart, exact, equal = False, False, True
    for norm in norms:
        place = places[norm.module]
        for name, tensor, offset in ((norm.gain, place.gain, place.offset), (norm.bias, place.bias, 0.0)):
            if name is None or name not in tuned:
                continue
            values, base, new = stored(tensor), values_of(adapter.base, name), values_of(adapter.tensors, name)
            if not close(values, new, offset):
                return
            apart |= not close(values, base, offset)
            exact |= not np.allclose(new, base, rtol=1e-6)
            equal &= np.allclose(values, offset + new, rtol=1e-6)
    if apart or (exact and equal):
        raise InputError(
            f"{path} holds the tuned gains already: it was converted from the merged model, and can be used"
        )


def values_of(side: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """A tensor of the adapter, fp64, one dimension."""
    return side[name].double().numpy().reshape(-1)  # type: ignore[no-any-return]


def new_values(norm: Norm, place: Found, adapter: Adapter, tuned: Container[str], path: Path) -> dict[str, np.ndarray]:
    """Tensors of the file -> new values, fp32, of what was tuned of a norm."""
    base = values_of(adapter.base, norm.gain)
    result = {}
    if norm.gain in tuned:
        try:
            new = values_of(adapter.tensors, norm.gain)
            result[place.gain.name] = ratio_rule(stored(place.gain), base, new, place.offset)
        except ZeroDivisionError:
            raise InputError(
                f"{path}: {place.gain.name} holds scaled gains, and a gain that is 0 in the base was tuned:\n"
                "its scale is unknown; give a GGUF file without folded scales"
            ) from None
    if norm.bias is not None and norm.bias in tuned:
        before, after = values_of(adapter.base, norm.bias), values_of(adapter.tensors, norm.bias)
        factor, held = folded(stored(place.gain), base, place.offset), stored(place.bias)
        if not (np.abs(held - factor * before) <= 2 * ROUNDING * np.abs(factor * before) + 1e-6).all():
            raise InputError(
                f"{path}: {place.bias.name} holds other values than {norm.bias}, also with the scale of its gain;\n"  # type: ignore[union-attr]
                "give the GGUF file of the base"
            )
        result[place.bias.name] = (held + factor * (after - before)).astype(np.float32)  # type: ignore[union-attr]
    return result
