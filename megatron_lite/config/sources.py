"""Where a configuration comes from besides the command line: YAML files and model presets.

A YAML file groups fields by the sections of `RunConfig`. Values are read by the type of their
field, so `lr: 1e-4` is a float and `skip_samples: [10:20]` a string, whatever YAML makes of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_lite.config.run import RunConfig
from megatron_lite.config.typed_values import Mismatch, nearest, typed_value
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
    return dump_sections(plain(config))


def dump_sections(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A part of what `plain` gives, as YAML."""
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: RunConfig) -> str:
    """SHA-256, in hex, of the configuration's canonical JSON (sorted keys, no white space)."""
    canonical = json.dumps(plain(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
