"""The tokenizer of the tiny language model: whole words, lower case, and a chat template.

Punctuation is split off when encoding and put back to the word before it when decoding, so that answers read well.
Not here: which words there are (`text`), the same encoding without this object's overhead (`corpus.ids`).
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from normtune.world import corpus

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer with pad, unknown, beginning and end tokens; `<|end|>` ends a turn and an answer."""
    made = Tokenizer(WordLevel(corpus.vocabulary(), unk_token=corpus.SPECIAL[corpus.UNK]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    closing = [decoders.Replace(f" {sign}", sign) for sign in ":;"]  # beyond what the clean-up handles
    made.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=True), *closing])
    roles = [corpus.SPECIAL[index] for index in (corpus.USER, corpus.ASSISTANT, corpus.SYSTEM)]
    made.add_special_tokens(list(corpus.SPECIAL))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=corpus.SPECIAL[corpus.PAD],
        unk_token=corpus.SPECIAL[corpus.UNK],
        bos_token=corpus.SPECIAL[corpus.BOS],
        eos_token=corpus.SPECIAL[corpus.END],
        additional_special_tokens=roles,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE
    return wrapped
