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

HOT = 1e30  # all tokens are alike; larger numbers are infinite in fp32


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
    """The random generator of one row."""

    def __init__(self, sampling: Sampling) -> None:
        self.settings = sampling.temperature, sampling.top_p
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._number: float | None = None

    def uniform(self) -> float:
        """The number of the next token, from 0 to 1, 1 excluded; the same one until that token is `taken`."""
        if self._number is None:
            self._number = float(torch.rand(1, generator=self.generator, dtype=torch.float64))
        return self._number

    def taken(self) -> None:
        self._number = None


def choose(logits: torch.Tensor, samplers: Sequence[Sampler | None], never: torch.Tensor) -> list[int | Exception]:
    """The next token of each row from logits [B, V], or why there is none; of the tokens `never` [N] none is chosen.

    Changes `logits`."""
    logits.index_fill_(1, never, -math.inf)
    best = logits.argmax(dim=-1, keepdim=True)
    tokens: list[int] = best.where(logits.gather(1, best).isfinite(), -1)[:, 0].tolist()
    alike: dict[tuple[float, float], list[tuple[int, Sampler]]] = {}
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            alike.setdefault(sampler.settings, []).append((row, sampler))
    for (temperature, top_p), group in alike.items():
        rows = [row for row, _ in group]
        found = draw(logits[rows].float(), [sampler.uniform() for _, sampler in group], temperature, top_p)
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    return [token if token >= 0 else RuntimeError("the model's logits are not finite") for token in tokens]


def draw(logits: torch.Tensor, uniform: Sequence[float], temperature: float, top_p: float) -> list[int]:
    """Tokens of rows [B, V], by where a uniform number each falls among the sums of their probabilities; -1 for a row
    whose logits are not finite."""
    process = LogitsProcessorList([TemperatureLogitsWarper(min(float(temperature), HOT))])
    if top_p < 1:
        process.append(TopPLogitsWarper(top_p))
    ids = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    sums = process(ids, logits).softmax(dim=-1).double().cumsum(dim=-1)  # [B, V]
    total = sums[:, -1]
    place = torch.tensor(uniform, dtype=torch.float64, device=logits.device) * total
    tokens = torch.searchsorted(sums, place[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens.where(total.isfinite(), -1).tolist()  # type: ignore[no-any-return]
