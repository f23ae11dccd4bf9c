"""The recipe's schema: every field of the model, the stages and the evaluation, described once, on the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from normtune.errors import did_you_mean

STRATEGIES = ("connector", "layernorm", "layernorm-simple", "attn-qv", "attn-mlp", "lora", "full")
PARTS = (
    *("norms", "final_norm", "qk_norms", "vision_norms", "connector", "embed", "head"),
    *("attn_q", "attn_k", "attn_v", "attn_o", "attn_qv", "attn_qkv", "mlp", "llm", "lora", "bias"),
)
BENCHMARKS = ("pope", "mme", "vqav2", "coco", "flickr30k", "text")

PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelRecipe(Node):
    """Either `llm` and `vision` (assembled into a LLaVA model) or `path` (an existing MLLM)."""

    llm: str | None = Field(None, description="text LLM: folder or hub id")
    vision: str | None = Field(None, description="vision encoder: folder or hub id")
    connector: Literal["linear", "mlp"] = Field("mlp", description="linear (the paper's) or mlp (LLaVA-1.5's)")
    path: str | None = Field(None, description="an existing MLLM to tune instead of llm + vision")
    dtype: Literal["float32", "bfloat16", "nf4", "int8"] = Field(
        "bfloat16", description="of the frozen weights; nf4 and int8 quantize the LLM's blocks (needs bitsandbytes)"
    )
    shard: bool = Field(False, description="several processes: each keeps a share of the frozen weights (FSDP2)")
    trust_remote_code: list[str] = Field([], description="the references above whose own code may run")

    @model_validator(mode="after")
    def one_way(self) -> ModelRecipe:
        if self.path is None and (self.llm is None or self.vision is None):
            raise ValueError("give both llm and vision, or path: an existing multimodal model")
        if self.path is not None and (self.llm is not None or self.vision is not None):
            raise ValueError("path is an existing multimodal model: leave out llm and vision, or leave out path")
        named = [name for name in (self.llm, self.vision, self.path) if name is not None]
        for name in self.trust_remote_code:
            check_name(name, named, "model reference", hint="trust_remote_code repeats one of these")
        return self


class DataSource(Node):
    """One data file of a stage."""

    path: str = Field(
        description="LLaVA JSON or JSONL, parquet, or a folder that `datasets` saved; relative to the current directory"
    )
    images: str | None = Field(None, description="folder that the file's image names are relative to")
    kind: str | None = Field(None, description="label such as conversation, detail, reasoning")
    limit: PositiveInt | None = Field(None, description="use the first N samples")
    weight: Annotated[float, Field(gt=0, le=100)] = Field(1.0, description="samples per epoch, times the file")


class Lora(Node):
    """Options of the LoRA part."""

    rank: PositiveInt = Field(64, description="rank r of the update")
    alpha: Annotated[float, Field(gt=0)] = Field(128, description="scale: alpha / rank multiplies the update")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="dropout on the LoRA input")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="parts (attn_q, mlp, ...) or regex:PATTERN; default: every linear layer of the LLM's blocks"
    )


class Stage(Node):
    """One training pass: data, strategy, optimizer settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = Field(description="folder-safe name")
    strategy: str | list[str] = Field(description="a named strategy, or a list of parts")
    data: Annotated[list[DataSource], Field(min_length=1)] = Field(description="the files to train on")
    learning_rate: Annotated[float, Field(gt=0, lt=10, allow_inf_nan=False)] = Field(description="peak rate of AdamW")
    learning_rates: dict[str, Annotated[float, Field(gt=0, lt=10)]] = Field({}, description="peak rate by part")
    batch_size: PositiveInt = Field(128, description="samples per optimizer step, over all processes")
    micro_batch_size: PositiveInt | None = Field(
        None, description="samples per forward pass (default: batch_size up to 16)"
    )
    epochs: PositiveInt = Field(1, description="passes over the data; max_steps wins")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps")
    warmup_ratio: Share = Field(0.03, description="share of the steps that warm up linearly")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    weight_decay: NonNegative = Field(0.0, description="AdamW's; never on gains and biases")
    weight_decays: dict[str, NonNegative] = Field({}, description="weight decay by part")
    clip: NonNegative = Field(1.0, description="largest global gradient norm; 0 is off")
    max_length: PositiveInt = Field(2048, description="tokens per sample, image tokens included")
    packing: Literal["auto", True, False] = Field(
        "auto", description="samples end to end in one row, without padding; auto: where it was measured to be faster"
    )
    cache_features: bool = Field(False, description="encode each image once and keep its features on disk")
    compile: bool = Field(False, description="torch.compile each block")
    activations: Literal["exact", "8bit"] = Field("exact", description="what MLPs keep for backward; 8bit: int8")
    checkpoint_activations: bool = Field(False, description="recompute activations in backward: less memory, slower")
    lora: Lora = Field(Lora(), description="options of the lora part")
    evaluate_every: PositiveInt | None = Field(
        None, description="score the model as `evaluate` says every N steps, and after the last one"
    )

    @model_validator(mode="after")
    def known_names(self) -> Stage:
        if isinstance(self.strategy, str):
            check_name(self.strategy, STRATEGIES, "strategy", hint="or a list of parts: " + ", ".join(PARTS))
        else:
            if not self.strategy:
                raise ValueError("strategy is an empty list of parts: name at least one of " + ", ".join(PARTS))
            for part in self.strategy:
                if not part.startswith("regex:"):
                    check_name(part, PARTS, "part")
        for part in (*self.learning_rates, *self.weight_decays, *(self.lora.targets or ())):
            if not part.startswith("regex:"):
                check_name(part, PARTS, "part")
        return self


class Evaluation(Node):
    """What `normtune evaluate` and the demo score by default."""

    benchmarks: list[str] = Field(["pope"], description="any of " + ", ".join(BENCHMARKS))
    data: str = Field(description="folder with the benchmarks in their official layouts")
    dev: str | None = Field(None, description="the same for development: choose settings here, not on `data`")
    limit: PositiveInt | None = Field(None, description="items per benchmark")
    keep_best: str | None = Field(
        None, description="with evaluate_every: keep the best adapter by this score (pope, mme.perception, ...)"
    )

    @model_validator(mode="after")
    def known_names(self) -> Evaluation:
        for name in self.benchmarks:
            check_name(name, BENCHMARKS, "benchmark")
        if self.keep_best is not None:
            check_name(self.keep_best.partition(".")[0], self.benchmarks, "keep_best")
        return self


class Comparison(Node):
    """How strategies are compared, and what the demo uses."""

    learning_rates: dict[str, Annotated[float, Field(gt=0, lt=10)]] = Field(
        {}, description="peak rate of the last stage by strategy (parts joined by +); they differ 30-fold"
    )


class Recipe(Node):
    """A whole run: the model, the stages, the evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field("run", description="of the run folder")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of the connector, data order and dropout")
    model: ModelRecipe
    stages: Annotated[list[Stage], Field(min_length=1)]
    evaluate: Evaluation | None = None
    compare: Comparison = Field(Comparison(), description="rates for a comparison of strategies")
    gate: Literal["none", "image"] = Field(
        "none", description="image: banks, serve and chat run requests without an image on the base"
    )
    start_from: str | None = Field(None, description="a finished run whose stage 1 (the first stage) is reused")
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    threads: PositiveInt | None = Field(None, description="CPU threads (default: torch's own choice)")
    save_every: Annotated[str | int, Field(union_mode="left_to_right")] = Field(
        "10m", description="checkpoint every N steps (50) or minutes (10m)"
    )
    keep: PositiveInt = Field(2, description="checkpoints kept per stage")
    bad_samples: Literal["error", "skip"] = Field(
        "error", description="a sample that cannot be used: error stops, skip leaves it out and records it"
    )
    max_bad: Annotated[int, Field(ge=0)] | Share = Field(
        0.01, description="with skip: more than that stop: a number (20) or a share (0.01)"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite: stop, or skip the step's update"
    )
    watchdog: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        30, description="minutes without a completed step after which the stacks of all threads are printed; null: off"
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field([], description="also log there")

    @model_validator(mode="after")
    def consistent(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}; give each its own")
        parse_interval(self.save_every)
        if self.evaluate is None and any(stage.evaluate_every for stage in self.stages):
            raise ValueError("evaluate_every needs an `evaluate` section: which benchmarks, where their files are")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise ValueError(f"device {self.device!r} is unknown; use auto, cpu, cuda, cuda:0 or mps")
        return self


def parse_interval(value: str | int) -> tuple[int | None, float | None]:
    """`50` -> (50, None) steps; `10m` -> (None, 600.0) seconds.

    Raises:
        ValueError: for anything else.
    """
    text = str(value).strip()
    if text.isdigit() and int(text) > 0:
        return int(text), None
    try:
        minutes = float(text[:-1]) if text.endswith("m") else 0.0
    except ValueError:
        minutes = 0.0
    if minutes <= 0:
        raise ValueError(f"save_every {value!r}: give steps (50) or minutes (10m)")
    return None, minutes * 60


def check_name(name: str, known: Sequence[str], what: str, hint: str = "") -> None:
    """Raises ValueError, which pydantic reports with the field, if `name` is not one of `known`."""
    if name not in known:
        known_text = ", ".join(known) + (f"; {hint}" if hint else "")
        raise ValueError(f"unknown {what} {name!r}{did_you_mean(name, known)}; known: {known_text}")
