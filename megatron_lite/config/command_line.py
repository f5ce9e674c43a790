"""A command line read into a dataclass of dataclasses, its mistakes said in sentences and all at once.

Every field is a flag, whatever dataclass it lies in; dashes and underscores are alike. `tyro` writes the --help, and is
imported for that alone: it takes longer to load than some tools take to work.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from megatron_lite import log
from megatron_lite.config.typed_values import nearest, takes_many, typed_words
from megatron_lite.errors import ConfigError

T = TypeVar("T")


class Repeated:
    """The annotation of a flag that may be given several times, with one value each: Repeated[tuple[str, ...]]."""

    def __class_getitem__(cls, kind: Any) -> Any:
        tyro = sys.modules.get("tyro")
        return Annotated[kind, cls] if tyro is None else tyro.conf.UseAppendAction[Annotated[kind, cls]]


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
    is_required: bool

    @property
    def takes_many(self) -> bool:
        return takes_many(self.expected)


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def _fields(kind: type) -> Mapping[str, _Field]:
    found: dict[str, _Field] = {}
    for field in dataclasses.fields(kind):
        hint = _hints(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _fields(hint)
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        repeated = Repeated in getattr(hint, "__metadata__", ())
        found[field.name] = _Field(typing.get_args(hint)[0] if repeated else hint, repeated, required)
    return found


def _named(item: Given, fields: Mapping[str, _Field]) -> tuple[str, Any]:
    """The field of a given flag and its value. Raises ConfigError for an unknown flag and a value of a wrong type."""
    name, value = item.name, True
    if name not in fields and name.removeprefix("no_") in fields:
        name, value = name.removeprefix("no_"), False
        if fields[name].expected is not bool:
            raise ConfigError(f"{item.flag} is not a known flag; {flag_name(name)} takes a value.")
    if name not in fields:
        hint = nearest(flag_name(item.name), map(flag_name, fields)) or "; --help lists all flags"
        raise ConfigError(f"{item.flag} is not a known flag{hint}.")
    field = fields[name]
    if len(item.values) > 1 or field.takes_many:
        for word in item.values:
            flag = f"-{word.partition('=')[0]}"
            if flag.startswith("--") and field_name(flag).removeprefix("no_") in fields:
                raise ConfigError(f"{item.flag} has {word} among its values; perhaps you meant {flag}.")
    if field.is_repeated:
        if len(item.values) != 1:
            raise ConfigError(
                f"{item.flag} takes one value, but {len(item.values)} were given; put it in quotes, or give "
                f"{item.flag} again for each."
            )
        return name, item.values
    words = typed_words(flag_name(name), item.values, field.expected)
    return name, value and words if field.expected is bool else words


def _filled(kind: type[T], values: Mapping[str, Any], default: T | None) -> T:
    """`kind` with these values, in whichever dataclass each belongs, and for the rest what `default` has."""
    own = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hint := _hints(kind)[field.name]):
            has_factory = field.default_factory is not dataclasses.MISSING
            before = field.default_factory() if default is None and has_factory else getattr(default, field.name, None)
            own[field.name] = _filled(hint, values, before)
        elif field.name in values:
            own[field.name] = values[field.name]
    return kind(**own) if default is None else dataclasses.replace(default, **own)


def read(
    kind: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None, shown: bool = True
) -> T:
    """The dataclass `kind` that a command line asks for; what it leaves out is as in `default`.

    Values may be spelled as in a YAML file (3e11 for a whole number); of a flag that is given twice, the later one
    holds. Raises ConfigError with every unknown flag, value of a wrong type and missing flag, or with what the
    `problems()` of `kind` says if it has any, and SystemExit 0 for --help, which is printed if `shown`.
    """
    stray, given = split(argv)
    if any(item.asks_for_help for item in given):
        _help(kind, prog, description, default, shown)
    fields = _fields(kind)
    problems = [f"{word} belongs to no flag; --help lists them." for word in stray]
    values: dict[str, Any] = {}
    for item in given:
        try:
            name, value = _named(item, fields)
        except ConfigError as error:
            problems += error.problems
        else:
            values[name] = values.get(name, ()) + value if fields[name].is_repeated else value
    if default is None:
        named = {item.name for item in given}
        problems += [
            f"{flag_name(name)} is needed; --help says what it is."
            for name, field in fields.items()
            if field.is_required and name not in named
        ]
    if problems:
        raise ConfigError(problems)
    options = _filled(kind, values, default)
    if problems := getattr(options, "problems", list)():
        raise ConfigError(problems)
    return options


def _help(kind: type, prog: str, description: str, default: Any, shown: bool) -> None:
    """Print what the flags are and end the process."""
    import tyro

    with log.reader_may_leave():
        tyro.cli(
            tyro.conf.OmitArgPrefixes[kind],
            args=["--help"],
            default=default,
            prog=prog,
            description=description,
            console_outputs=shown,
        )
    raise SystemExit(0)
