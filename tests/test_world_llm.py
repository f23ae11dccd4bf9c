"""The world's text side: questions are right, documents do not leak, the tiny LLM grows, trains, resumes and reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from normtune.world import ceilings, corpus, path, pretrain, scenes, text, tokens

pytestmark = pytest.mark.slow

TOY = pretrain.Plan(
    steps=6, narrow=2, told=2, batches=(4, 4, 4), hidden=32, heads=2, mlp=48, first_layers=1, layers=2, warmup=1
)


def samples(count: int, split: str = "dev") -> list[scenes.Scene]:
    rng = np.random.default_rng(0)
    return [scenes.sample(rng, split) for _ in range(count)]


def test_the_tokenizer_knows_every_word_and_agrees_with_the_corpus() -> None:
    tokenizer, rng = tokens.tokenizer(), np.random.default_rng(1)
    for scene in samples(200):
        asked = text.ask(rng, scene, {**text.QUESTIONS, **text.REASONING})
        said = [text.suffixed(rng, asked), asked.answer, text.description(rng, scene), text.detail(scene)]
        for sentence in [*said, *text.references(rng, scene)]:
            ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            assert ids == corpus.ids(sentence)
            assert corpus.UNK not in ids
            if "one-sentence" not in sentence.lower():  # a hyphen comes back with blanks around it
                assert tokenizer.decode(ids) == " ".join(sentence.lower().split())


def test_the_chat_template_is_what_the_corpus_trains_on() -> None:
    tokenizer = tokens.tokenizer()
    made = corpus.Document()
    made.turn("Is there a red circle in the image?", "no")
    made.turn("How many stars are there?", "2")
    turns = [
        {"role": "user", "content": "Is there a red circle in the image?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "How many stars are there?"},
        {"role": "assistant", "content": "2"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) == [bag[0] for bag in made.bags]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert asked[-2:] == [corpus.END, corpus.ASSISTANT]


def test_absent_categories_are_absent() -> None:
    rng = np.random.default_rng(2)
    for scene in samples(100):
        for manner in ceilings.MANNERS:
            assert text.absent(rng, scene, manner) not in scene.categories


def test_answers_are_right() -> None:
    """The kinds whose answer can be found from the question and the scene by other means than the generator's."""
    rng = np.random.default_rng(3)
    for scene in samples(300):
        qa = text.existence(rng, scene)
        assert qa is not None
        shown = any(f"{colour} {shape}" in qa.question for colour, shape in scene.categories)
        assert qa.answer == ("yes" if shown else "no")
        qa = text.position(rng, scene)
        assert qa is not None
        row, column = qa.answer.split()
        thing = next(t for t in scene.things if text.name(t) in qa.question)
        assert (scenes.ROWS.index(row), scenes.COLUMNS.index(column)) == (thing.row, thing.column)
        qa = text.relation(rng, scene)
        if qa is not None:
            one, other = sorted((t for t in scene.things if text.name(t) in qa.question), key=lambda t: qa.question.index(text.name(t)))  # fmt: skip # noqa: E501
            above, left = one.row < other.row, one.column < other.column
            below, right = one.row > other.row, one.column > other.column
            truth = {"above": above, "below": below, "left": left, "right": right}
            word = next(word for word in truth if f" {word} " in qa.question)
            assert qa.answer == ("yes" if truth[word] else "no")


@pytest.mark.parametrize("form", corpus.FORMS)
@pytest.mark.parametrize("level", range(corpus.LEVELS))
def test_documents_fit_and_supervise_answers_only(form: str, level: int) -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        made = corpus.document(rng, form, level)
        assert len(made.bags) == len(made.weights) == len(made.soft) == len(made.parts) <= corpus.LENGTH
        assert max(len(bag) for bag in made.bags) <= corpus.BAG
        assert sum(made.soft) == {"plain": 0, "slots": 16}.get(form, sum(made.soft))
        assert 0 < sum(weight > 0 for weight in made.weights) < len(made.bags) / 2


def test_parallel_questions_do_not_see_each_other() -> None:
    """The logits of a question inside a parallel document equal those of a document with this question alone."""
    model = pretrain.build_model(TOY, 2).eval()
    together = corpus.Document(parallel=True)
    alone = corpus.Document()
    for document in (together, alone):
        document.add(corpus.ids("a red circle at the top left, gray background."))
    together.turn("How many stars are there?", "0")
    together.turn("Where is the red circle?", "top left")
    alone.turn("Where is the red circle?", "top left")
    batches = [corpus.collate([document]) for document in (together, alone)]
    with torch.no_grad():
        logits = [
            model(inputs_embeds=ceilings.embed(model, b), **ceilings.see(b, torch.float32)).logits for b in batches
        ]
    kept = [index for index, part in enumerate(together.parts) if part in (0, 2)]
    torch.testing.assert_close(logits[0][:, kept], logits[1])


def test_growing_keeps_the_function() -> None:
    small = pretrain.build_model(TOY, 1).eval()
    large = pretrain.grow(small, TOY).eval()
    ids = torch.arange(7, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits)
    assert large.config.num_hidden_layers == 2


@pytest.mark.parametrize("stop", [1, *(pytest.param(n, marks=pytest.mark.heavy) for n in (2, 4))])
def test_an_interrupted_training_ends_alike(tmp_path: Path, stop: int) -> None:
    """Stopped before, at and after the step at which the model grows."""
    whole = pretrain.train(TOY, tmp_path / "whole", lambda _: None)

    class Stop(Exception):
        pass

    def interrupt(record: dict[str, Any]) -> None:
        if record["step"] > stop:
            raise Stop

    with pytest.raises(Stop):
        pretrain.train(TOY, tmp_path / "parts", interrupt, report_every=1, save_seconds=0)
    resumed = pretrain.train(TOY, tmp_path / "parts", lambda _: None)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_build_writes_a_plain_folder_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "Plan", lambda seed: replace(TOY, seed=seed))
    monkeypatch.setattr(pretrain, "measure", lambda model, form: {})
    facts = pretrain.build(tmp_path, pretrain.MINUTES, 0)
    assert facts["steps"] == 6 and facts["log"][-1]["step"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llm"]
    before = (tmp_path / "llm" / "model.safetensors").read_bytes()
    assert "steps" not in pretrain.build(tmp_path, pretrain.MINUTES, 0)
    assert (tmp_path / "llm" / "model.safetensors").read_bytes() == before
    assert AutoTokenizer.from_pretrained(tmp_path / "llm").eos_token_id == corpus.END


@pytest.mark.parametrize("form", ["pooled", "slots"])
def test_the_shipped_model_reads_scenes(form: str) -> None:
    """POPE's three splits on 60 unseen scenes each, with plain transformers' loading."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path("llm"), dtype=torch.float32).eval()
    rng = np.random.default_rng(5)
    documents = []
    for index in range(120):
        scene = scenes.sample(rng, "dev", 3)
        shown = index % 2 == 0
        manner = ceilings.MANNERS[index % 3]
        category = scenes.pick(rng, scene.things).category if shown else text.absent(rng, scene, manner)
        documents.append(ceilings.tell(rng, scene, form))
        documents[-1].turn(text.POPE.format(" ".join(category)), "yes" if shown else "no")
    assert np.mean(ceilings.right(model, documents)) >= 0.9
