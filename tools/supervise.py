#!/usr/bin/env python
"""Keep a run going: started again after a crash, a hang or a lost rank, from its newest complete checkpoint.

python tools/supervise.py --auto-restart 20 -- torchrun --nproc-per-node 8 pretrain_gpt.py --config mine.yaml
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.config import cli
from megatron_lite.config.command_line import read, split
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.monitor.supervisor import Patience, Supervisor

TRAINER = "pretrain_gpt.py"
_WRITE_IT = "write it after --: tools/supervise.py [OPTIONS] -- torchrun ..."


@dataclasses.dataclass(frozen=True)
class SuperviseOptions:
    """How patiently a run is kept going; the command that starts it follows after --."""

    auto_restart: int = 10
    """Restarts at most."""
    give_up_after: int = 3
    """Attempts in a row that publish no newer checkpoint, after which none follows."""
    pause_seconds: float = 5.0
    """Before a restart after an attempt that published no newer checkpoint; twice as long after each further such
    one, up to 120 s."""

    def problems(self) -> list[str]:
        """What cannot be, one sentence each."""
        found = []
        if self.auto_restart < 0:
            found.append(f"--auto-restart {self.auto_restart} is too small; give 0 or more.")
        if self.give_up_after < 1:
            found.append(f"--give-up-after {self.give_up_after} is too small; give 1 or more.")
        if not 0 <= self.pause_seconds <= 3600:
            found.append(f"--pause-seconds {self.pause_seconds:g} is out of range; give 0 to 3600.")
        return found


def supervisor_of(command: Sequence[str], options: SuperviseOptions) -> Supervisor:
    """The supervisor of the run that a command starts. Raises ConfigError for one that cannot go on by itself."""
    if not command:
        raise ConfigError(f"there is no command to supervise; {_WRITE_IT}")
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is no program that can be found; give the command that starts the run")
    script = next((at for at, word in enumerate(command) if Path(word).name == TRAINER), None)
    if script is None:
        raise ConfigError(f"{' '.join(command[:4])} ... does not start {TRAINER}; only its runs go on by themselves")
    config, launch_options = cli.load(command[script + 1 :])
    checkpoint = config.checkpoint
    if launch_options.dry_run or checkpoint.save is None:
        raise ConfigError("the run saves no checkpoints to go on from; give it --save DIR and --save-interval N")
    if checkpoint.resume == "never":
        raise ConfigError("--resume never forbids the run to go on; leave it out, auto is the default")
    if checkpoint.save_interval is None:
        log.warn("the run has no --save-interval: each restart begins where this one does")
    root = Path(checkpoint.save)
    patience = Patience(options.auto_restart, options.give_up_after, options.pause_seconds)
    return Supervisor(
        command, Path(config.logging.run_dir or root), lambda: max(store.steps(root), default=0), patience
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code of the run."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    try:
        if stray := [word for word in words[:cut] if Path(word).name == TRAINER] or split(words[:cut])[0]:
            raise ConfigError(f"{stray[0]} belongs to the command to supervise, it seems; {_WRITE_IT}")
        options = read(
            SuperviseOptions,
            words[:cut],
            prog="supervise.py",
            description="Keep a run going to its end: tools/supervise.py [OPTIONS] -- COMMAND.",
        )
        supervisor = supervisor_of(words[cut + 1 :], options)
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
