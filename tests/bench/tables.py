"""How rows are shown: as Markdown, on the screen and in README.md."""

from rich.console import Console
from rich.markdown import Markdown

from .harness import Row, Table

HEADS = ("", "median", "lowest to highest", "ratio to the first", "rounds")


def figure(value: float, unit: str) -> str:
    """Returns a value as text with its unit."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if unit in ("bytes", "tokens/s"):
        return f"{value:,.0f} {unit}"
    return f"{value:,.1f} {unit}" if value >= 10 else f"{value:.3g} {unit}"


def cells(row: Row) -> tuple[str, ...]:
    """Returns the five texts of a row."""
    (low, unit), (high, also) = (figure(x, row.unit).split() for x in (row.low, row.high))
    spread = f"{low} to {high} {also}" if unit == also else f"{low} {unit} to {high} {also}"
    ratio = ""
    if row.ratio:
        middle, low, high = row.ratio
        ratio = f"{middle:.3f}" if low == high else f"{middle:.3f} ({low:.3f} to {high:.3f})"
    spread = spread if row.low < row.high else ""
    return row.what, figure(row.median, row.unit), spread, ratio, str(row.rounds)


def markdown(name: str, about: str, table: Table) -> str:
    """Returns a table in Markdown under a heading."""
    lines = [f"### {name}: {about}", "", f"{table.sizes}.", ""]
    lines += ["| " + " | ".join(HEADS) + " |", "|---|--:|--:|--:|--:|"]
    for row in table.rows:
        what, *rest = cells(row)
        indented = "&ensp;" * (len(what) - len(what.lstrip())) + what.lstrip()
        lines.append("| " + " | ".join([indented, *rest]) + " |")
    return "\n".join(lines) + "\n"


def show(text: str) -> None:
    """Prints Markdown, at least 110 columns wide, in a log too."""
    Console(width=max(Console().width, 110)).print(Markdown(text))


def fill(text: str, kind: str, block: str) -> str:
    """Returns a README whose part between the marks of a kind of device is replaced."""
    start, end = f"<!-- {kind}: filled by --markdown, not by hand -->", f"<!-- end of {kind} -->"
    before, found, rest = text.partition(start)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"no marks {start} and {end}")
    return f"{before}{start}\n\n{block}\n{end}{after}"
