"""The text corpus of the tiny language model: chat documents about scenes that are given in words alone.

A document is one scene, told at the head of the first user turn, and several questions with answers. It comes
in three forms. `plain`: ordinary sentences. `pooled`: each phrase takes ONE position, the sum of its word
embeddings. `slots`: sixteen such positions in raster order, most of them empty, phrases repeated or divided
over neighbours. The last two teach a small model what a large one brings along, to read a dense soft token;
no pixel and no vision feature is involved in any of them.

Not here: the model and its training (`pretrain`), sentences (`text`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from normtune.world import scenes, text
from normtune.world.scenes import Scene, pick

SPECIAL = ("<pad>", "<unk>", "<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
PAD, UNK, BOS, USER, ASSISTANT, END, SYSTEM = range(len(SPECIAL))
LENGTH = 144  # positions of a document
BAG = 6  # words that one pooled position can hold
FORMS = ("plain", "pooled", "slots")
SHARES = ((0.0, 0.7, 0.3), (0.6, 0.2, 0.2), (0.45, 0.15, 0.4))  # of the forms, at each level
LEVELS = len(SHARES)
PRACTICE: dict[text.Ask, float] = {
    **text.QUESTIONS,
    text.existence: 3.0,
    text.count: 2.5,
    text.count_yes_no: 2.5,
    text.position_yes_no: 2.0,
}  # the last level's questions: what is hard to learn comes more often than it is asked later
IGNORE = -100


def vocabulary() -> dict[str, int]:
    """Token -> id: special tokens first, then the words of `text` in alphabetical order."""
    return {token: index for index, token in enumerate((*SPECIAL, *text.vocabulary()))}


_IDS = vocabulary()
_CONTENT = frozenset(
    _IDS[word]
    for words in (scenes.COLOURS, scenes.SHAPES, scenes.SIZES, scenes.BACKGROUNDS, scenes.ROWS, scenes.COLUMNS)
    for word in words
)
_BREAKS = frozenset(_IDS[sign] for sign in ",;.")
_SIGNS = re.compile(r"\w+|[^\w\s]")


def ids(sentence: str) -> list[int]:
    """Token ids of a sentence; the same as the shipped tokenizer's, without its overhead."""
    return [_IDS.get(word, UNK) for word in _SIGNS.findall(sentence.lower())]


@dataclass
class Document:
    """`bags`: the ids summed at each position; `weights`: loss weight of predicting that position (0: none).

    In a `parallel` document every question is asked as if it were the first: it sees the scene (part 0) and
    itself, so nothing is learned from earlier answers. Otherwise the questions form one conversation.
    """

    bags: list[Sequence[int]] = field(default_factory=lambda: [(BOS,), (USER,)])
    weights: list[float] = field(default_factory=lambda: [0.0, 0.0])
    soft: list[bool] = field(default_factory=lambda: [False, False])
    parts: list[int] = field(default_factory=lambda: [0, 0])
    parallel: bool = False

    def add(self, tokens: Sequence[int], weight: float = 0.0) -> None:
        self.bags += [(token,) for token in tokens]
        self.weights += [weight] * len(tokens)
        self.soft += [False] * len(tokens)
        self.parts += [self.parts[-1]] * len(tokens)

    def add_told(self, bags: Sequence[Sequence[int]]) -> None:
        self.add([bag[0] for bag in bags])
        self.bags[-len(bags) :] = bags

    def add_soft(self, bags: Sequence[Sequence[int]]) -> None:
        self.bags += bags
        self.weights += [0.0] * len(bags)
        self.soft += [True] * len(bags)
        self.parts += [0] * len(bags)

    def turn(self, question: str, answer: str) -> None:
        """Closes the open user turn with `question` and answers it; long answers weigh less per token."""
        before = len(self.bags)
        if self.bags[-1] == (END,) and not self.parallel:
            self.add([USER])
        self.add([*ids(question), END, ASSISTANT])
        tokens = [*ids(answer), END]
        self.add(tokens, min(1.0, 6.0 / len(tokens)))
        if self.parallel:
            self.parts[before:] = [self.parts[before - 1] + 1] * (len(self.bags) - before)


def phrases(rng: np.random.Generator, scene: Scene, place: bool, size: bool) -> list[list[int]]:
    """One bag per thing and one for the background, in random order."""
    bags = []
    for thing in scene.things:
        words = [thing.colour, thing.shape]
        words += thing.place.split() if place else []
        words += [thing.size] if size else []
        bags.append([_IDS[word] for word in words])
    bags.append([_IDS[scene.background], _IDS["background"]])
    return [bags[i] for i in rng.permutation(len(bags))]


def slots(rng: np.random.Generator, scene: Scene, place: bool, size: bool) -> list[list[int]]:
    """Sixteen bags in raster order, laid out as an image's patches would be."""
    owner = scenes.owners(scenes.layout(scene, rng))
    ground = [_IDS[scene.background], _IDS[pick(rng, ("empty", "background"))]]
    bags: list[list[int]] = [ground] * len(owner)
    for index, thing in enumerate(scene.things):
        words = [thing.colour, thing.shape]
        words += thing.place.split() if place else []
        words += [thing.size] if size else []
        whole = [_IDS[word] for word in words]
        mine = [patch for patch, thing_index in enumerate(owner) if thing_index == index]
        divided = len(mine) > 1 and rng.random() < 0.3
        for number, patch in enumerate(mine):
            kept = [word for word in whole if rng.random() < 0.7] if divided and number else whole
            bags[patch] = kept or whole
    return bags


def echoed(rng: np.random.Generator, sentence: str) -> list[list[int]]:
    """A told scene, one bag per word; in half of the documents words carry some earlier ones of their phrase.

    That bridges pooled phrases and ordinary sentences, in which the words of a phrase have to be gathered.
    """
    share = rng.random() if rng.random() < 0.5 else 0.0
    bags: list[list[int]] = []
    phrase: list[int] = []
    for token in ids(sentence):
        bags.append([token, *(earlier for earlier in phrase if rng.random() < share)])
        if token in _CONTENT:
            phrase.append(token)
        elif token in _BREAKS:
            phrase = []
    return bags


def document(rng: np.random.Generator, form: str, level: int, length: int = LENGTH) -> Document:
    """A random document of the given level: a scene told in `form`, and as many questions as fit.

    Levels below the last ask for single attributes of two or three things, every question by itself; the last
    level asks everything of one to four things, in conversations as well.
    """
    last = level == LEVELS - 1
    scene = scenes.sample(rng, "text", *((1, 4) if last else (2, 3)))
    place, size = not last or rng.random() > 0.1, not last or rng.random() > 0.1
    made = Document(parallel=not last or rng.random() < 0.7)
    if form == "plain":
        made.add_told(echoed(rng, text.description(rng, scene, place, size)))
    else:
        made.add_soft((phrases if form == "pooled" else slots)(rng, scene, place, size))
    banned = (frozenset() if place else text.NEED_PLACE) | (frozenset() if size else text.NEED_SIZE)
    if not place:
        banned |= {text.colour_of, text.shape_of}  # half of them name a place
    kinds = PRACTICE if last and (form != "plain" or rng.random() < 0.7) else text.LOOK_UP
    questions = {kind: weight for kind, weight in kinds.items() if kind not in banned}
    reasoning = {kind: weight for kind, weight in text.REASONING.items() if kind not in banned}
    copying = 0.08 if last and place and size else 0.0
    while True:
        before, share = len(made.bags), rng.random()
        if share < 0.6 * copying:
            made.turn(pick(rng, text.CAPTION_PROMPTS), text.caption(scene))
        elif share < copying:
            made.turn(pick(rng, text.DETAIL_PROMPTS), text.detail(scene))
        else:
            qa = text.ask(rng, scene, reasoning if last and share > 0.92 else questions)
            made.turn(text.suffixed(rng, qa), qa.answer)
        if len(made.bags) > length:
            for column in (made.bags, made.weights, made.soft, made.parts):
                del column[before:]
            return made


@dataclass(frozen=True)
class Batch:
    """B documents padded to S positions.

    bags [B, S, BAG] int64 (PAD fills); labels [B, S] int64, the token AT each position or -100; weights [B, S]
    float32; soft [B, S] bool; places [B, S] int64, position ids; mask [B, 1, S, S] bool, what each position sees.
    """

    bags: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    soft: torch.Tensor
    places: torch.Tensor
    mask: torch.Tensor


def collate(documents: Sequence[Document]) -> Batch:
    """Pads on the right."""
    length = max(len(document.bags) for document in documents)
    bags = np.zeros((len(documents), length, BAG), np.int64)
    labels = np.full((len(documents), length), IGNORE, np.int64)
    weights = np.zeros((len(documents), length), np.float32)
    soft = np.zeros((len(documents), length), bool)
    parts = np.zeros((len(documents), length), np.int64)
    places = np.tile(np.arange(length), (len(documents), 1))
    for row, document in enumerate(documents):
        size = len(document.bags)
        bags[row, :size, 0] = [bag[0] for bag in document.bags]
        for position, bag in enumerate(document.bags):
            if len(bag) > 1:
                bags[row, position, : len(bag)] = bag
        weights[row, :size] = document.weights
        labels[row] = np.where(weights[row] > 0, bags[row, :, 0], IGNORE)
        soft[row, :size] = document.soft
        mine = np.asarray(document.parts)
        parts[row, :size] = mine
        starts = np.flatnonzero(np.diff(mine, prepend=mine[0]))  # of parts 1, 2, ...
        offsets = np.concatenate([[0], starts - starts[:1].sum()])
        places[row, :size] -= offsets[mine]
    causal = np.tril(np.ones((length, length), bool))
    same = parts[:, :, None] == parts[:, None, :]
    mask = (causal & (same | (parts[:, None, :] == 0)))[:, None]
    return Batch(*(torch.from_numpy(array) for array in (bags, labels, weights, soft, places, mask)))


def batch(seed: int, step: int, size: int, level: int) -> Batch:
    """The training batch of a step: a function of the arguments alone, so that a build can be resumed."""
    rng = np.random.default_rng((seed, step))
    limits = np.cumsum(SHARES[level]) * size
    forms = [FORMS[int(np.searchsorted(limits, row + 0.5))] for row in range(size)]
    return collate([document(rng, form, level) for form in forms])
