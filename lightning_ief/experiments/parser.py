"""The parser of the command: errors that say what was meant, and help that fits a screen."""

import re
import shutil
import sys
from argparse import SUPPRESS, Action, _HelpAction
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from io import StringIO
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

__all__ = ["OWN_SUBCOMMANDS", "SUBCOMMANDS", "Parser", "chain"]

SUBCOMMANDS = {
    "fit": "Train; with test_after_fit, end with a test.",
    "validate": "Evaluate on the validation set.",
    "test": "Evaluate on the test set.",
    "predict": "Compute predictions, for models and data that define them.",
    "evaluate": "Evaluate γ of directions at checkpoints, at several dampings.",
}

# Those that need neither model nor Trainer.
OWN_SUBCOMMANDS = {
    "compare": "Train a recipe with several optimizers and seeds, and print the table.",
    "figures": "Draw figures of runs and evaluations.",
    "report": "Gather tables and figures in one web page.",
}

_REFUSED = re.compile(r"Option '.+' is not accepted|unrecognized arguments: ")


class _Subcommands:
    """Adds subcommands described in our words (Lightning's are cut at the end of a line), and lists our own."""

    def __init__(self, subcommands: Any) -> None:
        self._subcommands = subcommands

    def add_subcommand(self, name: str, parser: LightningArgumentParser, **kwargs: Any) -> Any:
        added = self._subcommands.add_subcommand(name, parser, **{**kwargs, "help": SUBCOMMANDS[name]})
        if name == [*SUBCOMMANDS][-1]:
            for own, text in OWN_SUBCOMMANDS.items():
                self._subcommands.add_subcommand(own, Parser(), help=text)
        return added


class Parser(LightningArgumentParser):
    """A parser whose errors are short, and suggest what may have been meant.

    Which option is wrong, and where, is read from the messages of jsonargparse (4.53): its errors are plain TypeError,
    KeyError and ArgumentError, whose other attributes are empty, and a user's class may raise the same types.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "add_help": False, **kwargs})
        self.add_argument("-h", "--help", action=_Help, help="Show this help and exit; with --help=all, all options.")

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add those of Lightning, and our own beside them."""
        return _Subcommands(super().add_subcommands(*args, **kwargs))

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """Validate, and suggest an option in place of one that there is not."""
        try:
            return super().validate(*args, **kwargs)
        except KeyError as error:  # an option that there is not, here or in a class that a recipe names
            if found := re.search(r"option '([^']+)'", str(error), re.IGNORECASE):
                known = getattr(error, "subcommand_parser", self)._option_string_actions
                names = [option[2:] for option in known if option.startswith("--")]
                error.args = (f"{error}{_hint(found[1], [*names, 'init_args'])}",)
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, shorter than jsonargparse does, and end."""
        if message.startswith("unrecognized arguments: "):
            given = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            message += "".join(_hint(name, [*self._option_string_actions, "--init_args"]) for name in given)
        if self.exit_on_error and (misspelt := _misspelt_class(message, ex)):
            self.exit(2, f"error: {misspelt}\n")
        super().error(_readable(message, ex) if self.exit_on_error else message, ex)

    def format_summary(self) -> str:
        """Help within a screen: the command's own options, each with the first sentence of its text.

        Returns:
            The text.

        """
        own = [action for action in self._actions if action.help not in (SUPPRESS, None) and _is_own(action)]
        if not self.prog.endswith(" fit"):  # the others take it, since a recipe holds it
            own = [action for action in own if action.dest != "test_after_fit"]
        options = Table.grid(padding=(0, 2))
        options.add_column(no_wrap=True)
        options.add_column()
        for action in own:
            options.add_row(f"  {_invocation(action)}", _first_sentence(action))
        rest = [action.dest for action in self._actions if action not in own]
        if any(dest.startswith("trainer.") for dest in rest):
            options.add_row("  --model.KEY VALUE", "A key of the recipe; --model.help=CLASS lists those of a class.")
            options.add_row("  --data.KEY VALUE", "The same of the data.")
            options.add_row("  --trainer.KEY VALUE", "The same of Lightning's Trainer, as --trainer.max_epochs 3.")
        width = min(120, shutil.get_terminal_size().columns)
        console = Console(file=StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
        with console.capture() as text:
            console.print(options)
        lines = "\n".join(line.rstrip() for line in text.get().splitlines())
        more = f"All options, in full: {self.prog.replace(' [options]', '')} --help=all"
        return f"{self.format_usage()}\n{self.description}\n\noptions:\n{lines}\n\n{more}\n"


class _Help(_HelpAction):
    """`--help` within a screen, where options are many; `--help=all` for the rest."""

    def __init__(self, option_strings: Sequence[str], dest: str = SUPPRESS, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, help=kwargs.get("help"))
        self.nargs, self.choices = "?", ["all"]

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        within_a_screen = values != "all" and parser._subcommands_action is None
        print(parser.format_summary() if within_a_screen else parser.format_help(), end="")
        parser.exit()


# Of Lightning's: those that a recipe holds, or nobody asks for.
_BEHIND = ("model", "data", "trainer", "seed_everything", "weights_only", "print_config")


def _is_own(action: Action) -> bool:
    """Whether an option is of the command itself, and no key of a recipe."""
    names = [option.lstrip("-") for option in action.option_strings] or [action.dest]
    return not any(name.partition(".")[0] in _BEHIND or name.endswith(".help") for name in names)


def _invocation(action: Action) -> str:
    """How an option is given: a list in one way."""
    if not action.option_strings:
        return f"{action.dest} ..."
    if isinstance(action, _HelpAction) or action.nargs == 0:
        return ", ".join(action.option_strings)
    name = max(action.option_strings[:2], key=lambda option: (not option.endswith("+"), len(option)))
    if any(option.endswith("+") for option in action.option_strings) or str(action.metavar or "").startswith("'["):
        return f"{name} '[...]'"
    return f"{name} {action.metavar or (action.dest.upper() if len(action.dest) < 12 else 'VALUE')}"


def _first_sentence(action: Action) -> str:
    """The text of an option up to its first full stop, or the colon of a long sentence; with its default."""
    whole = " ".join(str(action.help).split()).replace("``", "")
    text = re.split(r"\. |; |(?<=.{24}): ", whole)[0].rstrip(".;")
    plain = action.default in (SUPPRESS, None, False, (), []) or isinstance(action, _HelpAction)
    default = list(action.default) if isinstance(action.default, tuple) else action.default
    return f"{text}." if plain else f"{text} (default: {default})."


def _misspelt_class(message: str, error: Exception | None) -> str | None:
    """Say what may have been meant by a class path that leads nowhere; None if it is something else."""
    # Where a class is one of several types that an option takes, jsonargparse explains them all.
    found = re.search(r"module '([\w.]+)' has no attribute '(\w+)'|No module named '([\w.]+)'", message)
    if found is None:
        return None
    path = found[3] or f"{found[1]}.{found[2]}"
    everything = "\n".join([message, *map(str, chain(error))])
    if not re.search(rf"class_path\W+{re.escape(path)}\b|expects a .*{re.escape(found[0])}", everything):
        return None  # of a module that a user's class imports, say
    place = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message[: found.start()])))
    outer, _, name = path.rpartition(".")
    try:
        close = _closest(name, _names_in(import_module(outer)) if outer else {*_roots()})
    except ImportError:
        close = None
    meant = f" Did you mean {'.'.join(filter(None, [outer, close]))}?" if close else ""
    return f"{place}: there is no {path}.{meant}"


def _names_in(module: ModuleType) -> set[str]:
    """What a module offers, with the modules in it."""
    return {*dir(module), *(info.name for info in iter_modules(getattr(module, "__path__", [])))}


def _roots() -> set[str]:
    """The packages that are imported."""
    return {name for name in sys.modules if "." not in name}


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The public name that is most like a given one, if need be in upper or lower case."""
    public = sorted(each for each in known if not each.startswith("_"))
    lower = {each.lower(): each for each in public}
    close = get_close_matches(name, public, 1) or [lower[each] for each in get_close_matches(name.lower(), lower, 1)]
    return close[0] if close else None


def _readable(message: str, error: Exception | None) -> str:
    """What an error says, without what nobody asked for."""
    if found := re.match(r"argument subcommand: invalid choice: '([^']*)'", message):
        known = [*SUBCOMMANDS, *OWN_SUBCOMMANDS]
        return f"there is no subcommand '{found[1]}'{_hint(found[1], known) or f'; there are {known}.'}"
    causes = [*map(str, chain(error))]
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


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, from outside to inside."""
    while error is not None:
        yield error
        error = error.__cause__
