"""What a run says: console, files, trackers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is logged, how often and where."""

    run_dir: str | None = None
    """Folder of metrics.jsonl, config.yaml, exit.json and TensorBoard events; default: the --save folder."""
    log_interval: int = 1
    """Steps between console lines; metrics.jsonl has every step."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard events; default: tensorboard/ in the run folder. "none" is off."""
    log_num_zeros_in_grad: bool = False
    """Also log the number of zero gradient elements."""
    log_histograms_interval: int | None = None
    """Steps between TensorBoard histograms of weights and gradients."""
    wandb_project: str | None = None
    """Weights & Biases project; on when given."""
    wandb_exp_name: str | None = None
    """Weights & Biases run name."""
    wandb_save_dir: str | None = None
    """Folder of Weights & Biases files; default: the run folder."""
