"""A report of runs: tables and figures in one HTML file that needs no other."""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lightning_ief.callbacks._rendering import numbers_table
from lightning_ief.experiments.comparison import Outcome, summarize
from lightning_ief.experiments.evaluation import Result, tabulate
from lightning_ief.experiments.figures.folders import existing, experiment, metrics_of, named, read_runs
from lightning_ief.experiments.figures.runs import Drawn, draw_what_there_is
from lightning_ief.experiments.tables import Series, read_table

__all__ = ["write_report"]

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #202020 }}
img {{ max-width: 100% }}
pre {{ font: 13px/1.3 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto }}
figure, .table {{ margin: 1rem 0; overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
caption {{ text-align: left; font-weight: 600; padding: 0.3rem 0 }}
th, td {{ padding: 0.2rem 0.8rem; text-align: left; border-bottom: 1px solid #d8d8d8; white-space: nowrap }}
thead th {{ border-bottom: 2px solid #202020 }}
.right {{ text-align: right }}
.note {{ color: #505050; margin: 0.3rem 0 }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(
    runs: Sequence[Path],
    output: Path = Path("report.html"),
    evaluations: Sequence[Path] = (),
    projections: Sequence[Path] = (),
    comparison: Path | None = None,
    metric: str = "val/accuracy",
    minimize: bool = False,
) -> Path:
    """Gather tables and figures of runs into one HTML file.

    A run that was resumed is one with the run it went on from, if that is given, too. The file holds the figures of
    `draw_runs`, the last values that each run logged, tables of the evaluations and of a comparison, and the
    configuration of each run. Nothing in it is fetched from elsewhere.

    Args:
        runs: Folders with a metrics.csv of Lightning's CSVLogger.
        output: The HTML file.
        evaluations: CSV files of `lightning-ief evaluate`.
        projections: CSV files of its option projections.
        comparison: The comparison.csv of `lightning-ief compare`.
        metric: The validation metric of the figures.
        minimize: Whether smaller is better of the metric that was compared.

    Returns:
        The HTML file.

    Raises:
        FileNotFoundError: If a run has no metrics.csv, or another file is not there.

    """
    parts = []
    if comparison is not None:
        outcomes = read_table(existing(comparison), Outcome)
        parts.append(_section("Comparison", _html_table(summarize(outcomes, minimize))))
    with tempfile.TemporaryDirectory() as folder:
        drawn, left_out = draw_what_there_is(
            runs, Path(folder), evaluations, projections, metric, comparison=comparison, minimize=minimize
        )
        parts += map(_figure, drawn)
    names = named(runs)
    if names:
        parts.append(_section("Last values", _html_table(_last_values(read_runs(names)))))
    for path in evaluations:
        rows = read_table(path, Result)
        tables = [
            tabulate(name, [row for row in rows if row.checkpoint == name])
            for name in dict.fromkeys(row.checkpoint for row in rows)
        ]
        parts.append(_section(f"Evaluation {path}", "".join(map(_html_table, tables))))
    for name, run in names.items():
        config = metrics_of(run).with_name("config.yaml")
        if config.is_file():
            text = f"<details><summary>{escape(str(config))}</summary><pre>{escape(config.read_text())}</pre></details>"
            parts.append(_section(f"Configuration of {name}", text))
    if left_out:
        notes = "".join(f"<li>{escape(note)}</li>" for note in left_out)
        parts.append(_section("Left out", f"<ul>{notes}</ul>"))
    output.parent.mkdir(parents=True, exist_ok=True)
    title = "lightning-ief: " + (", ".join(dict.fromkeys(map(experiment, names))) or "report")
    output.write_text(_PAGE.format(title=escape(title), body="\n".join(parts)), encoding="utf-8")
    return output


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _figure(drawn: Drawn) -> str:
    data = base64.b64encode(drawn.png.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(drawn.title)}">'
    return _section(drawn.title, f"<figure>{image}</figure>")


def _html_table(table: Table) -> str:
    """A table of rich as one of HTML: its title is the caption, its caption a note below."""
    columns = table.columns
    kinds = [' class="right"' if column.justify == "right" else "" for column in columns]
    head = "".join(f'<th scope="col"{kind}>{_escaped(c.header)}</th>' for c, kind in zip(columns, kinds, strict=True))
    rows = []
    for first, *others in zip(*(column.cells for column in columns), strict=True):
        cells = "".join(f"<td{kind}>{_escaped(cell)}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
        rows.append(f'<tr><th scope="row">{_escaped(first)}</th>{cells}</tr>')
    caption = f"<caption>{_escaped(table.title)}</caption>" if table.title else ""
    note = f'<p class="note">{_escaped(table.caption)}</p>' if table.caption else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="table"><table>{caption}{body}</table>{note}</div>'


def _escaped(text: object) -> str:
    """What a cell says, without rich's markup."""
    return escape(text.plain if isinstance(text, Text) else Text.from_markup(str(text)).plain)


def _last_values(read: Mapping[str, Mapping[str, Series]]) -> Table:
    keys = sorted({key for metrics in read.values() for key in metrics if "_std" not in key} - {"epoch"})
    rows = [[key, *(f"{of[key][1][-1]:.4g}" if key in of else "" for of in read.values())] for key in keys]
    return numbers_table(["key", *read], rows)
