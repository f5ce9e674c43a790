"""How far a run is: the part of its state that is plain numbers, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Progress:
    """The cursor of a run. Which samples come next follows from `consumed_samples` alone."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    """Target tokens trained on."""
    skipped_steps: int = 0
    """Steps an fp16 overflow left without an update."""
    best_valid_loss: float | None = None
    best_step: int | None = None
    validations_without_better: int = 0

    def note_validation(self, loss: float) -> bool:
        """Take a validation loss in; True if it is the best so far."""
        if self.best_valid_loss is None or loss < self.best_valid_loss:
            self.best_valid_loss, self.best_step, self.validations_without_better = loss, self.step, 0
            return True
        self.validations_without_better += 1
        return False

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Progress:
        return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
