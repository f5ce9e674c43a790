"""SentencePiece models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import TokenizerError

_PROBE = "  The quick—brown\tfox:\n\n１２３ ½ ﬁne, e\u0301 日本 \u00a0!  "
"""Text whose ids differ between the kinds of model, and between normalisation and white space rules."""


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a SentencePiece .model (Kudo and Richardson 2018).

    Its control pieces (<s>, </s>, ...) are the special tokens; user-defined pieces are text.
    """

    kind = "SentencePieceTokenizer"
    library = "sentencepiece"

    def __init__(self, model: bytes, source: str):
        self._library = sentencepiece.SentencePieceProcessor()
        try:
            self._library.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise TokenizerError(f"{source} is not a SentencePiece model: {error}") from None
        size = self._library.get_piece_size()
        specials = {self._library.id_to_piece(id): id for id in range(size) if self._library.is_control(id)}
        roles = {role: getattr(self._library, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
        super().__init__(size, specials, {role: id for role, id in roles.items() if id >= 0})

    @classmethod
    def from_path(cls, path: Path) -> SentencePieceTokenizer:
        """Load a .model file."""
        return cls(path.read_bytes(), str(path))

    def _encode_texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return self._library.encode(list(texts), out_type=int, num_threads=1)

    def _decode_ids(self, ids: list[int]) -> str:
        return self._library.decode(ids)

    def _base_token(self, id: int) -> str | None:
        return self._library.id_to_piece(id) if id < self._base_size else None

    def _base_id(self, token: str) -> int | None:
        # The library answers with the id of <unk> for a piece it does not have.
        id = self._library.piece_to_id(token)
        return id if self._library.id_to_piece(id) == token else None

    def _content(self) -> Any:
        # The file also holds how and from what it was trained, so not its bytes: the pieces, and what
        # the segmentation makes of a probe.
        kinds = ("is_control", "is_unknown", "is_byte", "is_unused")
        pieces = [
            [
                self._library.id_to_piece(id),
                self._library.get_score(id),
                *(getattr(self._library, k)(id) for k in kinds),
            ]
            for id in range(self._base_size)
        ]
        return {"pieces": pieces, "probe": self._library.encode(_PROBE)}
