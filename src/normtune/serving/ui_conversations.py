"""What the page remembers: pictures and turns of each browser tab, and answers as they come, without Gradio.

Scope: conversations by tab, two sides each, with a bound on their memory; asking both sides at once and collecting
what streams back. Non-scope: how it looks (`ui.py`), decoding (`engine.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from normtune.chat import PLACEHOLDER, Turn, unmarked
from normtune.errors import InputError
from normtune.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from normtune.serving import Engine, Job, Piece, Prompt, Sampling
    from normtune.serving.limits import ServerSettings

MAX_BYTES = 2**29  # of pictures in memory, over all tabs: the conversation unused for longest goes first
MAX_TABS = 1000
PACE = 0.05  # seconds between two updates of the page


@dataclass(frozen=True)
class Picture:
    """An uploaded file as it came; an `images.ImageSource`."""

    path: Path
    data: bytes

    @property
    def name(self) -> str:
        return self.path.name

    def open(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name

    def pixels(self, limit: int) -> Image:
        """RGB, the right way up. InputError: no picture, or more than `limit` pixels."""
        return open_image(self, "picture", limit)


def read_pictures(paths: Sequence[str], limit: int) -> list[Picture]:
    """Uploaded files, each decoded once to see that it can be. InputError names what is no picture."""
    pictures = [Picture(Path(path), Path(path).read_bytes()) for path in paths]
    for picture in pictures:
        picture.pixels(limit)
    return pictures


@dataclass
class Side:
    """One of the two chats of a tab. A side that joins late sees the pictures with its first question."""

    turns: list[Turn] = field(default_factory=list)
    seen: int = 0  # so many of the conversation's pictures are in `turns`


@dataclass
class Conversation:
    pictures: list[Picture] = field(default_factory=list)
    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    jobs: list[Job] = field(default_factory=list)  # what is being answered now
    busy: bool = False
    forgotten: bool = False  # its tab has begun another, or is closed

    def stop(self) -> None:
        for job in self.jobs:
            job.cancel()

    @property
    def bytes(self) -> int:
        return sum(len(picture.data) for picture in self.pictures)


class Conversations:
    """By tab (Gradio's session hash); what is left out when there are too many begins anew."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_tabs: int = MAX_TABS) -> None:
        self.max_bytes, self.max_tabs = max_bytes, max_tabs
        self._tabs: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tab: str) -> Conversation:
        with self._lock:
            found = self._tabs.setdefault(tab, Conversation())
            self._tabs.move_to_end(tab)
            while len(self._tabs) > self.max_tabs and self._drop():
                pass
            return found

    def trim(self) -> None:
        """Forgets the conversations unused for longest until the rest is within the bound."""
        with self._lock:
            while sum(each.bytes for each in self._tabs.values()) > self.max_bytes and self._drop():
                pass

    def _drop(self) -> bool:
        """Forgets the conversation unused for longest; not the newest, and none that is being answered: nothing could
        stop it any more. Under the lock."""
        *others, _ = self._tabs
        found = next((tab for tab in others if not self._tabs[tab].busy), None)
        if found is not None:
            del self._tabs[found]
        return found is not None

    def forget(self, tab: str) -> None:
        """Ends what this tab is being answered and everything that it said."""
        with self._lock:
            found = self._tabs.pop(tab, None)
        if found is not None:
            found.forgotten = True
            found.stop()

    def begun(self, tab: str) -> bool:
        """Whether anything has been asked in this tab since it was last forgotten."""
        with self._lock:
            found = self._tabs.get(tab)
            return found is not None and (found.busy or any(side.turns for side in found.sides))

    @property
    def busy(self) -> bool:
        with self._lock:
            return any(each.busy for each in self._tabs.values())


@dataclass
class Answer:
    """One side's answer so far; times are those of `time.monotonic`, s."""

    side: int  # 0 or 1
    adapter: str | None
    turns: list[Turn]  # with the question, without the answer
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    error: str | None = None

    def add(self, piece: Piece, at: float) -> None:
        """`at`: when the model had written it, not when the page was told."""
        self.first, self.last = self.first or at, at
        self.text += piece.text
        self.tokens, self.finish, self.error = piece.tokens, piece.finish, piece.error

    def figures(self) -> str:
        """`24 tokens, 31.5 tokens/s, first after 0.2 s`: the rate is that of the tokens after the first."""
        if not self.first:
            return "waiting"
        parts = [f"{self.tokens} token{'s' * (self.tokens != 1)}"]
        if self.tokens > 1 and self.last > self.first:
            parts.append(f"{(self.tokens - 1) / (self.last - self.first):.1f} tokens/s")
        parts.append(f"first after {self.first - self.began:.1f} s")
        ends = {"length": "cut at the longest answer", "cancelled": "stopped", "error": "failed"}
        return ", ".join([*parts, *([ends[self.finish]] if self.finish in ends else [])])


Told = tuple[Answer, "Piece", float]


async def ask(
    engine: Engine,
    conversation: Conversation,
    text: str,
    pictures: Sequence[Picture],
    adapters: Sequence[str | None],
    sampling: Sampling,
    settings: ServerSettings,
) -> AsyncIterator[list[Answer]]:
    """Asks one or two adapters at once; yields their answers so far, `PACE` apart, the last time when all have ended.
    Nothing is asked of a conversation that was forgotten while its question was prepared.

    A side's question and answer join its turns when it has ended well, or was stopped with something to show.

    Args:
        pictures: new ones, shown with this question.

    Raises:
        InputError, JobError: nothing was asked, and the conversation is as before.
    """
    if conversation.busy:
        raise InputError("the last question is still being answered; wait, or stop it")
    known = [*conversation.pictures, *pictures]
    if len(known) > settings.max_images:
        raise InputError(f"a conversation holds {settings.max_images} pictures at most; begin a new one")
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Told]()

    def prepare(number: int, adapter: str | None, images: list[Image]) -> tuple[Answer, Prompt]:
        side = conversation.sides[number]
        marks = f"{PLACEHOLDER}\n" * (len(known) - side.seen)
        turns = [*side.turns, Turn("user", marks + unmarked(text))]
        return Answer(number, adapter, turns), engine.prepare(turns, images, adapter)

    def prepare_all() -> list[tuple[Answer, Prompt]]:
        images = [picture.pixels(settings.max_pixels) for picture in known]
        return [prepare(number, adapter, images) for number, adapter in enumerate(adapters)]

    def deliver(answer: Answer, piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the server has shut down
            loop.call_soon_threadsafe(queue.put_nowait, (answer, piece, time.monotonic()))

    answers: list[Answer] = []
    conversation.busy = True
    try:
        both = await asyncio.to_thread(prepare_all)
        if conversation.forgotten:
            return
        for answer, prompt in both:
            fitting = clipped(sampling, prompt.tokens, engine.max_context)
            conversation.jobs.append(engine.submit(prompt, fitting, partial(deliver, answer)))
        conversation.pictures[:] = known
        answers = [answer for answer, _ in both]
        deadline = time.monotonic() + settings.timeout
        while any(answer.finish is None for answer in answers):
            yield answers
            await _collect(queue, deadline)
            if time.monotonic() >= deadline:
                _give_up(answers, f"stopped after {settings.timeout:g} s")
    finally:  # also when the tab is closed
        conversation.stop()
        conversation.jobs.clear()
        conversation.busy = False
        for answer in answers:
            _remember(conversation, answer)
    yield answers


def clipped(sampling: Sampling, tokens: int, context: int | None) -> Sampling:
    """With an answer no longer than what a prompt of `tokens` leaves of the context, but of one token at least: where
    not even that fits, the engine says so."""
    room = sampling.max_new_tokens if context is None else max(1, context - tokens)
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


async def _collect(queue: asyncio.Queue[Told], deadline: float) -> None:
    """Waits for a piece, hands it and those that came with it to their answers, and keeps the page's pace."""
    with contextlib.suppress(TimeoutError):
        answer, piece, at = await asyncio.wait_for(queue.get(), max(0.0, deadline - time.monotonic()))
        answer.add(piece, at)
        while not queue.empty():
            answer, piece, at = queue.get_nowait()
            answer.add(piece, at)
        await asyncio.sleep(PACE)


def _give_up(answers: Sequence[Answer], why: str) -> None:
    for answer in answers:
        if answer.finish is None:
            answer.finish, answer.error = "cancelled", why


def _remember(conversation: Conversation, answer: Answer) -> None:
    # stripped as `evaluation.answer` does; an image's marker would be refused with each question that follows
    text = unmarked(answer.text.strip())
    if text and answer.finish in ("stop", "length", "cancelled"):
        side = conversation.sides[answer.side]
        side.turns = [*answer.turns, Turn("assistant", text)]
        side.seen = len(conversation.pictures)
