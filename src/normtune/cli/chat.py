"""`normtune chat`: talk to a tuned model in a terminal, images by path, adapters by name."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from normtune.chat import Turn
    from normtune.serving import Engine, Sampling

HELP = "/image PATH shows a picture and starts anew, /adapter NAME (or none) changes who answers, /new forgets the "
HELP += "conversation, /quit ends"
NONE = "none"  # the base's name here


def chat(
    model: Annotated[str, typer.Argument(help="Run folder, adapter folder, MLLM folder or hub id.")],
    question: Annotated[list[str] | None, typer.Argument(help="Ask this and end, instead of a conversation.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to talk about.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER, for /adapter NAME; repeat it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the likeliest tokens to draw from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Draws the same answers again.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Ask a tuned model about pictures: one question, or a conversation.

    Example: normtune chat runs/world --image scene.png "Is there a red circle in the image?"
    """
    from normtune.cli.output import quiet_libraries
    from normtune.cli.serve import named_folders

    quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal's encoding lacks ends nothing
    from normtune.serving import Sampling

    named = named_folders(adapter or [], NONE)
    picture = open_picture(image) if image else None
    with opened(model, named, device) as (engine, first):
        conversation = Conversation(engine, Sampling(max_new_tokens, temperature, top_p, seed), first, picture)
        if question:
            conversation.ask(" ".join(question))
        else:
            talk(conversation)


def talk(conversation: Conversation) -> None:
    """Reads lines until /quit or their end."""
    prompt = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line with a wrong byte is refused, and ends nothing
    if prompt:
        print(HELP, file=sys.stderr)
    while (line := read_line(prompt)) is not None:
        command, _, rest = line.partition(" ")
        if line == "/quit":
            break
        if line == "/new":
            conversation.turns.clear()
        elif command == "/image":
            show(conversation, rest.strip())
        elif command == "/adapter":
            switch(conversation, rest.strip())
        elif line.startswith("/"):
            print(f"unknown command {command}; {HELP}", file=sys.stderr)
        elif line:
            put(conversation, line)


def put(conversation: Conversation, text: str) -> None:
    """Asks; what cannot be answered (a conversation beyond the context) is said and taken back."""
    from normtune.errors import InputError, JobError

    before = len(conversation.turns)
    try:
        conversation.ask(text)
    except (InputError, JobError) as error:
        del conversation.turns[before:]
        print(error, file=sys.stderr)


def show(conversation: Conversation, path: str) -> None:
    from normtune.errors import InputError

    try:
        conversation.image = open_picture(Path(os.path.expanduser(path)))
        conversation.turns.clear()
    except InputError as error:
        print(error, file=sys.stderr)


def switch(conversation: Conversation, name: str) -> None:
    from normtune.errors import InputError

    try:
        conversation.engine.bank.entry(None if name == NONE else name)
        conversation.adapter = None if name == NONE else name
    except InputError as error:
        print(error, file=sys.stderr)


def open_picture(path: Path) -> Image:
    from normtune.data import open_image
    from normtune.errors import InputError

    if not os.path.isfile(path):
        raise InputError(f"no picture at {path}; give the path of an image file")
    return open_image(path, f"--image {path}")


def read_line(prompt: bool) -> str | None:
    try:
        return input("> " if prompt else "").strip()
    except EOFError:
        return None


@contextmanager
def opened(path: str, named: dict[str, str], device: str = "auto") -> Iterator[tuple[Engine, str | None]]:
    """An engine for the base at `path`, its own adapter and the named ones, and who answers first: the run's own
    adapter, else the first that is named, else the base."""
    import normtune
    from normtune.adapter import find_adapter
    from normtune.errors import InputError
    from normtune.progress import say
    from normtune.serving import Engine, open_alone, open_base
    from normtune.tuned import place
    from normtune.world import resolve_path

    others = {name: find_adapter(folder) for name, folder in named.items()}
    tuned, own = open_base(resolve_path(path))
    place(tuned.model, device)
    adapters = {**dict(own), **others}
    try:
        bank = normtune.bank(tuned.model, adapters)
    except InputError:
        if named or not own:
            raise
        bank, adapters = open_alone(tuned, own[0][1]), {}
        place(tuned.model, device)  # what the adapter brought
        if (tuned.record or {}).get("gate") == "image":
            say("the adapter answers texts without an image, too: its gate holds in a bank, which does not take it")
    with bank, Engine(bank, tuned.processor, slots=1) as engine:
        yield engine, next(iter(adapters), None)


class Conversation:
    """Turns so far, about one picture or none, and who answers (None: the base)."""

    def __init__(self, engine: Engine, sampling: Sampling, adapter: str | None, image: Image | None) -> None:
        self.engine, self.sampling, self.adapter, self.image = engine, sampling, adapter, image
        self.turns: list[Turn] = []

    def ask(self, text: str) -> None:
        """Prints the answer to `text` as it comes; both join the conversation. Ctrl-C ends the answer alone."""
        from normtune.chat import Turn, unmarked
        from normtune.errors import JobError

        text = unmarked(text)
        first = not self.turns
        self.turns.append(Turn("user", f"<image>\n{text}" if first and self.image is not None else text))
        images = [self.image] if self.image is not None else []
        reply, tokens, started = "", 0, time.perf_counter()
        try:
            with closing(self.engine.stream(self.turns, images, self.adapter, self.sampling)) as stream:
                try:
                    for piece in stream:
                        new = piece.text if reply else piece.text.lstrip()
                        print(new, end="", flush=True)
                        reply, tokens = reply + new, piece.tokens
                        if piece.error is not None:
                            raise JobError(piece.error)
                finally:
                    print(flush=True)
        except KeyboardInterrupt:
            pass
        seconds = time.perf_counter() - started
        print(f"[{tokens} tokens, {tokens / seconds:.1f} tokens/s]", file=sys.stderr)
        self.turns.append(Turn("assistant", unmarked(reply.strip())))
