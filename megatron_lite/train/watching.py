"""The watch over hangs as a run has it: its limit, its folder, the places of its ranks."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import HangError
from megatron_lite.monitor.hang_page import Page, Seat
from megatron_lite.monitor.hang_watch import PAGE, HangWatch, Limit
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.roll_call import this_place


def watch_for_hangs(
    config: ParallelConfig, mesh: ProcessMesh, run_dir: Path | None, told: Callable[[HangError], None]
) -> HangWatch | None:
    """The watch of this rank, begun; None where --hang-limit-minutes 0 asks for none. All ranks call.

    `told` is handed what the page says in short, before the ranks end.
    """
    if config.hang_limit_minutes == 0:
        return None
    places = mesh.gather_json({**this_place(), "now": time.strftime("%Y%m%d-%H%M%S")})
    # Without one there is nowhere that ranks of several machines could look.
    folder = run_dir or Path(tempfile.gettempdir())
    folder /= f"hang-{places[0]['now']}" if run_dir else f"megatron_lite-hang-{places[0]['now']}-{places[0]['pid']}"

    def tell(page: Page) -> None:
        told(HangError(f"{page.gist}; {folder / PAGE} has more"))

    # gloo gives up by itself, and each waiting rank hears of it; nccl would end the process without a word.
    given_up = config.distributed_timeout_minutes if mesh.device.type == "cuda" else math.inf
    limit = Limit(config.hang_limit_minutes, config.distributed_timeout_minutes, given_up)
    watch = HangWatch(
        mesh.global_rank,
        mesh.shape,
        [Seat(place["host"], place["pid"]) for place in places],
        [place["machine"] for place in places],
        folder,
        limit,
        tell,
        is_shared=run_dir is not None,
    )
    watch.start()
    return watch
