"""What an engine is to the loop: it owns gradients, masters and optimizer state. Used as

    with engine.gradients(count) as backward:      # count micro-batches
        for micro_batch in micro_batches:
            backward(engine.forward(micro_batch) / target_tokens)
    outcome = engine.step(learning_rate)

where the loss divided by `target_tokens` is this rank's share of the mean over the whole global batch: the
engine sums over replicas, it does not average. `scheduled_gradients` is for schedules that call backward themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from megatron_lite.checkpoint.piece import Piece
from megatron_lite.optim.gradient_norm import sum_of_squares
from megatron_lite.optim.state import allocate_state, set_step_count, slot_part, step_count
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.backward import Backward, ScheduledBackward, SharedWeight
from megatron_lite.train.fragment import MasterFragment
from megatron_lite.train.replicas import Held, compare

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did."""

    grad_norm: float
    """Global gradient norm before clipping; inf for a step that was skipped."""
    skipped: bool
    """The fp16 loss scale overflowed and no weight changed."""
    loss_scale: float


class Engine:
    """What the two engines share: state in pieces of global tensors, for checkpoints."""

    def __init__(
        self,
        module: torch.nn.Module,
        mesh: ProcessMesh,
        optimizer: torch.optim.Optimizer,
        slots: Iterable[str],
        shared: SharedWeight | None,
    ):
        self.module = module
        self.mesh = mesh
        #: The model as it is called: DeepSpeed counts forward passes, so it stands in between.
        self.forward: Callable[..., Any] = module
        self.slots = tuple(slots)
        #: A step may be skipped because an fp16 gradient overflowed.
        self.scales_loss = False
        #: Gradients of a step are there, from `gradients` to a `step` that used them up.
        self.holds_gradients = False
        self._optimizer = optimizer
        self._shared = shared

    def gradients(self, count: int) -> contextlib.AbstractContextManager[Backward]:
        raise TypeError("use ZeroEngine or ReplicaEngine")

    def scheduled_gradients(self) -> contextlib.AbstractContextManager[ScheduledBackward]:
        raise TypeError("use ZeroEngine or ReplicaEngine")

    def step(self, learning_rate: float) -> StepOutcome:
        raise TypeError("use ZeroEngine or ReplicaEngine")

    def pieces(self, optimizer: bool = True) -> list[Piece]:
        """This rank's fp32 masters ("weight/NAME") and optimizer slots ("SLOT/NAME") as rectangles
        of global tensors, views of live memory: read on save, written in place on load."""
        found = []
        for fragment in self._fragments():
            shape, owned = fragment.layout.global_shape, fragment.layout.is_owner and self._owns_replica()
            for part, first, last in fragment.parts():
                weight = fragment.master.detach().view(-1)[first:last].view(part.shape)
                found.append(Piece(f"weight/{fragment.name}", shape, part.global_start, weight, owned))
                for slot in self.slots if optimizer else ():
                    held = slot_part(self._optimizer, fragment.master, slot, first, last - first)
                    found.append(
                        Piece(
                            f"{slot}/{fragment.name}",
                            shape,
                            part.global_start,
                            held.values.view(part.shape),
                            owned,
                            absmax=held.absmax,
                            signed=held.signed,
                            keeps_above_zero=held.keeps_above_zero,
                        )
                    )
        return found

    def state(self) -> dict[str, Any]:
        """Plain values a resume needs beside the pieces."""
        return {"optimizer_steps": step_count(self._optimizer)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        set_step_count(self._optimizer, state["optimizer_steps"])

    def refresh(self) -> None:
        """Bring the model's weights in line with masters that were written by a load."""

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This tensor rank's whole gradients, summed over data ranks; none unless `holds_gradients`.

        A collective call over the data ranks at each parameter: iterate to the end on all of them.
        """
        raise TypeError("use ZeroEngine or ReplicaEngine")

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This tensor rank's whole fp32 weights; collective as `named_gradients` is."""
        raise TypeError("use ZeroEngine or ReplicaEngine")

    def held(self) -> Iterator[Held]:
        """What this rank holds that others may hold too, as it is in memory: the weights, and whatever is not shared
        out over replicas."""
        for name, parameter in self.module.named_parameters():
            yield Held(f"weight {name}", parameter, str(parameter.mesh_layout.boxes))
        steps = torch.tensor(step_count(self._optimizer), device=self.mesh.device)
        yield Held("the optimizer's count of steps", steps, "")

    def compare_replicas(self, step: int) -> None:
        """Have ranks compare what they hold alike in a step; raises ReplicasDiffer on all of them."""
        tied, ends = [], None
        # Sums of three or more gradients are rounded in an order that is the stage's own.
        if self._shared is not None and self.mesh.size(*REPLICAS) <= 2:
            parameter, ends = self._shared.parameter, self._shared.group
            tied = [Held("the tied embedding", getattr(parameter, "ds_tensor", parameter), "")]
        compare(self.held(), tied, ends, self.mesh, step)

    def _fragments(self) -> Iterator[MasterFragment]:
        raise TypeError("use ZeroEngine or ReplicaEngine")

    def _allocate_state(self, masters: Iterable[tuple[torch.Tensor, dict[str, Any]]]) -> None:
        """Make the optimizer's state of `masters`, each given with its parameter group."""
        cuts: dict[torch.Tensor, list[tuple[int, int]]] = defaultdict(list)
        for fragment in self._fragments():
            cuts[fragment.master] += [(first, last) for _, first, last in fragment.parts()]
        for master, group in masters:
            allocate_state(self._optimizer, master, group.get("bits", 32), self.slots, sorted(cuts[master]))

    def _owns_replica(self) -> bool:
        """Whether this replica writes what it holds (False where another one holds the same)."""
        return True

    def _global_norm(self, gradients: list[torch.Tensor], *axes: tuple[str, ...]) -> float:
        """The norm of all ranks' `gradients`, no element of which is here and elsewhere along `axes`."""
        squares = sum_of_squares(gradients, self.mesh.device)
        for group in (self.mesh.group(*along) for along in axes):
            all_reduce(squares, group)
        return math.sqrt(squares.item())

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
