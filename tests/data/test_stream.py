"""Streams: epochs, splits, blends, generated data, ranges left out."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.data import DataConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.stream import parse_skip_ranges, stream_position
from megatron_lite.errors import ConfigError, DataError

SEQ = 4


def write(prefix, num_documents, first_id=0, length=8):
    """Documents of `length` ascending ids; every token of the set is another."""
    with IndexedWriter(prefix, vocab_size=60_000) as writer:
        for d in range(num_documents):
            writer.add_document(np.arange(length) + first_id + d * length)
    return str(prefix)


def build(*data_path, of="train", seed=7, skip=(), **fields):
    data = DataConfig(**{"data_path": data_path, "seq_length": SEQ, **fields})
    return build_stream(data, seed=seed, split=of, vocab_size=60_000, skip_samples=skip)


def first_tokens(stream, samples):
    """First token of each sample, which names it."""
    return [int(stream[k].tokens[0]) for k in samples]


def test_an_epoch_is_every_window_once_and_the_next_is_in_another_order(tmp_path):
    stream = build(write(tmp_path / "a", 20))
    n = stream.samples_per_epoch
    assert n == (19 * 8 - 1) // SEQ  # 969,30,1 of 20 documents is 19, 1, 0
    epochs = [first_tokens(stream, range(e * n, (e + 1) * n)) for e in range(3)]
    assert all(sorted(epoch) == list(range(0, 4 * n, 4)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
    assert stream[5].tokens.dtype == np.uint16
    assert np.array_equal(stream[5].tokens, stream[5].tokens[0] + np.arange(SEQ + 1))


def test_the_tokens_of_a_run_never_change(tmp_path):
    """A change of this hash changes every training run that is resumed after it."""
    stream = build("0.75", write(tmp_path / "a", 40), "0.25", write(tmp_path / "b", 40, 5000), seed=1234)
    tokens = np.stack([stream[k].tokens for k in range(200)]).astype("<i8").tobytes()
    assert hashlib.sha256(tokens).hexdigest()[:16] == "b6efaa4bcd3bc451"


def test_splits_share_no_token(tmp_path):
    prefix = write(tmp_path / "a", 30)
    streams = [build(prefix, of=split, split="6,3,1") for split in ("train", "valid", "test")]
    seen = [{int(t) for k in range(s.samples_per_epoch) for t in s[k].tokens} for s in streams]
    assert [(min(tokens), max(tokens) // 8) for tokens in seen] == [(0, 17), (18 * 8, 26), (27 * 8, 29)]


def test_seed_and_split_change_the_order_alone(tmp_path):
    prefix = write(tmp_path / "a", 30)
    streams = [build(prefix, split="1,0,0"), build(prefix, split="1,0,0", seed=8)]
    streams.append(build(of="valid", valid_data_path=(prefix,)))
    orders = [first_tokens(stream, range(stream.samples_per_epoch)) for stream in streams]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_an_overlapping_stride(tmp_path):
    stream = build(write(tmp_path / "a", 10), split="1,0,0", sample_stride=1)
    assert stream.samples_per_epoch == 80 - SEQ
    assert sorted(first_tokens(stream, range(76))) == list(range(76))


def test_prefixes_without_weights_are_shuffled_together(tmp_path):
    a, b = write(tmp_path / "a", 10), write(tmp_path / "b", 30, first_id=1000)
    stream = build(a, b, split="1,0,0")
    n = stream.samples_per_epoch
    assert n == 19 + 59
    firsts = first_tokens(stream, range(n))
    assert sorted(firsts) == [*range(0, 76, 4), *range(1000, 1236, 4)]
    of_a = [at for at, token in enumerate(firsts) if token < 1000]
    assert of_a[0] < n / 3 and of_a[-1] > 2 * n / 3
    assert stream.describe()[-1] == "an epoch is 78 samples = 19 + 59"


def test_weighted_prefixes_are_blended(tmp_path):
    a, b = write(tmp_path / "a", 10), write(tmp_path / "b", 30, first_id=1000)
    stream = build("3", a, "1", b, split="1,0,0")
    assert stream.samples_per_epoch == 19 + 59
    firsts = first_tokens(stream, range(76))
    assert [sum(token < 1000 for token in firsts[i : i + 4]) for i in range(0, 76, 4)] == [3] * 19
    of_a = [token for token in firsts if token < 1000]
    assert [sorted(of_a[e * 19 : e * 19 + 19]) for e in range(3)] == [list(range(0, 76, 4))] * 3
    assert stream.describe()[0].startswith("75.0000% = 3 of 4 draws from ")


def test_one_weighted_prefix_is_that_prefix(tmp_path):
    a = write(tmp_path / "a", 10)
    assert build("0.3", a, split="1").fingerprint == build(a, split="1").fingerprint


def test_fingerprints_tell_streams_apart(tmp_path):
    a, b = write(tmp_path / "a", 10), write(tmp_path / "b", 30)
    streams = [build(a), build(b), build(a, seed=8), build(a, split="9,1"), build(a, sample_stride=2), build(a, b)]
    streams += [build("1", a, "2", b), build("1", a, "3", b), build(a, of="valid", split="1,1"), build(mock_data=True)]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    assert build(a).fingerprint == build(a, skip=["3:5"]).fingerprint


def test_an_empty_split_is_an_error_when_it_is_asked_for(tmp_path):
    prefix = write(tmp_path / "a", 10)
    build(prefix)
    with pytest.raises(DataError, match=r"no valid sample: valid gets 0 of its 10 documents, .*eval_interval to 0"):
        build(prefix, of="valid")
    with pytest.raises(DataError, match=r"no data for valid: give --data-path or --valid-data-path"):
        build(of="valid", train_data_path=(prefix,))


def test_a_set_shorter_than_one_sequence_gives_the_numbers(tmp_path):
    short, long = write(tmp_path / "short", 1, length=SEQ), write(tmp_path / "long", 9)
    for paths in ([short], ["1", long, "1", short]):
        with pytest.raises(DataError, match=r"short holds no train sample: .* with 4 tokens, .* seq_length \+ 1 = 5"):
            build(*paths, split="1")


def test_a_weighted_set_without_a_validation_sample_is_left_out_aloud(tmp_path, capsys):
    short, long = write(tmp_path / "short", 1, length=9), write(tmp_path / "long", 20)
    both = build("1", short, "3", long, of="valid", split="9,1")
    assert "too short for one valid sample" in capsys.readouterr().err
    assert both.fingerprint == build("3", long, of="valid", split="9,1").fingerprint
    with pytest.raises(DataError, match="short holds no valid sample"):
        build("1", short, "3", short, of="valid", split="9,1")


def test_among_several_a_set_without_a_sample_is_left_out_aloud(tmp_path, capsys):
    short, long = write(tmp_path / "short", 1, length=SEQ), write(tmp_path / "long", 9)
    assert build(long, short, split="1").samples_per_epoch == build(long, split="1").samples_per_epoch
    assert "too short for one train sample" in capsys.readouterr().err


def test_mock_data_are_deterministic_and_learnable():
    stream = build(mock_data=True, seq_length=2000)
    again = build(mock_data=True, seq_length=2000)
    assert stream[3].tokens.dtype == np.int64 and np.array_equal(stream[3].tokens, again[3].tokens)
    assert not np.array_equal(stream[3].tokens, stream[4].tokens)
    assert not np.array_equal(stream[3].tokens, build(mock_data=True, seq_length=2000, seed=8)[3].tokens)
    assert not np.array_equal(stream[3].tokens, build(mock_data=True, seq_length=2000, of="valid")[3].tokens)
    steps = np.concatenate([np.diff(stream[k].tokens) % 256 for k in (0, 1, 2, 10**12)])
    values, counts = np.unique(steps, return_counts=True)
    assert values.tolist() == [1, 2, 3, 4]
    shares = counts / counts.sum()
    assert -(shares * np.log(shares)).sum() == pytest.approx(math.log(4), abs=2e-3)
    assert {int(stream[k].tokens[0]) for k in range(4000)} == set(range(256))


def test_mock_data_stay_within_a_small_vocabulary():
    stream = build_stream(DataConfig(mock_data=True, seq_length=100), seed=1, split="train", vocab_size=11)
    assert set(np.concatenate([stream[k].tokens for k in range(9)]).tolist()) == set(range(11))
    stream.check_vocabulary(11)
    with pytest.raises(DataError, match="ids to 10 and the vocabulary has 10"):
        stream.check_vocabulary(10)


def test_every_set_is_checked_against_the_vocabulary(tmp_path):
    a, b = write(tmp_path / "a", 10), write(tmp_path / "b", 30, first_id=1000)
    for stream in (build(a, b, split="1"), build("3", a, "1", b, split="1", skip=["1:2"])):
        stream.check_vocabulary(1240)
        with pytest.raises(DataError, match=r"b holds token id 1,239 and the vocabulary has ids 0 to 1,238"):
            stream.check_vocabulary(1239)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5))
def test_skipped_ranges_are_left_out_and_nothing_else(ranges):
    parsed = parse_skip_ranges([f"{first}:{first + length}" for first, length in ranges])
    skipped = {at for first, length in ranges for at in range(first, first + length)}
    kept = [at for at in range(300) if at not in skipped]
    assert [stream_position(k, parsed) for k in range(len(kept))] == kept
    assert list(parsed) == sorted(parsed) and all(b < c for (_, b), (c, _) in itertools.pairwise(parsed))


def test_a_stream_with_ranges_left_out(tmp_path):
    prefix = write(tmp_path / "a", 20)
    plain, skipping = build(prefix), build(prefix, skip=["5:8", "10:12"])
    kept = [*range(5), 8, 9, *range(12, 20)]
    assert first_tokens(skipping, range(len(kept))) == first_tokens(plain, kept)
    assert skipping.describe()[-2:] == ["samples 5 to 7 are left out", "samples 10 to 11 are left out"]
    assert skipping.samples_per_epoch == plain.samples_per_epoch


@pytest.mark.parametrize("text", ["5", "5:5", "7:3", "-1:4", "a:b", "1:2:3", "", "1.5:2"])
def test_a_bad_range_says_how_to_write_one(text):
    with pytest.raises(ConfigError, match=f"skip_samples={text} .*1000:1200"):
        parse_skip_ranges(["1:2", text])
