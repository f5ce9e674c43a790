"""The page of a run that hangs accuses the rank that others wait for, and nobody else."""

from __future__ import annotations

import time

from megatron_lite.monitor.hang_page import Awaited, Page, Seat, Word, page
from megatron_lite.parallel.mesh_shape import MeshShape, ranks_text
from megatron_lite.parallel.whereabouts import Collective


def _word(rank: int, place: int = 7, doing: str = "", awaited=(), collectives=(), reason: str = "") -> Word:
    at = [f"megatron_lite/train/step.py:{rank} in train_step"]
    stretch = f"training step {place}"
    return Word(
        rank, reason, stretch, place, 61.0, doing, "", at, list(awaited), list(collectives), {"main": ["a line"]}
    )


def _page(shape: MeshShape, words: list[Word], silent: dict[int, str] | None = None) -> Page:
    seats = [Seat(f"node-{rank // 4}", 100 + rank) for rank in range(shape.world_size)]
    return page({word.rank: word for word in words}, silent or {}, seats, shape, folder="the folder")


def _in(number: int, over: str = "data", group: str = "1", over_it: bool = False) -> Collective:
    return Collective(group, over, "all_reduce", number, over_it)


def test_a_word_comes_back_from_its_file():
    word = _word(3, awaited=[Awaited("the input of stage 1", 2)], collectives=[_in(5)])
    assert Word.from_json(word.to_json()) == word


def test_a_rank_that_has_not_come_to_a_collective():
    words = [_word(0, collectives=[_in(5)]), _word(1, doing="reading samples", collectives=[_in(4, over_it=True)])]
    made = _page(MeshShape(data=2), words)
    assert made.gist == (
        "rank 1 (node-0, process 101) has not come to all_reduce 5 over data: it is in training step 7, "
        "reading samples, at megatron_lite/train/step.py:1 in train_step"
    )
    assert "rank 0: training step 7: waits for rank 1 in all_reduce 5 over data, at " in made.text


def test_one_who_waits_for_another_is_not_behind():
    # 0 waits for 1 in the pipeline, which waits for its data neighbour 3, which gave no word.
    words = [
        _word(0, awaited=[Awaited("the gradient of stage 0 micro-batch 2", 2)]),
        _word(1, awaited=[Awaited("the gradient of stage 0 micro-batch 2", 3)]),
        _word(2, collectives=[_in(5)]),
    ]
    made = _page(MeshShape(pipe=2, data=2), words, {3: "its process is gone"})
    assert made.gist == "rank 3 (node-0, process 103) gave no word: its process is gone"
    assert "rank 1: training step 7: waits for rank 3 in the gradient of stage 0 micro-batch 2" in made.text


def test_one_that_does_not_get_out_of_a_collective():
    words = [_word(0, collectives=[_in(5)]), _word(1, collectives=[_in(6)])]
    assert _page(MeshShape(data=2), words).gist.startswith("rank 0 (node-0, process 100) is still in all_reduce 5")


def test_all_have_come_and_nothing_gets_through():
    shape = MeshShape(data=8)
    gist = _page(shape, [_word(rank, collectives=[_in(5)]) for rank in range(8)]).gist
    assert "no rank is behind: all have come to all_reduce 5 over data (ranks 0-7)" in gist
    assert "between node-0 and node-1" in gist


def test_ranks_in_different_collectives_wait_for_one_another():
    words = [_word(0, collectives=[_in(5, "data", "1"), _in(3, "all", "2", True)])]
    words += [_word(1, collectives=[_in(4, "data", "1", True), _in(4, "all", "2")])]
    gist = _page(MeshShape(data=2), words).gist
    assert gist.startswith(
        "ranks wait for one another: rank 0 waits for rank 1 in all_reduce 5 over data; rank 1 waits"
    )


def test_without_a_record_of_collectives_the_earlier_stretch_tells():
    gist = _page(MeshShape(data=2), [_word(0, place=8), _word(1)]).gist
    assert gist.startswith("rank 1 (node-0, process 101) is a stretch behind the others: it is in training step 7")
    assert "see where each of them is" in _page(MeshShape(data=2), [_word(0), _word(1)]).gist


def test_ranks_of_another_node_whose_words_are_not_to_be_seen_are_not_accused():
    words = [_word(rank, collectives=[_in(5)]) for rank in range(4)]
    made = _page(MeshShape(data=8), words)
    assert made.text.splitlines()[1].startswith("(as ranks 0-3 on node-0 see it: without --save or --run-dir")
    assert made.gist == (
        "none of the ranks that this page covers: they wait for ranks 4-7, whose node has another page"
    )
    words[2] = _word(2, doing="reading samples", collectives=[_in(4, over_it=True)])
    gist = _page(MeshShape(data=8), words).gist
    assert gist.startswith("rank 2 (node-0, process 102) has not come to all_reduce 5 over data") and "4" not in gist


def test_the_reason_is_that_of_a_rank_that_found_it_out():
    made = _page(MeshShape(data=2), [_word(0), _word(1, reason="training step 7 did not end within 60 s")])
    assert made.text.startswith("THIS RUN HANGS: training step 7 did not end within 60 s\n")


def test_a_page_of_16384_ranks_is_short_and_made_at_once():
    shape = MeshShape(pipe=8, data=256, tensor=8)
    silent = {rank: "it is stopped, or its node is gone" for rank in range(8, 16)}
    words = [
        _word(rank, collectives=[_in(9, "all", "0"), _in(4, "data", f"d{rank % 8}-{rank // 2048}", over_it=True)])
        for rank in range(shape.world_size)
        if rank not in silent
    ]
    words = [word if word.rank != 77 else _word(77, collectives=[_in(8, "all", "0", True)]) for word in words]
    began = time.monotonic()
    made = _page(shape, words, silent)
    assert time.monotonic() - began < 20
    assert made.gist.startswith("ranks 8-15 (node-2, node-3) gave no word: it is stopped")
    assert "; rank 77 (node-19, process 177) has not come to all_reduce 9 over all" in made.gist
    assert len(made.text) < 10_000


def test_ranks_in_few_words():
    assert [ranks_text(ranks) for ranks in ([3], [4, 3], range(6), [0, 1, 2, 9, 5, 6])] == [
        "rank 3",
        "ranks 3 and 4",
        "ranks 0-5",
        "ranks 0-2, 5, 6 and 9",
    ]
