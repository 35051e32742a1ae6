"""Printing tables beside Lightning's progress bar."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.table import Table

__all__ = ["print_table"]


def print_table(trainer: pl.Trainer, table: Table) -> None:
    """Print a table on the first process, above the progress bar if there is a rich one.

    Args:
        trainer: The trainer.
        table: The table.

    """
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    # Printing to the console of the live display moves the bar down instead of tearing it.
    console = getattr(bar, "_console", None) if isinstance(bar, RichProgressBar) else None
    (console or get_console()).print(table)
