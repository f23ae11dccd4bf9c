"""Programs in a process of their own, where freed memory goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# without these glibc's malloc keeps what is freed and hides 20 to 40 % of what is taken again
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_a_process(module: str, arguments: Sequence[str]) -> int:
    """The last word, a number, that `python -m module` prints in a child process."""
    command = [sys.executable, "-m", module, *arguments]
    root, environment = Path(__file__).parents[1], {**os.environ, **RETURNING}
    out = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True)
    return int(out.stdout.split()[-1])
