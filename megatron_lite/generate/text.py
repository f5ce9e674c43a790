"""Text out of a model: prompts in, completions out, told piece by piece as they grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.tokenizer_stream import StreamDecoder
from megatron_lite.errors import UserError
from megatron_lite.generate.generate import Continuation, Prompt, Reason, check_prompts, generate
from megatron_lite.generate.sampling import Sampling
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.process_mesh import ProcessMesh

OnText = Callable[[int, str], None]
"""Called with the number of a completion and the text that became certain."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model made of a prompt. `text` is without the prompt, the end token and the stop string."""

    prompt: str
    sample: int
    text: str
    tokens: int
    reason: Reason


class GrowingText:
    """The text behind a prompt, up to the first stop string, from tokens that arrive one at a time.

    What is handed out is certain: whole characters, and nothing that could be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer)
        for token in prompt:
            # Decoders treat the first token of a text differently: the answer is not its beginning.
            self._decoder.push(token)
        self._stop = stop
        self._held = ""
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was handed out."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """What becomes certain with one more token; sets `stopped` at a stop string."""
        return self._told(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        return "" if self.stopped else self._told(self._decoder.finish(), last=True)

    def _told(self, new: str, *, last: bool) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain = min(found)
        elif last:
            certain = len(self._held)
        else:
            certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        piece, self._held = self._held[:certain], self._held[certain:]
        self._parts.append(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, the whole of it left out."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def complete(
    model: GPT,
    mesh: ProcessMesh,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    use_cache: bool = True,
    on_text: OnText | None = None,
) -> list[Completion]:
    """`num_samples` completions of each prompt, by prompt and then by sample; equal on all ranks.

    They are made `batch_size` at a time, prompts of like length together, and the batches are shared out
    over the data ranks; `on_text` is called where a completion is made. Completion i does not depend on any of this.
    Raises UserError for an empty or too long prompt and for an empty stop string.
    """
    if "" in stop:
        raise UserError("a stop string is empty; leave it out, generation then ends by itself")
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    check_prompts(model, [Prompt(tokens) for tokens in encoded], max_new_tokens)
    wanted = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(num_samples)]
    by_length = sorted(range(len(wanted)), key=lambda number: len(encoded[wanted[number][0]]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    mine: dict[int, Completion] = {}
    for batch in batches[mesh.rank("data") :: mesh.size("data")]:
        texts = [GrowingText(tokenizer, encoded[wanted[number][0]], stop) for number in batch]
        listener = _listener(batch, texts, on_text)
        continuations = generate(
            model,
            mesh,
            [Prompt(encoded[wanted[number][0]], wanted[number][1]) for number in batch],
            sampling,
            max_new_tokens=max_new_tokens,
            end_token=tokenizer.eod,
            vocab_size=tokenizer.vocab_size,
            use_cache=use_cache,
            on_token=listener,
        )
        for number, text, continuation in zip(batch, texts, continuations, strict=True):
            rest = text.finish()
            if rest and on_text is not None:
                on_text(number, rest)
            prompt, sample = wanted[number]
            mine[number] = _completion(prompts[prompt], sample, text, continuation)
    return _joined(mine, mesh)


def _listener(batch: Sequence[int], texts: Sequence[GrowingText], on_text: OnText | None) -> Callable[[int, int], bool]:
    def listen(row: int, token: int) -> bool:
        piece = texts[row].push(token)
        if piece and on_text is not None:
            on_text(batch[row], piece)
        return texts[row].stopped

    return listen


def _completion(prompt: str, sample: int, text: GrowingText, continuation: Continuation) -> Completion:
    # The last characters of a stop string may only have become certain at the end.
    reason = "stop" if text.stopped else continuation.reason
    return Completion(prompt, sample, text.text, len(continuation.tokens), reason)


def _joined(mine: dict[int, Completion], mesh: ProcessMesh) -> list[Completion]:
    """The completions of all data ranks, by number."""
    if mesh.size("data") == 1:
        return [mine[number] for number in sorted(mine)]
    every: dict[int, Completion] = {}
    for part in mesh.gather_json({str(number): dataclasses.asdict(item) for number, item in mine.items()}):
        every |= {int(number): Completion(**item) for number, item in part.items()}
    return [every[number] for number in sorted(every)]
