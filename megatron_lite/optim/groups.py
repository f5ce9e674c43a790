"""Parameter groups by name: each parameter in exactly one, an unused rule stops the run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import torch

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class GroupRule:
    """Which parameters, by serial name, share optimizer options. The first rule that matches counts."""

    name: str
    pattern: str
    weight_decay: float
    bits: int = 32
    """Of a number the optimizer keeps."""


def default_rules(config: OptimizerConfig) -> list[GroupRule]:
    """Norm weights and biases without weight decay, everything else with it.

    With adamw8bit the matrices of the layers keep 8-bit state. Embeddings and output head do not: most of their
    gradients are tiny beside a few rows', which 8 bits cannot tell from zero.
    """
    vectors = GroupRule("vectors", r"(norm\.weight|bias)$", weight_decay=0.0)
    matrices = GroupRule("matrices", r"\.weight$", weight_decay=config.weight_decay)
    if config.optimizer != "adamw8bit":
        return [vectors, matrices]
    embeddings = GroupRule("embeddings", r"^(embedding\.\w+|head)\.weight$", weight_decay=config.weight_decay)
    return [vectors, embeddings, dataclasses.replace(matrices, bits=8)]


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], rules: list[GroupRule], elsewhere: Iterable[str] = ()
) -> list[dict[str, object]]:
    """torch.optim parameter groups, one a rule that has parameters here, each with the keys "name" and "bits".

    Raises ConfigError for a parameter without a rule and for a rule without a parameter, neither here nor among
    those that are named `elsewhere`, on other pipeline stages.
    """
    members: dict[str, list[torch.nn.Parameter]] = {rule.name: [] for rule in rules}
    homeless = []
    for name, parameter in named_parameters:
        rule = _rule_of(name, rules)
        if rule is None:
            homeless.append(name)
        else:
            members[rule.name].append(parameter)
    problems = [f"no optimizer rule matches the parameter {name}" for name in homeless]
    used = {rule.name for rule in rules if members[rule.name]}
    used |= {rule.name for rule in (_rule_of(name, rules) for name in elsewhere) if rule is not None}
    problems += [
        f"the optimizer rule {rule.name!r} ({rule.pattern}) matches no parameter"
        for rule in rules
        if rule.name not in used
    ]
    if problems:
        raise ConfigError(problems)
    return [
        {"name": rule.name, "params": members[rule.name], "weight_decay": rule.weight_decay, "bits": rule.bits}
        for rule in rules
        if members[rule.name]
    ]


def _rule_of(name: str, rules: list[GroupRule]) -> GroupRule | None:
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)
