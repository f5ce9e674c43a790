"""`run_on_ranks(fn, size)`: a function run on that many gloo ranks, started quickly.

Ranks are forked from a server that has imported torch once, rendezvous over a file and listen on
loopback only. A rank that is done waits for the others, since one that still connects to it would
take its end for a crash. The first rank that fails gives its traceback; a rank that does not end in
time is named and all are killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "megatron_lite.parallel.process_mesh"])


def _rank_main(connection, fn, rank, size, store_path, timeout, args, kwargs):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(store_path, size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        # Plain pickles: multiprocessing's own would share tensors by descriptors of a rank that is gone.
        connection.send_bytes(pickle.dumps(("done", fn(*args, **kwargs))))
        with contextlib.suppress(EOFError):
            connection.recv_bytes()  # nothing comes: the pipe ends with the test
    except BaseException:
        connection.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
    finally:
        connection.close()
        # A rank that failed leaves its peers inside a collective: no orderly goodbye then.
        os._exit(0)


def run_on_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
    """The results of `fn(*args, **kwargs)` on ranks 0 to size - 1, each with a gloo process group.

    `fn` lives at module level; it asks `torch.distributed` for its rank. Raises AssertionError with
    the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        store_path = os.path.join(folder, "store")
        workers = []
        for rank in range(size):
            parent, child = _context.Pipe()
            process = _context.Process(
                target=_rank_main, args=(child, fn, rank, size, store_path, timeout, args, kwargs), daemon=True
            )
            process.start()
            child.close()
            workers.append((rank, process, parent))
        try:
            return _collect(workers, time.monotonic() + timeout)
        finally:
            for _, process, _ in workers:
                process.kill()
                process.join()


def _collect(workers, deadline):
    results, waiting = {}, {parent: rank for rank, _, parent in workers}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} of {len(workers)} did not end in time")
        for parent in ready:
            rank = waiting.pop(parent)
            try:
                kind, value = pickle.loads(parent.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} of {len(workers)} died without a word") from None
            if kind == "failed":
                raise AssertionError(f"rank {rank} of {len(workers)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]
