"""YAML files, presets and hashes of configurations."""

import dataclasses
import types
import typing

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.config import cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def values_of_type(expected: object) -> st.SearchStrategy:
    """Any value that the annotation of a field admits."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of_type(argument) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_of_type(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of_type, arguments))
    scalars = {
        int: st.integers(-(2**62), 2**62),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)
        | st.sampled_from(["null", "true", "1e-4", "10:20", "969,30,1", "~", "", "- a", "a: b", "0x10", "2001-01-01"]),
        type(None): st.none(),
    }
    return scalars[expected]


configs = st.builds(
    RunConfig,
    **{
        section: st.builds(kind, **{name: values_of_type(t) for name, t in sources.field_types()[section].items()})
        for section, kind in typing.get_type_hints(RunConfig).items()
    },
)


def test_a_number_beyond_all_bounds_is_refused():
    for section, name in (("optimizer", "lr"), ("model", "num_layers")):
        with pytest.raises(ConfigError, match="number"):
            sources.typed({section: {name: 10**400}}, "manifest.json")


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(configs)
def test_a_dump_gives_every_field_back(config):
    assert sources.override(RunConfig(), sources.parse(sources.dump(config), "dump")) == config


def test_a_run_starts_from_its_dump_alone(tmp_path):
    config, _ = cli.load(
        [
            "--model",
            "llama-1b",
            "--lr",
            "1e-5",
            "--data-path",
            "0.5",
            "a",
            "0.5",
            "b",
            "--skip-samples",
            "10:20",
            "--bf16",
        ]
    )
    file = tmp_path / "config.yaml"
    file.write_text(sources.dump(config))
    assert cli.load(["--config", str(file)])[0] == config
    assert list(yaml.safe_load(file.read_text())) == [field.name for field in dataclasses.fields(RunConfig)]


def test_values_are_read_by_the_type_of_their_field():
    overrides = sources.parse(
        "optimizer: {lr: 1e-4, lr_decay_iters: 1e3, clip_grad: 1}\n"
        "data: {split: 100}\n"
        "training: {skip_samples: [10:20, 30:40], rampup_batch_size: 16 16 300, train_iters: 1_000, global_batch_size: "
        "~}\n",
        "text",
    )
    assert overrides["optimizer"] == {"lr": 1e-4, "lr_decay_iters": 1000, "clip_grad": 1.0}
    assert isinstance(overrides["optimizer"]["lr_decay_iters"], int)
    assert overrides["data"] == {"split": "100"}
    assert overrides["training"] == {
        "skip_samples": ("10:20", "30:40"),
        "rampup_batch_size": (16, 16, 300),
        "train_iters": 1000,
        "global_batch_size": None,
    }


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[model, data]: {}", "a key is one word, and no list"),
        ("~: {}", "a key is one word, and no list, null"),
        ("model: {true: 1}", "a key is one word, and no list, null, true"),
        ("modle: {}", "modle is not a section; perhaps you meant model"),
        ("num_layers: 3", "num_layers is not a section; it is a field, to be indented under model:"),
        ("model: {num_layer: 3}", "model.num_layer is not a known field; perhaps you meant num_layers"),
        ("model: {lr: 3}", "model.lr is not a known field; it belongs to the section optimizer"),
        ("model: {num_layers: 1.5}", "model.num_layers is '1.5', but should be a whole number"),
        ("model: {num_layers: true}", "should be a whole number"),
        ("model: {num_layers: null}", "should be a whole number"),
        ("model: {swiglu: yes}", "should be true or false"),
        ("model: {hidden_dropout: nought}", "should be a number"),
        ("model: {normalization: RMSnorm}", "should be one of LayerNorm, RMSNorm; perhaps you meant RMSNorm"),
        ("training: {rampup_batch_size: [1, 2]}", "should be 3 values, not 2"),
        ("logging: {run_dir: true}", "should be text; put it in quotes"),
        ("model: {num_layers: 1, num_layers: 2}", "num_layers is given twice"),
        ("model: [", "not valid YAML"),
        ("- 1", "must map sections"),
        ("model: 3", "must map field names to values"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text, part):
    with pytest.raises(ConfigError) as caught:
        sources.parse(text, "run.yaml")
    assert part in str(caught.value) and "run.yaml" in str(caught.value)


def test_all_problems_of_a_file_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        sources.parse("modle: {}\nmodel: {num_layer: 1, hidden_size: wide}", "run.yaml")
    assert len(caught.value.problems) == 3


def test_an_empty_file_and_an_empty_section_change_nothing():
    assert sources.parse("", "a") == {}
    assert sources.override(RunConfig(), sources.parse("model:\n", "a")) == RunConfig()


def test_missing_files_and_presets_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        sources.read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="perhaps you meant gpt2-124m"):
        sources.read_preset("gpt2-125m")


def test_the_hash_is_of_values_not_of_spelling():
    config = RunConfig()
    spelled = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_grad=1))
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_grad=0.5))
    assert sources.config_hash(config) == sources.config_hash(spelled) != sources.config_hash(other)


def test_field_names_are_unique_over_sections():
    assert len(sources.section_of()) == sum(map(len, sources.field_types().values()))
