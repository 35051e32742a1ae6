"""The benchmarks in small: everything runs, the tables come out, and a wrong update stops the command."""

import csv
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import __main__ as command
from benchmarks import contestants, forms, memory, report, timing, workloads
from benchmarks.check import TOLERANCE, WrongUpdateError, check
from lightning_ief import EF

CPU = torch.device("cpu")
CLAIMANTS = {"ief", "vmap", "opacus", "backpack"}
needs_peers = pytest.mark.skipif(not (find_spec("opacus") and find_spec("backpack")), reason="the extra bench")


@needs_peers
def test_smoke(tmp_path, capsys):
    command.main(["smoke", "--output", str(tmp_path)])
    folder = tmp_path / "benchmarks"
    rows = {row.contestant: row for row in report.read(folder / "smoke.csv")}
    assert [*rows] == [*contestants.CONTESTANTS]
    for name, row in rows.items():
        assert row.note == "" and row.rounds == 2 and row.machine.startswith("CPU ")
        assert 0 < row.ratio_low <= row.step_ratio <= row.ratio_high
        assert row.step_ms > 0 and row.update_ms > 0
        assert (row.error is not None) == (name in CLAIMANTS)
    assert all(rows[name].error <= TOLERANCE for name in CLAIMANTS)  # the check was made
    assert rows["sgd"].step_ratio == rows["sgd"].ratio_low == rows["sgd"].memory_ratio == 1
    assert rows["sgd"].memory_mib > 0.5 and rows["ief"].memory_mib > 0  # the gradient alone: 137,000 numbers
    assert rows["ief"].gflop > rows["sgd"].gflop > 0

    for axis, column in (("n", "samples"), ("p", "parameters")):
        grown = report.read(folder / f"growth-{axis}.csv")
        assert len(grown) == 6 and len({getattr(row, column) for row in grown}) == 2
        assert (folder / f"growth-{axis}.png").stat().st_size > 10_000
    text = (tmp_path / "benchmarks.md").read_text()
    for part in (
        "## Machine and versions",
        "torch 2",
        "opacus 1",
        "## smoke",
        "| vmap | **",
        "## Growth",
        "| ief | N |",
        "## Which form of a layer",
        "## The cost of γ",
        "## Overhead",
        "| quickstart's step through the Trainer | 6 | SGD |",
        "## Small networks: ours beside the dense way",
    ):
        assert part in text
    assert {row.form for row in report.read(folder / forms.FILE, forms.Measured)} == {"KEPT", "PAIRWISE", "COLUMNS"}
    assert (folder / "grid.png").stat().st_size > 10_000
    screen = capsys.readouterr().out
    assert "step / SGD" in screen and "backpack" in screen


def test_a_wrong_update_stops_the_command(monkeypatch, tmp_path):
    wrong = contestants.Contestant("wrong", contestants._ours(EF), claims_ief=True)
    monkeypatch.setitem(contestants.CONTESTANTS, "planted", wrong)
    monkeypatch.setattr(timing, "time_in_turn", lambda *_: pytest.fail("timed in spite of a wrong update"))
    args = ["run", "--workloads", "[smoke]", "--contestants", "[planted]", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"'planted' makes a wrong iEF update on smoke: relative error"):
        command.main(args)
    assert [*tmp_path.iterdir()] == []


def test_a_slightly_wrong_update_is_found(monkeypatch):
    def make(net, lr, damping):
        return contestants.Vmap(net, lr * (1 + 1e-7), damping)

    monkeypatch.setitem(
        contestants.CONTESTANTS, "planted", contestants.Contestant("", make, claims_ief=True, dense=True)
    )
    with pytest.raises(WrongUpdateError, match="'planted'.* 1.0e-07"):
        check(workloads.find("smoke"), ["planted"], CPU)


@needs_peers
@pytest.mark.parametrize("name", ["mlp-64", "vit-tiny-224", "t5-prompt", "t5-lora", "gpt2-lora"])
def test_updates_agree_on_each_kind(name):
    """Where a peer fails, it is for a known reason."""
    errors, failures = check(workloads.find(name), [*contestants.CONTESTANTS], CPU)
    expected = {"vit-tiny-224": {"backpack"}, "t5-prompt": {"opacus", "backpack"}}.get(name, set())
    assert failures.keys() == expected and errors.keys() == CLAIMANTS - expected
    assert all(note.startswith("fails: ") for note in failures.values())


def test_failing_and_oversized_peers_are_reported(monkeypatch, tmp_path):
    def fail(net, lr, damping):
        raise NotImplementedError("no such layer\nand a traceback")

    monkeypatch.setitem(
        contestants.CONTESTANTS, "planted", contestants.Contestant("", fail, claims_ief=True, dense=True)
    )
    monkeypatch.setattr(memory, "available", lambda device: 8 * workloads.find("smoke").full(CPU).parameters * 4)
    options = ["--memory", "false", "--rounds", "1", "--output", str(tmp_path)]
    command.main(["run", "--workloads", "[smoke]", "--contestants", "[planted, vmap]", *options])
    rows = {row.contestant: row for row in report.read(tmp_path / "benchmarks" / "smoke.csv")}
    assert rows["planted"].note == "fails: no such layer"
    assert rows["vmap"].note == "left out: N×P = 0.0 GB"
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| planted | fails: no such layer |" in text and "| sgd | **1.00** |" in text


def test_a_skipped_step_is_an_error():
    """It would be timed as a fast one."""
    instance = workloads.find("smoke").full(CPU)
    instance.batch.inputs[0][0] = float("nan")
    with pytest.raises(RuntimeWarning, match="kipped a"):
        timing.fit(contestants.find("ief").make(instance.net, 1.0, 1e-4), instance.batch, 2)


def test_slow_contestants_sit_out(monkeypatch):
    made = {"sgd": 1.0, "vmap": 6.0, "ief": 2.0}
    monkeypatch.setattr(timing, "_time", lambda workload, name, instance: {"step": made[name]})
    times, failures = timing.time_in_turn(workloads.find("smoke"), [*made], 5, None, lambda _: None)
    assert failures == {} and {name: len(rows) for name, rows in times.items()} == {"sgd": 5, "vmap": 3, "ief": 5}
    assert timing.ratios(times, "vmap") == [6.0] * 3


def test_rows_survive_their_file(tmp_path):
    row = report.Row("a", "title, with a comma", "sgd", 3, 10**8, error=1.5e-16, note="fails: x", rounds=2)
    path = report.write([row], tmp_path / "deep" / "a.csv")
    assert [asdict(found) for found in report.read(path)] == [asdict(row)]
    assert next(csv.reader(path.open()))[0] == "workload"


@pytest.mark.parametrize("option", ["--workloads", "--contestants"])
def test_unknown_names_list_the_known_ones(option):
    with pytest.raises(SystemExit, match="There is no .* 'nonsense'; there are: "):
        command.main(["run", option, "[nonsense]"])


def test_sizes():
    """Those that the targets speak of."""
    assert workloads.find("mlp-64").full(CPU).parameters == 10_510_346
    assert workloads.find("digits").full(CPU).parameters == 167_178
    for name, workload in workloads.GROWTH_P.items():
        widths = workload.title.removeprefix("MLP ").split(",")[0].split("-")
        w = int(widths[0])
        assert 2 * w**2 == pytest.approx(float(name.removeprefix("growth-p-")), rel=0.02)


def test_operations_that_are_counted():
    """In place, and attention on a CPU, which torch's own table lacks."""
    counter = timing._CountFlops().counter
    a, b, q = torch.ones(3, 4), torch.ones(4, 5), torch.ones(2, 1, 8, 4, requires_grad=True)
    with counter:
        torch.zeros(3, 5).addmm_(a, b)
        torch.zeros(2, 3, 5).baddbmm_(a.expand(2, 3, 4), b.expand(2, 4, 5))
    assert counter.get_total_flops() == 3 * 2 * 3 * 4 * 5
    with counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (2 * 8 * 8 * 4)  # 2 products forward, 5 backward
