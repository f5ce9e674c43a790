#!/usr/bin/env python
"""Say what is in a checkpoint or a Hugging Face folder, whether it is whole, and how it differs from another.

python tools/inspect_checkpoint.py --load runs/mine
python tools/inspect_checkpoint.py --load runs/mine --ckpt-step 500 --diff exported/mine
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lite import log
from megatron_lite.config.command_line import read
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.door import exit_code_of
from megatron_lite.parallel.launch import Launch

if TYPE_CHECKING:
    from megatron_lite.checkpoint.contents import Contents

_DIFFERENT = 1
_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What is looked at."""

    load: str
    """Folder of a run's checkpoints, of one checkpoint, or of a Hugging Face model."""
    ckpt_step: int | None = None
    """Step to look at; default: the newest."""
    tensors: bool = False
    """List every tensor: dtype, shape, bytes, rectangles, files."""
    hashes: bool = False
    """And the SHA-256 of its values, which no layout changes; reads everything."""
    verify: bool = False
    """Read everything: every byte against its checksum; of a Hugging Face folder, that all values are finite."""
    diff: str | None = None
    """Another one to compare with: settings, tensors, values. Exit code 1 where they differ. Of a checkpoint and a
    Hugging Face folder the weights are compared, by the checkpoint's names."""
    diff_step: int | None = None
    """Step of the other one; default: the newest."""
    json: bool = False
    """One JSON object instead of text."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        if self.diff_step is not None and self.diff is None:
            return [f"--diff-step {self.diff_step} is of the other one, which --diff names; give both or neither."]
        return []


def _facts(contents: Contents, options: InspectOptions) -> dict[str, Any]:
    """All that is known without looking at values, but for hashes."""
    by_kind: dict[str, dict[str, Any]] = {}
    for name, held in contents.tensors.items():
        slot, slash, _ = name.partition("/")
        kind = by_kind.setdefault(slot if slash else "weights", {"tensors": 0, "numbers": 0, "bytes": 0, "dtypes": {}})
        numbers = 1
        for length in held.shape:
            numbers *= length
        kind["tensors"] += 1
        kind["numbers"] += numbers
        kind["bytes"] += held.nbytes
        kind["dtypes"] = dict(Counter(kind["dtypes"]) + Counter({held.dtype: 1}))
    facts = {
        "path": str(contents.path),
        "kind": contents.kind,
        **contents.about,
        "config": contents.config,
        "files": dict(contents.files),
        "holds": by_kind,
    }
    if options.tensors or options.hashes:
        facts["tensors"] = {
            name: {
                "dtype": held.dtype,
                "shape": list(held.shape),
                "bytes": held.nbytes,
                "rectangles": held.boxes,
                "files": list(held.files),
                **({"sha256": contents.sha256(name)} if options.hashes else {}),
            }
            for name, held in contents.tensors.items()
        }
    return facts


def _differences(a: Contents, b: Contents) -> dict[str, Any]:
    """What sets two apart; everything empty where they are alike."""
    from megatron_lite.checkpoint.contents import compare
    from megatron_lite.checkpoint.manifest import config_differences

    names = list(a.tensors)
    if a.kind != b.kind:
        names = [name for name in names if name.startswith("weight/")]
    others = [name for name in b.tensors if a.kind == b.kind or name.startswith("weight/")]
    both = [name for name in names if name in b.tensors]
    changed: dict[str, Any] = {}
    for name in both:
        here, there = a.tensors[name], b.tensors[name]
        told: dict[str, Any] = {}
        if here.dtype != there.dtype:
            told["dtype"] = [here.dtype, there.dtype]
        if here.shape != there.shape:
            told["shape"] = [list(here.shape), list(there.shape)]
        elif difference := compare(a, b, name):
            # JSON has no infinity.
            told |= {
                what: value if math.isfinite(value) else None for what, value in dataclasses.asdict(difference).items()
            }
        if told:
            changed[name] = told
    config = {}
    if a.kind == b.kind:
        found = config_differences(dict(a.config), dict(b.config))
        config = {name: list(values) for name, values in found.items()}
    return {
        "config": config,
        "only_here": [name for name in names if name not in b.tensors],
        "only_there": [name for name in others if name not in a.tensors],
        "tensors": changed,
        "tensors_alike": len(both) - len(changed),
    }


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}"
    return f"{nbytes} bytes"


def _text(facts: dict[str, Any]) -> Iterator[str]:
    yield facts["path"]
    rows = {"kind": facts["kind"]}
    rows |= {name: str(facts[name]) for name in ("step", "layout", "family") if name in facts}
    if "steps" in facts:
        marked = f"; the best is {facts['best']}" if facts["best"] is not None else ""
        rows["steps there"] = f"{', '.join(map(str, facts['steps']))}{marked}"
    rows["files"] = f"{len(facts['files'])}, {_size(sum(facts['files'].values()))}"
    if "manifest_sha256" in facts:
        rows["manifest"] = f"sha256 {facts['manifest_sha256']}"
    versions = {
        name: text for name, text in facts.get("versions", {}).items() if name in ("python", "torch", "deepspeed")
    }
    if versions:
        rows["made with"] = ", ".join(f"{name} {text}" for name, text in versions.items())
    progress = facts.get("state", {}).get("progress", {})
    if progress:
        rows["progress"] = ", ".join(
            f"{name} {value:,}"
            for name, value in progress.items()
            if isinstance(value, int) and not isinstance(value, bool)
        )
    if "imported_from" in facts.get("state", {}):
        rows["imported from"] = facts["state"]["imported_from"]
    model = facts["config"].get("model", {})
    if model:
        rows["model"] = ", ".join(f"{name}={value}" for name, value in model.items() if value is not None)
    for name, text in rows.items():
        yield from textwrap.wrap(text, 120, initial_indent=f"  {name:<14} ", subsequent_indent=" " * 17)
    for kind, held in facts["holds"].items():
        dtypes = ", ".join(held["dtypes"])
        yield (
            f"  {kind:<14} {held['tensors']:,} tensors, {held['numbers']:,} numbers, {_size(held['bytes'])}, {dtypes}"
        )
    tensors = facts.get("tensors", {})
    width = max(map(len, tensors), default=0)
    for name, held in tensors.items():
        shape = "x".join(map(str, held["shape"])) or "one number"
        places = f"{held['rectangles']} in {', '.join(held['files'][:2])}{', ...' if len(held['files']) > 2 else ''}"
        hashed = f"  {held['sha256']}" if "sha256" in held else ""
        yield f"  {name:<{width}}  {held['dtype']:<6} {shape:>16} {_size(held['bytes']):>12}  {places}{hashed}"


def _diff_text(found: dict[str, Any], other: str) -> Iterator[str]:
    yield f"compared with {other}"
    lines = [f"  {name}: {here!r} here, {there!r} there" for name, (here, there) in found["config"].items()]
    lines += [f"  {name}: only here" for name in found["only_here"]]
    lines += [f"  {name}: only there" for name in found["only_there"]]
    for name, told in found["tensors"].items():
        parts = [
            f"{what} {here} here, {there} there"
            for what in ("dtype", "shape")
            if what in told
            for here, there in [told[what]]
        ]
        if "largest" in told:
            numbers = ("not finite" if told[what] is None else f"{told[what]:.3g}" for what in ("largest", "relative"))
            parts.append("largest difference {}, relative {}".format(*numbers))
        lines.append(f"  {name}: {'; '.join(parts)}")
    yield from lines[:_SHOWN]
    if len(lines) > _SHOWN:
        yield f"  ... and {len(lines) - _SHOWN} more (--json lists all)"
    yield f"  {found['tensors_alike']:,} tensors are alike" + ("" if lines else ", and nothing differs")


def _inspect(options: InspectOptions) -> bool:
    """Print what was asked; whether the two that were compared are alike."""
    from megatron_lite.checkpoint.contents import open_contents

    path, other = Path(options.load), None if options.diff is None else Path(options.diff)
    contents = open_contents(path, options.ckpt_step)
    facts = _facts(contents, options)
    if options.verify:
        facts["verified"] = contents.verify()
    found: dict[str, Any] = {}
    if other is not None:
        there = open_contents(other, options.diff_step)
        if contents.kind != there.kind:
            contents, there = (
                open_contents(path, options.ckpt_step, as_ours=True),
                open_contents(other, options.diff_step, as_ours=True),
            )
        found = facts["differences"] = _differences(contents, there)
    with log.reader_may_leave():
        if options.json:
            print(json.dumps(facts))
        else:
            print("\n".join(_text(facts)))
            if options.verify:
                print(f"verified: {facts['verified']}")
            if other is not None:
                print("\n".join(_diff_text(found, str(other))))
    return not any(found.get(name) for name in ("config", "only_here", "only_there", "tensors"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code: 0, 1 where two differ, 2 where something is not to be had."""
    alike = True

    def inspect(me: Launch) -> None:
        nonlocal alike
        if me.world_size > 1:
            raise ConfigError("inspect_checkpoint.py works in one process; start it by python.")
        options = read(
            InspectOptions,
            sys.argv[1:] if argv is None else argv,
            prog="inspect_checkpoint.py",
            description="Say what is in a checkpoint or Hugging Face folder, whether it is whole, how it differs.",
        )
        alike = _inspect(options)

    return exit_code_of(inspect) or (0 if alike else _DIFFERENT)


if __name__ == "__main__":
    sys.exit(main())
