"""Where a configuration comes from besides the command line: YAML files and model presets.

A YAML file groups fields by the sections of `RunConfig`. Values are read by the type of their
field, so `lr: 1e-4` is a float and `skip_samples: [10:20]` a string, whatever YAML makes of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_lite.config.run import RunConfig
from megatron_lite.credentials import without_credentials
from megatron_lite.errors import ConfigError

PRESET_FOLDER = Path(__file__).resolve().parents[2] / "examples" / "models"

Overrides = dict[str, dict[str, Any]]
"""Section name to field name to typed value: a part of a RunConfig."""


@functools.cache
def field_types() -> Mapping[str, Mapping[str, Any]]:
    """Section name to field name to resolved type annotation."""
    sections = typing.get_type_hints(RunConfig)
    return types.MappingProxyType(
        {name: types.MappingProxyType(typing.get_type_hints(section)) for name, section in sections.items()}
    )


@functools.cache
def section_of() -> Mapping[str, str]:
    """Field name to the one section that has it."""
    owners: dict[str, str] = {}
    for section, fields in field_types().items():
        for name in fields:
            assert name not in owners, f"field {name} is in sections {owners[name]} and {section}"
            owners[name] = section
    return types.MappingProxyType(owners)


def values_of(config: RunConfig) -> dict[str, Any]:
    """Field name to value, over all sections."""
    return {name: getattr(getattr(config, section), name) for name, section in section_of().items()}


def override(config: RunConfig, overrides: Overrides) -> RunConfig:
    """`config` with some fields replaced."""
    sections = {
        section: dataclasses.replace(getattr(config, section), **fields) for section, fields in overrides.items()
    }
    return dataclasses.replace(config, **sections)


def nearest(word: str, known: typing.Iterable[str]) -> str:
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
    except (TypeError, ValueError):
        pass
    raise Mismatch("a number" if expected is float else "a whole number")


def respell(flag: str, words: typing.Sequence[str], expected: Any) -> list[str]:
    """The words of a flag's value as Python spells the type `expected`: 3e11 in digits where it is a whole number.

    Raises ConfigError for words of another type, and for more or fewer than the type admits.
    """
    is_tuple = any(typing.get_origin(part) is tuple for part in (expected, *typing.get_args(expected)))
    text = " ".join(words)
    if expected is bool:
        if words:
            raise ConfigError(f"{flag} takes no value, but {text!r} was given; write {flag} or --no-{flag[2:]}.")
        return []
    if not is_tuple and len(words) != 1:
        raise ConfigError(f"{flag} takes one value, but {text!r} was given." if words else f"{flag} needs a value.")
    try:
        value = typed_value(None if words and words[-1] == "None" else words if is_tuple else words[0], expected)
    except Mismatch as mismatch:
        raise ConfigError(f"{flag} is {text!r}, but should be {mismatch}.") from None
    return [str(item) for item in (value if isinstance(value, tuple) else [value])]


class PlainLoader(yaml.SafeLoader):
    """YAML whose plain scalars are null, true, false or text, and whose keys are unique."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                problem = "a key is one word, and no list, null, true or false"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


PlainLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF")
)


def parse(text: str, source: str) -> Overrides:
    """The fields that a YAML text gives; `source` names it in messages.

    Raises ConfigError with every unknown section, unknown key and value of a wrong type at once.
    """
    try:
        document = yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{source} must map sections ({', '.join(field_types())}) to fields.")
    return typed(document, source)


def typed(document: Mapping[str, Any], source: str) -> Overrides:
    """The fields of a mapping from sections to fields, each of its field's type.

    Raises ConfigError with every unknown section, unknown key and value of a wrong type at once.
    """
    overrides: Overrides = {}
    problems: list[str] = []
    for section, fields in document.items():
        if section not in field_types():
            if section in section_of():
                hint = f"; it is a field, to be indented under {section_of()[section]}:"
            else:
                hint = nearest(section, field_types()) or f"; the sections are {', '.join(field_types())}"
            problems.append(f"{source}: {section} is not a section{hint}.")
        elif not isinstance(fields, dict):
            if fields is not None:
                problems.append(f"{source}: the section {section} must map field names to values.")
        else:
            overrides[section] = {}
            for name, value in fields.items():
                expected = field_types()[section].get(name)
                if expected is None:
                    owner = section_of().get(name)
                    hint = f"; it belongs to the section {owner}" if owner else nearest(name, section_of())
                    problems.append(f"{source}: {section}.{name} is not a known field{hint}.")
                    continue
                try:
                    overrides[section][name] = typed_value(value, expected)
                except Mismatch as mismatch:
                    problems.append(f"{source}: {section}.{name} is {value!r}, but should be {mismatch}.")
    if problems:
        raise ConfigError(problems)
    return overrides


def read(path: str | Path) -> Overrides:
    """The fields that a YAML file gives. Raises ConfigError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from error
    return parse(text, str(path))


def presets() -> list[str]:
    """Names of the model presets, files of examples/models/."""
    return sorted(file.stem for file in PRESET_FOLDER.glob("*.yaml"))


def read_preset(name: str) -> Overrides:
    """The fields of a model preset, by name (gpt2-124m) or by path (my/model.yaml)."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return read(name)
    if name not in presets():
        hint = nearest(name, presets()) or f"; the presets are {', '.join(presets())}"
        raise ConfigError(f"There is no model preset {name} in {PRESET_FOLDER}{hint}, or give the path of a YAML file.")
    return read(PRESET_FOLDER / f"{name}.yaml")


def plain(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The configuration in the types of YAML and JSON, each number of its field's type, without credentials."""
    return {
        section: {
            name: _shown(value)
            for name, expected in fields.items()
            for value in [typed_value(getattr(getattr(config, section), name), expected)]
        }
        for section, fields in field_types().items()
    }


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_shown(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def from_plain(sections: Mapping[str, Mapping[str, Any]], source: str) -> RunConfig:
    """The configuration that `plain` gave; `source` names it in messages. Raises ConfigError.

    Fields this version has and `sections` has not keep their defaults, so that older ones can be read.
    """
    return override(RunConfig(), typed(sections, source))


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML, by section; `parse` of it gives every field back but for credentials."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: RunConfig) -> str:
    """SHA-256, in hex, of the configuration's canonical JSON (sorted keys, no white space)."""
    canonical = json.dumps(plain(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
