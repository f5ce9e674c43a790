"""Makes the token sets in this folder with the writer of megatron-core, which is what our files are compared with.

pip install --no-deps megatron-core==0.16.1
python tests/data/megatron_core/make.py
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

FOLDER = Path(__file__).parent
DOCUMENTS = ([[5, 1, 65498]], [[7]], [], [[2, 2], [3], [4, 4, 4]], [[0]])
"""The ids of each document's sequences."""
DTYPES = {"uint16": np.uint16, "int32": np.int32, "uint8": np.uint8, "int64": np.int64, "float32": np.float32}
MODES = [0, 1, 1, 0, 2, 0]


@functools.cache
def indexed_dataset() -> ModuleType:
    """megatron-core's module of that name without the packages around it, which want a GPU's libraries.

    Raises ModuleNotFoundError where megatron-core is not installed.
    """
    spec = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    if spec is None:
        raise ModuleNotFoundError("megatron-core is not installed")
    core = Path(spec.submodule_search_locations[0])
    for name, folder in (("megatron.core", core), ("megatron.core.datasets", core / "datasets")):
        bare = ModuleType(name)
        bare.__path__ = [str(folder)]
        sys.modules.setdefault(name, bare)
    logging = ModuleType("megatron.core.utils")
    logging.log_single_rank = lambda *arguments, **options: None
    sys.modules.setdefault("megatron.core.utils", logging)
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


def ids(dtype: str) -> list[list[list[int]]]:
    """`DOCUMENTS` with ids that the dtype holds."""
    largest = 255 if dtype == "uint8" else 65498
    return [[[min(id, largest) for id in sequence] for sequence in document] for document in DOCUMENTS]


def make(folder: Path) -> None:
    """Write PREFIX.bin and PREFIX.idx for every dtype, one set with modes, and one of uint16 merged with itself."""
    module = indexed_dataset()
    for dtype, kind in DTYPES.items():
        builder = module.IndexedDatasetBuilder(f"{folder / dtype}.bin", dtype=kind)
        for document in ids(dtype):
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
        builder.finalize(f"{folder / dtype}.idx")
    builder = module.IndexedDatasetBuilder(f"{folder / 'modes'}.bin", dtype=np.uint16, multimodal=True)
    modes = iter(MODES)
    for document in ids("uint16"):
        for sequence in document:
            builder.add_item(torch.tensor(sequence), next(modes))
        builder.end_document()
    builder.finalize(f"{folder / 'modes'}.idx")
    builder = module.IndexedDatasetBuilder(f"{folder / 'merged'}.bin", dtype=np.uint16)
    for _ in range(2):
        builder.add_index(str(folder / "uint16"))
    builder.finalize(f"{folder / 'merged'}.idx")


if __name__ == "__main__":
    make(FOLDER)
