"""How figures are written in tables and plots.

Scope: numbers to short text, and what text counts as a number. Not here: rounding of anything that is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NUMBER = re.compile(r"[–-]?|[-+±]?\d[\d.,e+-]*( ?(%|s|ms|[kMG]?B|[kMG]))?")
"""Text that stands to the right in a table: a number, with a prefix or unit, or none."""


def score(value: float | None) -> str:
    """0.91234 -> 0.912, 1204.57 -> 1204.6: three decimals below 10, one above."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(span: Sequence[float] | None) -> str:
    """0.81–0.85; "to" where a minus sign would stand beside the dash."""
    if not span:
        return ""
    return f"{score(span[0])}{'–' if min(span) >= 0 else ' to '}{score(span[1])}"


def signed_percent(share: float) -> str:
    """0.034 -> +3.4 %."""
    return f"{100 * share:+.1f} %"


def rate(value: float) -> str:
    """A learning rate, as short as it goes: 0.001 -> 1e-3, 0.00316 -> 3.16e-3."""
    digits, power = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def tick(value: float) -> str:
    """A number beside an axis, short: 1e-3, 0.5, 20, 1,000, 20k, 5M."""
    if value and abs(value) < 0.01:
        return rate(value)
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if sign == 'k' else size):g}{sign}"
    return f"{value:,.6g}"


def human_count(count: float) -> str:
    """13,047,331,840 -> 13.05 G."""
    for unit in ("", " k", " M", " G"):
        if count < 1000 or unit == " G":
            return f"{count:.4g}{unit}"
        count /= 1000
    return ""


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def human_seconds(seconds: float) -> str:
    """42 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def is_number(text: str) -> bool:
    return bool(NUMBER.fullmatch(text))


def machine(provenance: Mapping[str, Any]) -> str:
    """The hardware and versions of a result's provenance, as a sentence's end."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return f"{provenance['cores']} cores of {provenance['processor']}; Python {provenance['python']}, {versions}"
