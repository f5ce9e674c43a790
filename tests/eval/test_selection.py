"""Which passages an evaluation is about."""

import pytest
from tiny_run import TEXTS, TOKENIZER, write_token_set

from megatron_lite.config.data import DataConfig
from megatron_lite.errors import ConfigError, TokenizerError
from megatron_lite.eval.selection import select_passages


@pytest.fixture
def sets(tmp_path):
    return str(write_token_set(tmp_path / "a")), str(write_token_set(tmp_path / "b", TEXTS[:4]))


def select(data, data_path=(), splits=(), text=(), tokenizer=TOKENIZER):
    return select_passages(
        data, data_path=data_path, splits=splits, text=text, vocab_size=TOKENIZER.vocab_size, tokenizer=tokenizer
    )


def names(*arguments, **options):
    return [passage.name for passage in select(*arguments, **options)]


def test_a_data_path_is_scored_wholly_unless_a_split_is_named(sets):
    first, second = sets
    assert names(DataConfig(), sets) == [first, second]
    assert names(DataConfig(), ("0.3", first, "0.7", second)) == [first, second]
    halves = select(DataConfig(split="50,50"), (first,), ("train", "valid", "all"))
    assert [passage.name for passage in halves] == [f"{first} (train)", f"{first} (valid)", first]
    assert halves[0].num_tokens + halves[1].num_tokens == halves[2].num_tokens
    joined = [*halves[0].tokens(0, halves[0].num_tokens), *halves[1].tokens(0, halves[1].num_tokens)]
    assert joined == halves[2].tokens(0, halves[2].num_tokens).tolist()


def test_without_a_data_path_it_is_the_validation_data_of_the_run(sets):
    first, second = sets
    assert names(DataConfig(data_path=(first,), split="50,50")) == [f"{first} (valid)"]
    own = DataConfig(train_data_path=(first,), valid_data_path=(second,))
    assert names(own) == [second]
    assert names(own, splits=("train", "valid")) == [first, second]
    with pytest.raises(ConfigError, match="configured with no test data; give --data-path"):
        select(own, splits=("test",))
    with pytest.raises(ConfigError, match="configured with no valid data"):
        select(DataConfig(mock_data=True))


def test_text_is_scored_beside_a_data_path_and_instead_of_the_runs_data(sets, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text")
    assert names(DataConfig(data_path=sets), text=(str(path),)) == [str(path)]
    assert names(DataConfig(), data_path=sets[:1], text=(str(path),)) == [str(path), sets[0]]
    with pytest.raises(TokenizerError, match="--text needs a tokenizer"):
        select(DataConfig(), text=(str(path),), tokenizer=None)
