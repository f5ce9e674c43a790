"""A command line written for Megatron turned into ours, by the table in `megatron_flags`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lite import log
from megatron_lite.config.command_line import Given, flag_name, split
from megatron_lite.config.megatron_flags import BY_NAME, Flag
from megatron_lite.config.typed_values import nearest
from megatron_lite.errors import ConfigError

ELSEWHERE = {
    "learning_rate": "lr",
    "max_steps": "train-iters",
    "num_train_epochs": "train-epochs",
    "num_heads": "num-attention-heads",
    "n_head": "num-attention-heads",
    "n_layer": "num-layers",
    "n_embd": "hidden-size",
    "d_model": "hidden-size",
    "num_hidden_layers": "num-layers",
    "intermediate_size": "ffn-hidden-size",
    "grad_clip": "clip-grad",
    "max_grad_norm": "clip-grad",
    "warmup_steps": "lr-warmup-iters",
    "batch_size": "global-batch-size",
    "per_device_train_batch_size": "micro-batch-size",
    "output_dir": "save",
    "tp": "tensor-model-parallel-size",
    "adam_epsilon": "adam-eps",
}
"""What other frameworks call it, where the spelling gives no hint: their name to our flag."""


def _setting(given: Given, defaults: Mapping[str, Any]) -> tuple[str, str]:
    """The field that one of our flags sets, and the text of its value; --no-bf16 sets bf16 to False."""
    name = given.name
    if name not in defaults and name.removeprefix("no_") in defaults:
        return name.removeprefix("no_"), "False"
    return name, " ".join(given.values) or "True"


class _Rewriting:
    """The state of one rewriting: what is known, what was set and what was found wrong."""

    def __init__(self, given: Sequence[Given], defaults: Mapping[str, Any], other_flags: frozenset[str]):
        self.defaults = defaults
        self.own = {*defaults, *(f"no_{name}" for name, value in defaults.items() if isinstance(value, bool))}
        self.own |= other_flags
        lengths = [item.values[0] for item in given if item.name.endswith("seq_length") and item.values]
        self.seq_length = lengths[-1] if lengths else str(defaults["seq_length"])
        self.settings: dict[str, dict[str, tuple[Given, str]]] = {}
        self.problems: list[str] = []

    def _set(self, words: list[str], item: Given) -> list[str]:
        """Note which field `words` set and which given flag did it."""
        field, value = _setting(Given(words[0], tuple(words[1:])), self.defaults)
        given_name, _ = _setting(item, self.defaults)
        self.settings.setdefault(field, {})[given_name] = (item, value)
        return words

    def contradictions(self) -> list[str]:
        """A problem for each field that two different flags set to different values."""
        return [
            f"{' and '.join(item.text for item, _ in by_flag.values())} contradict each other: "
            f"they set {field} to {' and '.join(value for _, value in by_flag.values())}; give one of them."
            for field, by_flag in self.settings.items()
            if len({value for _, value in by_flag.values()}) > 1
        ]

    def replace(self, item: Given) -> list[str]:
        """The words of our command line that stand for one given flag."""
        row = BY_NAME.get(item.name)
        if row is None:
            if item.name not in self.own and not item.asks_for_help:
                taken = (name for name, row in BY_NAME.items() if row.kind in ("same", "mapped", "implied"))
                known = map(flag_name, {*self.own, *taken})
                meant = ELSEWHERE.get(item.name)
                hint = f"; perhaps you meant --{meant}" if meant else nearest(flag_name(item.name), known)
                hint = hint or "; --help lists all flags"
                self.problems.append(f"{item.flag} is not a known flag{hint}.")
            return self._set(item.words, item)
        if row.takes is not None and row.kind != "same" and len(item.values) != row.takes:
            expected = "no value" if row.takes == 0 else "one value"
            self.problems.append(f"{item.flag} takes {expected}, but {' '.join(item.values) or 'none'} was given.")
            return []
        return getattr(self, f"_{row.kind}")(row, item)

    def _same(self, row: Flag, item: Given) -> list[str]:
        return self._set(item.words, item)

    def _silent(self, row: Flag, item: Given) -> list[str]:
        return []

    def _notice(self, row: Flag, item: Given) -> list[str]:
        log.once(f"{item.flag} has no effect: {row.reason}.")
        return []

    def _neutral(self, row: Flag, item: Given) -> list[str]:
        if item.values and set(item.values) <= set(row.neutral):
            return []
        return self._refused(row, item)

    def _refused(self, row: Flag, item: Given) -> list[str]:
        self.problems.append(f"{item.text} is refused: {row.reason}.")
        return []

    def _implied(self, row: Flag, item: Given) -> list[str]:
        field, _ = _setting(Given(row.becomes[0], row.becomes[1:]), self.defaults)
        return [] if field in self.settings or self.defaults[field] is not None else list(row.becomes)

    def _mapped(self, row: Flag, item: Given) -> list[str]:
        for value in item.values:
            if value in row.refused_values:
                self.problems.append(f"{item.text} is refused: {row.refused_values[value]}.")
                return []
        values = [row.values.get(value, value) for value in item.values]
        words: list[str] = []
        for word in row.becomes:
            if word == "{}":
                words += values
            elif word == "{samples}":
                words.append(self._samples(item))
            else:
                words.append(word)
        return self._set(words, item)

    def _samples(self, item: Given) -> str:
        try:
            return str(-(-int(item.values[0]) // int(self.seq_length)))
        except (ValueError, ZeroDivisionError):
            self.problems.append(
                f"{item.text} cannot be turned into samples of seq_length={self.seq_length}; give whole numbers above "
                "0."
            )
            return "0"


def rewrite(argv: Sequence[str], defaults: Mapping[str, Any], other_flags: frozenset[str] = frozenset()) -> list[str]:
    """argv in our flags alone, with a notice logged for each flag that has no effect.

    `defaults` maps every field name to the value it has without flags; `other_flags` are names the
    command line knows besides fields. Raises ConfigError with all unknown, refused and
    contradicting flags at once.
    """
    stray, given = split(argv)
    implied = [item for item in given if item.name in BY_NAME and BY_NAME[item.name].kind == "implied"]
    rewriting = _Rewriting(given, defaults, other_flags)
    words = list(stray)
    for item in [item for item in given if item not in implied] + implied:
        words += rewriting.replace(item)
    if problems := rewriting.problems + rewriting.contradictions():
        raise ConfigError(problems)
    return words
