"""Tokens to text as they come: nothing half of a character, nothing that may belong to a stop string.

Scope: one answer. Not here: which tokens end an answer (jobs.py). Source: `tokenizers.decoders.DecodeStream`, which
gives text once its bytes are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """The text of an answer whose tokens are added one by one.

    All that `add` and `end` returned, one after the other, is what the tokenizer makes of all tokens together (special
    tokens left out), up to the first of the `stop` strings."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self._read = 0  # characters that the stream gave
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now; `stopped` is set once a stop string is complete."""
        self.ids.append(token)
        try:
            new = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # a byte that fits nowhere changes the text of those before it, shown by then
            new = self._anew(token)
        if not new:
            return ""
        self._read += len(new)
        return self._show(new) if self._stop else new

    def end(self) -> str:
        """What is left: bytes without an end as the tokenizer writes them, and what was no stop string after all."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        shown = self._show(whole[self._read :])
        held, self._held = self._held, ""
        return shown + held

    def _anew(self, token: int) -> str:
        """What all tokens have more than was shown; the stream goes on from the newest of them."""
        whole = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._stream = DecodeStream(ids=[token], skip_special_tokens=True)
        return str(whole[self._read :])

    def _show(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
