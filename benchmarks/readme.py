"""Tables in README.md, each between two marks of its own: written by the benchmarks, never by hand."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def write_table(name: str, table: str, readme: Path = README) -> None:
    """Replaces what stands between the marks of table `name`."""
    readme.write_text(with_table(readme.read_text(), name, table))


def with_table(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name} table: written by `make bench` -->", f"<!-- end of {name} table -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README.md lacks the marks {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"
