"""A run that begins with a Hugging Face model, at any layout."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_lite import log
from megatron_lite.checkpoint.huggingface import HuggingFaceFolder, load_weights
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build, checkpoint_fit
from megatron_lite.train.engine_interface import Engine


def begin_with(path: str, mesh: ProcessMesh, engine: Engine) -> str:
    """Write the weights of a folder into the masters of an engine, each rank its own part, and tell their family.

    All ranks call. Rows of token ids and positions that the folder has not keep their initial draw. Raises
    CheckpointError, on all ranks alike, for a folder that holds another model or is not whole.
    """
    with contextlib.ExitStack() as held:
        folder = build.together(mesh, lambda: held.enter_context(HuggingFaceFolder(path)))
        build.together(mesh, lambda: folder.insist_on_tied_head() if mesh.global_rank == 0 else None)
        rows = checkpoint_fit.rows_of(Path(path), folder.shapes, engine.module.rows, positions_may_grow=True)
        load_weights(folder, checkpoint_fit.within_stored_rows(engine.pieces(optimizer=False), rows), mesh)
        for note in folder.described.notes:
            log.warn(note)
    engine.refresh()
    log.note(f"starting from the weights of {path}, a {folder.described.family}, at step 0")
    return folder.described.family
