"""Checkpoints written in a thread of their own, while the next step computes. Not here: when, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch

from normtune.checkpoint import Position, prune, write_checkpoint
from normtune.errors import NormtuneError
from normtune.progress import say


class Saver:
    """`save` returns once the write before is over; leaving the `with` block waits for the last one.

    A write that fails leaves the checkpoints before it as they are, and is reported by `finish`.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.running: Future[None] | None = None

    def save(self, tensors: Mapping[str, torch.Tensor], position: Position) -> None:
        """Begins to write, unless the write before has failed; `tensors` must be copies."""
        if self.settle():
            return
        self.running = self.pool.submit(self._write, dict(tensors), position)

    def settle(self) -> bool:
        """Waits for the write in progress; whether it failed, which `finish` then reports."""
        if self.running is None:
            return False
        wait([self.running])
        return self.failed

    @property
    def busy(self) -> bool:
        return self.running is not None and not self.running.done()

    @property
    def failed(self) -> bool:
        return self.running is not None and self.running.done() and self.running.exception() is not None

    def finish(self) -> None:
        """Waits for the write in progress.

        Raises:
            JobError: the disk is full. InputError: the folder cannot be written.
        """
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def _write(self, tensors: dict[str, torch.Tensor], position: Position) -> None:
        write_checkpoint(self.folder, tensors, position)
        prune(self.folder, position, self.keep)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except NormtuneError as problem:
            if kind is None:
                raise
            say(f"the last checkpoint could not be written: {problem}")  # besides what stopped the training
        finally:
            self.pool.shutdown()
