"""One request on its way: its tokens so far, what was shown of them, how it ends.

Scope: everything that a row knows about itself, whichever way its tokens are computed. Not here: queues (engine.py),
batches (slots.py, waiting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from normtune.errors import JobError
from normtune.serving.prompts import Prompt
from normtune.serving.sampling import Sampler, Sampling
from normtune.serving.text import Text

GREEDY = 1e-5  # a temperature up to that divides logits out of their range
Finish = Literal["stop", "length", "cancelled", "error"]


class QueueFull(JobError):
    """As many requests wait as may."""


class Closed(JobError):
    """The engine takes no requests any more."""


@dataclass(frozen=True)
class Piece:
    """News of an answer: `text` that is new, `tokens` generated so far (the token that ended it counts); the last
    piece says in `finish` how it ended, and in `error` why, where that was an error."""

    text: str
    tokens: int
    finish: Finish | None = None
    error: str | None = None


def described(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


class Job:
    """A request that was submitted. `prompt_tokens` includes those of images; `done` is set before the last piece, and
    there is no `prompt` any more then."""

    def __init__(
        self, prompt: Prompt, sampling: Sampling, on_piece: Callable[[Piece], None], tokenizer: Any, whole: bool
    ) -> None:
        self.prompt, self.sampling, self.bytes = prompt, sampling, prompt.bytes
        self.prompt_tokens, self.tokens, self.done = prompt.tokens, 0, False
        self.cancelled = False
        self.sampler = Sampler(sampling) if sampling.temperature > GREEDY else None
        self._text, self._on_piece = Text(tokenizer, sampling.stop), on_piece
        self._kept: list[str] | None = [] if whole else None

    @property
    def ids(self) -> list[int]:
        """The tokens generated so far, without one that ended the answer."""
        return self._text.ids

    def cancel(self) -> None:
        """Ends the answer before its next token; from any thread. Nothing happens to one that ended."""
        self.cancelled = True

    def take(self, token: int | Exception, stops: Collection[int]) -> bool:
        """Adds the next token, or the reason that there is none, and tells the owner; whether that was the last."""
        if isinstance(token, Exception):
            self.fail(token)
        elif self.cancelled:
            self.end("cancelled")
        else:
            self.tokens += 1
            if self.sampler is not None:
                self.sampler.taken()
            if token in stops:
                self.end("stop")
            else:
                self._show(self._text.add(token))
                if self._text.stopped:
                    self.end("stop")
                elif self.tokens >= self.sampling.max_new_tokens:
                    self.end("length")
        return self.done

    def fail(self, error: BaseException) -> None:
        self.end("error", described(error))

    def end(self, finish: Finish, error: str | None = None) -> None:
        """The last piece."""
        if self.done:
            return
        self.done = True
        try:
            text = self._text.end()
        except BaseException as broken:  # a panic of tokenizers: whoever asked waits for this piece
            text, finish, error = "", "error", error or described(broken)
        if self._kept is not None:
            text = "".join(self._kept) + text
        del self.prompt  # and its images, however long who asked keeps the job
        self.bytes = 0
        self._tell(Piece(text, self.tokens, "stop" if self._text.stopped else finish, error))

    def _show(self, text: str) -> None:
        if text and self._kept is not None:
            self._kept.append(text)
        elif text:
            self._tell(Piece(text, self.tokens))

    def _tell(self, piece: Piece) -> None:
        try:
            self._on_piece(piece)
        except BaseException:  # whoever asked is gone (a closed event loop, say), which is nobody else's business
            self.cancelled = True
