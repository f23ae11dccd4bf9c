"""Batches that wait for one another: for models whose rows cannot join others, such as recurrent ones.

Scope: jobs through transformers' `generate`, told of each token as it comes. A batch ends with its longest answer.
Where the model raises, each job goes on alone, from the token that it had. Not here: models whose rows can join
(joining.py).

Shapes: B rows, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from normtune.bank import Bank
from normtune.evaluation.answering import plain_greedy
from normtune.evaluation.engines import left_padded
from normtune.serving.jobs import Job
from normtune.serving.prompts import Prompts
from normtune.serving.sampling import choose
from normtune.serving.slots import device_of


class Waiting:
    """Runs jobs of the models of a bank to their end, as `Joining` does step by step."""

    def __init__(self, bank: Bank, prompts: Prompts, pad: int, stops: Collection[int], never: torch.Tensor) -> None:
        self.bank, self.prompts, self.pad, self.stops, self.never = bank, prompts, pad, stops, never
        self.model: Any = bank.model
        self.device = device_of(bank)
        self.jobs: list[Job] = []

    def admit(self, jobs: Sequence[Job]) -> None:
        """Answers them. Models that are asked through their own processor are given one adapter at a time: which row
        its connector is asked for, only the model knows."""
        groups: dict[int, list[Job]] = {}
        for job in jobs:
            groups.setdefault(id(job.prompt.adapter) if self.prompts.stock else 0, []).append(job)
        self.jobs = list(jobs)
        try:
            for group in groups.values():
                self._try(group)
        finally:
            self.jobs = []

    def step(self) -> None:
        """Nothing is left to do between batches."""

    def fail(self, error: BaseException) -> None:
        """No job outlives `admit`."""

    def _try(self, group: list[Job]) -> None:
        try:
            self._run(group)
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
        for job in group:  # here, where the error and what it held in memory are gone
            if not job.done:
                self._try([job])

    def _run(self, group: list[Job]) -> None:
        longest = max(job.sampling.max_new_tokens for job in group)
        teller = _Teller(group, self.stops, self.never, self.pad)
        with (
            plain_greedy(self.model, self.prompts.tokenizer, list(self.stops), longest),
            self.bank.rows([job.prompt.adapter for job in group]),
        ):
            self.model.generate(
                **self._inputs(group),
                logits_processor=LogitsProcessorList([teller]),
                stopping_criteria=StoppingCriteriaList([_Done(group)]),
            )
        for job in group:
            job.end("length")

    def _inputs(self, group: Sequence[Job]) -> dict[str, Any]:
        """`generate`'s arguments, [B, S], padded on the left."""
        if self.prompts.stock is not None:
            with self.prompts.lock:
                return self.prompts.stock.inputs([job.prompt.request for job in group if job.prompt.request])
        vision = self.prompts.vision
        assert vision is not None
        images = [image for own in vision.connected(self.bank, [job.prompt for job in group]) for image in own]
        return left_padded([job.prompt.ids for job in group], images, self.pad, self.device)


class _Teller(LogitsProcessor):
    """Chooses each row's next token, tells its job, and leaves `generate` no other choice."""

    def __init__(self, jobs: Sequence[Job], stops: Collection[int], never: torch.Tensor, pad: int) -> None:
        self.jobs, self.stops, self.never, self.pad = jobs, stops, never, pad
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        again = [self.steps < len(job.ids) for job in self.jobs]  # after an error: these tokens are known
        idle = [known or job.done for known, job in zip(again, self.jobs, strict=True)]
        samplers = [None if rests else job.sampler for rests, job in zip(idle, self.jobs, strict=True)]
        forced = []
        for job, known, token in zip(self.jobs, again, choose(scores.clone(), samplers, self.never), strict=True):
            if not job.done and known:
                token = job.ids[self.steps]
            elif not job.done:
                job.take(token, self.stops)
            forced.append(self.pad if job.done or isinstance(token, Exception) else token)
        self.steps += 1
        only = torch.full_like(scores, -math.inf)
        return only.scatter_(1, torch.tensor(forced, device=scores.device)[:, None], 0.0)


class _Done(StoppingCriteria):
    """A row is through when its job is."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([job.done for job in self.jobs], device=input_ids.device)
