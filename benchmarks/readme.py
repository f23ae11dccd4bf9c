"""Tables in README.md and docs, each between two marks of its own: written by the benchmarks, never by hand."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def write_table(name: str, table: str, page: Path = README) -> None:
    """Replaces what stands between the marks of table `name`."""
    page.write_text(with_table(page.read_text(), name, table))


def with_table(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name} table: written by `make bench` -->", f"<!-- end of {name} table -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"the page lacks the marks {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"
