"""The recipes on text run, with every optimizer and task; those of the paper say what it says."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from lightning_ief.experiments.cli import main  # noqa: E402
from lightning_ief.tasks import causal_lm  # noqa: E402
from lightning_ief.tasks.glue import TASKS  # noqa: E402
from lightning_ief.tasks.text import SequenceClassifier, T5Classifier  # noqa: E402
from tests.tasks.text_stand_ins import write_bert, write_glue, write_t5, write_texts  # noqa: E402

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("t5_*.yaml"), reverse=True)
VARIANTS = [path for recipe in RECIPES for path in sorted(recipe.with_suffix("").glob("*.yaml"))]
REVIEWS = FOLDER / "minilm_lora_reviews.yaml"
REVIEWS_VARIANTS = sorted(REVIEWS.with_suffix("").glob("*.yaml"))
LANGUAGE = FOLDER / "gpt2_lora_text.yaml"
LANGUAGE_VARIANTS = sorted(LANGUAGE.with_suffix("").glob("*.yaml"))
STAND_INS = (
    "--model.init_args.net.init_args.model_name_or_path=t5",
    "--data.init_args.tokenizer=t5",
    "--data.init_args.source=glue",
)
N = 32

# Learning rate and λ in the paper, where it has one; what sees mean losses has the same here.
PAPER = {
    "t5_prompt_glue": {"IEF": (50, 1e-12), "EF": (1, 1e-12), "SampledFisher": (1, 1e-12), "SGD": (100, None),
                       "Adafactor": (0.3, None)},
    "t5_lora_glue": {"IEF": (100, 1e-7), "EF": (0.01, 1e-7), "SampledFisher": (0.01, 1e-7), "SGD": (0.1, None),
                     "AdamW": (1e-3, None)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    """A small T5 and a task where the options say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ief"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_t5(tmp_path / "t5")
    write_glue(tmp_path / "glue", "cola", train=80)


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_for_two_epochs(recipe):
    epochs = ("--trainer.max_epochs=2", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu")
    main(["fit", f"--config={recipe}", *STAND_INS, *epochs])
    run = Path(f"runs/{recipe.stem}/version_0")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Steps are counted across epochs: 2 · 3 batches, an evaluation after every third.
    assert [int(row["step"]) for row in rows if row.get("val/loss")] == [2, 5]
    assert {"val/accuracy", "val/matthews", "gamma/ief", "gamma_relative/ef"} <= rows[0].keys()
    losses = [float(row["val/loss"]) for row in rows if row.get("val/loss")]
    assert 0 < losses[0] < 50 and 0 < losses[1] < 50 and losses[0] != losses[1]  # random weights: no more to expect
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    saved = read(run / "config.yaml")
    assert saved["model"]["init_args"]["net"]["init_args"]["adapter"]["init_args"].items() >= (
        read(recipe)["model"]["init_args"]["net"]["init_args"]["adapter"]["init_args"].items()
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_variant_runs(variant):
    recipe = variant.parent.with_suffix(".yaml")
    short = ("--trainer.fast_dev_run=true", "--trainer.callbacks=[]")
    main(["fit", f"--config={recipe}", f"--config={variant}", *STAND_INS, *short])


@pytest.mark.parametrize("variant", [None, *REVIEWS_VARIANTS], ids=lambda path: path.stem if path else "ief")
def test_reviews_train_for_two_epochs(variant):
    write_bert(Path("data/movie_reviews/minilm"))
    write_glue(Path("data/movie_reviews"), "sst2", train=80, kind="jsonl")
    files = [f"--config={path}" for path in (REVIEWS, variant) if path]
    short = ("--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu")
    main(["fit", *files, *short, *([] if variant is None else ["--trainer.callbacks=[]"])])
    run = Path("runs/minilm_lora_reviews/version_0")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) == 6 and losses[0] == pytest.approx(math.log(2), abs=0.05)  # classes are equally likely
    assert all(0 < loss < 50 for loss in losses) and len(set(losses)) == 6  # random weights: no more to expect
    assert len([row for row in rows if row.get("val/accuracy")]) == 2
    if variant is None:
        assert {"gamma/ief", "gamma_std/ief", "gamma_relative/ef"} <= rows[0].keys()
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_reviews_train_as_many_parameters_as_the_recipe_says():
    adapter = read(REVIEWS)["model"]["init_args"]["net"]["init_args"]["adapter"]["init_args"]
    shape = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
             "num_attention_heads": 12, "intermediate_size": 1536}  # fmt: skip
    with torch.device("meta"):
        net = SequenceClassifier(2, config=shape, adapter=peft.LoraConfig(**adapter))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 74_498
    assert "74,498 trainable" in REVIEWS.read_text()


def test_a_language_model_trains_in_two_stages_the_second_with_every_optimizer():
    short = ("--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu")
    for name in ("python", "movies"):
        write_texts(Path("data/texts") / name, files=1, lines=60)
    first = FOLDER / "gpt2_text.yaml"
    main(["fit", f"--config={first}", *short])
    others = sorted(first.with_suffix("").glob("*.yaml"))
    for variant in others:
        apart = ("--trainer.callbacks=[]", "--trainer.logger.init_args.name=gpt2_others")
        main(["fit", f"--config={first}", f"--config={variant}", *short, *apart])
    main(["fit", f"--config={LANGUAGE}", *short])
    for variant in LANGUAGE_VARIANTS:
        main(["fit", f"--config={LANGUAGE}", f"--config={variant}", *short, "--trainer.callbacks=[]"])
    runs = [Path("runs/gpt2_text/version_0"), *sorted(Path("runs/gpt2_lora_text").iterdir())]
    assert len(runs) == 2 + len(LANGUAGE_VARIANTS)
    more = sorted(Path("runs/gpt2_others").iterdir())
    assert len(more) == len(others) == 6
    for n, run in enumerate([*runs, *more]):
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        per_token = [float(row["train/loss_per_token"]) for row in rows if row.get("train/loss_per_token")]
        assert per_token and all(0 < loss < 10 for loss in per_token)
        (perplexity,) = [float(row["val/perplexity"]) for row in rows if row.get("val/perplexity")]
        assert 1 < perplexity < 1000
        assert ("gamma/ief" in rows[0]) == (n == 1)
    assert "lora" in " ".join(torch.load(runs[1] / "checkpoints/best.ckpt", weights_only=True)["state_dict"])


def test_the_language_model_trains_as_many_parameters_as_its_recipes_say():
    given = read(LANGUAGE)["model"]["init_args"]["net"]["init_args"]
    adapter = peft.LoraConfig(**given["adapter"]["init_args"])
    with torch.device("meta"):
        net = causal_lm(config=given["config"], adapter=adapter)
    trained, frozen = (sum(p.numel() for p in net.parameters() if p.requires_grad == which) for which in (True, False))
    assert f"{trained:,} trainable" in LANGUAGE.read_text()
    first = FOLDER / "gpt2_text.yaml"
    assert read(first)["model"]["init_args"]["net"]["init_args"]["config"] == given["config"]
    assert f"{frozen:,} parameters" in first.read_text()


@pytest.mark.parametrize("task", [task for task in TASKS if task != "cola"])
def test_the_task_is_one_option(task):
    write_glue(Path("glue"), task)
    main(["fit", f"--config={RECIPES[0]}", *STAND_INS, f"--data.task={task}", "--trainer.fast_dev_run=true",
          "--trainer.callbacks=[]"])  # fmt: skip


@pytest.mark.parametrize(("recipe", "count"), zip(RECIPES, (15_360, 884_736), strict=True), ids=["prompt", "LoRA"])
def test_recipe_has_the_papers_count(recipe, count):
    adapter = read(recipe)["model"]["init_args"]["net"]["init_args"]["adapter"]
    kind = getattr(peft, adapter["class_path"].rpartition(".")[2])
    shape = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        net = T5Classifier(config=shape, adapter=kind(**adapter["init_args"]))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_hyper_parameters_are_the_papers_in_our_units(recipe):
    found = {}
    for path in [recipe, *sorted(recipe.with_suffix("").glob("[!i]*.yaml"))]:  # not our preset
        given = read(path)["model"]["init_args"]
        optimizer, options = given["optimizer"]["class_path"].rpartition(".")[2], given["optimizer"]["init_args"]
        direct = optimizer == "IEF"  # neither normalised nor of mean losses
        lr = options["lr"] * (N if direct else 1)
        damping = options["damping"] / N**2 if "damping" in options else None
        found[optimizer] = (pytest.approx(lr), damping and pytest.approx(damping))
        normalized = optimizer in ("EF", "SampledFisher")
        assert options.get("normalize", False) == (given.get("lr_scheduler") == "linear") == normalized
    assert found == PAPER[recipe.stem]
    assert read(recipe)["data"]["init_args"]["batch_size"] == N
