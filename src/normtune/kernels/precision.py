"""fp32 parameters in a model whose activations are bf16: cast at use, never a copy kept.

`promote(module)` turns chosen parameters of one norm, Linear or Embedding into fp32 and lets the module compute in the
dtype of its input; `demote(module)` takes it back. The residual stream keeps its dtype, no autocast is needed.
Backward keeps the fp32 parameter itself and never the cast copy; gradients of parameters are fp32.
Not here: which parameters (strategy.py); modules of other kinds, which raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normtune.errors import InputError


class CastLinear(torch.autograd.Function):
    """y = x W^T + b with W (O, I) and b (O) in fp32, computed in the dtype of x (..., I)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.has_bias, ctx.dtype, ctx.weight_dtype = bias is not None, x.dtype, weight.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
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


def promote(module: nn.Module, dtype: torch.dtype, is_norm: bool = False) -> None:
    """Makes `module` compute in its input's dtype whatever the dtype of its own parameters.

    Args:
        dtype: activation dtype of the base; what an Embedding returns.
        is_norm: the module is a norm: run it on fp32 input and cast its output back.

    Raises:
        InputError: a module that is no norm, Linear or Embedding.
    """
    if "forward" in vars(module):
        return
    forward: Callable[..., torch.Tensor]
    if is_norm:
        for parameter in module.parameters(recurse=False):  # torch's layer_norm takes gain and bias of one dtype
            parameter.data = parameter.data.float()
        forward = functools.partial(norm_forward, module)
    elif isinstance(module, nn.Linear):
        forward = functools.partial(linear_forward, module)
    elif isinstance(module, nn.Embedding):
        forward = functools.partial(embedding_forward, module, dtype)
    else:
        raise InputError(
            f"a {type(module).__name__} cannot be trained in fp32 inside a {dtype} model; set model.dtype: float32"
        )
    module.forward = forward  # type: ignore[method-assign]


def demote(module: nn.Module) -> None:
    """The module's own forward again."""
    vars(module).pop("forward", None)


def norm_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return type(module).forward(module, x.float()).to(x.dtype)


def linear_forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return CastLinear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return,no-untyped-call]


def embedding_forward(module: nn.Embedding, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    # type(module).forward keeps what a subclass adds, such as a scale of the embedding
    return type(module).forward(module, ids).to(dtype)
