"""The command line of a run: dataclass defaults < --model PRESET < --config FILE < flags."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence

import tyro

from megatron_lite.config import megatron_argv, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError

DESCRIPTION = (
    "Pretrain a GPT. Values come from the defaults below, then --model, then --config, then flags; "
    "dashes and underscores are alike, and Megatron's other flags are listed in docs/megatron_flags.md."
)


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """Where the configuration comes from and what is done with it; not a part of it."""

    model: str | None = None
    """Model preset: a name of examples/models/ (gpt2-124m, llama-8b, ...) or the path of a YAML file."""
    config: str | None = None
    """YAML file with fields by section; flags win over it. Relative paths in it begin at the working folder."""
    dry_run: bool = False
    """Print the resolved configuration, parameter counts and memory of a rank, and stop."""
    world_size: int | None = None
    """With --dry-run: plan for this many ranks; default: the ranks there are."""
    layout: str | None = None
    """With --dry-run: plan this layout, on one line: tp=8,dp=16,zero=1 (axes left out are 1)."""


@dataclasses.dataclass(frozen=True)
class _CommandLine(RunConfig):
    launch: LaunchOptions = dataclasses.field(default_factory=LaunchOptions)


LAUNCH_FLAGS = frozenset(field.name for field in dataclasses.fields(LaunchOptions))


def _source(argv: Sequence[str], flag: str) -> str | None:
    """The last value of `flag` in argv: what the other flags' defaults depend on is read first."""
    value = None
    for i, word in enumerate(argv):
        name, equals, text = word.partition("=")
        if name == flag:
            if not equals:
                text = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else ""
            if not text:
                raise ConfigError(f"{flag} needs a value.")
            value = text
    return value


def _typed(argv: Sequence[str]) -> list[str]:
    """argv with each value spelled as its field's type: what a YAML file may say, a flag may say too.

    Raises ConfigError with every value of a wrong type at once.
    """
    words, given = megatron_argv.split(argv)
    problems = []
    for item in given:
        try:
            words += [item.flag, *sources.respell(item.name, item.values)]
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return words


def load(argv: Sequence[str], prog: str = "pretrain_gpt.py") -> tuple[RunConfig, LaunchOptions]:
    """The configuration and launch options that a command line asks for.

    Raises ConfigError for flags that are unknown, refused or of a wrong type and for bad files, and
    SystemExit 0 after printing --help.
    """
    base = RunConfig()
    if preset := _source(argv, "--model"):
        base = sources.override(base, sources.read_preset(preset))
    if path := _source(argv, "--config"):
        base = sources.override(base, sources.read(path))
    rewritten = _typed(megatron_argv.rewrite(argv, sources.values_of(base), LAUNCH_FLAGS))
    usage_error = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage_error):
            command = tyro.cli(
                tyro.conf.OmitArgPrefixes[_CommandLine],
                args=rewritten,
                default=_CommandLine(**{section: getattr(base, section) for section in sources.field_types()}),
                prog=prog,
                description=DESCRIPTION,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"The command line cannot be read:\n{usage_error.getvalue().rstrip()}") from None
    config = RunConfig(**{section: getattr(command, section) for section in sources.field_types()})
    return config, command.launch
