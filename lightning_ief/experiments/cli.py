"""The command `lightning-ief`: Lightning's command line, for recipes in YAML."""

import signal
import sys
import traceback
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile, is_zipfile

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_ief
from lightning_ief.experiments.comparison import compare
from lightning_ief.experiments.evaluation import EvaluatingTrainer
from lightning_ief.experiments.figures import draw_fields, draw_runs, write_report
from lightning_ief.experiments.parser import OWN_SUBCOMMANDS, SUBCOMMANDS, Parser, chain

__all__ = ["Command", "main"]

# What --ckpt_path takes besides paths; Lightning looks these up.
_KEYWORDS = ("best", "last", "hpc", "registry")

_PROGRAM = "lightning-ief"


class Command(LightningCLI):
    """LightningCLI with three additions.

    `test_after_fit` lets a recipe end with a test, all loggers of a run write to the same version directory, and a
    checkpoint that can't be read is refused before anything starts.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of the command or of a subcommand, with versions for the config.yaml that a run saves."""
        # Stands at the top of the config.yaml that a run saves.
        versions = [f"lightning_ief=={lightning_ief.__version__}", f"lightning=={L.__version__}"]
        return super().init_parser(dump_header=versions, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Names of subcommands; for each, the arguments of the Trainer's method that are not options."""
        return {**LightningCLI.subcommands(), "evaluate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command to the parser of a subcommand."""
        parser.add_argument(
            "--test_after_fit",
            type=bool | Literal["last"],
            default=False,
            help="Whether fit ends with a test: if true, of the best checkpoint where a ModelCheckpoint monitors a "
            "metric, else of the last weights; if 'last', of these in any case, which validation has not chosen.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and look at the checkpoints that are given."""
        super().parse_arguments(parser, args)
        if (name := self.config.subcommand) in OWN_SUBCOMMANDS:
            parser.error(f"{name} takes nothing before it: {_PROGRAM} {name} ...")
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
        asked = self.config.fit.test_after_fit
        if not asked:
            return
        callbacks = (c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
        best = next((callback.best_model_path for callback in callbacks), "")  # empty in a fast_dev_run
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=None if asked == "last" else best or None)


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
    name = str(given[0]) if isinstance(given, list) and given else ""
    with _plain_endings(name):
        if isinstance(given, list) and name in OWN_SUBCOMMANDS:
            {"compare": _compare, "figures": _figures, "report": _report}[name](given[1:])
        else:
            _run(args)


@contextmanager
def _plain_endings(name: str) -> Iterator[None]:
    """No traceback where a message says it all."""
    try:
        yield
    except KeyboardInterrupt as error:
        again = " The same command goes on where this one was." if name in ("compare", "evaluate") else ""
        print(f"{_PROGRAM}: interrupted.{again}", file=sys.stderr)
        raise SystemExit(128 + (error.args[0] if error.args else signal.SIGINT)) from None  # as shells have it
    except (MisconfigurationException, ValueError, FileNotFoundError) as error:
        # What a model or data raise when they are made comes within errors of jsonargparse, which print all options.
        said = next(filter(_is_deliberate, chain(error)), None)
        if said is None:
            raise
        raise SystemExit(f"{_PROGRAM}: error: {said}") from error


def _run(args: ArgsType) -> None:
    Command(
        save_config_kwargs={"overwrite": True},  # versions differ; who names one wants to write there
        seed_everything_default=0,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # optimizers are arguments of models, so that both stand in one place
        parser_class=Parser,
        trainer_class=EvaluatingTrainer,
        parser_kwargs=_parser_kwargs(),
        args=args,
    )


def _is_deliberate(error: BaseException) -> bool:
    """Whether the message is meant for users: that of a misconfiguration, and what this package itself raises."""
    if isinstance(error, MisconfigurationException):
        return True
    places = traceback.extract_tb(error.__traceback__)
    package = str(Path(lightning_ief.__file__).parent)
    return bool(places) and places[-1].filename.startswith(package) and (places[-1].line or "").startswith("raise ")


def _parser_kwargs() -> dict[str, Any]:
    return {
        "prog": _PROGRAM,
        "version": lightning_ief.__version__,
        "description": (
            "Train and evaluate with natural-gradient optimizers, from recipes in YAML. Each key of a recipe can be "
            f"set on the command line too. Start with: {_PROGRAM} fit --config recipes/quickstart.yaml"
        ),
        **{
            name: {
                "description": description,
                # Short, since it stands above every error: the options fill pages, which --help shows.
                "usage": f"{_PROGRAM} {name} --config RECIPE.yaml [--ckpt_path CHECKPOINT] [--KEY VALUE ...]",
            }
            for name, description in SUBCOMMANDS.items()
        },
    }


# --- subcommands that need neither model nor Trainer


def _compare(args: list[str]) -> None:
    parser = _parser(
        "compare", "--config RECIPE.yaml --optimizers '[NAME, ...]' [--KEY VALUE ...] [-- OPTIONS OF FIT]", compare
    )
    at = args.index("--") if "--" in args else len(args)
    given = parser.parse_args(args[:at]).as_dict()
    with _errors_of(parser):
        compare(**given, options=args[at + 1 :])


def _figures(args: list[str]) -> None:
    parser = _parser("figures", "[RUN ...] [--KEY VALUE ...]", draw_runs)
    parser.add_argument(
        "--fields", action="store_true", help="Also draw where each direction points, for models of two parameters."
    )
    options = parser.parse_args(args).as_dict()
    fields = options.pop("fields")
    _require_matplotlib()
    drawn = draw_fields(options["directory"]) if fields else []
    if not any(options[name] for name in ("runs", "evaluations", "projections", "comparison")):
        if not fields:
            parser.error("name runs, evaluations, projections, a comparison, or --fields.")
    else:
        with _errors_of(parser):
            drawn += draw_runs(**options)
    for path in drawn:
        print(path)


def _report(args: list[str]) -> None:
    parser = _parser("report", "[RUN ...] [--KEY VALUE ...]", write_report)
    options = parser.parse_args(args).as_dict()
    _require_matplotlib()
    if not any(options[name] for name in ("runs", "evaluations", "projections", "comparison")):
        parser.error("name runs, evaluations, projections or a comparison.")
    with _errors_of(parser):
        print(write_report(**options))


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise SystemExit(f"{_PROGRAM} draws with matplotlib: pip install 'lightning-ief[plots]'.")


def _parser(name: str, usage: str, function: Callable[..., Any]) -> Parser:
    """The parser of a function's arguments."""
    from jsonargparse import DefaultHelpFormatter

    class Plain(DefaultHelpFormatter):
        """Leaves out types and defaults that say nothing: the texts speak for themselves."""

        def _get_help_string(self, action: Action) -> str:
            said = "required" if action.required else f"default: {action.default}"
            plain = not action.required and action.default in (SUPPRESS, None, False, (), [])
            return f"{action.help}" if plain else f"{action.help} ({said})"

    parser = Parser(
        prog=f"{_PROGRAM} {name}",
        usage=f"{_PROGRAM} {name} {usage}",
        description=OWN_SUBCOMMANDS[name],
        formatter_class=Plain,
    )
    if name != "compare":
        parser.add_argument("runs", nargs="*", default=[], type=Path, help="Folders with a metrics.csv.")
    parser.add_function_arguments(function, as_group=False, skip={"runs", "options"})
    for action in parser._actions:
        if action.option_strings[1:] == [f"--{action.dest}+"]:  # a list: help shows one way to give it
            action.option_strings, action.metavar = action.option_strings[:1], "'[ITEM, ...]'"
    return parser


@contextmanager
def _errors_of(parser: Parser) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ModuleNotFoundError, ValueError, MisconfigurationException) as error:
        parser.error(str(error))
