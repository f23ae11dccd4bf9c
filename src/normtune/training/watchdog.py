"""Tells where a training hangs: the stacks of all threads, when no step was completed for long. It ends nothing.

Source: the standard library's `faulthandler`.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from types import TracebackType

from normtune.progress import say

STDERR = 2  # the descriptor: sys.stderr may be an object without one


class Watchdog:
    """`with Watchdog(30, "align") as watchdog: watchdog.beat(step)`; None minutes: it does nothing."""

    def __init__(self, minutes: float | None, stage: str) -> None:
        self.seconds, self.stage = None if minutes is None else 60 * minutes, stage
        self.last, self.step = time.monotonic(), 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Step `step` is completed."""
        self.last, self.step = time.monotonic(), step

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self.over.wait(self.seconds / 4):
            if time.monotonic() - self.last > self.seconds:
                say(f"{self.stage}: no step in {self.seconds / 60:g} minutes, since step {self.step}; all stacks:")
                sys.stderr.flush()
                faulthandler.dump_traceback(STDERR, all_threads=True)
                self.last = time.monotonic()  # say so again after as long

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()
