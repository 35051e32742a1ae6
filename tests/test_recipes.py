"""Every recipe runs; the quickstart keeps what it promises."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ief.experiments.cli import main
from lightning_ief.tasks import MLP, vision
from tests.tasks.stand_ins import write_cifar10, write_fashion_mnist

FOLDER = Path(__file__).parents[1] / "recipes"
# Those of T5, MiniLM, GPT-2 and ViT have stand-ins of their own, in test_recipes_text.py and test_recipes_images.py.
OTHERS = ("t5_", "minilm_", "gpt2_", "vit_")
RECIPES = [path for path in sorted(FOLDER.glob("*.yaml")) if not path.stem.startswith(OTHERS)]
VARIANTS = [path for path in sorted(FOLDER.glob("*/*.yaml")) if not path.parent.name.startswith(OTHERS)]
QUICKSTART = str(FOLDER / "quickstart.yaml")


@pytest.fixture(autouse=True)
def empty_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ief"])


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Small data sets where the recipes look for the real ones."""
    monkeypatch.setattr(vision, "_DEBIAN", tmp_path / "no_such_package")
    write_fashion_mnist(tmp_path / "data", 5_000 + 200)  # the recipes hold out 5,000
    write_cifar10(tmp_path / "data", 5_000 + 200, monkeypatch)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("stand_ins")
def test_recipe_runs(recipe):
    main(["fit", "--config", str(recipe), "--trainer.fast_dev_run", "true"])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
@pytest.mark.usefixtures("stand_ins")
def test_variant_trains_for_two_epochs(variant):
    if variant.stem == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    recipe = variant.parent.with_suffix(".yaml")
    short = ("--trainer.max_epochs=2", "--trainer.limit_val_batches=2", "--trainer.callbacks=[]")
    unsaved = "--trainer.enable_checkpointing=false"  # 120 MB for each epoch
    # Muon computes in bfloat16, in which some CPUs take minutes for matrices of the recipe's size.
    narrow = ["--model.init_args.net.init_args.widths=[784, 64, 10]"] if variant.match("mlp_*/muon.yaml") else []
    main(["fit", f"--config={recipe}", f"--config={variant}", *short, unsaved, *narrow])
    (run,) = Path("runs").glob("*/*")
    losses = [float(row["val/loss"]) for row in rows(run) if row.get("val/loss")]
    assert len(losses) == 2 and all(0 < loss < 3 for loss in losses)


@pytest.mark.parametrize(("recipe", "count"), [("mlp_cifar10", 10_510_346), ("mlp_fashion_mnist", 5_824_522)])
def test_recipe_has_the_papers_count(recipe, count):
    """Fashion-MNIST has 784 inputs instead of 3072: 2048 · 2288 parameters fewer."""
    config = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    with torch.device("meta"):
        net = MLP(**config["model"]["init_args"]["net"]["init_args"])
    assert sum(p.numel() for p in net.parameters()) == count


def test_each_recipe_has_a_preset_of_a_regime_that_the_docs_name():
    """Or, where nothing of the paper's is to be kept, is one itself."""
    regimes = (FOLDER.parent / "docs" / "tuning.md").read_text().split("## Presets")[1].split("##")[0]
    for recipe in sorted(FOLDER.glob("*.yaml")):
        own = yaml.safe_load(recipe.read_text())["model"]["init_args"]
        preset = recipe.with_suffix("") / "ief_preset.yaml"
        given = yaml.safe_load(preset.read_text())["model"]["init_args"] if preset.exists() else own
        if given["optimizer"]["class_path"] != "lightning_ief.IEF":
            # The first of two stages, which compares nothing.
            assert recipe.stem == "vit_fashion_mnist"
            continue
        options = given["optimizer"]["init_args"]
        assert ("relative_damping" in options) != ("absolute_damping" in options)
        assert (options.get("damping", ...) is None) == ("damping" in own["optimizer"]["init_args"])
        (row,) = [line for line in regimes.splitlines() if f"`{recipe.stem}`" in line]
        named = {name: value for name, value in options.items() if name not in ("lr", "damping", "max_norm")}
        for name, value in named.items():
            assert f"`{name}={value:g}`" in row, (recipe.stem, name)
        assert f"lr {options['lr']:g}" in row
        assert ("linear" in row) == (given.get("lr_scheduler") == "linear")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last(run: Path, name: str) -> float:
    return [float(row[name]) for row in rows(run) if row.get(name)][-1]


def test_quickstart_says_all_it_has_to_say_on_three_screens(capfd, monkeypatch):
    """As many lines as with all batches and the whole network, in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    config = yaml.safe_load(Path(QUICKSTART).read_text())
    callbacks = {each["class_path"].rpartition(".")[2]: each for each in config["trainer"]["callbacks"]}
    callbacks["GammaIndicators"]["init_args"]["num_batches"] = 1
    config["trainer"]["callbacks"].remove(callbacks["TrainingFigures"])  # says nothing
    config["trainer"]["logger"] = config["trainer"]["logger"][:1]
    config["model"]["init_args"]["net"]["init_args"]["widths"] = [64, 16, 10]
    config["trainer"] |= {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    Path("quickstart.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "quickstart.yaml"])
    said = capfd.readouterr()
    lines = [*said.out.splitlines(), *said.err.splitlines()]
    assert sum("γ before training" in line or "γ after epoch" in line for line in lines) == 5
    assert "test/accuracy" in said.out and len(rows(Path("runs/quickstart/version_0"))) > 24
    assert len(lines) <= 120


def test_quickstart_leaves_a_complete_run_that_resumes():
    main(["fit", "--config", QUICKSTART, "--trainer.max_epochs", "2"])
    run = Path("runs/quickstart/version_0")
    for pattern in (
        "metrics.csv",
        "events.out.tfevents.*",
        "config.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "figures/gamma_ratios.png",
        "figures/loss.png",
    ):
        assert list(run.glob(pattern)), pattern
    logged = set(rows(run)[0])
    for direction in ("sgd", "ef", "ief", "sampled_fisher"):
        assert {f"gamma/{direction}", f"gamma_relative/{direction}"} <= logged
    assert {f"timing/{part}_ms" for part in ("forward", "backward", "update", "step")} <= logged
    assert {"train/loss", "val/loss", "val/accuracy", "test/loss", "gradient_norm_imbalance"} <= logged
    assert last(run, "test/accuracy") > 0.9  # 0.96 takes all epochs

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1  # the last one, not the best one
    assert sum(weights.numel() for name, weights in checkpoint["state_dict"].items() if "net." in name) == 167_178

    main(
        ["fit", "--config", QUICKSTART, "--trainer.max_epochs", "3", "--ckpt_path", str(run / "checkpoints/last.ckpt")]
    )
    resumed = run.with_name("version_1")
    assert {row["epoch"] for row in rows(resumed) if row["train/loss"]} == {"2"}
