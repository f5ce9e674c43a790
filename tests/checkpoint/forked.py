"""Ranks as forked processes that tell one another JSON over sockets: milliseconds to start, and they can be killed."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable


class ForkedRank:
    """One of several processes; a peer that is gone is an error, as it is to gloo."""

    def __init__(self, rank: int, peers: dict[int, socket.socket]):
        self.global_rank, self.world_size = rank, len(peers) + 1
        self._peers = peers
        self._files = {peer: end.makefile("r") for peer, end in peers.items()}

    def gather_json(self, value):
        text = json.dumps(value)
        for end in self._peers.values():
            end.sendall(text.encode() + b"\n")
        told = {self.global_rank: text} | {peer: file.readline() for peer, file in self._files.items()}
        if not all(told.values()):
            raise RuntimeError("Connection closed by peer")
        return [json.loads(told[rank]) for rank in sorted(told)]


def fork_ranks(act: Callable[[ForkedRank], None], size: int) -> list[int]:
    """Processes of `size` ranks that do `act`; each exits with 0, or with 1 where it raises."""
    ends = {}
    for low in range(size):
        for high in range(low + 1, size):
            ends[low, high], ends[high, low] = socket.socketpair()
    processes = []
    for rank in range(size):
        if not (process := os.fork()):
            code = 1
            try:
                for (mine, _), end in ends.items():
                    if mine != rank:
                        end.close()
                act(ForkedRank(rank, {peer: end for (mine, peer), end in ends.items() if mine == rank}))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        processes.append(process)
    for end in ends.values():
        end.close()
    return processes
