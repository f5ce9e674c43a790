"""How well a model predicts a passage: loss, perplexity, bits per byte, next-token accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_lite.data.micro_batch import places_since
from megatron_lite.errors import NonFiniteError
from megatron_lite.eval.passage import Passage, Windows
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.process_mesh import ProcessMesh


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over the tokens that were predicted, and what follows from them. Scores add up."""

    loss_sum: float
    """Nats."""
    tokens: int
    correct: int
    """Tokens that had the largest logit."""
    text_bytes: int | None
    """UTF-8 bytes these tokens stand for; None where the text is not known."""

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that leaves the range of a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of text costs: comparable between tokenizers."""
        return self.loss_sum / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def accuracy(self) -> float:
        """Share of tokens that had the largest logit."""
        return self.correct / self.tokens

    def __add__(self, other: Score) -> Score:
        unknown = self.text_bytes is None or other.text_bytes is None
        return Score(
            self.loss_sum + other.loss_sum,
            self.tokens + other.tokens,
            self.correct + other.correct,
            None if unknown else self.text_bytes + other.text_bytes,
        )


def score(
    model: GPT,
    mesh: ProcessMesh,
    passage: Passage,
    *,
    seq_length: int,
    stride: int | None = None,
    batch_size: int = 8,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Score:
    """The score of a passage, equal on all ranks: every token but the first is predicted once.

    Windows of `seq_length` tokens start every `stride`, by default one behind the other; a shorter stride gives
    each token more context and costs more passes. Documents see each other, and positions run on, but for
    `reset_attention_mask` and `reset_position_ids`. Batches are shared out over the data ranks. `on_batch` is told
    (batches done, all batches) of this rank. Raises NonFiniteError for a loss that is not finite.
    """
    windows = Windows(passage.num_tokens, seq_length, seq_length if stride is None else stride)
    starts = range(0, len(windows), batch_size)
    mine = starts[mesh.rank("data") :: mesh.size("data")]
    sums = torch.zeros(4, dtype=torch.float64, device=mesh.device)
    for done, start in enumerate(mine, 1):
        numbers = range(start, min(start + batch_size, len(windows)))
        batch = [windows.read(passage, i) for i in numbers]
        tokens_BS, labels_BS = (torch.from_numpy(np.stack(rows)).to(mesh.device) for rows in zip(*batch, strict=True))
        begins_BS = np.stack([windows.begins(passage, i) for i in numbers])
        loss_BS, correct_BS = model.token_losses(
            tokens_BS,
            labels_BS,
            begins_BS=torch.from_numpy(begins_BS) if reset_attention_mask else None,
            positions_BS=torch.from_numpy(places_since(begins_BS)).to(mesh.device) if reset_position_ids else None,
        )
        counted_BS = labels_BS >= 0
        sums[0] += loss_BS[counted_BS].sum(dtype=torch.float64)
        sums[1] += counted_BS.sum()
        sums[2] += correct_BS[counted_BS].sum()
        if on_batch is not None:
            on_batch(done, len(mine))
    if passage.text_bytes is not None:
        sums[3] += passage.text_bytes(mesh.rank("data"), mesh.size("data"))
    if (group := mesh.group("data")) is not None:
        dist.all_reduce(sums, group=group)
    loss_sum, tokens, correct, text_bytes = sums.tolist()
    if not math.isfinite(loss_sum):
        raise NonFiniteError(
            f"{passage.name}: the loss is {loss_sum}; the model's weights or activations are not finite"
        )
    return Score(loss_sum, int(tokens), int(correct), None if passage.text_bytes is None else int(text_bytes))
