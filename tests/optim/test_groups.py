"""Parameter groups by rule."""

import pytest
import torch

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.errors import ConfigError
from megatron_lite.optim.groups import GroupRule, default_rules, parameter_groups

NAMES = ["embedding.word.weight", "layers.0.attention_norm.weight", "layers.0.mlp.up.weight", "layers.0.mlp.up.bias"]


def _parameters(names=NAMES):
    return [(name, torch.nn.Parameter(torch.zeros(2))) for name in names]


def test_norms_and_biases_do_not_decay():
    named = _parameters()
    vectors, matrices = parameter_groups(named, default_rules(OptimizerConfig(weight_decay=0.1)))
    assert vectors["weight_decay"] == 0.0 and matrices["weight_decay"] == 0.1
    assert [id(p) for p in vectors["params"]] == [id(named[1][1]), id(named[3][1])]
    assert [id(p) for p in matrices["params"]] == [id(named[0][1]), id(named[2][1])]


def test_every_parameter_has_one_group_and_every_rule_a_parameter():
    rules = [GroupRule("first", r"\.weight$", 0.0), GroupRule("never", r"up\.weight$", 0.1)]
    with pytest.raises(ConfigError) as caught:
        parameter_groups(_parameters(), rules)
    assert caught.value.problems == [
        "no optimizer rule matches the parameter layers.0.mlp.up.bias",
        r"the optimizer rule 'never' (up\.weight$) matches no parameter",
    ]


def test_8_bits_are_for_the_matrices_of_the_layers():
    names = [*NAMES, "embedding.position.weight", "layers.0.attention.query.weight", "head.weight", "final_norm.weight"]
    groups = parameter_groups(_parameters(names), default_rules(OptimizerConfig(optimizer="adamw8bit")))
    assert [(group["name"], group["bits"], len(group["params"])) for group in groups] == [
        ("vectors", 32, 3),
        ("embeddings", 32, 3),
        ("matrices", 8, 2),
    ]
