"""The tables of README.md and docs: benchmarks write docs/tables/NAME.md, and pages show them between two markers.

    <!-- table NAME -->             the whole table
    <!-- table NAME: PATTERN -->    its head, the rows in which the regular expression is found, and the note below the table
    <!-- table NAME NAME .. -->     several tables with one head, as one
    ...
    <!-- end -->

    python -m benchmarks.tables     writes every table into the pages again

Benchmarks that print their table are redirected first: python -m benchmarks.bench costs > docs/tables/costs.md
"""

import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "docs" / "tables"
MARKED = re.compile(r"(<!-- table ([\w -]+)(?:: ([^\n]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(*rows: list) -> list[str]:
    """The lines of a table; the first row is its head."""
    head, *others = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return [head, "|---" * len(rows[0]) + "|", *others]


def spread(values: list[float], digits: int) -> str:
    """ "mean +- sd" of several values, one value alone, "-" for none."""
    sd = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}" if values else "-"


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def include(page: str) -> str:
    """The text of a page with what the files in docs/tables hold between its markers. FileNotFoundError for an unknown table."""

    def filled(found: re.Match) -> str:
        begin, names, pattern, end = found.groups()
        texts = [(TABLES / f"{name}.md").read_text().strip().splitlines() for name in names.split()]
        rows = [line for text in texts for line in text[2:] if line.startswith("|")]
        notes = [line for text in texts for line in text if line and not line.startswith("|")]
        lines = [*texts[0][:2], *rows, *([""] if notes else []), *"\n\n".join(notes).splitlines()]
        if pattern:
            lines = [line for k, line in enumerate(lines) if k < 2 or not line.startswith("|") or re.search(pattern, line)]
        return "\n".join([begin, *lines, "", end])

    return MARKED.sub(filled, page)


def include_all() -> None:
    """Writes every table into the pages that show it."""
    for path in pages():
        path.write_text(include(path.read_text()))


def write_table(name: str, lines: list[str], show: bool = True) -> None:
    """docs/tables/NAME.md, the pages that show it, and (`show`) the same to the screen."""
    (TABLES / f"{name}.md").write_text("\n".join(lines) + "\n")
    include_all()
    if show:
        print("\n".join(lines))


if __name__ == "__main__":
    include_all()
