"""A Hugging Face model folder: config.json and safetensors files, with an index where there are several.

Nothing in it is trusted: names are plain file names, links lead nowhere else (but to the blobs of a hub cache), sizes
are bounded, headers are checked, and no pickle is read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_lite.checkpoint import foreign, huggingface_names
from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.ranks import RankFailures, Ranks, together
from megatron_lite.checkpoint.tensor_file import FileTensor, TensorFile
from megatron_lite.config.huggingface import CONFIG, inside, read_config, read_json
from megatron_lite.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_MAX_FILES = 4096
_COMPARED_NUMBERS = 2**24
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


def is_folder(path: Path) -> bool:
    """Whether a folder is one of Hugging Face's, by its config.json."""
    return (path / CONFIG).is_file()


class HuggingFaceFolder(contextlib.AbstractContextManager):
    """The weights of a folder, under their names and, as `links`, as ours. A `foreign.Source`.

    Raises CheckpointError for a folder that is not whole, that holds another model than config.json says, or whose
    weights are pickles.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        self.name = str(self.folder)
        self._opened: dict[str, TensorFile] = {}
        try:
            self.described = read_config(self.folder)
            self._file_of = self._weight_map()
            model = self.described.model
            self.links = foreign.by_ours(
                huggingface_names.links(
                    model,
                    self.described.family,
                    vocab_size=model.vocab_size,
                    positions=model.max_position_embeddings,
                    stored=self._file_of,
                )
            )
            wanted = foreign.their_shapes(link for parts in self.links.values() for link in parts)
            tied = not model.untie_embeddings_and_output_weights
            foreign.compare_shapes(
                self.name,
                {name: self._tensor(name).shape for name in self._file_of},
                wanted,
                lambda name: huggingface_names.is_idle(name, tied=tied),
            )
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._opened.values():
            file.__exit__(None, None, None)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our parameter names -> shapes."""
        return {name: foreign.shape_of(parts) for name, parts in self.links.items()}

    @property
    def tensors(self) -> dict[str, tuple[FileTensor, str]]:
        """Every stored tensor, idle ones too, and its file."""
        return {name: (self._tensor(name), file) for name, file in self._file_of.items()}

    def dtype(self, theirs: str) -> str:
        return self._tensor(theirs).dtype

    def read(self, theirs: str, rectangle: Rectangle, into: torch.Tensor) -> None:
        self._file(self._file_of[theirs]).read(theirs, rectangle, into)

    def insist_on_tied_head(self) -> None:
        """Raise CheckpointError for a head that is stored, and said to be the embedding, but is another weight.

        Reads both where there is one, some rows at a time.
        """
        head = huggingface_names.HEAD
        if self.described.model.untie_embeddings_and_output_weights or head not in self._file_of:
            return
        (embedding,) = self.links["embedding.word.weight"]
        rows, width = embedding.shape
        same, stride = self._tensor(head).shape == embedding.shape, max(1, _COMPARED_NUMBERS // width)
        dtype = foreign.widest(map(self.dtype, (head, embedding.theirs)))
        for first in range(0, rows if same else 0, stride):
            part = Rectangle((first, 0), (min(stride, rows - first), width))
            read = [torch.empty(part.shape, dtype=dtype) for _ in range(2)]
            for name, into in zip((head, embedding.theirs), read, strict=True):
                self.read(name, part, into)
            same = same and torch.equal(*(values.view(torch.uint8) for values in read))
        if not same:
            raise CheckpointError(
                f"{self.folder} has a {head} that differs from {embedding.theirs}, but by its {CONFIG} they are one; "
                f'to use both, as transformers does, write "tie_word_embeddings": false into it'
            )

    def _tensor(self, name: str) -> FileTensor:
        return self._file(self._file_of[name]).tensors[name]

    def _file(self, name: str) -> TensorFile:
        if name not in self._opened:
            self._opened[name] = TensorFile(inside(self.folder, name))
        return self._opened[name]

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> file."""
        if not (self.folder / INDEX).exists():
            if not (self.folder / WEIGHTS).exists():
                raise CheckpointError(f"{self.folder} holds neither {WEIGHTS} nor {INDEX}{self._pickles()}")
            return dict.fromkeys(self._file(WEIGHTS).tensors, WEIGHTS)
        content = read_json(self.folder, INDEX)
        stated = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(stated, dict) or not stated:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map")
        files = set(map(str, stated.values()))
        if len(files) > _MAX_FILES or not all(_FILE_NAME.fullmatch(name) for name in files):
            wrong = next((name for name in files if not _FILE_NAME.fullmatch(name)), f"{len(files)} files")
            raise CheckpointError(
                f"{self.folder / INDEX} names {wrong[:80]!r}, which is no plain name of a safetensors file"
            )
        held = {name: file for file in sorted(files) for name in self._file(file).tensors}
        if held != stated:
            wrong = sorted(held.items() ^ stated.items())[0][0]
            raise CheckpointError(f"{self.folder / INDEX} and the files differ on where {wrong[:80]} lies")
        return held

    def _pickles(self) -> str:
        if not [*self.folder.glob("pytorch_model*.bin")]:
            return ""
        return (
            ", but pytorch_model*.bin, which are pickles and are not read; convert them where they are trusted, by "
            "transformers' save_pretrained"
        )


def load_weights(folder: HuggingFaceFolder, pieces: Sequence[Piece], ranks: Ranks) -> None:
    """Write a folder's weights into `pieces` in place, whatever their dtype; each rank reads what it needs.

    All ranks call. Raises CheckpointError on all alike.
    """
    try:
        together(ranks, lambda: foreign.fill_pieces(folder, folder.links, pieces))
    except RankFailures as failures:
        raise CheckpointError(f"{folder.name} cannot be loaded: {failures}") from failures
