"""Data paths in files, as Megatron's scripts give them."""

import json

import pytest

from megatron_lite.config import cli
from megatron_lite.errors import ConfigError


def load(*argv: str):
    return cli.load(argv)[0].data


def test_a_file_of_words_is_the_data_path(tmp_path):
    (tmp_path / "paths").write_text("0.7 data/web\n0.3 data/code\n")
    data = load("--data-args-path", str(tmp_path / "paths"))
    assert data.data_path == ("0.7", "data/web", "0.3", "data/code") and data.data_args_path is None
    assert load("--data-args-path", str(tmp_path / "paths"), "--data-path", *data.data_path) == data


def test_a_file_of_splits_is_three_paths(tmp_path):
    content = {"train": ["0.7", "data/web", 0.3, "data/code"], "valid": "data/held", "test": None}
    (tmp_path / "paths.json").write_text(json.dumps(content))
    data = load("--per-split-data-args-path", str(tmp_path / "paths.json"))
    assert data.train_data_path == ("0.7", "data/web", "0.3", "data/code")
    assert (data.valid_data_path, data.test_data_path, data.data_path) == (("data/held",), (), ())


def test_another_path_beside_the_file_is_refused(tmp_path):
    (tmp_path / "paths").write_text("data/web")
    with pytest.raises(ConfigError, match=r"data_path is data/code, and the file of paths says data/web; give one\."):
        load("--data-args-path", str(tmp_path / "paths"), "--data-path", "data/code")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'must hold an object of the lists "train", "valid" and "test"'),
        ('{"eval": []}', "must hold an object"),
        ('{"train": 3}', '"train" is 3, not a list of prefixes'),
        ('{"train": [["a"]]}', "not a list of prefixes and weights"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(tmp_path, content, message):
    (tmp_path / "paths.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load("--per-split-data-args-path", str(tmp_path / "paths.json"))
    with pytest.raises(ConfigError, match=r"data_args_path=.*none cannot be read"):
        load("--data-args-path", str(tmp_path / "none"))
    (tmp_path / "none").write_text(" ")
    with pytest.raises(ConfigError, match=r"data_args_path=.*none is empty; write prefixes into it"):
        load("--data-args-path", str(tmp_path / "none"))
