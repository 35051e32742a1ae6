"""The documentation builds without a warning, and what it names is there."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lightning_ief.experiments.parser import OWN_SUBCOMMANDS, SUBCOMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not (find_spec("sphinx") and find_spec("furo") and find_spec("myst_parser")), reason="extra dev")
def test_the_site_builds(tmp_path):
    """Every link between pages and every documented name resolves: -W makes an error of a warning."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "api" / "optimizers.html").read_text(encoding="utf-8")
    assert "Improved empirical Fisher" in page and "Learning rate" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_recipes_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for kind, block in BLOCK.findall(text):
        if kind == "yaml":
            yaml.safe_load(block)
        for line in block.splitlines() if kind == "console" else ():
            if line.startswith("lightning-ief "):
                assert line.split()[1] in {*SUBCOMMANDS, *OWN_SUBCOMMANDS}, line
            elif line.startswith("make "):
                assert line.split()[1] in targets, line
            elif line.strip().startswith(("pip ", "python -m benchmarks", ".venv/bin/python -m benchmarks", "--")):
                continue
            else:
                pytest.fail(f"unknown command: {line}")
    for recipe in re.findall(r"recipes/[\w/]+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
