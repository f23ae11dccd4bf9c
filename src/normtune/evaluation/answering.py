"""Greedy answers, or the likelihood of "Yes" and "No", in batches: questions in, what the model says out.

Scope: KV cache, stop tokens of the model's own chat template, how close each answer was to another one. Decoding is
transformers' `generate`, which knows positions and masks of every model. Likelihoods come from its first forward pass
alone: the head runs on the last position of each prompt and nothing is generated. Not here: sampling.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from normtune.chat import Chat, Turn
from normtune.errors import InputError
from normtune.evaluation.engines import Request, batches, engine_for
from normtune.features import Store

Mode = Literal["generate", "likelihood"]
MODES: tuple[Mode, ...] = ("generate", "likelihood")
CHOICES = ("Yes", "No")
TIE = 1e-4
"""A greedy answer is a tie if somewhere the second-best token's logit was that close: another batch may change it."""
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What a model said: the text, stripped; by how much the best token led where that was least (logits); and, by
    likelihood, log P of each of CHOICES."""

    text: str
    margin: float
    log_probabilities: tuple[float, float] | None = None


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[tuple[Sequence[Turn], Sequence[Image.Image | Path]]],
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """The model's greedy answers to conversations that end with a user's turn, in the order given, stripped.

    An item is its turns, with "<image>" in the text where each image goes, and its images, as objects or as
    paths that are opened in their turn. Modes and generation settings of the model are left as they were.
    InputError when images and "<image>" do not match, or for a file that is no image."""
    requests = [Request(tuple(turns), tuple(images), f"item {n}") for n, (turns, images) in enumerate(items)]
    texts = [""] * len(requests)
    for batch in generate(model, processor, requests, max_new_tokens, batch_size):
        for place, found in batch:
            texts[place] = found.text
    return texts


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    max_new_tokens: int,
    batch_size: int,
    known: Container[int] = (),
    store: Store | None = None,
) -> Generator[list[tuple[int, Answer]]]:
    """Batch by batch the greedy answers with their places in `requests`, without the places in `known`; an image whose
    features are in `store` is not encoded (see `engine_for`)."""
    chat = Chat.from_processor(processor)
    stops = stop_tokens(model, chat)
    with plain_greedy(model, processor.tokenizer, stops, max_new_tokens):
        for places, inputs in batches(engine_for(model, processor, chat, store), requests, batch_size, known):
            width = inputs["input_ids"].shape[1]
            margins = Margins()
            ids = model.generate(**inputs, logits_processor=LogitsProcessorList([margins]))[:, width:].tolist()
            leads = margins.rows()
            found = []
            for place, row, lead in zip(places, ids, leads, strict=True):
                end = next((n for n, token in enumerate(row) if token in stops), len(row))
                text = processor.tokenizer.decode(row[:end], skip_special_tokens=True)
                # thoughts in front of an answer are no answer
                found.append((place, Answer(_THOUGHT.sub("", text).strip(), min(lead[: end + 1], default=0.0))))
            yield found


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    batch_size: int,
    known: Container[int] = (),
    store: Store | None = None,
) -> Generator[list[tuple[int, Answer]]]:
    """As `generate`, but the text is the likelier of CHOICES, from one forward pass per batch.

    The log-probabilities are those of the first token in which the two answers differ, as the chat template writes
    them. InputError where the template puts them apart otherwise."""
    chat = Chat.from_processor(processor)
    start, first = choice_tokens(chat)
    with plain_greedy(model, processor.tokenizer, stop_tokens(model, chat), 1):
        for places, inputs in batches(engine_for(model, processor, chat, store), requests, batch_size, known):
            choice = Choice(first)
            model.generate(**continued(inputs, start), logits_processor=LogitsProcessorList([choice]))
            found = []
            for place, (yes, no) in zip(places, choice.rows(), strict=True):
                found.append((place, Answer(CHOICES[0] if yes > no else CHOICES[1], abs(yes - no), (yes, no))))
            yield found


class Margins(LogitsProcessor):
    """Changes nothing; notes by how much the best token of each step leads the second."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []  # [B] each

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.topk(2, dim=-1).values  # [B, 2]
        self.steps.append(best[:, 0] - best[:, 1])
        return scores

    def rows(self) -> list[list[float]]:
        return torch.stack(self.steps, dim=1).tolist()


class Choice(LogitsProcessor):
    """Changes nothing; keeps the log-probabilities of two tokens at the first step."""

    def __init__(self, tokens: tuple[int, int]) -> None:
        self.tokens = tokens
        self.found: torch.Tensor | None = None  # [B, 2]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.found is None:
            self.found = scores.float().log_softmax(dim=-1)[:, list(self.tokens)]
        return scores

    def rows(self) -> list[list[float]]:
        assert self.found is not None
        return self.found.tolist()


def choice_tokens(chat: Chat) -> tuple[list[int], tuple[int, int]]:
    """The tokens that both CHOICES begin with after a prompt, and the first one of each in which they differ."""
    question = Turn("user", "?")
    prompt = chat.prompt([question], [])
    yes, no = (chat.encode([question, Turn("assistant", text)], []).input_ids for text in CHOICES)
    common = next((n for n, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), -1)
    if common < len(prompt) or yes[: len(prompt)] != prompt:
        raise InputError(
            "mode likelihood: after this chat template 'Yes' and 'No' do not begin with tokens of their own.\n"
            "Use --mode generate."
        )
    return yes[len(prompt) : common], (yes[common], no[common])


def continued(inputs: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """The inputs of a batch with the same tokens after each prompt."""
    if not tokens:
        return inputs
    ids = inputs["input_ids"]
    more = torch.tensor([list(tokens)], device=ids.device).expand(len(ids), -1)
    longer = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == ids.shape:  # ids, mask, kinds of tokens (0 is text)
            kind = {"input_ids": more, "attention_mask": torch.ones_like(more)}.get(name, torch.zeros_like(more))
            longer[name] = torch.cat([value, kind.to(value.dtype)], dim=1)
    return longer


def stop_tokens(model: PreTrainedModel, chat: Chat) -> list[int]:
    """The template's stop tokens, and those that the model's own settings name (an LLM may have several)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return sorted({*chat.stop_ids, *([own] if isinstance(own, int) else own or [])})


@contextmanager
def plain_greedy(
    model: PreTrainedModel, tokenizer: Any, stop_ids: Sequence[int], max_new_tokens: int
) -> Iterator[None]:
    """Evaluation mode and plain greedy search for a while, then everything as before.

    The model's own generation settings are exchanged, not overridden: `generate` fills what a caller leaves
    open from them, and a repetition penalty (Qwen2.5 ships one) would change greedy answers."""
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stop_ids[0] if stop_ids else 0
    model.eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
    )
    try:
        yield
    finally:
        model.generation_config = settings
        for module, training in modes:
            module.training = training
