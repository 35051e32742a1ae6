"""Printing tables beside Lightning's progress bar."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from rich import get_console
from rich.table import Table

__all__ = ["print_table"]


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
