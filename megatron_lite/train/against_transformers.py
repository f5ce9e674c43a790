"""A checkpoint and a Hugging Face folder asked the same: how far their logits are apart."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import torch

from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.engine_interface import DTYPES
from megatron_lite.train.open import open_on

_TEXTS = (
    "In the beginning was the word.",
    "def f(x):\n    return x ** 2  # 12,345",
    "Größe – naïve 日本語 ½",
    " a  b ",
)
_BATCH, _LENGTH, _SEED = 2, 128, 0
TOLERANCE = 1e-4
"""Largest difference over the largest logit: rounding in fp32 leaves 1e-6 to 1e-5, another model 1e-2 and more."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Logits of some random tokens, by either model in fp32."""

    difference: float
    """The largest."""
    largest: float
    """The largest logit."""
    tokens: int

    @property
    def holds(self) -> bool:
        # Not the other way round: a NaN is no agreement.
        return self.difference <= TOLERANCE * self.largest

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.difference:.2e}, of logits up to {self.largest:.3g} "
            f"({self.tokens} tokens, in fp32)"
        )


def is_installed() -> bool:
    """Whether there is a transformers to ask."""
    return importlib.util.find_spec("transformers") is not None


def compare_logits(root: Path, folder: Path, dtype: str | None = None) -> Agreement:
    """Ask the checkpoint under `root` and the model in `folder`, one after the other, their weights rounded to `dtype`.

    Memory holds one whole model in fp32 at a time. Raises CheckpointError where transformers cannot load the folder, or
    loads it with weights missing.
    """
    theirs, tokens = _transformers_logits(folder, dtype)
    opened = open_on(ProcessMesh(MeshShape(), 0), root, dtype=dtype or "fp32")
    ours = opened.model.float().full_logits(opened.model.logits(tokens))
    # A tokenizer with more ids than the model has makes it grow as it is opened.
    ours = ours[..., : theirs.shape[-1]]
    return Agreement((ours - theirs).abs().max().item(), theirs.abs().max().item(), tokens.numel())


def tokenizer_fault(tokenizer: Tokenizer, folder: Path) -> str | None:
    """What sets the tokenizer that transformers makes of a folder apart from ours, or None."""
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Whatever a library that reads many formats raises.
    except Exception as error:
        return f"transformers cannot read the tokenizer: {str(error)[:200]}"
    for text in _TEXTS:
        if theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text):
            return f"transformers' tokenizer gives other ids for {text!r}"
    return None


@torch.no_grad()
def _transformers_logits(folder: Path, dtype: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the tokens they are of."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype or "fp32"],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # It raises many kinds for a configuration it cannot make a model of, KeyError and TypeError among them.
    except Exception as error:
        raise CheckpointError(f"transformers cannot load {folder}: {_in_words(error)}") from None
    astray = {kind: sorted(map(str, told[kind]))[:4] for kind in ("missing_keys", "unexpected_keys") if told.get(kind)}
    if astray:
        raise CheckpointError(f"transformers loads {folder} with {astray}")
    config = model.config
    length = min(_LENGTH, getattr(config, "sliding_window", None) or _LENGTH, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(0, config.vocab_size, (_BATCH, length), generator=generator)
    try:
        return model.float().eval()(tokens).logits, tokens
    except Exception as error:
        raise CheckpointError(
            f"the model that transformers makes of {folder} does not run: {_in_words(error)}"
        ) from None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"
