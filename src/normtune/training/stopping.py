"""Ctrl-C and SIGTERM: a training finishes its micro-batch, saves and ends with a code of its own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from normtune.errors import NormtuneError
from normtune.progress import say

ONE = 5.0
"""Seconds within which signals are one: a scheduler's may reach torchrun and what it has started, and torchrun passes
it on."""


class Interrupted(NormtuneError):
    """Everything is saved, `--resume` goes on. `exit_code` is 130 after Ctrl-C, 143 after SIGTERM."""

    exit_code = 130

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Stop(threading.Event):
    """Set when the training was told to end; `number` is the signal that did, `since` when."""

    number: int = signal.SIGINT
    since: float | None = None


@contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`; a second one, `ONE` seconds later or more, ends at once."""

    def handler(number: int, frame: Any) -> None:
        if stop.since is not None:
            if time.monotonic() - stop.since < ONE:
                return
            raise KeyboardInterrupt
        stop.number, stop.since = number, time.monotonic()
        stop.set()
        with suppress(RuntimeError):  # the bar is being written: stderr is not written to from within
            say(f"finishing this micro-batch, then saving; once more after {ONE:.0f} s to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
