"""Tables of results in CSV files: dataclasses, which a killed run can't spoil, and what CSVLogger wrote."""

import csv
import math
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import NoneType
from typing import IO, Any, TypeAlias, TypeVar, cast, get_args, get_type_hints

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = [
    "Series",
    "join_metrics",
    "keep_metrics",
    "lock",
    "read_metrics",
    "read_table",
    "update_table",
    "write_table",
]

Series: TypeAlias = tuple[list[int], list[float]]
"""Training steps and the values logged there."""

Row = TypeVar("Row")


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """Read a table.

    Args:
        path: The CSV file.
        kind: The dataclass of its rows; the fields are strings and numbers, or None, which is an empty cell. Tables of
            older versions may lack the last of them, if these have defaults.

    Returns:
        The rows; none if there is no file. A row that was cut off, as by a full disk, is left out.

    Raises:
        MisconfigurationException: If it is another kind of file, or damaged.

    """
    if not path.is_file():
        return []
    parsers = {name: _parser(hint) for name, hint in get_type_hints(kind).items()}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        required = [field.name for field in fields(kind) if field.default is MISSING]  # type: ignore[arg-type]
        columns = [*(reader.fieldnames or [])]
        if columns != [*parsers][: len(columns)] or len(columns) < len(required):
            raise MisconfigurationException(
                f"{path} is no table of this version with rows of {kind.__module__}.{kind.__name__}: its columns are "
                f"{columns}. Name another file, or remove it."
            )
        rows = []
        for number, row in enumerate(reader, 2):
            if row[columns[-1]] is None:
                continue
            try:
                rows.append(kind(**{name: parsers[name](text) for name, text in row.items()}))
            except (KeyError, ValueError):  # KeyError: there are more cells than columns
                raise MisconfigurationException(f"{path}, line {number}, is damaged. Remove the line.") from None
        return rows


def _parser(hint: Any) -> Callable[[str], Any]:
    """What turns a cell into a value of this type."""
    if NoneType not in get_args(hint):
        return cast(Callable[[str], Any], hint)
    (inner,) = (kind for kind in get_args(hint) if kind is not NoneType)
    return lambda text: inner(text) if text else None


def write_table(path: Path, rows: Iterable[Row], kind: type[Row], digits: int | None = None) -> None:
    """Write a table: the file holds the old rows or the new ones, whenever this is interrupted.

    Args:
        path: The CSV file; its folder is made if it does not exist.
        rows: The rows.
        kind: Their dataclass.
        digits: Significant digits of numbers; all of them if None.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    with whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)])  # type: ignore[arg-type]
        writer.writeheader()
        for row in rows:
            cells: dict[str, Any] = asdict(row)  # type: ignore[call-overload]
            if digits is not None:
                cells |= {name: f"{cell:.{digits}g}" for name, cell in cells.items() if isinstance(cell, float)}
            writer.writerow(cells)
    whole.replace(path)


def update_table(path: Path, rows: Iterable[Row], kind: type[Row], key: Callable[[Row], Hashable]) -> None:
    """Add rows to a file, in place of those with the same key; several processes may do so at once.

    Args:
        path: The CSV file; a file with the suffix .lock stays beside it.
        rows: The rows.
        kind: Their dataclass.
        key: What tells rows apart.

    """
    rows = list(rows)
    again = {key(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as file:
        lock(file)
        write_table(path, [*(row for row in read_table(path, kind) if key(row) not in again), *rows], kind)


def lock(file: IO[str], wait: bool = True) -> bool:
    """Lock an open file: it is free again when all processes that have inherited it have closed it, or have died.

    Args:
        file: The file.
        wait: Whether to wait while another process holds it.

    Returns:
        False if another process holds it. Where there are no such locks (Windows, some network disks), nothing is held.

    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # the disk has no locks
        pass
    return True


def read_metrics(*parts: Path, finite: bool = True) -> dict[str, Series]:
    """Values of each column that has any, with their steps.

    Args:
        *parts: What CSVLogger wrote; of a run that was resumed, each part in turn. What a later one logged again
            replaces what an earlier one logged.
        finite: Whether to leave out those that are not finite.

    Returns:
        Steps and values by column.

    """
    series: dict[str, Series] = {}
    for row in _rows(parts):
        for name, text in row.items():
            if name == "step" or not text:
                continue
            value = float(text)
            if math.isfinite(value) or not finite:
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(value)
    return series


def _rows(parts: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of one or several metrics.csv of a run, the later ones in place of those they repeat."""
    rows: list[dict[str, str]] = []
    for part in parts:
        with part.open(newline="") as file:
            read = list(csv.DictReader(file))
        if read:
            first = int(read[0]["step"])
            again = set().union(*(_logged(row) for row in read if int(row["step"]) == first))
            rows = [
                row for row in rows
                if int(row["step"]) < first or (int(row["step"]) == first and not again & _logged(row))
            ] + read  # fmt: skip
    return rows


def keep_metrics(folder: Path) -> None:
    """Put the metrics.csv of an interrupted run aside: CSVLogger removes what it finds when the run goes on."""
    if (folder / "metrics.csv").is_file():
        number = len([*folder.glob("metrics.*.csv")])
        (folder / "metrics.csv").rename(folder / f"metrics.{number}.csv")


def join_metrics(folder: Path) -> None:
    """Make one metrics.csv of all parts: what a later one logged again replaces what an earlier one logged."""
    earlier = sorted(folder.glob("metrics.*.csv"), key=lambda path: int(path.suffixes[0][1:]))
    if not earlier:
        return
    parts = [*earlier, *folder.glob("metrics.csv")]  # a run with nothing left to do writes none
    rows = _rows(parts)
    whole = folder / "metrics.part"
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(name for row in rows for name in row)])
        writer.writeheader()
        writer.writerows(rows)
    whole.replace(folder / "metrics.csv")
    for part in parts:
        if part.name != "metrics.csv":
            part.unlink()


def _logged(row: dict[str, str]) -> set[str]:
    """Keys that a row has values of."""
    return {name for name, value in row.items() if value} - {"step", "epoch"}
