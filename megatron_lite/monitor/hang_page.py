"""The page that a run leaves when it hangs: which rank is behind, and what the others wait for."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_lite.parallel.mesh_shape import AXES, MeshShape, ranks_text
from megatron_lite.parallel.whereabouts import Collective

_SHOWN = 16
"""Lines a part of the page may have: of 16,384 ranks not each has one."""


class Seat(NamedTuple):
    """Where a rank runs."""

    node: str
    process: int

    def __str__(self) -> str:
        return f"{self.node}, process {self.process}"


class Awaited(NamedTuple):
    """What a rank of a pipeline wants from another stage's rank before it goes on."""

    what: str
    rank: int


@dataclasses.dataclass(frozen=True)
class Word:
    """What a rank says of itself when its run hangs."""

    rank: int
    reason: str
    """Why the run hangs, of a rank that found it out by itself."""
    stretch: str
    place: int
    """How many stretches it has come to: on all ranks the same where none is behind."""
    seconds: float
    """How long it has been in this one."""
    doing: str
    error: str
    """What its main thread was told of other ranks; empty where it is stuck."""
    at: list[str]
    """The innermost lines of this package that the main thread is in."""
    awaited: list[Awaited]
    collectives: list[Collective]
    stacks: dict[str, list[str]]
    """Each thread's, outermost line first."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Word:
        plain: dict[str, Any] = json.loads(text)
        plain["awaited"] = [Awaited(*each) for each in plain["awaited"]]
        plain["collectives"] = [Collective(*each) for each in plain["collectives"]]
        return Word(**plain)


@dataclasses.dataclass(frozen=True)
class Page:
    """What is printed, and its gist in a sentence or two for exit.json."""

    gist: str
    text: str


def page(
    words: Mapping[int, Word],
    silent: Mapping[int, str],
    seats: Sequence[Seat],
    shape: MeshShape,
    folder: str,
) -> Page:
    """The page of a run that hangs.

    `words` are those of the ranks that gave one, `silent` what is known of each that did not. The words of others than
    these are not to be seen from here. `folder` holds the words.
    """
    waits = _Waits(words, silent, shape)
    behind = [f"{_named(ranks, seats)} gave no word: {state}" for state, ranks in _alike(silent).items()]
    accused = waits.accused()
    if not accused and not silent:
        accused = _in_an_earlier_stretch(words)
    reproaches = {rank: _reproach(words[rank], waits.missing[rank]) for rank in accused}
    behind += [f"{_named(ranks, seats)} {text}" for text, ranks in _alike(reproaches).items()]
    covered = sorted({*words, *silent})
    if not behind:
        outside = sorted(waits.missing.keys() - set(covered))
        behind = [_elsewhere(outside) if outside else _stalemate(words, waits, seats)]
    told = _alike({rank: _line(word, waits.of[rank]) for rank, word in words.items()})
    shown = min(accused or words)
    lines = [
        *(
            f"THIS RUN HANGS: {next((word.reason for word in words.values() if word.reason), 'a rank says so')}",
            *([] if len(covered) == shape.world_size else [_coverage(covered, seats)]),
            "",
            "behind:",
            *_first(behind),
            "",
        ),
        *("what the ranks say:", *_first([f"{ranks_text(ranks)}: {text}" for text, ranks in told.items()]), ""),
        *(f"rank {shown} is at:", *(f"  {line}" for line in words[shown].at or ["no line of this package"]), ""),
        f"the words and stacks of all ranks: {folder}",
    ]
    return Page("; ".join(behind[:3]), "\n".join(lines))


class _Wait(NamedTuple):
    """What ranks wait in, and for whom."""

    what: str
    whom: tuple[int, ...]
    text: str


class _Waits:
    """Who waits for whom. What a group of ranks waits for is looked up once: it may be as large as the run."""

    def __init__(self, words: Mapping[int, Word], silent: Collection[int], shape: MeshShape):
        self._words, self._silent, self._shape = words, silent, shape
        self._found: dict[tuple[str, int], _Wait] = {}
        self._groups: dict[str, dict[int, int]] = defaultdict(dict)
        for rank, word in words.items():
            for collective in word.collectives:
                self._groups[collective.group][rank] = collective.number
        self.of = {rank: self._waits_of(word) for rank, word in words.items()}
        #: What others want of a rank.
        self.missing: dict[int, set[str]] = defaultdict(set)
        distinct = {id(wait): wait for waits in self.of.values() for wait in waits}
        for what, whom, _ in distinct.values():
            for rank in whom:
                self.missing[rank].add(what)

    def accused(self) -> set[int]:
        """The ranks that others wait for and that wait for no other themselves, of those that gave a word."""
        return {rank for rank in self.missing if rank in self._words and not self.of[rank]}

    def _waits_of(self, word: Word) -> list[_Wait]:
        waits = [_Wait(what, (rank,), ranks_text([rank])) for what, rank in word.awaited if rank != word.rank]
        for collective in word.collectives:
            if not collective.is_over and (wait := self._wait_in(collective, word.rank)).whom:
                waits.append(wait)
        return waits

    def _wait_in(self, collective: Collective, rank: int) -> _Wait:
        key = collective.group, collective.number
        if key not in self._found:
            reached = self._groups[collective.group]
            whom = tuple(
                member
                for member in self._members(collective, rank)
                if member in self._silent or reached.get(member, 0) < collective.number
            )
            self._found[key] = _Wait(str(collective), whom, ranks_text(whom) if whom else "")
        return self._found[key]

    def _members(self, collective: Collective, rank: int) -> Collection[int]:
        axes = collective.over.split("+")
        if set(axes) <= set(AXES):
            return self._shape.group_of(rank, *axes)
        return range(self._shape.world_size) if collective.over in _ALL else self._groups[collective.group]


_ALL = ("all", "default_pg")
"""What is over all ranks; the latter is torch's name."""


def _in_an_earlier_stretch(words: Mapping[int, Word]) -> set[int]:
    places = {rank: word.place for rank, word in words.items()}
    least = min(places.values())
    return {rank for rank, place in places.items() if place == least} if least < max(places.values()) else set()


def _reproach(word: Word, missing: Collection[str]) -> str:
    """Why a rank that speaks is behind."""
    if unfinished := _unfinished(word):
        return f"is still in {unfinished}, to which all have come: nothing gets through to it"
    lacks = f"has not come to {' or '.join(sorted(missing)[:3])}" if missing else "is a stretch behind the others"
    return f"{lacks}: it is in {_place(word)}{f', at {word.at[-1]}' if word.at else ''}"


def _coverage(covered: Sequence[int], seats: Sequence[Seat]) -> str:
    nodes = sorted({seats[rank].node for rank in covered})
    return (
        f"(as {ranks_text(covered)} on {' and '.join(nodes)} see it: without --save or --run-dir there is no folder "
        "that all nodes see, and each has a page of its own)"
    )


def _elsewhere(ranks: Sequence[int]) -> str:
    return f"none of the ranks that this page covers: they wait for {ranks_text(ranks)}, whose node has another page"


def _stalemate(words: Mapping[int, Word], waits: _Waits, seats: Sequence[Seat]) -> str:
    """What there is to say where no rank is behind."""
    if any(waits.of.values()):
        pairs = [
            f"rank {rank} waits for {found[0].text} in {found[0].what}" for rank, found in waits.of.items() if found
        ]
        return f"ranks wait for one another: {'; '.join(pairs[:4])}"
    stuck = {rank: text for rank, word in words.items() if (text := _unfinished(word))}
    if not stuck:
        return "no rank waits for another in a collective: see where each of them is"
    nodes = sorted({seats[rank].node for rank in stuck})
    texts = [f"{text} ({ranks_text(ranks)})" for text, ranks in _alike(stuck).items()]
    between = f"between {' and '.join(nodes[:4])}" if len(nodes) > 1 else f"on {nodes[0]}"
    come = "; ".join(texts[:4])
    return f"no rank is behind: all have come to {come}, and it does not end: nothing gets through {between}"


def _unfinished(word: Word) -> str:
    return " and ".join(str(collective) for collective in word.collectives if not collective.is_over)


def _line(word: Word, waits: Sequence[_Wait]) -> str:
    text = _place(word)
    if waits:
        text += f": waits for {waits[0].text} in {waits[0].what}"
    elif unfinished := _unfinished(word):
        text += f": in {unfinished}, to which all have come"
    if word.at:
        text += f", at {word.at[-1]}"
    return f"{text} ({word.error})" if word.error else text


def _place(word: Word) -> str:
    return f"{word.stretch}, {word.doing}" if word.doing else word.stretch


def _named(ranks: Sequence[int], seats: Sequence[Seat]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({seats[ranks[0]]})"
    return f"{ranks_text(ranks)} ({', '.join(sorted({seats[rank].node for rank in ranks})[:4])})"


def _alike(told: Mapping[int, str]) -> dict[str, list[int]]:
    """Texts with the ranks that say them, by the first of these."""
    found: dict[str, list[int]] = defaultdict(list)
    for rank, text in sorted(told.items()):
        found[text].append(rank)
    return found


def _first(lines: Sequence[str]) -> list[str]:
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    return shown + ([f"  ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
