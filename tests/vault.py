"""A file system in memory whose addresses take credentials: `vault://user:secret@host/path?token=secret`."""

from __future__ import annotations

from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Vault(MemoryFileSystem):
    """Files by host and path. What is named "refused" fails with the whole address, as services do."""

    protocol = ("vault", "https")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        if "://" in path:
            parts = urlsplit(path)
            path = f"/{parts.hostname}{parts.path}"
        return super()._strip_protocol(path)

    def __init__(self, address: str = "", **options):
        super().__init__(**options)
        self.address = address

    @staticmethod
    def _get_kwargs_from_urls(address: str) -> dict:
        return {"address": address}

    def put_file(self, path, target, **options):
        if "step-00000004" in target:
            raise ConnectionError(f"no answer from {self.address}")
        super().put_file(path, target, **options)

    def _open(self, path, *arguments, **options):
        if self.address and "refused" in path:
            raise RuntimeError(f"403 Forbidden, url={self.address!r}")
        return super()._open(path, *arguments, **options)


def register() -> None:
    """Let fsspec know it."""
    fsspec.register_implementation("vault", Vault, clobber=True)
