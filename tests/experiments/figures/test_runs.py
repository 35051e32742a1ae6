"""Figures of several runs: what was logged, with its spread; what was not is left out by name."""

import base64
import csv
import math
import warnings
from functools import partial
from pathlib import Path

import pytest
from matplotlib.image import imread

from lightning_ief.experiments.cli import main
from lightning_ief.experiments.comparison import Outcome
from lightning_ief.experiments.evaluation import Result, SampleProjection
from lightning_ief.experiments.figures import fields, write_report
from lightning_ief.experiments.figures import runs as module
from lightning_ief.experiments.figures.runs import draw_runs
from lightning_ief.experiments.tables import write_table


def write(folder: Path, offset: float = 0.0, gamma_too: bool = True, step_ms: float | None = None) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for step in (0, 10, 20):
        gamma = {
            "gamma_relative/ef": 2.0 + offset,
            "gamma_relative_std/ef": 0.5,
            "gamma_relative/ief": 0.5 + step / 100,
            "gamma/ef": 4.0,
            "gamma/ief": 0.5,
            "gamma/sampled_fisher": 1.0 + step / 10,
            "gradient_norm_imbalance": 10.0,
            "cosine/ef": 0.1,
            "cosine/ief": 0.7,
            "cosine/sgd": 1.0,
        }
        training = {"train/loss": 1.0 / (1 + step) + offset, "val/accuracy": step / 20 - offset}
        timing = {} if step_ms is None else {"timing/step_ms": step_ms}
        rows.append({"step": step, "epoch": step // 10, **(gamma if gamma_too else {}), **training, **timing})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def result(
    direction: str, damping: float, gamma: float, checkpoint: str = "runs/a/version_0/checkpoints/x.ckpt"
) -> Result:
    nan = float("nan")
    return Result(
        checkpoint, 1, 20, direction, damping, 2, 8, 0, 1, 0, 1.0, 0.1, gamma, 0.2, 0.5, 0.1, 0.3, 0.1, 5.0, nan
    )


def projection(direction: str, damping: float, gradient_norm: float, value: float) -> SampleProjection:
    checkpoint = "runs/a/version_0/checkpoints/x.ckpt"
    return SampleProjection(checkpoint, 20, direction, damping, 8, 0, 1, 0, 1.0, gradient_norm, value, 10.0)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by name."""
    found = {}
    for name in ("gamma", "cosine", "curves", "progress", "lr", "damping", "projections"):
        original = getattr(module, f"{name}_figure")

        def spy(*args, name=name, original=original):
            found[name] = original(*args)
            return found[name]

        monkeypatch.setattr(module, f"{name}_figure", spy)
    return found


def lines(axes) -> dict[str, list[list[float]]]:
    handles, labels = axes.get_legend_handles_labels()
    points = [h[0] if hasattr(h, "has_yerr") else h for h in handles]  # an error bar is a container
    return {label: line.get_xydata().tolist() for label, line in zip(labels, points, strict=True)}


def test_all_figures_show_what_was_logged(tmp_path, figures):
    folders = [
        write(tmp_path / "a/version_0"),
        write(tmp_path / "a/version_1", 0.1),
        write(tmp_path / "b/version_0", 0.3),
    ]
    evaluation = tmp_path / "evaluation.csv"
    other = "runs/b/version_0/checkpoints/y.ckpt"
    write_table(evaluation, [result("sgd", 0.0, 1.0), result("ief", 1.0, 0.8), result("ief", 0.1, 0.4),
                         result("ef", 0.1, 3.0, other)], Result)  # fmt: skip
    samples = tmp_path / "projections.csv"
    seen = [
        projection("ef", 0.1, 2.0, 1.0),
        projection("ef", 1.0, 2.0, 0.5),
        projection("sgd", 0.0, 4.0, -8.0),
        projection("ief", 0.1, 0.0, 0.0),
        projection("ief", 0.1, math.nan, math.nan),
    ]
    write_table(samples, seen, SampleProjection)
    with pytest.warns(UserWarning, match=r"(curves_over_time|metric_over_lr) was left out"):
        drawn = draw_runs(folders, tmp_path / "figures", [evaluation], [samples])
    names = {"gamma_over_training", "cosine_over_training", "curves", "gamma_against_damping", "projections"}
    assert {path.name for path in drawn} == {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}
    assert all(imread(path).std() > 0.01 for path in drawn if path.suffix == ".png")
    assert all(path.read_bytes().startswith(b"%PDF") for path in drawn if path.suffix == ".pdf")

    ef, ief, over_ef, over_ief, imbalance = figures["gamma"].axes
    assert lines(ef)["a/version_1"] == [[0.0, 2.1], [0.5, 2.1], [1.0, 2.1]]
    assert lines(ief)["b/version_0"] == [[0.0, 0.5], [0.5, 0.6], [1.0, 0.7]]
    assert set(lines(imbalance)) == {"a/version_0", "a/version_1", "b/version_0"}
    assert lines(over_ef)["a/version_1"] == [[0.0, 0.25], [0.5, 0.5], [1.0, 0.75]]
    assert lines(over_ief)["b/version_0"] == [[0.0, 2.0], [0.5, 4.0], [1.0, 6.0]]
    assert ef.containers[0].has_yerr and not ief.containers[0].has_yerr
    bars = ef.containers[0][2][0].get_segments()
    assert bars[0][:, 1].tolist() == [1.5, 2.5]

    loss, accuracy = figures["curves"].axes
    assert all(float(tick).is_integer() for axes in (loss, accuracy) for tick in axes.get_xticks())  # epochs
    assert lines(accuracy)["a (2 runs)"] == [
        [0, pytest.approx(-0.05)],
        [1, pytest.approx(0.45)],
        [2, pytest.approx(0.95)],
    ]
    assert lines(accuracy)["b"] == [[0, pytest.approx(-0.3)], [1, pytest.approx(0.2)], [2, pytest.approx(0.7)]]
    assert loss.get_yscale() == "log"

    first, second = figures["damping"].axes
    assert lines(first)["iEF"] == [[0.1, 0.4], [1.0, 0.8]]
    assert "a/version_0" in first.get_title() and "b/version_0" in second.get_title()
    assert lines(second)["EF"] == [[0.1, 3.0]]
    assert len(figures["cosine"].axes) == 2
    # cos(d, ∇l_n) with ‖d‖ = 10, at the smallest λ alone; a sample without gradient has no angle.
    (cosines,) = figures["projections"].axes
    assert lines(cosines) == {"EF": [[2.0, 0.05]], "SGD": [[4.0, -0.2]]}


@pytest.mark.usefixtures("unrendered")
def test_runs_of_a_comparison_are_repetitions_where_the_learning_rate_is_the_same(tmp_path, figures):
    offsets = {"ief/lr_1_seed_0": 0.0, "ief/lr_1_seed_1": 0.5, "ief/lr_10_seed_0": 8.0, "sgd/lr_1_seed_0": 4.0}
    folders = [write(tmp_path / name, offset, gamma_too=False) for name, offset in offsets.items()]
    draw_runs(folders, tmp_path / "figures", figures=["curves"])
    loss, _ = figures["curves"].axes
    first = {label: points[0][1] for label, points in lines(loss).items()}
    assert first == {"ief/lr_1 (2 runs)": 1.25, "ief/lr_10": 9.0, "sgd/lr_1": 5.0}


@pytest.mark.usefixtures("unrendered")
def test_curves_over_steps_and_over_their_time(tmp_path, figures):
    """At the validations after 1, 11 and 21 steps, with the mean training loss since the one before."""
    paces = {"ief/lr_1_seed_0": (0.0, 100.0), "ief/lr_1_seed_1": (0.5, 300.0), "sgd/lr_1_seed_0": (1.0, 10.0)}
    folders = [write(tmp_path / name, offset, False, step_ms) for name, (offset, step_ms) in paces.items()]
    with (folders[2] / "metrics.csv").open("a") as file:
        file.write("7,0,0.8,,\n")  # a loss between two validations
    draw_runs([*folders, write(tmp_path / "untimed", 0.0, False)], tmp_path / "figures", figures=["curves_over_time"])
    loss, loss_over_time, accuracy, over_time = figures["progress"].axes
    assert lines(accuracy)["ief/lr_1 (2 runs)"] == [[1, -0.25], [11, 0.25], [21, 0.75]]
    assert lines(over_time)["ief/lr_1 (2 runs)"] == [
        [pytest.approx(0.2 * n), y] for n, y in lines(accuracy)["ief/lr_1 (2 runs)"]
    ]
    assert [x for x, _ in lines(over_time)["sgd/lr_1"]] == pytest.approx([0.01, 0.11, 0.21])
    assert lines(loss)["sgd/lr_1"][1] == [11, pytest.approx((1 + 1 / 11 + 0.8) / 2)]
    assert {*lines(loss_over_time)} == {"ief/lr_1 (2 runs)", "sgd/lr_1"}  # those that were timed
    assert loss.get_yscale() == "log" == loss_over_time.get_yscale()


@pytest.mark.usefixtures("unrendered")
def test_the_metric_over_learning_rates_is_that_of_the_search(tmp_path, figures):
    def row(name, lr, seed, last, part, best=0.9):
        return Outcome(name, lr, seed, "val/accuracy", best, 0, 0.1, "", "", last=last, part=part)

    values = {0.03: (0.2,), 0.1: (0.5, 0.7), 0.3: (0.8, 0.8), 0.9: (math.nan, 0.1)}
    rows = [row("ief", lr, 100 + n, value, "search") for lr, both in values.items() for n, value in enumerate(both)]
    rows += [
        row("ief", 0.3, 0, 0.99, "result"),
        row("once", 1.0, 100, 0.6, "search"),
        row("untuned", 5, 0, 0.7, "result"),
    ]
    rows += [row("old", lr, seed, None, "", best=lr / 10 + seed) for lr in (1.0, 2.0) for seed in (0, 1)]
    comparison = tmp_path / "comparison.csv"
    write_table(comparison, rows, Outcome)
    main(["figures", "--comparison", str(comparison), "--figures", "[metric_over_lr]", "--directory", str(tmp_path)])
    (axes,) = figures["lr"].axes
    # Where a run diverged there is no mean; what has no search or one setting has no line.
    found = {label: [[pytest.approx(x), pytest.approx(y)] for x, y in points] for label, points in lines(axes).items()}
    assert found == {
        "ief, 0.3": [[0.1, 0.2], [1 / 3, 0.6], [1.0, 0.8]],
        "old, 2": [[0.5, 0.1], [1.0, 0.2]],
    }
    assert axes.get_xscale() == "log"


@pytest.mark.usefixtures("unrendered")
def test_runs_of_the_same_name_do_not_hide_one_another(tmp_path, figures, monkeypatch):
    folders = [write(tmp_path / f"{first}/x/a/version_0", offset) for first, offset in (("one", 0.0), ("two", 1.0))]
    monkeypatch.chdir(tmp_path)
    again = Path("one/x/a/version_0/metrics.csv")  # a run that is given twice is one
    draw_runs([*folders, again], tmp_path / "figures", figures=["gamma_over_training", "curves"])
    found = lines(figures["gamma"].axes[0])
    assert {name: points[0][1] for name, points in found.items()} == {
        "one/x/a/version_0": 2.0,
        "two/x/a/version_0": 3.0,
    }
    assert set(lines(figures["curves"].axes[0])) == {"one/x/a", "two/x/a"}
    main(["report", *map(str, folders), "--output", "report.html"])
    page = Path("report.html").read_text(encoding="utf-8")
    assert "lightning-ief: one/x/a, two/x/a" in page


@pytest.mark.usefixtures("unrendered")
def test_the_report_says_what_was_left_out_and_nothing_else(tmp_path, monkeypatch):
    def warned(*args):
        warnings.warn("of the figure's own", stacklevel=1)
        return original(*args)

    original = module.curves_figure
    monkeypatch.setattr(module, "curves_figure", warned)
    with pytest.warns(UserWarning, match="of the figure's own"):
        write_report([write(tmp_path / "a/version_0")], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<li>") == page.count("was left out") == 4 and "of the figure's own" not in page
    for title in ("γ over training: how far", "Cosine of each", "Loss and validation metric"):
        assert page.count(f"<h2>{title}") == 1


@pytest.mark.usefixtures("unrendered")
def test_what_was_not_logged_is_left_out_by_name(tmp_path):
    with pytest.warns(UserWarning, match="was left out") as caught:
        drawn = draw_runs([write(tmp_path / "a/version_0", gamma_too=False)], tmp_path / "figures")
    assert [path.name for path in drawn] == ["curves.png", "curves.pdf"]
    messages = " ".join(str(w.message) for w in caught)
    assert "gamma_over_training was left out: there are no values of gamma_relative/*" in messages
    assert "cosine_over_training" in messages and "gamma_against_damping" in messages


@pytest.mark.usefixtures("unrendered")
def test_figures_are_chosen_by_name(tmp_path):
    run = write(tmp_path / "a/version_0")
    assert {path.stem for path in draw_runs([run], tmp_path / "figures", figures=["curves"])} == {"curves"}
    with pytest.raises(ValueError, match=r"there is no \['curve'\]; there are .*'curves'"):
        draw_runs([run], tmp_path / "figures", figures=["curve"])


def test_the_report_holds_everything_in_one_file(tmp_path, capsys):
    run = write(tmp_path / "a/version_0")
    (run / "config.yaml").write_text("lr: <one>\n")
    evaluation, comparison = tmp_path / "evaluation.csv", tmp_path / "comparison.csv"
    write_table(evaluation, [result("ief", 0.1, 0.4321)], Result)
    write_table(comparison, [Outcome("ief", 0.5, 0, "val/accuracy", 0.8765, 1, 0.1, "r", "s")], Outcome)
    output = tmp_path / "out" / "report.html"
    main(["report", str(run), "--output", str(output), "--evaluations", f"[{evaluation}]",
          "--comparison", str(comparison)])  # fmt: skip
    assert str(output) in capsys.readouterr().out
    page = output.read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 4
    assert "http" not in page and 'src="/' not in page  # nothing is fetched
    for text in ("0.8765", "0.432", "lr: &lt;one&gt;", "a/version_0", "projections was left out"):
        assert text in page, text
    for path in page.split("base64,")[1:]:
        assert base64.b64decode(path.partition('"')[0]).startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["report"])
    with pytest.raises(SystemExit):
        main(["report", "--comparison", str(tmp_path / "nowhere.csv")])
    assert "nowhere.csv" in capsys.readouterr().err


@pytest.mark.usefixtures("unrendered")
def test_the_command(tmp_path, capsys, monkeypatch):
    for name in ("least_squares_figure", "logistic_figure"):
        monkeypatch.setattr(fields, name, partial(getattr(fields, name), grid=6))
    run = write(tmp_path / "a/version_0")
    with pytest.warns(UserWarning, match="gamma_against_damping"):
        main(["figures", str(run), "--directory", str(tmp_path / "out")])
    assert (tmp_path / "out/curves.png").is_file() and "curves.pdf" in capsys.readouterr().out
    main(["figures", "--fields", "--directory", str(tmp_path / "fields")])
    assert len(list((tmp_path / "fields").iterdir())) == 4
    with pytest.raises(SystemExit):
        main(["figures"])
    assert "name runs, evaluations, projections, a comparison, or --fields" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["figures", str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    assert "nowhere" in capsys.readouterr().err
