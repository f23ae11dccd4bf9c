"""Captions to tokens as coco-caption's Stanford tokenizer cuts them, without Java.

Scope: `tokenize(caption)` approximates CoreNLP 3.4.1's PTBTokenizer (`-preserveLines -lowerCase`) followed by
coco-caption's removal of punctuation: contractions, abbreviations, numbers, hyphens, slashes, quotes and brackets. The
rules were found by comparing its output with the jar's; docs/evaluation.md says how often they differ. Not here: the
tail of web text (URLs and smileys are approximate). Source: Penn Treebank tokenization; tylin/coco-caption,
`ptbtokenizer.py`, for what is dropped.
"""

from __future__ import annotations

import re
import unicodedata

# The tokens that coco-caption drops. Brackets are lower-cased before, so they stay ("-lrb-").
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)

# Abbreviations keep their full stop: those written in any case, those only before a number, those never in lower case.
_ANYWHERE = """
    a.m p.m mr mrs ms dr st ave etc vs inc jr sr co corp ltd assn jan feb mar apr jun jul aug sep sept oct nov dec mon
    tue tues wed thu thurs fri ft sq est dept univ bros blvd rd ct bldg gov gen sgt capt cpl pvt lt col maj cmdr adm
    rev hon prof profs sen rep reps sens govs pres messrs mlle mme ph.d esq al cf calif fla mich va ala ariz conn colo
    dak ga ind kan ky md minn mo mont neb nev okla penn tenn vt wis wyo elec ext tel supt insp det ste natl intl asst
    assoc adj adv cie cos treas mfg mt
"""
_BEFORE_NUMBER = "no nos fig figs pp ca op art prop"
# After these a single letter with a full stop has ended a sentence ("plan b. The ...").
_OPENERS = """
    A An The It There He She They We You This That These In At But As If Her One Some Many Now When While Then Here Our
    What So
"""
_CAPITALIZED = "mass wash tex ill pa ore miss ark del la az"


def _any(words: str) -> str:
    return "|".join(re.escape(word) for word in sorted(words.split(), key=len, reverse=True))


_W = r"[^\W_²³¹⁰⁴⁵⁶⁷⁸⁹½¼¾⅓⅔]"  # a letter or digit
_L = r"[^\W\d_]"  # a letter
_END = rf"(?!{_W})"
_NUMBER = r"(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+)"
_PART = rf"(?:(?:[dol]|qu)['’](?!(?:[smd]|re|ve|ll){_END})(?={_W}))?{_W}+"
_WORD = rf"{_PART}(?:[-_‐‑]{_PART})*"
_SIDE = rf"{_W}+(?:-{_L}+){{0,2}}"

_TOKEN = re.compile(
    rf"""
      (?P<url>https?://[^\s"<>|()]*[^\s"<>|(){{}}.,!?;:'\]]|www\.[^\s"<>|.!?(){{}},]+(?:\.[^\s"<>|.!?(){{}},/]+)+)
    | (?P<mail>[\w.-]+@(?:[\w-]+\.)+[a-z]{{1,4}}{_END})
    | (?P<tag></?[a-z][^<>]*>)
    | (?P<face>[:;=]-?[()DP]{_END})
    | (?P<area>\(\d{{3}}\)(?=\s?\d{{3}}-\d))
    | (?P<doubled>''|``)
    | (?P<assimilated>(?:can(?=not)|gon(?=na)|got(?=ta)|wan(?=na)|lem(?=me)|gim(?=me)|more(?=['’]n)|'t(?=is|was))
        (?=(?:not|na|ta|me|['’]n|is|was)(?!{_W}|['’-]{_W})))
    | (?P<kept>['’]n['’](?!t{_END})|['’]n{_END}|['’](?:em|cause|till?|[2-9]0s){_END}
        |(?:ol|dunkin|somethin)['’]{_END}|y['’](?={_L}))
    | (?P<suffix>['’](?:[smd]|re|ve|ll){_END}|n['’]t{_END})
    | (?P<stem>{_W}+(?:-{_W}+)*?(?<!n)(?=n['’]t{_END}))
    | (?P<joined>(?-i:[A-Z]+(?:[&+][A-Z]+)+)|[cf](?:\+\+|\#)|(?-i:US|[CA]|HK|NZ)\$|[#@]{_L}\w*
        |[cs]['’](?:mon|mores){_END})
    | (?P<abbreviation>(?:(?:{_any(_ANYWHERE)})\.{_END}
        |(?:{_any(_BEFORE_NUMBER)})\.(?=\s*\d)
        |(?-i:{"|".join(word.title() + "|" + word.upper() for word in _CAPITALIZED.split())})\.{_END}
        |(?:{_L}\.){{2,}}{_END}|{_L}\.{_END}(?!\s+(?-i:{_any(_OPENERS)}){_END})))
    | (?P<slashed>{_SIDE}(?:/{_SIDE}){{1,2}})
    | (?P<mixed>\d+\s\d+/\d+(?![\d/]))
    | (?P<number>{_NUMBER}(?:-{_WORD})+|\d*(?:[.,:]\d+)+|[-+]{_NUMBER}|\d+(?!{_W}|[-_]{_W}))
    | (?P<apostrophe>{_L}+[aeiouy]['’](?=[aeiou]){_L}+)
    | (?P<dotted>{_L}{_W}*(?:\.{_L}{_W}*)+(?:-{_WORD})*|{_L}+[?!]{_L}+)
    | (?P<word>{_WORD})
    | (?P<marks>[?!]{{2,}}|\*+|_+|-{{5,}})
    | (?P<dropped>\.+|-+|["'`‘’‚‛“”„«»‹›…–—―\x85\x91-\x97.,:;?!])
    | (?P<symbol>\S)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&lt;": "<", "&gt;": ">", "&nbsp;": " "}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN = {"£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_SYMBOLS = str.maketrans(_BRACKETS | _WRITTEN)
_REPLACED = re.compile("|".join((*_ENTITIES, "\u00ad", "\u200b", "\ufeff")), re.IGNORECASE)


def tokenize(caption: str) -> list[str]:
    """The lower-case tokens of one caption, without punctuation."""
    if not caption.isascii() or "&" in caption:
        caption = _REPLACED.sub(_replacement, caption)
    found = []
    for match in _TOKEN.finditer(caption):
        kind, token = match.lastgroup, match[0].lower()
        if kind in ("dropped", "doubled") or (kind == "symbol" and _unknown(token[0])):
            continue
        if kind in ("symbol", "face", "area"):
            token = token.translate(_SYMBOLS)
        elif kind in ("suffix", "kept", "assimilated"):
            token = token.replace("’", "'")
        found.append("\u00a0".join(token.split()))
    return found


def _unknown(symbol: str) -> bool:
    """Whether CoreNLP drops `symbol` as untokenizable: what lies beyond 16 bits (most emoji), marks and controls."""
    return ord(symbol) > 0xFFFF or unicodedata.category(symbol) in ("Cc", "Cf", "Cn", "Co", "Me", "Mn", "Zs")


def _replacement(match: re.Match[str]) -> str:
    text = match[0].lower()
    return _ENTITIES.get(text) or ("" if text == "\u00ad" else " ")
