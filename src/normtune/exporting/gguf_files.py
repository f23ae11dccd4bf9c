"""GGUF files: opened with messages for people, and rewritten with other values for some tensors.

A rewritten file is the old one byte by byte (metadata, descriptions of tensors, data), except for the values that
change and for the keys that are added: nothing is encoded a second time, and no tensor is held in memory. Source: the
GGUF specification (ggml/docs/gguf.md), versions 2 and 3; the `gguf` package reads it. Not here: which values
(gguf_norms.py), a file whole or not at all (the folder around it: runlog.atomic_folder).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from normtune.errors import InputError
from normtune.runlog import wrapped_disk_errors

COUNTS = 16  # bytes before the number of metadata keys: magic, version, number of tensors
CHUNK = 64 << 20  # bytes copied at a time
STRING = 8  # GGUF's number of that type of metadata


def gguf_package() -> Any:
    """The `gguf` package. Raises InputError, naming the extra, where it is missing."""
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the package gguf: pip install 'normtune[gguf]'") from None
    return gguf


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` on a file that is whole, in one part, and in this machine's byte order.

    Raises:
        InputError: no such file, no GGUF, damaged or cut off, one part of several, or of the other byte order.
    """
    gguf = gguf_package()
    if not path.is_file():
        raise InputError(f"no GGUF file at {path}; give the LLM's, such as llama.cpp's convert_hf_to_gguf.py writes")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise InputError(f"{path} is no GGUF file (it begins with {magic!r}); give the base LLM's")
        reader = gguf.GGUFReader(path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise InputError(f"{path} is damaged or cut off ({str(error).splitlines()[0]}); copy it again") from None
    if reader.byte_order != "I":
        raise InputError(f"{path} is written for machines of the other byte order; convert it on one like this")
    if fact(reader, "split.count", 1) > 1:
        raise InputError(
            f"{path} is one part of several; join them first: llama-gguf-split --merge FIRST.gguf OUT.gguf"
        )
    if not reader.tensors:
        raise InputError(f"{path} holds no tensors; give the LLM's file")
    return reader


def fact(reader: Any, key: str, default: Any = None) -> Any:
    """The value of a metadata key."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def tensors(reader: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in reader.tensors}


def rewrite(reader: Any, target: Path, values: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Writes the file of `reader` to `target` with other `values` for some tensors and `facts` added to its metadata.

    Args:
        values: name of an F32 tensor -> its new values, fp32, as many as there are.
        facts: metadata keys that the file does not have -> text.

    Raises:
        JobError: the disk is full.
    """
    data, infos = reader.data, [tensor.field for tensor in reader.tensors]
    keys_end = infos[0].offset
    infos_end = infos[-1].offset + sum(int(part.nbytes) for part in infos[-1].parts)
    (count,) = struct.unpack("<Q", bytes(data[COUNTS : COUNTS + 8]))
    with wrapped_disk_errors(target), target.open("wb") as file:
        file.write(bytes(data[:COUNTS]) + struct.pack("<Q", count + len(facts)))
        file.write(bytes(data[COUNTS + 8 : keys_end]))
        for key, text in facts.items():
            file.write(packed(key) + struct.pack("<I", STRING) + packed(text))
        file.write(bytes(data[keys_end:infos_end]))
        file.write(bytes(-file.tell() % int(reader.alignment)))
        position = int(reader.data_offset)
        for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
            if tensor.name in values:
                copy_bytes(data, position, tensor.data_offset, file)
                new = np.ascontiguousarray(values[tensor.name], dtype="<f4").tobytes()
                assert len(new) == tensor.n_bytes, tensor.name
                file.write(new)
                position = tensor.data_offset + tensor.n_bytes
        copy_bytes(data, position, len(data), file)


def copy_bytes(data: np.ndarray, start: int, end: int, file: Any) -> None:
    for position in range(int(start), int(end), CHUNK):
        file.write(data[position : min(position + CHUNK, int(end))].data)


def packed(text: str) -> bytes:
    """A string as GGUF writes it: its length in bytes, then its bytes."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
