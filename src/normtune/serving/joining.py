"""Continuous batching: between two decoding steps rows that are through leave, and what waits joins.

Scope: jobs in the slots of a model, what happens where the model raises. Not here: keys and values (slots.py), the
queue (engine.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from normtune.bank import Bank
from normtune.serving.jobs import Job
from normtune.serving.sampling import choose
from normtune.serving.slots import Row, Slots
from normtune.serving.vision import Vision

PADDING = 64  # a prompt that much longer than another, and more than twice as long, is not run together with it


class Joining:
    """Runs jobs of the models of a bank, each in a slot. Every method is for the one thread that owns the model."""

    def __init__(
        self, bank: Bank, vision: Vision, pad: int, slots: int, stops: Collection[int], never: torch.Tensor
    ) -> None:
        self.bank, self.vision, self.stops, self.never = bank, vision, stops, never
        self.slots = Slots(bank, pad, slots)
        self.jobs: list[Job] = []
        self._tokens: list[int] = []  # the newest of each row

    def admit(self, jobs: Sequence[Job]) -> None:
        """Runs the prompts and gives each its first token."""
        for group in alike(jobs):
            self._try(group)

    def step(self) -> None:
        """The next token of each row."""
        if any(job.cancelled for job in self.jobs):
            for job in self.jobs:
                if job.cancelled:
                    job.end("cancelled")
            self._sweep()
        if not self.jobs:
            return
        logits: torch.Tensor | None
        try:
            logits = self.slots.step(self._tokens)
        except Exception:  # of one row, or of all: each on its own is told the difference
            logits = None  # below, since an error that is handled holds all that was computed before it
        if logits is None:
            self._step_alone()
        else:
            tokens = choose(logits, [job.sampler for job in self.jobs], self.never)
            self._take(0, tokens)
        self._sweep()

    def fail(self, error: BaseException) -> None:
        """Ends all jobs; whatever state the slots are in, they are empty now."""
        for job in self.jobs:
            job.fail(error)
        self.jobs, self._tokens = [], []
        self.slots = Slots(self.bank, self.slots.pad, self.slots.most)

    def _try(self, group: Sequence[Job]) -> None:
        tokens: list[int | Exception] | None = None
        try:
            tokens = self._prefill(group)
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
        if tokens is not None:
            self._take(len(self.jobs) - len(group), tokens)
            self._sweep()
        elif len(group) > 1:  # here, where the error and what it held in memory are gone
            for job in group:
                self._try([job])

    def _prefill(self, group: Sequence[Job]) -> list[int | Exception]:
        """The first tokens of the jobs, which are the last ones now; nobody was told anything."""
        prompts = [job.prompt for job in group]
        images = self.vision.connected(self.bank, prompts)
        rows = [Row(prompt.adapter, prompt.ids, own) for prompt, own in zip(prompts, images, strict=True)]
        logits, cache = self.slots.prefill(rows)
        tokens = choose(logits, [job.sampler for job in group], self.never)
        self.slots.join(rows, cache)
        self.jobs += group
        self._tokens += [0] * len(group)
        return tokens

    def _step_alone(self) -> None:
        for number, job in enumerate(self.jobs):
            try:
                logits = self.slots.step([self._tokens[number]], slice(number, number + 1))
                tokens = choose(logits, [job.sampler], self.never)
            except Exception as error:
                job.fail(error)
            else:
                self._take(number, tokens)

    def _take(self, start: int, tokens: Sequence[int | Exception]) -> None:
        """Tells the jobs from number `start` on their next tokens."""
        for number, token in enumerate(tokens, start):
            if not self.jobs[number].take(token, self.stops) and isinstance(token, int):
                self._tokens[number] = token

    def _sweep(self) -> None:
        gone = [number for number, job in enumerate(self.jobs) if job.done]
        if gone:
            left = self.slots.leave(gone)
            self.jobs = [self.jobs[number] for number in left]
            self._tokens = [self._tokens[number] for number in left]


def alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs whose prompts are run together: without much padding."""
    groups: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: job.prompt.tokens):
        shortest = groups[-1][0].prompt.tokens if groups else 0
        if groups and job.prompt.tokens <= max(2 * shortest, shortest + PADDING):
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups
