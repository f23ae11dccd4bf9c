"""The serving engine: whatever comes when, each request gets the answer that its adapter gives alone."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import normtune as nt
from asked import picture
from models import tiny_mllm, tiny_tokenizer
from normtune.bank import bank
from normtune.chat import Turn
from normtune.errors import InputError
from normtune.evaluation import answer
from normtune.serving import Closed, Engine, Job, Piece, QueueFull, Sampling, open_alone, open_base
from normtune.serving.sampling import Sampler, choose
from normtune.serving.slots import ROOM, Row, Slots, can_join
from normtune.serving.text import Text
from normtune.strategy import tuning
from normtune.tuned import Tuned

PICTURES = [picture(number) for number in range(5)]


@dataclass
class Told:
    """What an owner was told."""

    pieces: list[Piece] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, piece: Piece) -> None:
        assert not self.done.is_set(), "a piece after the last"
        self.pieces.append(piece)
        if piece.finish is not None:
            self.done.set()

    def text(self) -> str:
        assert self.done.wait(60)
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        assert self.done.wait(60)
        return self.pieces[-1].finish


@dataclass(frozen=True)
class Ask:
    """A request: text, number of a picture or None, adapter, length of the answer."""

    text: str
    image: int | None = None
    adapter: str | None = None
    length: int = 12

    @property
    def turns(self) -> list[Turn]:
        return [Turn("user", f"<image>\n{self.text}" if self.image is not None else self.text)]

    @property
    def images(self) -> list[Image.Image]:
        return [] if self.image is None else [PICTURES[self.image]]


def submit(engine: Engine, ask: Ask, told: Callable[[Piece], None], whole: bool = False, **sampling: Any) -> Job:
    prompt = engine.prepare(ask.turns, ask.images, ask.adapter)
    return engine.submit(prompt, Sampling(ask.length, **sampling), told, whole=whole)


def asked(engine: Engine, ask: Ask, **sampling: Any) -> str:
    told = Told()
    submit(engine, ask, told, **sampling)
    return told.text()


def silence(model: Any, processor: Any) -> None:
    """The image token and the padding are never sampled, so that greedy answers can be compared."""
    ids = [processor.image_token_id, processor.tokenizer.pad_token_id]
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: out.index_fill(-1, torch.tensor(ids), -1e9)
    )


def save_adapters(folder: Path, mllm: Path, whole: str | list[str] = "layernorm") -> dict[str, Path]:
    """Three adapters with large changes: gains alone, with connector, embedding and head, gated."""
    made = {}
    strategies: dict[str, Any] = {"gains": "layernorm-simple", "whole": whole, "gated": "layernorm-simple"}
    for seed, (name, strategy) in enumerate(strategies.items()):
        model, _ = nt.load(str(mllm))
        nt.apply(model, strategy)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (0.5 if parameter.ndim == 1 else 0.05) * noise
        facts = {"gate": "image"} if name == "gated" else {}
        made[name] = nt.save_adapter(model, folder / name, **facts)
    return made


class Reference:
    """`evaluation.answer` on a model of its own, with the adapter loaded."""

    def __init__(self, mllm: Path, adapters: dict[str, Path]) -> None:
        self.model, self.processor = nt.load(str(mllm))
        silence(self.model, self.processor)
        for name, folder in adapters.items():
            nt.load_adapter(self.model, folder, name)

    def __call__(self, ask: Ask) -> str:
        gated = ask.adapter == "gated" and ask.image is None
        nt.set_adapter(self.model, None if gated else ask.adapter)
        return answer(self.model, self.processor, [(ask.turns, ask.images)], ask.length)[0]


@pytest.fixture(scope="module")
def adapters(mllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(tmp_path_factory.mktemp("adapters"), mllm_folder)


@pytest.fixture(scope="module")
def reference(mllm_folder: Path, adapters: dict[str, Path]) -> Reference:
    return Reference(mllm_folder, adapters)


@pytest.fixture(scope="module")
def pair(mllm_folder: Path, adapters: dict[str, Path]) -> Any:
    model, processor = nt.load(str(mllm_folder))
    return SimpleNamespace(bank=bank(model, adapters), processor=processor, model=model)


@pytest.fixture
def make(pair: Any) -> Iterator[Callable[..., Engine]]:
    """Engines on the one bank, one at a time."""
    made: list[Engine] = []

    def build(**options: Any) -> Engine:
        made.append(Engine(pair.bank, pair.processor, **options))
        return made[-1]

    yield build
    for engine in made:
        engine.close(drain=False)


def mixed(count: int, seed: int = 0) -> list[Ask]:
    chance = random.Random(seed)
    return [
        Ask(
            f"Is thing {number} there" + " now" * chance.randrange(12) + "?",
            chance.choice([None, *range(len(PICTURES))]),
            chance.choice([None, "gains", "whole", "gated"]),
            chance.randint(1, 14),
        )
        for number in range(count)
    ]


@pytest.mark.heavy
@pytest.mark.parametrize(("options", "count"), [({"slots": 4}, 40), ({"slots": 16}, 40), ({"batching": False}, 6)])
def test_mixed_requests_that_come_at_any_time(
    make: Callable[..., Engine], reference: Reference, options: dict[str, Any], count: int
) -> None:
    engine, chance = make(**options), random.Random(1)
    asks, told = mixed(count), [Told() for _ in range(count)]
    assert engine.joins
    jobs: dict[int, Job] = {}

    def client(numbers: Sequence[int]) -> None:
        for number in numbers:
            time.sleep(chance.random() * 0.01)
            jobs[number] = submit(engine, asks[number], told[number])

    with engine:
        clients = [threading.Thread(target=client, args=(range(start, count, 3),)) for start in range(3)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        texts = [one.text() for one in told]
    for number, ask in enumerate(asks):
        assert texts[number].strip() == reference(ask), ask
        last = told[number].pieces[-1]
        assert last.finish in ("stop", "length") and last.tokens <= ask.length
        assert (last.tokens == ask.length) or last.finish == "stop"
    assert len(set(texts)) > count // 2  # the answers tell the requests apart
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.admitted, stats.finished) == (0, 0, count, count)
    assert stats.tokens == sum(one.pieces[-1].tokens for one in told)
    shown = [ask.image for ask in asks if ask.image is not None]
    assert stats.images_encoded == len(set(shown)) and stats.image_cache_hits <= len(shown) - len(set(shown))


def test_a_conversation_with_several_images(make: Callable[..., Engine], reference: Reference) -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "<image>What?"),
        Turn("assistant", "A cat."),
        Turn("user", "And <image>?"),
    ]
    nt.set_adapter(reference.model, "whole")
    expected = answer(reference.model, reference.processor, [(turns, PICTURES[:2])], 9)[0]
    with make() as engine:
        pieces = list(engine.stream(turns, PICTURES[:2], "whole", Sampling(9)))
    assert "".join(piece.text for piece in pieces).strip() == expected
    assert [piece.tokens for piece in pieces] == sorted(piece.tokens for piece in pieces)


def test_a_long_answer(make: Callable[..., Engine], reference: Reference) -> None:
    asks = [Ask("Tell a long story.", None, "gains", 250), Ask("Tell another long story.", 1, "whole", 180)]
    with make() as engine:
        told = [Told() for _ in asks]
        for ask, one in zip(asks, told, strict=True):
            submit(engine, ask, one)
        for ask, one in zip(asks, told, strict=True):
            assert one.text().strip() == reference(ask)
        assert max(one.pieces[-1].tokens for one in told) > 2 * ROOM


def test_rows_of_a_bfloat16_base_join(mllm_folder: Path, adapters: dict[str, Path]) -> None:
    model, processor = nt.load(str(mllm_folder), dtype="bfloat16")
    with bank(model, adapters) as held, Engine(held, processor) as engine:
        assert engine.joins
        assert asked(engine, Ask("What is it?", 1, "whole")) != asked(engine, Ask("What is it?", 1))


def test_steps_are_shared(make: Callable[..., Engine]) -> None:
    """Eight answers of twelve tokens take the steps of one, and no more."""
    engine = make(slots=8)
    told = [Told() for _ in range(8)]
    for number, one in enumerate(told):
        submit(engine, Ask(f"Say {number}", length=12), one)
    with engine:
        longest = max(one.text() and one.pieces[-1].tokens for one in told)
    assert engine.stats.steps <= longest


@pytest.mark.parametrize("settings", [{"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.5}])
def test_sampling_depends_on_the_seed_alone(make: Callable[..., Engine], settings: dict[str, float]) -> None:
    ask = Ask("What is it", 0, "gains")
    with make(slots=6) as engine:
        alone = [asked(engine, ask, seed=seed, **settings) for seed in range(4)]
        told = [Told() for _ in range(4)]
        company = [Told() for _ in range(20)]
        for number, one in enumerate(company):
            submit(engine, mixed(20, 3)[number], one, temperature=2.0 if number % 2 else 0.0)
            if number % 5 == 0:
                submit(engine, ask, told[number // 5], seed=number // 5, **settings)
        assert [one.text() for one in told] == alone
        assert len(set(alone)) > 1 and asked(engine, ask, **settings) != asked(engine, ask, **settings)


def test_draws_have_the_probabilities_of_the_logits() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
    samplers = [Sampler(Sampling(temperature=0.7, top_p=0.95, seed=seed)) for seed in range(4000)]
    tokens: Any = choose(logits.expand(4000, 5).clone(), samplers, torch.tensor([], dtype=torch.int64))
    counts = torch.bincount(torch.tensor(tokens), minlength=5) / 4000
    shares = (logits / 0.7).softmax(-1)
    kept = shares * torch.tensor([1, 1, 1, 0, 0])  # 0.76 + 0.18 < 0.95, so that the third is the last
    assert torch.allclose(counts, kept / kept.sum(), atol=0.03) and counts[3:].sum() == 0


def test_what_stands_for_an_image_is_never_chosen() -> None:
    nan, free = float("nan"), Sampling(temperature=1.0, seed=0)
    logits = torch.tensor([[0.0, 9.0, 1.0], [0.0, nan, 0.0], [nan, 0.0, 0.0], [0.0, 0.0, nan]])
    tokens = choose(logits, [None, Sampler(free), Sampler(free), None], torch.tensor([1]))
    assert tokens[0] == 2 and tokens[1] in (0, 2) and all(isinstance(token, RuntimeError) for token in tokens[2:])
    hot = [Sampler(Sampling(temperature=1e308, seed=seed)) for seed in range(40)]
    assert set(choose(torch.zeros(40, 3), hot, torch.tensor([1]))) == {0, 2}


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a mark, what is unknown falls back to bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁cat", "s", "▁", "b", "c"]
    backend = Tokenizer(
        token_models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("build", [tiny_tokenizer, metaspace])
def test_text_as_it_comes_is_the_text_of_all_tokens(build: Callable[[], Any]) -> None:
    tokenizer, chance = build(), random.Random(0)
    written = tokenizer("a cat, größer: 日本 🙂🙂 ok", add_special_tokens=False).input_ids
    noise = [[chance.randrange(len(tokenizer)) for _ in range(20)] for _ in range(50)]
    if build is metaspace:  # one wrong byte makes replacement characters of the good ones before it, shown by then
        noise = [[token for token in ids if token not in range(2, 258)] for ids in noise]
    for ids in (written, *noise):
        text = Text(tokenizer)
        pieces = [text.add(token) for token in ids]
        assert "".join(pieces) + text.end() == tokenizer.decode(ids, skip_special_tokens=True)
        if ids is written:
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
            assert sum(bool(piece) for piece in pieces) > 5


def test_wrong_bytes_lose_nothing_beside_them() -> None:
    """The tokenizer writes them and the good ones before them anew, when those were shown already."""
    tokenizer, chance = metaspace(), random.Random(0)
    good = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0x41>", "▁a", "b", "▁cat"])
    for _ in range(300):
        ids = [chance.choice([*good, 2 + 0xFF, 2 + 0xC3]) for _ in range(12)]
        text = Text(tokenizer)
        told = "".join(text.add(token) for token in ids) + text.end()
        plain, whole = (re.sub("[éA\N{REPLACEMENT CHARACTER}]", "", one) for one in (told, tokenizer.decode(ids)))
        assert plain == whole


STOPS = [
    (" big",),
    ("s left", "zz"),
    ("squares",),
    ("circle is", "red c"),
    ("square.", "g blue"),
    ("square.!",),
    ("T",),
]


@pytest.mark.parametrize("stop", STOPS)
def test_stop_strings_are_never_shown(stop: tuple[str, ...]) -> None:
    tokenizer = tiny_tokenizer()
    whole = "The small red circle is left of the big blue square."
    places = [whole.index(one) for one in stop if one in whole]
    shown = whole[: min(places)] if places else whole
    text, told, ids = Text(tokenizer, stop), "", tokenizer(whole, add_special_tokens=False).input_ids
    assert len(ids) > 8
    for token in ids:
        told += text.add(token)
        assert shown.startswith(told)
        if text.stopped:
            break
    assert told + text.end() == shown and text.stopped == bool(places)


def test_stop_strings_end_an_answer(make: Callable[..., Engine], reference: Reference) -> None:
    ask = Ask("Describe the image", 1, "whole", 14)
    with make() as engine:
        whole = asked(engine, ask)
        middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
        for told in (one := Told(), all_at_once := Told()):
            submit(engine, ask, told, whole=told is all_at_once, stop=(middle, "nowhere"))
        assert one.text() == all_at_once.text() == whole[: whole.index(middle)] and one.finish == "stop"
        assert len(all_at_once.pieces) == 1 and all_at_once.pieces[0].tokens == one.pieces[-1].tokens


def test_cancelling(make: Callable[..., Engine], reference: Reference) -> None:
    engine = make(slots=1)
    first, second, third = Told(), Told(), Told()
    running = submit(engine, Ask("One", length=300), lambda piece: (first(piece), running.cancel())[0])
    waiting = submit(engine, Ask("Two"), second)
    submit(engine, Ask("Three", 2), third)
    waiting.cancel()
    with engine:
        assert first.finish == second.finish == "cancelled" and second.text() == ""
        assert 1 <= first.pieces[-1].tokens <= 3
        assert third.text().strip() == reference(Ask("Three", 2))
        for piece in (stream := engine.stream([Turn("user", "Four")], [], None, Sampling(300))):
            assert piece.finish is None
            break
        stream.close()
        engine.stream([Turn("user", "Five")], [], None, Sampling(300)).close()  # before its first piece
        while engine.stats.running or engine.stats.waiting:
            time.sleep(0.001)
    assert engine.stats.finished == 5 and engine.stats.tokens < 50


def second_cancelled(engine: Engine, first: Told, second: Told) -> Any:
    """The job of a long answer that has the only slot; a request behind it was cancelled."""
    running = submit(engine, Ask("One", length=400), first)
    while engine.stats.waiting:
        time.sleep(0.001)
    submit(engine, Ask("Two"), second).cancel()
    return running


def test_what_is_cancelled_does_not_wait_for_a_slot(make: Callable[..., Engine]) -> None:
    engine, first, second = make(slots=1, max_queue=1), Told(), Told()
    with engine:
        running = second_cancelled(engine, first, second)
        assert second.finish == "cancelled" and not first.done.is_set()
        submit(engine, Ask("Three", length=1), Told())  # its place in the queue is free
        running.cancel()


def test_what_is_cancelled_makes_room_while_a_batch_runs(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normtune.serving.engine.can_join", lambda *args: False)
    engine, first, second = make(slots=1, max_queue=1), Told(), Told()
    with engine:
        running = second_cancelled(engine, first, second)
        submit(engine, Ask("Three", length=1), Told())
        assert second.finish == "cancelled" and not first.done.is_set()
        with pytest.raises(QueueFull):
            submit(engine, Ask("Four"), Told())
        running.cancel()
    assert engine.stats.finished == 3


def test_a_full_queue_and_wrong_requests(make: Callable[..., Engine], pair: Any) -> None:
    engine = make(max_queue=2, max_context=40)
    told = [Told(), Told()]
    for one in told:
        submit(engine, Ask("Hi", length=4), one)
    with pytest.raises(QueueFull, match="2 requests"):
        submit(engine, Ask("Hi"), Told())
    with pytest.raises(InputError, match="did you mean 'gains'"):
        engine.prepare([Turn("user", "Hi")], [], "gain")
    with pytest.raises(InputError, match="image"):
        engine.prepare([Turn("user", "Hi")], PICTURES[:1], None)
    with pytest.raises(InputError, match="context"):
        engine.prepare([Turn("user", "Hi " * 60)], [], None)
    with pytest.raises(InputError, match="surrogate"):
        engine.prepare([Turn("user", "\udcff")], [], None)
    prompt = engine.prepare([Turn("user", "Hi")], [], None)
    with pytest.raises(InputError, match="context"):
        engine.submit(prompt, Sampling(40), Told())
    with engine:
        assert [one.finish for one in told] == ["length", "length"] or [one.text() for one in told]
        longest = Told()
        engine.submit(prompt, Sampling(40 - prompt.tokens), longest)
        assert longest.finish in ("length", "stop")
    with pytest.raises(Closed):
        submit(engine, Ask("Hi"), Told())


@pytest.mark.parametrize("stock", [True, False])
def test_images_that_wait_are_held_within_a_limit(
    pair: Any, stock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is asked through its processor keeps whole pictures until it is their turn."""
    held, processor = pair.bank, pair.processor
    if stock:
        llava_next(tmp_path / "model")
        model, processor = nt.load(str(tmp_path / "model"))
        held = bank(model)
    engine = Engine(held, processor)
    size = 3 * PICTURES[0].width * PICTURES[0].height if stock else 3 * 32 * 32 * 4
    told = [Told() for _ in range(4)]
    monkeypatch.setattr("normtune.serving.engine.PIXELS", 1)
    first = submit(engine, Ask("One", 0, length=2), told[0])  # more than that, but it is the only one
    assert first.bytes == size
    submit(engine, Ask("Four", length=2), told[2])
    monkeypatch.setattr("normtune.serving.engine.PIXELS", 2 * size)
    submit(engine, Ask("Two", 1, length=2), told[1])
    with pytest.raises(QueueFull, match=f"{2 * size:,} bytes of images"):
        submit(engine, Ask("Three", 2, length=2), Told())
    first.cancel()
    submit(engine, Ask("Five", 2, length=2), told[3])
    assert told[0].finish == "cancelled"
    with engine:
        assert all(one.finish in ("length", "stop") for one in told[1:])
        large = Told()
        submit(engine, Ask("Six", 3, length=2), large)
        assert large.finish in ("length", "stop")
    assert not hasattr(first, "prompt")


@pytest.mark.parametrize("size", [(101, 1), (2, 201)])
def test_a_line_is_no_image(make: Callable[..., Engine], size: tuple[int, int]) -> None:
    """Its short side becomes the encoder's 336 pixels: of 20,000 x 1 pixels there were 20 GB."""
    engine, turns = make(), [Turn("user", "<image>")]
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels is too thin"):
        engine.prepare(turns, [PICTURES[0], Image.new("RGB", size)], None)
    assert engine.prepare(turns, [Image.new("RGB", (100, 1))], None).pictures[0].pixels is not None


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0},
              {"top_p": 1.1}, {"seed": 2**63}, {"stop": ("",)}, {"stop": "no"}],
)  # fmt: skip
def test_wrong_sampling(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("way", ["drain", "drop", "timeout", "never started"])
def test_closing(make: Callable[..., Engine], way: str) -> None:
    engine = make(slots=2)
    told = [Told() for _ in range(5)]
    for number, one in enumerate(told):
        submit(engine, Ask(f"Say {number}", length=5 if way == "drain" else 400), one)
    if way != "never started":
        engine.start()
    engine.close(drain=way != "drop", timeout=0.05 if way == "timeout" else None)
    finishes = {one.finish for one in told}
    assert finishes <= {"length", "stop"} if way == "drain" else finishes == {"cancelled"}
    assert engine.stats.finished in (5, 0) and engine.stats.running == engine.stats.waiting == 0
    assert not engine._thread or not engine._thread.is_alive()
    engine.close()


@pytest.mark.parametrize("when", ["prefill", "decode", "always"])
def test_a_forward_that_raises_ends_one_request(
    make: Callable[..., Engine], pair: Any, reference: Reference, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, forward = make(slots=4), pair.model.forward
    asks = [
        Ask(f"Is thing {number} there" + " now" * (8 * (number == 2)) + "?", number % 3, "gains", 8)
        for number in range(6)
    ]
    expected = [reference(ask) for ask in asks]
    bad = engine.prepare(asks[2].turns, asks[2].images, asks[2].adapter).ids

    def broken(*args: Any, **kwargs: Any) -> Any:
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        wide = ids.shape[1] > 1
        own = when == "prefill" and wide and any(row[-len(bad) :].tolist() == bad for row in ids)
        if when == "always" or own:
            raise RuntimeError("out of something")
        if when == "decode" and not wide and len(bad) + 3 in mask.sum(1).tolist():  # no other row gets that long
            raise RuntimeError("out of something")
        return forward(*args, **kwargs)

    monkeypatch.setattr(pair.model, "forward", broken)
    with engine:
        told = [Told() for _ in asks]
        for ask, one in zip(asks, told, strict=True):
            submit(engine, ask, one)
        finishes = [one.finish for one in told]
        monkeypatch.undo()
        assert asked(engine, asks[2]).strip() == expected[2]  # the engine lives
    for number, one in enumerate(told):
        if when == "always" or (number == 2 and finishes[2] == "error"):
            assert one.finish == "error" and one.pieces[-1].error == "RuntimeError: out of something"
        else:
            assert one.text().strip() == expected[number]
    assert "error" in finishes


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("steps", [False, True])
def test_what_failed_together_holds_no_memory_while_rows_go_on_alone(
    make: Callable[..., Engine], pair: Any, monkeypatch: pytest.MonkeyPatch, joins: bool, steps: bool
) -> None:
    """Out of memory, say: it has to be free again before that. Nor does a row that fails again keep anything."""
    monkeypatch.setattr("normtune.serving.engine.can_join", lambda *args: joins)
    engine, forward = make(slots=4), pair.model.forward
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        alive.append(sum(one() is not None for one in held))
        if steps == (ids.shape[1] == 1) and (len(ids) > 1 or len(held) < 3):
            activations = torch.zeros(3)
            held.append(weakref.ref(activations))
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(pair.model, "forward", broken)
    told = [Told() for _ in range(3)]
    for number, one in enumerate(told):
        submit(engine, Ask(f"Say {number}", length=3), one)
    gc.collect()
    gc.disable()
    try:
        with engine:
            assert [one.finish for one in told].count("error") == 2
        assert len(held) == 3 and not any(alive) and not any(one() is not None for one in held)
    finally:
        gc.enable()


def test_room_that_is_not_there_ends_the_row_that_needs_it(
    make: Callable[..., Engine], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(slots=4)
    slots: Any = engine._runner.slots  # type: ignore[union-attr]
    real = slots._fit

    def full(rows: int, width: int, like: Any) -> None:
        if width > 100:
            raise RuntimeError("out of memory")
        real(rows, width, like)

    monkeypatch.setattr(slots, "_fit", full)
    asks = [Ask("One", 1, "gains", 30), Ask("now " * 30, None, None, 60), Ask("Two", None, "whole", 30)]
    told = [Told() for _ in asks]
    for ask, one in zip(asks, told, strict=True):
        submit(engine, ask, one)
    with engine:
        assert told[1].finish == "error" and told[1].pieces[-1].tokens > 0
        for number in (0, 2):
            assert told[number].text().strip() == reference(asks[number])


def test_a_prompt_that_is_run_again_draws_the_same_numbers(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Ask("What is it", 0, "gains")
    with make() as engine:
        alone = [asked(engine, ask, temperature=1.0, seed=seed) for seed in range(2)]
    engine = make()
    slots: Any = engine._runner.slots  # type: ignore[union-attr]
    real, calls = slots.join, []

    def once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        real(*args)

    monkeypatch.setattr(slots, "join", once)
    told = [Told(), Told()]
    for seed, one in enumerate(told):
        submit(engine, ask, one, temperature=1.0, seed=seed)
    with engine:
        assert [one.text() for one in told] == alone and len(calls) == 3


class Panic(BaseException):
    """As of a library in Rust: no Exception."""


@pytest.mark.parametrize("early", [True, False])
def test_a_tokenizer_that_panics_lets_nobody_wait(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    def panic(*_: Any, **__: Any) -> str:
        raise Panic("slice index out of range")

    engine, told = make(), [Told(), Told()]
    with engine, monkeypatch.context() as patch:
        patch.setattr(type(engine.tokenizer), "decode", panic)
        if early:
            patch.setattr(Text, "add", panic)
        for one in told:
            submit(engine, Ask("One", length=3), one)
        assert [one.finish for one in told] == ["error"] * 2
        assert told[0].pieces[-1].error == "Panic: slice index out of range"
        patch.undo()
        assert engine._thread is not None and engine._thread.is_alive()
        late = Told()
        submit(engine, Ask("Two", length=3), late)
        assert late.finish in ("stop", "length")


def test_a_model_whose_joined_rows_are_not_finite_joins_none(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Slots.step

    def broken(self: Slots, *args: Any) -> torch.Tensor:
        return step(self, *args) * float("nan")

    assert can_join(pair.bank, 0, 100)
    monkeypatch.setattr(Slots, "step", broken)
    assert not can_join(pair.bank, 0, 100)


@pytest.mark.parametrize("joins", [True, False])
def test_a_mistake_of_the_engine_ends_what_runs_alone(
    make: Callable[..., Engine], reference: Reference, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    """Whatever is raised where nothing should be, the thread lives on and nobody waits for ever."""
    monkeypatch.setattr("normtune.serving.engine.can_join", lambda *args: joins)
    engine, told = make(), [Told(), Told()]
    monkeypatch.setattr(type(engine._runner), "_try", lambda self, group: self.jobs.extend(group) or 1 / 0)
    with engine:
        for one in told:
            submit(engine, Ask("One"), one)
        assert [one.finish for one in told] == ["error"] * 2 and "division" in str(told[0].pieces[-1].error)
        monkeypatch.undo()
        assert asked(engine, Ask("Two", 1, "whole")).strip() == reference(Ask("Two", 1, "whole"))
    assert engine.stats.finished == 3 and engine.stats.running == 0


def test_tokens_are_told_once(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong once rows have joined is no reason to run their prompts again."""
    engine, told, add, calls = make(), [Told(), Told()], Text.add, []

    def broken(self: Text, token: int) -> str:
        calls.append(token)
        return add(self, token) if len(calls) > 1 else str(1 / 0)

    monkeypatch.setattr(Text, "add", broken)
    for number, one in enumerate(told):
        submit(engine, Ask(f"Say {number}"), one)
    with engine:
        assert [one.finish for one in told] == ["error"] * 2 and len(calls) == 1
        late = Told()
        submit(engine, Ask("Three"), late)
        assert late.finish in ("stop", "length")


@pytest.mark.parametrize("error", [RuntimeError("Event loop is closed"), asyncio.CancelledError()])
def test_an_owner_that_raises_is_left_alone(
    make: Callable[..., Engine], reference: Reference, error: BaseException
) -> None:
    def gone(piece: Piece) -> None:
        raise error

    with make() as engine:
        submit(engine, Ask("One", length=300), gone)
        assert asked(engine, Ask("Two")).strip() == reference(Ask("Two"))
        while engine.stats.running:
            time.sleep(0.001)
        assert engine.stats.tokens < 100


def test_adapters_come_and_go_while_rows_decode(
    make: Callable[..., Engine], pair: Any, adapters: dict[str, Path], reference: Reference
) -> None:
    ask = Ask("What is it?", 1, "later", 14)
    pair.bank.add("later", adapters["gains"])
    with make() as engine:
        prompt = engine.prepare(ask.turns, ask.images, "later")
        pair.bank.add("later", adapters["whole"], replace=True)
        new = engine.prepare(ask.turns, ask.images, "later")
        pair.bank.remove("later")
        told = [Told(), Told()]
        for one, given in zip(told, (prompt, new), strict=True):
            engine.submit(given, Sampling(14), one)
        for one, name in zip(told, ("gains", "whole"), strict=True):
            assert one.text().strip() == reference(Ask("What is it?", 1, name, 14))


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.heavy
def test_nothing_is_left_of_what_is_finished(make: Callable[..., Engine]) -> None:
    with make(slots=4, image_cache_bytes=3 * 16 * 32 * 4) as engine:
        held = []
        for round_ in range(3):
            told = [Told() for _ in range(16)]
            for ask, one in zip(mixed(16, round_), told, strict=True):
                submit(engine, ask, one, temperature=float(ask.length % 2))
            assert all(one.finish for one in told)
            while engine.stats.running:
                time.sleep(0.001)
            del told, one, ask
            pair_selections = engine.bank._selections
            pair_selections.clear()  # the bank keeps the last few compositions
            held.append(tensors())
    assert held[-1] <= held[1], held
    assert engine.prompts.vision is not None and engine.prompts.vision._bytes <= 3 * 16 * 32 * 4
    assert engine.stats.images_encoded > len(PICTURES)  # a small cache forgets


@pytest.mark.parametrize("joins", [True, False])
def test_an_engine_without_work_holds_no_request(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    monkeypatch.setattr("normtune.serving.engine.can_join", lambda *args: joins)
    with make() as engine:
        told, prompt = Told(), engine.prepare([Turn("user", "<image>What?")], PICTURES[:1], "whole")
        watch = weakref.ref(prompt)
        engine.submit(prompt, Sampling(3), told)
        del prompt
        told.text()
        limit = time.monotonic() + 20
        while watch() is not None:  # the thread is on its way to wait
            assert time.monotonic() < limit
            gc.collect()


def sliding(folder: Path) -> None:
    tiny_mllm(folder, kind="mistral", sliding_window=8)


def recurrent(folder: Path) -> None:
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
    tiny_mllm(folder, kind="falcon_h1", **sizes)


def learned(folder: Path) -> None:
    tiny_mllm(folder, kind="gpt2")


def alibi(folder: Path) -> None:
    tiny_mllm(folder, kind="bloom", n_head=4, n_layer=2)


def qwen2_vl(folder: Path) -> None:
    from test_evaluation_models import qwen2_vl as build

    build(folder)


def llava_next(folder: Path) -> None:
    from test_evaluation_models import llava_next as build

    build(folder)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("build", "joins"),
    [
        (sliding, False),
        (recurrent, False),
        pytest.param(learned, True, marks=pytest.mark.slow),
        (alibi, True),
        (qwen2_vl, False),
        pytest.param(llava_next, False, marks=pytest.mark.slow),
    ],
)
def test_other_models(build: Callable[[Path], None], joins: bool, tmp_path: Path) -> None:
    """Rows that cannot join a batch wait for one another; the answers are the same."""
    build(tmp_path / "model")
    own = ["norms", "embed", "head"] if build is llava_next else "layernorm"  # its newline cannot differ by row
    adapters = save_adapters(tmp_path, tmp_path / "model", own)
    reference = Reference(tmp_path / "model", adapters)
    model, processor = nt.load(str(tmp_path / "model"))
    asks = [
        Ask(f"Is thing {n} there" + " now" * n + "?", n % 3 or None, (None, "gains", "whole", "gated")[n % 4], 3 + n)
        for n in range(9)
    ]
    with bank(model, adapters) as held, Engine(held, processor, slots=5) as engine:
        assert engine.joins == joins
        told = [Told() for _ in asks]
        for ask, one in zip(asks, told, strict=True):
            submit(engine, ask, one)
        for ask, one in zip(asks, told, strict=True):
            assert one.text().strip() == reference(ask), ask
        seeded = [asked(engine, asks[1], temperature=1.0, seed=3) for _ in range(2)]
        assert seeded[0] == seeded[1]
        whole = asked(engine, asks[8])
        assert asked(engine, asks[8], stop=(whole[4:6],)) == whole[: whole.index(whole[4:6])]
        late = Told()
        job = submit(engine, Ask("One", length=400), lambda piece: (late(piece), job.cancel())[0])
        assert late.finish == "cancelled" and late.pieces[-1].tokens < 10


def test_what_a_processor_refuses(tmp_path: Path) -> None:
    """The token of an image in a text, a picture that is a line: mistakes of the request."""
    qwen2_vl(tmp_path / "model")
    model, processor = nt.load(str(tmp_path / "model"))
    with bank(model) as held:
        engine = Engine(held, processor)
        for text, images in (("<|image_pad|>", []), ("<image>", [Image.new("RGB", (900, 3))])):
            with pytest.raises(InputError, match="processor"):
                engine.prepare([Turn("user", text)], images, None)


def test_a_batch_that_waits_survives_a_forward_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sliding(tmp_path / "model")
    model, processor = nt.load(str(tmp_path / "model"))
    asks = [Ask(f"Is thing {n} there?", n, length=8) for n in range(3)]
    forward, sizes = model.forward, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if len(sizes) == 4:
            raise RuntimeError("out of something")
        return forward(*args, **kwargs)

    with bank(model) as held:
        with Engine(held, processor) as engine:
            expected = [(asked(engine, ask), asked(engine, ask, temperature=1.0, seed=1)) for ask in asks]
            assert not engine.joins
        engine, told = Engine(held, processor), [Told() for _ in range(6)]
        for number, one in enumerate(told):
            submit(engine, asks[number // 2], one, temperature=float(number % 2), seed=1)
        monkeypatch.setattr(model, "forward", broken)
        with engine:
            assert [(a.text(), b.text()) for a, b in zip(told[::2], told[1::2], strict=True)] == expected
        assert sizes[:4] == [6] * 4 and set(sizes[4:]) == {1}


def test_numbers_that_are_not_finite_stay_in_their_row(
    pair: Any, make: Callable[..., Engine], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose keys are NaN ends with an error, and others get their answers."""
    engine = make(slots=2)
    slots: Any = engine._runner.slots  # type: ignore[union-attr]
    real = slots.join

    def poisoned(*args: Any) -> None:
        real(*args)
        for layer in slots._cache.layers:
            layer.values[len(slots) - 1] = float("nan")

    with engine:
        monkeypatch.setattr(slots, "join", poisoned)
        one = Told()
        submit(engine, Ask("One", length=6), one)
        assert one.finish == "error" and "not finite" in str(one.pieces[-1].error)
        monkeypatch.setattr(slots, "join", real)
        assert asked(engine, Ask("Three", 2, "whole")).strip() == reference(Ask("Three", 2, "whole"))


def test_numbers_that_are_not_finite_leave_with_their_row(pair: Any) -> None:
    """A shorter row moves into the slot of one whose keys were NaN."""
    slots, base = Slots(pair.bank, 0, 8), pair.bank.entry(None)
    with torch.inference_mode():
        for length in (30, 40, 6):
            rows = [Row(base, [5 + n % 90 for n in range(length)], [])]
            slots.join(rows, slots.prefill(rows)[1])
        for layer in slots._cache.layers:
            layer.values[0] = float("nan")  # type: ignore[index]
        assert slots.leave([0]) == [2, 1] and slots.step([1, 1]).isfinite().all()
        for layer in slots._cache.layers:
            layer.values[0] = float("nan")  # type: ignore[index]
        assert slots.leave([0]) == [1]
        slots.join(rows, slots.prefill(rows)[1])
        assert slots.step([1, 1]).isfinite().all()


def test_slots_make_room_and_give_it_back(pair: Any) -> None:
    """Room follows the rows that are there: long ones that left cost nothing, and without rows there is nothing."""
    slots, base = Slots(pair.bank, 0, 8), pair.bank.entry(None)

    def join(*lengths: int) -> None:
        rows = [Row(base, [5 + n % 90 for n in range(length)], []) for length in lengths]
        slots.join(rows, slots.prefill(rows)[1])

    def room() -> tuple[int, ...]:
        return tuple(slots._cache.layers[0].keys.shape)  # type: ignore[union-attr]

    with torch.inference_mode():
        join(5, 400, 9)
        assert room() == (3, 2, 401 + 401 // 4, 8)
        assert slots.leave([1]) == [0, 2] and slots.lengths == [5, 9]
        join(7)
        assert room() == (3, 2, 9 + 1 + ROOM, 8)
        for _ in range(2 * ROOM):
            slots.step([1] * 3)
        assert 2 * ROOM + 10 <= room()[2] <= 3 * ROOM + 20
        join(3)
        assert room()[0] == 4 + 2
        join(3, 3, 3)
        assert room()[0] == 8  # no more than may be used
        assert slots.leave(range(7)) == [] and not slots._cache.layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_open_base(tmp_path: Path, mllm_folder: Path, adapters: dict[str, Path], dtype: str) -> None:
    model, _ = nt.load(str(mllm_folder))
    nt.load_adapter(model, adapters["whole"])
    record = {"base": {"model": {"path": str(mllm_folder), "dtype": dtype}, "seed": 0}}
    run = nt.save_adapter(model, tmp_path / "run" / "adapter", **record)
    plain, _ = nt.load(str(mllm_folder), dtype=dtype)
    for path, names in ((mllm_folder, []), (run, ["run"])):
        tuned, found = open_base(path, dtype=dtype if path == mllm_folder else None)
        assert [name for name, _ in found] == names and tuning(tuned.model).tuned == []
        for (name, ours), theirs in zip(tuned.model.named_parameters(), plain.parameters(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        with bank(tuned.model, dict(found)) as held:
            assert held.names == names


def test_a_model_that_no_bank_takes_is_one_of_its_own(tmp_path: Path, mllm_folder: Path) -> None:
    tuned, plain = nt.load(str(mllm_folder)), nt.load(str(mllm_folder))
    nt.apply(tuned[0], ["lora"])
    with torch.no_grad():
        for name, parameter in tuned[0].named_parameters():
            if "lora_B" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    folder = nt.save_adapter(tuned[0], tmp_path / "adapter")
    ids = {"input_ids": torch.arange(5, 9)[None], "max_new_tokens": 8, "do_sample": False}
    wanted, base = (model.generate(**ids, suppress_tokens=[image_token(model)]) for model, _ in (tuned, plain))
    assert not torch.equal(wanted, base)
    with open_alone(Tuned(*plain), folder) as alone:
        assert torch.equal(alone.generate(adapters=[None], **ids), wanted)
        assert alone.names == [] and alone.bytes == 0
        with pytest.raises(InputError, match="merge what the model holds"):
            alone.add("other", folder)
    assert torch.equal(plain[0].generate(**ids, suppress_tokens=[image_token(plain[0])]), wanted)


def image_token(model: Any) -> int:
    return int(model.config.image_token_id)
