"""Progress on stderr: a bar in a terminal, a line now and then elsewhere. Not here: the log file (runlog.py)."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """`with Bar("align", total=100) as bar: bar.update(step, "loss 1.2")`."""

    def __init__(self, title: str, total: int, start: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.start, self.quiet = title, total, start, quiet
        self.began = self.spoke = time.monotonic()
        self.rich: Progress | None = None

    def __enter__(self) -> Bar:
        if not self.quiet and sys.stderr.isatty():
            columns = (
                *(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()),
                *(TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()),
            )
            self.rich = Progress(*columns, console=Console(stderr=True))
            self.task = self.rich.add_task(self.title, total=self.total, completed=self.start, note="")
            self.rich.start()
        return self

    def update(self, done: int, note: str = "") -> None:
        if self.rich is not None:
            self.rich.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if not self.quiet and (now - self.spoke > LINE_EVERY or done == self.total):
            rate = (done - self.start) / max(now - self.began, 1e-9)
            left = (self.total - done) / rate if rate > 0 else float("nan")
            say(f"{self.title} {done}/{self.total}  {note}  ETA {left:.0f} s")
            self.spoke = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rich is not None:
            self.rich.stop()


class Bars:
    """A bar for each name, one after another: `with Bars() as bars: bars.update("pope", 3, 100)`."""

    def __init__(self, title: str = "") -> None:
        """`title` stands before every name."""
        self.title, self.bars = title, dict[str, Bar]()

    def __enter__(self) -> Bars:
        return self

    def update(self, name: str, done: int, total: int) -> None:
        if name not in self.bars:
            self.__exit__()
            self.bars[name] = Bar(f"{self.title} {name}".strip(), total).__enter__()
        self.bars[name].update(done)

    def __exit__(self, *error: object) -> None:
        for bar in self.bars.values():
            bar.__exit__(None, None, None)


def quiet_libraries() -> None:
    """Keeps transformers' loading bars and hints off the terminal; our own progress is enough."""
    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it tells of kernels it has not
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
