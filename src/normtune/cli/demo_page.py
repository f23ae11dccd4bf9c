"""`normtune demo --ui`: a finished demo's runs behind the page, with the scenes that its report shows."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from normtune.bank import Bank
from normtune.cli.demo_runs import VARIANTS
from normtune.errors import InputError
from normtune.progress import say
from normtune.serving import Engine, open_base
from normtune.serving.app import create_app
from normtune.serving.limits import ServerSettings
from normtune.serving.server import listen, run
from normtune.serving.ui import mount

HOST = "127.0.0.1"


def serve_demo(folder: Path, port: int) -> None:
    """Serves the runs of `folder` on this machine, each as an adapter of the base, until a signal comes.

    Raises:
        InputError: a run is missing, or the port is taken.
    """
    settings = ServerSettings()
    with listen(HOST, port) as listener:
        bank, processor = open_runs(folder)
        with bank:
            engine = Engine(bank, processor)
            app = create_app(engine, settings)
            mount(app, engine, settings=settings, examples=scenes(folder))
            where = f"http://{HOST}:{listener.getsockname()[1]}"
            names = ", ".join([settings.base_name, *bank.names])
            ready = f"page at {where}/ui, API at {where}/v1: {names}; Ctrl-C ends"
            run(app, engine, settings, listener, partial(say, ready))


def open_runs(folder: Path) -> tuple[Bank, Any]:
    """The demo's base with every run of it; a run that no bank takes is named and left out."""
    names = [name.replace("+", "-") for name in reversed(VARIANTS)] + ["stage1"]
    tuned, _ = open_base(folder / names[0])
    bank = Bank(tuned.model)
    for name in names:
        try:
            bank.add(name, folder / name / "adapter")
        except InputError as error:
            say(f"{name} is left out: {error}")
    return bank, tuned.processor


def scenes(folder: Path) -> list[tuple[Path, str]]:
    """Pictures and questions of the demo's report."""
    shown = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["scenes"]
    return [(folder / scene["file"], scene["question"]) for scene in shown]
