"""One module at a time: fp32 parameters in a bf16 module compute as the module did, and nothing else is kept."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.pytorch_utils import Conv1D

from normtune.kernels import demote, promote

BF16 = torch.bfloat16
H = 32


class Mixer(nn.Module):
    """Bare parameters beside a frozen layer; `seen` notes the weight and the activation that its forward meets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16 * H, H) / H)
        self.scale = nn.Parameter(torch.randn(H))
        self.out = nn.Linear(16 * H, H).requires_grad_(False)
        self.seen: list[StorageWeakRef] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(x @ self.weight.t())
        self.seen += [StorageWeakRef(self.weight.untyped_storage()), StorageWeakRef(inner.untyped_storage())]
        return self.out(inner).sin() * self.scale


class Scaled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ self.weight.T) + self.bias


def mixtral() -> MixtralConfig:
    return MixtralConfig(hidden_size=H, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)


def vectors(*shape: int, dtype: torch.dtype = BF16) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(*shape, dtype=dtype),)


def tokens() -> tuple[torch.Tensor, ...]:
    return (torch.tensor([[1, 5, 0, 5]]),)


def routed() -> tuple[torch.Tensor, ...]:
    weights = torch.rand(6, 2, dtype=BF16)
    return torch.randn(6, H, dtype=BF16), torch.randint(0, 4, (6, 2)), weights


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(H, 48), vectors(2, 5, H)),
    "linear-without-bias": (lambda: nn.Linear(H, 48, bias=False), vectors(5, H)),
    "linear-subclass": (lambda: Scaled(H, 48), vectors(2, 5, H)),
    "conv1d-gpt2": (lambda: Conv1D(48, H), vectors(2, 5, H)),
    "embedding": (lambda: nn.Embedding(10, H, padding_idx=0), tokens),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(10, H, 0, 5.67), tokens),
    "conv2d": (lambda: nn.Conv2d(3, 64, 4, 4), vectors(2, 3, 8, 8)),
    "experts": (lambda: MixtralExperts(mixtral()), routed),
    "router": (lambda: MixtralTopKRouter(mixtral()), vectors(2, H)),
    "bare-parameters": (Mixer, vectors(2, H)),
}


def pair(kind: str) -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...]]:
    """A bf16 module, its promoted copy with trainable fp32 parameters, and input."""
    torch.manual_seed(0)
    make, give = MODULES[kind]
    original = make()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.2)
    original.to(BF16)
    ours = copy.deepcopy(original)
    for parameter in ours.parameters(recurse=False):
        parameter.data = parameter.data.float()
    promote(ours, BF16)
    return original, ours, give()


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", MODULES)
def test_promoted_module_gives_the_output_and_gradients_of_its_bf16_original(kind: str) -> None:
    original, ours, given = pair(kind)
    a, b = first(original(*given)), first(ours(*given))
    assert b.dtype == a.dtype and torch.equal(a, b)
    grad = torch.randn_like(a)
    a.backward(grad)
    b.backward(grad)
    wanted = dict(original.named_parameters())
    for name, parameter in ours.named_parameters(recurse=False):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, wanted[name].grad.float(), atol=1e-3, rtol=2**-7)


@pytest.mark.parametrize("kind", MODULES)
def test_backward_keeps_no_cast_copy(kind: str) -> None:
    _, ours, given = pair(kind)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        output = first(ours(*given))
    own = {p.untyped_storage().data_ptr(): p for p in ours.parameters()}
    largest = max(own.values(), key=lambda p: p.numel())
    for tensor in kept:
        if tensor.untyped_storage().data_ptr() not in own:
            assert tensor.untyped_storage().nbytes() < largest.numel() * 2, (kind, tensor.shape)
    output.sum().backward()


def test_cast_copies_are_freed_and_activations_are_not_before_backward() -> None:
    _, ours, given = pair("bare-parameters")
    output = ours(*given)
    weight, activation = ours.seen  # type: ignore[misc]
    assert weight.expired() and not activation.expired()  # type: ignore[union-attr]
    output.sum().backward()


def test_checkpointing_around_a_promoted_module_still_drops_its_activations() -> None:
    _, ours, given = pair("bare-parameters")
    plain = ours(*given)
    plain.sum().backward()
    wanted = {name: p.grad for name, p in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    ours.seen.clear()  # type: ignore[union-attr,operator]
    output = checkpoint(ours, *given, use_reentrant=False)
    assert all(ref.expired() for ref in ours.seen)  # type: ignore[union-attr]
    output.sum().backward()
    for name, parameter in ours.named_parameters(recurse=False):
        assert torch.equal(parameter.grad, wanted[name])


def test_changing_a_parameter_between_forward_and_backward_is_noticed() -> None:
    _, ours, (x,) = pair("bare-parameters")
    output = ours(x.requires_grad_())
    with torch.no_grad():
        ours.weight.add_(1)  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match="changed in place"):
        output.sum().backward()


def test_vision_encoders_that_cast_their_input_to_the_weights_dtype() -> None:
    """CLIP: `pixels.to(self.patch_embedding.weight.dtype)`, and the rest of the tower is bf16."""
    for kind in ("conv2d", "linear"):
        original, ours, (x,) = pair(kind)
        assert torch.equal(ours(x.float()), original(x))


class Taker(nn.Module):
    """Mamba's mixer in short: it takes the weight out of a layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(H))
        self.norm = nn.LayerNorm(H)
        self.layer = nn.Linear(H, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(x) * self.scale) @ self.layer.weight + self.layer(x)


def test_a_parent_that_takes_the_weight_out_of_a_promoted_layer() -> None:
    ours = Taker()
    with torch.no_grad():
        ours.norm.weight.add_(2**-10)  # lost if the norm's gain were cast too
    x = torch.randn(4, H).to(BF16)
    original = copy.deepcopy(ours).to(BF16)
    original.norm = copy.deepcopy(ours.norm)
    for norm in (ours.norm, original.norm):
        promote(norm, BF16, is_norm=True)
    promote(ours.layer, BF16)
    promote(ours, BF16)
    a, b = original(x), ours(x)
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    for name, parameter in ours.named_parameters():
        wanted = original.get_parameter(name).grad
        assert wanted is not None and parameter.grad is not None and parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, wanted.float(), rtol=2**-6, atol=2e-2)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layernorm": lambda: nn.LayerNorm(H),
    "layernorm-without-bias": lambda: nn.LayerNorm(H, bias=False),
    "rmsnorm-torch": lambda: nn.RMSNorm(H),
    "rmsnorm": lambda: LlamaRMSNorm(H),
    "gated": lambda: MambaRMSNormGated(H, group_size=H),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norm_returns_the_streams_dtype_whoever_cast_its_input(kind: str) -> None:
    norm = NORMS[kind]().to(BF16)
    norm.weight.data = norm.weight.data.float()  # the bias of a LayerNorm stays bf16
    promote(norm, BF16, is_norm=True)
    x = torch.randn(3, H, dtype=BF16)
    assert norm(x).dtype == BF16
    assert torch.equal(norm(x.float()), norm(x))  # Mamba casts the stream to the gain's dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.float()).dtype == torch.float32
    assert norm.weight.dtype == torch.float32


def test_norm_with_a_gate_takes_both_in_fp32() -> None:
    norm = MambaRMSNormGated(H, group_size=H)
    x, gate = torch.randn(2, 8, H).to(BF16)
    wanted = norm(x.float(), gate.float())
    promote(norm, BF16, is_norm=True)
    assert torch.equal(norm(x, gate=gate), wanted.to(BF16))
    assert torch.equal(norm(hidden_states=x, gate=gate), wanted.to(BF16))


class Double(ModelHook):
    """An accelerate hook that shows: it doubles what the module returns."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 2 * output


def doubled(forward: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    return 2 * forward(*args)


@pytest.mark.parametrize("is_norm", [False, True], ids=["linear", "norm"])
@pytest.mark.parametrize("foreign", ["accelerate", "monkeypatch"])
def test_foreign_forwards_survive_promote_and_demote(foreign: str, is_norm: bool) -> None:
    module = (nn.LayerNorm(H) if is_norm else nn.Linear(H, H)).to(BF16)
    x = torch.randn(4, H, dtype=BF16)
    wanted = 2 * module(x)
    if foreign == "accelerate":
        add_hook_to_module(module, Double())
    else:
        module.forward = functools.partial(doubled, module.forward)
    before = dict(vars(module))
    module.weight.data = module.weight.data.float()
    promote(module, BF16, is_norm)
    promote(module, BF16, is_norm)
    output = module(x)
    assert output.dtype == BF16
    torch.testing.assert_close(output, wanted)
    output.sum().backward()
    assert module.weight.grad is not None and module.weight.grad.dtype == torch.float32
    demote(module)
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[key] is before[key] for key in ("forward", "_old_forward") if key in before)
    module.weight.data = module.weight.data.to(BF16)
    assert torch.equal(module(x), wanted)


def test_a_hook_that_is_removed_leaves_our_forward() -> None:
    module = nn.Linear(H, H).to(BF16)
    x = torch.randn(4, H, dtype=BF16)
    wanted = module(x)
    add_hook_to_module(module, Double())
    module.weight.data = module.weight.data.float()
    promote(module, BF16)
    remove_hook_from_module(module)
    assert torch.equal(module(x), wanted)


@pytest.mark.parametrize("kind", ["linear", "conv1d-gpt2"])
def test_autocast_sets_the_dtype_as_it_does_for_the_original(kind: str) -> None:
    original, ours, (x,) = pair(kind)
    with torch.autocast("cpu", torch.float16):
        a, b = original(x), ours(x)
    assert b.dtype == torch.float16 and torch.equal(a, b)
    b.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("removed_first", [False, True], ids=["hook-stays", "hook-goes"])
def test_hooks_that_come_after_promote(removed_first: bool) -> None:
    module = nn.Linear(H, H).to(BF16)
    x = torch.randn(4, H, dtype=BF16)
    wanted = module(x)
    module.weight.data = module.weight.data.float()
    promote(module, BF16)
    add_hook_to_module(module, Double())
    assert torch.equal(module(x), 2 * wanted)
    if removed_first:
        remove_hook_from_module(module)
        assert torch.equal(module(x), wanted)
    demote(module)
    module.weight.data = module.weight.data.to(BF16)
    assert torch.equal(module(x), wanted if removed_first else 2 * wanted)
    assert ("forward" in vars(module)) is not removed_first


def test_a_wrapper_around_our_forward_still_works_after_demote() -> None:
    """Somebody patched the module after promote: our forward is inside theirs and cannot be taken out."""
    for module, is_norm in ((nn.LayerNorm(H), True), (nn.Linear(H, H), False), (Scaled(H, H), False)):
        module.to(BF16)
        x = torch.randn(4, H, dtype=BF16)
        wanted = module(x)
        module.weight.data = module.weight.data.float()
        promote(module, BF16, is_norm)
        module.forward = functools.partial(doubled, module.forward)  # type: ignore[method-assign]
        demote(module)
        assert module(x).dtype == BF16
        module.to(BF16)
        torch.testing.assert_close(module(x), 2 * wanted)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_parameters(way: Callable[[nn.Module], nn.Module]) -> None:
    for hooked in (False, way is copy.deepcopy):  # accelerate's hooks cannot be pickled
        module = nn.Linear(H, H).to(BF16)
        if hooked:
            add_hook_to_module(module, Double())
        module.weight.data = module.weight.data.float()
        promote(module, BF16)
        x = torch.randn(4, H, dtype=BF16)
        before = module(x)
        other = way(module)
        assert torch.equal(other(x), before)
        with torch.no_grad():
            other.weight.zero_()  # type: ignore[operator,union-attr]
            other.bias.zero_()  # type: ignore[operator,union-attr]
        assert not other(x).any() and torch.equal(module(x), before)
        demote(other)
        other.to(BF16)
        assert not other(x).any()
