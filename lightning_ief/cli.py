"""The command `lightning-ief`: Lightning's command line, for recipes in YAML."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_ief
from lightning_ief.comparison import compare
from lightning_ief.evaluation import EvaluatingTrainer
from lightning_ief.figures import draw_fields, draw_runs, write_report

if TYPE_CHECKING:  # an extra
    from jsonargparse import ArgumentParser

__all__ = ["Command", "main"]

# What --ckpt_path takes besides paths; Lightning looks these up.
_KEYWORDS = ("best", "last", "hpc", "registry")

_SUBCOMMANDS = {
    "fit": "Train; with test_after_fit, end with a test.",
    "validate": "Evaluate on the validation set.",
    "test": "Evaluate on the test set.",
    "predict": "Compute predictions, for models and data that define them.",
    "evaluate": "Evaluate γ of directions at checkpoints, at several dampings.",
}


_DESCRIPTIONS = {
    "figures": "Draw figures of runs and evaluations.",
    "report": "Gather tables and figures in one web page.",
    "compare": "Train one recipe with several optimizers and seeds, and print the table. Options of fit follow "
    "after --, for all runs alike.",
}


class _Subcommands:
    """Adds subcommands described in our words; Lightning's descriptions are cut at the end of a line."""

    def __init__(self, subcommands: Any) -> None:
        self._subcommands = subcommands

    def add_subcommand(self, name: str, parser: LightningArgumentParser, **kwargs: Any) -> Any:
        return self._subcommands.add_subcommand(name, parser, **{**kwargs, "help": _SUBCOMMANDS[name]})


class _Parser(LightningArgumentParser):
    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        return _Subcommands(super().add_subcommands(*args, **kwargs))


class Command(LightningCLI):
    """LightningCLI with three additions.

    `test_after_fit` lets a recipe end with a test, all loggers of a run write to the same version directory, and a
    checkpoint that can't be read is refused before anything starts.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of the command or of a subcommand.

        Args:
            **kwargs: For the parser.

        Returns:
            The parser.

        """
        # Stands at the top of the config.yaml that a run saves.
        versions = [f"lightning_ief=={lightning_ief.__version__}", f"lightning=={L.__version__}"]
        return super().init_parser(dump_header=versions, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands.

        Returns:
            For each, the arguments of the Trainer's method that are not options.

        """
        return {**LightningCLI.subcommands(), "evaluate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command.

        Args:
            parser: The parser of a subcommand.

        """
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether fit ends with a test: of the best checkpoint if a ModelCheckpoint monitors a metric, else of "
            "the last weights.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and look at the checkpoint, if one is given.

        Args:
            parser: The parser.
            args: The arguments.

        """
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        given = {"ckpt_path": [config.ckpt_path], "checkpoints": config.get("checkpoints") or []}
        for option, paths in given.items():
            for path in paths:
                if path is not None and (problem := _checkpoint_problem(str(path))):
                    self._parser(self.config.subcommand).error(f"--{option}={path}: {problem}")

    def after_instantiate_classes(self) -> None:
        """Let all loggers choose their version now, while none has made its directory: so they choose the same."""
        for logger in self.trainer.loggers:
            _ = logger.version

    def after_fit(self) -> None:
        """Run the test, if asked for."""
        if not self.config.fit.test_after_fit:
            return
        callbacks = (c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
        best = next((callback.best_model_path for callback in callbacks), "")  # empty in a fast_dev_run
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None)


def _checkpoint_problem(path: str) -> str | None:
    """Say why a checkpoint can't be loaded, if so."""
    if path.split(":")[0] in _KEYWORDS or "://" in path or Path(path).is_dir():
        return None  # Lightning finds or fetches these
    if not Path(path).is_file():
        return "there is no such file."
    try:
        if is_zipfile(path) and (entry := ZipFile(path).testzip()):  # torch.load does not look at checksums
            return f"this file is damaged: the checksum of its entry {entry} is wrong."
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # depending on where a file is damaged, torch.load raises nearly anything
        return (
            "this file is damaged, is no checkpoint, or holds objects other than tensors and plain values "
            f"({type(error).__name__})."
        )
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        return "this file is no checkpoint of Lightning: it holds no state_dict."
    return None


def main(args: ArgsType = None) -> None:
    """Run the command.

    Args:
        args: Arguments, such as ["fit", "--config", "recipes/quickstart.yaml"]; those of the command line if None.

    Raises:
        SystemExit: With a message, if an argument, a recipe or a checkpoint is wrong.

    """
    if find_spec("jsonargparse") is None:
        raise SystemExit("lightning-ief needs jsonargparse to read recipes: pip install 'lightning-ief[cli]'.")
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given and (run := _OWN_SUBCOMMANDS.get(given[0])):
        run(given[1:])
        return
    try:
        Command(
            save_config_kwargs={"overwrite": True},  # versions differ; who names one wants to write there
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # optimizers are arguments of models, so that both stand in one place
            parser_class=_Parser,
            trainer_class=EvaluatingTrainer,
            parser_kwargs=_parser_kwargs(),
            args=args,
        )
    except MisconfigurationException as error:
        raise SystemExit(f"lightning-ief: error: {error}") from error


# --- subcommands that need neither model nor Trainer


def _figures(args: list[str]) -> None:
    parser = _parser("figures")
    parser.add_argument("runs", nargs="*", type=Path, help="Folders with a metrics.csv.")
    parser.add_argument(
        "--fields", action="store_true", help="Also draw where each direction points, for models of two parameters."
    )
    parser.add_function_arguments(draw_runs, skip={"runs"})
    options = parser.parse_args(args).as_dict()
    fields = options.pop("fields")
    _require_matplotlib()
    drawn = draw_fields(options["directory"]) if fields else []
    if not any(options[name] for name in ("runs", "evaluations", "projections")):
        if not fields:
            parser.error("name runs, evaluations, projections, or --fields.")
    else:
        with _errors_of(parser):
            drawn += draw_runs(**options)
    for path in drawn:
        print(path)


def _compare(args: list[str]) -> None:
    parser = _parser("compare")
    parser.add_function_arguments(compare, skip={"options"})
    at = args.index("--") if "--" in args else len(args)
    given = parser.parse_args(args[:at]).as_dict()
    with _errors_of(parser):
        compare(**given, options=args[at + 1 :])


def _report(args: list[str]) -> None:
    parser = _parser("report")
    parser.add_argument("runs", nargs="*", type=Path, help="Folders with a metrics.csv.")
    parser.add_function_arguments(write_report, skip={"runs"})
    options = parser.parse_args(args).as_dict()
    _require_matplotlib()
    if not any(options[name] for name in ("runs", "evaluations", "projections", "comparison")):
        parser.error("name runs, evaluations, projections or a comparison.")
    with _errors_of(parser):
        print(write_report(**options))


_OWN_SUBCOMMANDS = {"figures": _figures, "report": _report, "compare": _compare}


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise SystemExit("lightning-ief draws with matplotlib: pip install 'lightning-ief[plots]'.")


def _parser(name: str) -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"lightning-ief {name}", description=_DESCRIPTIONS[name])


@contextmanager
def _errors_of(parser: "ArgumentParser") -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError, MisconfigurationException) as error:
        parser.error(str(error))


def _parser_kwargs() -> dict[str, Any]:
    program = "lightning-ief"
    others = ", ".join(f"{name} ({text.partition('.')[0].lower()})" for name, text in _DESCRIPTIONS.items())
    return {
        "prog": program,
        "version": lightning_ief.__version__,
        "description": (
            "Train and evaluate with natural-gradient optimizers, from recipes in YAML. Each key of a recipe can be "
            f"set on the command line too. Start with: {program} fit --config recipes/quickstart.yaml . "
            f"Further subcommands, each with --help: {others}."
        ),
        **{
            name: {
                "description": description,
                # Short, since it stands above every error: the options fill pages, which --help shows.
                "usage": f"{program} {name} --config RECIPE.yaml [--ckpt_path CHECKPOINT] [--KEY VALUE ...]",
            }
            for name, description in _SUBCOMMANDS.items()
        },
    }
