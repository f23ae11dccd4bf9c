"""The engine: requests of any thread in, pieces of their answers out, one thread that owns the model.

Scope: the queue and its limit, starting, closing, what counts. Between two decoding steps what waits is admitted as far
as there are slots (`joining`), or a batch at a time where the model cannot do that (`waiting`); that is tried once.
transformers' own continuous batching is not used: its requests are token ids alone (`ContinuousBatchingManager
.add_request` of transformers 5.23 takes no image), and its paged cache knows nothing of rows on different adapters.
An error of one request ends that request. Not here: HTTP, and what a client may ask for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image

from normtune.bank import Bank
from normtune.chat import Turn
from normtune.errors import InputError
from normtune.evaluation.answering import stop_tokens
from normtune.serving.jobs import Closed, Job, Piece, QueueFull
from normtune.serving.joining import Joining
from normtune.serving.prompts import Prompt, Prompts
from normtune.serving.sampling import Sampling
from normtune.serving.slots import can_join
from normtune.serving.waiting import Waiting

IMAGE_CACHE = 256 * 2**20
PIXELS = 2 * 2**30  # bytes that all requests together hold: a picture of one colour is large, and its file is not
TOGETHER, PATIENCE = 4, 4  # under load prompts join a quarter of the slots at a time, or after so many steps


@dataclass(frozen=True)
class Stats:
    """Jobs `running` and `waiting` now; since the start: `admitted`, `finished`, `tokens` generated, decoding `steps`
    (or batches that waited for one another), `images_encoded` and those that were known."""

    running: int
    waiting: int
    admitted: int
    finished: int
    tokens: int
    steps: int
    images_encoded: int
    image_cache_hits: int


class Engine:
    """Answers requests on the models of a bank; a context manager that starts and, draining, closes it.

    Args:
        slots: rows that decode together.
        max_queue: requests that may wait for one.
        max_context: tokens of a prompt and its answer (default: the positions that the model's config names).
        batching: False: one request at a time.
        image_cache_bytes: of features of images that were asked about.

    Attributes:
        joins: whether rows can join a batch that decodes; else batches wait for one another.
    """

    def __init__(
        self,
        bank: Bank,
        processor: Any,
        *,
        slots: int = 16,
        max_queue: int = 256,
        max_context: int | None = None,
        batching: bool = True,
        image_cache_bytes: int = IMAGE_CACHE,
    ) -> None:
        if slots < 1 or max_queue < 1:
            raise InputError(f"slots is {slots} and max_queue {max_queue}; give 1 or more")
        model: Any = bank.model
        model.eval()
        self.bank, self.slots, self.max_queue = bank, slots if batching else 1, max_queue
        self.max_context = positions(model) if max_context is None else max_context
        self.prompts = Prompts(bank, processor, self.max_context, image_cache_bytes)
        self.tokenizer = processor.tokenizer
        stops = frozenset(stop_tokens(model, self.prompts.chat))
        own = self.tokenizer.pad_token_id
        pad = next(iter(sorted(stops)), 0) if own is None else own
        silent = {*bank.never_sampled, *([] if own is None else [own])} - stops
        device = model.get_input_embeddings().weight.device
        never = torch.tensor(sorted(silent), dtype=torch.int64, device=device)
        vision = self.prompts.vision
        self.joins = vision is not None and can_join(bank, pad, len(self.tokenizer))
        self._runner: Joining | Waiting
        if vision is not None and self.joins:
            self._runner = Joining(bank, vision, pad, self.slots, stops, never)
        else:
            self._runner = Waiting(bank, self.prompts, pad, stops, never)
        self._queue: deque[Job] = deque()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._taken: list[Job] = []
        self._held = 0  # steps since somebody could have joined and was not let
        self._closing = False
        self._admitted = self._finished = self._tokens = self._steps = 0

    def start(self) -> None:
        """Begins to answer. Closed: it was closed."""
        with self._change:
            if self._closing:
                raise Closed("the engine is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="normtune-engine", daemon=True)
                self._thread.start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests and ends the thread: what was submitted is answered first (`drain`), for `timeout`
        seconds at most; what is left then is cancelled."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        if not drain or self._thread is None:
            self._drop()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                self._drop()
                self._thread.join()

    def _drop(self) -> None:
        """Cancels all that waits or runs."""
        with self._change:
            waiting = list(self._queue)
            self._queue.clear()
            running = [*self._taken, *self._runner.jobs]
            self._finished += len(waiting)
        for job in waiting:
            job.end("cancelled")
        for job in running:
            job.cancel()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, turns: Sequence[Turn], images: Sequence[Image.Image], adapter: str | None) -> Prompt:
        """A conversation that ends with a user's turn, "<image>" in its text for each image, on an adapter (None: the
        base); where the adapter is gated and there is no image, on the base. From any thread.

        Raises:
            InputError: an unknown adapter, images and "<image>" that do not match, a prompt longer than the context.
        """
        return self.prompts.prepare(turns, images, adapter)

    def submit(
        self, prompt: Prompt, sampling: Sampling, on_piece: Callable[[Piece], None], *, whole: bool = False
    ) -> Job:
        """Puts a prompt into the queue; from any thread.

        Args:
            on_piece: called from the engine's thread with what is new, from another one's where what waits is
                cancelled; it must not block.
            whole: one piece at the end, with all of the text.

        Raises:
            InputError: prompt and answer may be longer than the context.
            QueueFull: `max_queue` requests wait, or images of PIXELS bytes. Closed: the engine takes no more.
        """
        if self.max_context is not None and prompt.tokens + sampling.max_new_tokens > self.max_context:
            raise InputError(
                f"the prompt has {prompt.tokens} tokens, the answer may have {sampling.max_new_tokens}, and the "
                f"context of the model {self.max_context};\nshorten one of them"
            )
        job = Job(prompt, sampling, on_piece, self.tokenizer, whole)
        with self._change:
            if self._closing:
                raise Closed("the engine is closed")
            gone = self._cancelled() if self._full(job) else []  # a step may take long
            full = self._full(job)
            if not full:
                self._queue.append(job)
                self._change.notify()
            self._finished += len(gone)
        for other in gone:
            other.end("cancelled")
        if full:
            raise QueueFull(f"{full} wait already; try again later")
        return job

    def _full(self, job: Job) -> str:
        """What there is too much of for one more, if anything; under the queue's lock."""
        if len(self._queue) >= self.max_queue:
            return f"{self.max_queue} requests"
        others = sum(one.bytes for one in {*self._queue, *self._taken, *self._runner.jobs}) if job.bytes else 0
        return f"{others:,} bytes of images" if others and others + job.bytes > PIXELS else ""

    def _cancelled(self) -> list[Job]:
        """Takes those that were cancelled out of the queue; under its lock."""
        gone = [job for job in self._queue if job.cancelled]
        if gone:
            self._queue = deque(job for job in self._queue if not job.cancelled)
        return gone

    def stream(
        self, turns: Sequence[Turn], images: Sequence[Image.Image], adapter: str | None, sampling: Sampling
    ) -> Generator[Piece]:
        """The pieces of an answer as they come; closing the generator cancels it. Raises as `prepare` and `submit`."""
        prompt, pieces = self.prepare(turns, images, adapter), SimpleQueue[Piece]()
        made = _pieces(self.submit(prompt, sampling, pieces.put), pieces)
        next(made)  # into its `try`: closed before anybody read from it, it cancels as well
        return made

    @property
    def stats(self) -> Stats:
        vision = self.prompts.vision
        running = len(self._runner.jobs)
        seen = (0, 0) if vision is None else (vision.encoded, vision.hits)
        return Stats(running, len(self._queue), self._admitted, self._finished, self._tokens, self._steps, *seen)

    def _work(self) -> None:
        with torch.inference_mode():
            while self._go_on():
                pass

    def _go_on(self) -> bool:
        """Waits for something to do and does it; False: all is done. Nothing of a job is kept while it waits."""
        jobs = self._next()
        if jobs is None:
            return False
        before = [*self._runner.jobs, *jobs]
        tokens = sum(job.tokens for job in before)
        try:
            self._turn(jobs)
        except BaseException as error:  # a mistake of ours, a panic of tokenizers: it ends what runs, not the engine
            self._runner.fail(error)
            for job in jobs:
                job.fail(error)
        self._tokens += sum(job.tokens for job in before) - tokens
        with self._change:
            self._finished += sum(job.done for job in before)
            self._taken = []
        return True

    def _next(self) -> list[Job] | None:
        """What is to be admitted now, once there is anything to do; None: the engine is closed and all is done."""
        running = len(self._runner.jobs)
        with self._change:
            while not (self._queue or running or self._closing):
                self._change.wait()
            if not (self._queue or running):
                return None
            gone = self._cancelled()  # they leave the queue at once, slots or none
            free = min(len(self._queue), self.slots - running)
            patient = running and free < min(len(self._queue), self.slots // TOGETHER) and self._held < PATIENCE
            self._held = self._held + 1 if patient else 0
            self._taken = gone + [self._queue.popleft() for _ in range(0 if patient else free)]
            return self._taken

    def _turn(self, jobs: list[Job]) -> None:
        """Admits `jobs` and makes a step."""
        for job in jobs:
            if job.cancelled:
                job.end("cancelled")
        jobs = [job for job in jobs if not job.done]
        self._admitted += len(jobs)
        if jobs:
            self._runner.admit(jobs)
        self._runner.step()
        self._steps += 1


def positions(model: Any) -> int | None:
    """Tokens that the model's config says it is made for: those that it was trained on, where positions are stretched
    by the length of what is in the batch."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope")
    found = rope.get("original_max_position_embeddings") if stretched else None
    return found or getattr(config, "max_position_embeddings", None)


def _pieces(job: Job, pieces: SimpleQueue[Piece]) -> Generator[Piece]:
    try:
        yield Piece("", 0)
        while True:
            piece = pieces.get()
            yield piece
            if piece.finish is not None:
                return
    finally:
        job.cancel()
