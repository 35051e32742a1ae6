"""Sphinx's settings: make docs builds the pages into build/docs."""

import re
from importlib.metadata import version as version_of

project = "lightning-ief"
copyright = "the authors of lightning-ief"
version = release = version_of("lightning-ief")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["benchmarks/*.csv", "findings/*.csv"]
html_theme = "furo"
html_title = "lightning-ief"

myst_heading_anchors = 3


autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def _as_rst(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """In docstrings here single backticks mark code and bars are norms; in reStructuredText both are otherwise."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line).replace("|", r"\|")


def setup(app: object) -> None:
    """Register the hook before napoleon's, which has priority 500."""
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # type: ignore[attr-defined]
