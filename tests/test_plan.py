"""FLOPs and memory of a step, planned, beside what torch counts of a real one and what a process really holds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from normtune.cli import main
from normtune.cli.plan import parse_memory
from normtune.errors import InputError
from normtune.flops import causal_pairs, count_flops, peak_rate
from normtune.memory import Job, Shape, plan_recipe, plan_step, shape_of
from normtune.memory.ledger import Ledger
from normtune.memory.quantized import int8_bytes, nf4_bytes
from normtune.recipe import Recipe, Stage
from normtune.step import MICRO_BATCH, make_optimizer, supervised_loss
from normtune.strategy import apply, lean

pytestmark = pytest.mark.heavy

IMAGE, PATCHES, B, S, SUPERVISED = 499, 16, 2, 64, 10
STRATEGIES = ("full", "lora", "layernorm", "layernorm-simple")


def stage(strategy: str | list[str], **options: Any) -> Stage:
    fields = {"name": "plan", "strategy": strategy, "data": [{"path": "none"}], "learning_rate": 1e-3}
    return Stage.model_validate({**fields, **options})


def text_config(**sizes: Any) -> LlamaConfig:
    small = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaConfig(**{**small, "num_key_value_heads": 2, "vocab_size": 500, **sizes})


def vision_config(**sizes: Any) -> CLIPVisionConfig:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**small, "image_size": 32, "patch_size": 8, **sizes})


def llava(device: str = "meta", dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> nn.Module:
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text_config(**sizes), image_token_id=IMAGE, image_seq_length=PATCHES
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Llava._from_config(config, dtype=dtype)


def total(by_cause: dict[str, Any]) -> int:
    return sum(sum(v.values()) if isinstance(v, dict) else v for v in by_cause.values())


def samples(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 400, (B, S))
    ids[:, :PATCHES] = IMAGE
    labels = ids.clone()
    labels[:, : S - SUPERVISED] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(B, 3, 32, 32).to(dtype)}


class NoModules:
    """In place of FlopCounterMode's tracker of modules, whose hooks do not take a backward within a backward."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...
    def __exit__(self, *rest: Any) -> None: ...


def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of a real step by torch's counter, with whole squares for attention."""

    def forward(q: list[int], *rest: Any, **options: Any) -> int:
        b, heads, s, d = q
        return 4 * b * heads * s * s * d

    def backward(grad: list[int], q: list[int], *rest: Any, **options: Any) -> int:
        return 2 * forward(q)

    own, aten = torch.ops.normtune, torch.ops.aten
    mapping = {own.attend: forward, own.attend_backward: backward}
    mapping[aten._scaled_dot_product_flash_attention_for_cpu] = forward
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = NoModules()  # type: ignore[assignment]
    with counter:
        supervised_loss(model, batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "strategy",
    [*STRATEGIES, "connector", "attn-qv", "attn-mlp", ["head"], ["final_norm"], ["attn_qv"], ["vision_norms"], ["mlp"]],
    ids=str,
)
def test_flops_are_those_that_torch_counts(strategy: str | list[str]) -> None:
    model, batch = llava("cpu", torch.float32), samples(torch.float32)
    apply(model, strategy, rank=8, dropout=0.0)
    lean(model)
    model.train()
    supervised_loss(model, batch)  # finds what becomes of the logits, which takes a run
    found = count_flops(model).step(B * S, B * SUPERVISED, images=B, pairs=B * S * S)
    # the encoder's last block is run and not used, and counts as if it were
    assert found == pytest.approx(counted(model, batch), rel=0.015 if strategy == ["vision_norms"] else 0.005)


@pytest.mark.parametrize("strategy", ["layernorm-simple", "connector"])
def test_stored_features_cost_the_connector(strategy: str) -> None:
    model, batch = llava("cpu", torch.float32), samples(torch.float32)
    apply(model, strategy)
    lean(model)
    model.train()
    pixels = batch.pop("pixel_values")
    batch["features"] = torch.randn(len(pixels), PATCHES, 64)
    supervised_loss(model, dict(batch))
    found = count_flops(model, cached=True)
    weights = 64 * 128 + 128 * 128
    trained = 2 * weights + 2 * 128 * 128  # gradients of both weights, and of the second layer's input
    assert found.image == PATCHES * (2 * weights + (trained if strategy == "connector" else 0))
    cost = found.step(B * S, B * SUPERVISED, images=B, pairs=B * S * S)
    assert cost == pytest.approx(counted(model, batch), rel=0.005)
    planned = plan_step(llava(), stage(strategy, cache_features=True), Shape(B, S, SUPERVISED))
    assert planned.step_flops == found.step(B * S, B * SUPERVISED, images=B, pairs=causal_pairs([S] * B))


def test_a_frozen_base_costs_four_and_not_six() -> None:
    costs = {}
    for strategy in ("full", "layernorm-simple", "final_norm"):
        model = llava()
        apply(model, [strategy] if strategy == "final_norm" else strategy)
        costs[strategy] = count_flops(model).token
    weights = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 344)
    assert costs == {"full": 6 * weights, "layernorm-simple": 4 * weights, "final_norm": 2 * weights}


def test_experts_count_as_many_as_a_token_passes() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model("mixtral", num_hidden_layers=1, vocab_size=50, num_local_experts=8, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    apply(model, ["norms"])
    attention, expert = 4 * 64 * 64, 3 * 64 * 128
    assert count_flops(model).token == pytest.approx(4 * (attention + 2 * expert), rel=0.02)  # the router aside


def test_rates_of_datasheets() -> None:
    assert peak_rate("NVIDIA H200") == peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_rate("NVIDIA A100-SXM4-80GB") == 312e12 and peak_rate("NVIDIA H100 PCIe") == 756e12
    assert peak_rate("NVIDIA L4") == 121e12 and peak_rate("NVIDIA L40S") == 362e12
    assert peak_rate("Tesla T4") is None and peak_rate("Tesla T4", torch.float16) == 65e12
    assert peak_rate("NVIDIA GeForce RTX 4090") == 165e12 and peak_rate("Some CPU") is None
    assert peak_rate("NVIDIA H100 NVL") == 835e12 and peak_rate("NVIDIA A10G") is None
    for other in ("RTX 4090 Laptop GPU", "RTX 3090 Ti", "RTX 4090 D", "H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_rate(f"NVIDIA {other}") is None
    assert causal_pairs([3, 1]) == 7


def test_the_ledger_counts_storages_while_they_live() -> None:
    with Ledger(block=512) as ledger:
        x = torch.zeros(100)
        assert ledger.total == 512
        view = x[:10].view(2, 5)
        y = view + 1
        assert ledger.total == 1024
        ledger.move(view, "weights")
        del x
        assert ledger.total == 1024  # the view still holds it
        del view
        assert ledger.total == ledger.causes["workspace"] == 512 and y.sum() == 10
        ledger.watch()
        torch.ones(1000)
    assert ledger.peak == 4096 + 512 and ledger.at_peak["workspace"] == ledger.peak


def real_peak(strategy: str) -> int:
    """Bytes at the peak of the second real step, by the same ledger on tensors that have values."""
    model, made = llava("cpu"), stage(strategy)
    report = apply(model, strategy, **made.lora.model_dump())
    assert report.parameters
    lean(model, made.activations)
    model.train()
    optimizer = make_optimizer(model, made)
    with Ledger(block=1) as ledger:
        for tensor in [*model.parameters(), *model.buffers()]:
            ledger.note(tensor, "model")
        for _ in range(2):
            ledger.watch()
            (supervised_loss(model, samples()) / 20).backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return ledger.peak


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plan_is_the_real_step(strategy: str) -> None:
    found = plan_step(llava(), stage(strategy), Shape(B, S, SUPERVISED), block=1)
    assert found.peak_bytes == pytest.approx(real_peak(strategy), rel=0.01)
    assert total(found.by_cause) == found.peak_bytes


def test_causes_are_the_bytes_that_backward_needs() -> None:
    """A shape whose activations decide the peak; for each token and block, in bytes of bf16."""
    hidden, wide, blocks, tokens = 128, 344, 3, 2 * 512
    found = plan_step(llava(), stage("layernorm-simple"), Shape(2, 512, SUPERVISED), block=1)
    kept = found.by_cause["activations"]
    lse, mask = 4 * 4 * tokens * blocks, 2 * 512 * 512
    # norms: the inputs of two in a block and of the final one
    assert kept["norm inputs"] == pytest.approx(2 * tokens * hidden * (2 * blocks + 1), rel=0.15)
    assert kept["q k v"] == pytest.approx(2 * tokens * 2 * hidden * blocks + lse + mask, rel=0.05)
    assert kept["attention output"] == 2 * tokens * hidden * blocks
    assert kept["gate and up"] == 2 * tokens * 2 * wide * blocks
    assert found.by_cause["trainable"] == found.trainable_bytes == 4 * 2 * blocks * hidden
    assert found.by_cause["optimizer"] == pytest.approx(2 * found.trainable_bytes, rel=0.1)
    assert "lora" not in kept and kept["vision"] == 0


@pytest.mark.slow
def test_options_of_a_stage_show() -> None:
    def peak(strategy: str = "layernorm-simple", dtype: str = "bfloat16", micro: int = 1, **options: Any) -> Any:
        return plan_step(llava(), stage(strategy, **options), Shape(2, 512, SUPERVISED, micro), dtype).by_cause

    plain = peak()
    assert peak(activations="8bit")["activations"]["gate and up"] < 0.6 * plain["activations"]["gate and up"]
    again = peak(checkpoint_activations=True)
    assert sum(again["activations"].values()) < 0.3 * sum(plain["activations"].values())
    assert peak(cache_features=True)["weights"] < plain["weights"]
    assert peak(dtype="nf4")["weights"] < peak(dtype="int8")["weights"] < plain["weights"]
    # a second micro-batch finds the gradients of the first
    assert total(peak("full", micro=2)) > total(peak("full"))


def test_recomputing_is_noted_and_done_as_in_training(recwarn: pytest.WarningsRecorder) -> None:
    """transformers warns of a function with an old name."""
    found = plan_step(llava(), stage("layernorm-simple", checkpoint_activations=True), Shape(1, S, SUPERVISED))
    assert any("not counted" in note for note in found.notes)
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize("strategy", ["layernorm", "lora"])
def test_other_architectures_are_planned(kind: str, strategy: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {**sizes, "num_hidden_layers": 2, "head_dim": 16, "pad_token_id": 0}
    if kind == "gpt2":
        fields = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=200, **fields))
    found = plan_step(model, stage(strategy), Shape(1, 32, 4), "nf4")
    assert total(found.by_cause) == found.peak_bytes > found.by_cause["weights"] > 0
    assert found.by_cause["activations"]["norm inputs"] and found.lora_rank == (64 if strategy == "lora" else None)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_bytes_are_those_of_bitsandbytes(double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes")
    for shape in ((96, 128), (64, 4096), (100, 77)):
        packed, state = functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=double)
        tensors = [packed, state.absmax, state.code]
        if double:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
        assert nf4_bytes(shape[0] * shape[1], double) == sum(t.nbytes for t in tensors)


def test_int8_bytes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes")
    packed, scales, _ = functional.int8_vectorwise_quant(torch.randn(96, 128, dtype=torch.float16))
    assert int8_bytes(96, 128) == packed.nbytes + scales.nbytes


@pytest.mark.parametrize("memory", [0.4e6, 3e6, pytest.param(30e6, marks=pytest.mark.slow)])
def test_the_largest_batch_fits_and_one_more_does_not(memory: float) -> None:
    job = Job(llava, stage("layernorm-simple"), Shape(1, 64, SUPERVISED), "bfloat16")
    best, limit = job.largest_batch(memory), 0.95 * memory
    assert best == 0 or job.plan(best).peak_bytes <= limit
    assert job.plan(best + 1).peak_bytes > limit
    assert (best == 0) == (memory < 1e6)


@pytest.mark.slow
def test_the_largest_batch_accumulates_as_planned() -> None:
    """Gradients of the micro-batch before are there; without them one sample more would fit."""
    memory, shape = 40e6, Shape(1, 256, SUPERVISED, micro_batches=2)
    limit = int(0.95 * memory)

    def peak(batch: int, micro: int) -> int:
        return plan_step(llava(), stage("full"), replace(shape, batch=batch, micro_batches=micro)).peak_bytes

    best = Job(llava, stage("full"), shape, "bfloat16").largest_batch(memory)
    assert peak(best, 2) <= limit < peak(best + 1, 2)
    assert peak(best + 1, 1) <= limit


def test_words_for_memory() -> None:
    assert parse_memory("24GB") == parse_memory("24") == 24e9 and parse_memory("80 GiB") == 80 * 2**30
    for text in ("much", "-3GB", "GB", "nanGB", "infGB"):
        with pytest.raises(InputError, match="24GB"):
            parse_memory(text)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text_config().save_pretrained(tmp_path / "llm")
    vision_config().save_pretrained(tmp_path / "vision")
    return tmp_path


def run(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.heavy
def test_plan_prints_a_document(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["plan", "--llm", "llm", "--vision", "vision", "--length", "64", "--supervised", "10", "--batch", "2"]
    more = ["--compare", "lora,layernorm", "--lora-rank", "8", "--gpu-memory", "20MB", "--rate", "0.001", "--json"]
    assert run(*parts, *more) == 0
    found = json.loads(capsys.readouterr().out)
    lora, norms = found["plans"]
    assert (lora["strategy"], lora["lora_rank"], norms["lora_rank"]) == ("lora", 8, None)
    assert lora["ratio"] == 1 and norms["ratio"] == norms["peak_bytes"] / lora["peak_bytes"] < 1
    assert total(norms["by_cause"]) == norms["peak_bytes"] and norms["largest_batch"] > lora["largest_batch"] > 1
    assert norms["seconds"] == pytest.approx(norms["flops_per_token"] * 128 / 1e9)
    assert norms["total_parameters"] == sum(found["denominator"].values()) < lora["total_parameters"]
    assert norms["batch"] == 2 and norms["length"] == 64 and norms["supervised"] == 10


def test_plan_prints_a_table(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--llm", "llm", "--compare", "lora,layernorm-simple", "--length", "128") == 0
    text = capsys.readouterr().out
    assert "lora (r = 64)" in text and " of lora " in text and "layernorm-simple keeps for backward" in text
    assert "note: planned for a GPU, padded rows" in text and "note: a step of one micro-batch" in text
    assert "(64 supervised)" in text  # half of the tokens


@pytest.mark.heavy
def test_rows_of_a_piped_table_are_lines(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--compare", "lora,layernorm", "--length", "200", "--gpu-memory", "2MB", "--rate", "1"]
    assert run("plan", "--llm", "llm", "--vision", "vision", *more) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith(" strategy"))
    assert all(word in lines[header].split() for word in ("weights", "trained", "AdamW", "s/micro-batch", "tokens/s"))
    assert [line.split()[0] for line in lines[header + 2 : header + 4]] == ["lora", "layernorm"]
    assert max(map(len, lines[: header + 4])) <= 160
    assert "layernorm / lora: 0." in text and "largest: samples" in text


@pytest.mark.heavy
def test_what_nobody_named_is_left_out(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--llm", "llm", "--dtype", "nf4", "--length", "32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in found["plans"]] == ["lora", "layernorm", "layernorm-simple"]
    assert "full trains" in found["refused"]["full"] and "nf4" in found["refused"]["full"]


def test_a_model_is_built_once_for_one_plan(
    configs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from normtune import skeletons

    made = []
    build = skeletons.skeleton
    monkeypatch.setattr(skeletons, "skeleton", lambda name: made.append(name) or build(name))
    assert run("plan", "--llm", "llm", "--strategy", "layernorm", "--length", "32") == 0
    assert made == ["llm"]


def test_wrong_arguments_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from normtune.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    for options in (["--gpu-memory", "big"], ["--compare", "lora,"], ["--parameters", "--rate", "1"]):
        command = [sys.executable, "-c", code, "plan", "--llm", "llm", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == "2 False\n", done.stderr


def write_recipe() -> dict[str, Any]:
    source = [{"path": "none.json"}]
    recipe = {
        "model": {"llm": "llm", "vision": "vision", "dtype": "nf4"},
        "stages": [
            {"name": "align", "strategy": "connector", "data": source, "learning_rate": 1e-3, "max_length": 512},
            {
                **{"name": "instruct", "strategy": ["norms", "lora"], "data": source, "learning_rate": 1e-3},
                **{"max_length": 64, "micro_batch_size": 3, "lora": {"rank": 4, "targets": ["attn_q"]}},
            },
        ],
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))  # YAML, too
    return recipe


@pytest.mark.heavy
def test_a_recipe_is_planned_by_its_own_stages(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe()
    assert run("plan", "recipe.yaml", "--rate", "0.001", "--json") == 0
    align, instruct = json.loads(capsys.readouterr().out)["plans"]
    # by default a GPU packs rows of 8,192 tokens, a batch of 128 samples fills some
    assert (align["stage"], align["length"], align["batch"], align["micro_batches"]) == ("align", 512, 16, 2)
    assert (instruct["batch"], instruct["lora_rank"], instruct["dtype"]) == (3, 4, "nf4")
    assert instruct["step_seconds"] == pytest.approx(instruct["seconds"] * 128 / 3)
    assert align["notes"][0] == "planned for a GPU, packed rows of 8,192 tokens"
    direct = plan_recipe(Recipe.model_validate(recipe))
    assert [p.peak_bytes for p in direct] == [align["peak_bytes"], instruct["peak_bytes"]]


def test_options_replace_what_a_recipe_says(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe()
    options = ["--strategy", "lora", "--batch", "200", "--length", "50", "--lora-rank", "2", "--dtype", "bfloat16"]
    assert run("plan", "recipe.yaml", *options, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["plans"]
    assert (row["stage"], row["batch"], row["length"], row["supervised"]) == ("instruct", 200, 50, 25)
    assert (row["micro_batches"], row["lora_rank"], row["dtype"]) == (1, 2, "bfloat16")
    matrices = 3 * 2 * (128 + 128)  # of attn_q in three blocks: what is not said stays as it was
    other = 2 * 500 * 128 + (64 + 1) * 128 + (128 + 1) * 128
    assert row["trainable_parameters"] == matrices + other


def test_parameters_are_counted_with_the_lora_of_the_recipe(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe()
    for options, rank in ([], 4), (["--lora-rank", "2"], 2):
        assert run("plan", "recipe.yaml", "--parameters", "--compare", "lora,layernorm-simple", "--json", *options) == 0
        lora, norms = json.loads(capsys.readouterr().out)["plans"]
        assert lora["strategy"] == f"lora (r = {rank})"
        assert lora["total_parameters"] - norms["total_parameters"] == 3 * rank * (128 + 128)


def test_the_largest_micro_batch_of_a_stage() -> None:
    def samples_in(device: str = "auto", **options: Any) -> tuple[int, int]:
        shape = shape_of(stage("full", max_length=512, **options), device)
        return shape.batch, shape.micro_batches

    assert samples_in() == (8192 // 512, 2) and samples_in("cpu") == (2048 // 512, 2)
    assert samples_in(micro_batch_size=3) == (3, 2) and samples_in(batch_size=4) == (4, 1)
    assert samples_in(packing=False) == (MICRO_BATCH, 2) == samples_in("mps")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", "20"], ["length 20", "16 tokens of an image"]),
        (["--strategy", "full", "--compare", "lora"], ["--strategy", "--compare"]),
        (["--gpu-memory", "big"], ["24GB"]),
        (["--strategy", "full", "--dtype", "nf4"], ["full trains", "nf4", "bfloat16"]),
        (["--compare", ""], ["unknown strategy ''"]),
        (["--parameters", "--batch", "2", "--rate", "1", "--gpu-memory", "1GB"], ["--batch, --gpu-memory, --rate"]),
        (["--parameters", "--length", "9", "--dtype", "nf4"], ["--length, --dtype"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_wrong_options_exit_2(
    options: list[str], words: list[str], configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "--llm", "llm", "--vision", "vision", *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and len(error[error.index("normtune:") :].strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["recipe.yaml", "--vision", "vision"], ["--vision", "recipe names"]),
        (["recipe.yaml", "--connector", "mlp"], ["--connector", "recipe names"]),
        (["recipe.yaml", "--strategy", "full"], ["full trains", "nf4"]),
        (["--llm", "llm", "--connector", "mlp"], ["--connector", "without --vision"]),
        (["--llm", "llm", "--length", "8", "--supervised", "8"], ["length 8", "8 supervised"]),
    ],
    ids=lambda value: " ".join(value[:3]),
)
def test_no_option_is_dropped(
    options: list[str], words: list[str], configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe()
    assert run("plan", *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and len(error[error.index("normtune:") :].strip().splitlines()) <= 3


def plan_13b(folder: Path, compare: str) -> tuple[dict[str, Any], int]:
    """Plans by strategy, and the bytes that the process which made them held at most."""
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    text_config(**sizes, num_key_value_heads=40, vocab_size=32000).save_pretrained(folder / "llm")
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision_config(**tower, patch_size=14, image_size=224).save_pretrained(folder / "vision")
    options = ["--compare", compare, "--batch", "1", "--length", "776", "--json"]
    code = (
        "import resource, sys; from normtune.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "plan", "--llm", "llm", "--vision", "vision", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return {p["strategy"]: p for p in json.loads(done.stdout)["plans"]}, int(done.stderr.split()[-1])


@pytest.mark.slow
def test_norm_tuning_of_13b_fits_where_it_should(tmp_path: Path) -> None:
    plans, held = plan_13b(tmp_path, "layernorm-simple")
    assert plans["layernorm-simple"]["peak_bytes"] <= 28.7 * 2**30 and held < 4e9


@pytest.mark.slow
def test_norm_tuning_of_13b_beside_lora(tmp_path: Path) -> None:
    plans, held = plan_13b(tmp_path, "lora,layernorm")
    assert plans["layernorm"]["peak_bytes"] <= 32.5 * 2**30 and held < 4e9
    assert plans["layernorm"]["ratio"] <= 0.72 and plans["lora"]["lora_rank"] == 64


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads resident memory as Linux reports it")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plan_is_what_a_process_holds(strategy: str) -> None:
    from benchmarks.memory import measured_apart, planned

    assert measured_apart(strategy, 1, 512, 100) == pytest.approx(planned(strategy, 1, 512, 100).peak_bytes, rel=0.1)
