"""The grammar of --data-path."""

from fractions import Fraction

import pytest

from megatron_lite.data.data_path import Entry, parse_data_path, prefixes_of
from megatron_lite.errors import ConfigError


def test_decimal_weights_are_exact():
    entries = parse_data_path(["0.7", "data/web", "0.25", "data/code", "5e-2", "data/math"])
    assert prefixes_of(["0.7", "data/web", "0.25", "data/code", "5e-2", "data/math"]) == [e.text for e in entries]
    assert [entry.weight for entry in entries] == [Fraction(7, 10), Fraction(1, 4), Fraction(1, 20)]


def test_prefixes_alone_have_no_weights():
    assert parse_data_path(["data/web"]) == [Entry(("data/web",), text="data/web")]
    assert [entry.weight for entry in parse_data_path(["data/web", "data/2024"])] == [None, None]
    assert [entry.weight for entry in parse_data_path(["1", "data/web"])] == [1]


def test_a_cap_follows_a_colon():
    (entry,) = parse_data_path(["0.5", "data/web:2.5"])
    assert (entry.prefixes, entry.max_epochs) == (("data/web",), Fraction(5, 2))
    assert parse_data_path(["a:b"])[0].prefixes == ("a:b",)
    with pytest.raises(ConfigError, match="data/web be gone through 0 times"):
        parse_data_path(["data/web:0"])


def test_a_pattern_stands_for_its_sets_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 2, 0):
        (tmp_path / f"web_bucket{i}.idx").touch()
    (tmp_path / "web_bucket2.loss_mask.idx").touch()
    (tmp_path / "odd[1].idx").touch()
    assert parse_data_path([f"{tmp_path}/odd[1]"])[0].prefixes == (f"{tmp_path}/odd[1]",)
    (entry,) = parse_data_path([f"{tmp_path}/web_bucket*:3"])
    assert [prefix[-2:] for prefix in entry.prefixes] == ["t0", "t2", "10"] and entry.max_epochs == 3
    with pytest.raises(ConfigError, match=r"no token set has a name like .*code\*; there is no file .*code\*.idx"):
        parse_data_path([f"{tmp_path}/code*"])


@pytest.mark.parametrize(
    "entries",
    [
        ["0.7", "data/web", "0.3"],
        ["data/web", "0.7"],
        ["0.7", "0.3", "a", "b"],
        ["1", "a", "b", "c"],
        ["3"],
        ["1e100", "a", "1", "b"],
    ],
)
def test_weights_and_prefixes_must_alternate(entries):
    with pytest.raises(ConfigError, match="a weight before every prefix"):
        parse_data_path(entries)


@pytest.mark.parametrize("weight", ["0", "-0.5", "0.0"])
def test_weights_are_above_zero(weight):
    with pytest.raises(ConfigError, match=f"data/b the weight {weight}"):
        parse_data_path(["1", "data/a", weight, "data/b"])
