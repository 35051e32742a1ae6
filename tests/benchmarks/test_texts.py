"""Texts for language models lie where the recipes look for them."""

import json
from pathlib import Path

import yaml

from benchmarks import texts

RECIPES = Path(__file__).parents[2] / "recipes"


def test_texts_lie_where_recipes_look_for_them(tmp_path):
    (tmp_path / "reviews" / "sst2").mkdir(parents=True)
    rows = [{"sentence": "a fine film .", "label": 1}, {"sentence": "it is — alas — dull .", "label": 0}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "reviews" / "sst2" / "train.jsonl").write_text(lines + "\n", encoding="utf-8")
    texts.prepare(tmp_path / "data" / "texts", tmp_path / "reviews")
    for recipe in ("gpt2_text", "gpt2_lora_text"):
        folder = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["data"]["init_args"]["folder"]
        assert [*(tmp_path / folder).glob("*.txt")], folder
    written = (tmp_path / "data/texts/movies/sentences.txt").read_text(encoding="utf-8").splitlines()
    assert written == [row["sentence"] for row in rows]
    assert "for_stmt" in (tmp_path / "data/texts/python/for.txt").read_text(encoding="utf-8")
