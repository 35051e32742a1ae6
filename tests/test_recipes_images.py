"""The recipes of vision transformers: they run with every optimizer and resume; the numbers are the paper's."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("timm")
pytest.importorskip("peft")

from lightning_ief.experiments.cli import main  # noqa: E402
from lightning_ief.tasks import VisionDataModule, timm_lora, timm_vit, vision  # noqa: E402
from tests.tasks.stand_ins import write_cifar100, write_fashion_mnist, write_vit  # noqa: E402

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPE = FOLDER / "vit_lora_cifar100.yaml"
VARIANTS = sorted(RECIPE.with_suffix("").glob("*.yaml"))
STAND_INS = (
    "--model.init_args.net.init_args.name=test_vit",
    "--model.init_args.net.init_args.checkpoint_path=vit.pt",
    "--model.init_args.net.init_args.img_size=32",
    "--data.init_args.image_size=32",
    "--data.init_args.val_size=32",
    "--trainer.val_check_interval=2",  # the batches of an epoch
    "--trainer.accelerator=cpu",
)
RUNS = Path("runs/vit_lora_cifar100")

# Learning rate and λ in the paper (which names no λ for the MLP); what sees mean losses has the same here.
PAPER = {
    "vit_lora_cifar100": {"IEF": (100, 1e-7), "EF": (0.01, 1e-7), "SampledFisher": (0.01, 1e-7), "SGD": (0.1, None),
                          "AdamW": (1e-3, None)},
    "mlp_cifar10": {"IEF": (50, 1e-7), "EF": (1e-4, 1e-7), "SampledFisher": (0.1, 1e-7), "SGD": (0.1, None),
                    "Adam": (1e-4, None)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    """A small vision transformer and images where the options say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ief"])
    write_cifar100(tmp_path / "data", 32 + 64, monkeypatch)
    write_vit(tmp_path / "vit.pt")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def fit(*options: str) -> None:
    main(["fit", f"--config={RECIPE}", *STAND_INS, *options])


def test_recipe_trains_for_two_epochs_and_its_checkpoints_are_evaluated():
    fit("--trainer.max_epochs=2")
    run = RUNS / "version_0"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["val/loss"]) for row in rows if row.get("val/loss")]
    assert len(losses) == 2 and losses[0] != losses[1] and all(0 < loss < 20 for loss in losses)  # noise and noise
    assert {"val/accuracy", "test/accuracy", "gamma/ief", "gamma_relative/ef"} <= rows[0].keys()
    paths = {name: run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")}
    for path in paths.values():
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all("lora_" in name or name.endswith((".q.base_layer.bias", ".v.base_layer.bias")) for name in saved)
        assert path.stat().st_size < Path("vit.pt").stat().st_size / 4

    def evaluate() -> None:
        sizes = ("--num_batches=1", "--batch_size=16", "--directions=[sgd, ief]")
        main(["evaluate", f"--config={run}/config.yaml", f"--checkpoints=[{paths['best']}, {paths['last']}]", *sizes])

    evaluate()
    with Path("evaluation.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    Path("evaluation.csv").unlink()
    write_vit(Path("vit.pt"), seed=1)
    with pytest.raises(SystemExit, match="trained on another backbone"):
        evaluate()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.stem)
def test_variant_trains_for_two_epochs(variant):
    fit(f"--config={variant}", "--trainer.max_epochs=2", "--trainer.callbacks=[]")
    (metrics,) = RUNS.glob("*/metrics.csv")
    with metrics.open(newline="") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


ADAMW = (f"--config={RECIPE.with_suffix('')}/adamw.yaml", "--model.init_args.dropout=false")


@pytest.mark.parametrize("optimizer", [(), ADAMW], ids=["IEF", "AdamW"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(optimizer):
    """With dropout it would draw other masks."""
    (last,) = (c for c in read(RECIPE)["trainer"]["callbacks"] if c.get("init_args", {}).get("filename") == "last")
    options = (*optimizer, f"--trainer.callbacks=[{last}]")
    fit(*options, "--trainer.max_epochs=2")
    fit(*options, "--trainer.max_epochs=1")
    fit(*options, "--trainer.max_epochs=2", f"--ckpt_path={RUNS}/version_1/checkpoints/last.ckpt")
    whole, first, resumed = (
        torch.load(RUNS / f"version_{n}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in range(3)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], first[name]) for name in whole)


def test_fused_projections_and_a_new_head_are_options():
    net = "--model.init_args.net.init_args"
    short = ("--trainer.fast_dev_run=true", "--trainer.callbacks=[]")
    fit(f"{net}.split_qkv=false", *short)
    fit(f"{net}.num_classes=100", f"{net}.train_head=true", "--model.init_args.num_classes=100", *short)


def test_images_are_scaled_as_the_weights_want_it():
    import timm

    config = timm.get_pretrained_cfg(read(RECIPE)["model"]["init_args"]["net"]["init_args"]["name"])
    options = read(RECIPE)["data"]["init_args"]
    assert (options["mean"], options["std"]) == ([*config.mean], [*config.std]) == ([0.5] * 3, [0.5] * 3)


def test_recipe_has_the_papers_count():
    options = read(RECIPE)["model"]["init_args"]["net"]["init_args"]
    with torch.device("meta"):
        net = timm_lora(**options, pretrained=False)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 313_344


@pytest.mark.parametrize(("recipe", "n"), [("vit_lora_cifar100", 32), ("mlp_cifar10", 64)])
def test_hyper_parameters_are_the_papers_in_our_units(recipe, n):
    found = {}
    for path in [FOLDER / f"{recipe}.yaml", *sorted((FOLDER / recipe).glob("[!i]*.yaml"))]:  # not our preset
        given = read(path)["model"]["init_args"]
        optimizer, options = given["optimizer"]["class_path"].rpartition(".")[2], given["optimizer"]["init_args"]
        lr = options["lr"] * (n if optimizer == "IEF" else 1)  # the others are normalised, or see mean losses
        damping = options["damping"] / n**2 if "damping" in options else None
        found[optimizer] = (pytest.approx(lr, 0.01), damping and pytest.approx(damping, 0.01))
        linear = given.get("lr_scheduler", {}).get("class_path", "").endswith("LinearLR")
        assert options.get("normalize", False) == linear == (optimizer in ("EF", "SampledFisher"))
        if linear:
            epochs = read(FOLDER / f"{recipe}.yaml")["trainer"]["max_epochs"]
            assert given["lr_scheduler"]["init_args"] == {"start_factor": 1.0, "end_factor": 0.0, "total_iters": epochs}
    assert found == PAPER[recipe]
    assert read(FOLDER / f"{recipe}.yaml")["data"]["init_args"]["batch_size"] == n


# --- the two stages on Fashion-MNIST

FIRST, SECOND = FOLDER / "vit_fashion_mnist.yaml", FOLDER / "vit_lora_fashion_mnist.yaml"
SMALL = ("--trainer.max_epochs=2", "--data.init_args.val_size=32", "--trainer.accelerator=cpu", "--test_after_fit=true")


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    """The first stage, trained in a folder that has the data as well."""
    folder = tmp_path_factory.mktemp("stages")
    write_fashion_mnist(folder / "data", 192)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-ief"])
        patch.setattr(vision, "_DEBIAN", folder / "no_such_package")
        main(["fit", f"--config={FIRST}", *SMALL])
    return folder


@pytest.mark.parametrize("variant", sorted(SECOND.with_suffix("").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_second_stage_finds_the_first_and_trains_for_two_epochs(variant, first_stage, monkeypatch):
    monkeypatch.chdir(first_stage)
    monkeypatch.setattr(vision, "_DEBIAN", first_stage / "no_such_package")
    name = variant.stem
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    # The recipe's callbacks, of which γ takes most of the time, with its own optimizer; what is tested needs the last.
    last = "lightning.pytorch.callbacks.ModelCheckpoint"
    few = [] if name == "ief" else [f"--trainer.callbacks={last}", "--trainer.callbacks.filename=last"]
    main(
        ["fit", f"--config={SECOND}", f"--config={variant}", *SMALL, f"--trainer.logger.init_args.version={name}", *few]
    )
    run = first_stage / "runs" / "vit_lora_fashion_mnist" / name
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["val/loss"]) for row in rows if row.get("val/loss")]
    assert len(losses) == 2 and losses[0] != losses[1] and all(0 < loss < 20 for loss in losses)
    assert {"val/accuracy", "test/accuracy"} <= rows[0].keys()
    assert ({"gamma/ief", "gamma_relative/ef"} <= rows[0].keys()) == (name == "ief")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(weights.numel() for key, weights in saved.items() if "net." in key) == 9_029


def test_the_two_stages_share_the_network_and_no_class():
    first, second = (read(path) for path in (FIRST, SECOND))
    nets = [stage["model"]["init_args"]["net"]["init_args"] for stage in (first, second)]
    assert all(nets[0][key] == nets[1][key] for key in ("name", "num_classes", "img_size", "model_kwargs"))
    data = [VisionDataModule(**stage["data"]["init_args"]) for stage in (first, second)]
    assert sorted(data[0].classes + data[1].classes) == [*range(10)]
    assert data[0].mean == data[1].mean and data[0].std == data[1].std
    with torch.device("meta"):
        full = timm_vit(**nets[0])
        adapted = timm_lora(**{**nets[1], "checkpoint_path": None, "pretrained": False})
    assert sum(p.numel() for p in full.parameters()) == 204_741
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 9_029


def test_hyper_parameters_of_the_second_stage():
    """Those of the recipe on CIFAR100, but the natural learning rate of iEF."""
    for file in ("adamw", "sgd", "ef"):
        mine, papers = (
            read(FOLDER / recipe / f"{file}.yaml")["model"]["init_args"]["optimizer"]
            for recipe in (SECOND.stem, RECIPE.stem)
        )
        assert mine == papers
    own = [read(path)["model"]["init_args"]["optimizer"] for path in (SECOND, SECOND.with_suffix("") / "ief.yaml")]
    assert own[0] == own[1]
    assert read(SECOND)["data"]["init_args"]["batch_size"] == 32
    epochs = read(SECOND)["trainer"]["max_epochs"]
    assert (
        read(SECOND.with_suffix("") / "ef.yaml")["model"]["init_args"]["lr_scheduler"]["init_args"]["total_iters"]
        == epochs
    )
    assert (
        read(FIRST)["model"]["init_args"]["lr_scheduler"]["init_args"]["T_max"] == read(FIRST)["trainer"]["max_epochs"]
    )
