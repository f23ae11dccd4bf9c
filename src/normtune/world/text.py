"""Questions about scenes with their answers, worded reasoning, and the vocabulary of the world.

Everything is generated from the scene graph with a seeded generator, so every answer is right by construction.
The wording of the questions is that of the official benchmarks ("Is there a red circle in the image?").

Not here: captions and descriptions (`phrases`), tokens and documents for pretraining (`corpus`), files (`files`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from normtune.world.phrases import caption, description, detail, name, plural, references
from normtune.world.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    Category,
    Scene,
    Thing,
    partners,
    pick,
    popularity,
)

__all__ = ["caption", "description", "detail", "name", "plural", "references"]  # of `phrases`, found here as well

NUMBERS = ("zero", "one", "two", "three", "four", "five")
POPE = "Is there a {} in the image?"
YES_OR_NO = " Please answer yes or no."
SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."
CAPTION_PROMPTS = (
    CAPTION,
    "Describe the image briefly.",
    "Give a short description of the image.",
    "Write a caption for the image.",
    "What is in the image?",
)
DETAIL_PROMPTS = (
    "Describe the image in detail.",
    "Give a detailed description of the image.",
    "What do you see in the image? Describe it in detail.",
)
EXPLAIN = " Explain your answer."
RELATIONS = ("above", "below", "to the left of", "to the right of")
_SPARE = (
    "hello thanks please this that these those my your not no yes nothing something here shown picture scene an and "
    "are there"
)


@dataclass(frozen=True)
class QA:
    """A question, its answer and its kind (a key of QUESTIONS or REASONING)."""

    question: str
    answer: str
    kind: str


def vocabulary() -> list[str]:
    """Every word and sign that this module can produce, lower case, sorted; no special tokens."""
    texts = [*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *ROWS, *COLUMNS, *NUMBERS, *RELATIONS, _SPARE]
    texts += [*CAPTION_PROMPTS, *DETAIL_PROMPTS, EXPLAIN, POPE, YES_OR_NO, SHORT, " ".join("0123456789")]
    texts += [plural(shape) for shape in SHAPES] + ["objects", "object", "empty", "background"]
    texts += ["how many which where does image contain only color shape size larger smaller so it is both have they"]
    texts += ["same the of at in on a with what more than or can be seen shows big : ; ' ( ) shown you see , . ? ! -"]
    joined = " ".join(texts).lower().replace("{}", "")
    for sign in ".,?!-:;'()":
        joined = joined.replace(sign, f" {sign} ")
    return sorted(set(joined.split()))


def relation_holds(relation: str, one: Thing, other: Thing) -> bool:
    """Whether `one` stands in `relation` to `other`; by rows and columns of the grid."""
    return {
        "above": one.row < other.row,
        "below": one.row > other.row,
        "to the left of": one.column < other.column,
        "to the right of": one.column > other.column,
    }[relation]


def absent(rng: np.random.Generator, scene: Scene, manner: str) -> Category:
    """A category that the scene lacks, chosen in POPE's manner: random, popular or adversarial.

    Adversarial takes a partner of something shown, or recombines a colour and a shape that are both shown.
    """
    shown = scene.categories
    options: Sequence[Category] = [category for category in CATEGORIES if category not in shown]
    if manner == "popular":
        ranked = sorted(options, key=lambda category: -popularity()[CATEGORIES.index(category)])
        options = ranked[:6]
    elif manner == "adversarial":
        close = [other for category in shown for other in partners()[category]]
        close += [(one[0], other[1]) for one in shown for other in shown]
        options = sorted(set(close) - shown) or options
    return pick(rng, options)


def _any_absent(rng: np.random.Generator, scene: Scene) -> Category:
    return absent(rng, scene, pick(rng, ("random", "popular", "adversarial", "adversarial")))


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def existence(rng: np.random.Generator, scene: Scene) -> QA | None:
    truth = rng.random() < 0.5
    colour, shape = pick(rng, scene.things).category if truth else _any_absent(rng, scene)
    form = pick(rng, (POPE, POPE, POPE, "Is there a {} in this image?", "Does the image contain a {}?"))
    return QA(form.format(f"{colour} {shape}"), _yes(truth), "existence")


def existence_part(rng: np.random.Generator, scene: Scene) -> QA | None:
    truth = rng.random() < 0.5
    if rng.random() < 0.5:
        shown = {thing.shape for thing in scene.things}
        options = [shape for shape in SHAPES if (shape in shown) == truth]
        form = POPE
    else:
        shown = {thing.colour for thing in scene.things}
        options = [colour for colour in COLOURS if (colour in shown) == truth]
        form = "Is there a {} object in the image?"
    return QA(form.format(pick(rng, options)), _yes(truth), "existence") if options else None


def _counted(rng: np.random.Generator, scene: Scene) -> tuple[str, str, int]:
    """(plural, singular, number) of something that can be counted in the scene."""
    shape, colour = pick(rng, SHAPES), pick(rng, tuple(COLOURS))
    if rng.random() < 0.7:  # mostly something that is there
        thing = pick(rng, scene.things)
        shape, colour = thing.shape, thing.colour
    return pick(
        rng,
        (
            ("objects", "object", len(scene.things)),
            (plural(shape), shape, sum(thing.shape == shape for thing in scene.things)),
            (f"{colour} objects", f"{colour} object", sum(t.colour == colour for t in scene.things)),
        ),
    )


def count(rng: np.random.Generator, scene: Scene) -> QA | None:
    words, _, number = _counted(rng, scene)
    form = pick(rng, ("How many {} are in the image?", "How many {} are there?"))
    return QA(form.format(words), str(number), "count")


def count_yes_no(rng: np.random.Generator, scene: Scene) -> QA | None:
    words, single, number = _counted(rng, scene)
    truth = rng.random() < 0.5
    if truth and number == 0:
        return None
    near = [n for n in (number - 2, number - 1, number + 1, number + 2) if 1 <= n <= 5]
    asked = number if truth else pick(rng, near)
    if asked == 1:
        return QA(f"Is there only one {single} in this image?", _yes(truth), "count_yes_no")
    return QA(f"Are there {NUMBERS[asked]} {words} in this image?", _yes(truth), "count_yes_no")


def colour_of(rng: np.random.Generator, scene: Scene) -> QA | None:
    thing = pick(rng, scene.things)
    if rng.random() < 0.5:
        return QA(f"What color is the object at the {thing.place}?", thing.colour, "color_at")
    if sum(other.shape == thing.shape for other in scene.things) > 1:
        return None
    return QA(f"What color is the {thing.shape}?", thing.colour, "color")


def colour_yes_no(rng: np.random.Generator, scene: Scene) -> QA | None:
    thing = pick(rng, scene.things)
    if sum(other.shape == thing.shape for other in scene.things) > 1:
        return None
    truth = rng.random() < 0.5
    others = [t.colour for t in scene.things if t.colour != thing.colour]
    wrong = pick(rng, others if others and rng.random() < 0.5 else [c for c in COLOURS if c != thing.colour])
    return QA(f"Is the {thing.shape} {thing.colour if truth else wrong}?", _yes(truth), "color_yes_no")


def shape_of(rng: np.random.Generator, scene: Scene) -> QA | None:
    thing = pick(rng, scene.things)
    if rng.random() < 0.5:
        return QA(f"What shape is the object at the {thing.place}?", thing.shape, "shape_at")
    if sum(other.colour == thing.colour for other in scene.things) > 1:
        return None
    return QA(f"What shape is the {thing.colour} object?", thing.shape, "shape")


def position(rng: np.random.Generator, scene: Scene) -> QA | None:
    thing = pick(rng, scene.things)
    return QA(f"Where is the {name(thing)}?", thing.place, "position")


def position_yes_no(rng: np.random.Generator, scene: Scene) -> QA | None:
    thing = pick(rng, scene.things)
    truth = rng.random() < 0.5
    places = [f"{row} {column}" for row in ROWS for column in COLUMNS if f"{row} {column}" != thing.place]
    others = [t.place for t in scene.things if t is not thing]
    wrong = pick(rng, others if others and rng.random() < 0.5 else places)
    asked = thing.place if truth else wrong
    return QA(f"Is the {name(thing)} at the {asked} of the image?", _yes(truth), "position_yes_no")


def size_of(rng: np.random.Generator, scene: Scene) -> QA | None:
    thing = pick(rng, scene.things)
    if rng.random() < 0.6:
        return QA(f"What size is the {name(thing)}?", thing.size, "size")
    asked = pick(rng, SIZES)
    return QA(f"Is the {name(thing)} {asked}?", _yes(asked == thing.size), "size_yes_no")


def what_at(rng: np.random.Generator, scene: Scene) -> QA | None:
    if rng.random() < 0.75:
        thing = pick(rng, scene.things)
        return QA(f"What is at the {thing.place} of the image?", name(thing), "what_at")
    place = f"{pick(rng, ROWS)} {pick(rng, COLUMNS)}"
    if any(thing.place == place for thing in scene.things):
        return None
    return QA(f"What is at the {place} of the image?", "nothing", "what_at")


def relation(rng: np.random.Generator, scene: Scene) -> QA | None:
    if len(scene.things) < 2:
        return None
    one, other = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    truth = rng.random() < 0.5
    options = [word for word in RELATIONS if relation_holds(word, one, other) == truth]
    word = pick(rng, options)
    return QA(f"Is the {name(one)} {word} the {name(other)}?", _yes(truth), "relation")


def background(rng: np.random.Generator, scene: Scene) -> QA | None:
    return QA("What color is the background?", scene.background, "background")


def compare_sizes(rng: np.random.Generator, scene: Scene) -> QA | None:
    if len(scene.things) < 2:
        return None
    one, other = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    question = f"Which is larger, the {name(one)} or the {name(other)}?{EXPLAIN}"
    if one.size == other.size:
        return QA(question, f"both are {one.size}, so they have the same size.", "compare_sizes")
    larger = one if one.size == "large" else other
    answer = f"the {name(one)} is {one.size} and the {name(other)} is {other.size}, so it is the {name(larger)}."
    return QA(question, answer, "compare_sizes")


def explain_relation(rng: np.random.Generator, scene: Scene) -> QA | None:
    if len(scene.things) < 2:
        return None
    one, other = (scene.things[i] for i in rng.permutation(len(scene.things))[:2])
    truth = rng.random() < 0.5
    word = pick(rng, [word for word in RELATIONS if relation_holds(word, one, other) == truth])
    places = f"the {name(one)} is at the {one.place} and the {name(other)} is at the {other.place}"
    return QA(
        f"Is the {name(one)} {word} the {name(other)}?{EXPLAIN}", f"{places}, so {_yes(truth)}.", "explain_relation"
    )


def compare_counts(rng: np.random.Generator, scene: Scene) -> QA | None:
    one, other = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    if rng.random() < 0.8:
        one = pick(rng, scene.things).shape
        if one == other:
            return None
    n, m = (sum(thing.shape == shape for thing in scene.things) for shape in (one, other))
    question = f"Are there more {plural(one)} than {plural(other)}?{EXPLAIN}"
    first, second = (f"{k} {shape if k == 1 else plural(shape)}" for k, shape in ((n, one), (m, other)))
    return QA(question, f"there are {first} and {second}, so {_yes(n > m)}.", "compare_counts")


Ask = Callable[[np.random.Generator, Scene], QA | None]
QUESTIONS: dict[Ask, float] = {
    existence: 5.0,
    existence_part: 1.0,
    count: 1.5,
    count_yes_no: 1.5,
    colour_of: 1.5,
    colour_yes_no: 1.0,
    shape_of: 1.5,
    position: 1.5,
    position_yes_no: 1.5,
    size_of: 1.0,
    what_at: 1.0,
    relation: 2.0,
    background: 0.4,
}
LOOK_UP: dict[Ask, float] = {existence: 0.5, colour_of: 1.0, shape_of: 1.0, position: 0.8}
REASONING: dict[Ask, float] = {compare_sizes: 1.0, explain_relation: 1.5, compare_counts: 1.0}
NEED_PLACE = frozenset({position, position_yes_no, what_at, relation, explain_relation})
NEED_SIZE = frozenset({size_of, compare_sizes})


def ask(rng: np.random.Generator, scene: Scene, kinds: dict[Ask, float]) -> QA:
    """A question of a random kind (weights in `kinds`) that the scene admits."""
    options, weights = list(kinds), np.cumsum(list(kinds.values()))
    while True:
        chosen = options[int(np.searchsorted(weights, rng.random() * weights[-1]))]
        made = chosen(rng, scene)
        if made is not None:
            return made


def suffixed(rng: np.random.Generator, qa: QA) -> str:
    """The question with one of the benchmarks' endings, or with none."""
    share = rng.random()
    if share < 0.7 or qa.question.endswith(EXPLAIN):
        return qa.question
    if qa.answer in ("yes", "no") and share < 0.86:
        return qa.question + YES_OR_NO
    return qa.question + SHORT
