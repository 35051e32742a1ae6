"""The report as a browser sees it: its tables are tables. Chromium looks at it where there is one, html.parser else."""

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.table import Table

from lightning_ief.experiments.comparison import Outcome
from lightning_ief.experiments.evaluation import Result
from lightning_ief.experiments.figures import report, write_report
from lightning_ief.experiments.tables import write_table


class Tables(HTMLParser):
    """The cells of each table of a page, and whether every tag was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables, self._open = [], []
        self.feed(page)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "html"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag != "html":
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A report with a table of each kind."""
    monkeypatch.chdir(tmp_path)
    run = Path("a/version_0")
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,epoch,val/a<b\n0,0,0.25\n1,1,0.5\n")
    (run / "config.yaml").write_text("lr: <one>\n")
    nan = float("nan")
    measured = (1.0, 0.1, 0.4, 0.2, 0.5, 0.1, 0.3, 0.1, 5.0, nan)
    result = Result("runs/a/version_0/checkpoints/x.ckpt", 1, 20, "ief", 0.0, 2, 8, 0, 1, 0, *measured)
    write_table(Path("evaluation.csv"), [result], Result)
    write_table(Path("comparison.csv"), [Outcome("ief", 0.5, 0, "val/accuracy", 0.8765, 1, 0.1, "r", "s")], Outcome)
    return write_report([run], Path("report.html"), [Path("evaluation.csv")], comparison=Path("comparison.csv"))


def check(tables: list[list[list[str]]]) -> None:
    comparison, values, evaluation = tables
    assert comparison == [
        ["optimizer", "lr", "searched", "best val/accuracy", "final train/loss", "runs"],
        ["ief", "0.5", "0.5", "0.8765", "0.1000", "1"],
    ]
    assert values == [["key", "a/version_0"], ["val/a<b", "0.5"]]
    assert evaluation[0][:3] == ["direction", "λ", "γ"] and evaluation[1][:3] == ["ief", "0", "1"]


def test_tables_are_tables(page):
    text = page.read_text(encoding="utf-8")
    check(Tables(text).tables)
    assert text.count("<pre>") == 1  # the configuration
    assert "<caption>Mean ± standard deviation over the seeds</caption>" in text
    assert '<p class="note">imbalance: 5</p>' in text


def test_what_is_markup_of_rich_or_html_is_text():
    table = Table("name", title="[bold]a[/bold] & b")
    table.add_row("<i>[red]x[/red]")
    text = report._html_table(table)
    assert Tables(text).tables == [[["name"], ["<i>x"]]] and "<caption>a &amp; b</caption>" in text


def test_a_browser_shows_the_tables(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium; test_tables_are_tables has parsed the page")
    shot = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=900,1200", f"--screenshot={shot}", "--dump-dom", page.resolve().as_uri()]  # fmt: skip
    seen = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    check([[row for row in table if row] for table in Tables(seen.stdout.replace("<!DOCTYPE html>", "")).tables])
    if not shot.is_file():  # some versions do one of the two at a time
        subprocess.run([each for each in command if each != "--dump-dom"], capture_output=True, timeout=120, check=True)
    image = imread(shot)
    assert image.shape[:2] == (1200, 900) and image[..., :3].std() > 0.02  # not a white page
