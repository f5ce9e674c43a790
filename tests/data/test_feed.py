"""From a configuration to samples: the order law over blends, packing, fill-in-the-middle, masks and curricula."""

import hashlib

import numpy as np
import pytest

from megatron_lite import log
from megatron_lite.config.data import DataConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.loss_mask import mask_prefix
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.errors import ConfigError

SEQ, VOCABULARY, TOTAL = 16, 300, 96
SPECIAL = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
TOKENIZER = {"tokenizer_type": "ByteTokenizer", "special_tokens": SPECIAL}


def write(prefix, num_documents, seed, longest=40):
    lengths = np.random.default_rng(seed).integers(1, longest, num_documents)
    with IndexedWriter(prefix, vocab_size=VOCABULARY) as writer:
        for i, length in enumerate(lengths):
            writer.add_document((np.arange(length) + 7 * i + seed) % 256)
    return str(prefix), lengths


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for i in range(3):
        write(folder / f"web_bucket{i}", 12, i)
    write(folder / "code", 20, 8)
    _, lengths = write(folder / "chat", 15, 9)
    with IndexedWriter(mask_prefix(folder / "chat"), dtype=np.uint8) as writer:
        for length in lengths:
            writer.add_document((np.arange(length) % 2).astype(np.uint8))
    return folder


BLEND = ("0.5", "{}/web_bucket*", "0.3", "{}/code", "0.2", "{}/chat")
BARE = BLEND[1::2]
CASES = {
    "shuffled together": {"data_path": BARE},
    "blend": {"data_path": BLEND},
    "temperature": {"data_path": BARE, "data_blend_temperature": 3},
    "unimax": {"data_path": BARE, "data_blend_unimax": 1.5},
    "segments": {"data_path": BLEND, "data_path_segments": ("40% 1 2 3", "60/4 0 0.5 0.5")},
    "redistribute": {"data_path": BLEND, "when_exhausted": "redistribute", "data_max_epochs": 2},
    "linear curriculum": {
        "data_path": BLEND,
        "curriculum_difficulty": "linear",
        "curriculum_difficulty_samples": 50,
    },
    "packing": {"data_path": BLEND, "data_packing": "best_fit", "blend_by": "tokens"},
    "fill-in-the-middle": {"data_path": BLEND, "fim_rate": 0.6, **TOKENIZER},
    "all": {
        "data_path": BLEND,
        "data_path_segments": ("30 1 1 1", "80%/3 0.2 0.4 0.4"),
        "when_exhausted": "redistribute",
        "data_max_epochs": 3,
        "curriculum_difficulty": "root",
        "curriculum_difficulty_samples": 40,
        "data_packing": "best_fit",
        "fim_rate": 0.5,
        **TOKENIZER,
    },
}


def opened(sets, case, split="train", total=TOTAL, **fields):
    words = CASES[case] | fields
    words["data_path"] = tuple(word.format(sets) for word in words["data_path"])
    data = DataConfig(seq_length=SEQ, split="8,2,0", **words)
    tokenizer = build_tokenizer(data) if data.tokenizer_type else None
    return build_stream(data, seed=5, split=split, vocab_size=VOCABULARY, tokenizer=tokenizer, total_samples=total)


def digest(batches):
    """Of the tokens, targets and which of them count, in the order of the micro-batches' numbers."""
    found = hashlib.sha256()
    for batch in sorted(batches, key=lambda batch: batch.index):
        for row in range(len(batch.tokens)):
            for field in (batch.tokens, batch.labels, batch.loss_mask):
                found.update(field[row].numpy().tobytes())
    return found.hexdigest()


def hashes(stream, size, micro, workers=0, begin=0):
    """What each step of 16 samples trains on, by all data ranks; `begin` is where a run was resumed."""
    loaders = [
        BatchLoader(
            stream, data_rank=rank, data_size=size, micro_batch_size=micro, vocab_size=VOCABULARY, num_workers=workers
        )
        for rank in range(size)
    ]
    try:
        return [digest(batch for each in loaders for batch in each.step(at, 16)) for at in range(begin, TOTAL, 16)]
    finally:
        for each in loaders:
            each.close()


@pytest.mark.parametrize("case", CASES)
def test_what_a_step_trains_on_depends_on_the_consumed_samples_alone(sets, case):
    expected = hashes(opened(sets, case), 1, 1)
    assert len(set(expected)) == len(expected)
    for size in (1, 2, 4, 8):
        for micro in (1, 2):
            begin = 16 * (size + micro - 2)
            assert hashes(opened(sets, case), size, micro, begin=begin) == expected[begin // 16 :]
    if case == "all":
        assert hashes(opened(sets, case), 2, 4, workers=2) == expected


@pytest.mark.parametrize("case", CASES)
def test_the_origin_of_a_sample_and_what_is_told_of_it(sets, case):
    stream = opened(sets, case)
    for number in (0, 17, 95):
        sample, origin = stream[number], stream.origin(number)
        assert sum(extent.tokens for extent in origin.extents) in (SEQ + 1, int(sample.starts[-1]))
        assert str(sets) in origin.prefix
    assert stream.describe() and opened(sets, case).fingerprint == stream.fingerprint
    assert opened(sets, case, split="valid")[3].tokens.shape == (SEQ + 1,)
    stream.check_vocabulary(VOCABULARY)


def test_every_case_is_other_data(sets):
    assert len({opened(sets, case).fingerprint for case in CASES}) == len(CASES)


def test_the_log_tells_of_epochs_changes_and_what_a_run_goes_through(sets):
    stream = opened(sets, "segments")
    lines = "\n".join(stream.describe())
    assert "from sample 38 on " in lines and ", 33.33% " in lines
    assert "/code is gone through " in lines and "times in 96 samples = " in lines
    (line,) = [line for at in range(96) for line in stream.changes(at, at + 1) if "from sample 60 on" in line]
    assert line == next(line for line in stream.changes(56, 64) if "from sample" in line)
    repeating = opened(sets, "blend")
    n = repeating._members[3].samples_per_epoch
    told = [line for at in range(0, 400, 8) for line in repeating.changes(at, at + 8) if "/code: epoch" in line]
    assert told[0].endswith(f"/code: epoch 2 begins, after {n} samples of it")
    ending = opened(sets, "redistribute")
    changes = [line for at in range(0, ending.ends_after, 8) for line in ending.changes(at, at + 8)]
    assert any("is exhausted, its share goes to the others" in line for line in changes)


@pytest.mark.parametrize("blend_by", ["samples", "tokens"])
def test_shares_of_tokens_beside_a_loss_mask_are_told(sets, capsys, monkeypatch, blend_by):
    monkeypatch.setattr(log, "_said", set())
    for _ in range(2):
        opened(sets, "packing", blend_by=blend_by)
    said = capsys.readouterr()
    wanted = f"tokens that the loss mask of {sets}/chat leaves out are among those its weight is a share of"
    assert (said.out + said.err).count(wanted) == (blend_by == "tokens")


def test_a_stream_that_ends_says_when(sets):
    assert opened(sets, "blend").ends_after is None
    stopped = opened(sets, "blend", when_exhausted="stop")
    drawn = stopped._blend.drawn(stopped.ends_after)
    sizes = [member.samples_per_epoch for member in stopped._members]
    assert max(d - n for d, n in zip(drawn, sizes, strict=True)) == 0
    assert opened(sets, "redistribute").ends_after == 2 * sum(sizes)


def test_what_needs_the_length_of_the_run_says_so(sets):
    with pytest.raises(ConfigError, match="length in epochs is not known"):
        opened(sets, "unimax", total=None)


def test_pieces_of_one_set_are_drawn_as_the_set_was(sets):
    stream = opened(sets, "blend")
    members = [member.samples_per_epoch for member in stream._members]
    drawn = stream._blend.drawn(10_000)
    assert sum(drawn[:3]) == pytest.approx(5000, abs=4)
    assert [d / sum(drawn[:3]) for d in drawn[:3]] == pytest.approx(
        [n / sum(members[:3]) for n in members[:3]], abs=1e-3
    )
