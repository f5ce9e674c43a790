#!/usr/bin/env python
"""Pretrain a GPT: `python pretrain_gpt.py --config FILE`, or by `deepspeed` or `torchrun`."""

from __future__ import annotations

import contextlib
import sys

from megatron_lite import log
from megatron_lite.config import check, cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data import rules
from megatron_lite.errors import ConfigError, LostRankError, MegatronLiteError
from megatron_lite.parallel.launch import Launch, command_line
from megatron_lite.parallel.mesh_shape import parse_layout


def main(argv: list[str]) -> int:
    """Run as the command line asks; returns the exit code of this rank."""
    me = Launch()
    try:
        me = Launch.from_environment()
        log.configure(me.rank, me.world_size)
        config, options = cli.load(argv)
        world_size = (options.world_size or me.world_size) if options.dry_run else me.world_size
        if options.layout is not None:
            config, world_size = at_layout(config, options.layout, options.dry_run)
        if problems := check.problems(config, world_size) + rules.problems(config):
            raise ConfigError(problems)
        for notice in check.notices(config):
            log.note(notice)
        if options.dry_run:
            from megatron_lite.train.dry_run import dry_run

            if me.rank == 0:
                with contextlib.suppress(BrokenPipeError):
                    print("\n".join(dry_run(config, world_size)), flush=True)
            return 0
        from megatron_lite.train.start import run_training

        run_training(config, me, command_line([sys.argv[0], *argv]))
        return 0
    except MegatronLiteError as error:
        if me.rank == 0 or isinstance(error, LostRankError):
            log.every_rank(f"error: {error}")
        return error.exit_code


def at_layout(config: RunConfig, text: str, dry_run: bool) -> tuple[RunConfig, int]:
    """`config` at the layout that --layout names, and the number of ranks that takes."""
    layout = parse_layout(text)
    if not dry_run:
        raise ConfigError(
            "--layout goes with --dry-run; a run has its layout from --tensor-model-parallel-size, --zero-stage and "
            "the number of ranks that are started"
        )
    others = {
        "pp": layout.shape.pipe,
        "vpp": layout.virtual_stages,
        "cp": layout.shape.context,
        "ep": layout.shape.expert,
    }
    if refused := [f"{axis}={size}" for axis, size in others.items() if size > 1]:
        raise ConfigError(f"--layout has {', '.join(refused)}, which is not in this version; leave it out")
    parallel = {"tensor_model_parallel_size": layout.shape.tensor, "zero_stage": layout.zero}
    return sources.override(config, {"parallel": parallel}), layout.shape.world_size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
