"""Tokens out of a model: a batch of prompts continued together, each as it would be alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist

from megatron_lite import log
from megatron_lite.errors import UserError
from megatron_lite.generate.sampling import Sampling, choose, row_generator
from megatron_lite.model.cache import KeyValueCache
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.process_mesh import ProcessMesh

Reason = Literal["end", "stop", "length", "context"]
"""Why a row ended: the end token, the caller's wish, max_new_tokens, or the model's last position."""

OnToken = Callable[[int, int], bool]
"""Called with the number of a row and its new token; True ends the row. Must answer alike on all tensor ranks."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The token ids to continue, and which of several samples of them this is."""

    tokens: Sequence[int]
    sample: int = 0


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The new tokens of one prompt, without the end token, and why there are no more."""

    tokens: list[int]
    reason: Reason


class _Row:
    """A prompt that is growing."""

    def __init__(self, number: int, prompt: Prompt, seed: int, max_new_tokens: int, max_positions: int):
        self.number = number
        self.tokens = list(prompt.tokens)
        self.generator = row_generator(seed, self.tokens, prompt.sample)
        self.reason: Reason | None = None
        self._prompt_length = len(self.tokens)
        # The last token drawn is not read again, so it needs no position.
        self.room = max_positions - self._prompt_length + 1
        self._limit_reason: Reason = "length" if max_new_tokens <= self.room else "context"
        self.limit = min(max_new_tokens, self.room)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self._prompt_length :]

    def take(self, token: int, end_token: int | None, on_token: OnToken | None) -> None:
        if token == end_token:
            self.reason = "end"
            return
        self.tokens.append(token)
        if on_token is not None and on_token(self.number, token):
            self.reason = "stop"
        elif len(self.tokens) - self._prompt_length == self.limit:
            self.reason = self._limit_reason


@torch.no_grad()
def generate(
    model: GPT,
    mesh: ProcessMesh,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    end_token: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
    on_token: OnToken | None = None,
) -> list[Continuation]:
    """A continuation of each prompt, up to `max_new_tokens` long; equal on all tensor ranks.

    A row does not depend on the rows beside it. `vocab_size` bounds what is drawn where the tokenizer has
    fewer ids than the model. Without the cache every step reads all tokens again, for the same result.
    Raises UserError for a prompt that is empty, longer than the model's positions or outside its vocabulary.
    """
    check_prompts(model, prompts, max_new_tokens)
    vocab_size = min(vocab_size or model.vocabulary.vocab_size, model.vocabulary.vocab_size)
    every_row = [
        _Row(number, prompt, sampling.seed, max_new_tokens, model.max_positions)
        for number, prompt in enumerate(prompts)
    ]
    _say_what_does_not_fit(every_row, max_new_tokens, model.max_positions)
    rows = every_row
    width = _width(rows)
    cache = KeyValueCache(width + max((row.limit for row in rows), default=0) - 1) if use_cache else None
    seen_BV = torch.zeros(len(rows), model.vocabulary.vocab_size, dtype=torch.bool, device=mesh.device)
    for row, seen_V in zip(rows, seen_BV, strict=True):
        seen_V[torch.tensor(row.tokens, device=mesh.device)] = True
    while rows:
        logits_BV = _next_logits(model, mesh, rows, cache)
        chosen_B = choose(logits_BV[:, :vocab_size], seen_BV[:, :vocab_size], sampling, [r.generator for r in rows])
        if (group := mesh.group("tensor")) is not None:
            # Equal logits give equal tokens; a device whose sums round by chance must not part the ranks.
            dist.broadcast(chosen_B, group=group, group_src=0)
        seen_BV.scatter_(1, chosen_B.unsqueeze(1), True)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            row.take(token, end_token, on_token)
        going_on = [i for i, row in enumerate(rows) if row.reason is None]
        if len(going_on) < len(rows):
            rows = [rows[i] for i in going_on]
            seen_BV = seen_BV[going_on]
            if cache is not None and rows:
                # One token of each row is not in the cache yet.
                cache.keep(going_on, _width(rows) - 1)
    return [Continuation(row.new_tokens, row.reason) for row in every_row]


def _width(rows: Sequence[_Row]) -> int:
    return max((len(row.tokens) for row in rows), default=0)


def _next_logits(model: GPT, mesh: ProcessMesh, rows: Sequence[_Row], cache: KeyValueCache | None) -> torch.Tensor:
    """The logits behind each row's last token, fp32 [B, V] over the true vocabulary.

    Rows are aligned at their ends; what a shorter one lacks is padding on its left.
    """
    width = _width(rows)
    padding = [width - len(row.tokens) for row in rows]
    if cache is not None and cache.length:
        tokens = [row.tokens[-1:] for row in rows]
    else:
        tokens = [[0] * skip + row.tokens for skip, row in zip(padding, rows, strict=True)]
    logits_BSV = model.logits(
        torch.tensor(tokens, device=mesh.device),
        cache=cache,
        left_padding_B=torch.tensor(padding, device=mesh.device) if any(padding) else None,
        last_only=True,
    )
    return model.full_logits(logits_BSV)[:, -1].float()


def check_prompts(model: GPT, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Raise UserError, with the numbers, for a prompt that `model` cannot continue."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} is too small; give 1 or more")
    longest, vocab_size = model.max_positions, model.vocabulary.vocab_size
    for number, prompt in enumerate(prompts, 1):
        name, length = f"prompt {number} of {len(prompts)}", len(prompt.tokens)
        if length == 0:
            raise UserError(f"{name} is empty; give at least one token of text to go on from")
        if length > longest:
            raise UserError(
                f"{name} has {length} tokens and the model was trained for {longest} positions; shorten it by "
                f"{length - longest} tokens or more"
            )
        low, high = min(prompt.tokens), max(prompt.tokens)
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{name} has token id {low if low < 0 else high} and the model knows ids 0 to {vocab_size - 1}; "
                f"give the tokenizer it was trained with"
            )


def _say_what_does_not_fit(rows: Sequence[_Row], max_new_tokens: int, max_positions: int) -> None:
    cut = [row for row in rows if row.room < max_new_tokens]
    if cut:
        least = min(cut, key=lambda row: row.room)
        log.warn(
            f"{len(cut)} of {len(rows)} prompts are continued by fewer than {max_new_tokens} tokens: the model was "
            f"trained for {max_positions} positions, and prompt {least.number + 1} has {len(least.tokens)} tokens, "
            f"which leaves {least.room}"
        )
