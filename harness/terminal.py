"""Draws plain tables in the terminal with rich; without a terminal, as wide as the content."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from attnbench.results.table import Table

PIPE_WIDTH = 200


def show(table: Table) -> None:
    """Print one table; cells are text, so nothing in them is taken for markup."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column, numeric in zip(table.header, table.numeric, strict=True):
        drawn.add_column(Text(column), justify="right" if numeric else "left", no_wrap=numeric)
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note, style="dim"))
