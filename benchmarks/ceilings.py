"""What a device does at most, measured: bytes/s of a copy, FLOP/s of matrix products; the denominators of MFU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP, REPEATS = 3, 20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Median over `repeats` calls after a warm-up: by CUDA events on a GPU, by the clock elsewhere."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()  # type: ignore[no-untyped-call]
            run()
            end.record()  # type: ignore[no-untyped-call]
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)  # type: ignore[no-untyped-call]
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def matmul_rate(m: int, k: int, n: int, device: torch.device, transposed: bool) -> float:
    """FLOP/s of (m, k) x (k, n) in bf16: `transposed` as a linear layer's forward (weight (n, k)), else as its input
    gradient (weight (k, n))."""
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weight = torch.randn(*((n, k) if transposed else (k, n)), device=device, dtype=torch.bfloat16)
    out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
    other = weight.t() if transposed else weight
    return 2 * m * k * n / seconds(lambda: torch.mm(x, other, out=out), device)


def ceilings(hidden: int, inner: int, rows: int, device: torch.device, square: int, copied: int) -> dict[str, Any]:
    """The copy, a square product, and the step's own products at `rows` rows, forward and input gradient."""
    pairs = [(hidden, hidden), (hidden, 3 * hidden), (hidden, inner), (hidden, 2 * inner), (inner, hidden)]
    own: dict[str, dict[str, float]] = {}
    for k, n in pairs:
        own[f"{k}->{n}"] = {
            "forward": matmul_rate(rows, k, n, device, transposed=True),
            "input gradient": matmul_rate(rows, n, k, device, transposed=False),
        }
    rates = [rate for both in own.values() for rate in both.values()]
    return {
        "copy_bytes_per_second": copy_rate(device, copied),
        f"matmul {square}": matmul_rate(square, square, square, device, transposed=True),
        "own": own,
        "own_median": statistics.median(rates),
    }
