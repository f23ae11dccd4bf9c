"""A page to talk to the served models: one adapter, or two side by side, with pictures, answers streamed.

Scope: a Gradio page mounted on the server's FastAPI app; what it asks of the engine. Non-scope: what a tab remembers
(`ui_conversations.py`), the API's key (`ui_guard.py`), the API itself (`app.py`).

Nothing is asked of any other host, by the page or for it: fonts are Gradio's own files or the system's, telemetry and
the version check are off, answers are shown as plain text (Markdown could name pictures elsewhere), and a picture is
an uploaded file, never an address that the server would have to fetch.
"""

from __future__ import annotations

import asyncio
import atexit
import html
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.chat import PLACEHOLDER, Turn
from normtune.errors import InputError, NormtuneError
from normtune.serving import Sampling
from normtune.serving.limits import ServerSettings
from normtune.serving.ui_conversations import Answer, Conversation, Conversations, Picture, ask, read_pictures
from normtune.serving.ui_guard import Keyed, OwnHost

if TYPE_CHECKING:
    from fastapi import FastAPI

    from normtune.serving import Engine

if "GRADIO_TEMP_DIR" not in os.environ:
    # of this process: a server that ends deletes what it was sent, and equal pictures have equal paths in Gradio's own
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="normtune-ui-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import Response
except ImportError as error:
    raise InputError("the page needs Gradio: pip install 'normtune[ui]'") from error

NONE, BASE = "<none>", "<base>"  # values of a choice that are no adapter's name
MARGIN = 2**16  # bytes around an uploaded file
REFRESH = 5.0  # seconds between two looks at which adapters there are
NOTHING = {"text": "", "files": []}  # in the question's box
EMPTY_BOX = "() => ({text: '', files: []})"
EMPTY = [[], [], "", "", ""]  # chats, figures and message of a new conversation
KEEP = 3600  # seconds that an uploaded file is kept at most; all go when the server ends
FILE_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
STYLE = Path(__file__).with_name("ui.css")
NAME_BOX = (
    "() => document.querySelector('#question textarea').setAttribute('aria-label', 'Question')"  # Gradio does not
)
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="3" fill="#c2410c"/>
<path d="M3 10h2l2-6 2 9 2-5h2" fill="none" stroke="#fff" stroke-width="1.5"/></svg>"""

log = logging.getLogger(__name__)


def mount(
    app: FastAPI,
    engine: Engine,
    path: str = "/ui",
    settings: ServerSettings | None = None,
    examples: Sequence[tuple[Path, str]] = (),
) -> None:
    """Adds the page to `app` at `path`, before `app` is started.

    Args:
        settings: limits of the server; with `api_key` the page asks for the key first.
        examples: pictures with a question each, offered below the question.
    """
    settings = settings or ServerSettings()
    page = Page(engine, settings)
    blocks = page.build(examples)
    blocks.queue(max_size=settings.max_requests, api_open=False)
    answers = getattr(app.state, "answers", None)  # of create_app
    around = [
        Middleware(OwnHost, ended=lambda: answers is not None and answers.closing and page.idle),
        *([Middleware(Keyed, key=settings.api_key)] if settings.api_key else []),
    ]
    gr.mount_gradio_app(
        app, blocks, path, theme=_theme(), js=NAME_BOX, head=f"<style>{STYLE.read_text()}</style>",
        app_kwargs={"middleware": around, "max_body_size": settings.max_body + MARGIN},
        max_file_size=settings.max_body, allowed_paths=[str(file.resolve()) for file, _ in examples],
        footer_links=[], run_history=False, show_error=False, ssr_mode=False, mcp_server=False,
        enable_monitoring=False, pwa=False,
    )  # fmt: skip
    app.add_api_route("/favicon.ico", lambda: Response(ICON, media_type="image/svg+xml"), include_in_schema=False)


class Page:
    """The page of one engine: its parts, and what happens when they are used."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.conversations = Conversations()

    @property
    def idle(self) -> bool:
        """Nothing is being answered."""
        return not self.conversations.busy

    def build(self, examples: Sequence[tuple[Path, str]] = ()) -> gr.Blocks:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        direct: dict[str, Any] = {**private, "queue": False}
        with gr.Blocks(title="normtune", analytics_enabled=False, delete_cache=(60, KEEP)) as blocks:
            gr.HTML("<h1>normtune</h1>", elem_id="title")
            with gr.Row(elem_id="choices"):
                first, second = self.choice("Model", False), self.choice("Side by side with", True)
            with gr.Row(elem_id="chats"):
                sides = [self.side(number) for number in (0, 1)]
            message = gr.HTML("", elem_id="message")
            box = self.question_box()
            with gr.Row(elem_id="buttons"):
                new = gr.Button("New conversation", elem_id="new", min_width=150, scale=2)
                stop = gr.Button("Stop", elem_id="stop", interactive=False, min_width=60)
                send = gr.Button("Ask", variant="primary", elem_id="ask", min_width=60, scale=2)
            knobs = self.knobs()
            offered = [{"text": text, "files": [str(file.resolve())]} for file, text in examples]
            if offered:
                samples = gr.Dataset(
                    components=[box], samples=[[each] for each in offered], type="index", label="Try one"
                )
                samples.click(lambda number: offered[number], [samples], [box], concurrency_limit=None, **private)
            (_, chat, figures), (column2, chat2, figures2) = sides
            shown = [box, chat, chat2, figures, figures2, message, stop, send]
            gr.on(
                [send.click, box.submit], self.ask, [box, first, second, *knobs], shown,
                concurrency_limit=None, trigger_mode="multiple", **private,
            )  # fmt: skip
            stop.click(self.stop, None, None, **direct)
            cleared = [new.click, chat.clear, chat2.clear]
            gr.on(
                cleared, None, None, [box], js=EMPTY_BOX, **private
            )  # at once: later it would take what is typed by then
            gr.on(cleared, self.clear, None, shown, **direct)
            chosen = [first, second]
            gr.on([first.change, second.change], self.choose, chosen, [chat, chat2, column2], **direct)
            known = gr.State(None)  # a page may be opened when the last adapter is gone
            gr.on([blocks.load, gr.Timer(REFRESH).tick], self.refresh, [known, *chosen], [known, *chosen], **direct)
            blocks.unload(self.leave)
        _no_addresses(box)
        return blocks

    def choice(self, label: str, optional: bool) -> Any:
        values = self.choices(optional)
        start = values[0][1] if optional or len(values) == 1 else values[1][1]
        return gr.Dropdown(values, value=start, label=label, elem_id="second" if optional else "first")

    def choices(self, optional: bool) -> list[tuple[str, str]]:
        """(shown, value) of every model, the base first; where `optional`, none before."""
        models = [(self.settings.base_name, BASE), *((name, name) for name in self.engine.bank.names)]
        return [("nothing", NONE), *models] if optional else models

    def side(self, number: int) -> tuple[Any, Any, Any]:
        """Column, chat and figures of one side; the second is hidden until it is chosen."""
        models = self.choices(False)
        label = models[0][0] if number or len(models) == 1 else models[1][0]
        with gr.Column(min_width=300, visible=number == 0, elem_id=f"side{number}") as column:
            chat = gr.Chatbot(
                label=label, height="46vh", layout="bubble",
                render_markdown=False, latex_delimiters=[], buttons=[], feedback_options=None,
                elem_id=f"chat{number}", allow_file_downloads=False, placeholder="Answers appear here.",
            )  # fmt: skip
            figures = gr.HTML("", elem_id=f"figures{number}")
        return column, chat, figures

    def question_box(self) -> Any:
        return gr.MultimodalTextbox(
            label="Question", placeholder="Ask about a picture: drop it here, paste it, or attach it",
            file_types=FILE_TYPES, file_count="multiple", sources=["upload"], submit_btn=False, stop_btn=False,
            max_lines=6, elem_id="question", autofocus=True, show_label=True,
        )  # fmt: skip

    def knobs(self) -> list[Any]:
        """Temperature, top_p, longest answer, seed."""
        longest = self.settings.max_tokens
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            return [
                gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest word", min_width=220),
                gr.Slider(0.05, 1, 1, step=0.05, label="top_p", info="of the likeliest words", min_width=220),
                gr.Slider(1, longest, min(128, longest), step=1, label="Longest answer", info="tokens", min_width=220),
                gr.Textbox("", label="Seed", info="empty: another draw each time", max_length=20, min_width=220),
            ]

    def label(self, choice: str | None) -> str:
        if choice is None:  # it is no longer served
            return "no model"
        return self.settings.base_name if choice == BASE else choice

    async def ask(
        self, question: dict[str, Any] | None, first: str | None, second: str | None,
        temperature: float, top_p: float, longest: int, seed: str, request: gr.Request,
    ) -> AsyncIterator[list[Any]]:  # fmt: skip
        """Yields updates of `shown` in `build`: question, chats, figures, message, buttons."""
        skip = gr.skip()
        conversation = self.conversations.of(request.session_hash)
        if conversation.busy:  # a second click, or Enter too early: the question stays in its box
            yield [skip] * 8
            return
        question = question or {}
        text, files = str(question.get("text") or "").strip(), list(question.get("files") or [])
        began, last = False, None
        try:
            if first is None:
                raise InputError("choose a model; the one that was chosen is no longer served")
            if not text:
                raise InputError("ask something about the picture" if files else "ask something")
            adapters = [None if choice == BASE else choice for choice in (first, second) if choice not in (NONE, None)]
            pictures = await asyncio.to_thread(read_pictures, files, self.settings.max_pixels)
            sampling = Sampling(int(longest), float(temperature), float(top_p), read_seed(seed))
            answers = ask(self.engine, conversation, text, pictures, adapters, sampling, self.settings)
            async for current in answers:
                if conversation.forgotten:
                    continue  # until its jobs have ended
                box = skip if began else NOTHING
                began = True
                done = all(answer.finish is not None for answer in current)
                yield [box, *show(conversation, current), problems(current), *buttons(done)]
            self.conversations.trim()
        except NormtuneError as error:
            last = failed(str(error))
        except Exception:
            log.exception("the page failed to answer")
            last = failed("the server failed; its log says why")
        if conversation.forgotten:
            # what `clear` has told the page may have come before the last update from here; what is wrong with it is
            # nobody's business any more, and the message is that of a question asked since
            begun = self.conversations.begun(request.session_hash)
            last = None if begun else [skip, *EMPTY[:4], skip, *buttons(True)]
        if last is not None:
            yield last

    def stop(self, request: gr.Request) -> None:
        self.conversations.of(request.session_hash).stop()

    def clear(self, request: gr.Request) -> list[Any]:
        self.conversations.forget(request.session_hash)
        return [gr.skip(), *EMPTY, *buttons(True)]

    def leave(self, request: gr.Request) -> None:
        self.conversations.forget(request.session_hash)

    def choose(self, first: str | None, second: str | None) -> list[Any]:
        """Names above the chats, and the second one only where there is something to show in it."""
        two = second not in (NONE, None)
        return [gr.update(label=self.label(first)), gr.update(label=self.label(second)), gr.update(visible=two)]

    def refresh(self, known: list[str] | None, first: str | None, second: str | None) -> list[Any]:
        """The adapters of now in both choices; one that is gone is chosen no more."""
        names = list(self.engine.bank.names)
        if names == known:
            return [gr.skip()] * 3
        updates = []
        for chosen, optional in ((first, False), (second, True)):
            choices = self.choices(optional)
            there = chosen in [value for _, value in choices]
            updates.append(gr.update(choices=choices, **({} if there else {"value": NONE if optional else None})))
        return [names, *updates]


def read_seed(text: str) -> int | None:
    """A whole number that fits in 64 bits, or nothing. InputError for anything else."""
    if not text.strip():
        return None
    try:
        if abs(number := int(text)) < 2**63:
            return number
    except ValueError:
        pass
    raise InputError(f"the seed {text!r} is no whole number")


def show(conversation: Conversation, answers: Sequence[Answer]) -> list[Any]:
    """Both chats and both lines of figures."""
    chats, figures = [gr.skip(), gr.skip()], ["", ""]
    for answer in answers:
        turns = [*answer.turns, Turn("assistant", answer.text or "…")]
        chats[answer.side] = messages(turns, conversation.pictures)
        figures[answer.side] = html.escape(answer.figures())
    return [*chats, *figures]


def messages(turns: Sequence[Turn], pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Turns as Gradio's messages; a picture whose file has been deleted by now is named.

    Texts are escaped: also where Markdown is switched off, Gradio shows them as HTML."""
    found, rest = [], iter(pictures)
    for turn in turns:
        parts = turn.text.split(f"{PLACEHOLDER}\n") if turn.role == "user" else [turn.text]
        for picture in islice(rest, len(parts) - 1):
            there = picture.path.is_file()
            content = (
                {"path": str(picture.path), "alt_text": picture.name} if there else html.escape(f"[{picture.name}]")
            )
            found.append({"role": "user", "content": content})
        found.append({"role": turn.role, "content": {"type": "text", "text": html.escape(parts[-1])}})
    return found


def problems(answers: Sequence[Answer]) -> str:
    return alert(next((answer.error for answer in answers if answer.error), ""))


def failed(why: str) -> list[Any]:
    """What was asked and said stays as it is, and another question may be asked."""
    return [*[gr.skip()] * 5, alert(why), *buttons(True)]


def alert(text: str) -> str:
    """What went wrong, on one line, read out by screen readers."""
    return f'<p role="alert">{html.escape(" ".join(text.split()))}</p>' if text else ""


def buttons(done: bool) -> list[Any]:
    """Stop and Ask, one of which makes sense."""
    return [gr.update(interactive=not done), gr.update(interactive=done)]


def _theme() -> Any:
    """Gradio's own, with the system's fonts, and with colours that can be read (4.5 : 1) where its are too faint."""
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    orange = {"button_primary_background_fill": "#c2410c", "button_primary_background_fill_hover": "#9a3412"}
    faint = {"input_placeholder_color": "*neutral_500", "body_text_color_subdued": "*neutral_600"}
    faint |= {"input_placeholder_color_dark": "*neutral_400", "block_info_text_color": "*neutral_600"}
    return theme.set(**orange, **{f"{key}_dark": value for key, value in orange.items()}, **faint)


def _no_addresses(box: Any) -> None:
    """Makes the box refuse a "file" that is an address: Gradio would fetch it."""
    move = box.async_move_resource_to_block_cache

    async def local(source: Any) -> Any:
        if "://" in str(source):
            raise gr.Error("give a file, not an address")
        return await move(source)

    box.async_move_resource_to_block_cache = local
