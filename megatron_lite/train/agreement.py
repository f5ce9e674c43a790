"""What all ranks have alike before the first step: compared by hashes, told by ranks and values where it differs."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite import log
from megatron_lite.checkpoint.ranks import Ranks
from megatron_lite.config.run import RunConfig
from megatron_lite.config.sources import values_of
from megatron_lite.errors import UserError
from megatron_lite.kernels import extension, operators
from megatron_lite.monitor.versions import versions
from megatron_lite.parallel.mesh_shape import ranks_text
from megatron_lite.train.build import alike

CLOCK_SECONDS = 5.0
"""How far clocks may be apart without a warning."""
_SHOWN = 12
"""Lines of a table."""
_VARIANTS = 4
"""Columns of a table."""
#: Paths, which may be other ones on other nodes: what the files hold is compared.
_PLACES = {
    *("run_dir", "tensorboard_dir", "wandb_save_dir", "deepspeed_config", "data_path", "train_data_path"),
    *("valid_data_path", "test_data_path", "tokenizer_model", "vocab_file", "merge_file"),
}
_ROOT = Path(__file__).resolve().parents[2]


class Fact(NamedTuple):
    """Something a rank has, of a kind that is compared as one."""

    kind: str
    name: str
    value: str
    must_agree: bool = True


def agree(ranks: Ranks, facts: Iterable[Fact]) -> None:
    """Compare the facts of all ranks. Those that may differ are a warning; others raise UserError, on all ranks.

    Two digests a kind are exchanged, and facts only of kinds that differ, by one rank of each variant.
    """
    by_kind: dict[str, dict[str, str]] = defaultdict(dict)
    for kind, name, value, must_agree in facts:
        by_kind[f"{kind} {'must' if must_agree else 'may'}"][name] = value
    digests = ranks.gather_json({kind: _digest(values) for kind, values in sorted(by_kind.items())})
    variants = {kind: _variants([told.get(kind, "") for told in digests]) for kind in sorted(set().union(*digests))}
    differing = {kind: found for kind, found in variants.items() if len(found) > 1}
    if not differing:
        return
    mine = {kind: by_kind[kind] for kind, found in differing.items() if ranks.global_rank in (who[0] for who in found)}
    told = ranks.gather_json(mine)
    tables = {"must": "", "may": ""}
    for kind, found in differing.items():
        tables[kind.rpartition(" ")[2]] += _table(found, [told[who[0]].get(kind, {}) for who in found])
    if tables["may"]:
        log.warn(f"the ranks differ in what may be so on purpose:{tables['may']}")
    if tables["must"]:
        with alike():
            raise UserError(
                f"the ranks are not alike, and would not train one model:{tables['must']}\nGive all of them the same "
                "command, files and installation"
            )


def compare_clocks(ranks: Ranks) -> None:
    """Warn where clocks are far apart: logs of ranks then cannot be read side by side."""
    ranks.gather_json(None)  # so that all of them look at the same moment
    times = ranks.gather_json(time.time())
    middle = statistics.median(times)
    apart = {rank: there - middle for rank, there in enumerate(times) if abs(there - middle) > CLOCK_SECONDS}
    if apart:
        worst = max(apart, key=lambda rank: abs(apart[rank]))
        log.warn(
            f"the clocks of {ranks_text(apart)} are more than {CLOCK_SECONDS:g} s away from the others' (rank {worst}: "
            f"{apart[worst]:+.1f} s); times in logs and files of different ranks cannot be compared"
        )


def agree_on_launch(ranks: Ranks, config: RunConfig) -> None:
    """Compare what every rank was started with, as early as ranks can speak: before they make groups by it."""
    compare_clocks(ranks)
    agree(ranks, of_launch(config))


def of_launch(config: RunConfig) -> Iterator[Fact]:
    """What a rank was started with: configuration, code, libraries."""
    for name, value in values_of(config).items():
        yield Fact("configuration", f"--{name.replace('_', '-')}", json.dumps(value), name not in _PLACES)
    for name in ("deepspeed_config", "pipeline_schedule"):
        path = getattr(config.parallel, name)
        if path is not None and Path(path).is_file():
            yield Fact("configuration", f"what --{name.replace('_', '-')} holds", _hash(Path(path).read_bytes()))
    for path in _sources():
        yield Fact("code", str(path.relative_to(_ROOT)), _hash(path.read_bytes()))
    found = versions()
    yield Fact("libraries", "python", ".".join(platform.python_version_tuple()[:2]))
    for name, version in found.items():
        if name != "devices":
            yield Fact("libraries", name, str(version), name in ("torch", "deepspeed"))


def of_kernels(device: torch.device) -> Iterator[Fact]:
    """Which operators are native on a device, and what else the last bits depend on."""
    for name in sorted(operators.OPERATORS):
        yield Fact("kernels", name, "native" if operators.native(name, device.type) else "plain torch")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    yield Fact("devices", "device", name, False)
    yield Fact("devices", "kernels", extension.summary(device.type), False)


def of_data(fingerprints: Mapping[str, Any]) -> Iterator[Fact]:
    """What identifies the samples and their tokenizer."""
    for name, fingerprint in fingerprints.items():
        yield Fact("data", name, json.dumps(fingerprint, sort_keys=True))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _sources() -> list[Path]:
    found = [*(_ROOT / "megatron_lite").rglob("*.py"), *(_ROOT / "csrc").rglob("*.*"), _ROOT / "pretrain_gpt.py"]
    return sorted(path for path in found if path.is_file())


def _hash(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def _digest(values: Mapping[str, str]) -> str:
    return _hash(json.dumps(values, sort_keys=True).encode())


def _variants(digests: list[str]) -> list[list[int]]:
    """The ranks of each variant, the most common ones first."""
    found: dict[str, list[int]] = defaultdict(list)
    for rank, digest in enumerate(digests):
        found[digest].append(rank)
    return sorted(found.values(), key=lambda who: (-len(who), who[0]))


def _table(variants: list[list[int]], values: list[Mapping[str, str]]) -> str:
    """The lines of a kind: names, and the values of each variant in a column."""
    names = [
        name for name in sorted(set().union(*values)) if len({variant.get(name, "none") for variant in values}) > 1
    ]
    columns = [["", *names[:_SHOWN]]]
    for who, variant in list(zip(variants, values, strict=True))[:_VARIANTS]:
        columns.append([ranks_text(who), *(_short(variant.get(name, "none")) for name in names[:_SHOWN])])
    widths = [max(map(len, column)) for column in columns]
    rows = zip(
        *([cell.ljust(width) for cell in column] for column, width in zip(columns, widths, strict=True)), strict=True
    )
    lines = ["  ".join(row) for row in rows]
    if (more := len(names) - _SHOWN) > 0:
        lines.append(f"... and {more} more")
    if (more := len(variants) - _VARIANTS) > 0:
        lines.append(f"... and {more} more variants")
    return "".join(f"\n  {line.rstrip()}" for line in lines)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:36]} ..."
