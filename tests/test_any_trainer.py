"""The scripts of docs/any_trainer.md run and keep their promises; Trainer's, TRL's and accelerate's own options."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import normtune as nt
import zoo
from models import tiny_llm

pytestmark = pytest.mark.heavy

PAGE = (Path(__file__).parents[1] / "docs" / "any_trainer.md").read_text()
TRAINER, TRL, PLAIN = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BF16, F32 = torch.bfloat16, torch.float32


def needs(*packages: str) -> Any:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(code: str, folder: Path) -> str:
    """Output of a script in a process and folder of its own, on the CPU."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_the_script_for_trainer_keeps_its_promises(tmp_path: Path) -> None:
    output = run(TRAINER, tmp_path)
    first, last = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", output)[0])
    written, gains = map(int, re.findall(r"adapter (\d+) bytes, gains (\d+) bytes", output)[0])
    assert last < first - 0.2
    assert "100% of 2048 gains moved" in output
    assert gains == 4 * 2048 and written < 3 * gains
    assert len(TRAINER.strip().splitlines()) <= 25


@pytest.mark.slow
@needs("trl", "datasets")
def test_the_script_for_trl_runs(tmp_path: Path) -> None:
    tiny_llm(tmp_path / "llm", "qwen3")
    run(TRL.replace("path-or-hub-id", "llm").replace('"out", learning', '"out", use_cpu=True, learning'), tmp_path)
    assert (tmp_path / "out" / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.slow
@needs("bitsandbytes")
def test_the_plain_loop_for_a_quantized_base_runs(tmp_path: Path) -> None:
    folder = tiny_llm(tmp_path / "llm")
    run(PLAIN.replace("path-or-hub-id", "llm"), tmp_path)
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    base = {name: p.clone() for name, p in original.named_parameters()}
    nt.load_adapter(original, tmp_path / "out" / "nf4")
    changed = {name for name, p in original.named_parameters() if not torch.equal(p, base[name].to(p.dtype))}
    assert changed == {f"{name}.weight" for name in nt.anatomy(original).norms}


@needs("bitsandbytes")
def test_trainer_refuses_a_purely_quantized_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16)
    folder = tiny_llm(tmp_path / "llm")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=BF16)
    nt.apply(model, "layernorm-simple")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, options(tmp_path))


def options(folder: Path, **more: Any) -> TrainingArguments:
    """Three steps on the CPU."""
    given: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-5, "per_device_train_batch_size": 2, "use_cpu": True}
    return TrainingArguments(str(folder / "out"), report_to="none", disable_tqdm=True, **{**given, **more})


def fit(model: Any, given: TrainingArguments, **more: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (16, 10), generator=generator)]
    Trainer(model, given, train_dataset=data).train(**more)  # type: ignore[arg-type]


TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
}


@pytest.mark.parametrize("base", [F32, BF16], ids=["base-fp32", "base-bf16"])
@pytest.mark.parametrize("option", TRAINERS)
def test_options_of_trainer(option: str, base: torch.dtype, tmp_path: Path) -> None:
    model = zoo.model("qwen3").to(base)
    nt.apply(model, "layernorm-simple")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, options(tmp_path, save_strategy="no", **TRAINERS[option]))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == F32 and (parameter != before[name]).all(), name
        else:
            assert torch.equal(parameter, before[name]), name


@pytest.mark.heavy
def test_a_checkpoint_of_trainer_goes_on_with_the_fp32_gains(tmp_path: Path) -> None:
    """Three steps and three more equal six; what comes back from the file is not rounded."""
    finals = []
    for stops in ((6,), (3, 6)):
        model = zoo.model("qwen3").to(BF16)
        nt.apply(model, "layernorm-simple")
        for steps in stops:
            given = options(tmp_path / str(stops), max_steps=steps, save_steps=3, lr_scheduler_type="constant")
            fit(model, given, resume_from_checkpoint=steps != stops[0])
            if steps != stops[-1]:
                model = zoo.model("qwen3").to(BF16)
                nt.apply(model, "layernorm-simple")
        finals.append(torch.cat([p.detach() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("base", [F32, BF16], ids=["base-fp32", "base-bf16"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_mixed_precision_of_accelerate(precision: str, base: torch.dtype) -> None:
    """On a CPU accelerate takes "fp16" and runs without autocast; autocast itself is tested in test_precision.py."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    model = zoo.model("gpt2").to(base)
    nt.apply(model, "layernorm-simple")
    gains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in gains.items()}
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(gains.values(), lr=1e-5))
    accelerator.backward(prepared(**zoo.batch("gpt2")).loss)
    optimizer.step()
    assert all(p.dtype == F32 and (p != before[name]).all() for name, p in gains.items())
    AcceleratorState._reset_state(True)


@needs("trl", "datasets")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trainer(packing: bool, checkpointing: bool, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = tiny_llm(tmp_path / "llm", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    report = nt.apply(model, "layernorm-simple")
    before = {name: model.get_parameter(name).detach().clone() for name in report.trainable}
    turn = [{"role": "user", "content": "What comes after one?"}, {"role": "assistant", "content": "Two."}]
    given = SFTConfig(
        str(tmp_path / "out"), max_steps=2, learning_rate=1e-4, use_cpu=True, report_to="none", save_strategy="no",
        packing=packing, gradient_checkpointing=checkpointing, max_length=64, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"messages": turn}] * 16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    SFTTrainer(model, given, train_dataset=data, processing_class=tokenizer).train()
    assert all(model.get_parameter(name).dtype == F32 for name in before)
    assert all((model.get_parameter(name) != start).all() for name, start in before.items())
