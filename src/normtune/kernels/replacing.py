"""Another forward for one module of a model, and the way back.

Works inside accelerate's hooks, which replace `forward` themselves, and around any other forward that somebody gave to
an instance. Not here: which forward (precision.py, lean.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

Forward = Callable[..., Any]
HOOKED = "_old_forward"
"""Where accelerate's hooks, which replace `forward`, keep the forward that they found."""


class Replaced(functools.partial):  # type: ignore[type-arg]
    """`function(module, before, ...)`, `before` being the instance's forward that was there, or None: the class's.

    As a partial it follows its module through deepcopy and pickle; as a class of its own it is known again.
    """

    @property
    def module(self) -> nn.Module:
        return self.args[0]  # type: ignore[no-any-return]

    @property
    def before(self) -> Forward | None:
        return self.args[1]  # type: ignore[no-any-return]

    @property
    def held(self) -> bool:
        """Whether it serves somebody who counts on the model's tensors as they are."""
        return False


def replace(module: nn.Module, kind: type[Replaced], function: Forward, *arguments: Any) -> None:
    """Gives the module the forward `function(module, before, *arguments, ...)`; a second one of a kind does nothing."""
    place = HOOKED if HOOKED in vars(module) else "forward"
    before = vars(module).get(place)
    if not isinstance(before, kind):
        setattr(module, place, kind(function, module, before, *arguments))


def put_back(module: nn.Module, kind: type[Replaced]) -> None:
    """Gives the module the forward back that it had before `replace`; nothing happens to one that is not ours."""
    for place in ("forward", HOOKED):
        ours = vars(module).get(place)
        if not isinstance(ours, kind):
            continue
        if ours.before is not None:
            setattr(module, place, ours.before)
        elif place == HOOKED:  # hooked after `replace`: the hook needs a forward to call
            setattr(module, place, MethodType(type(module).forward, module))
        else:
            delattr(module, place)


def is_plain(module: nn.Module) -> bool:
    """Whether the module runs its class's forward, also where accelerate's hooks keep that."""
    own = vars(module).get(HOOKED if HOOKED in vars(module) else "forward")
    if own is None:
        return True
    return isinstance(own, MethodType) and own.__func__ is type(module).forward and own.__self__ is module


def is_held(model: nn.Module) -> bool:
    """Whether a forward of the model is `held`."""
    places = (vars(module).get(place) for module in model.modules() for place in ("forward", HOOKED))
    return any(isinstance(own, Replaced) and own.held for own in places)


def call(module: nn.Module, before: Forward | None, *args: Any, **kwargs: Any) -> Any:
    """The forward that was there before."""
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)
