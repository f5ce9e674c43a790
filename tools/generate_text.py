#!/usr/bin/env python
"""Continue prompts with a trained model; without --prompt, those typed in or piped in, one a line.

python tools/generate_text.py --load runs/gpt --prompt "In the beginning" --temperature 0.8
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_lite import log
from megatron_lite.config.command_line import Repeated, read
from megatron_lite.config.opening import OpeningConfig
from megatron_lite.errors import ConfigError, TokenizerError, UserError
from megatron_lite.parallel.door import among_ranks, exit_code_of
from megatron_lite.parallel.launch import Launch, end_process


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What is continued and how."""

    prompt: Repeated[tuple[str, ...]] = ()
    """A text to continue; may be given several times."""
    prompts_file: str | None = None
    """File of prompts, one a line."""
    max_new_tokens: int = 100
    """Longest continuation."""
    greedy: bool = False
    """Always the most likely token; the same as --temperature 0."""
    temperature: float | None = None
    """Divides the logits: below 1 is more certain, above 1 more varied, 0 greedy. Default: 1."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that came before, in the prompt too, are less likely."""
    seed: int = 0
    """Another seed draws other samples."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stop: Repeated[tuple[str, ...]] = ()
    """Text that ends a continuation and is left out of it; may be given several times."""
    batch_size: int = 16
    """Continuations made together."""
    cache: bool = True
    """Keep keys and values of earlier tokens; without, all are read again for each new one, for the same text."""
    stream: bool = True
    """Print text as it is made, if there is one continuation and no --json."""
    json: bool = False
    """Print one JSON object a continuation: prompt, sample, text, tokens, reason."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each; `Sampling` knows the ranges of its own values."""
        found = [
            f"{name}={getattr(self, name)} is too small; give 1 or more."
            for name in ("max_new_tokens", "num_samples", "batch_size")
            if getattr(self, name) < 1
        ]
        for name, texts in (("--prompt", self.prompt), ("--stop", self.stop)):
            if "" in texts:
                found.append(f"{name} is empty; give at least one character.")
        if self.greedy and self.temperature:
            found.append(f"--greedy contradicts --temperature {self.temperature:g}; give one of them.")
        elif self.is_greedy and self.num_samples > 1:
            found.append(f"greedy continuations are all alike, --num-samples {self.num_samples} asks for several.")
        return found

    @property
    def is_greedy(self) -> bool:
        return self.greedy or self.temperature == 0


@dataclasses.dataclass(frozen=True)
class _CommandLine:
    opening: OpeningConfig
    generate: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)


def _given_prompts(options: GenerateOptions) -> list[str] | None:
    """The prompts of the command line and its file; None if it names neither."""
    if not options.prompt and options.prompts_file is None:
        return None
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"--prompts-file {options.prompts_file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(_not_text(f"--prompts-file {options.prompts_file}", error)) from None
        prompts += [line for line in lines if line]
    if not prompts:
        raise ConfigError(f"--prompts-file {options.prompts_file} holds no prompt; write one a line")
    return prompts


class _Session:
    """An opened model that answers prompts, all ranks alike; rank 0 reads and prints."""

    def __init__(self, me: Launch, store, command: _CommandLine):
        from megatron_lite.generate.sampling import Sampling
        from megatron_lite.train.open import open_model

        opening, self.options = command.opening, command.generate
        temperature = 1.0 if self.options.temperature is None else self.options.temperature
        self.sampling = Sampling(
            temperature=0.0 if self.options.is_greedy else temperature,
            top_k=self.options.top_k,
            top_p=self.options.top_p,
            repetition_penalty=self.options.repetition_penalty,
            seed=self.options.seed,
        )
        self.opened = open_model(
            opening.load,
            me,
            store,
            ckpt_step=opening.ckpt_step,
            tensor_size=opening.tensor_model_parallel_size,
            pipe_size=opening.pipeline_model_parallel_size,
            timeout_minutes=opening.distributed_timeout_minutes,
            dtype=opening.dtype,
            overrides=opening.overrides,
        )
        if self.opened.tokenizer is None:
            raise TokenizerError("the checkpoint names no tokenizer; give --tokenizer-type and its file")
        self.mesh = self.opened.mesh
        self.speaks = self.mesh.global_rank == 0

    def answer(self, prompts: list[str]) -> None:
        """Continue the prompts and print the continuations."""
        from megatron_lite.generate.text import complete

        single = len(prompts) * self.options.num_samples == 1
        stream = single and self.options.stream and not self.options.json
        start = time.monotonic()
        completions = complete(
            self.opened.model,
            self.mesh,
            self.opened.tokenizer,
            prompts,
            self.sampling,
            max_new_tokens=self.options.max_new_tokens,
            num_samples=self.options.num_samples,
            stop=self.options.stop,
            batch_size=self.options.batch_size,
            use_cache=self.options.cache,
            on_text=_Printer(prompts[0]) if stream and self.speaks else None,
        )
        seconds = time.monotonic() - start
        if not self.speaks:
            return
        if stream:
            print(flush=True)
        elif self.options.json:
            for completion in completions:
                print(json.dumps(dataclasses.asdict(completion), ensure_ascii=False))
        else:
            for number, completion in enumerate(completions, 1):
                print(f"--- {number} of {len(completions)}\n{completion.prompt}{completion.text}")
        tokens = sum(completion.tokens for completion in completions)
        reasons = ", ".join(sorted({completion.reason for completion in completions}))
        log.note(f"{tokens:,} tokens in {seconds:.1f} s = {tokens / seconds:,.1f} tokens/s; ended by {reasons}")

    def read(self, reader: Callable[[], list[str] | None]) -> list[str] | None:
        """What rank 0 reads, on all ranks."""
        from megatron_lite.train.build import together

        return self.mesh.gather_json(together(self.mesh, lambda: reader() if self.speaks else None))[0]

    def talk(self) -> None:
        """Answer what is typed, a prompt a line, until the end of input."""
        while (prompts := self.read(_ask)) is not None:
            if not prompts:
                continue
            try:
                self.answer(prompts)
            except UserError as error:
                log.note(str(error))


class _Printer:
    """Prints the prompt before the first piece of its continuation, then every piece."""

    def __init__(self, prompt: str):
        self._before = prompt

    def __call__(self, number: int, piece: str) -> None:
        print(self._before + piece, end="", flush=True)
        self._before = ""


def _not_text(what: str, error: UnicodeDecodeError) -> str:
    return f"{what} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"


def _ask() -> list[str] | None:
    try:
        line = input("> ")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        log.note(_not_text("that", error))
        return []
    return [line] if line else []


def _piped() -> list[str] | None:
    """The lines of standard input; None if it is a terminal."""
    if sys.stdin.isatty():
        return None
    try:
        prompts = [line for line in sys.stdin.buffer.read().decode().splitlines() if line]
    except UnicodeDecodeError as error:
        raise ConfigError(_not_text("standard input", error)) from None
    if not prompts:
        raise ConfigError(
            "no prompt: give --prompt TEXT, --prompts-file FILE, or prompts on standard input, one a line"
        )
    return prompts


def _generate(me: Launch, command: _CommandLine) -> None:
    prompts = _given_prompts(command.generate)
    from megatron_lite.train.build import close_ranks

    with among_ranks(me, command.opening.distributed_timeout_minutes) as store:
        session = _Session(me, store, command)
        if prompts is None:
            prompts = session.read(_piped)
        if prompts is None:
            session.talk()
        else:
            session.answer(prompts)
        close_ranks()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code of this rank."""

    def generate(me: Launch) -> None:
        command = read(
            _CommandLine,
            sys.argv[1:] if argv is None else argv,
            prog="generate_text.py",
            description="Continue prompts with a trained model; without --prompt, those typed or piped in, one a line.",
            shown=me.rank == 0,
        )
        if problems := command.opening.problems() + command.generate.problems():
            raise ConfigError(problems)
        _generate(me, command)

    return exit_code_of(generate)


if __name__ == "__main__":
    end_process(main())
