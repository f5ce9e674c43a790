"""Equal and nearly equal documents: one of each stays, the first, within bounded memory."""

from __future__ import annotations

import functools
import itertools
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import datasketch
import numpy as np
import pytest

from megatron_lite.data.refine.document import Document
from megatron_lite.data.refine.exact import ExactDuplicates
from megatron_lite.data.refine.near import NearDuplicates
from megatron_lite.data.refine.spill import parted, runs
from megatron_lite.data.refine.stage import ABSENT, DROPPED, KEPT, CorpusStage

MEMORY = 1 << 30


def resolved(
    stage: CorpusStage, texts: Sequence[str], folder: Path, memory=MEMORY, units=3, absent=()
) -> list[np.ndarray]:
    """The verdicts on the rows of each document."""
    signed = [stage.sign(Document(text, {}, "here", 1)) for text in texts]
    counts = [len(rows) for rows in signed]
    verdicts = np.zeros(sum(counts), np.uint8)
    for document in absent:
        verdicts[sum(counts[:document]) : sum(counts[: document + 1])] = ABSENT
    bounds = np.linspace(0, len(signed), units + 1).astype(int)
    loads = [
        functools.partial(np.concatenate, signed[start:stop] or [signed[0][:0]])
        for start, stop in itertools.pairwise(bounds)
    ]
    stage.resolve(loads, verdicts, folder, memory)
    return np.split(verdicts, np.cumsum(counts)[:-1])


def kept(stage: CorpusStage, texts: Sequence[str], folder: Path, **how) -> list[str]:
    """What the stage leaves of texts."""
    left = []
    for text, rows in zip(texts, resolved(stage, texts, folder, **how), strict=True):
        document = Document(text, {}, "here", 1)
        if stage.apply(document, rows) is None:
            left.append(document.text)
    return left


def test_the_first_of_equal_documents_stays(tmp_path):
    texts = ["a b", "c", "A  b\n", "a b", "d", "c"]
    assert kept(ExactDuplicates(), texts, tmp_path) == ["a b", "c", "d"]
    to_the_letter = ExactDuplicates(ignore_case_and_space=False)
    assert kept(to_the_letter, texts, tmp_path) == ["a b", "c", "A  b\n", "d"]
    assert kept(ExactDuplicates(), texts, tmp_path, absent=[0]) == ["a b", "c", "A  b\n", "d"]
    assert not list(tmp_path.iterdir())


def test_repeated_paragraphs_and_lines_are_cut_out(tmp_path):
    texts = ["one\n\ntwo\n\nthree", "new\n\nTWO \n\nnewer", "two\n\n\none", "two\nalone"]
    paragraphs = ExactDuplicates(of="paragraph")
    assert kept(paragraphs, texts, tmp_path) == ["one\n\ntwo\n\nthree", "new\n\nnewer", "two\nalone"]
    lines = ExactDuplicates(of="line", min_characters=4)
    assert kept(lines, ["same\nabc\n\nabc", "abc\nsame\nother"], tmp_path) == ["same\nabc\n\nabc", "abc\nother"]
    document = Document("two\n\none", {}, "here", 1)
    assert paragraphs.apply(document, np.array([DROPPED, DROPPED], np.uint8)).reason == "only repeated paragraphs"


def corpus(seed: int, size: int, length: int, originals: int) -> list[str]:
    """Texts of random words, of which many are changed copies of others."""
    draw = random.Random(seed)
    texts: list[list[str]] = []
    for number in range(size):
        if number < originals:
            words = [f"w{draw.randrange(5000)}" for _ in range(length)]
        else:
            words = list(draw.choice(texts))
            for _ in range(draw.choice([0, 1, 2, 5, 20, 40])):
                words[draw.randrange(length)] = f"w{draw.randrange(5000)}"
        texts.append(words)
    return [" ".join(words) for words in texts]


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def test_signatures_estimate_the_similarity_of_texts():
    texts = corpus(1, 60, 200, 20)
    stage = NearDuplicates(bands=64, rows=8)
    signatures = [stage.signature(Document(text, {}, "here", 1)).ravel() for text in texts]
    errors = []
    for (one, a), (other, b) in itertools.combinations(zip(texts, signatures, strict=True), 2):
        errors.append(float((a == b).mean()) - jaccard(one, other))
    # The standard error of 512 independent hashes is at most 0.022.
    assert max(map(abs, errors)) < 0.09 and abs(float(np.mean(errors))) < 0.003


def test_signatures_agree_with_datasketch():
    texts = corpus(2, 40, 150, 10)
    stage = NearDuplicates(bands=32, rows=8)
    ours = [stage.signature(Document(text, {}, "here", 1)).ravel() for text in texts]
    theirs = []
    for text in texts:
        theirs.append(datasketch.MinHash(num_perm=256))
        theirs[-1].update_batch([" ".join(run).encode() for run in shingles(text)])
    for (a, x), (b, y) in itertools.combinations(zip(ours, theirs, strict=True), 2):
        assert abs(float((a == b).mean()) - x.jaccard(y)) < 0.17  # two estimates, each of error 0.03


def test_near_duplicates_go_and_others_stay(tmp_path):
    texts = corpus(3, 200, 120, 60)
    left = kept(NearDuplicates(), texts, tmp_path)
    assert left[0] == texts[0]
    # Below 0.3 a pair is joined once in 600 thousand times, above 0.95 it is missed once in 10^6 times.
    assert not [pair for pair in itertools.combinations(left, 2) if jaccard(*pair) > 0.95]
    lonely = [text for text in texts if all(jaccard(text, other) < 0.3 for other in texts if other is not text)]
    assert set(lonely) <= set(left) and len(lonely) > 5


def test_case_accents_digits_and_signs_make_no_difference():
    stage = NearDuplicates()
    one, other = (
        stage.signature(Document(text, {}, "here", 1))
        for text in (
            "On 12 May the Café, it's said, opened AGAIN at 9.30!",
            "on 7 may the cafe it s said opened again at 10",
        )
    )
    assert (one == other).all()
    assert stage.signature(Document("too short a text", {}, "here", 1)) is None


def test_short_texts_are_no_duplicates_of_one_another(tmp_path):
    assert kept(NearDuplicates(), ["a b", "c d", "a b"], tmp_path) == ["a b", "c d", "a b"]


def test_a_chain_is_one_cluster_whose_first_stays(tmp_path):
    words = [f"w{i}" for i in range(400)]
    chain = [" ".join(words[start : start + 300]) for start in range(0, 40, 4)]
    assert jaccard(chain[0], chain[-1]) < 0.8 < jaccard(chain[0], chain[1])
    for seed in range(3):
        order = random.Random(seed).sample(chain, len(chain))
        assert kept(NearDuplicates(), order, tmp_path) == order[:1]


@pytest.mark.parametrize("stage", [ExactDuplicates(), ExactDuplicates(of="line"), NearDuplicates()], ids=repr)
def test_verdicts_do_not_depend_on_memory_or_units(tmp_path, stage):
    texts = [text.replace(" w7", "\nw7") for text in corpus(4, 150, 60, 40)]
    expected = np.concatenate(resolved(stage, texts, tmp_path))
    assert {KEPT, DROPPED} == set(expected.tolist())
    for memory, units in ((1, 1), (20_000, 7), (5_000, 150)):
        assert (np.concatenate(resolved(stage, texts, tmp_path, memory=memory, units=units)) == expected).all()


def test_sorting_stays_within_its_memory(tmp_path):
    """24 MB of records in 3 MB of memory, and the same groups."""
    count, memory = 1_000_000, 3 << 20
    generator = np.random.default_rng(1)

    def blocks():
        for start in range(0, count, 10_000):
            keys = generator.integers(0, count // 2, 10_000).astype(np.uint64)
            yield np.column_stack([keys, keys, np.arange(start, start + 10_000, dtype=np.uint64)])

    tracemalloc.start()
    repeated = records = 0
    for block in parted(blocks(), count * 24, tmp_path, memory):
        order, starts = runs(block[:, :2])
        repeated += len(order) - len(starts)
        records += len(order)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    generator = np.random.default_rng(1)
    distinct = len(np.unique(np.concatenate([block[:, 0] for block in blocks()])))
    assert (records, repeated) == (count, count - distinct)
    assert peak < 1.5 * memory
