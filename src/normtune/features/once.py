"""The vision encoder during one forward of the model: each distinct image once, and nothing of it kept for backward.

Scope: what the model calls to see (`get_image_features` of transformers), while a batch is in it. Non-scope: which
images a batch has (data/), features on disk (store.py). Source: transformers' contract for `get_image_features`:
a `BaseModelOutputWithPooling` whose `pooler_output` holds, image by image, what goes into the LLM's sequence.

Shapes: U distinct images, N places of images in the prompt, P tokens and D values of a feature, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from normtune.layers import unwrapped
from normtune.strategy import tuning
from normtune.structure import Anatomy


@contextmanager
def images(model: nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[None]:
    """Around `model(**batch)`: a frozen encoder runs in eval mode, without gradients, on distinct images alone.

    Changes `batch` to what the model takes. `pixel_values` [U, 3, h, w] are distinct images, `image_index` [N] int64
    says which of them each place of the prompt shows (absent: each one once, in order). `features` [U, P, D] stand in
    for the pixels: what the connector reads, from a `Store`; the encoder does not run then and may be on the meta
    device. An encoder with a trainable tensor runs as the model runs it, on distinct images too.
    """
    index, features = batch.pop("image_index", None), batch.pop("features", None)
    pixels = features if features is not None else batch.get("pixel_values")
    if pixels is None:
        yield
        return
    inner = unwrapped(model)
    found = tuning(inner).anatomy
    owner = image_reader(inner, found)
    with ExitStack() as stack:
        for encoder in map(inner.get_submodule, found.vision):
            stack.enter_context(frozen(encoder))
        if owner is None:  # its own way: it gets the pixels of an image as often as the prompt shows it
            assert features is None, "Prepared.check refuses such a model"
            batch["pixel_values"] = pixels if index is None else pixels.index_select(0, index)
        elif features is not None:
            batch["pixel_values"] = features  # a model looks at images only where it is given some; never read
            read = stored(inner.get_submodule(found.connector[0]), features, index)
            stack.enter_context(attribute(owner, "get_image_features", read))
        else:
            for connector in map(inner.get_submodule, found.connector):
                stack.callback(connector.register_forward_pre_hook(contiguous).remove)
            read = repeated(owner.get_image_features, pixels, index)  # type: ignore[arg-type]
            stack.enter_context(attribute(owner, "get_image_features", read))
        yield


def image_reader(model: nn.Module, found: Anatomy) -> Any:
    """The innermost module around the vision encoder that has `get_image_features`, or None."""
    if len(found.vision) != 1:
        return None
    name = found.vision[0]
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if hasattr(module, "get_image_features"):
            return module
    return None


def contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a connector is given, dense: patches without the class token are a slice, on which `linear` adds its bias in
    a second step, rounded twice in bf16. So it computes the same from stored features, bit for bit."""
    return tuple(arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args)


def repeated(read: Callable[..., Any], pixels: torch.Tensor, index: torch.Tensor | None) -> Callable[..., Any]:
    """`get_image_features` on the distinct images, its answer in the order of the prompt, the hidden states dropped."""

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        out = read(*args, **kwargs)
        seen = out.pooler_output if type(out) is BaseModelOutputWithPooling else None
        if seen is not None and len(seen) == len(pixels):
            return BaseModelOutputWithPooling(pooler_output=in_order(seen, index))
        if index is None:
            return out
        again = pixels.index_select(0, index)  # its answer is not image by image: let it see each place
        if "pixel_values" in kwargs:
            return read(*args, **{**kwargs, "pixel_values": again})
        return read(again, *args[1:], **kwargs)

    return get_image_features


def stored(connector: nn.Module, features: torch.Tensor, index: torch.Tensor | None) -> Callable[..., Any]:
    """`get_image_features` from the features [U, P, D] of the distinct images."""

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        return BaseModelOutputWithPooling(pooler_output=in_order(list(connector(features)), index))

    return get_image_features


def in_order(seen: Any, index: torch.Tensor | None) -> Any:
    """U answers, a sequence of [P, H] or one tensor [U, P, H], in the order of the prompt: N of them.

    A sequence of one shape is gathered on the device: reading `index` on the host would wait for it there.
    """
    if index is None:
        return seen
    if isinstance(seen, torch.Tensor):
        return seen.index_select(0, index)
    if len({part.shape for part in seen}) > 1:
        return [seen[i] for i in index.tolist()]
    return list(torch.stack(tuple(seen)).index_select(0, index))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients, if no parameter of the module is trainable."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        yield
        return
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with attribute(module, "forward", torch.no_grad()(module.forward)):
            yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    """`module.name` is `value` within; afterwards as before, also where it was the class's."""
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
