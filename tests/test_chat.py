"""The label mask, against references written by hand: for each template a function says which pieces it writes and
which of them the assistant has to produce. Contents are hostile: control tokens, headers, marks, blanks, emoji."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from models import CHATML, CHATML_SYSTEM, LLAMA2, TEXT
from normtune.chat import Chat, Encoded, Turn
from normtune.errors import InputError

SPECIAL = [
    "<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>",
]  # fmt: skip
Pieces = list[tuple[str, bool]]

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{{ bos_token if loop.first }}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}{% elif m['role'] == 'user' %}"
    "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + END }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set content = m.content -%}{%- set reasoning = '' -%}"
    "{%- if m.role == 'assistant' -%}{%- if '</think>' in content -%}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) -%}{{- '<|im_start|>assistant\n<think>\n' }}"
    "{{- reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else -%}{{- '<|im_start|>assistant\n' + content }}{%- endif -%}{{- '<|im_end|>\n' }}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' }}{%- endif -%}"
)
MISTRAL = (  # the system text goes into the LAST user turn, so that a longer conversation rewrites a shorter one
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set rest = messages -%}{%- endif -%}{{- bos_token }}{%- set ns = namespace(last=0) -%}"
    "{%- for m in rest -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in rest -%}{%- if m.role == 'user' -%}{{- '[INST] ' }}{%- if system is defined and"
    " loop.index0 == ns.last -%}{{- system + '\n\n' }}{%- endif -%}"
    "{{- m.content + ' [/INST]' }}{%- else -%}{{- ' ' + m.content + eos_token }}"
    "{%- endif -%}{%- endfor -%}"
)
GLM = (  # nothing ends a turn but the token that opens the user's
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' }}{%- endif -%}"
)
HARMONY = (  # another token ends the last turn, a default system turn, more header than the generation prompt
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system<|im_end|>You help.<|end|>' }}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + (' final' if m.role == 'assistant' else '') }}"
    "{{- '<|im_end|>' + m.content }}{%- if loop.last and m.role == 'assistant' -%}{{- '<|return|>' }}{%- else -%}"
    "{{- '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' }}{%- endif -%}"
)
R1 = (  # the generation prompt opens a think block that a conversation's answers lack
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|assistant|>' + m.content + eos_token }}"
    "{%- else -%}{{- '<|user|>' + m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|><think>\n' }}{%- endif -%}"
)
ALPACA = (  # ends turns with ordinary text
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '### Response:\n' + m.content + '\n### End\n\n' }}"
    "{%- else -%}{{- '### ' + m.role + ':\n' + m.content + '\n\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:\n' }}{%- endif -%}"
)
INNER = (  # nothing ends the last turn
    "{{ bos_token }}{% for m in messages %}"
    "{{ m.role + ': ' + m.content + ('' if loop.last else eos_token) }}{% endfor %}"
)
PARTS = (  # llava-hf/llava-1.5's
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': '}}{% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def simple(
    before: dict[str, str], after: dict[str, str], written: str = "", end: str = "", strip: bool = False, **more: Any
) -> Callable[[list[Turn]], Pieces]:
    """A reference for templates that treat every turn of a role alike: header, `written` (what the model generates
    before its text), text, `end` (what it generates after it), the rest. `last` replaces `end` in a last answer."""

    def pieces(turns: list[Turn]) -> Pieces:
        result = [(more.get("first", ""), False)]
        if turns[0].role == "system" and "merge" in more:
            turns = [Turn("user", turns[0].text + more["merge"] + turns[1].text), *turns[2:]]
        elif turns[0].role != "system":
            result.append((more.get("default", ""), False))
        for n, turn in enumerate(turns):
            text = turn.text.strip() if strip else turn.text
            model, final = turn.role == "assistant", n == len(turns) - 1
            result.append((before[turn.role], False))
            result.append(
                (written + text + (more.get("last", end) if final else end), True) if model else (text, False)
            )
            if not (final and "appended" in more):
                result.append((after[turn.role], False))
        return [*result, (more.get("appended", ""), True)]

    return pieces


def roles(system: str, user: str, assistant: str) -> dict[str, str]:
    return {"system": system, "user": user, "assistant": assistant}


def llama2(turns: list[Turn]) -> Pieces:
    system = f"<<SYS>>\n{turns[0].text}\n<</SYS>>\n\n" if turns[0].role == "system" else ""
    result: Pieces = []
    for n, turn in enumerate(turns[1:] if system else turns):
        text = (system if n == 0 else "") + turn.text
        user = turn.role == "user"
        result += [(f"<s>[INST] {text.strip()} [/INST]", False)] if user else [(f" {text.strip()} </s>", True)]
    return result


def mistral(turns: list[Turn]) -> Pieces:
    system = turns[0].text + "\n\n" if turns[0].role == "system" else ""
    rest = turns[1:] if system else turns
    last = max(n for n, turn in enumerate(rest) if turn.role == "user")
    result: Pieces = [("<s>", False)]
    for n, t in enumerate(rest):
        inserted = system if n == last else ""
        result += [(f"[INST] {inserted}{t.text} [/INST]", False)] if t.role == "user" else [(f" {t.text}</s>", True)]
    return result


def qwen3(turns: list[Turn]) -> Pieces:
    result: Pieces = []
    for n, turn in enumerate(turns):
        text, reasoning = turn.text, ""
        if turn.role != "assistant":
            result.append((f"<|im_start|>{turn.role}\n{text}<|im_end|>\n", False))
            continue
        if "</think>" in text:
            reasoning = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            text = text.split("</think>")[-1].lstrip("\n")
        if n == len(turns) - 1:
            text = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + text.lstrip("\n")
        result += [("<|im_start|>assistant\n", False), (text + "<|im_end|>", True), ("\n", False)]
    return result


IM = roles("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n")
IM_END = roles("<|im_end|>\n", "<|im_end|>\n", "\n")
USERS = roles("", "USER: ", "ASSISTANT:")
HEAD3 = {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user", "assistant")}
TURN = roles("", "<start_of_turn>user\n", "<start_of_turn>model\n")
HASH = roles("### system:\n", "### user:\n", "### Response:\n")
HARM = roles("<|im_start|>system<|im_end|>", "<|im_start|>user<|im_end|>", "<|im_start|>assistant")


def r1(turns: list[Turn]) -> Pieces:
    """An answer that opens a think block has its opening in the generation prompt."""
    result: Pieces = []
    for turn in turns:
        if turn.role != "assistant":
            result.append(("<|user|>" + turn.text, False))
            continue
        think = "<think>\n" if turn.text.startswith("<think>\n") else ""
        result += [("<|assistant|>" + think, False), (turn.text.removeprefix(think) + "</s>", True)]
    return result


@dataclass(frozen=True)
class Case:
    template: str
    pieces: Callable[[list[Turn]], Pieces]
    stops: tuple[str, ...]


CASES = {
    "chatml": Case(CHATML, simple(IM, IM_END, end="<|im_end|>"), ("<|im_end|>", "</s>")),
    "chatml-default-system": Case(
        CHATML_SYSTEM,
        simple(IM, IM_END, end="<|im_end|>", default="<|im_start|>system\nYou are helpful.<|im_end|>\n"),
        ("<|im_end|>", "</s>"),
    ),
    "chatml-trim": Case(
        CHATML.replace("message['content'] ", "message['content'] | trim "),
        simple(IM, IM_END, end="<|im_end|>", strip=True),
        ("<|im_end|>", "</s>"),
    ),
    "llama3": Case(
        LLAMA3,
        simple(HEAD3, roles("<|eot_id|>", "<|eot_id|>", ""), end="<|eot_id|>", strip=True),
        ("<|eot_id|>", "</s>"),
    ),
    "llama2": Case(LLAMA2, llama2, ("</s>",)),
    "vicuna": Case(
        VICUNA.replace("END", "eos_token"), simple(USERS, roles(" ", " ", ""), " ", "</s>"), ("</s>",)
    ),
    "vicuna-no-end": Case(
        VICUNA.replace("END", "'\n'"), simple(USERS, roles(" ", " ", "\n"), " ", appended="</s>"), ("</s>",)
    ),
    "gemma": Case(
        GEMMA,
        simple(TURN, roles("", "<end_of_turn>\n", "\n"), end="<end_of_turn>", strip=True,  merge="\n\n"),
        ("<end_of_turn>", "</s>"),
    ),
    "zephyr": Case(
        ZEPHYR,
        simple(
            roles("<|system|>\n", "<|user|>\n", "<|assistant|>\n"), roles("</s>\n", "</s>\n", "\n"), end="</s>"
        ),
        ("</s>",),
    ),
    "qwen3": Case(QWEN3, qwen3, ("<|im_end|>", "</s>")),
    "mistral": Case(MISTRAL, mistral, ("</s>",)),
    "glm": Case(
        GLM,
        simple(roles("<|system|>\n", "<|user|>\n", "<|assistant|>\n"), roles("", "", ""), appended="</s>"),
        ("</s>",),
    ),
    "harmony": Case(
        HARMONY,
        simple(
            HARM,
            roles("<|end|>", "<|end|>", ""),
            " final<|im_end|>",
            "<|end|>",
            last="<|return|>",
            default="<|im_start|>system<|im_end|>You help.<|end|>",
        ),
        ("<|return|>", "<|end|>", "</s>"),
    ),
    "r1": Case(R1, r1, ("</s>",)),
    "alpaca": Case(
        ALPACA,
        simple(HASH, roles("\n\n", "\n\n", "\n\n"), end="\n### End", appended="</s>"),
        ("</s>",),
    ),
    "inner-eos": Case(
        INNER,
        simple(
            roles("system: ", "user: ", "assistant:"), roles("</s>", "</s>", ""), " ", "</s>", last="", appended="</s>",
            
        ),
        ("</s>",),
    ),
    "parts": Case(
        PARTS,
        simple(roles("", "USER: ", "ASSISTANT:"), roles(" ", " ", " "), " ", appended="</s>"),
        ("</s>",),
    ),
}  # fmt: skip


@cache
def tokenizer(kind: str = "bytes") -> PreTrainedTokenizerFast:
    """`bytes`: byte-level BPE that merges no blanks; `newlines`: one that merges runs of them, as GPT-2's does;
    `llama`: BPE with byte fallback, blanks as ▁ and a dummy one before every text."""
    corpus = TEXT.splitlines()
    if kind == "llama":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = [*SPECIAL, *(f"<0x{n:02X}>" for n in range(256))]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = SPECIAL
        corpus += ["user\n\n\nassistant\n\n system\n \nThe  cat   sat"] * 20 if kind == "newlines" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind != "llama" else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    backend.train_from_iterator(corpus, trainer)
    if kind == "llama":  # the trainer made added tokens of the bytes: in a real file they are of the vocabulary only
        state = backend.to_str()
        backend = Tokenizer.from_str(without_byte_tokens(state))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def without_byte_tokens(state: str) -> str:
    import json

    data = json.loads(state)
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(data)


@cache
def chat(name: str, kind: str = "bytes") -> Chat:
    return Chat(tokenizer(kind), CASES[name].template, "<image>")


def decode(ids: list[int], kind: str = "bytes") -> str:
    return tokenizer(kind).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def supervised(encoded: Encoded, kind: str = "bytes") -> str:
    return decode([i for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on], kind)


NASTY = [
    "", " ", "\n", " a ", "\n\nx\n", "yes", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "zqxjv", "zqxjv0",
    "zqxjva",
    "</s>", "</s><s>[INST] b [/INST]", "[/INST] x", "USER: y ASSISTANT: z", "ASSISTANT:", "<end_of_turn>\n",
    "<|eot_id|>",
    "<think>\nx\n</think>\n\ny", "</think>", "日本", "😀", "é", "\u2028", "### End", "\n### End\n\n", "<|assistant|>\n",
    "{{ x }}",
    "<start_of_turn>model\n", "<|end|>", "<|return|>", "<im", "age>",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(NASTY), st.lists(st.sampled_from(NASTY), max_size=4).map("".join), st.text(max_size=12)
).filter(lambda text: "<image>" not in text)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    turns = [Turn("system", draw(texts.filter(bool)))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(texts)), Turn("assistant", draw(texts))]
    return turns


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=60, deadline=None)
@given(turns=conversations())
def test_mask_is_the_assistants_text_and_the_end_of_its_turns(name: str, turns: list[Turn]) -> None:
    case, encoded = CASES[name], chat(name).encode(turns, [])
    pieces = case.pieces(turns)
    whole = "".join(text for text, _ in pieces)
    assert decode(encoded.input_ids) == (whole if whole.startswith("<s>") else "<s>" + whole)
    assert supervised(encoded) == "".join(text for text, on in pieces if on)


@pytest.mark.parametrize("kind", ["newlines", "llama"])
@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(CASES)), turns=conversations())
def test_mask_with_tokens_across_borders(kind: str, name: str, turns: list[Turn]) -> None:
    """Runs of blanks join across the border of a turn, bytes of a letter share its place: nothing but blanks moves."""
    found = supervised(chat(name, kind).encode(turns, []), kind)
    expected = "".join(text for text, on in CASES[name].pieces(turns) if on)
    assert "".join(found.split()) == "".join(expected.split())


@pytest.mark.parametrize("name", CASES)
def test_stop_ids(name: str) -> None:
    assert tuple(tokenizer().convert_ids_to_tokens(list(chat(name).stop_ids))) == CASES[name].stops


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("r1",)])
@settings(max_examples=20, deadline=None)
@given(turns=conversations())
def test_prompt_is_what_precedes_the_last_answers_first_supervised_token(name: str, turns: list[Turn]) -> None:
    """What the model sees when it is asked is what it saw in training (R1's template alone does not allow that)."""
    encoded = chat(name).encode(turns, [])
    prompt = chat(name).prompt(turns[:-1], [])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert all(encoded.supervised[len(prompt) :][:1]) and not encoded.supervised[len(prompt) - 1]


EXCHANGE = [
    Turn("user", "<image>\nWhat? <image>"),
    Turn("assistant", "A cat."),
    Turn("user", "And?"),
    Turn("assistant", "No"),
]


@pytest.mark.parametrize("name", CASES)
def test_images_become_runs_of_image_tokens(name: str) -> None:
    image = tokenizer().convert_tokens_to_ids("<image>")
    encoded = chat(name).encode(EXCHANGE, [5, 2])
    places = [place for place, token in enumerate(encoded.input_ids) if token == image]
    assert len(places) == 7 and places[4] - places[0] == 4 and places[6] - places[5] == 1 and encoded.images == 2
    assert not any(encoded.supervised[place] for place in places)
    plain = [Turn(turn.role, turn.text.replace("<image>", "")) for turn in EXCHANGE]
    assert supervised(encoded) == supervised(chat(name).encode(plain, []))
    assert chat(name).prompt(EXCHANGE[:1], [5, 2]).count(image) == 7


def test_image_token_of_another_name() -> None:
    other = Chat(tokenizer(), CHATML, "<|end|>")
    encoded = other.encode([Turn("user", "a<image>b"), Turn("assistant", "<|im_end|>")], [3])
    assert encoded.input_ids.count(tokenizer().convert_tokens_to_ids("<|end|>")) == 3
    with pytest.raises(InputError, match="spells that token"):
        other.encode([Turn("user", "a<image>b<|end|>"), Turn("assistant", "c")], [3])


@pytest.mark.parametrize(
    ("turns", "lengths", "message"),
    [
        ([Turn("user", "<image><image>"), Turn("assistant", "b")], [4], r"2 <image> in the text, but 1 image"),
        ([Turn("user", "a"), Turn("assistant", "b")], [4], r"0 <image> in the text, but 1 image"),
        ([Turn("user", "a"), Turn("assistant", "an <image>")], [4], r"turn 2 \(assistant\) contains <image>"),
        ([Turn("system", "<image>"), Turn("user", "a")], [4], r"turn 1 \(system\) contains <image>"),
    ],
)
def test_placeholders_that_do_not_match(turns: list[Turn], lengths: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat("chatml").encode(turns, lengths)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None)
@given(turns=conversations(), share=st.floats(0.05, 0.99), image=st.integers(1, 9))
def test_cut_keeps_whole_exchanges(name: str, turns: list[Turn], share: float, image: int) -> None:
    first = next(n for n, turn in enumerate(turns) if turn.role == "user")
    turns = [Turn(t.role, "<image>" + t.text) if n == first else t for n, t in enumerate(turns)]
    whole = chat(name).encode(turns, [image])
    limit = max(1, int(share * len(whole.input_ids)))
    cut = chat(name).encode(turns, [image], limit)
    token = tokenizer().convert_tokens_to_ids("<image>")
    assert len(cut.input_ids) == len(cut.supervised) <= limit
    assert cut.input_ids.count(token) == (image if cut.images else 0)
    if cut.cut_tokens:
        assert any(cut.supervised) and len(cut.input_ids) == limit and cut.cut_turns == len(turns) - first - 2
    elif any(cut.supervised):
        kept = turns[: len(turns) - cut.cut_turns]
        assert kept[-1].role == "assistant" and cut.input_ids == chat(name).encode(kept, [image]).input_ids
        longer = chat(name).encode(turns[: len(kept) + 2], [image]).input_ids
        assert len(longer) > limit or name == "qwen3"  # whose last answer is longer than it is when another follows
    else:
        assert cut.cut_turns == len(turns) and len(cut.input_ids) == 1


@pytest.mark.parametrize("kept", range(1, 8))
def test_cut_keeps_as_many_exchanges_as_fit(kept: int) -> None:
    turns = [Turn("system", "Short.")]
    for n in range(8):
        turns += [Turn("user", f"question {n}" * n), Turn("assistant", f"answer {n}")]
    expected = chat("chatml").encode(turns[: 1 + 2 * kept], [])
    for spare in (0, 5):
        cut = chat("chatml").encode(turns, [], len(expected.input_ids) + spare)
        assert (cut.input_ids, cut.cut_turns) == (expected.input_ids, 2 * (8 - kept))


def test_cut_never_goes_through_images() -> None:
    turns = [Turn("user", "<image>a<image>"), Turn("assistant", "an answer of several tokens")]
    whole = chat("chatml").encode(turns, [9, 9])
    first = whole.supervised.index(True)
    for limit in range(1, len(whole.input_ids)):
        cut = chat("chatml").encode(turns, [9, 9], limit)
        if limit > first:
            assert (cut.input_ids, cut.images) == (whole.input_ids[:limit], 2)
            assert cut.cut_tokens == len(whole.input_ids) - limit and any(cut.supervised)
        else:
            assert (len(cut.input_ids), cut.images, cut.cut_turns, any(cut.supervised)) == (1, 0, 2, False)


def test_cut_drops_the_images_of_the_turns_it_drops() -> None:
    turns = [Turn("user", "<image>a"), Turn("assistant", "b"), Turn("user", "<image>c"), Turn("assistant", "d")]
    whole = chat("chatml").encode(turns, [4, 4])
    cut = chat("chatml").encode(turns, [4, 4], len(whole.input_ids) - 1)
    assert (cut.images, cut.cut_turns, cut.cut_tokens) == (1, 2, 0)
    assert cut.input_ids == chat("chatml").encode(turns[:2], [4]).input_ids


BROKEN = {
    "{{ raise_exception('no chat') }}": "no chat",
    "{% for m in messages %}{{ m.content }": "fails",
    "{{ 'a' + 1 }}": "fails",
    "hello": "does not write the text",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}": "does not write",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}": "does not write",
}


@pytest.mark.parametrize("template", BROKEN)
def test_template_that_cannot_be_used(template: str) -> None:
    with pytest.raises(InputError, match=BROKEN[template]) as caught:
        Chat(tokenizer(), template, "<image>")
    assert 1 <= len(str(caught.value).splitlines()) <= 3


def test_template_whose_rendering_depends_on_an_answer_names_the_turn() -> None:
    template = "{% for m in messages %}{{ m.role + m.content + messages[-1].content | length | string }}|{% endfor %}"
    with pytest.raises(InputError, match=r"turn 2 \(assistant\)"):
        Chat(tokenizer(), template, "<image>").encode([Turn("user", "a"), Turn("assistant", "a long answer")], [])
    strict = chat("gemma")
    with pytest.raises(InputError, match="must alternate"):
        strict.encode([Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")], [])


def test_template_that_writes_the_time_survives_a_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime as clock

    import transformers.utils.chat_template_utils as utils

    ticks = iter(range(1000))
    values = [0] * 6 + [1] + [2] * 100  # the clock moves between two renderings of one conversation

    class Clock(clock.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2030, 1, 1, 0, 0, values[min(next(ticks), 99)])

    monkeypatch.setattr(utils, "datetime", Clock)
    ticking = Chat(tokenizer(), "{{ strftime_now('%H:%M:%S') }}\n" + CHATML, "<image>")
    values[next(ticks) + 2 :] = [3] * 200
    assert supervised(ticking.encode([Turn("user", "a"), Turn("assistant", "b")], [])) == "b<|im_end|>"


def test_special_tokens_around_every_text() -> None:
    """A tokenizer that puts eos behind every text must not put it behind a prompt; bos is never doubled."""
    both = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer()._tokenizer.to_str()), eos_token="</s>"
    )
    both._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for template, text in ((CHATML, "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"), (LLAMA2, "")):
        ids = Chat(both, template.replace("bos_token", "'<s>'"), "<image>").prompt([Turn("user", "a")], [])
        assert decode(ids) == (text or "<s>[INST] a [/INST]")


def test_no_way_to_stop() -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer()._tokenizer.to_str()))
    assert Chat(endless, CHATML, "<image>").stop_ids == (tokenizer().convert_tokens_to_ids("<|im_end|>"),)
    with pytest.raises(InputError, match="cannot learn to stop"):
        Chat(endless, VICUNA.replace("END", "''"), "<image>")


def test_end_token_that_is_ordinary_text_is_supervised_and_eos_follows() -> None:
    """ChatML given to a tokenizer that does not know its tokens."""
    backend = Tokenizer.from_str(tokenizer()._tokenizer.to_str())
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    template = CHATML.replace("<|im_end|>", "<<end>>")
    encoded = Chat(plain, template, "<image>").encode([Turn("user", "a"), Turn("assistant", "b")] * 2, [])
    assert supervised(encoded) == "b<<end>>b<<end>></s>"


def test_from_processor_takes_the_processors_template_first() -> None:
    class Processor:
        def __init__(self, template: Any, own: Any) -> None:
            self.tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(tokenizer()._tokenizer.to_str()), eos_token="</s>"
            )
            self.tokenizer.chat_template, self.chat_template, self.image_token = own, template, AddedToken("<image>")

    assert Chat.from_processor(Processor(GLM, CHATML)).template == GLM
    assert Chat.from_processor(Processor(None, CHATML)).template == CHATML
    assert Chat.from_processor(Processor({"tool": GLM, "default": CHATML}, None)).template == CHATML
    assert Chat.from_processor(Processor(None, CHATML)).image_token == "<image>"
    assert Chat.from_processor(Processor(None, CHATML).tokenizer).template == CHATML
    with pytest.raises(InputError, match=r"chat_template\.jinja"):
        Chat.from_processor(Processor(None, None))
