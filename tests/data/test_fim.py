"""Fill-in-the-middle: what was permuted can be put back, as often as asked, the same for whoever asks."""

import copy
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.mixture import MixtureConfig
from megatron_lite.data.fim import FimStream, Sentinels, sentinels
from megatron_lite.data.sample import Sample
from megatron_lite.errors import ConfigError

IDS = Sentinels(prefix=901, middle=902, suffix=903, bos=None, eod=900)


class Documents:
    """A stream of one sample, whatever its number."""

    samples_per_epoch, ends_after, fingerprint = 10, None, "documents"

    def __init__(self, lengths, counts=None):
        pieces = [np.append(np.arange(n - 1) + 1000 * (i + 1), IDS.eod) for i, n in enumerate(lengths)]
        starts = np.cumsum([0, *lengths[:-1]])
        self.sample = Sample(np.concatenate(pieces).astype(np.uint16), starts.astype(np.int64), counts)

    def __getitem__(self, number):
        return self.sample


def stream(lengths, rate=1.0, spm_rate=0.5, ids=IDS, counts=None, seed=7, packing="none"):
    config = MixtureConfig(fim_rate=rate, fim_spm_rate=spm_rate, data_packing=packing)
    return FimStream(Documents(lengths, counts), config, ids, seed, "train")


def undone(piece):
    """The order of a permuted piece, and its tokens before, without the three that the sentinels took."""
    body = piece[:-1].tolist() if piece[-1] == IDS.eod else piece.tolist()
    if body[:1] != [IDS.prefix]:
        return "none", body
    suffix_at, middle_at = body.index(IDS.suffix), body.index(IDS.middle)
    suffix = body[suffix_at + 1 : middle_at]
    if suffix_at == 1 and body[middle_at + 1 :] and (not suffix or body[middle_at + 1] < suffix[0]):
        # Of an empty prefix both orders look alike.
        return "spm", body[middle_at + 1 :] + suffix
    return "psm", body[1:suffix_at] + body[middle_at + 1 :] + suffix


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 2**40), st.sampled_from([0.0, 0.5, 1.0]))
def test_undone_it_is_the_document_in_its_place(lengths, number, spm_rate):
    plain = Documents(lengths).sample
    sample = stream(lengths, spm_rate=spm_rate)[number]
    assert sample.tokens.dtype == plain.tokens.dtype and sample.tokens.shape == plain.tokens.shape
    assert np.array_equal(sample.starts, plain.starts) and sample.counts is None
    for before, after in zip(
        np.split(plain.tokens, plain.starts[1:]), np.split(sample.tokens, plain.starts[1:]), strict=True
    ):
        assert after[-1] == IDS.eod
        order, tokens = undone(after)
        assert (order == "none") == (len(before) < 5)
        assert tokens == before[:-1].tolist()[: len(tokens)] and len(tokens) == len(before) - (
            1 if order == "none" else 4
        )


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(0, 2**40),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(["u1", "u2", "i4", "i8", "u8"]),
    st.booleans(),
    st.sampled_from(["none", "best_fit"]),
    st.data(),
)
def test_compiled_or_not_the_tokens_are_the_same(lengths, number, rate, dtype, masked, packing, data):
    size = sum(lengths)
    counts = np.array(data.draw(st.lists(st.sampled_from([True] * 9 + [False]), min_size=size, max_size=size)))
    ids = Sentinels(prefix=91, middle=92, suffix=93, bos=data.draw(st.sampled_from([None, 1, 300])), eod=2)
    documents = Documents([1])
    tokens = np.random.default_rng(number).integers(0, 4, size).astype(dtype)
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    documents.sample = Sample(tokens, starts, counts if masked else None)
    config = MixtureConfig(fim_rate=rate, fim_spm_rate=0.5, data_packing=packing)
    compiled = FimStream(documents, config, ids, 7, "train")
    assert compiled._compiled
    plain = copy.copy(compiled)
    plain._compiled = None
    made, expected = compiled[number], plain[number]
    assert made.tokens.dtype == expected.tokens.dtype == tokens.dtype
    assert np.array_equal(made.tokens, expected.tokens) and (made is documents.sample) == (
        expected is plain._stream.sample
    )


def test_pieces_of_three_tokens_or_fewer_stay_as_they_are():
    """Those of none too, though no stream gives such: they have no token to look at."""
    made = stream([1])
    assert made._compiled
    for permute in (made._compiled, made._permute):
        for size, starts in ((0, [0]), (3, [0]), (6, [0, 3, 3, 6]), (5, [0, 0, 2, 4, 5])):
            tokens = np.full(size, IDS.eod, np.uint16)
            assert not permute(1, tokens, np.array(starts, np.int64), np.ones(size, bool))
            assert (tokens == IDS.eod).all()


def test_as_many_as_asked_and_cuts_everywhere():
    orders, cuts = [], np.zeros(28, int)
    for number in range(3000):
        piece = stream([31], rate=0.4, spm_rate=0.25)[number].tokens
        order, _ = undone(piece)
        orders.append(order)
        if order == "psm":
            cuts[piece.tolist().index(IDS.suffix) - 1] += 1
    assert orders.count("none") / 3000 == pytest.approx(0.6, abs=0.03)
    # Two in 28 of the 0.3 have an empty prefix, of which both orders look alike.
    assert orders.count("spm") / 3000 == pytest.approx(0.12, abs=0.025)
    assert (cuts[1:25] > 0).all()


def test_the_number_of_the_sample_the_seed_and_the_document_decide():
    lengths = [40, 40, 40]
    sample = stream(lengths)[5]
    assert np.array_equal(sample.tokens, stream(lengths)[5].tokens)
    others = [stream(lengths)[6], stream(lengths)[5 + 2**32], stream(lengths, seed=8)[5]]
    assert all(not np.array_equal(sample.tokens, other.tokens) for other in others)
    pieces = np.split(sample.tokens.astype(int), sample.starts[1:])
    assert not np.array_equal(pieces[0] % 1000, pieces[1] % 1000)
    streams = [stream(lengths), stream(lengths, rate=0.5), stream(lengths, spm_rate=0.1), stream(lengths, seed=8)]
    streams.append(stream(lengths, ids=dataclasses.replace(IDS, middle=904)))
    assert len({each.fingerprint for each in streams}) == len(streams)


def test_a_text_keeps_its_beginning_token():
    sample = stream([20], ids=dataclasses.replace(IDS, bos=1000))[3]
    assert sample.tokens[0] == 1000 and sample.tokens[1] == IDS.prefix and sample.tokens[-1] == IDS.eod


def test_what_does_not_count_stays_as_it_is():
    counts = np.ones(60, bool)
    counts[[20, 25, 40]] = False
    plain = Documents([20, 20, 20]).sample.tokens
    for packing, last in (("none", False), ("best_fit", True)):
        sample = stream([20, 20, 20], counts=counts, packing=packing)[0]
        changed = [not np.array_equal(plain[a : a + 20], sample.tokens[a : a + 20]) for a in (0, 20, 40)]
        assert changed == [True, False, last] and sample.counts is counts
        assert not set(plain[[25, *([] if last else [40])]]) & set(sample.tokens[1:][counts[1:]])


def test_an_unpermuted_sample_is_handed_on():
    documents = stream([30, 40], rate=0.0)
    assert all(documents[number] is documents._stream.sample for number in range(9))


def test_a_tokenizer_without_the_tokens_is_refused(built):
    tokenizer = next(iter(built.values()))
    with pytest.raises(ConfigError, match=r"'<fim_prefix>' '<fim_middle>' '<fim_suffix>', and the tokenizer has"):
        sentinels(MixtureConfig(fim_rate=0.5), tokenizer)
    one = next(iter(tokenizer.special_tokens), None) or "x"
    with pytest.raises(ConfigError):
        sentinels(
            MixtureConfig(fim_rate=0.5, fim_prefix_token=one, fim_middle_token=one, fim_suffix_token=one), tokenizer
        )


def test_sentinels_beyond_a_narrow_dtype_are_not_wrapped():
    ids = dataclasses.replace(IDS, middle=70_000)
    tokens = stream([30], ids=ids)[0].tokens
    assert {ids.prefix, ids.middle, ids.suffix} <= set(tokens.tolist())
    assert stream([30])[0].tokens.dtype == np.uint16
