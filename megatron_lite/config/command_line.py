"""A command line read into a dataclass of dataclasses, its mistakes said in sentences and all at once.

Every field is a flag, whatever dataclass it lies in; dashes and underscores are alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro

from megatron_lite.config.sources import nearest, respell
from megatron_lite.errors import ConfigError

T = TypeVar("T")


def field_name(flag: str) -> str:
    """A flag's name with its dashes as underscores: --num-layers and --num_layers are num_layers."""
    return flag.removeprefix("--").replace("-", "_")


def flag_name(field: str) -> str:
    """The flag of a field: num_layers is --num-layers."""
    return f"--{field.replace('_', '-')}"


@dataclasses.dataclass(frozen=True)
class Given:
    """One flag of the command line with its values."""

    flag: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        return field_name(self.flag)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def words(self) -> list[str]:
        return [self.flag, *self.values]

    @property
    def asks_for_help(self) -> bool:
        return self.flag in ("-h", "--help")


def split(argv: Sequence[str]) -> tuple[list[str], list[Given]]:
    """argv as the words before the first flag (there should be none) and flags with their values."""
    stray: list[str] = []
    given: list[Given] = []
    for word in argv:
        if word.startswith("--") or word == "-h":
            flag, equals, value = word.partition("=")
            given.append(Given(flag, (value,) if equals else ()))
        elif given:
            given[-1] = dataclasses.replace(given[-1], values=(*given[-1].values, word))
        else:
            stray.append(word)
    return stray, given


@dataclasses.dataclass(frozen=True)
class _Field:
    """What the command line has to know of a field."""

    expected: Any
    is_repeated: bool
    """The flag may be given several times, with one value each."""
    is_required: bool


@functools.cache
def _fields(kind: type) -> Mapping[str, _Field]:
    found: dict[str, _Field] = {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _fields(hint)
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        repeated = tyro.conf.UseAppendAction in getattr(hint, "__metadata__", ())
        found[field.name] = _Field(typing.get_args(hint)[0] if repeated else hint, repeated, required)
    return found


def _words(item: Given, fields: Mapping[str, _Field]) -> list[str]:
    """One given flag as tyro reads it. Raises ConfigError for an unknown flag and a value of a wrong type."""
    if item.asks_for_help:
        return item.words
    name = item.name
    if name not in fields and name.removeprefix("no_") in fields:
        name = name.removeprefix("no_")
        if fields[name].expected is not bool:
            raise ConfigError(f"{item.flag} is not a known flag; {flag_name(name)} takes a value.")
    if name not in fields:
        hint = nearest(flag_name(item.name), map(flag_name, fields)) or "; --help lists all flags"
        raise ConfigError(f"{item.flag} is not a known flag{hint}.")
    field = fields[name]
    if field.is_repeated:
        if len(item.values) != 1:
            raise ConfigError(
                f"{item.flag} takes one value, but {len(item.values)} were given; put it in quotes, or give "
                f"{item.flag} again for each."
            )
        return [f"{item.flag}={item.values[0]}"]
    return [item.flag, *respell(flag_name(name), item.values, field.expected)]


def read(
    kind: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None, shown: bool = True
) -> T:
    """The dataclass `kind` that a command line asks for; what it leaves out is as in `default`.

    Values may be spelled as in a YAML file (3e11 for a whole number). Raises ConfigError with every unknown
    flag, value of a wrong type and missing flag, or with what the `problems()` of `kind` says if it has any, and
    SystemExit 0 for --help, which is printed if `shown`.
    """
    fields = _fields(kind)
    stray, given = split(argv)
    problems = [f"{word} belongs to no flag; --help lists them." for word in stray]
    words: list[str] = []
    for item in given:
        try:
            words += _words(item, fields)
        except ConfigError as error:
            problems += error.problems
    if default is None and not any(item.asks_for_help for item in given):
        named = {item.name for item in given}
        problems += [
            f"{flag_name(name)} is needed; --help says what it is."
            for name, field in fields.items()
            if field.is_required and name not in named
        ]
    if problems:
        raise ConfigError(problems)
    usage_error = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage_error):
            options = tyro.cli(
                tyro.conf.OmitArgPrefixes[kind],
                args=words,
                default=default,
                prog=prog,
                description=description,
                console_outputs=shown,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"The command line cannot be read:\n{usage_error.getvalue().rstrip()}") from None
    if problems := getattr(options, "problems", list)():
        raise ConfigError(problems)
    return options
