"""Damage to files: of bytes, of numbers in them, and of the structure of JSON. All of it follows from a seed."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

_BYTES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\n", b'"', b"{", b"[", b"\\", b"-", b"1" * 400, b"\xed\xa0\x80")
_NUMBERS = (0, 1, -1, 127, 255, 256, 65_535, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, -(2**63), 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *_NUMBERS,
    *(
        None,
        True,
        False,
        1e308,
        1.5,
        -0.0,
        10**400,
        "",
        "x" * 5_000,
        "../../etc/passwd",
        "/etc/passwd",
        "\x00",
        "ß\u2028",
    ),
    *([], {}, [[]], [0, 0, 0], {"": 0}),
)
_DEEP = 3_000


def mutated_bytes(raw: bytes, draw: random.Random) -> bytes:
    """`raw` after one to four of: a bit flipped, bytes replaced, cut, inserted, doubled, or a number written over."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(raw) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0 if at < len(raw):
                raw = raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]
            case 1:
                raw = raw[:at] + draw.choice(_BYTES) + raw[at + length :]
            case 2:
                raw = raw[:at]
            case 3:
                raw = raw[:at] + draw.randbytes(length) + raw[at:]
            case 4:
                other = draw.randrange(len(raw) + 1)
                raw = raw[:at] + raw[other : other + length] + raw[at:]
            case 5:
                raw = raw[:at] + raw[at + length :]
            case _:
                code = draw.choice("bhiqBHIQ")
                number = draw.choice(_NUMBERS) & (1 << 8 * struct.calcsize(code)) - 1
                raw = raw[:at] + struct.pack(f"<{code.upper()}", number) + raw[at + struct.calcsize(code) :]
    return raw


def mutated_text(raw: bytes, draw: random.Random) -> bytes:
    """Text after one to four of its words were replaced, left out, doubled or swapped; at times its bytes too."""
    if draw.random() < 0.3:
        return mutated_bytes(raw, draw)
    words = raw.decode(errors="replace").splitlines(keepends=True)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not words:
            break
        at, other = draw.randrange(len(words)), draw.randrange(len(words))
        match draw.randrange(5):
            case 0:
                del words[at]
            case 1:
                words.insert(at, words[other])
            case 2:
                words[at], words[other] = words[other], words[at]
            case 3:
                head, separator, _ = words[at].partition(": ")
                words[at] = f"{head}{separator}{draw.choice(_VALUES)!s}\n"
            case _:
                parts = words[at].split(",")
                parts[draw.randrange(len(parts))] = str(draw.choice(_VALUES))
                words[at] = ",".join(parts)
    return "".join(words).encode(errors="replace")


def mutated_json(content: Any, draw: random.Random) -> Any:
    """A copy of parsed JSON in which one to three values, or keys, are others, missing, doubled or nested deeply."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holders = list(_holders(content))
        if not holders:
            return copy.deepcopy(draw.choice(_VALUES))
        holder = draw.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = draw.choice(keys)
        match draw.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other = draw.choice(list(_holders(content)))
                holder[key] = copy.deepcopy(draw.choice(list(other.values() if isinstance(other, dict) else other)))
            case 2 if isinstance(holder, dict):
                holder[draw.choice(("", "x", "../x", "y" * 600, "__metadata__"))] = holder.pop(key)
            case 3 if isinstance(holder, list):
                holder.insert(key, holder[key])
            case 4 if type(holder[key]) is int:
                holder[key] += draw.choice((-1, 1, -8, 8, 2**31, -(2**53)))
            case _:
                holder[key] = copy.deepcopy(draw.choice(_VALUES))
    return content


def as_json(content: Any, draw: random.Random) -> bytes:
    """Its text, rarely with something in it that no value turns into: deep nesting, NaN, a key twice."""
    text = json.dumps(content)
    match draw.randrange(40):
        case 0:
            text = text.replace("0", "[" * _DEEP + "]" * _DEEP, 1)
        case 1:
            text = text.replace("1", draw.choice(("NaN", "Infinity", "-Infinity", "1e999", "1" * 5_000)), 1)
        case 2:
            text = text[:1] + text[1:-1] + ("," if len(text) > 2 else "") + text[1:]
    return text.encode()


def _holders(content: Any):
    """Every object and list in it that is not empty."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)) and value:
            yield value
            waiting.extend(value.values() if isinstance(value, dict) else value)
