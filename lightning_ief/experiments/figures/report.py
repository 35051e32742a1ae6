"""A report of runs: tables and figures in one HTML file that needs no other."""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_ief.experiments.comparison import Outcome, summarize
from lightning_ief.experiments.evaluation import Result, tabulate
from lightning_ief.experiments.figures.folders import existing, experiment, metrics_of, named
from lightning_ief.experiments.figures.runs import Drawn, draw_what_there_is
from lightning_ief.experiments.tables import read_metrics, read_table

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
figure {{ margin: 1rem 0 }}
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

    It holds the figures of `draw_runs`, the last values that each run logged, tables of the evaluations and of a
    comparison, and the configuration of each run. Nothing in it is fetched from elsewhere.

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
        parts.append(_section("Comparison", _preformatted(summarize(outcomes, minimize))))
    with tempfile.TemporaryDirectory() as folder:
        drawn, left_out = draw_what_there_is(
            runs, Path(folder), evaluations, projections, metric, comparison=comparison, minimize=minimize
        )
        parts += map(_figure, drawn)
    names = named(runs)
    if names:
        parts.append(_section("Last values", _preformatted(_last_values(names))))
    for path in evaluations:
        rows = read_table(path, Result)
        tables = [
            tabulate(name, [row for row in rows if row.checkpoint == name])
            for name in dict.fromkeys(row.checkpoint for row in rows)
        ]
        parts.append(_section(f"Evaluation {path}", "".join(map(_preformatted, tables))))
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


def _preformatted(table: Table) -> str:
    console = Console(record=True, width=140, file=StringIO(), force_jupyter=False)
    console.print(table)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _last_values(runs: Mapping[str, Path]) -> Table:
    read = {name: read_metrics(metrics_of(run)) for name, run in runs.items()}
    keys = sorted({key for metrics in read.values() for key in metrics if "_std" not in key} - {"epoch"})
    table = Table("key", *read)
    for key in keys:
        cells = (f"{metrics[key][1][-1]:.4g}" if key in metrics else "" for metrics in read.values())
        table.add_row(key, *cells)
    return table
