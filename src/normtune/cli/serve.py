"""`normtune serve`: one base with many adapters behind OpenAI's API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normtune.errors import InputError

if TYPE_CHECKING:
    from normtune.bank import Bank

KEY_NAME = "NORMTUNE_API_KEY"
KEY = "Clients must send it as a Bearer token; without, anyone who reaches the port may ask."
WAITING = "Requests that wait for a slot at most; more get 429."
REMOTE = "Fetch images at http(s) URLs, from public addresses alone."


def serve(
    base: Annotated[str, typer.Argument(help="Run folder, adapter folder, MLLM folder or hub id.")],
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of a run or adapter; repeat it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    base_name: Annotated[str, typer.Option(help="The base's model name.")] = "base",
    api_key: Annotated[str | None, typer.Option(envvar=KEY_NAME, help=KEY)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    slots: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help=WAITING)] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.")] = 120.0,
    max_body_mb: Annotated[int, typer.Option(min=1, max=1024, help="Largest request.")] = 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one image.")] = 2**24,
    max_images: Annotated[int, typer.Option(min=0, help="Of one request.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    allow_remote_images: Annotated[bool, typer.Option("--allow-remote-images", help=REMOTE)] = False,
    ui: Annotated[bool, typer.Option("--ui", help="A page to talk to the models, at /ui.")] = False,
    no_batching: Annotated[bool, typer.Option("--no-batching", help="One request at a time, to compare.")] = False,
) -> None:
    """Serve one base with many adapters, each a model of its own, as OpenAI's chat completions.

    Ctrl-C or SIGTERM: what was accepted is finished, then the command ends with 0; a second one ends it at once.

    Example: normtune serve runs/world --adapter charts=runs/charts --port 8000
    """
    for extra in ("fastapi", "uvicorn", "prometheus_client", *(("gradio",) if ui else ())):
        need(extra, "ui" if extra == "gradio" else "serve")
    named = named_folders(adapter or [], base_name)
    api_key = os.environ.get(KEY_NAME) if api_key is None else api_key  # typer takes an empty one for none
    api_key = api_key and api_key.strip()  # a file's line break, or a blank, is no part of it
    if api_key == "":
        raise InputError("the API key is empty; give one, or leave --api-key and NORMTUNE_API_KEY out")

    from normtune.cli.output import quiet_libraries
    from normtune.progress import say
    from normtune.serving import Engine
    from normtune.serving.app import create_app
    from normtune.serving.limits import ServerSettings
    from normtune.serving.server import listen, run

    quiet_libraries()
    settings = ServerSettings(
        base_name, api_key, timeout,
        max_requests=slots + max_queue, max_body=max_body_mb * 2**20, max_bodies=max(256, 2 * max_body_mb) * 2**20,
        max_images=max_images, max_pixels=max_pixels, max_tokens=max_tokens, remote_images=allow_remote_images,
    )  # fmt: skip
    with listen(host, port) as listener:
        bank, processor = open_bank(base, named, base_name, device)
        with bank:
            engine = Engine(bank, processor, slots=slots, max_queue=max_queue, batching=not no_batching)
            app = create_app(engine, settings)
            where = "http://{}:{}".format(f"[{host}]" if ":" in host else host, listener.getsockname()[1])
            if ui:
                from normtune.serving.ui import mount

                mount(app, engine, settings=settings)

            def ready() -> None:
                if ui:
                    say(f"page at {where}/ui")
                if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
                    say("anyone who reaches this address may ask: give --api-key")
                say(f"serving {', '.join([base_name, *bank.names])} at {where}/v1")

            run(app, engine, settings, listener, ready)


def need(module: str, extra: str) -> None:
    """InputError where the package of an extra is not installed."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise InputError(f"{module} is not installed; get it with pip install 'normtune[{extra}]'")


def named_folders(given: Sequence[str], base_name: str) -> dict[str, str]:
    """`--adapter NAME=FOLDER` by name. InputError for another form, a name given twice, or the base's."""
    named: dict[str, str] = {}
    for text in given:
        name, found, folder = text.partition("=")
        if not (name.strip() and found and folder):
            raise InputError(f"--adapter {text}: write NAME=FOLDER")
        if name in named or name == base_name:
            other = "the base's; give --base-name" if name == base_name else "given twice"
            raise InputError(f"--adapter {text}: the name {name!r} is {other}")
        named[name] = folder
    return named


def open_bank(base: str, named: dict[str, str], base_name: str, device: str) -> tuple[Bank, Any]:
    """The base with its own adapter, if it has one, and the named ones; its processor; says what they take."""
    import normtune
    from normtune.adapter import find_adapter
    from normtune.bank.planning import planned, size
    from normtune.progress import say
    from normtune.serving import open_base
    from normtune.tuned import place
    from normtune.world import resolve_path

    others = {name: find_adapter(folder) for name, folder in named.items()}
    tuned, own = open_base(resolve_path(base))
    adapters: dict[str, Path] = {name: folder for name, folder in own if name not in named}
    if base_name in adapters:
        raise InputError(f"the run's name is {base_name!r}, as the base's; give another --base-name")
    for name in {name for name, _ in own} & named.keys():
        say(f"{name} is {named[name]}, in place of the adapter of {base}")
    adapters |= others
    place(tuned.model, device)
    bank = normtune.bank(tuned.model, adapters)
    if adapters:
        say(f"{planned(tuned.model, len(adapters))}; these take {size(bank.bytes)}")
    return bank, tuned.processor
