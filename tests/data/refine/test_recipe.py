"""Recipes are read with all their mistakes told at once; the presets hold the published rules."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_lite.data.refine.gopher import GopherQuality, GopherRepetition
from megatron_lite.data.refine.language import Language
from megatron_lite.data.refine.near import NearDuplicates
from megatron_lite.data.refine.recipe import STAGES, parse_recipe, plain_recipe, presets, read_recipe
from megatron_lite.data.refine.web_rules import C4Quality, FineWebQuality
from megatron_lite.errors import ConfigError


def test_presets_are_read():
    assert presets() == ["books", "code", "none", "web"]
    assert read_recipe("none") == ()
    for name in presets():
        stages = read_recipe(name)
        assert json.loads(json.dumps(plain_recipe(stages))) == plain_recipe(stages) or stages


def test_the_web_preset_has_the_published_thresholds():
    stages = {stage.name: stage for stage in read_recipe("web")}
    gopher, repetition = stages["gopher_quality"], stages["gopher_repetition"]
    assert (gopher.min_words, gopher.max_words, gopher.min_mean_word_length, gopher.max_mean_word_length) == (
        50,
        100_000,
        3,
        10,
    )
    assert (gopher.max_hashes_per_word, gopher.max_ellipses_per_word) == (0.1, 0.1)
    assert (gopher.max_bullet_lines, gopher.max_ellipsis_lines, gopher.min_words_with_letter) == (0.9, 0.3, 0.8)
    assert gopher.min_stop_words == 2 and len(gopher.stop_words) == 8
    assert (repetition.max_repeated_lines, repetition.max_repeated_paragraphs) == (0.3, 0.3)
    assert (repetition.max_repeated_line_characters, repetition.max_repeated_paragraph_characters) == (0.2, 0.2)
    assert [getattr(repetition, f"top_{n}") for n in (2, 3, 4)] == [0.20, 0.18, 0.16]
    assert [getattr(repetition, f"repeated_{n}") for n in range(5, 11)] == [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    c4, fineweb, near = stages["c4_quality"], stages["fineweb_quality"], stages["near_duplicates"]
    assert (c4.min_words_per_line, c4.min_sentences, c4.max_word_length) == (3, 5, 1000)
    assert C4Quality().terminal_punctuation and not c4.terminal_punctuation
    assert (fineweb.min_punctuated_lines, fineweb.max_short_lines, fineweb.short_line) == (0.12, 0.67, 30)
    assert (fineweb.max_repeated_characters, fineweb.max_new_lines_per_word) == (0.01, 0.3)
    assert (near.ngram, near.bands, near.rows) == (5, 14, 8)
    assert stages["language"].threshold == 0.65


def test_any_option_can_be_set():
    stages = read_recipe("web", ["gopher_quality.min_words=30", "language.keep=[de, fr]", "near_duplicates.rows=4"])
    found = {stage.name: stage for stage in stages}
    assert found["gopher_quality"] == GopherQuality(min_words=30)
    assert found["language"] == Language(keep=("de", "fr"))
    assert found["near_duplicates"] == NearDuplicates(rows=4)
    twice = "stages: [length: {min_words: 5}, length: {max_words: 9}]"
    assert [stage.min_characters for stage in parse_recipe(twice, "r", ["length.2.min_characters=7"])] == [1, 7]
    assert parse_recipe("stages: [gopher_quality: {max_words: null}]", "r")[0].max_words is None
    score = parse_recipe("stages: [score: {function: 'm:f', arguments: {a: 1e-3, b: [2, x], c: true}}]", "r")[0]
    assert score.arguments == {"a": 0.001, "b": [2, "x"], "c": True}


def test_all_mistakes_are_told_at_once():
    text = """
stages:
  - gopher_qualty
  - length: {min_word: 3}
  - language: {threshold: high}
  - language: {keep: [en, no, eng, klingon]}
  - near_duplicates: {bands: 0}
  - white_space: [1]
  - score
"""
    with pytest.raises(ConfigError) as told:
        parse_recipe(text, "mine.yaml", ["urls.replacement=x", "length", "language.3.keep=en"])
    problems = "\n".join(told.value.problems)
    for part in (
        "there is no stage gopher_qualty; perhaps you meant gopher_quality",
        "length has no option min_word; perhaps you meant min_words; its options are min_characters",
        "language.threshold is 'high', but should be a number",
        "language: keep names eng, klingon; perhaps you meant en; there are af als am ",
        "near_duplicates: bands 0 is below 1; FineWeb has ngram 5, bands 14, rows 8.",
        "white_space must map options to values",
        "score: function is not given: give MODULE:NAME",
        "--set urls.replacement=x: the recipe has no stage urls",
        "--set length is not known; give STAGE.OPTION=VALUE",
        "--set language.3.keep=en: language stands 2 times",
    ):
        assert part in problems
    for wrong in ("just text", "stages: web", "stage: []", "- a", "stages: [\n"):
        with pytest.raises(ConfigError, match=r"mine\.yaml (must be a mapping|is not valid YAML)"):
            parse_recipe(wrong, "mine.yaml")
    for item in ("{length: {}, urls: {}}", "{}", "[length]", "null"):
        with pytest.raises(ConfigError, match="stage 1 must be a name, or a name with its options"):
            parse_recipe(f"stages: [{item}]", "mine.yaml")
    with pytest.raises(ConfigError, match="--recipe wbe is no preset; perhaps you meant web"):
        read_recipe("wbe")
    with pytest.raises(ConfigError, match=r"--recipe none\.yaml cannot be read"):
        read_recipe("none.yaml")


def test_options_are_of_types_that_yaml_can_say():
    for stage in STAGES.values():
        for field in dataclasses.fields(stage):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            assert isinstance(default, (bool, int, float, str, tuple, dict, type(None)))
    assert GopherRepetition() == parse_recipe("stages: [gopher_repetition]", "r")[0]
    assert FineWebQuality() == parse_recipe("stages: [{fineweb_quality: }]", "r")[0]
