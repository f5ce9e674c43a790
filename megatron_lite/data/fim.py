"""Fill-in-the-middle: some documents become prefix, suffix and middle, so that a model learns to fill in.

Bavarian et al. 2022, "Efficient training of language models to fill in the middle".
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_lite.config.mixture import MixtureConfig
from megatron_lite.data.order import keys, scramble
from megatron_lite.data.sample import Sample
from megatron_lite.data.stream import Origin, SampleStream, fingerprint_of
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import ConfigError
from megatron_lite.kernels import host

_SENTINELS = 3
_DRAWS = 4


@dataclasses.dataclass(frozen=True)
class Sentinels:
    """Ids of the tokens before prefix, middle and suffix, and of those that stay around a document."""

    prefix: int
    middle: int
    suffix: int
    bos: int | None
    eod: int | None


def sentinels(data: MixtureConfig, tokenizer: Tokenizer | None) -> Sentinels:
    """The ids that a tokenizer has for the sentinels' names. Raises ConfigError where it has none."""
    names = {
        "prefix": data.fim_prefix_token,
        "middle": data.fim_middle_token,
        "suffix": data.fim_suffix_token,
    }
    specials = {} if tokenizer is None else tokenizer.special_tokens
    missing = [name for name in names.values() if name not in specials]
    if missing:
        quoted = " ".join(f"'{name}'" for name in missing)
        raise ConfigError(
            f"fim_rate={data.fim_rate} needs the special tokens {quoted}, and the tokenizer has "
            f"{', '.join(list(specials)[:12]) or 'none'}; add them by --special-tokens {quoted}, or name others by "
            "--fim-prefix-token, --fim-middle-token and --fim-suffix-token."
        )
    ids = {role: specials[name] for role, name in names.items()}
    if len(set(ids.values())) < len(ids):
        raise ConfigError(
            f"fim_prefix_token, fim_middle_token and fim_suffix_token are {', '.join(names.values())}: "
            "they must differ."
        )
    return Sentinels(**ids, bos=tokenizer.bos, eod=tokenizer.eod)


class FimStream:
    """A stream whose documents, or the pieces of them in a sample, are permuted with a probability of `fim_rate`.

    Prefix-suffix-middle: <prefix> prefix <suffix> suffix <middle> middle. With `fim_spm_rate` of those
    suffix-prefix-middle in the paper's second variant: <prefix> <suffix> suffix <middle> prefix middle.
    The two cuts are even over the tokens. A piece keeps its length and place: its last three tokens give
    way to the sentinels, ahead of an end-of-document token, which stays last as a begin-of-text token
    stays first. Pieces shorter than four tokens, and those of which a token does not count, stay as they are.
    All is arithmetic on the name (seed and split) and the number of the sample in the stream. csrc/host/fill_in.h
    makes the same tokens, twenty times as fast, and is used where it is compiled.
    """

    def __init__(self, stream: SampleStream, data: MixtureConfig, ids: Sentinels, *name: int | str):
        self._stream = stream
        self._data = data
        self._rates = [int(rate * (1 << 32)) for rate in (data.fim_rate, data.fim_spm_rate)]
        self._packed = data.data_packing != "none"
        self._ids = ids
        self._name = name
        self._keys = keys(3, "fim", *name)
        self.samples_per_epoch = stream.samples_per_epoch
        self.ends_after = stream.ends_after
        compiled = host.module()
        self._compiled = compiled and compiled.FillIn(*self._rates, self._packed, *dataclasses.astuple(ids), self._keys)

    def __reduce__(self) -> tuple:
        return FimStream, (self._stream, self._data, self._ids, *self._name)

    @property
    def fingerprint(self) -> str:
        """Differs when the data, their cutting or their order differ."""
        return fingerprint_of("fim", self._name, self._rates, dataclasses.astuple(self._ids), self._stream.fingerprint)

    def __getitem__(self, number: int) -> Sample:
        sample = self._stream[number]
        tokens = self._room_for_ids(sample.tokens)
        permute = self._compiled or self._permute
        changed = permute(number, tokens, sample.starts, sample.counts)
        return Sample(tokens, sample.starts, sample.counts) if changed else sample

    def _permute(self, number: int, tokens: np.ndarray, starts: np.ndarray, counts: np.ndarray | None) -> bool:
        """Permute the pieces of a sample in place; whether any changed."""
        rate, spm_rate = self._rates
        draws = self._draws(number, len(starts))
        bounds = [*starts.tolist(), len(tokens)]
        changed = False
        for piece in np.flatnonzero(draws[:, 0] < rate).tolist():
            start, stop = bounds[piece : piece + 2]
            # The first token of a packed document never counts, whatever its mask says.
            if stop - start > _SENTINELS and (counts is None or counts[start + self._packed : stop].all()):
                _, spm, first_cut, second_cut = draws[piece].tolist()
                changed |= self._permute_piece(tokens[start:stop], spm < spm_rate, first_cut, second_cut)
        return changed

    def _room_for_ids(self, tokens: np.ndarray) -> np.ndarray:
        """A copy, as int64 where the sentinels are no ids of the file's dtype."""
        largest = max(self._ids.prefix, self._ids.middle, self._ids.suffix)
        return tokens.astype(tokens.dtype if largest <= np.iinfo(tokens.dtype).max else np.int64)

    def _draws(self, number: int, pieces: int) -> np.ndarray:
        """uint64 [pieces, 4], each of 32 bits."""
        low, high, of_position = self._keys
        own = scramble(scramble(number & 0xFFFFFFFF, low) ^ (number >> 32), high)
        return scramble(scramble(np.arange(_DRAWS * pieces, dtype=np.uint64), of_position), own).reshape(-1, _DRAWS)

    def _permute_piece(self, piece: np.ndarray, spm: bool, first_cut: int, second_cut: int) -> bool:
        """Permute a piece in place, cut where two draws of 32 bits say; whether it is long enough to be."""
        ids = self._ids
        body = piece[int(piece[0] == ids.bos) : len(piece) - int(piece[-1] == ids.eod)]
        length = len(body) - _SENTINELS
        if length < 1:
            return False
        cuts = sorted((draw * (length + 1)) >> 32 for draw in (first_cut, second_cut))
        prefix, middle, suffix = np.split(body[:length].copy(), cuts)
        if spm:
            body[:] = np.concatenate(([ids.prefix, ids.suffix], suffix, [ids.middle], prefix, middle))
        else:
            body[:] = np.concatenate(([ids.prefix], prefix, [ids.suffix], suffix, [ids.middle], middle))
        return True

    def origin(self, sample: int) -> Origin:
        """Where the tokens of a sample come from, in their order before they were permuted."""
        return self._stream.origin(sample)

    def changes(self, first: int, stop: int) -> list[str]:
        """Lines for the log about what the samples `first` to `stop` changed: epochs that began, other weights."""
        return self._stream.changes(first, stop)

    def describe(self) -> list[str]:
        """Lines for the log, derived numbers as sums."""
        rate, spm_rate = (rate / (1 << 32) for rate in self._rates)
        return [
            *self._stream.describe(),
            f"{rate:.1%} of the documents are to be filled in: {rate * (1 - spm_rate):.1%} as prefix, suffix, middle, "
            f"{rate * spm_rate:.1%} as suffix, prefix, middle",
        ]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if the data hold a token id that the vocabulary has not."""
        self._stream.check_vocabulary(vocab_size)
