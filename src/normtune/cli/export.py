"""`normtune export`: the tuned model for other engines: a transformers folder, PEFT's format, a delta, GGUF files."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from normtune.adapter import Survival
    from normtune.tuned import Tuned

RunArgument = Annotated[str, typer.Argument(help="Run folder or adapter folder.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; must not exist.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Also where rounding loses the tuning.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")]


CLASS_TOKEN = (
    "the encoder has a class token, and llama.cpp builds without the fix of ggml-org/llama.cpp#25814 place its "
    "features one off; compare answers, or use an encoder without such a token"
)


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Format(enum.StrEnum):
    transformers = "transformers"
    peft = "peft"
    delta = "delta"
    gguf = "gguf"


DtypeOption = Annotated[Dtype | None, typer.Option(help="Of the written weights (default: the base's).")]


def export(
    run: RunArgument,
    out: OutOption,
    format: Annotated[Format, typer.Option(help="Format of the export.")] = Format.transformers,
    dtype: DtypeOption = None,
    gguf: Annotated[Path | None, typer.Option(help="With --format gguf: the base LLM's GGUF file.")] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write the tuned model in another format: `transformers` a stock model folder, `peft` an adapter for PEFT, `delta`
    the change of the gains, `gguf` files for llama.cpp (the tuned norms put into the LLM's file, and an mmproj file).

    Example: normtune export runs/world --format peft --out exported
    """
    from normtune.cli.output import print_json
    from normtune.errors import InputError

    if gguf is not None and format is not Format.gguf:
        raise InputError("--gguf is the base's GGUF file, and goes with --format gguf")
    if dtype is not None and format in (Format.peft, Format.delta):
        raise InputError(f"--dtype is of whole weights; --format {format.value} is float32, leave it out")
    if format is Format.transformers:
        facts, lines = write_merged(run, out, dtype, force)
    elif format is Format.peft:
        facts, lines = write_peft(run, out, force)
    elif format is Format.delta:
        facts, lines = write_delta(run, out, force)
    else:
        facts, lines = write_gguf(run, out, gguf, dtype, force)
    if json:
        print_json({"format": format.value, "out": str(out), "files": files_below(out), **facts})
    else:
        print("\n".join(lines))


def files_below(folder: Path) -> dict[str, int]:
    """Files of a folder by their paths in it -> bytes."""
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def prepare(out: Path) -> None:
    """Raises InputError where `out` is taken or cannot be put in place as a whole, before anything is loaded."""
    from normtune.cli.output import quiet_libraries
    from normtune.runlog import refuse_taken

    refuse_taken(out)
    quiet_libraries()


def opened(run: str, out: Path, force: bool) -> Tuned:
    """The tuned model, its base not quantized. Raises InputError where `out` is taken."""
    prepare(out)
    from normtune.tuned import open_tuned

    return open_tuned(run, force=force, unquantized=True)


def write_peft(run: str, out: Path, force: bool) -> tuple[dict[str, Any], list[str]]:
    tuned = opened(run, out, force)
    from normtune.adapter import export_peft

    export_peft(tuned.model, out)
    return {"dtype": "float32"}, [
        f"{out}: an adapter in PEFT's format, float32",
        f"loads with peft: PeftModel.from_pretrained(base, {str(out)!r}), base being what normtune.assemble gives",
        "PEFT keeps it in the dtype of the base: in bfloat16 it rounds the gains; load a float32 base for our logits",
    ]


def write_delta(run: str, out: Path, force: bool) -> tuple[dict[str, Any], list[str]]:
    tuned = opened(run, out, force)
    from normtune.exporting import export_delta

    record = tuned.record or {}
    kept = {key: record[key] for key in ("base", "recipe", "gate", "made") if record.get(key)}
    written = export_delta(tuned.model, out, **kept)
    left = written["left_out"]
    lines = [f"{out}: {written['parameters']:,} differences tuned - base, float32; base + delta gives the tuned gains"]
    if left:
        lines.append(f"left out, since an adapter does not hold their base: {len(left)} tensors, first {left[0]}")
    return {key: written[key] for key in ("parameters", "left_out", "formulas")}, lines


def write_merged(run: str, out: Path, dtype: Dtype | None, force: bool) -> tuple[dict[str, Any], list[str]]:
    tuned = opened(run, out, force)
    from dataclasses import asdict

    import torch

    from normtune.adapter import merge
    from normtune.model import save
    from normtune.runlog import atomic_folder, write_text

    result = merge(tuned.model, getattr(torch, dtype.value) if dtype else None, force=force)
    name = str(tuned.model.dtype).removeprefix("torch.")
    with atomic_folder(out) as temporary:
        save(tuned.model, tuned.processor, temporary)
        write_text(temporary / "README.md", card_of(run, tuned, result, name))
    return {"dtype": name, "survival": {**asdict(result), "worst": result.worst}}, [
        f"{out}: {result}",
        "loads with transformers: AutoModelForImageTextToText.from_pretrained, AutoProcessor.from_pretrained",
    ]


def card_of(run: str, tuned: Tuned, survival: Survival, dtype: str) -> str:
    """The model card of a merged model, with the scores of its run."""
    from normtune.exporting import model_card
    from normtune.recipe import ModelRecipe

    folder, record = Path(run), tuned.record or {}
    base = (record.get("base") or {}).get("model")
    model = tuned.recipe.model if tuned.recipe else ModelRecipe.model_validate(base) if base else None
    home = folder if tuned.recipe else folder.parent if folder.name == "adapter" else None
    total = sum(parameter.numel() for parameter in tuned.model.parameters())
    own = (folder.parent if home else folder).resolve().name
    title = tuned.recipe.name if tuned.recipe else own
    return model_card(title, model, record, tuned.recipe, survival, total, dtype, results_of(folder, tuned))


def results_of(folder: Path, tuned: Tuned) -> list[dict[str, Any]]:
    """Results of this very adapter, from where `normtune evaluate` writes them."""
    from normtune.evaluation import identity
    from normtune.exporting import read_evaluations

    if tuned.record is None:
        return []
    adapter = folder / "adapter" if tuned.recipe else folder
    files = identity("", None, {}, adapter)["adapter"]["files"]
    if tuned.recipe or (folder.parent / "recipe.yaml").is_file():
        home = adapter.parent / "evaluations"
        places = [home, home / adapter.name] if adapter.name == "adapter" else [home / adapter.name]
    else:
        places = [Path("evaluations") / folder.resolve().name]
    return [result for place in places for result in read_evaluations(place, files)]


def write_gguf(
    run: str, out: Path, base: Path | None, dtype: Dtype | None, force: bool
) -> tuple[dict[str, Any], list[str]]:
    """The LLM's file with the tuned norms, and vision encoder and connector, where there are any, as mmproj.gguf."""
    from normtune.errors import InputError

    if dtype is Dtype.bfloat16:
        raise InputError("--dtype is of the vision encoder here: float32, or left out for float16")
    tuned = opened(run, out, force)
    from normtune.adapter.loading import capture
    from normtune.exporting import apply_to_gguf, write_mmproj
    from normtune.exporting.gguf_norms import llm_norms
    from normtune.runlog import atomic_folder
    from normtune.structure import anatomy

    found = anatomy(tuned.model)
    norms = llm_norms(tuned.model, capture(tuned.model), found)
    if norms and base is None:
        raise InputError("the adapter holds norms of the LLM: give the base LLM's file, --gguf BASE.gguf")
    if not norms and not found.vision:
        raise InputError("nothing to write: no norm of the LLM was tuned, and the model has no vision encoder")
    facts: dict[str, Any] = {}
    lines = []
    with atomic_folder(out) as temporary:
        if base is not None:
            done = apply_to_gguf(tuned.model, base, temporary / f"{base.stem}-tuned.gguf")
            facts |= {"changed": done.changed, "scaled": done.scaled, "sha256": done.sha256}
            facts |= {"embedding": {"deviation": done.deviation, "limit": done.limit}}
            if done.changed:
                lines.append(f"{out / f'{base.stem}-tuned.gguf'}: {len(done.changed)} norm tensors changed")
            else:
                lines.append(f"{base} stays as it is: no norm of the LLM was tuned")
            if done.scaled:
                lines.append(
                    f"the file holds other gains than the base in {len(done.scaled)} norms; that factor is kept"
                )
        if found.vision:
            names = write_mmproj(tuned.model, tuned.processor, temporary / "mmproj.gguf", half=dtype is None)
            facts["mmproj"] = len(names)
            lines.append(f"{out / 'mmproj.gguf'}: vision encoder and connector, {len(names)} tensors")
            if "v.class_embd" in names:
                facts["warning"] = CLASS_TOKEN
                lines.append(f"warning: {CLASS_TOKEN}")
    model = f"{out / f'{base.stem}-tuned.gguf'}" if base is not None and facts["changed"] else f"{base or 'LLM.gguf'}"
    lines.append(f"llama.cpp: llama-mtmd-cli -m {model} --mmproj {out / 'mmproj.gguf'} --image IMAGE -p QUESTION")
    return facts, lines if found.vision else [*lines[:-1], f"llama.cpp: llama-cli -m {model}"]
