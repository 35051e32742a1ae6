"""The command `lightning-ief`: Lightning's command line, for recipes in YAML."""

import re
import signal
import sys
import traceback
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn
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

# Those that need neither model nor Trainer.
_OWN_SUBCOMMANDS = {
    "compare": "Train a recipe with several optimizers and seeds, and print the table.",
    "figures": "Draw figures of runs and evaluations.",
    "report": "Gather tables and figures in one web page.",
}

_PROGRAM = "lightning-ief"
_REFUSED = re.compile(r"Option '.+' is not accepted|unrecognized arguments: ")


class _Subcommands:
    """Adds subcommands described in our words (Lightning's are cut at the end of a line), and lists our own."""

    def __init__(self, subcommands: Any) -> None:
        self._subcommands = subcommands

    def add_subcommand(self, name: str, parser: LightningArgumentParser, **kwargs: Any) -> Any:
        added = self._subcommands.add_subcommand(name, parser, **{**kwargs, "help": _SUBCOMMANDS[name]})
        if name == [*_SUBCOMMANDS][-1]:
            for own, text in _OWN_SUBCOMMANDS.items():
                self._subcommands.add_subcommand(own, _Parser(), help=text)
        return added


class _Parser(LightningArgumentParser):
    """A parser whose errors are short, and suggest what may have been meant.

    Which option is wrong, and where, is read from the messages of jsonargparse (4.53): its errors are plain TypeError,
    KeyError and ArgumentError, whose other attributes are empty, and a user's class may raise the same types.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        return _Subcommands(super().add_subcommands(*args, **kwargs))

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().validate(*args, **kwargs)
        except KeyError as error:  # an option that there is not, here or in a class that a recipe names
            if found := re.search(r"option '([^']+)'", str(error), re.IGNORECASE):
                known = getattr(error, "subcommand_parser", self)._option_string_actions
                names = [option[2:] for option in known if option.startswith("--")]
                error.args = (f"{error}{_hint(found[1], [*names, 'init_args'])}",)
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            given = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            message += "".join(_hint(name, [*self._option_string_actions, "--init_args"]) for name in given)
        super().error(_readable(message, ex) if self.exit_on_error else message, ex)


def _readable(message: str, error: Exception | None) -> str:
    """What an error says, without what nobody asked for."""
    if found := re.match(r"argument subcommand: invalid choice: '([^']*)'", message):
        known = [*_SUBCOMMANDS, *_OWN_SUBCOMMANDS]
        return f"there is no subcommand '{found[1]}'{_hint(found[1], known) or f'; there are {known}.'}"
    causes = [*map(str, _chain(error))]
    if causes and _REFUSED.match(causes[-1]):
        # The option that is refused, and where it stands, from outside to inside.
        keys = [found[1] for cause in causes if (found := re.match(r'Parser key "([^"]+)"', cause))]
        place = ".".join(dict.fromkeys(keys))
        return f"{place}: {causes[-1]}" if place else causes[-1]
    # Classes and values that fill pages.
    noise = r" *(Subtypes: |Given value type|Given value: .{60}|- Expected a <class 'NoneType'>)"
    message = re.sub(r"\. Got value: Namespace\(.*", "", message)  # of everything around it
    return "\n".join(line for line in message.splitlines() if not re.match(noise, line))


def _hint(given: str, known: Iterable[str]) -> str:
    """What may have been meant: a name, or where it stands."""
    known = [name for name in known if not name.endswith(("+", ".help"))]
    where = given.partition(".")[0]
    close = (
        get_close_matches(given, known, 1, cutoff=0.8)
        or (get_close_matches(where, known, 1) if where not in known else [])
        or get_close_matches(given, known, 1)
        or [name for name in known if name.startswith(given)]
    )
    return f". Did you mean {close[0]}?" if close else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


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
        if (name := self.config.subcommand) in _OWN_SUBCOMMANDS:
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
        if isinstance(given, list) and name in _OWN_SUBCOMMANDS:
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
        said = next(filter(_is_deliberate, _chain(error)), None)
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
        parser_class=_Parser,
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
            for name, description in _SUBCOMMANDS.items()
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


def _parser(name: str, usage: str, function: Callable[..., Any]) -> _Parser:
    """The parser of a function's arguments."""
    from jsonargparse import DefaultHelpFormatter

    class Plain(DefaultHelpFormatter):
        """Leaves out types and defaults that say nothing: the texts speak for themselves."""

        def _get_help_string(self, action: Action) -> str:
            said = "required" if action.required else f"default: {action.default}"
            plain = not action.required and action.default in (SUPPRESS, None, False, (), [])
            return f"{action.help}" if plain else f"{action.help} ({said})"

    parser = _Parser(
        prog=f"{_PROGRAM} {name}",
        usage=f"{_PROGRAM} {name} {usage}",
        description=_OWN_SUBCOMMANDS[name],
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
def _errors_of(parser: _Parser) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ModuleNotFoundError, ValueError, MisconfigurationException) as error:
        parser.error(str(error))
