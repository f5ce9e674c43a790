"""Checkpoints: where they are written and read, how often, what is kept."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Where and when state is saved, and from where a run goes on."""

    save: str | None = None
    """Folder of this run's checkpoints."""
    save_interval: int | None = None
    """Steps between checkpoints; default: only at the end and when stopped."""
    load: str | None = None
    """Folder of checkpoints to start from when `save` holds none of this run."""
    load_hf: str | None = None
    """Hugging Face folder whose model to go on from, when `save` holds no checkpoint of this run: its weights, its
    config.json unless flags contradict it, and its tokenizer unless another is named."""
    ckpt_step: int | None = None
    """Step to load; default: the newest complete one."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on if `save` holds a complete checkpoint; must: error without one; never: error with one."""
    overwrite: bool = False
    """With --resume never: empty the run folder of an earlier run first."""
    finetune: bool = False
    """Load weights alone; step, data position and optimizer start anew."""
    no_load_optim: bool = False
    """Do not load optimizer state and learning-rate schedule."""
    no_load_rng: bool = False
    """Draw dropout from this run's seed instead of the checkpoint's."""
    no_save_optim: bool = False
    """Save weights alone (such a checkpoint cannot be resumed, only loaded with --finetune)."""
    keep_last: int | None = None
    """Newest checkpoints to keep; default: all. The best one is kept apart."""
    keep_every: int | None = None
    """With keep_last: keep the checkpoints of steps that are multiples of this as well."""
    save_copy_to: str | None = None
    """URL of a folder to which every checkpoint is copied once it is saved (fsspec: s3://, gs://, file://, ...)."""
    async_save: bool = True
    """Save in the background, from a copy in host memory, while training goes on."""

    @property
    def loads_what_it_saves(self) -> bool:
        """Whether `load` names the folder of `save` again, as Megatron's scripts do to go on with a run."""
        return None not in (self.load, self.save) and os.path.realpath(self.load) == os.path.realpath(self.save)
