"""`normtune merge` and `normtune export`: the tuned model as a plain transformers folder, or as a PEFT adapter."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(help="Run folder or adapter folder.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Also where rounding loses the tuning.")]


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Format(enum.StrEnum):
    transformers = "transformers"
    peft = "peft"


DtypeOption = Annotated[Dtype | None, typer.Option(help="Of the written weights (default: the base's).")]


def merge(run: RunArgument, out: OutOption, dtype: DtypeOption = None, force: ForceOption = False) -> None:
    """Fold the adapter into the base: a plain model that loads without normtune.

    Example: normtune merge runs/world --out merged
    """
    write_merged(run, out, dtype, force)


def export(
    run: RunArgument,
    out: OutOption,
    format: Annotated[Format, typer.Option(help="Format of the export.")] = Format.transformers,
    dtype: DtypeOption = None,
    force: ForceOption = False,
) -> None:
    """Write the tuned model in another format: `transformers` a stock model folder, `peft` an adapter for PEFT.

    Example: normtune export runs/world --format peft --out exported
    """
    if format is Format.transformers:
        write_merged(run, out, dtype, force)
    else:
        write_peft(run, out, dtype, force)


def prepare(out: Path) -> None:
    """Raises InputError where `out` is taken, before anything is loaded."""
    from normtune.cli.output import quiet_libraries
    from normtune.errors import InputError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; choose another --out or remove it")
    quiet_libraries()


def write_peft(run: str, out: Path, dtype: Dtype | None, force: bool) -> None:
    from normtune.errors import InputError

    if dtype is not None:
        raise InputError("--dtype is of merged weights; an adapter for PEFT is float32, leave it out")
    prepare(out)
    from normtune.adapter import export_peft
    from normtune.tuned import open_tuned

    export_peft(open_tuned(run, force=force, unquantized=True).model, out)
    print(f"{out}: an adapter in PEFT's format, float32")
    print(f"loads with peft: PeftModel.from_pretrained(base, {str(out)!r}), base being what normtune.assemble gives")
    print("PEFT keeps it in the dtype of the base: in bfloat16 it rounds the gains; load a float32 base for our logits")


def write_merged(run: str, out: Path, dtype: Dtype | None, force: bool) -> None:
    prepare(out)
    import torch

    from normtune.adapter import merge
    from normtune.model import save
    from normtune.tuned import open_tuned

    tuned = open_tuned(run, force=force, unquantized=True)
    result = merge(tuned.model, getattr(torch, dtype.value) if dtype else None, force=force)
    save(tuned.model, tuned.processor, out)
    print(f"{out}: {result}")
    print("loads with transformers: AutoModelForImageTextToText.from_pretrained, AutoProcessor.from_pretrained")
