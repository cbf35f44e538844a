"""Tables in Markdown: they can be read on a terminal, pasted into an issue and searched with grep."""

from collections.abc import Collection, Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[str] = ()) -> list[str]:
    """Return the lines of a Markdown table: its header, the separator, then one line for each row.

    Args:
        header: The names of the columns.
        rows: The cells of each row, one for each column.
        text: The names of columns that hold words, which are aligned left. All others hold numbers: right.
    """
    # A bar within a cell would end it.
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    # A last column of words is not padded: one long cell would make every line as long.
    if header[-1] in text:
        widths[-1] = 3
    separator = [
        "-" * width if name in text else "-" * (width - 1) + ":" for name, width in zip(header, widths, strict=True)
    ]
    lines = []
    for row in (cells[0], separator, *cells[1:]):
        padded = (
            cell.ljust(width) if name in text else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    return lines
