"""Scores of tokenized captions: CIDEr, BLEU and METEOR through pycocoevalcap, ROUGE-L of our own, and the tokens.

Scope: one caption per image against several references. With Java the tokens are those of the jar that pycocoevalcap
brings; without it those of `ptb`. pycocoevalcap is optional (`pip install 'normtune[eval]'`): without it there is
ROUGE-L alone. Its own tokenizer is not used, since it writes into site-packages and shifts all captions after one
that holds a line separator. Source: tylin/coco-caption; Vedantam et al., arXiv 1411.5726 (CIDEr-D); Papineni et al.,
2002 (BLEU).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from normtune.errors import InputError, JobError
from normtune.tasks import ptb
from normtune.tasks.bootstrap import share

BETA = 1.2
COLUMNS = 14  # per image: 1, ROUGE-L, words, CIDEr, 4 clipped matches, 4 n-grams, length, closest reference length
_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_TOKENIZER = "edu.stanford.nlp.process.PTBTokenizer"
# what would start a line, and lone surrogates, which JSON can hold and UTF-8 cannot
_BREAKS = re.compile("[\n\r\v\f\x1c\x1d\x1e\u2028\u2029\ud800-\udfff]")
_REMEMBERED = 300_000
_tokenized: dict[tuple[bool, str], str] = {}


def one_line(caption: str) -> str:
    """The caption with a blank for each line separator: the jar would start a new caption there."""
    return _BREAKS.sub(" ", caption)


def library() -> Path | None:
    """The folder of pycocoevalcap, or None where it is not installed."""
    found = importlib.util.find_spec("pycocoevalcap")
    # a namespace package, without an __init__.py
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None


def need_library() -> None:
    """InputError with what to install where pycocoevalcap is missing."""
    if library() is None:
        raise InputError(
            "CIDEr and BLEU need pycocoevalcap, which is not installed.\nRun: pip install 'normtune[eval]'"
        )


def has_java() -> bool:
    """Whether the Java tokenizer can be used: a java on the path and pycocoevalcap's jar."""
    folder = library()
    return folder is not None and shutil.which("java") is not None and (folder / _JAR).exists()


def tokenize(captions: Sequence[str], java: bool | None = None) -> list[str]:
    """Each caption as its tokens, joined by blanks: coco-caption's, punctuation dropped. `java` None takes the jar
    where there is one; captions seen before are not tokenized again. JobError when the jar fails."""
    java = has_java() if java is None else java
    lines = [one_line(caption) for caption in captions]
    if len(_tokenized) > _REMEMBERED:
        _tokenized.clear()
    new = [line for line in dict.fromkeys(lines) if (java, line) not in _tokenized]
    cut = _java_tokens(new) if java else [" ".join(ptb.tokenize(line)) for line in new]
    _tokenized.update({(java, line): tokens for line, tokens in zip(new, cut, strict=True)})
    return [_tokenized[java, line] for line in lines]


def _java_tokens(lines: Sequence[str]) -> list[str]:
    folder = library()
    if not lines or folder is None:
        return []
    command = ["java", "-cp", str(folder / _JAR), _TOKENIZER, "-preserveLines", "-lowerCase"]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(found) != len(lines):
        said = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise JobError(
            f"the Java tokenizer gave {len(found)} lines for {len(lines)} captions ({said:.100}).\n"
            "Repair Java, or take it off the PATH to use the tokenizer that needs none."
        )
    return [" ".join(w for w in line.rstrip().split(" ") if w not in ptb.PUNCTUATION) for line in found]


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """coco-caption's ROUGE-L of tokens joined by blanks, 0 to 1: the longest common subsequence with each reference
    gives precision and recall; the maximum of each is taken on its own, then F with beta 1.2. Nothing in common gives
    0.0."""
    words = candidate.split(" ")
    pairs = [(_common(words, reference), len(reference)) for reference in (r.split(" ") for r in references)]
    precision = max(common / len(words) for common, _ in pairs)
    recall = max(common / length for common, length in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def statistics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Sums for `figures`, one row of COLUMNS per image, from tokenized captions [U, COLUMNS]. CIDEr's and BLEU's
    columns stay 0 without pycocoevalcap. The document frequencies of CIDEr are those of `references`."""
    rows = np.zeros((len(candidates), COLUMNS))
    for row, candidate, own in zip(rows, candidates, references, strict=True):
        row[:3] = 1, rouge_l(candidate, own), len(candidate.split())
    if not candidates or library() is None:
        return rows
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    bleu, cider = BleuScorer(n=4), CiderScorer(n=4, sigma=6.0)
    for candidate, own in zip(candidates, references, strict=True):
        bleu += (candidate, list(own))
        cider += (candidate, list(own))
    # one image: the idf of all its n-grams is log 1 = 0. No word in any reference: the library would raise
    if any(reference.split() for own in references for reference in own):
        rows[:, 3] = cider.compute_score()[1]
    for row, cooked in zip(rows, bleu.ctest, strict=True):
        length = cooked["testlen"]
        row[4:8], row[8:12], row[12] = cooked["correct"], cooked["guess"], length
        row[13] = min((abs(own - length), own) for own in cooked["reflen"])[1]
    return rows


def figures(totals: np.ndarray) -> dict[str, np.ndarray]:
    """CIDEr, BLEU-1 to 4, ROUGE-L and mean length from sums over images [R, COLUMNS]. BLEU is the corpus's: products of
    clipped precisions and the brevity penalty, with the official program's tiny constants."""
    count = totals[:, 0]
    correct, guessed = totals[:, 4:8], totals[:, 8:12]
    precision = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=1)
    bleu = precision ** (1 / np.arange(1, 5))
    brevity = (totals[:, 12] + 1e-15) / (totals[:, 13] + 1e-9)
    bleu = np.where(count[:, None] > 0, bleu * np.exp(np.minimum(0, 1 - 1 / brevity))[:, None], 0.0)
    found = {"CIDEr": share(totals[:, 3], count)}
    found |= {f"Bleu_{n + 1}": bleu[:, n] for n in range(4)}
    return found | {"ROUGE_L": share(totals[:, 1], count), "words": share(totals[:, 2], count)}


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """METEOR 1.5 (`-l en -norm`) of the corpus through the jar in pycocoevalcap; None where there is no Java or the jar
    fails. Nothing to score gives None."""
    if not candidates or not has_java():
        return None
    from pycocoevalcap.meteor.meteor import Meteor

    given = {place: [caption] for place, caption in enumerate(candidates)}
    try:
        return float(Meteor().compute_score(dict(enumerate(map(list, references))), given)[0])
    except (OSError, ValueError):
        return None
