"""`normtune chat`: talk to a tuned model in a terminal, images by path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from normtune.chat import Turn
    from normtune.tuned import Tuned

HELP = "/image PATH shows a picture and starts anew, /new forgets the conversation, /quit ends"


def chat(
    model: Annotated[str, typer.Argument(help="Run folder, adapter folder or MLLM folder.")],
    question: Annotated[list[str] | None, typer.Argument(help="Ask this and end, instead of a conversation.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to talk about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
) -> None:
    """Ask a tuned model about pictures: one question, or a conversation.

    Example: normtune chat runs/world --image scene.png "Is there a red circle in the image?"
    """
    from normtune.cli.output import quiet_libraries

    quiet_libraries()
    from normtune.tuned import open_tuned

    picture = open_picture(image) if image else None
    conversation = Conversation(open_tuned(model), picture, max_new_tokens)
    if question:
        print(conversation.ask(" ".join(question)))
        return
    prompt = sys.stdin.isatty()
    if prompt:
        print(HELP, file=sys.stderr)
    while (line := read_line(prompt)) is not None:
        if line == "/quit":
            break
        if line == "/new":
            conversation.turns.clear()
        elif line.startswith("/image"):
            show(conversation, line.removeprefix("/image").strip())
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; {HELP}", file=sys.stderr)
        elif line:
            print(conversation.ask(line), flush=True)


def show(conversation: Conversation, path: str) -> None:
    from normtune.errors import InputError

    try:
        conversation.image = open_picture(Path(path).expanduser())
        conversation.turns.clear()
    except InputError as error:
        print(error, file=sys.stderr)


def open_picture(path: Path) -> Image:
    from normtune.data import open_image
    from normtune.errors import InputError

    if not path.is_file():
        raise InputError(f"no picture at {path}; give the path of an image file")
    return open_image(path, f"--image {path}")


def read_line(prompt: bool) -> str | None:
    try:
        return input("> " if prompt else "").strip()
    except EOFError:
        return None


class Conversation:
    """Turns so far, about one picture or none."""

    def __init__(self, tuned: Tuned, image: Image | None, max_new_tokens: int) -> None:
        self.tuned, self.image, self.max_new_tokens = tuned, image, max_new_tokens
        self.turns: list[Turn] = []

    def ask(self, text: str) -> str:
        """The greedy answer to `text`, which joins the conversation."""
        from normtune.chat import Turn
        from normtune.evaluation import answer

        text = text.replace("<image>", "< image >")  # the marker is not for users to write
        first = not self.turns
        self.turns.append(Turn("user", f"<image>\n{text}" if first and self.image is not None else text))
        images: list[Any] = [self.image] if self.image is not None else []
        reply = answer(
            self.tuned.model, self.tuned.processor, [(self.turns, images)], self.max_new_tokens, batch_size=1
        )[0]
        self.turns.append(Turn("assistant", reply))
        return reply
