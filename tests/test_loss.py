"""The loss at supervised positions: equal to the model's own logits and torch's cross-entropy, and small."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from normtune.kernels import HeadLoss, Logits, find_logits, without_head
from normtune.kernels import loss as module
from normtune.step import head_of, supervised_loss
from normtune.strategy import apply, lean, tuning
from test_memory import saved_bytes


@pytest.mark.parametrize("chunk", [1, 3, 100], ids="rows {}".format)
@pytest.mark.parametrize("logits", [Logits(), Logits(0.25), Logits(cap=2.0), Logits(0.5, 3.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_it_is_torchs_cross_entropy(bias: bool, logits: Logits, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk * 13)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=generator, requires_grad=True) for s in ((7, 5), (13, 5)))
    offset = torch.randn(13, generator=generator, requires_grad=True) if bias else None
    labels = torch.randint(0, 13, (7,), generator=generator)
    leaves = [hidden, weight, *([offset] if offset is not None else [])]
    ours = HeadLoss.apply(hidden, weight, offset, labels, logits)
    theirs = F.cross_entropy(logits.of(F.linear(hidden, weight, offset)), labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad(3 * theirs, leaves)
    for a, b in zip(torch.autograd.grad(3 * ours, leaves), wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["layernorm", "layernorm-simple"])
@pytest.mark.parametrize("name", zoo.common_first())
def test_loss_and_gradients_are_those_of_the_models_logits(name: str, strategy: str) -> None:
    ours = zoo.model(name)
    theirs = copy.deepcopy(ours)
    losses = []
    for model in (ours, theirs):
        apply(model, strategy)
        batch = zoo.batch(name)
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, ::3] = -100
        if model is theirs:
            tuning(model).logits = (None,)  # the way for models whose logits are something unknown
        losses.append(supervised_loss(model, batch))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if b.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm() + 1e-12, key


@pytest.mark.parametrize(
    ("name", "logits"),
    [("llama", Logits()), ("gemma2", Logits(cap=30.0)), ("cohere", Logits(scale=0.0625)), ("llava", Logits())],
)
def test_what_becomes_of_the_heads_output_is_found(name: str, logits: Logits) -> None:
    found = head_of(zoo.model(name))
    assert found is not None and found[1] == logits


def test_logits_of_an_unknown_kind_are_left_to_the_model() -> None:
    model = zoo.model("llama")
    model.register_forward_hook(lambda module, args, out: setattr(out, "logits", out.logits.sigmoid()))
    assert find_logits(model, model.lm_head) is None


def test_the_head_gets_its_forward_back_after_an_error() -> None:
    head = torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError), without_head(head):
        raise RuntimeError
    assert "forward" not in vars(head)


def test_head_and_loss_keep_little() -> None:
    """776 positions, 100 of them supervised, a vocabulary of 32,000: at most 2 MB, the logits would be 12.8 MB."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 32_000}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).bfloat16()
    apply(model, "layernorm-simple")
    lean(model)
    ids = torch.zeros(1, 776, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    labels[0, -100:] = 7
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    body = saved_bytes(model.model, {key: batch[key] for key in ("input_ids", "attention_mask")})
    head_of(model)
    whole = saved_bytes(Loss(model), batch)
    assert whole - body <= 2e6


class Loss:
    """Lets `saved_bytes` count what `supervised_loss` keeps."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters, self.buffers = model.parameters, model.buffers

    def __call__(self, use_cache: bool, **batch: torch.Tensor) -> torch.Tensor:
        return supervised_loss(self.model, dict(batch))
