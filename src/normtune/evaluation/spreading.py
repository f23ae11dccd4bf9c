"""The questions of an evaluation, spread over processes: each asks its share, all have every answer.

Scope: torchrun's processes, one round after another, so that what was answered can go to disk in between. Which
questions share a batch differs from what one process does, and so may answers that are ties. A sharded model is asked
everything by every process: none of them can run it alone. Not here: how a question is asked (`answering`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from normtune.evaluation.answering import Answer
from normtune.evaluation.engines import WINDOW, Request, chunks
from normtune.sharding import is_sharded

Answers = list[tuple[int, Answer]]
"""Places of requests, and what was said."""


def processes(model: nn.Module) -> tuple[int, int]:
    """(this one, of how many) that can ask `model` apart from one another."""
    if not dist.is_available() or not dist.is_initialized() or is_sharded(model):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def from_first(value: Any) -> Any:
    """What the first of several processes has (a value that can be pickled)."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def spread(
    requests: Sequence[Request],
    left: Sequence[int],
    batch_size: int,
    rank: int,
    ranks: int,
    ask: Callable[[Sequence[Request]], Iterable[Answers]],
) -> Generator[Answers]:
    """Round by round the answers of all processes to the requests at the places `left`; the same on each of them.

    In a round each process asks about a run of neighbours, so that questions about one image stay together.
    """
    for turn in chunks(left, ranks * WINDOW * batch_size):
        size = -(-len(turn) // ranks)
        mine = turn[rank * size : (rank + 1) * size]
        found = [(mine[at], said) for batch in ask([requests[place] for place in mine]) for at, said in batch]
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, found)
        yield [pair for share in everyone for pair in share]
