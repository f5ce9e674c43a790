"""Tokenizers learned from text: byte-level BPE (Sennrich et al. 2016) and SentencePiece."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from megatron_lite.data.indexed import MOST_IDS
from megatron_lite.data.text_blocks import Limit, limited, read_blocks
from megatron_lite.data.text_documents import BadDocument, parse_block
from megatron_lite.data.text_input import Source
from megatron_lite.data.text_progress import TextProgress
from megatron_lite.data.text_sample import TextSample
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import DataError, TokenizerError

END_OF_DOCUMENT = "<|endoftext|>"
_PIECE_CHARACTERS = 8192
_HELD_OUT_EVERY = 20
_HELD_OUT_BYTES = 8 << 20
_SENTENCEPIECE_OWN = ("<unk>", "<s>", "</s>")
_SENTENCEPIECE_THREADS = 8  # fixed: sums in another order would be another model


class TrainingText:
    """A sample of the text of some sources in pieces of some lines, some of it kept apart to measure on.

    A piece has 8,192 characters and what is left of a line, at most as many again: one large file has many. Every
    twentieth is for `held_out`, the others are for training; of both, a uniform sample of at most 8 MiB and of
    `most_bytes` is kept in memory. The sources are read when it is made, which raises DataError for a document that
    cannot be used, unless `skip_bad`; then `skipped` counts them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        keys: Sequence[str],
        progress: TextProgress,
        skip_bad: bool,
        limit: Limit,
        most_bytes: int,
    ):
        self._sources, self._keys, self._progress, self._skip_bad = sources, keys, progress, skip_bad
        self._limit = limit
        self.skipped = 0
        self.training, self.held_out = TextSample(most_bytes), TextSample(_HELD_OUT_BYTES)
        for index, piece in enumerate(self._pieces()):
            kept = self.held_out if index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 else self.training
            kept.add(piece)

    def _pieces(self) -> Iterator[str]:
        blocks = itertools.chain.from_iterable(read_blocks(source, fields=self._keys) for source in self._sources)
        for block in limited(blocks, self._limit):
            documents = text_bytes = 0
            for document in parse_block(block, self._keys):
                if isinstance(document, BadDocument):
                    self._refuse(block.source, document)
                    continue
                documents += 1
                for text in document:
                    text_bytes += len(text.encode())
                    yield from _cut(text)
            self._progress.add(block.read, documents, text_bytes)

    def _refuse(self, source: Source, bad: BadDocument) -> None:
        if not self._skip_bad:
            raise DataError(
                f"{source.place(bad.line)}: {bad.reason}: {bad.detail}. Mend it, or leave such documents out "
                "by --on-error skip"
            )
        self.skipped += 1


def _cut(text: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _PIECE_CHARACTERS):
            part = line[start : start + _PIECE_CHARACTERS]
            lines.append(part)
            size += len(part)
            if size >= _PIECE_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def insist_on_size(kind: Literal["bpe", "sentencepiece"], vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise TokenizerError for a vocabulary that has no room for bytes and special tokens, or too many ids."""
    specials = _bpe_specials(special_tokens) if kind == "bpe" else _sentencepiece_specials(special_tokens)
    if vocab_size > MOST_IDS:
        raise TokenizerError(f"--vocab-size {vocab_size:,} is more than {MOST_IDS:,} ids; give at most that")
    least = 256 + len(specials)
    if vocab_size < least:
        raise TokenizerError(
            f"--vocab-size {vocab_size} is below {least} = 256 bytes + {len(specials)} special tokens; give more"
        )


def _bpe_specials(special_tokens: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([END_OF_DOCUMENT, *special_tokens]))


def _sentencepiece_specials(special_tokens: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*_SENTENCEPIECE_OWN, *special_tokens]))


def train_bpe(text: TrainingText, vocab_size: int, special_tokens: Sequence[str], show_progress: bool = False) -> str:
    """A byte-level BPE with GPT-2's cut of words, as the content of a tokenizer.json.

    <|endoftext|> (id 0) and `special_tokens` come first, then the 256 bytes, then merges. Text that
    repeats too little gives a smaller vocabulary. The same text gives the same bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_bpe_specials(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    library.train_from_iterator(iter(text.training), trainer)
    return library.to_str(pretty=True)


def train_sentencepiece(
    text: TrainingText,
    vocab_size: int,
    special_tokens: Sequence[str],
    model_type: Literal["unigram", "bpe"] = "unigram",
) -> bytes:
    """A SentencePiece .model that gives back every text unchanged: no normalisation, bytes for rare characters.

    <unk>, <s> and </s> are 0 to 2, then `special_tokens`. The same text gives the same bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.training),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            control_symbols=_sentencepiece_specials(special_tokens)[len(_SENTENCEPIECE_OWN) :],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            max_sentence_length=1 << 30,
            num_threads=_SENTENCEPIECE_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from None
    return model.getvalue()


def _explained(error: RuntimeError, vocab_size: int) -> TokenizerError:
    if most := re.search(r"value <= (\d+)", str(error)):
        return TokenizerError(
            f"--vocab-size {vocab_size} is more than this text gives; choose {most[1]} or less, or train on more text"
        )
    if least := re.search(r"required_chars. \d+ vs (\d+)", str(error)):
        return TokenizerError(
            f"--vocab-size {vocab_size} is too small for this text's characters; choose {least[1]} or more"
        )
    return TokenizerError(f"SentencePiece cannot be trained on this text: {error}")


def bytes_per_token(tokenizer: Tokenizer, sample: TextSample) -> float:
    """UTF-8 bytes that a token stands for on average."""
    return sample.bytes / max(sum(len(tokenizer.encode_block([text])[0]) for text in sample), 1)
