"""A recipe: the stages a text goes through and their options, read from YAML."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_lite.config.sources import PlainLoader
from megatron_lite.config.typed_values import Mismatch, nearest, typed_value
from megatron_lite.data.refine.bounds import CodeQuality, Length
from megatron_lite.data.refine.clean import HtmlToText, MaskPersonal, RepairText, RepeatedLines, Urls, WhiteSpace
from megatron_lite.data.refine.decontaminate import Decontaminate
from megatron_lite.data.refine.exact import ExactDuplicates
from megatron_lite.data.refine.gopher import GopherQuality, GopherRepetition
from megatron_lite.data.refine.harmful import HarmfulClassifier, HarmfulWords
from megatron_lite.data.refine.language import Language
from megatron_lite.data.refine.near import NearDuplicates
from megatron_lite.data.refine.score import Score
from megatron_lite.data.refine.stage import Stage
from megatron_lite.data.refine.web_rules import C4Quality, FineWebQuality
from megatron_lite.errors import ConfigError

PRESET_FOLDER = Path(__file__).resolve().parents[3] / "examples" / "recipes"

STAGES: Mapping[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        HtmlToText,
        RepairText,
        WhiteSpace,
        Urls,
        RepeatedLines,
        MaskPersonal,
        Language,
        GopherQuality,
        GopherRepetition,
        C4Quality,
        FineWebQuality,
        CodeQuality,
        Length,
        HarmfulWords,
        HarmfulClassifier,
        Score,
        Decontaminate,
        ExactDuplicates,
        NearDuplicates,
    )
}


def presets() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def read_recipe(name: str, changes: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of a preset or of a YAML file, with changes such as "length.min_words=20".

    A stage that stands several times is named by its place too ("length.2.min_words=20", the second). Raises
    ConfigError with all that is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESET_FOLDER / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if path.parent == PRESET_FOLDER and not path.exists():
            known = ", ".join(presets())
            raise ConfigError(
                f"--recipe {name} is no preset{nearest(name, presets())}; there are {known}, or give a file.yaml."
            ) from None
        raise ConfigError(f"--recipe {name} cannot be read: {error}") from None
    return parse_recipe(text, str(name), changes)


def parse_recipe(text: str, source: str, changes: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of a YAML text; `source` names it in messages. Raises ConfigError with all that is wrong."""
    try:
        document = yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    listed = document.get("stages") if isinstance(document, dict) and set(document) == {"stages"} else None
    if not isinstance(listed, list):
        raise ConfigError(f"{source} must be a mapping with the one key stages, a list of stages in their order.")
    problems: list[str] = []
    named: list[tuple[str, dict[str, Any]]] = []
    for number, item in enumerate(listed, 1):
        pairs = [(item, {})] if isinstance(item, str) else list(item.items()) if isinstance(item, dict) else []
        stage, options = pairs[0] if len(pairs) == 1 else (None, None)
        if not isinstance(stage, str):
            problems.append(f"{source}: stage {number} must be a name, or a name with its options.")
        elif stage not in STAGES:
            problems.append(
                f"{source}: there is no stage {stage}{nearest(stage, STAGES)}; there are {', '.join(STAGES)}."
            )
        elif not isinstance(options or {}, dict):
            problems.append(f"{source}: {stage} must map options to values.")
        else:
            named.append((stage, dict(options or {})))
    problems += _change(named, changes)
    stages = [_stage(name, options, source, problems) for name, options in named]
    if problems:
        raise ConfigError(problems)
    return tuple(stages)


def _change(named: list[tuple[str, dict[str, Any]]], changes: Sequence[str]) -> list[str]:
    problems = []
    for change in changes:
        target, equals, value = change.partition("=")
        stage, *place, option = target.split(".") if "." in target else (target, "")
        chosen = [options for name, options in named if name == stage]
        if not equals or not option or len(place) > 1 or (place and not place[0].isdigit()):
            problems.append(f"--set {change} is not known; give STAGE.OPTION=VALUE, as in gopher_quality.min_words=30.")
        elif not chosen:
            there = dict.fromkeys(name for name, _ in named)
            problems.append(f"--set {change}: the recipe has no stage {stage}{nearest(stage, there)}.")
        elif len(chosen) > 1 and not place:
            problems.append(f"--set {change}: {stage} stands {len(chosen)} times; say which by {stage}.1.{option}.")
        elif place and not 1 <= int(place[0]) <= len(chosen):
            problems.append(f"--set {change}: {stage} stands {len(chosen)} times.")
        else:
            chosen[int(place[0]) - 1 if place else 0][option] = yaml.load(value, PlainLoader)
    return problems


def _stage(name: str, options: Mapping[str, Any], source: str, problems: list[str]) -> Stage | None:
    kind = STAGES[name]
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    wrong = len(problems)
    for option, value in options.items():
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            problems.append(f"{source}: {name} has no option {option}{nearest(option, known)}; {has}.")
            continue
        try:
            if typing.get_origin(hints[option]) is dict:
                if not isinstance(value, dict):
                    raise Mismatch("a mapping")
                values[option] = _natural(value)
            else:
                values[option] = typed_value(value, hints[option])
        except Mismatch as mismatch:
            problems.append(f"{source}: {name}.{option} is {value!r}, but should be {mismatch}.")
    if len(problems) > wrong:
        return None
    stage = kind(**values)
    problems += [f"{source}: {name}: {problem}" for problem in stage.problems()]
    return stage


def _natural(value: Any) -> Any:
    """Values whose types nobody states: what reads as a number is one."""
    if isinstance(value, dict):
        return {name: _natural(item) for name, item in value.items()}
    if isinstance(value, list):
        return list(map(_natural, value))
    for kind in (int, float):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def plain_recipe(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The stages with all their options, as JSON has them."""
    return [{stage.name: dataclasses.asdict(stage)} for stage in stages]
