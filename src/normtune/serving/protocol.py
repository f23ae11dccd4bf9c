"""OpenAI's chat completions: the document of a request read strictly, the documents of an answer written.

Scope: which parameters are known, taken for granted or refused; messages as turns with places for images; JSON that is
none. What would change the answer and is not supported is refused, never left out in silence. Non-scope: HTTP (`app`),
pixels (`uploads`), tokens (`engine`). Source: OpenAI's API reference of `POST /v1/chat/completions`.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from normtune.chat import PLACEHOLDER, Turn, unmarked
from normtune.errors import did_you_mean
from normtune.serving.limits import ApiError

MAX_MESSAGES = 512
MAX_TEXT = 2**20  # characters of all messages: a tokenizer's second, and beyond every context
MAX_VALUES = 2**16  # of a document: reading and refusing millions would hold up every thread for seconds
MAX_STOPS = 4
IGNORED = {  # bookkeeping of OpenAI's platform: no answer depends on it
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # parameters that are not supported, and the values that ask for nothing
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
}
_TAGS = ("text", "image_url")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # possessive, closed or not: never looks back


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _said(value: Any) -> Any:
    """Null asks for nothing; clients that send an answer back as a turn name `refusal`, `tool_calls` and so on."""
    return {key: own for key, own in value.items() if own is not None} if isinstance(value, dict) else value


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # a hint: the image processor of the model decides


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


_Part = Annotated[_Text | _Image, Field(discriminator="type")]


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], BeforeValidator(_parts)] = Field(min_length=1)


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; we send none


class _Body(_Strict):
    model: str
    messages: list[Annotated[_Message, BeforeValidator(_said)]] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(_list)] | None = Field(
        None, max_length=MAX_STOPS
    )


@dataclass(frozen=True)
class ImageRef:
    """Where a request's image is: its URL, and the place in the document for error messages."""

    url: str
    param: str


@dataclass(frozen=True)
class ChatRequest:
    """What is asked. `max_tokens` None: as long as the server and the model's context allow."""

    model: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_request(body: bytes) -> ChatRequest:
    """A request's document.

    Raises:
        ApiError: 400, with the parameter that is wrong or not supported.
    """
    document = read_json(body)
    if not isinstance(document, dict):
        raise ApiError(400, "The request's body must be a JSON object.")
    asked = {key: value for key, value in document.items() if value is not None and key not in IGNORED}
    for name in [name for name in asked if name in NEUTRAL]:
        value = asked.pop(name)
        if not any(value == none and isinstance(value, bool) == isinstance(none, bool) for none in NEUTRAL[name]):
            raise ApiError(400, f"{name!r} is not supported by this server.", name, "unsupported_parameter")
    try:
        return _request(_Body.model_validate(asked))
    except ValidationError as error:
        refuse(error)


def read_json(body: bytes) -> Any:
    """As `json.loads`; ApiError 400 for what is no JSON, NaN and Infinity included, or nested too deeply."""
    try:
        commas = body.count(b",")
        if commas > MAX_TEXT + MAX_VALUES or (commas > MAX_VALUES < _STRING.sub(b"", body).count(b",")):
            raise ValueError("it has too many values")
        text = body.decode("utf-8")
        found = json.loads(text, parse_constant=_no_constant)
        if re.search(rb"\\u[dD]", body):  # a pair of surrogates, or half of one, which no tokenizer takes
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError:
        reason = "it is not valid UTF-8"
    except UnicodeEncodeError:
        reason = "it has half of a surrogate pair"
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno}, column {error.colno}"
    except ValueError as error:  # NaN, a number of thousands of digits, too many values
        reason = str(error).partition(";")[0]
    raise ApiError(400, f"The request's body is not valid JSON: {reason}.", code="invalid_json")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def refuse(error: ValidationError) -> NoReturn:
    """Raises the first of pydantic's errors as ApiError 400."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = [
        key for n, key in enumerate(first["loc"]) if not (key in _TAGS and n and isinstance(first["loc"][n - 1], int))
    ]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")
    if first["type"] == "extra_forbidden":
        known = (*_Body.model_fields, *NEUTRAL, *IGNORED) if len(place) == 1 else ()
        guess = did_you_mean(str(place[-1])[:100], known)
        raise ApiError(400, f"Unrecognized request argument: {param!r}{guess}.", param, "unknown_parameter")
    if first["type"] == "union_tag_invalid":
        found = first.get("ctx", {}).get("tag", "")
        raise ApiError(400, f"Parts of type {found!r} are not supported, only text and image_url.", f"{param}.type")
    reason = "must be an object" if first["type"].startswith("model_") else first["msg"]
    raise ApiError(400, f"{param}: {reason}.", param, "invalid_value")


def _request(body: _Body) -> ChatRequest:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' is only for streams: set stream to true.", "stream_options")
    lengths = {length for length in (body.max_tokens, body.max_completion_tokens) if length is not None}
    if len(lengths) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them.", "max_completion_tokens")
    turns, images = _turns(body.messages)
    return ChatRequest(
        model=body.model,
        turns=turns,
        images=images,
        max_tokens=lengths.pop() if lengths else None,
        temperature=0.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=tuple(body.stop or ()),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _turns(messages: list[_Message]) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
    """Parts of a message joined by line breaks, "<image>" in the place of each image."""
    if sum(len(part.text) for message in messages for part in message.content if part.type == "text") > MAX_TEXT:
        raise ApiError(
            400, f"The messages have more than {MAX_TEXT:,} characters.", "messages", "context_length_exceeded"
        )
    if messages[-1].role != "user":
        raise ApiError(400, "The last message must be the user's.", f"messages[{len(messages) - 1}].role")
    turns, images = [], []
    for number, message in enumerate(messages):
        texts = []
        for place, part in enumerate(message.content):
            param = f"messages[{number}].content[{place}]"
            if part.type == "text":
                texts.append(unmarked(part.text))
                continue
            if message.role != "user":
                raise ApiError(400, "Only a user's message may have images.", param)
            images.append(ImageRef(part.image_url.url, f"{param}.image_url.url"))
            texts.append(PLACEHOLDER)
        turns.append(Turn("system" if message.role == "developer" else message.role, "\n".join(texts)))
    return tuple(turns), tuple(images)


@dataclass(frozen=True)
class Reply:
    """The documents of one answer, whole or in chunks; `usage` is [prompt, completion] tokens."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, usage: tuple[int, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._document("chat.completion", [choice]), "usage": usage_of(usage)}

    def chunk(self, delta: dict[str, str], finish: str | None = None, count: bool = False) -> dict[str, Any]:
        """A part of a stream; where usage comes at its end (`count`), the others say null."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        document = self._document("chat.completion.chunk", [choice])
        return {**document, "usage": None} if count else document

    def counts(self, usage: tuple[int, int]) -> dict[str, Any]:
        """The last chunk of a stream with `include_usage`."""
        return {**self._document("chat.completion.chunk", []), "usage": usage_of(usage)}

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage_of(usage: tuple[int, int]) -> dict[str, int]:
    prompt, completion = usage
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def model_card(name: str, created: int) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "normtune"}
