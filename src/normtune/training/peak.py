"""The most memory that a training took. Not here: by what cause (memory/)."""

from __future__ import annotations

from pathlib import Path

import torch

from normtune.runlog import forget_peak, peak_rss, resident

PEAK_OF = "resident memory, without libraries"


class Peak:
    """Begun before the model is built; `bytes(device)` after the last step.

    On CUDA the allocated bytes at their peak, weights included. On a CPU the growth of this process's resident memory
    from the beginning to the peak, weights included, libraries not (where the system is not Linux: the whole peak).
    """

    def __init__(self) -> None:
        self.linux = Path("/proc/self/clear_refs").exists()
        if self.linux:
            forget_peak()
        self.before = resident("VmRSS") if self.linux else 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def bytes(self, device: torch.device) -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return (resident("VmHWM") if self.linux else peak_rss()) - self.before
