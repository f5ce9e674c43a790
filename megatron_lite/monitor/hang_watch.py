"""The watch over a run that may hang: a thread in every rank, which speaks when its rank no longer moves.

It costs a look a second at what `parallel/whereabouts.py` notes. When a stretch of training outlasts its limit, each
rank writes its word into a folder that all of them see, the lowest rank that could makes the page of them
(`hang_page.py`), and the ranks exit, wherever they are stuck. Ranks talk through files alone: nothing else of theirs
can be relied upon by then.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from megatron_lite import log
from megatron_lite.credentials import without_credentials
from megatron_lite.errors import EXIT_HANG, HangError
from megatron_lite.monitor.hang_page import Awaited, Page, Seat, Word, page
from megatron_lite.parallel import whereabouts
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.whereabouts import HERE, STEP, VALIDATION, Stretch
from megatron_lite.publish import publish

LEAST_SECONDS = 60.0
"""No stretch hangs before, however quick the others were."""
TIMES_THE_SLOWEST = 10.0
PATIENCE_SECONDS = 10.0
"""How long ranks of this machine are waited for that give no word."""
FAR_PATIENCE_SECONDS = 70.0
"""The same for others: a network file system may show what they wrote a minute later."""
LONGEST_REPORT_SECONDS = FAR_PATIENCE_SECONDS + 2 * PATIENCE_SECONDS
"""How long a rank waits for the page that another one makes: launchers may end all ranks of a node once one has."""
ALARM_SECONDS = 4.0
"""How often a rank looks whether another has found that the run hangs."""
PAGE = "page.txt"
_PACKAGE = f"{os.sep}megatron_lite{os.sep}"


class Limit:
    """Seconds that a stretch may take.

    `fixed_minutes` is the user's; None learns it from the stretches of the same kind before. The first of a kind, which
    compiles and connects, has at least `first_minutes` for each of its parts. `collective_minutes` is what one exchange
    with other ranks may take in a stretch of whatever kind, where nobody but the watch stops waiting in time.
    """

    def __init__(self, fixed_minutes: float | None, first_minutes: float, collective_minutes: float = math.inf):
        self._fixed = None if fixed_minutes is None else 60 * fixed_minutes
        self._first = 60 * first_minutes
        self.of_collectives = 60 * collective_minutes

    def seconds(self, kind: str) -> float:
        """The limit now; infinite for what takes long once in a while, such as a checkpoint that waits for a disk.

        There the time that a collective may take has to do.
        """
        if kind not in (STEP, VALIDATION):
            return math.inf
        times = HERE.times[kind]
        learned = max(LEAST_SECONDS, TIMES_THE_SLOWEST * max(times, default=0.0))
        limit = learned if self._fixed is None else self._fixed
        return limit if times else max(limit, self._first)

    def reason(self, kind: str) -> str:
        """Why it is what it is."""
        times = HERE.times[kind]
        if not times:
            return "the first of its kind, --distributed-timeout-minutes and --hang-limit-minutes"
        if self._fixed is not None:
            return "--hang-limit-minutes"
        return f"{TIMES_THE_SLOWEST:g} times the slowest of the last {len(times)}, and at least {LEAST_SECONDS:g} s"


class HangWatch:
    """This rank's watch, from `start` to `close`.

    `seats` tells where every rank runs, and `machines` which of them share one. `folder` is made when the run hangs;
    it `is_shared` if all ranks see it, and not those of this machine alone. `told` is handed the page on the rank that
    made it, before any rank ends.
    """

    def __init__(
        self,
        rank: int,
        shape: MeshShape,
        seats: Sequence[Seat],
        machines: Sequence[str],
        folder: Path,
        limit: Limit,
        told: Callable[[Page], None],
        is_shared: bool = True,
    ):
        self._rank, self._shape, self._seats, self._machines = rank, shape, seats, machines
        self._folder, self._limit, self._told = folder, limit, told
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._speaking = threading.Lock()
        self._covered = [other for other in range(shape.world_size) if is_shared or machines[other] == machines[rank]]
        self._last: tuple[object, ...] = ()
        self._still = 0.0

    def start(self, tick: float = 1.0) -> None:
        """Begin to watch the main thread of this process, every `tick` seconds."""
        threading.Thread(target=self._run, args=(tick,), daemon=True, name="hang-watch").start()

    def close(self) -> None:
        """Watch no more. Where this rank is ending already, because its run hangs, this does not return."""
        self._over.set()
        with self._speaking:
            pass

    def report(self, error: HangError, seen: BaseException) -> None:
        """Have the page made, since a collective gave up waiting, as was `seen`; the watch is over then."""
        self.close()
        self._speak(str(error), seen)

    def _run(self, tick: float) -> None:
        looked = time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            # What goes beyond is time in which this thread did not run either: a process that was stopped, a machine
            # that was suspended or has far too much to do.
            elapsed, looked = min(now - looked, 2 * tick), now
            stretch = HERE.stretch
            # How long the first of a kind takes nobody knows, but its parts follow one another.
            part = () if HERE.times[stretch.kind] else HERE.doing
            if (stretch.place, part) != self._last:
                self._last, self._still = (stretch.place, part), 0.0
                continue
            before, self._still = self._still, self._still + elapsed
            if reason := self._reason(stretch):
                self._speak_and_end(reason)
            elif self._still // ALARM_SECONDS > before // ALARM_SECONDS and self._alarm_is_raised():
                # Another rank has found it out: it may have begun earlier, or learned a shorter limit.
                self._speak_and_end("")

    def _reason(self, stretch: Stretch) -> str:
        """Why the run hangs, as far as this rank can tell by itself; empty while it does not."""
        limit = self._limit.seconds(stretch.kind)
        if self._still > limit:
            return f"{stretch} did not end within {limit:.3g} s ({self._limit.reason(stretch.kind)})"
        if self._still > (limit := self._limit.of_collectives):
            what, seconds = whereabouts.longest_wait()
            if seconds > limit:
                return f"{what} did not end within {limit:.3g} s (--distributed-timeout-minutes)"
        return ""

    def _alarm_is_raised(self) -> bool:
        _look_afresh(self._folder.parent)
        return self._folder.is_dir()

    def _speak_and_end(self, reason: str) -> None:
        with self._speaking:
            if not self._over.is_set():
                self._speak(reason)
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(EXIT_HANG)

    def _speak(self, reason: str, seen: BaseException | None = None) -> None:
        """Give this rank's word, and make the page of all words or wait for it."""
        try:
            publish(self._word_file(self._rank), take_word(self._rank, self._main, reason, seen).to_json())
            if self._makes_page():
                self._make_page()
        except Exception:
            log.every_rank(f"the report of a run that hangs failed:\n{traceback.format_exc()}")

    def _makes_page(self) -> bool:
        """Whether this rank is to make the page; False once another has done so.

        Rank 0 makes it, or where that gives no word one of the lowest that do.
        """
        began = time.monotonic()
        while self._rank > 0:
            waited = time.monotonic() - began
            _look_afresh(self._folder)
            if (self._folder / PAGE).exists() or waited > LONGEST_REPORT_SECONDS:
                return False
            if waited > 1.0 + min(5.0, 0.1 * self._rank) and not self._word_file(0).exists():
                with contextlib.suppress(FileExistsError):
                    (self._folder / "page-maker").touch(exist_ok=False)
                    return True
            time.sleep(0.1)
        return True

    def _make_page(self) -> None:
        began, missing = time.monotonic(), set(self._covered)
        words: dict[int, Word] = {}
        while missing:
            words |= self._words_of(missing)
            missing -= words.keys()
            waited = time.monotonic() - began
            # A process may be seen stopped in passing.
            known = waited > 1.0 and all(self._state_here(rank) is not None for rank in missing)
            if known or waited > (PATIENCE_SECONDS if self._are_here(missing) else FAR_PATIENCE_SECONDS):
                break
            time.sleep(0.2)
        unheard = f"not heard of for {time.monotonic() - began:.0f} s: it is stopped, or its node or its disk is gone"
        made = page(
            {rank: words[rank] for rank in sorted(words)},
            {rank: self._state_here(rank) or unheard for rank in sorted(missing)},
            self._seats,
            self._shape,
            folder=str(self._folder),
        )
        self._told(made)
        log.every_rank(made.text)
        publish(self._folder / PAGE, made.text + "\n")

    def _words_of(self, ranks: Iterable[int]) -> dict[int, Word]:
        """The words of those of `ranks` that gave theirs."""
        _look_afresh(self._folder)
        found = {}
        for rank in ranks:
            # By its name: a listing may be older.
            with contextlib.suppress(FileNotFoundError):
                found[rank] = Word.from_json(self._word_file(rank).read_text())
        return found

    def _are_here(self, ranks: Collection[int]) -> bool:
        return all(self._machines[rank] == self._machines[self._rank] for rank in ranks)

    def _state_here(self, rank: int) -> str | None:
        """Why a rank on this machine gives no word; None where it runs, or is elsewhere."""
        return process_state(self._seats[rank].process) if self._are_here([rank]) else None

    def _word_file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05}.json"


def _look_afresh(folder: Path) -> None:
    """Have a network file system ask its server what a folder holds: until it is opened, a client may go by an answer
    that is a minute old, also that a file is not there."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def process_state(process: int) -> str | None:
    """What keeps a process of this machine from doing anything, if something does."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "its process is gone"
    return {
        "T": f"its process is stopped (by SIGSTOP; kill -CONT {process} lets it go on)",
        "t": "its process is stopped by a debugger",
        "Z": "its process is dead",
        "X": "its process is dead",
    }.get(state)


def take_word(rank: int, main_thread: int, reason: str = "", seen: BaseException | None = None) -> Word:
    """What this process is doing, by its notes, its collectives and its threads' stacks.

    `reason` is why it says that the run hangs, and `seen` what its main thread was told, if it gave up.
    """
    stretch = HERE.stretch
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {thread: traceback.extract_stack(frame) for thread, frame in sys._current_frames().items()}
    stacks = {
        f"{names.get(thread, 'a thread')} {thread}": traceback.format_list(frames[thread])
        for thread in sorted(frames, key=lambda thread: thread != main_thread)
    }
    try:
        collectives = whereabouts.collectives()
    except Exception as failure:
        log.every_rank(f"torch's record of collectives cannot be read ({type(failure).__name__}: {failure})")
        collectives = []
    return Word(
        rank=rank,
        reason=reason,
        stretch=str(stretch),
        place=stretch.place,
        seconds=round(time.monotonic() - stretch.began, 1),
        doing=" ".join(map(str, HERE.doing)),
        error="" if seen is None else without_credentials(str(seen).partition("\n")[0]),
        at=_own_lines(traceback.extract_tb(seen.__traceback__) if seen else frames.get(main_thread, [])),
        awaited=[Awaited(" ".join(map(str, what)), order.rank) for what, order in dict(HERE.awaited).items()][:1],
        collectives=collectives,
        stacks=stacks,
    )


def _own_lines(frames: Sequence[traceback.FrameSummary], count: int = 5) -> list[str]:
    """The innermost of this package's lines, the last one last."""
    own = [frame for frame in frames if _PACKAGE in frame.filename]
    return [f"megatron_lite/{f.filename.rpartition(_PACKAGE)[2]}:{f.lineno} in {f.name}" for f in own[-count:]]
