"""The tokenizer that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_lite.config.data import DataConfig
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import TokenizerError


def _existing(path: str | None, flag: str, kind: str, folder: bool = False) -> Path:
    if not path:
        raise TokenizerError(f"--tokenizer-type {kind} needs {flag} FILE")
    if not (Path(path).is_file() or (folder and Path(path).is_dir())):
        raise TokenizerError(f"{flag} {path}: there is no such file; {kind} reads it")
    return Path(path)


def _gpt2(data: DataConfig) -> Tokenizer:
    from megatron_lite.data.tokenizer_huggingface import GPT2BPETokenizer

    return GPT2BPETokenizer.from_files(
        _existing(data.vocab_file, "--vocab-file", "GPT2BPETokenizer"),
        _existing(data.merge_file, "--merge-file", "GPT2BPETokenizer"),
    )


def _sentencepiece(data: DataConfig) -> Tokenizer:
    from megatron_lite.data.tokenizer_sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer.from_path(
        _existing(data.tokenizer_model, "--tokenizer-model", "SentencePieceTokenizer")
    )


def _huggingface(data: DataConfig) -> Tokenizer:
    from megatron_lite.data.tokenizer_huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer.from_path(
        _existing(data.tokenizer_model, "--tokenizer-model", "HuggingFaceTokenizer", folder=True)
    )


def _tiktoken(data: DataConfig) -> Tokenizer:
    from megatron_lite.data.tokenizer_tiktoken import TiktokenTokenizer

    return TiktokenTokenizer.from_path(
        _existing(data.tokenizer_model, "--tokenizer-model", "TiktokenTokenizer"), data.tiktoken_pattern
    )


def _byte(data: DataConfig) -> Tokenizer:
    from megatron_lite.data.tokenizer_byte import ByteTokenizer

    return ByteTokenizer()


# Each imports its library when asked for: nobody needs all of them, and start-up is quick.
_BUILDERS: Mapping[str, Callable[[DataConfig], Tokenizer]] = {
    "GPT2BPETokenizer": _gpt2,
    "SentencePieceTokenizer": _sentencepiece,
    "HuggingFaceTokenizer": _huggingface,
    "TiktokenTokenizer": _tiktoken,
    "ByteTokenizer": _byte,
}


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of --tokenizer-type with its files, --special-tokens added.

    Raises TokenizerError for a missing or unfit file, a missing flag or a missing package.
    """
    if data.tokenizer_type not in _BUILDERS:
        raise TokenizerError(f"--tokenizer-type {data.tokenizer_type}: choose one of {', '.join(_BUILDERS)}")
    try:
        tokenizer = _BUILDERS[data.tokenizer_type](data)
    except ModuleNotFoundError as error:
        raise TokenizerError(
            f"{data.tokenizer_type} needs the package {error.name}, which is not installed: pip install {error.name}"
        ) from None
    except OSError as error:
        raise TokenizerError(f"{error.filename} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"a file of {data.tokenizer_type} is not UTF-8 text: {error}") from None
    tokenizer.add_special_tokens(data.special_tokens)
    return tokenizer
