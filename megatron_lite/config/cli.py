"""The command line of a run: dataclass defaults < --model PRESET < --config FILE < flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar

from megatron_lite.config import command_line, huggingface, megatron_argv, sources
from megatron_lite.config.data_args import with_paths_of_files
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError

Options = TypeVar("Options")

DESCRIPTION = (
    "Pretrain a GPT. Values come from the defaults below, then --load-hf, --model, --config, then flags; "
    "dashes and underscores are alike, and Megatron's other flags are listed in docs/megatron_flags.md."
)


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """Where the configuration comes from; not a part of it."""

    model: str | None = None
    """Model preset: a name of examples/models/ (gpt2-124m, llama-8b, ...) or the path of a YAML file."""
    config: str | None = None
    """YAML file with fields by section; flags win over it. Relative paths in it begin at the working folder."""


@dataclasses.dataclass(frozen=True)
class LaunchOptions(SourceOptions):
    """Where the configuration comes from, and what is done with it."""

    dry_run: bool = False
    """Print the resolved configuration, parameter counts and memory of a rank, and stop."""
    world_size: int | None = None
    """With --dry-run: plan for this many ranks; default: the ranks there are."""
    layout: str | None = None
    """With --dry-run: plan this layout, on one line: tp=8,dp=16,zero=1 (axes left out are 1)."""
    device: Literal["cpu", "cuda"] | None = None
    """With --dry-run: plan for ranks on this kind of device; default: cuda on a machine with an NVIDIA GPU."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = []
        if not self.dry_run:
            given = [name for name in ("world_size", "layout", "device") if getattr(self, name) is not None]
            found += [
                f"{command_line.flag_name(name)} goes with --dry-run; a run takes the ranks and devices that are "
                "started, and its layout from --tensor-model-parallel-size and --zero-stage."
                for name in given
            ]
        if self.world_size is not None and self.world_size < 1:
            found.append(f"--world-size {self.world_size} is too small; give 1 or more.")
        return found


def _source(argv: Sequence[str], flag: str) -> str | None:
    """The last value of `flag` in argv: what the other flags' defaults depend on is read first."""
    value = None
    for i, word in enumerate(argv):
        name, equals, text = word.partition("=")
        if name.replace("_", "-") == flag:
            if not equals:
                text = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else ""
            if not text:
                raise ConfigError(f"{flag} needs a value.")
            value = text
    return value


def load(
    argv: Sequence[str],
    options: type[Options] = LaunchOptions,
    *,
    prog: str = "pretrain_gpt.py",
    description: str = DESCRIPTION,
    shown: bool = True,
) -> tuple[RunConfig, Options]:
    """The configuration and the options of a door that a command line asks for.

    `options` is a dataclass with defaults, whose fields are flags too. Raises ConfigError for flags that are unknown,
    refused or of a wrong type and for bad files, and SystemExit 0 for --help, which is printed if `shown`.
    """
    file = sources.read(path) if (path := _source(argv, "--config")) else {}
    base = RunConfig()
    if huggingface_folder := _source(argv, "--load-hf") or file.get("checkpoint", {}).get("load_hf"):
        base = sources.override(base, huggingface.overrides(huggingface_folder))
    if preset := _source(argv, "--model"):
        base = sources.override(base, sources.read_preset(preset))
    base = sources.override(base, file)
    sections = {section: getattr(base, section) for section in sources.field_types()}
    own = ("options", options, dataclasses.field(default_factory=options))
    whole = dataclasses.make_dataclass("CommandLine", [own], bases=(RunConfig,), frozen=True)
    command = command_line.read(
        whole,
        megatron_argv.rewrite(argv, sources.values_of(base), frozenset(f.name for f in dataclasses.fields(options))),
        prog=prog,
        description=description,
        default=whole(**sections),
        shown=shown,
    )
    config = RunConfig(**{section: getattr(command, section) for section in sections})
    config = dataclasses.replace(config, data=with_paths_of_files(config.data))
    if config.checkpoint.load_hf and (found := huggingface.contradictions(config.model, config.checkpoint.load_hf)):
        raise ConfigError(found)
    return config, command.options
