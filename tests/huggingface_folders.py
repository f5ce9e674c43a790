"""Tiny Hugging Face folders of every family, as transformers writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file
from transformers_models import gpt2, llama, llama3, mistral, qwen2, qwen3, shake

VOCABULARY, POSITIONS = 103, 24
MAKERS = {
    "gpt2": gpt2,
    "llama": lambda *sizes: llama(*sizes, kv_heads=2),
    "llama 3": llama3,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def save_folder(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard_size: str = "20kB") -> Path:
    """A folder of a random model; in several files unless `shard_size` is large."""
    torch.manual_seed(1)
    model, _ = MAKERS[name](VOCABULARY, POSITIONS)
    shake(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def add_tokenizer(folder: Path, added: list[str]) -> None:
    """Put a tokenizer of the model's ids, and of some tokens more, into a folder."""
    words = {f"w{id}": id for id in range(VOCABULARY)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    library.add_special_tokens(added)
    library.save(str(folder / "tokenizer.json"))


def stored(folder: Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors package."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bitwise(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Same names, dtypes and values."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
