"""How a checkpoint fits a run: settings both must share, and rows the model has beyond what is stored.

A vocabulary grows when special tokens are added to it, learned positions when a model is fine-tuned on
longer sequences. Stored rows go where they were; new ones keep their initial draw and empty optimizer slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lite import log
from megatron_lite.checkpoint.manifest import Manifest, config_differences
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.config import sources
from megatron_lite.config.data import DataConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.errors import CheckpointError

VOCABULARY = ("embedding.word.weight", "head.weight")
"""Parameters with a row for each token id."""

POSITIONS = ("embedding.position.weight",)
"""Parameters with a row for each position."""


def check_settings(folder: Path, manifest: Manifest, model: ModelConfig, *, finetune: bool) -> None:
    """Compare what two models compute, where tensors of equal shapes would hide it (a rotary base, say).

    Raises CheckpointError naming each field with both values; with `finetune` it warns instead.
    """
    stored = sources.from_plain(manifest.config, str(folder)).model
    before, now = stored.computation, model.computation
    named = ", ".join(
        f"{name} is {there} there and {here} here"
        for name, (there, here) in config_differences(before, now).items()
        if name in before and name in now
    )
    if not named:
        return
    if finetune:
        log.warn(f"the weights of {folder} are those of another model: {named}")
        return
    raise CheckpointError(
        f"{folder} does not fit this model: {named}. To go on with it, start with the settings it was trained with; "
        f"for a new run, give another --save folder; to begin with its weights, --load it with --finetune."
    )


def tell_changes(folder: Path, manifest: Manifest, data: DataConfig, facts: dict[str, Any], *, finetune: bool) -> None:
    """Say where a run's tokens and tokenizer, by their fingerprints in `facts`, are not those of its checkpoint.

    Other tokens are what `finetune` is for, and not worth a word.
    """
    stored = manifest.state.get("facts", {})
    for name in ("train_data", "valid_data"):
        if stored.get(name) != facts[name] and not finetune:
            log.warn(
                f"{name.replace('_', ' ')} differs from the checkpoint's: from here on the samples are those of the "
                f"new configuration"
            )
    fingerprint = stored.get("tokenizer")
    if fingerprint in (None, facts["tokenizer"]) or facts["tokenizer"] is None:
        return
    before = sources.from_plain(manifest.config, str(folder)).data
    if build_tokenizer(dataclasses.replace(data, special_tokens=before.special_tokens)).fingerprint == fingerprint:
        changed = sorted({*data.special_tokens} ^ {*before.special_tokens})
        log.note(f"the tokenizer is the checkpoint's, but for the special tokens {', '.join(changed)}")
    else:
        log.warn(f"the tokenizer is not the one {folder} was trained with: its ids may stand for other text")


def stored_rows(
    folder: Path, manifest: Manifest, model_rows: Mapping[str, int], *, positions_may_grow: bool
) -> dict[str, int]:
    """Parameter name -> rows that the checkpoint holds, of the parameters that have more here; said in the log.

    `model_rows` are `GPT.rows`. Every rank gets the same. Raises CheckpointError where rows would be lost, and where
    positions would grow and may not.
    """
    shapes = {name.removeprefix("weight/"): tensor.shape for name, tensor in manifest.tensors.items()}
    return rows_of(folder, shapes, model_rows, positions_may_grow=positions_may_grow)


def rows_of(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], model_rows: Mapping[str, int], *, positions_may_grow: bool
) -> dict[str, int]:
    """As `stored_rows`, of parameters of these shapes."""
    grown: dict[str, int] = {}
    for name, here in model_rows.items():
        if name not in shapes:
            continue
        there = shapes[name][0]
        if name in VOCABULARY and there > here:
            raise CheckpointError(
                f"{folder} has {there:,} token ids and this model {here:,}: a vocabulary can grow, not shrink; give "
                f"--vocab-size {there}, or the tokenizer and --special-tokens it was trained with"
            )
        if name in POSITIONS and there != here and not (positions_may_grow and there < here):
            longer = ", or --finetune to begin with untrained vectors for the others" if there < here else ""
            raise CheckpointError(
                f"{folder} has learned {there:,} positions and this model has {here:,}; give "
                f"--max-position-embeddings {there}{longer}"
            )
        if there < here:
            grown[name] = there
            log.note(
                f"{name} grows from {there:,} to {here:,} rows: {here - there:,} begin with their initial draw, and "
                f"with no optimizer state"
            )
    return grown


def within_stored_rows(pieces: Sequence[Piece], rows: dict[str, int]) -> list[Piece]:
    """`pieces` as parts of the stored tensors: those of `stored_rows` cut behind the last stored row."""
    fitting = []
    for piece in pieces:
        _, _, name = piece.name.partition("/")
        if name not in rows:
            fitting.append(piece)
        elif (held := rows[name] - piece.global_start[0]) > 0:
            shape = (rows[name], *piece.global_shape[1:])
            fitting.append(dataclasses.replace(piece, global_shape=shape, tensor=piece.tensor[:held]))
    return fitting
