"""The ladder of libraries that encode a corpus: the fastest that gives the ids of the tokenizer itself."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from megatron_lite import log
from megatron_lite.data.ordered_workers import Worker, WorkerLost, can_be_copied, interrupts_ignored
from megatron_lite.data.tokenizer_engines import Encode, Unfit
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import TokenizerError

Engine = Literal["auto", "gigatoken", "tiktoken", "tokenizers"]

WITHOUT_THREADS = ("gigatoken", "tiktoken", "numpy")
"""Libraries that start no threads as they are used here: a process that has used them can be copied."""

_LITERALS = 64
_WORDS = 512
_SAMPLE_TEXTS = 16
_SAMPLE_CHARACTERS = 2048
_HARD = (
    "",
    " ",
    "\n",
    "\t \t",
    " leading, double  and trailing ",
    "It's they'RE I'LL we'd 'tis don't’s ''s 's'S",
    "tab\there\r\n\r\n  then\n\n\n   three\n\t\n end \n",
    "no\u00a0break\u2003em\u2028line\u3000wide\u200bzero\ufeffmark\u0085next",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 1e-9 ½ ² ⅷ １２３ ٣٤٥",
    "naïve café Ångström E\u0301 e\u0301\u0323 ﬁ ŉ ǅ ß İi",
    "日本語の文。中文，测试！ 한국어 ไทย हिन्दी اَلْعَرَبِيَّةُ עִבְרִית Ελληνικά русский",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 1️⃣ ☃️ 🇩🇪🇫🇷 𝔘𝔫𝔦 𐍈",
    "def f(x: int) -> dict[str, int]:\n    return {'a': x**2, \"b\": 0}  # 12\n\n\nif __name__ == 'm':\n\tf()",
    '<p class="a">&amp;</p> https://x.org/a?b=c&d=%20 user@host.com $x_1^{2}$ C:\\dir\\ ~/.rc ::: --- ___ ***',
    "\x00\x01\x1b[0m\x7f\x80\x9f\ufffd\ufffe\U0010ffff",
    "CamelCaseHTTPServer snake_case_name kebab-case SHOUTING 'quoted' \"double\" (paren) [x] {y} a/b\\c #tag @at",
    "▁ ▁▁x Ġ Ċ <0x0A> <s> </s> <unk> <pad> [CLS] <|im_start|> <|endoftext|>",
    "a" * 1000,
    *(
        "".join(f"{piece * length}x" for length in range(1, 40))
        for piece in (" ", "\n", "\t", "-", "=", "0", "a", "ab")
    ),
)
"""Texts at which implementations of the same tokenizer differ, if they do."""


class _Answers(NamedTuple):
    """What a tokenizer's own library makes of trial texts, and why no other one can be trusted with it, if so."""

    disorder: str | None
    texts: list[str]
    ids: list[list[int]]


class Ladder:
    """The libraries that may encode the blocks of a tokenizer, the fastest first.

    Raises TokenizerError if a library is wished for that never runs tokenizers of this kind.
    """

    def __init__(self, tokenizer: Tokenizer, wish: Engine):
        others = tokenizer.engines()
        if wish not in ("auto", *others, tokenizer.library):
            raise TokenizerError(
                f"--tokenizer-engine {wish}: a {tokenizer.kind} is run by "
                f"{' or '.join([*others, tokenizer.library])}; leave it out"
            )
        self._tokenizer, self._wish = tokenizer, wish
        self._names = list(others) if wish == "auto" else [wish] if wish in others else []
        self._copy: Worker | None = None
        self._answers: _Answers | None = None

    def stand(self) -> str:
        """Let the fastest library that can be made, and did not fail a `check`, encode the blocks of the tokenizer; its
        name.

        Raises TokenizerError if a library is wished for that cannot run this tokenizer.
        """
        while self._names:
            try:
                self._tokenizer.run_by(_made(self._tokenizer, self._names[0]))
                return self._names[0]
            except Unfit as reason:
                self._leave(str(reason))
        self._dismiss_copy()
        log.note(f"text is encoded by {self._tokenizer.library}")
        return self._tokenizer.library

    def prepare(self, sample: Sequence[str]) -> None:
        """Have a copy of this process, where it can be copied, find out meanwhile what `check` compares with."""
        if self._names and self._answers is None and can_be_copied():
            find = functools.partial(_answers, self._tokenizer, sample)
            with interrupts_ignored():
                self._copy = Worker(lambda: lambda _: find(), "fork")
            self._copy.send(None)

    def check(self, sample: Sequence[str]) -> bool:
        """Whether the library that `stand` took gives the ids of the tokenizer's own; if not, it is never taken again.

        `sample` is text of the corpus, of which some is tried beside texts that are hard. Raises as `stand` does.
        """
        tokenizer = self._tokenizer
        if not self._names:
            return True
        disorder, texts, answers = self._answered(sample)
        if disorder:
            tokenizer.run_by(None)
            while self._names:
                self._leave(disorder)
            return False
        for text, ids in zip(texts, answers, strict=True):
            if tokenizer.encode_block([text])[0].tolist() != ids:
                tokenizer.run_by(None)
                self._leave(f"its ids differ from those of {tokenizer.library}, as for {text!r:.80}")
                return False
        log.note(
            f"text is encoded by {self._names[0]}, whose ids are those of {tokenizer.library} on the {len(texts):,} "
            "texts tried"
        )
        return True

    def _answered(self, sample: Sequence[str]) -> _Answers:
        if self._copy is not None:
            with contextlib.suppress(WorkerLost):
                self._answers = self._copy.receive()
            self._dismiss_copy()
        if self._answers is None:
            self._answers = _answers(self._tokenizer, sample)
        return self._answers

    def _dismiss_copy(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def climb(self, sample: Sequence[str]) -> str:
        """Let the fastest library that gives the same ids encode the blocks of the tokenizer; its name."""
        name = self.stand()
        while not self.check(sample):
            name = self.stand()
        return name

    def _leave(self, reason: str) -> None:
        name, *self._names = self._names
        if self._wish == name:
            raise TokenizerError(
                f"--tokenizer-engine {name} cannot run this {self._tokenizer.kind}: {reason}; leave it out"
            )
        log.note(f"{name} does not encode the text: {reason}")


def stand_on(tokenizer: Tokenizer, name: str) -> None:
    """Let the library that a `Ladder` has named encode the blocks of another instance of the same tokenizer."""
    tokenizer.run_by(None if name == tokenizer.library else _made(tokenizer, name))


def _made(tokenizer: Tokenizer, name: str) -> Encode:
    try:
        return tokenizer.engines()[name]()
    except (KeyboardInterrupt, SystemExit, Unfit):
        raise
    except ModuleNotFoundError as error:
        raise Unfit(f"the package {error.name} is not installed") from None
    except BaseException as error:  # Rust's panics are no Exception
        raise Unfit(f"{name} says: {str(error).partition(chr(10))[0]:.120}") from None


def _answers(tokenizer: Tokenizer, sample: Sequence[str]) -> _Answers:
    texts = list(_trials(tokenizer, sample))
    return _Answers(tokenizer.disorder(), texts, list(map(tokenizer.encode, texts)))


def _trials(tokenizer: Tokenizer, sample: Sequence[str]) -> Iterator[str]:
    """Hard texts, special tokens spelled out, words of the vocabulary, and pieces of the corpus."""
    yield from _HARD
    for token in itertools.islice(tokenizer.special_tokens, _LITERALS):
        yield f"{token} a{token}b {token}\n{token}{token}"
    size = tokenizer.vocab_size
    for id in range(0, size, max(size // _WORDS, 1)):
        yield tokenizer.decode([id])
    for text in sample[:: max(len(sample) // _SAMPLE_TEXTS, 1)][:_SAMPLE_TEXTS]:
        yield text[:_SAMPLE_CHARACTERS]
