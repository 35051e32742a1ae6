"""The floors of the package: a file imports its own floor or a lower one, and the third-party packages of its floor."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import requires
from importlib.util import resolve_name
from pathlib import Path

import pytest

import lightning_ief

PACKAGE = "lightning_ief"
FLOORS = {
    "linalg": 0,
    "objectives": 1,
    "capture": 1,
    "curvature": 2,
    "distributed": 2,
    "directions": 2,
    "indicators": 2,
    "optim": 3,
    "training": 4,
    "attribution": 4,
    "module": 4,
    "callbacks": 4,
    "tasks": 5,
    "experiments": 5,
    "figures": 5,
    "__main__": 5,
}
TOP_FLOOR = max(FLOORS.values())
IMPORT_NAMES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # where the distribution is called something else


def declared_dependencies() -> set[str]:
    """Import names of what the package asks for, extras included."""
    distributions = {re.match(r"[\w.-]+", requirement).group() for requirement in requires("lightning-ief")}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in distributions}


def third_party(part: str) -> set[str]:
    """What a file or folder of the package may import from elsewhere."""
    if FLOORS[part] == TOP_FLOOR:
        return declared_dependencies()
    if FLOORS[part] == 4:
        return {"torch", "lightning", "torchmetrics", "rich"}
    return {"torch", "torchmetrics"} if part == "indicators" else {"torch"}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, inside functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(root: Path) -> list[str]:
    """Every import under root, the folder of the package, that its floor forbids."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        part = file.with_suffix("").parts[0]
        if part == "__init__":
            continue
        if part not in FLOORS:
            found.append(f"{file}: {part!r} has no floor")
            continue
        package = ".".join([PACKAGE, *file.parts[:-1]])
        for line, name in imports(path, package):
            top, _, rest = name.partition(".")
            if top == PACKAGE:
                # A name of the package itself comes from __init__.py, which imports everything but the top floor.
                floor = FLOORS.get(rest.partition(".")[0], TOP_FLOOR)
                if floor > FLOORS[part]:
                    found.append(f"{file}:{line}: floor {FLOORS[part]} imports {name} of floor {floor}")
            elif top not in sys.stdlib_module_names | third_party(part):
                found.append(f"{file}:{line}: {name} is not for floor {FLOORS[part]}")
    return found


def module_of(file: Path) -> str:
    """Dotted name of a file, given relative to the folder of the package."""
    parts = [PACKAGE, *file.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(root: Path) -> list[str]:
    """Modules under root, the folder of the package, that import one another in a circle; none if there is none."""
    files = {module_of(path.relative_to(root)): path for path in root.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = (name if name in files else name.rpartition(".")[0] for _, name in imports(path, package))
        graph[module] = {name for name in found if name in files and name != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def plant(root: Path, file: str, source: str) -> Path:
    """A package folder that holds this one file."""
    path = root / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    return root / PACKAGE


def test_imports_go_down():
    root = Path(lightning_ief.__file__).parent
    assert {path.relative_to(root).parts[0] for path in root.rglob("*.py")} > {"capture", "module.py"}  # not vacuous
    assert violations(root) == []


def test_no_modules_import_one_another_in_a_circle():
    assert circle(Path(lightning_ief.__file__).parent) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from lightning_ief.capture.recorder import Recorder", "from lightning_ief.capture.rules import rule"),
        ("from . import recorder", "def f():\n    from lightning_ief.capture import rules"),
        ("import lightning_ief.capture.recorder", "if TYPE_CHECKING:\n    from .rules import rule"),
    ],
)
def test_a_planted_circle_is_found(tmp_path, first, second):
    root = plant(tmp_path, "capture/rules.py", first)
    assert circle(root) == []
    (root / "capture/__init__.py").write_text("from lightning_ief.capture.rules import rule", encoding="utf-8")
    (root / "capture/recorder.py").write_text("import torch", encoding="utf-8")
    assert circle(root) == []
    (root / "capture/recorder.py").write_text(second, encoding="utf-8")
    assert {"lightning_ief.capture.rules", "lightning_ief.capture.recorder"} <= {*circle(root)}


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("linalg/gram.py", "import lightning_ief.capture", "floor 0 imports lightning_ief.capture of floor 1"),
        ("capture/rules.py", "from ..directions import ief", "floor 1 imports lightning_ief.directions.ief of floor 2"),
        ("capture/rules.py", "from lightning_ief import optim", "floor 1 imports lightning_ief.optim of floor 3"),
        ("directions/ief.py", "def f():\n    import lightning_ief.optim", "2: floor 2 imports lightning_ief.optim"),
        ("distributed.py", "from .module import Mixin", "floor 2 imports lightning_ief.module.Mixin of floor 4"),
        ("callbacks/timing.py", "from lightning_ief import IEF", "floor 4 imports lightning_ief.IEF of floor 5"),
        ("capture/deep/er.py", "from ...experiments import cli", "imports lightning_ief.experiments.cli of floor 5"),
        ("objectives.py", "import numpy as np", "numpy is not for floor 1"),
        ("optim/base.py", "from lightning import Trainer", "lightning.Trainer is not for floor 3"),
        ("directions/ief.py", "import torchmetrics", "torchmetrics is not for floor 2"),
        ("callbacks/timing.py", "import matplotlib.pyplot", "matplotlib.pyplot is not for floor 4"),
        ("experiments/figures/plot.py", "import seaborn", "seaborn is not for floor 5"),
        ("utils.py", "", "'utils' has no floor"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, source, message):
    (found,) = violations(plant(tmp_path, file, source))
    assert message in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from lightning_ief.experiments.cli import main"),
        ("linalg/solve.py", "from __future__ import annotations\nimport math, torch\nfrom .gram import gram"),
        ("capture/rules.py", "from torch.nn import functional\nfrom ..linalg import gram\nfrom . import recorder"),
        ("indicators/metrics.py", "import torchmetrics\nfrom lightning_ief import capture, directions, objectives"),
        ("module.py", "import lightning, rich\nfrom lightning_ief.optim import IEF"),
        ("tasks/digits.py", "from sklearn.datasets import load_digits\nfrom lightning_ief import IEF"),
    ],
)
def test_a_lawful_import_passes(tmp_path, file, source):
    assert violations(plant(tmp_path, file, source)) == []


def test_public_names():
    assert set(lightning_ief.__all__) - {"__version__"} == {
        "linearize",
        "gamma",
        "influence",
        "directions",
        "objectives",
        "EF",
        "IEF",
        "GaussNewton",
        "KFAC",
        "SampledFisher",
        "NaturalGradient",
        "NaturalGradientMixin",
        "GammaIndicators",
        "GradientStatistics",
        "StepTiming",
    }


@pytest.mark.parametrize("name", lightning_ief.__all__)
def test_public_names_are_documented(name):
    assert getattr(lightning_ief, name).__doc__
