"""Flags made from the fields of dataclasses, and the commands' parsers.

`flag` makes a field; a class of such fields derives from `Part`, which checks their values; `add_flags` gives a parser
their flags. `detr_fast.config` has the settings themselves. Only the standard library is imported here, so that
``--help`` answers at once.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from detr_fast.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Flag:
    """What a field's flag looks like, and what its value must be.

    Attributes:
        help: for ``--help``.
        names: the option's names; empty: the field's. ``--no_…`` for a field that is True by default.
        choices, metavar: as argparse's.
        check: (condition, words for it), or None.
        idle: why the flag does nothing for a checkpoint that is only evaluated or predicted with; empty: it does.
        group: the heading in ``--help`` under which it stands; empty: that of its class.
        auto: for a field that is None by default, to be chosen for the machine (`--flag auto`): what the parser of
            flags has in its place, for code that reads the original's namespace; and what counts without a GPU.
        basic: ``--help`` shows it; the others stand under ``--help-all``.
    """

    help: str
    names: tuple[str, ...] = ()
    choices: Sequence | None = None
    metavar: str | None = None
    check: tuple[Callable[[Any], bool], str] | None = None
    idle: str = ""
    group: str = ""
    auto: int | None = None
    basic: bool = False


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field with a flag; see `Flag` for the options."""
    return dataclasses.field(default=default, metadata={"flag": Flag(help, **options)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the configuration. Construction checks every value.

    Attributes:
        heading: the group in ``--help`` under which its flags stand.
        describes_model: a finished model has these settings of its own.

    Raises:
        UsageError: a value of another type, or outside its range; the message names the flag.
    """

    heading: ClassVar[str] = ""
    describes_model: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, field.name, value)
            _check_value(field, value)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, except where there is none to speak of or the help names it itself."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS)
        silent = silent or "default" in action.help or action.help.startswith("no effect")
        return action.help if silent else f"{action.help} (default %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its page of flags and exit; a mistyped flag gets a suggestion."""

    def parse_known_args(self, args=None, namespace=None):
        # Before argparse, which complains of a required flag that is missing because it is mistyped.
        for argument in args or ():
            if argument == "--":
                break
            name = argument.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(f"there is no flag {name}{did_you_mean(name, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UsageError(f"{message} (see {self.prog} --help)")

    def format_help(self, every: bool = False) -> str:
        """The page of flags: where there are some under ``--help-all``, the basic ones alone, or `every` one."""
        if every or all(map(_is_basic, self._actions)):
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, is_flag in (("arguments", False), ("basic flags", True)):
            formatter.start_section(title)
            shown = [action for action in self._actions if bool(action.option_strings) == is_flag]
            formatter.add_arguments([action for action in shown if _is_basic(action)])
            formatter.end_section()
        return formatter.format_help()


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser._print_message(parser.format_help(every=True), sys.stdout)
        parser.exit()


def _is_basic(action: argparse.Action) -> bool:
    # Of a field's flag the field says it; what is added by hand is.
    return getattr(action, "is_basic", True)


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """ "; did you mean …?" with the names that begin like `given`, or else the most similar one; or nothing."""
    names = list(names)
    longer = [name for name in names if name.startswith(given)] if len(given.strip("-")) > 1 else []
    found = longer[:3] or difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def command_parser(
    command: str, description: str, *, help_all: bool = False, **options: Any
) -> argparse.ArgumentParser:
    """A parser for ``detr-fast <command>``; errors are one line.

    Args:
        help_all: ``--help`` shows the basic flags, ``--help-all`` every one.
        options: argparse's.
    """
    parser = Parser(
        prog=f"detr-fast {command}",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        **options,
    )
    if help_all:
        parser.add_argument("--help_all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="show all flags")
    return parser


def add_flags(
    parser: argparse.ArgumentParser,
    part: type[Part],
    *,
    only: Iterable[str] | None = None,
    without: Iterable[str] = (),
    inference: bool = False,
) -> None:
    """Adds the flags of a part of the configuration.

    Args:
        parser: gets them, in the groups that the fields name.
        part: the part.
        only, without: names of the settings to add, and to leave out. Default: all.
        inference: say of those that do nothing for a finished model that they do nothing.
    """
    groups = {group.title: group for group in parser._action_groups}
    for field in dataclasses.fields(part):
        settings = field.metadata.get("flag")
        if settings is None or field.name in without or (only is not None and field.name not in only):
            continue
        title = settings.group or part.heading
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        action = _add_flag(groups[title], field, inference and bool(settings.idle))
        action.is_basic = settings.basic and not (inference and part.describes_model)


def _add_flag(group, field: dataclasses.Field, is_idle: bool) -> Any:
    settings = field.metadata["flag"]
    text = settings.help.replace("{first}", field.name.removeprefix("second_"))
    options: dict[str, Any] = {"help": f"no effect: {settings.idle}" if is_idle else text, "default": field.default}
    kind = _type_of(field)
    if kind is bool:
        options["action"] = "store_false" if field.default else "store_true"
    else:
        options |= {"type": kind, "choices": settings.choices, "metavar": settings.metavar}
        if settings.auto is not None:
            options |= {"type": _number_or_auto, "default": settings.auto}
    return group.add_argument(*(settings.names or (f"--{field.name}",)), dest=field.name, **options)


def _number_or_auto(text: str) -> int | None:
    return None if text == "auto" else int(text)


def normalise_options(argv: Sequence[str]) -> list[str]:
    """Option names with ``_`` for ``-``: ``--batch-size=2`` and ``--batch_size=2`` are the same. Values stay."""
    return [_normalise(argument) for argument in argv]


def _normalise(argument: str) -> str:
    if not argument.startswith("--") or len(argument) == 2:
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def parse_with_given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parses `argv`, and tells which flags were really given (by the names of their settings)."""
    args = parser.parse_args(argv)
    # argparse leaves alone what a namespace already has: what still holds the mark was not given.
    mark = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), mark)))
    return args, {name for name, value in vars(given).items() if value is not mark}


def _type_of(field: dataclasses.Field) -> type:
    """str, int, float or bool: the type of a field's values other than None."""
    kind: Any = field.type
    if isinstance(kind, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    return kind


def _check_value(field: dataclasses.Field, value: Any) -> None:
    settings = field.metadata.get("flag")
    if settings is None or (value is None and field.default is None):
        return
    kind = _type_of(field)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"--{field.name} must be of type {kind.__name__}, got {value!r}")
    if settings.choices is not None and value not in settings.choices:
        choices = ", ".join(map(str, settings.choices))
        raise UsageError(f"--{field.name} is {value!r}; expected one of {choices}")
    if settings.check is not None:
        holds, expected = settings.check
        if not holds(value):
            raise UsageError(f"--{field.name} must be {expected}, got {value}")
