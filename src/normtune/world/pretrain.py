"""Pretrains the tiny language model on the text corpus: a stock LlamaForCausalLM, answers supervised.

Matrices of the blocks are trained with Muon, the rest with AdamW; the rate is constant until look-up has
emerged and then falls (decay in the plateau leaves a model without the skill). Soft positions get a little
noise and a random scale.

Not here: what the documents say (`corpus`), what the model can do (`ceilings`), the encoders (`vision`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from normtune.errors import JobError
from normtune.runlog import append_line, atomic_folder, read_lines
from normtune.world import corpus, scenes, text
from normtune.world.ceilings import embed, measure, right, see, tell
from normtune.world.tokens import tokenizer

MINUTES = 36.0  # that the unscaled plan took on one core of an AMD EPYC with AVX512-BF16, a third of it lent to others
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """One pretraining. Levels of documents: `narrow` steps of the first, `told` of the second, the rest of the last.

    `batches`: documents per step at each level; `decay`: last share of the steps, in which the rates fall. Before the
    second level the model grows from `first_layers` to `layers`.
    """

    steps: int = 4900
    narrow: int = 540
    told: int = 660
    batches: tuple[int, int, int] = (24, 24, 32)
    matrix_rate: float = 2e-3
    other_rate: float = 2e-3
    warmup: int = 50
    decay: float = 0.35
    seed: int = 0
    hidden: int = 160
    first_layers: int = 4
    layers: int = 6
    heads: int = 5
    mlp: int = 384

    def scaled(self, factor: float) -> Plan:
        """The same plan in `factor` times as many steps."""
        steps, narrow, told = (max(1, round(number * factor)) for number in (self.steps, self.narrow, self.told))
        return replace(self, steps=max(steps, narrow + told + 1), narrow=narrow, told=told)

    def level(self, step: int) -> int:
        """The level of the documents at a step."""
        return (step >= self.narrow) + (step >= self.narrow + self.told)

    def rate(self, step: int) -> float:
        """Factor of the learning rates: warm-up (again after growing), constant, linear fall to 2 %."""
        since = step if step < self.narrow else step - self.narrow
        start = self.steps * (1 - self.decay)
        fall = 1.0 if step < start else max(0.02, (self.steps - step) / max(1.0, self.steps - start))
        return min(1.0, (since + 1) / self.warmup) * fall


def build_model(plan: Plan, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights; embedding and head are untied."""
    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=len(corpus.vocabulary()),
        hidden_size=plan.hidden,
        intermediate_size=plan.mlp,
        num_hidden_layers=layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=corpus.BOS,
        eos_token_id=corpus.END,
        pad_token_id=corpus.PAD,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # its backward is 1.6 times faster than sdpa on a CPU at this length
    return model


def grow(small: LlamaForCausalLM, plan: Plan) -> LlamaForCausalLM:
    """The same function with fresh layers in front, whose output is zero at first.

    Pooled phrases teach the first layers to look up. The words of a sentence have to be gathered before that.
    """
    model = build_model(plan, plan.layers)
    fresh = plan.layers - small.config.num_hidden_layers
    weights = model.state_dict()
    for name, weight in small.state_dict().items():
        head, found, tail = name.partition(".layers.")
        if found:
            number, _, rest = tail.partition(".")
            name = f"{head}.layers.{int(number) + fresh}.{rest}"
        weights[name] = weight
    for number in range(fresh):
        for matrix in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{number}.{matrix}.weight"].zero_()
    model.load_state_dict(weights)
    return model


def loss_of(model: LlamaForCausalLM, batch: corpus.Batch, noise: torch.Generator | None) -> torch.Tensor:
    """Weighted mean cross entropy over the supervised tokens; the head runs on these alone."""
    embeddings = embed(model, batch, noise)
    hidden = model.model(inputs_embeds=embeddings, use_cache=False, **see(batch, embeddings.dtype)).last_hidden_state[
        :, :-1
    ]
    chosen = batch.weights[:, 1:] > 0
    logits = model.lm_head(hidden[chosen])
    weights = batch.weights[:, 1:][chosen]
    losses = functional.cross_entropy(logits.float(), batch.labels[:, 1:][chosen], reduction="none")
    return (losses * weights).sum() / weights.sum()


def optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding, head and gains."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=plan.other_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def _probe(model: LlamaForCausalLM, form: str, questions: int = 150) -> dict[str, float]:
    """Share of right answers of a few kinds: a progress report, not the ceilings of the finished model."""
    rng = np.random.default_rng((991, corpus.FORMS.index(form)))
    kinds = [text.existence, text.colour_of, text.position, text.count, text.relation]
    documents: list[corpus.Document] = []
    names: list[str] = []
    while len(documents) < questions:
        ask = kinds[len(documents) % len(kinds)]
        scene = scenes.sample(rng, "dev", 2, 4)
        qa = ask(rng, scene)
        if qa is not None:
            documents.append(tell(rng, scene, form))
            documents[-1].turn(qa.question, qa.answer)
            names.append(ask.__name__)
    hits = list(zip(names, right(model, documents), strict=True))
    mine = {name: [hit for other, hit in hits if other == name] for name in dict.fromkeys(names)}
    return {name: round(sum(found) / len(found), 3) for name, found in mine.items()}


def _save(path: Path, state: dict[str, Any]) -> None:
    """Complete or absent: written beside, then renamed."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def train(
    plan: Plan, checkpoint: Path, log: Log, *, report_every: int = 100, save_seconds: float = 300.0
) -> LlamaForCausalLM:
    """Trains to the end of the plan, from `checkpoint` if it exists; a checkpoint every five minutes.

    `log` receives one record per `report_every` steps. The data depend on (seed, step) only, so a resumed
    training sees the same batches as an uninterrupted one.
    """
    step, seconds, state = 0, 0.0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state["step"]
    model = build_model(plan, plan.first_layers if step <= plan.narrow else plan.layers)
    tools = optimizers(model, plan)
    if state is not None:
        model.load_state_dict(state["model"])
        for tool, saved in zip(tools, state["optimizers"], strict=True):
            tool.load_state_dict(saved)
        seconds = state["seconds"]
    begun, saved_at, losses = time.monotonic() - seconds, time.monotonic(), []
    model.train()
    while step < plan.steps:
        level = plan.level(step)
        if step == plan.narrow:
            model = grow(model, plan).train()
            tools = optimizers(model, plan)
        batch = corpus.batch(plan.seed, step, plan.batches[level], level)
        noise = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        for tool, rate in zip(tools, (plan.matrix_rate, plan.other_rate), strict=True):
            tool.param_groups[0]["lr"] = rate * plan.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        if not math.isfinite(losses[-1]):
            raise JobError(f"the loss of step {step} is not finite; try another --seed")
        if step % report_every == 0 or step == plan.steps:
            model.eval()
            record = {
                "step": step,
                "seconds": round(time.monotonic() - begun),
                "loss": round(float(np.mean(losses)), 4),
            }
            log({**record, **{form: _probe(model, form) for form in corpus.FORMS}})
            model.train()
            losses = []
        if time.monotonic() - saved_at > save_seconds or step == plan.steps:
            state = {"model": model.state_dict(), "optimizers": [tool.state_dict() for tool in tools]}
            _save(checkpoint, {**state, "step": step, "seconds": time.monotonic() - begun})
            saved_at = time.monotonic()
    return model.eval()


def build(out: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Makes `out`/llm, a stock Llama folder in bf16 with its tokenizer; one that is there already is kept.

    The number of steps is proportional to `minutes`, so that the result depends on the arguments
    only. An interrupted training goes on from `out`/llm.checkpoint. Returns parameters, bytes, the plan, the
    training log and the ceilings per form of the text.
    """
    folder, checkpoint, journal = out / "llm", out / "llm.checkpoint", out / "llm.jsonl"
    facts: dict[str, Any] = {}
    if not (folder / "config.json").is_file():
        plan = Plan(seed=seed).scaled(minutes / MINUTES)
        model = train(plan, checkpoint, lambda record: append_line(journal, record))
        export(model, folder)
        records = {record["step"]: record for record in read_lines(journal)}  # a resumed step is logged twice
        facts = {**asdict(plan), "log": [records[step] for step in sorted(records)]}
        checkpoint.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        **facts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "ceilings": {form: measure(model, form) for form in corpus.FORMS},
    }


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes the model in bf16 and its tokenizer, complete or absent."""
    with atomic_folder(folder, replace=True) as temporary:
        rounded = copy.deepcopy(model).to(torch.bfloat16)  # type: ignore[call-arg, arg-type]
        rounded.save_pretrained(temporary)
        tokenizer().save_pretrained(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes files for their owner alone
