"""Values out of YAML, JSON and the words of a command line, each as the type of its field."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_lite.errors import ConfigError


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; perhaps you meant X" for the most similar known word, or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; perhaps you meant {found[0]}" if found else ""


class Mismatch(Exception):
    """A value that its field's type does not admit; the text says what is expected."""


def typed_value(value: Any, expected: Any) -> Any:
    """`value`, of YAML or JSON, as the type `expected`. Raises Mismatch if it is not one."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else typed_value(value, inner)
    if origin is typing.Literal:
        if value not in arguments:
            raise Mismatch(f"one of {', '.join(map(str, arguments))}{nearest(str(value), arguments)}")
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else str(value).split() if value is not None else ()
        if arguments[-1] is Ellipsis:
            return tuple(typed_value(item, arguments[0]) for item in items)
        if len(items) != len(arguments):
            raise Mismatch(f"{len(arguments)} values, not {len(items)}")
        return tuple(map(typed_value, items, arguments))
    if expected is bool:
        if not isinstance(value, bool):
            raise Mismatch("true or false")
        return value
    if expected is str:
        if not isinstance(value, str):
            raise Mismatch("text; put it in quotes")
        if "\0" in value:
            raise Mismatch("text without a NUL character")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if expected is float:
            return number
        if isinstance(value, int) or re.fullmatch(r"[-+]?[0-9_]+", str(value)):
            return int(value)
        if math.isfinite(number) and number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise Mismatch("a number" if expected is float else "a whole number")


def takes_many(expected: Any) -> bool:
    """Whether a value of the type `expected` is a tuple, of several words on a command line."""
    return any(typing.get_origin(part) is tuple for part in (expected, *typing.get_args(expected)))


def typed_words(flag: str, words: Sequence[str], expected: Any) -> Any:
    """The words behind a flag as the type `expected`; None is spelled so, and 3e11 may be a whole number.

    Raises ConfigError for words of another type, and for more or fewer than the type admits.
    """
    is_tuple = takes_many(expected)
    text = " ".join(words)
    if expected is bool:
        if words:
            raise ConfigError(f"{flag} takes no value, but {text!r} was given; write {flag} or --no-{flag[2:]}.")
        return True
    if not is_tuple and len(words) != 1:
        raise ConfigError(f"{flag} takes one value, but {text!r} was given." if words else f"{flag} needs a value.")
    try:
        return typed_value(None if list(words) == ["None"] else words if is_tuple else words[0], expected)
    except Mismatch as mismatch:
        raise ConfigError(f"{flag} is {text!r}, but should be {mismatch}.") from None
