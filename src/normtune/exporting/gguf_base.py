"""Whether a GGUF file is of the base that an adapter was trained on, whatever its numbers were rounded to.

By the number and width of the blocks, and by 64 values of the embedding that each adapter holds (`NAME#64`), against
the file's dequantized rows. A finetune that left the embedding alone cannot be told by that: its gains tell, where they
are stored as they are (gguf_norms.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from normtune.adapter import Adapter
from normtune.errors import InputError
from normtune.exporting.gguf_files import fact, gguf_package, tensors
from normtune.strategy.state import SAMPLE
from normtune.structure import Anatomy

MARK = "normtune.adapter.sha256"
FEWEST = 16  # values of the embedding that must be there to tell a base by


def refuse_twice(reader: Any, base: Path) -> None:
    if fact(reader, MARK) is not None:
        raise InputError(
            f"{base} has an adapter in it already ({fact(reader, MARK)[:12]}...); applied twice it would count twice:\n"
            "give the GGUF file of the base"
        )


def check_shape(reader: Any, base: Path, model: nn.Module, found: Anatomy) -> None:
    """Raises InputError where the file has another number of blocks or another width than the model."""
    architecture = fact(reader, "general.architecture")
    blocks = fact(reader, f"{architecture}.block_count")
    width = model.get_parameter(f"{found.embed[0]}.weight").shape[-1]
    embedding = tensors(reader).get("token_embd.weight")
    if embedding is None or blocks is None:
        raise InputError(f"{base} is no LLM's GGUF file (architecture {architecture!r}, no embedding); give the LLM's")
    if blocks != len(found.blocks) or int(embedding.shape[0]) != width:
        raise InputError(
            f"{base} is of another base: {blocks} blocks of width {int(embedding.shape[0])}, the adapter's has "
            f"{len(found.blocks)} of width {width}"
        )


def check_embedding(
    reader: Any, base: Path, model: nn.Module, adapter: Adapter, found: Anatomy
) -> tuple[float | None, float | None]:
    """(deviation of the file's embedding from the base's, what its type allows); both relative, |a - b| / |b|.

    Raises:
        InputError: another base.
    """
    gguf = gguf_package()
    name = f"{found.embed[0]}.weight"
    held = adapter.base.get(f"{name}#64")
    if held is None:
        return None, None
    shape, tensor = model.get_parameter(name).shape, tensors(reader)["token_embd.weight"]
    pairs = []
    for position, value in zip(positions(shape.numel()), held.tolist(), strict=True):
        row, column = divmod(position, shape[-1])
        if row < len(tensor.data):
            try:
                pairs.append((value, float(gguf.dequantize(tensor.data[row : row + 1], tensor.tensor_type)[0, column])))
            except NotImplementedError:
                raise InputError(
                    f"{base}: its embedding has type {tensor.tensor_type.name}, which the gguf package cannot read;\n"
                    "keep the embedding in another one (llama-quantize --token-embedding-type q8_0)"
                ) from None
    if len(pairs) < FEWEST:
        raise InputError(
            f"{base} is of another base: its embedding has {len(tensor.data)} rows, the adapter's {shape[0]}"
        )
    ours, theirs = np.array(pairs, dtype=np.float64).T
    deviation, limit = float(np.linalg.norm(theirs - ours)) / max(float(np.linalg.norm(ours)), 1e-30), tolerance(tensor)
    if deviation > limit:
        raise InputError(
            f"{base} is of another base: its embedding is {deviation:.1%} off the one that the adapter was trained on "
            f"({tensor.tensor_type.name} allows {limit:.1%})"
        )
    return deviation, limit


def positions(size: int) -> list[int]:
    """Where the values stand that `strategy.witnesses` takes of a tensor of `size` elements."""
    step = max(1, size // SAMPLE)
    taken = range(0, size, step)[:SAMPLE]
    return list(taken[:: max(1, len(taken) // 64)][:64])


def tolerance(tensor: Any) -> float:
    """Largest relative deviation that rounding to the tensor's type explains.

    With b bits in blocks of 32 normal values it is near 1.3 * 2^-b; tests/test_gguf.py measures it, and heavier tails
    cost more: 6 * 2^-b, at most 0.7 (an unrelated embedding is off by 1.4). Floating point: a bf16 copy of the base.
    """
    block, size = gguf_package().GGML_QUANT_SIZES[tensor.tensor_type]
    bits = 8 * size / block
    return 0.005 if bits >= 16 else float(min(0.7, 6 * 2.0**-bits))
