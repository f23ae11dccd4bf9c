"""Which token comes next: greedy, or drawn row by row from transformers' temperature and top-p.

Scope: one step of many rows. Each row that samples has a random generator of its own, so its tokens do not depend on
who else is in the batch. Not here: when a row ends (jobs.py). Source: transformers' logits processors.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from normtune.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and where it ends.

    `temperature` 0 is greedy; `top_p` keeps the likeliest tokens up to that share; without `seed` each answer is
    drawn anew; text from the first of `stop` on is not part of the answer.

    Raises:
        InputError: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give more than 0 and at most 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InputError("seed is no 64-bit number")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError("stop must be a list of texts, none of them empty")


class Sampler:
    """The random generator of one row, and its logits processors."""

    def __init__(self, sampling: Sampling) -> None:
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.process = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
        if sampling.top_p < 1:
            self.process.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, scores: torch.Tensor) -> int:
        """A token from the logits [V] of a row; RuntimeError for logits that are not finite."""
        weights = self.process(torch.empty(1, 0, dtype=torch.int64), scores[None].float().cpu()).softmax(dim=-1)
        return int(torch.multinomial(weights, 1, generator=self.generator))


def choose(logits: torch.Tensor, samplers: Sequence[Sampler | None], never: torch.Tensor) -> list[int | Exception]:
    """The next token of each row from logits [B, V], or why there is none; of the tokens `never` [N] none is chosen.

    Changes `logits`."""
    logits.index_fill_(1, never, -math.inf)
    tokens: list[int | Exception] = logits.argmax(dim=-1).tolist()
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            try:
                tokens[row] = sampler.draw(logits[row])
            except RuntimeError as error:  # logits that are not finite, of this row alone
                tokens[row] = error
    return tokens
