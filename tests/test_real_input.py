"""The whole command line on real photographs: init, train, chat, export; models of standard shapes, random weights.

Needs the small COCO selection beside the checkout (`../shared/data/coco-mini`), and skips where it is absent.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from command import run
from models import CHATML
from normtune.data import Collator, Sample, read_samples
from normtune.recipe import DataSource
from normtune.step import supervised_loss
from normtune.tuned import open_tuned

COCO = Path(__file__).parents[2] / "shared" / "data" / "coco-mini"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COCO.is_dir(), reason="no photographs: ../shared/data/coco-mini"),
]
STEPS = 200


def standard_llm(folder: Path) -> Path:
    """A Llama of about 6 M parameters with a BPE tokenizer learned from the captions."""
    texts = [
        turn["value"] for item in json.loads((COCO / "conversation.json").read_text()) for turn in item["conversations"]
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def standard_encoder(folder: Path) -> Path:
    """A CLIP vision tower of about 4 M parameters, 96 pixels, patches of 16."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=96,
        patch_size=16,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": 96, "width": 96}
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=size).save_pretrained(folder)
    return folder


def swapped(samples: list[Sample]) -> list[Sample]:
    """Every sample with the next one's image."""
    nexts = [*samples[1:], samples[0]]
    return [Sample(a.id, a.turns, b.images, a.kind, a.where) for a, b in zip(samples, nexts, strict=True)]


def mean_loss(model: Any, processor: Any, samples: list[Sample]) -> float:
    total, count = 0.0, 0
    collator = Collator(processor, 512)
    with torch.no_grad():
        for start in range(0, len(samples), 16):
            batch = collator(samples[start : start + 16])
            count += int((batch["labels"][:, 1:] != -100).sum())
            total += float(supervised_loss(model.eval(), batch))
    return total / count


def test_init_train_chat_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llm, vision = standard_llm(tmp_path / "llm"), standard_encoder(tmp_path / "vision")
    data = [
        "--data",
        str(COCO / "conversation.json"),
        "--align",
        str(COCO / "align.json"),
        "--images",
        str(COCO / "images"),
    ]
    assert run("init", "--llm", str(llm), "--vision", str(vision), *data, "--name", "photos") == 0
    Path("recipe.yaml").write_text(capsys.readouterr().out)

    changes = [f"stages.1.max_steps={STEPS}", "stages.1.learning_rate=5e-3", "stages.1.clip=0", "stages.0.epochs=3"]
    assert run("train", "recipe.yaml", *changes, "threads=1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    instruct = result["stages"][1]
    assert instruct["moved_percent"] == 100.0
    assert instruct["last_loss"] < instruct["first_loss"] / 3, instruct

    tuned = open_tuned("runs/photos")
    source = DataSource(path=str(COCO / "conversation.json"), images=str(COCO / "images"))
    samples = random.Random(0).sample(read_samples(source), 48)
    own, others = (mean_loss(tuned.model, tuned.processor, s) for s in (samples, swapped(samples)))
    assert others >= 1.5 * own, (own, others)

    photo = str(COCO / "images" / "000000000285.jpg")
    assert run("chat", "runs/photos", "Describe the image briefly.", "--image", photo) == 0
    assert capsys.readouterr().out.strip()

    assert run("export", "runs/photos", "--format", "transformers", "--out", "exported") == 0
    plain = AutoModelForImageTextToText.from_pretrained("exported", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained("exported")
    batch = Collator(tuned.processor, 512)(samples[:4])
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, tuned.model(**batch).logits, rtol=0, atol=1e-5)
    assert Collator(processor, 512)(samples[:4])["input_ids"].equal(batch["input_ids"])
    assert run("export", "runs/photos", "--out", "exported") == 2
