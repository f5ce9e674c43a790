"""Credentials in addresses, and texts without them: what is printed, saved or sent to a tracker passes here first.

    s3://key:secret@host/folder             s3://***@host/folder
    https://host/file.jsonl?token=secret    https://host/file.jsonl?token=***

A name alone before the @ is hidden for http and https, where it may be a token; elsewhere it is a user or a container.
Of a query all values are hidden but numbers, true and false.
"""

from __future__ import annotations

import re

_HIDDEN = "***"

_ADDRESS = re.compile(r"""\b[a-z][a-z0-9+.-]*:/+[^\s"'<>]*""", re.I)  # a path library makes one slash of two
#: A colon before a number and then no @ is a port's. A secret may have a slash in it.
_PASSWORD = re.compile(r"^([^/]*:/+)[^/?#:@]*:(?!\d{1,5}(?:[/?#,;)]|$)).*@", re.S)
_TOKEN = re.compile(r"^(https?:/+)[^/?#@]+@", re.I)
_VALUE = re.compile(r"([?&;#][^=&;#]+=)(?!(?:\d{1,9}|true|false)(?:[&;#]|$))[^&;#]+", re.I)


def without_credentials(text: str) -> str:
    """`text` with the credentials in all of its addresses hidden."""
    return _ADDRESS.sub(lambda found: _hide(found[0]), text) if ":/" in text else text


def stay_in(path: str) -> bool:
    """Whether a file system left the credentials of an address in the path it made of it: its kind takes none."""
    address = f"address://{path.lstrip('/')}"
    return without_credentials(address) != address


def _hide(address: str) -> str:
    for pattern, shown in ((_PASSWORD, rf"\1{_HIDDEN}@"), (_TOKEN, rf"\1{_HIDDEN}@"), (_VALUE, rf"\1{_HIDDEN}")):
        address = pattern.sub(shown, address)
    return address


def are_hidden(text: str) -> bool:
    """Whether credentials were taken out of an address in `text`, so that nothing can be reached by it."""
    return any(mark in found[0] for found in _ADDRESS.finditer(text) for mark in (f"/{_HIDDEN}@", f"={_HIDDEN}"))
