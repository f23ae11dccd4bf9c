"""`normtune export` and `normtune merge` of several: each format read back by what it is for; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from command import run
from models import tiny_mllm
from normtune.adapter import Adapter, load_adapter, save_adapter, weighted_sum
from normtune.chat import Turn
from normtune.errors import InputError
from normtune.evaluation import answer, identity
from normtune.exporting import apply_to_gguf, export_delta, model_card, read_evaluations, write_mmproj
from normtune.exporting.gguf_base import MARK
from normtune.exporting.mmproj import normalization
from normtune.model import load
from normtune.recipe import ModelRecipe
from normtune.runlog import atomic_folder
from normtune.strategy import apply
from stubs import inputs, llava, text_model
from test_gguf import gains, tuned, write_base


@pytest.fixture(scope="module")
def mllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLLM folder; beside it its LLM."""
    return tiny_mllm(tmp_path_factory.mktemp("export") / "mllm")


def write_adapter(mllm: Path, folder: Path, strategy: Any = ("norms", "connector"), seed: int = 0, **facts: Any) -> Any:
    """An adapter folder with random changes, as a run leaves one; returns the tuned model."""
    model, _ = load(mllm)
    apply(model, list(strategy))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    base = {"model": {"path": str(mllm), "dtype": "float32"}, "seed": 0}
    save_adapter(model, folder, base=base, **facts)
    return model


def document(text: str) -> dict[str, Any]:
    return json.loads(text[text.index("{") :])  # type: ignore[no-any-return]


def test_transformers_folder(
    mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that a stock folder needs is there, and transformers alone gives our logits."""
    monkeypatch.chdir(tmp_path)
    model = write_adapter(mllm, tmp_path / "adapter", gate="image")
    Path("evaluations/adapter").mkdir(parents=True)  # where `normtune evaluate adapter` writes
    about = identity("adapter", None, {}, Path("adapter"))
    Path("evaluations/adapter/a.json").write_text(json.dumps({"model": about, "scores": {"pope": {"score": 0.75}}}))
    assert run("export", "adapter", "--out", "out", "--json") == 0
    written = document(capsys.readouterr().out)
    needed = {"config.json", "generation_config.json", "chat_template.jinja", "model.safetensors", "README.md"}
    assert needed <= written["files"].keys() == {p.name for p in Path("out").iterdir()}
    assert written["survival"]["worst"] == 1.0 and written["dtype"] == "float32"
    alone, processor = AutoModelForImageTextToText.from_pretrained("out"), AutoProcessor.from_pretrained("out")
    assert processor.chat_template and alone.generation_config.eos_token_id == model.generation_config.eos_token_id
    pixels, image_id = torch.randn(2, 3, 32, 32), model.config.image_token_id
    ids = torch.tensor([[5, *[image_id] * 16, 6, 7], [8, *[image_id] * 16, 9, 10]])
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)
    assert "| pope | 0.750 |" in Path("out/README.md").read_text()
    code = Path("out/README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", "out")
    Image.new("RGB", (32, 32), (200, 30, 30)).save("image.jpg")
    exec(code, {})  # as a reader would
    conversation = [Turn("user", "<image>\nWhat is in the image?")], [Path("image.jpg")]
    assert capsys.readouterr().out.strip() == answer(model, processor, [conversation], 64)[0]


def test_card_states_recipe_scores_and_no_path(tmp_path: Path) -> None:
    from normtune.adapter import Survival
    from normtune.recipe import Recipe

    llm = tmp_path / "secret" / "my-llm"
    llm.mkdir(parents=True)
    data = [{"path": str(tmp_path / "secret/pairs.json")}, {"path": "x.json", "kind": "detail"}]
    stage = {"name": "instruct", "strategy": "layernorm-simple", "learning_rate": 4e-3, "data": data}
    made = {"llm": str(llm), "vision": "openai/clip-vit-large-patch14"}
    recipe = Recipe.model_validate({"name": "see", "model": made, "stages": [stage]})
    (tmp_path / "evaluations").mkdir()
    result = {"pope": {"score": 0.871, "intervals": {"score": [0.84, 0.9]}, "n": 300, "baseline": "none"}}
    (tmp_path / "evaluations/pope.json").write_text(json.dumps({"scores": result}))
    (tmp_path / "evaluations/broken.json").write_text("{")
    odd = {"mme": 0.5, "vqav2": {"score": 0.25, "intervals": {"score": [None, None]}, "n": 3}}
    (tmp_path / "evaluations/odd.json").write_text(json.dumps({"scores": odd}))
    record = {"strategy": "layernorm-simple", "parts": ["norms", "final_norm"], "parameters": 1000}
    other = {"model": {"adapter": {"files": {"adapter.safetensors": "1"}}}, "scores": {"okvqa": result["pope"]}}
    (tmp_path / "evaluations/other.json").write_text(json.dumps(other))  # of the adapter that was there before
    scores = read_evaluations(tmp_path / "evaluations", {"adapter.safetensors": "2"})
    assert "other" not in [one["name"] for one in scores]
    card = model_card("see", recipe.model, record, recipe, Survival(9, 0.97, 0.95), 2_000_000, "bfloat16", scores)
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == ["openai/clip-vit-large-patch14"] and facts["pipeline_tag"] == "image-text-to-text"
    for word in ("LLM: my-llm", "layernorm-simple", "0.050%", "| 0.871 | 0.840 to 0.900 | 300 |", "pairs.json, detail",
                 "| 0.250 |  | 3 |", "0.004", "95.0% of the change survives", "bfloat16", "icence"):  # fmt: skip
        assert word in text, word
    assert "secret" not in card and str(tmp_path) not in card
    bare = model_card("see", None, None, None, Survival(0, 1.0, 1.0), 1, "float32")
    assert "None were measured" in bare and "base_model" not in bare
    assert "none of" not in model_card("x", ModelRecipe(path="a/b"), {}, None, Survival(0, 1.0, 1.0), 1, "float32")


@pytest.mark.parametrize("kind", ["llama", "gemma", "opt"])
def test_delta_added_to_the_base_gives_our_gains(kind: str, tmp_path: Path) -> None:
    model, base = tuned(text_model(kind)), text_model(kind)
    record = export_delta(model, tmp_path / "delta")
    change = load_file(tmp_path / "delta" / "delta.safetensors")
    present = dict(base.named_parameters())
    for name, value in change.items():
        present[name].data += value
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(present[name], parameter, rtol=0, atol=2e-7)
        ids = inputs(model)["input_ids"]
        torch.testing.assert_close(base(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert record == json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert record["left_out"] == [] and all(
        ("1+g" in kind_) == (kind == "gemma") for kind_ in record["formulas"].values()
    )
    assert all(tensor.dtype == torch.float32 for tensor in change.values())


def test_delta_names_what_it_leaves_out_and_refuses_what_it_cannot_hold(
    mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(mllm, tmp_path / "adapter", gate="image")
    assert run("export", "adapter", "--format", "delta", "--out", "out", "--json") == 0
    written = document(capsys.readouterr().out)
    assert written["left_out"] and all("projector" in name for name in written["left_out"])
    record = json.loads(Path("out/delta.json").read_text())
    assert record["base"]["model"]["path"] == str(mllm)
    assert (record["strategy"], record["gate"]) == ("norms+connector", "image")
    for strategy, words in (("connector", "nothing with a known base"), ("lora", "LoRA")):
        with pytest.raises(InputError, match=words):
            export_delta(tuned(llava(), strategy), tmp_path / strategy)
        assert not (tmp_path / strategy).exists()


def llm_gguf(mllm: Path, path: Path) -> Path:
    """The GGUF file of the LLM that an MLLM was assembled from."""
    return write_base(path, AutoModelForCausalLM.from_pretrained(mllm.with_name(mllm.name + "-llm")))


def test_gguf_command_writes_both_files(
    mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An assembled model has a row more (the image token) than its LLM's file."""
    monkeypatch.chdir(tmp_path)
    model, base = write_adapter(mllm, tmp_path / "adapter"), llm_gguf(mllm, tmp_path / "llm.gguf")
    export = ("export", "adapter", "--format", "gguf", "--gguf", str(base))
    assert run(*export, "--out", "out", "--json") == 0
    written = document(capsys.readouterr().out)
    assert written["files"].keys() == {"llm-tuned.gguf", "mmproj.gguf"} and len(written["changed"]) == 4
    assert "#25814" in written["warning"]  # the encoder is CLIP's
    assert written["embedding"]["deviation"] == 0 < written["embedding"]["limit"]
    new = gains(Path("out/llm-tuned.gguf"))
    wanted = model.get_submodule("model.language_model.layers.0.input_layernorm").weight.detach().numpy()
    np.testing.assert_array_equal(new["blk.0.attn_norm.weight"], wanted)
    connector = model.get_submodule("model.multi_modal_projector").linear_1.weight.detach().numpy()
    held = {t.name: t.data for t in gguf.GGUFReader("out/mmproj.gguf").tensors}
    np.testing.assert_array_equal(held["mm.0.weight"], connector)
    assert gguf.GGUFReader("out/llm-tuned.gguf").get_field(MARK).contents() == written["sha256"]
    assert run(*export, "--out", "out") == 2
    assert run("export", "adapter", "--format", "gguf", "--out", "new") == 2
    assert run("export", "adapter", "--gguf", str(base), "--out", "new") == 2
    assert run(*export, "--dtype", "bfloat16", "--out", "new") == 2
    twice = ("export", "adapter", "--format", "gguf", "--gguf", "out/llm-tuned.gguf", "--out", "new")
    assert run(*twice) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and "already" in errors and "--gguf BASE.gguf" in errors
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "llm.gguf", "out"}


def test_connector_alone_needs_no_gguf_file(
    mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(mllm, tmp_path / "adapter", ["connector"])
    assert run("export", "adapter", "--format", "gguf", "--out", "out") == 0
    assert [p.name for p in Path("out").iterdir()] == ["mmproj.gguf"]
    base = llm_gguf(mllm, tmp_path / "llm.gguf")
    assert run("export", "adapter", "--format", "gguf", "--gguf", str(base), "--out", "out2") == 0
    assert "stays as it is" in capsys.readouterr().out and [p.name for p in Path("out2").iterdir()] == ["mmproj.gguf"]


def test_folders_that_cannot_be_put_in_place_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The current folder cannot be exchanged for another one; a link would be, and what it names stay empty."""
    for name in ("current", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "current")
    for out, words in ((".", "give a new one in it: new"), ("../link", "is a link"), ("../dangling", "is a link")):
        for command in (["export", "x"], ["merge", "x"], ["merge", "x", "y"]):
            assert run(*command, "--out", out) == 2
            assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["current", "dangling", "link", "real"]


def test_nothing_half_written_stays(mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while the file is written."""
    model, base = tuned(text_model()), write_base(tmp_path / "base.gguf", text_model())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normtune.exporting.gguf_files.copy_bytes", full)
    from normtune.errors import JobError

    with pytest.raises(JobError, match="No space left"), atomic_folder(tmp_path / "out") as temporary:
        apply_to_gguf(model, base, temporary / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]


ACT = {"gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
       "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}  # fmt: skip


def clip_graph(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's graph of an encoder with the mlp projector computes from an mmproj file; (3, h, w) -> (T, H).

    Written after models/llava.cpp; the tanh form of GELU, as there."""
    reader = gguf.GGUFReader(path)
    t = {x.name: torch.from_numpy(np.array(x.data)).float() for x in reader.tensors}
    fact = {key: field.contents() for key, field in reader.fields.items()}
    v = {key.removeprefix("clip.vision."): value for key, value in fact.items()}
    assert fact["general.architecture"] == "clip" and fact["clip.projector_type"] == "mlp"
    act, eps, heads = (
        ACT["gelu" if fact.get("clip.use_gelu") else "quick_gelu"],
        v["attention.layer_norm_epsilon"],
        v["attention.head_count"],
    )
    p, n = v["patch_size"], v["image_size"] // v["patch_size"]
    x = torch.nn.functional.conv2d(pixels[None], t["v.patch_embd.weight"], t.get("v.patch_embd.bias"), stride=p)
    x = x.flatten(2)[0].T
    first = int("v.class_embd" in t)
    if first:
        x = torch.cat([t["v.class_embd"][None], x])
    x = x + t["v.position_embd.weight"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], t[name + ".weight"], t[name + ".bias"], eps)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ t[name + ".weight"].T + t[name + ".bias"]

    if "v.pre_ln.weight" in t:
        x = norm(x, "v.pre_ln")
    assert v["feature_layer"] == [v["block_count"]] or v["feature_layer"] == v["block_count"]
    for i in range(v["block_count"]):
        y = norm(x, f"v.blk.{i}.ln1")
        q, k, o = (linear(y, f"v.blk.{i}.attn_{c}").unflatten(-1, (heads, -1)).transpose(0, 1) for c in "qkv")
        y = torch.nn.functional.scaled_dot_product_attention(q, k, o).transpose(0, 1).flatten(1)
        x = x + linear(y, f"v.blk.{i}.attn_out")
        x = x + linear(act(linear(norm(x, f"v.blk.{i}.ln2"), f"v.blk.{i}.ffn_up")), f"v.blk.{i}.ffn_down")
    x = x[first : first + n * n]
    return linear(ACT["gelu"](linear(x, "mm.0")), "mm.2")


@pytest.mark.parametrize(("vision", "connector"), [("clip", "mlp"), ("clip", "linear"), ("siglip", "mlp")])
@pytest.mark.parametrize("half", [False, True])
def test_mmproj_computes_our_features(vision: str, connector: str, half: bool, tmp_path: Path) -> None:
    """Connector outputs by llama.cpp's graph, from the file alone, against the model's own."""
    folder = tiny_mllm(tmp_path / "mllm", vision=vision, connector=connector)
    model, processor = load(folder)
    write_mmproj(model, processor, tmp_path / "mmproj.gguf", half=half)
    pixels = torch.randn(3, 32, 32)
    with torch.no_grad():
        ours = model.get_image_features(pixel_values=pixels[None]).pooler_output[0]
        theirs = clip_graph(tmp_path / "mmproj.gguf", pixels)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3 if half else 5e-4)
    if connector == "linear" and not half:
        assert (theirs - ours).abs().max() < 1e-5
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "mmproj.gguf").tensors}
    assert kinds["mm.0.weight"] == "F32" and kinds["v.blk.0.attn_q.weight"] == ("F16" if half else "F32")


def test_mmproj_normalizes_as_the_processor(mllm: Path) -> None:
    """llama.cpp scales to 0 to 1 in any case."""
    processor = AutoProcessor.from_pretrained(mllm).image_processor
    for changes in ({}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}, {"do_normalize": False}):
        for name, value in changes.items():
            setattr(processor, name, value)
        mean, std = (torch.tensor(values) for values in normalization(processor))
        ours = processor(Image.new("RGB", (32, 32), (200, 30, 90)), return_tensors="pt").pixel_values[0, :, 5, 5]
        theirs = (torch.tensor([200, 30, 90]) / 255 - mean) / std
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)


def test_mmproj_refuses_other_encoders_and_connectors(tmp_path: Path) -> None:
    model, processor = load(tiny_mllm(tmp_path / "dino", vision="dinov2"))
    with pytest.raises(InputError, match="built as CLIP's"):
        write_mmproj(model, processor, tmp_path / "mmproj.gguf")
    model = llava(act="relu")
    with pytest.raises(InputError, match="activation relu"):
        write_mmproj(model, processor, tmp_path / "mmproj.gguf")
    model = llava()
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(InputError, match="one layer"):
        write_mmproj(model, processor, tmp_path / "mmproj.gguf")
    with pytest.raises(InputError, match="one vision encoder"):
        write_mmproj(text_model(), processor, tmp_path / "mmproj.gguf")
    for folder, vision in (("clip", "clip"), ("siglip", "siglip")):  # its class token kept, its first patch dropped
        model, processor = load(tiny_mllm(tmp_path / folder, vision=vision))
        model.config.vision_feature_select_strategy = "full" if vision == "clip" else "default"
        with pytest.raises(InputError, match="takes all patches and nothing else"):
            write_mmproj(model, processor, tmp_path / "mmproj.gguf")
    model = llava()
    model.config.vision_config.intermediate_size = model.config.vision_config.hidden_size
    with pytest.raises(InputError, match="swaps its layers"):
        write_mmproj(model, processor, tmp_path / "mmproj.gguf")
    assert not (tmp_path / "mmproj.gguf").exists()


GAINS = {"n.weight": torch.tensor([1.0, 2.0]), "m.weight": torch.tensor([3.0, 4.0])}


def small(rest: float | None = None, **changes: list[float]) -> Adapter:
    tensors = {f"{name}.weight": GAINS[f"{name}.weight"] + torch.tensor(change) for name, change in changes.items()}
    return Adapter({**tensors, **({"c.weight": torch.full((2,), rest)} if rest is not None else {})}, dict(GAINS))


def test_weighted_sum() -> None:
    """Changes are weighed and summed; a gain that one leaves alone has no change there."""
    a, b, c = small(n=[0.2, 0.4]), small(n=[0.4, 0.0], m=[1.0, 1.0]), small(m=[0.5, -0.5])
    total = weighted_sum([a, b, c], [0.5, 2.0, -1.0])
    torch.testing.assert_close(total.tensors["n.weight"], GAINS["n.weight"] + torch.tensor([0.9, 0.2]))
    torch.testing.assert_close(total.tensors["m.weight"], GAINS["m.weight"] + torch.tensor([1.5, 2.5]))
    two = weighted_sum([a, b], [1, 1])
    for name, tensor in (a + b).tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor)
    assert torch.equal(weighted_sum([a, b], [1, 0]).tensors["n.weight"], a.tensors["n.weight"])
    assert total.record["made"]["how"] == "sum 0.5 2 -1" and len(total.record["made"]["of"]) == 3


def test_weighted_sum_of_tensors_without_a_base() -> None:
    a, b = small(1.0, n=[0.1, 0.1]), small(3.0, n=[0.1, 0.1])
    assert weighted_sum([a, b], [0.25, 0.75]).tensors["c.weight"].tolist() == [2.5, 2.5]
    assert weighted_sum([a, a], [2, 2]).tensors["c.weight"].tolist() == [1.0, 1.0]
    assert weighted_sum([a, b], [1, 1], keep_rest=True).tensors["c.weight"].tolist() == [1.0, 1.0]
    assert weighted_sum([a, b], [0.25, 0.75], keep_rest=True).tensors["c.weight"].tolist() == [2.5, 2.5]
    for others, weights, words in (
        ([a, b], [1, 1], "weights sum to 2"),
        ([a, small(n=[0.0, 0.0])], [0.5, 0.5], "not all adapters"),
        ([a], [1, 1], "one weight for each"),
        ([a, b], [float("nan"), 1], "finite"),
    ):
        with pytest.raises(InputError, match=words):
            weighted_sum(others, weights)


def test_merge_says_which_gate_holds(
    mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(mllm, tmp_path / "a", ["norms"])
    write_adapter(mllm, tmp_path / "b", ["norms"], 1, gate="image")
    assert run("merge", "b", "a", "--out", "gated") == 0
    assert "the gates differ (image of b, none of a): the first's holds" in capsys.readouterr().out
    assert run("merge", "a", "b", "--out", "open", "--json") == 0
    assert document(capsys.readouterr().out)["gate"] == "none"
    assert [Adapter.read(name).record["gate"] for name in ("gated", "open")] == ["image", None]
    assert run("merge", "a", "b", "--weights", "", "--out", "new") == 2


def test_merge_of_several_and_between_two(
    mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_adapter(mllm, tmp_path / name, seed=seed)
    assert run("merge", "a", "b", "--weights", "0.25,0.75", "--out", "mixed") == 0
    assert "different, mixed by value" in capsys.readouterr().out
    assert run("merge", "a", "b", "--weights", "1,1", "--keep-rest", "--out", "kept") == 0
    assert "different, kept as the first's" in capsys.readouterr().out
    a, b, mixed = (Adapter.read(name) for name in ("a", "b", "mixed"))
    for name, tensor in mixed.tensors.items():
        torch.testing.assert_close(tensor, 0.25 * a.tensors[name] + 0.75 * b.tensors[name], rtol=0, atol=1e-6)
    model, _ = load(mllm)
    load_adapter(model, "mixed")
    assert run("merge", "a", "b", "--interpolate", "--out", "between", "--json") == 0
    made = document(capsys.readouterr().out)["made"]
    assert sorted(made) == [f"share {share}" for share in ("0", "0.25", "0.5", "0.75", "1")]
    for name, tensor in Adapter.read("between/share-1").tensors.items():
        assert torch.equal(tensor, b.tensors[name])
    for name, tensor in Adapter.read("between/share-0.75").tensors.items():
        torch.testing.assert_close(tensor, mixed.tensors[name], rtol=0, atol=1e-6)
    assert run("merge", "a", "--weights", "0.5", "--out", "half") == 0
    half, base = Adapter.read("half"), a.base
    for name in half.tensors.keys() & base.keys():
        torch.testing.assert_close(half.tensors[name], 0.5 * (a.tensors[name] + base[name]), rtol=0, atol=1e-6)
    assert run("merge", "a", "--out", "folded", "--json") == 0
    assert document(capsys.readouterr().out)["survival"]["worst"] == 1.0 and Path("folded/config.json").is_file()
    wrong = [
        (["a", "b", "--weights", "1"], "one weight for each"), (["a", "b", "--weights", "1,x"], "--weights 1,x"),
        (["a", "b", "--weights", "1,1"], "sum to 2"), (["a", "--interpolate"], "between two adapters"),
        (["a", "a"], "named twice"), (["a", "b", "--dtype", "float32"], "--dtype"),
        (["a", "none"], "no adapter in none"),
        (["a", "--benchmarks", "pope"], "normtune evaluate"),
        (["a", "b", "--benchmarks", "pope"], "give --data"),
        (["a", "b", "--benchmarks", "popee", "--data", "x"], "popee"),
        (["a", "b", "--benchmarks", "pope", "--data", "nowhere"], "nowhere"),
        (["a", "b", "--interpolate", "--shares", "2"], "share 2"),
        (["a", "b", "--interpolate", "--weights", "1,0"], "leave one of them out"),
        (["a", "b", "--shares", "0.5"], "--shares go with --interpolate"),
        (["a", "b", "--data", "world:eval"], "name the --benchmarks"),
    ]  # fmt: skip
    for arguments, words in wrong:
        assert run("merge", *arguments, "--out", "new") == 2
        assert words in capsys.readouterr().err, arguments
        assert not Path("new").exists()


@pytest.mark.heavy
def test_merge_scores_sources_and_results_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from normtune.tuned import build

    monkeypatch.chdir(tmp_path)
    recipe = {"llm": "world:llm", "vision": "world:vision", "dtype": "float32"}
    from normtune.world import resolve_path

    real = {key: resolve_path(value) if value.startswith("world:") else value for key, value in recipe.items()}
    for seed, name in enumerate("ab"):
        model, _ = build(ModelRecipe.model_validate(real))
        apply(model, ["norms"])
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, name, base={"model": real, "seed": 0})
    score = ("--benchmarks", "pope", "--data", "world:eval", "--limit", "6")
    assert run("merge", "a", "b", "--out", "mixed", *score, "--json") == 0
    scores = document(capsys.readouterr().out)["scores"]
    assert list(scores) == ["a", "b", "0.5 a + 0.5 b"]
    assert all(0 <= row["pope"]["score"] <= 1 and row["pope"]["items"] >= 6 for row in scores.values())
    assert run("evaluate", "mixed", "--benchmarks", "pope", "--data", "world:eval", "--limit", "6", "--json") == 0
    alone = document(capsys.readouterr().out)["scores"]["pope"]["score"]
    assert scores["0.5 a + 0.5 b"]["pope"]["score"] == alone
    assert run("merge", "a", "b", "--out", "mixed2", *score) == 0
    assert "95 % interval" in capsys.readouterr().out


def test_gguf_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match=r"normtune\[gguf\]"):
        apply_to_gguf(tuned(text_model()), tmp_path / "x.gguf", tmp_path / "y.gguf")


@pytest.mark.slow
def test_the_folder_answers_alike_in_an_environment_of_its_own(mllm: Path, tmp_path: Path) -> None:
    """NORMTUNE_PLAIN_PYTHON: of an environment with torch, transformers and pillow, without normtune."""
    python = os.environ.get("NORMTUNE_PLAIN_PYTHON")
    if not python:
        pytest.skip("set NORMTUNE_PLAIN_PYTHON, or run `python -m benchmarks.standalone RUN`, which makes one")
    write_adapter(mllm, tmp_path / "adapter")
    command = [sys.executable, "-m", "benchmarks.standalone", str(tmp_path / "adapter"), "--python", python]
    subprocess.run([*command, "--json", str(tmp_path / "result.json")], check=True, cwd=Path(__file__).parents[1])
    assert json.loads((tmp_path / "result.json").read_text())["same"] == 50
