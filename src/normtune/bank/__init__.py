"""`bank(model, {...})`: one base with many adapters; each row of a batch runs on its own.

Scope: adapters of norms, also with a connector, an embedding or a head of their own; not LoRA. `entries` one adapter,
ready to run; `ways` how a norm computes with gains by row; `rows` the forwards of a mixed batch; `banks` adding,
removing, generating; `planning` what N adapters take. Not here: which requests share a batch (serving).
The idea of gathering adapters by row is that of S-LoRA (arXiv 2311.03285); gains need no matrix product for it.
Legend: B rows, S tokens, H hidden size, G values of all gains, N images, P patches and T tokens of one, V vocabulary.
"""

import sys
from types import ModuleType
from typing import Any

from normtune.bank.banks import Bank, bank
from normtune.bank.entries import Entry
from normtune.bank.planning import Planned, planned
from normtune.bank.rows import Selection

__all__ = ["Bank", "Entry", "Planned", "Selection", "bank", "planned"]


class _Callable(ModuleType):
    """Importing this package makes it the attribute `normtune.bank`, which is the function's name, too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Bank:
        return bank(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
