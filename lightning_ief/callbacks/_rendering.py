"""Tables, also beside Lightning's progress bar."""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from rich import get_console
from rich.table import Table

__all__ = ["numbers_table", "print_table"]


def numbers_table(columns: Sequence[str], rows: Iterable[Sequence[str]], **options: Any) -> Table:
    """A table whose first column holds names, and the others numbers; with options of rich."""
    table = Table(columns[0], **options)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(trainer: pl.Trainer, table: Table) -> None:
    """Print a table on the first process, above the progress bar if there is one."""
    if not trainer.is_global_zero:
        return
    # rich's own console is also that of RichProgressBar, which moves down instead of being torn.
    console, bar = get_console(), trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        with console.capture() as text:
            console.print(table)
        bar.print(text.get().rstrip())
    else:
        console.print(table)
