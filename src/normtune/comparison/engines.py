"""Where cells run: each in a process of its own, one after another, or on a Ray cluster.

Scope: a fresh process per cell, so that its peak memory is its own and its death takes nothing along; what failed and
why. Not here: what a cell does (`cells`). Source: multiprocessing's fork server, which imports torch once for all
cells; Ray's tasks (docs.ray.io), whose placement on GPUs and machines is Ray's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from normtune.comparison.cells import Cell, do
from normtune.errors import InputError, NormtuneError
from normtune.progress import quiet_libraries
from normtune.training import Interrupted

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = ("local", "ray")
Outcome = tuple[Cell, str | None]
"""A cell and why it failed, None where it is complete."""


def run_cells(cells: Sequence[Cell], engine: Engine = "local") -> Iterator[Outcome]:
    """Does every cell; yields each when it ends. A cell that fails does not keep the others from running.

    `local`: one after another. `ray`: as many at a time as the cluster has room for (of a cluster that is up where
    RAY_ADDRESS says, else of this machine), a GPU each where there are some; its machines must share the folder.

    Raises:
        InputError: an unknown engine, or Ray is not installed.
        Interrupted: Ctrl-C or SIGTERM; the cell that ran here has saved. A Ray task is ended, and goes on
            from its last checkpoint.
    """
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is unknown; there are {', '.join(ENGINES)}")
    yield from (on_ray(cells) if engine == "ray" else one_by_one(cells))


def one_by_one(cells: Sequence[Cell]) -> Iterator[Outcome]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with Stop() as stop:
        for cell in cells:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(cell, theirs), name=cell.title)
            stop.start(process)
            theirs.close()
            message = received(ours)
            process.join()
            if process.exitcode == 0:
                yield cell, message
            if stop.asked or process.exitcode == Interrupted.exit_code:
                raise Interrupted(f"stopped in {cell.title}; the same command goes on")
            if process.exitcode != 0:
                yield cell, message or died(process.exitcode)


def received(pipe: Connection) -> str | None:
    """What the child said before it ended; None where it said nothing."""
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return None


def died(code: int | None) -> str:
    """Of a process that could not say why it ended."""
    if code is not None and code < 0:
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"the process was killed by {signal.Signals(-code).name}{hint}"
    return f"the process ended with code {code}"


class Stop:
    """While cells run, Ctrl-C and SIGTERM are passed on: the one that runs saves and ends, then we do."""

    def __init__(self) -> None:
        self.asked = False
        self.process: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            # the fork server imports for seconds; what is ignored here stays ignored there
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            forkserver.ensure_running()
            signal.signal(signal.SIGINT, before)
            self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def start(self, process: Any) -> None:
        """Starts a process that hears of what has been or will be asked."""
        self.process = process
        process.start()
        if self.asked:  # before there was anybody to tell
            process.terminate()

    def handle(self, number: int, frame: Any) -> None:
        self.asked = True
        if self.process is not None and self.process.pid is not None:
            self.process.terminate()

    def __exit__(self, *error: object) -> None:
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)


def child(cell: Cell, pipe: Connection) -> None:
    """The process of a cell: ends with its parent, and tells it what went wrong."""
    os.setpgrp()  # a terminal's Ctrl-C reaches the parent alone, which passes it on as SIGTERM
    signal.signal(signal.SIGTERM, stop)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        message = outcome(cell)
    except (Interrupted, KeyboardInterrupt):
        os._exit(Interrupted.exit_code)
    pipe.send(message)


def stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def end_with(sentinel: int) -> None:
    """Ends this process when the other one is gone: a new comparison must find nobody at work in its folder."""
    wait([sentinel])
    os._exit(1)


def outcome(cell: Cell) -> str | None:
    """Does the cell; why it failed, None where it did not.

    Raises:
        Interrupted, KeyboardInterrupt: it was told to stop.
    """
    quiet_libraries()
    try:
        do(cell)
    except Interrupted:
        raise
    except NormtuneError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def outcome_in(folder: str, cell: Cell) -> str | None:
    """`outcome` where relative paths mean what they mean here."""
    os.chdir(folder)
    return outcome(cell)


def on_ray(cells: Sequence[Cell]) -> Iterator[Outcome]:
    try:
        import ray
    except ImportError:
        raise InputError("engine ray: Ray is not installed; pip install 'normtune[ray]', or use local") from None
    import torch

    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True, include_dashboard=False)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
        pending = {}
        for cell in cells:
            cores = min(largest, cell.recipe.threads or (1 if gpus else torch.get_num_threads()))
            # max_calls: a process of its own; a cell that fails says so itself, and is not tried again unasked
            task = ray.remote(num_cpus=cores, num_gpus=gpus, max_calls=1, max_retries=0)(outcome_in)
            pending[task.remote(os.getcwd(), cell)] = cell
        while pending:
            (done, *_), _ = ray.wait(list(pending), num_returns=1)
            cell = pending.pop(done)
            try:
                yield cell, ray.get(done)
            except ray.exceptions.RayError as error:
                yield cell, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        if started:
            ray.shutdown()
