"""Chat templates for an LLM that gets eyes: list content, a default template, the token that ends a turn.

Scope: text in, text out; what the Jinja source of a processor's chat template is. Non-scope: turning
conversations into ids and labels (`chat.py`). Source: the content parts of transformers' chat templates
(`{"type": "image"}`, `{"type": "text", "text": ...}`); the default is the Vicuna v1.1 format, which LLaVA uses.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2

from normtune.errors import InputError

IMAGE_TOKEN = "<image>"

# One line without white space between tags, and an expression at its end: a block there would make Jinja swallow
# a line break (trim_blocks) with which the LLM's own template may begin.
_PREFIX = (
    "{%- set parts = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is iterable"
    " and message['content'] is not string and message['content'] is not mapping -%}"
    "{%- set parts.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part is string -%}{%- set parts.text = parts.text + part -%}"
    "{%- elif part['type'] in ['image', 'image_url'] -%}{%- set parts.text = parts.text + '" + IMAGE_TOKEN + "\\n' -%}"
    "{%- elif part['text'] is string -%}{%- set parts.text = parts.text + part['text'] -%}"
    "{%- else -%}{{- raise_exception('content parts are of type text or image') -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set parts.messages = parts.messages + [dict(message, content=parts.text)] -%}"
    "{%- else -%}{%- set parts.messages = parts.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = parts.messages -%}{{- '' }}"
)

_VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def with_parts(template: str) -> str:
    """`template`, made to accept a list of parts as a message's content as well as a string.

    An image part becomes `<image>` and a line break, a text part its text, in their order; messages with string
    content, and everything else in them, reach the LLM's own template untouched. Applying it twice changes nothing.
    """
    if template.startswith(_PREFIX):
        return template
    # At the start of a file, Jinja's lstrip_blocks drops the blanks before a tag; behind the prefix it would not.
    return _PREFIX + re.sub(r"^[ \t]+(?=\{[%#])", "", template)


def default_template(tokenizer: Any) -> str:
    """The Vicuna format, for an LLM without a template: `USER: ... ASSISTANT: ...</s>`.

    It needs no token but the tokenizer's own end-of-text token, and begins with the beginning-of-text token if
    the tokenizer puts one before a text. Raises InputError if there is no end-of-text token.
    """
    if tokenizer.eos_token is None:
        raise InputError(
            "LLM: its tokenizer has neither a chat template nor an end-of-text token (eos_token).\n"
            "Set eos_token in its tokenizer_config.json, or add a chat_template.jinja."
        )
    begins = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + _VICUNA


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several, the one called `default`, else the first. None if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("default") or next(iter(template.values()), None)
    return template or None


def render(tokenizer: Any, template: str, messages: list[dict[str, Any]], prompt: bool = False) -> str:
    """The text of a conversation; `prompt` ends it with the opening of the assistant's turn."""
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)


def check(tokenizer: Any, template: str, name: str) -> None:
    """Raise InputError, naming the LLM, unless `template` is valid and keeps a user's image and text."""
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    try:
        text = render(tokenizer, template, [{"role": "user", "content": content}], prompt=True)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(
            f"LLM {name}: its chat template cannot be used: {line}{reason}\n"
            "Correct chat_template.jinja (or chat_template in tokenizer_config.json)."
        ) from error
    if text.count(IMAGE_TOKEN) != 1 or "What is this?" not in text:
        raise InputError(
            f"LLM {name}: its chat template drops or repeats what the user says.\n"
            "Correct chat_template.jinja (or chat_template in tokenizer_config.json)."
        )


def end_of_turn(tokenizer: Any, template: str) -> int | None:
    """The id of the special token that `template` writes after an assistant's text; None if it writes none."""
    mark = "zqxjv"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        text = render(tokenizer, template, messages)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError):
        return None
    ids = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False).input_ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special else None
