"""Texts for the recipes of language models: Python's language reference, and sentences of movie reviews."""

import json
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks import reviews

__all__ = ["prepare"]


def prepare(root: Path, reviews_root: Path) -> None:
    """Write the texts; nothing is done that was done before.

    Args:
        root: Folder: python (a file for each topic of Python's own help) and movies (one file, a sentence a line) are
            put there.
        reviews_root: Where `reviews.prepare` puts what it fetches from PyPI.
    """
    if not (root / "python").is_dir():
        _write(root / "python", topics)
    if not (root / "movies").is_dir():
        sentences = reviews_root / "sst2" / "train.jsonl"
        if not sentences.is_file():
            reviews.prepare(reviews_root)
        rows = sentences.read_text(encoding="utf-8").splitlines()
        _write(root / "movies", {"sentences": "\n".join(json.loads(row)["sentence"] for row in rows)})


def _write(folder: Path, named: Mapping[str, str]) -> None:
    """Write texts to files of a folder, which is there whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, text in named.items():
        (unfinished / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    unfinished.rename(folder)
