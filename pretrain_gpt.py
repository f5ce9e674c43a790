#!/usr/bin/env python
"""Pretrain a GPT: `python pretrain_gpt.py --config FILE`, or by `deepspeed`, `torchrun`, `mpirun` or `srun`."""

from __future__ import annotations

import gc
import sys

from megatron_lite import log
from megatron_lite.config import check, cli
from megatron_lite.config.cli import LaunchOptions
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.monitor import rank_log
from megatron_lite.parallel.launch import Launch, end_process, likely_device
from megatron_lite.parallel.launcher import command_line
from megatron_lite.parallel.layout_line import parse_layout
from megatron_lite.train.rules import problems


def main(argv: list[str]) -> int:
    """Run as the command line asks; returns the exit code of this rank."""
    me = Launch()
    try:
        me = Launch.from_environment()
        log.configure(me.rank, me.world_size)
        config, options = cli.load(argv, shown=me.rank == 0)
        if options.dry_run:
            return plan(config, options, me)
        refuse(options.problems() + problems(config, me.world_size))
        for notice in check.notices(config):
            log.note(notice)
    except MegatronLiteError as error:
        # Ranks do not know one another yet, and a node may differ from the first: each has its say.
        if me.local_rank == 0:
            log.every_rank(f"error: {error}")
        return error.exit_code
    gc.disable()
    from megatron_lite.train.start import run_folder, run_training

    # Nothing of it is garbage; to look through it once and again takes a tenth of the time to import it.
    gc.freeze()
    gc.enable()
    command = command_line([sys.argv[0], *argv])
    with rank_log.kept(run_folder(config), me.rank, me.world_size, command, several_nodes=not me.is_local):
        try:
            run_training(config, me, command)
        except MegatronLiteError as error:
            tell = log.aside if error.is_told_elsewhere or (error.on_all_ranks and me.rank != 0) else log.every_rank
            tell(f"error: {error}")
            return error.exit_code
    return 0


def refuse(found: list[str]) -> None:
    """Raise ConfigError for problems, all of them at once."""
    if found:
        raise ConfigError(found)


def plan(config: RunConfig, options: LaunchOptions, me: Launch) -> int:
    """Print what the run would come to: --dry-run."""
    refuse(options.problems())
    config, world_size = at_layout(config, options, me)
    refuse(problems(config, world_size))
    if me.rank == 0:
        for notice in check.notices(config):
            log.note(notice)
        from megatron_lite.train.dry_run import dry_run

        with log.reader_may_leave():
            print("\n".join(dry_run(config, world_size, options.device or likely_device())), flush=True)
    return 0


def at_layout(config: RunConfig, options: LaunchOptions, me: Launch) -> tuple[RunConfig, int]:
    """`config` at the layout that --layout names, and the number of ranks that are planned for."""
    if options.layout is None:
        return config, options.world_size or me.world_size
    layout = parse_layout(options.layout)
    ranks, given = layout.shape.world_size, options.world_size
    if given not in (None, ranks):
        shape, model = layout.shape, layout.shape.size("tensor", "pipe", "context")
        others = {"pp": shape.pipe, "cp": shape.context}
        sizes = [f"tp={shape.tensor}", *(f"{axis}={n}" for axis, n in others.items() if n > 1), f"dp={given // model}"]
        mend = f"write {','.join(sizes)}" if given % model == 0 else "change one of them"
        factors = " x ".join(str(size) for size in (shape.tensor, shape.pipe, shape.context, shape.data) if size > 1)
        raise ConfigError(
            f"--layout {options.layout} is {ranks} ranks = {factors}, but --world-size is {given}; {mend}, or leave "
            "--world-size out."
        )
    return layout.put_on(config), ranks


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
