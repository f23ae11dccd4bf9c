"""Anatomy, formula, outputs, gradients and movement on every row of the zoo; what is refused; no names of models.

The expectations are in zoo.py, read from transformers' sources. Roots of MLP, vision encoder and connector are compared
by the parameters below them: whether a list names a module or its children is a matter of taste.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import zoo
from normtune import InputError, anatomy, apply
from normtune.structure import formula
from stubs import text_model
from zoo import Row

SOURCE = Path(__file__).parents[1] / "src" / "normtune"
rows = pytest.mark.parametrize(("name", "row"), zoo.ZOO.items(), ids=zoo.ZOO)
common_rows = pytest.mark.parametrize(
    ("name", "row"), [pytest.param(n, zoo.ZOO[n], id=n, marks=zoo.beyond_common(n)) for n in zoo.ZOO]
)


def below(model: Any, roots: Sequence[str]) -> set[str]:
    """Names of the parameters of the modules `roots`, shared ones under their first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {first[id(parameter)] for root in roots for parameter in model.get_submodule(root).parameters()}


def expected(row: Row, model: Any) -> dict[str, list[str]]:
    connector = below(model, row.connector)
    norms = [leaf if leaf.startswith(row.vision) else f"{row.vision[0]}.{leaf}" for leaf in row.vision_norms]
    return {
        "norms": row.full(row.norms),
        "final_norm": [row.final_norm],
        "qk_norms": row.full(row.qk_norms),
        "embed": [row.embed],
        "head": [row.head],
        "attn_q": row.projection("q"),
        "attn_k": row.projection("k"),
        "attn_v": row.projection("v"),
        "attn_qkv": row.full(row.fused),
        "mlp": list(below(model, row.full(row.mlp or ()))),
        "vision_norms": [norm.replace("*", str(i)) for norm in norms for i in range(2 if "*" in norm else 1)],
        "vision": list(below(model, row.vision) - connector),
        "connector": list(connector),
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@rows
def test_anatomy(name: str, row: Row, device: str) -> None:
    with torch.device(device):
        model = zoo.skeleton(name)
    found = anatomy(model)
    assert (found.llm, found.blocks) == (row.blocks.rpartition(".")[0], [f"{row.blocks}.{i}" for i in range(row.count)])
    connector = below(model, found.connector)
    actual = {part: list(getattr(found, part)) for part in expected(row, model)}
    actual |= {"mlp": list(below(model, found.mlp)), "connector": list(connector)}
    actual |= {"vision": list(below(model, found.vision) - connector)}
    for part, wanted in expected(row, model).items():
        assert sorted(actual[part]) == sorted(wanted) or (part == "mlp" and row.mlp is None), part
    assert set(row.projection("o")) <= set(found.attn_o)
    assert found.loose == list(row.loose)


@rows
def test_anatomy_of_the_model_without_head(name: str, row: Row) -> None:
    """The names lose the prefix, and nothing else changes."""
    model = zoo.model(name)
    prefix = model.base_model_prefix + "."
    if not row.blocks.startswith(prefix):
        pytest.skip("the model with head is all that there is")
    found = anatomy(model.base_model)
    for part, wanted in expected(row, model).items():
        if part not in ("head", "mlp", "vision", "connector"):
            assert sorted(getattr(found, part)) == sorted(full.removeprefix(prefix) for full in wanted), part
    assert found.head == []


@rows
def test_formula(name: str, row: Row) -> None:
    model = zoo.model(name)
    with torch.device("meta"):
        empty = zoo.skeleton(name)
    for norm in row.full(row.norms):
        for owner in (model, empty):
            found = formula(owner.get_submodule(norm))
            assert (found.kind, found.compute) == (row.formula, row.computes), norm
            assert found.eps == pytest.approx(row.eps, rel=1e-2) and found.deviation < 1e-3, norm


def logits(model: Any, name: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(**zoo.batch(name, dtype, seed)).logits  # type: ignore[no-any-return]


def exact(name: str) -> tuple[Any, torch.dtype]:
    """The bf16 model's weights in fp64, and that dtype."""
    model = zoo.model(name).bfloat16()
    if name == "xglm":  # its mask takes the least fp64 number for an fp32 one
        return model.float(), torch.float32
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # torch's grouped matrix product has no fp64
    return model.double(), torch.float64


def rms(difference: torch.Tensor) -> float:
    return difference.detach().double().square().mean().sqrt().item()


@pytest.mark.heavy
@common_rows
def test_fp32_logits_stay(name: str, row: Row) -> None:
    before = logits(zoo.model(name), name, torch.float32)
    model = zoo.model(name)
    apply(model, "layernorm-simple")
    assert (logits(model, name, torch.float32) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.heavy
@pytest.mark.parametrize("name", zoo.common_first())
def test_bf16_logits_are_no_further_from_fp64(name: str) -> None:
    """Than those of the model before `apply`, by rms over 80 words.

    A mixture of experts routes some words elsewhere in bf16 than in fp64, the tuned model other words than the
    untouched one, and such a word is off by ten times as much as the others: there the median word decides.
    """
    original, tuned = zoo.model(name).bfloat16(), zoo.model(name).bfloat16()
    apply(tuned, "layernorm-simple")
    truth, dtype = exact(name)
    errors = []
    for model in (tuned, original):
        far = [logits(model, name, torch.bfloat16, seed) - logits(truth, name, dtype, seed) for seed in range(4)]
        per_word = torch.cat(far).double().square().mean(-1).flatten()
        errors.append((per_word.median() if zoo.ZOO[name].routed else per_word.mean()).sqrt())
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.heavy
@common_rows
def test_bf16_norms_are_no_further_from_fp64(name: str, row: Row) -> None:
    """Each norm's output and its gradients, beside the untouched module: rms over 4096 values; gains' in fp32."""
    original, tuned = zoo.model(name).bfloat16(), zoo.model(name).bfloat16()
    apply(tuned, "layernorm-simple")
    truth = zoo.model(name).bfloat16().double()
    generator = torch.Generator().manual_seed(0)
    for norm in row.full(row.norms):
        width = truth.get_submodule(norm).weight.numel()
        x, upstream = torch.randn(2, 16, 8, width, generator=generator).bfloat16()
        found = []
        for model in (truth, original, tuned):
            module = model.get_submodule(norm).requires_grad_(True)
            dtype = torch.float64 if model is truth else torch.bfloat16
            point = x.to(dtype).requires_grad_(True)
            y = module(point)
            assert y.dtype == dtype
            y.backward(upstream.to(dtype))
            found.append((y, point.grad, *(p.grad for p in module.parameters())))
        for i, (right, before, after) in enumerate(zip(*found, strict=True)):
            assert rms(after - right) <= 1.0001 * rms(before - right), (norm, i)
            if i > 1:
                assert after.dtype == torch.float32 and rms(after - right) <= 1e-5 * rms(right), norm


@rows
def test_gradients(name: str, row: Row) -> None:
    """Of every gain and bias, beside plain autograd through the untouched model."""
    tuned, plain = zoo.model(name), zoo.model(name)
    report = apply(tuned, "layernorm-simple")
    wanted = dict(plain.named_parameters())
    assert set(report.trainable) == below(plain, row.full(row.norms))
    for key, parameter in wanted.items():
        parameter.requires_grad_(key in report.trainable)
    for model in (tuned, plain):
        model(**zoo.batch(name)).loss.backward()
    for key, parameter in tuned.named_parameters():
        if key in report.trainable:
            a, b = wanted[key].grad, parameter.grad
            assert a.norm() > 0 and (a - b).norm() <= 1e-5 * a.norm(), key
        else:
            assert parameter.grad is None, key


@pytest.mark.heavy
@common_rows
def test_a_step_on_a_bf16_base_moves_every_gain(name: str, row: Row) -> None:
    model = zoo.model(name).bfloat16()
    report = apply(model, "layernorm-simple")
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-4)
    model(**zoo.batch(name, torch.bfloat16)).loss.backward()
    optimizer.step()
    assert list(trainable) == report.trainable
    for key, parameter in trainable.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert (parameter != before[key]).all(), key


@pytest.mark.parametrize("name", zoo.GAINLESS)
def test_norms_without_gains_are_refused(name: str) -> None:
    held = {"olmo": "OlmoLayerNorm", "nanochat": "NanoChatRMSNorm"}[name]
    works = ("attn-qv", "attn-mlp", "lora", "full")
    for attempt in (anatomy, lambda model: apply(model, "layernorm-simple")):
        with pytest.raises(InputError) as error:
            attempt(zoo.model(name))
        assert all(word in str(error.value) for word in (held, *works)), error.value
        assert len(str(error.value).splitlines()) <= 3
    for strategy in works:
        model = zoo.model(name)
        assert apply(model, strategy).trainable
        model(**zoo.batch(name)).loss.backward()


@pytest.mark.parametrize(
    ("auto", "kind"),
    [(AutoModel, "bert"), (AutoModel, "vit"), (AutoModelForSeq2SeqLM, "t5"), (AutoModelForSeq2SeqLM, "bart"),
     (AutoModelForImageTextToText, "florence2"), (AutoModelForImageTextToText, "pix2struct"),
     (AutoModelForImageTextToText, "t5gemma2"), (AutoModelForImageTextToText, "pp_formulanet")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_that_are_no_decoder_are_refused(auto: Any, kind: str) -> None:
    """Encoders, and encoders with decoders, whose default configs are built without weights."""
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(kind))
    for attempt in (anatomy, lambda made: apply(made, "layernorm-simple")):
        with pytest.raises(InputError) as error:
            attempt(model)
        assert type(model).__name__ in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(InputError, match="GELU"):
        anatomy(torch.nn.GELU())


@pytest.mark.parametrize("name", [name for name, row in zoo.ZOO.items() if row.fused and not any(row.split)])
def test_fused_projections_cannot_train_by_halves(name: str) -> None:
    for part in ("attn_qv", "attn_q"):
        with pytest.raises(InputError) as error:
            apply(zoo.model(name), [part])
        assert "fused" in str(error.value) and "attn_qkv" in str(error.value)
    report = apply(zoo.model(name), ["attn_qkv"])
    assert set(report.trainable) == below(zoo.model(name), zoo.ZOO[name].full(zoo.ZOO[name].fused))


def test_missing_fused_projection_is_named() -> None:
    with pytest.raises(InputError, match="attn_qkv"):
        apply(text_model("llama"), ["attn_qkv"])


# English words and other people's words (HTML, torch, PIL) that are model types too
WORDS = {"align", "aria", "bros", "clip", "encoder-decoder"}
# What makes, reads and runs LLaVAs, or reads files in LLaVA's formats, names them; what makes them, and the world
# with its Llama, names its parts too
LLAVA = ("data/", "tasks/", "evaluation/", "recipe/", "cli/", "exporting/")
PROGRAM = re.compile(r"\bllama(\.cpp|(-[a-z]+)+)")  # llama.cpp, llama-server: programs, whatever model they run
EXEMPT = (
    "model.py",
    "encoders.py",
    "pretrained.py",
    "probes.py",
    "skeletons.py",
    "templates.py",
    "chat.py",
    "world/",
    "cli/demo",
    "comparison/claims.py",  # which names the models that the paper tuned
)


def code_words(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and string in a file's code; docstrings and comments left out."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("id", "attr", "arg", "name", "module", "asname"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text


def test_no_architecture_is_named_in_code() -> None:
    """Nothing is decided by a model's name: neither its type (`gpt_neox`) nor its class (`GPTNeoXForCausalLM`)."""
    types = {kind for kind in CONFIG_MAPPING_NAMES if len(kind) >= 4} - WORDS
    classes = {str(name).removesuffix("Config") for name in CONFIG_MAPPING_NAMES.values()}
    typed = re.compile(rf"(?<![a-z0-9])({either(types)})(?![a-z0-9])", re.IGNORECASE)
    classed = re.compile(rf"\b({either(classes)})(?=[A-Z][a-z])")  # not OPTIMIZER
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = str(path.relative_to(SOURCE))
        for line, text in code_words(path):
            text = PROGRAM.sub("", text)
            names = {*typed.findall(text), *classed.findall(text)}
            if place.startswith(LLAVA):
                names = {name for name in names if name.lower() != "llava"}
            if names and not place.startswith(EXEMPT):
                found.append(f"{place}:{line} names {', '.join(sorted(names))}")
    assert not found, "\n".join(found)


def either(words: set[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))
