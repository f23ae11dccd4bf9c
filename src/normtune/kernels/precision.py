"""fp32 parameters in a model whose activations are bf16: cast at use, never a copy kept.

`promote(module, dtype)` lets a module some of whose own parameters are fp32 compute in the activation dtype of its
model; `demote(module)` takes exactly that back. The residual stream keeps its dtype and no autocast is needed; under
autocast the module computes in autocast's dtype, as torch's own layers do. Gradients of fp32 parameters are fp32.

Four shapes, chosen by the forward that the module has and not by its name:

- a norm: its own forward on fp32 input with fp32 parameters, the result cast back;
- Linear, and transformers' Conv1D with its transposed weight: an autograd Function that keeps the parameter;
- Embedding: the chosen rows are cast, never the table;
- any other (experts with 3-D parameters, convolutions, mixers, layers with bare parameters, subclasses with a forward
  of their own): its own forward while its fp32 parameters are replaced by cast copies. What autograd would keep of a
  copy, the whole or a view, is kept as the parameter and cast again in backward.

Limits: a compiled graph (torch.compile) keeps the bf16 copy of a trained matrix for backward, because its partitioner
merges both casts; a model that is cast as a whole afterwards (`model.float()`) is not followed.
Not here: which parameters (strategy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from normtune.kernels.quantized import TRAINABLE
from normtune.kernels.replacing import Forward, Replaced, call, is_plain, put_back, replace


class Promoted(Replaced):
    """The forward of a promoted module: `function(module, before, dtype, ...)`."""


def promote(module: nn.Module, dtype: torch.dtype, is_norm: bool = False) -> None:
    """Lets `module`, some of whose own parameters are fp32, compute in a model of `dtype`; a second time does nothing.

    Works inside accelerate's hooks and around any other forward that somebody gave to this instance.

    Args:
        dtype: activation dtype of the model around it; what the module computes in (a norm: what it returns).
        is_norm: the module is a norm, which computes in fp32.
    """
    function: Forward = module_forward
    if is_norm:
        function = norm_forward
    elif is_plain(module):
        function = FORWARDS.get(type(module).forward, module_forward)
    replace(module, Promoted, function, dtype)


def demote(module: nn.Module) -> None:
    """Gives the module the forward back that it had before `promote`; nothing happens to one that is not ours."""
    put_back(module, Promoted)


# The four forwards: (module, the instance's forward that was there or None, activation dtype, then the module's own).


def norm_forward(module: nn.Module, before: Forward | None, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """The norm's own forward in fp32, cast back to the dtype of its first argument.

    An fp32 argument outside autocast is one that a parent cast to the gain's dtype (Mamba): the base's norm would have
    returned `dtype`, and so does this one.
    """
    given = args[0] if args else next(iter(kwargs.values()))
    cast_up = given.dtype == torch.float32 and not torch.is_autocast_enabled(given.device.type)
    with cast_parameters([module], torch.float32):
        args, kwargs = cast(args, torch.float32), cast(kwargs, torch.float32)
        return cast(call(module, before, *args, **kwargs), dtype if cast_up else given.dtype)


def linear_forward(module: nn.Linear, before: Forward | None, dtype: torch.dtype, input: torch.Tensor) -> torch.Tensor:
    return CastLinear.apply(input.to(compute_dtype(input, dtype)), module.weight, module.bias)  # type: ignore


def conv1d_forward(module: Conv1D, before: Forward | None, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return CastLinear.apply(x.to(compute_dtype(x, dtype)), module.weight.t(), module.bias)  # type: ignore


def embedding_forward(
    module: nn.Embedding, before: Forward | None, dtype: torch.dtype, input: torch.Tensor
) -> torch.Tensor:
    return nn.Embedding.forward(module, input).to(dtype)


def module_forward(module: nn.Module, before: Forward | None, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward with its own fp32 parameters cast to `dtype`.

    So are those of promoted layers right below it: Mamba's mixer takes the weights of its convolution and time step
    out of these layers instead of calling them.
    """
    if type(module).__module__.startswith("torch.nn."):
        # torch's layers take input of their weight's dtype only; vision encoders cast theirs to the fp32 weight's
        args, kwargs = cast(args, dtype), cast(kwargs, dtype)
    below = [child for child in module.children() if casts_weights(vars(child).get("forward"))]
    with cast_parameters([module, *below], dtype):
        return call(module, before, *args, **kwargs)


def casts_weights(forward: Forward | None) -> bool:
    return isinstance(forward, Promoted) and forward.func is not norm_forward


FORWARDS: dict[Forward, Forward] = {
    nn.Linear.forward: linear_forward,
    nn.Embedding.forward: embedding_forward,
    Conv1D.forward: conv1d_forward,
}


class CastLinear(torch.autograd.Function):
    """y = x W^T + b with W (O, I) and b (O) in fp32, computed in the dtype of x (..., I)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.has_bias, ctx.weight_dtype = bias is not None, weight.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (N, O)
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        grad_bias = rows.sum(0, dtype=torch.float32) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def compute_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `value` (a tensor, or tuples, lists, dicts of them) as `dtype`; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: cast(item, dtype) for key, item in value.items()}
    return value


@contextmanager
def cast_parameters(modules: list[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within, the modules' own floating-point parameters are of `dtype`; autograd keeps none of the copies."""
    own = [
        (module._parameters, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype != dtype and parameter.dtype in TRAINABLE
    ]
    if not own:
        yield
        return
    copies = [parameter.to(dtype) for _, _, parameter in own]
    for (holder, name, _), copy in zip(own, copies, strict=True):
        holder[name] = copy  # type: ignore[assignment]
    try:
        # torch.compile cannot trace hooks
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            yield
        else:
            with keep_sources([(source, copy) for (_, _, source), copy in zip(own, copies, strict=True)]):
                yield
    finally:
        for holder, name, parameter in own:
            holder[name] = parameter


@contextmanager
def keep_sources(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Within, what autograd saves of a copy in `pairs` (source, copy) is kept as its source and cast again when needed.

    Everything else goes to the hooks around, if any (activation checkpointing drops tensors by them): of nested
    hooks torch calls only the innermost.
    """
    sources = {copy.untyped_storage()._cdata: (source.detach(), copy) for source, copy in pairs}
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]

    def pack(saved: torch.Tensor) -> Callable[[], torch.Tensor]:
        source, copy = sources.get(saved.untyped_storage()._cdata, (None, saved))
        if source is None or source.stride() != copy.stride():
            if outer is None:
                return lambda: saved
            packed = outer[0](saved)
            return lambda: outer[1](packed)
        size, stride, offset = saved.size(), saved.stride(), saved.storage_offset() + source.storage_offset()
        dtype, version = saved.dtype, source._version

        def unpack() -> torch.Tensor:
            if source._version != version:
                raise RuntimeError("a parameter was changed in place between its use and backward")
            return source.as_strided(size, stride, offset).to(dtype)

        return unpack

    try:
        with saved_tensors_hooks(pack, lambda packed: packed()):
            yield
    finally:
        sources.clear()  # autograd holds on to `pack`, which must not hold the copies
