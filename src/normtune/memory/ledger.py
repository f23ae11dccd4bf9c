"""A ledger of live storages: how many bytes there are at a time, and what for.

`Ledger` sees every operation that runs within it and follows the storages of what comes out until they die; on fake
tensors nothing is allocated and the sizes are the same. What for a storage is there follows from where it was made and
who keeps it: saved-tensor hooks tell what backward needs, hooks on modules where that belongs.
torch's own torch.distributed._tools.MemTracker counts the same bytes (parameters, gradients, activations, temporaries),
but does not tell kept tensors from passing ones, nor a norm's input from a gate. Not here: what an operation allocates
inside and frees again.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKSPACE, HEAD, OTHER, OUTPUT = "workspace", "head_and_loss", "other", "attention output"
aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Bytes of live storages by cause, and the same at the moment of their peak.

    Attributes:
        causes: cause -> bytes now.
        peak: their largest sum since `watch`; `at_peak` says of which causes.
    """

    def __init__(self, block: int = 1) -> None:
        """`block`: sizes are rounded up to a multiple of it, as allocators do."""
        super().__init__()
        self.block, self.total, self.peak = block, 0, 0
        self.causes, self.at_peak = Counter[str](), Counter[str]()
        self._held: dict[int, tuple[str, int, Any]] = {}  # by storage: cause, bytes, finalizer
        self._stack: list[str] = []
        self._phase = WORKSPACE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return type_of(args[0].dtype)(1)  # step numbers of an optimizer, checks of a model that must hold
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor, self._phase)
        return out

    def note(self, tensor: torch.Tensor, cause: str) -> None:
        """Counts a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or not size:
            return
        size = -(-size // self.block) * self.block
        self._held[key] = cause, size, weakref.finalize(storage, self._forget, key)
        self.causes[cause] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.causes.copy()

    def move(self, tensor: torch.Tensor, cause: str, of: Iterable[str] | None = None) -> None:
        """Gives a counted storage another cause; with `of`, only one that has one of these."""
        key = tensor.untyped_storage()._cdata
        if key in self._held and (of is None or self._held[key][0] in of):
            before, size, end = self._held[key]
            self._held[key] = cause, size, end
            self.causes[before] -= size
            self.causes[cause] += size

    def watch(self) -> None:
        """From here on the peak is looked for anew."""
        self.peak, self.at_peak = self.total, self.causes.copy()

    def _forget(self, key: int) -> None:
        cause, size, _ = self._held.pop(key)
        self.causes[cause] -= size
        self.total -= size

    @contextmanager
    def phase(self, cause: str) -> Iterator[None]:
        """What is made within is of this cause unless something else is known of it."""
        before, self._phase = self._phase, cause
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def forward(self, model: nn.Module, kinds: dict[nn.Module, str], outputs: Iterable[nn.Module]) -> Iterator[None]:
        """Within, what autograd keeps gets the kind of the innermost module that it is kept in.

        Args:
            kinds: kind of what is kept in a module, or in one below it that has no kind.
            outputs: modules that are given the output of attention.
        """
        with ExitStack() as hooks:
            for module, kind in {model: OTHER, **kinds}.items():
                hooks.callback(module.register_forward_pre_hook(self._enter(kind)).remove)
                hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            for module in outputs:
                hooks.callback(module.register_forward_pre_hook(self._output, prepend=True).remove)
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept))
            hooks.enter_context(self.phase(HEAD))
            yield
        for key, (cause, size, end) in self._held.items():
            if cause == WORKSPACE:  # alive for other reasons, such as the inputs of checkpointed blocks
                self._held[key] = OTHER, size, end
                self.causes[cause] -= size
                self.causes[OTHER] += size

    def _enter(self, kind: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(kind)
            self._phase = WORKSPACE

        return enter

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._stack.pop()
        self._phase = WORKSPACE if self._stack else HEAD

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stack:
            self.move(tensor, self._stack[-1], of=(WORKSPACE,))
        return tensor

    def _output(self, module: nn.Module, args: Any) -> None:
        if args:
            self.move(args[0], OUTPUT, of=(self._stack[-1],))


def type_of(dtype: torch.dtype) -> type:
    if dtype == torch.bool:
        return bool
    return float if dtype.is_floating_point else int
