"""A tokenizer as the files that Hugging Face's AutoTokenizer reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_lite.config.data import DataConfig
from megatron_lite.data.tokenizer_files import FILES_IN_A_COPY, ROLE_FILES
from megatron_lite.data.tokenizer_interface import Tokenizer

_CLASSES = {
    "HuggingFaceTokenizer": "PreTrainedTokenizerFast",
    "GPT2BPETokenizer": "GPT2Tokenizer",
    "SentencePieceTokenizer": "LlamaTokenizer",
}
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def export_tokenizer(tokenizer: Tokenizer, data: DataConfig, folder: Path) -> str | None:
    """Write the files of `tokenizer`, read as `data` says, into a folder; or say why not, where there is no such form.

    Special tokens that `data` adds are among them, under their ids. Raises OSError.
    """
    kind = data.tokenizer_type
    if kind not in _CLASSES:
        return f"there is no Hugging Face form of {kind}"
    if data.special_tokens and kind == "SentencePieceTokenizer":
        return "special tokens were added to a SentencePiece model, whose file cannot hold them"
    added = {tokenizer.token_to_id(token): token for token in data.special_tokens}
    for field, name in FILES_IN_A_COPY[kind].items():
        source = Path(getattr(data, field))
        source = source / name if source.is_dir() else source
        if name == "tokenizer.json":
            (folder / name).write_text(_with_added(json.loads(source.read_bytes()), added), encoding="utf-8")
            for beside in ROLE_FILES:
                if (source.parent / beside).is_file():
                    shutil.copyfile(source.parent / beside, folder / beside)
        else:
            shutil.copyfile(source, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        roles = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad, "unk": tokenizer.unk}
        content: dict[str, Any] = {"tokenizer_class": _CLASSES[kind]}
        content |= {f"{role}_token": tokenizer.id_to_token(id) for role, id in roles.items() if id is not None}
        if kind != "HuggingFaceTokenizer":
            content["added_tokens_decoder"] = {str(id): {"content": token} | _PLAIN for id, token in added.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return None


def _with_added(description: dict[str, Any], added: dict[int, str]) -> str:
    """A tokenizer.json whose list of added tokens holds some more."""
    listed = [token for token in description.get("added_tokens") or [] if token["id"] not in added]
    listed += [{"id": id, "content": token} | _PLAIN for id, token in added.items()]
    return json.dumps(description | {"added_tokens": sorted(listed, key=lambda token: token["id"])}, ensure_ascii=False)
