"""AdamW on the native kernels: a parameter group's "bits" say how its moments are kept."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, compress
from typing import Any, NamedTuple

import torch

from megatron_lite.kernels.adamw import adamw
from megatron_lite.kernels.adamw8bit import State8bit, adamw8bit
from megatron_lite.kernels.code_maps import SIGNED, blocks

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""The slots, and whether a moment may be negative."""


class Pieces(NamedTuple):
    """Stretches of a flattened parameter at which blocks of 256 begin anew."""

    lengths: list[int]
    """Of all stretches in order; some lie between pieces and belong to none."""
    is_piece: list[bool]
    blocks: list[int]
    """How many each piece has."""
    first_block: dict[int, int]
    """Where a piece begins -> the blocks of those before it."""

    @classmethod
    def of(cls, length: int, cuts: Iterable[tuple[int, int]]) -> Pieces:
        """The pieces [first, last) of a parameter of `length` elements. Raises ValueError where they overlap."""
        lengths, is_piece, starts, counts, at = [], [], [], [], 0
        for first, last in cuts:
            if not at <= first < last <= length:
                raise ValueError(f"the piece [{first}, {last}) begins before {at} or ends beyond {length}")
            lengths += [first - at, last - first]
            is_piece += [False, True]
            starts.append(first)
            counts.append(blocks(last - first))
            at = last
        first_block = dict(zip(starts, accumulate(counts, initial=0), strict=False))
        return cls([*lengths, length - at], [*is_piece, False], counts, first_block)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of the pieces of a tensor of the parameter's length."""
        return list(compress(flat.view(-1).split(self.lengths), self.is_piece))


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with moments in fp32, or in 8 bits as of Dettmers et al. 2022.

    groups: torch.optim's, each with "bits" 32 (as without) or 8. State of 32 bits is torch.optim.AdamW's: "step",
    "exp_avg" and "exp_avg_sq" of the parameter's shape. With 8 bits those are codes, uint8, and "exp_avg_absmax" and
    "exp_avg_sq_absmax" are beside them, one fp32 number for each block of 256 elements: 2.03 bytes an element in all.
    keep_second_moments: as `kernels.adamw8bit` takes it. `load_state_dict` is refused: a checkpoint is read into what
    `allocate` made.
    """

    # Torch's loads its compiler when the first group comes, which takes as long as torch itself.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        keep_second_moments: bool = True,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": 32})
        self.keep_second_moments = keep_second_moments
        self._pieces: dict[torch.Tensor, Pieces] = {}

    def allocate(self, parameter: torch.Tensor, bits: int, cuts: Sequence[tuple[int, int]] | None = None) -> None:
        """Make the state of a parameter, as before its first step; that does it for one that has none.

        cuts: with 8 bits, the pieces [first, last) of the flattened parameter in rising order, each quantised by
        itself; what lies in none (padding) is left alone. Without them the parameter is one piece.
        """
        state = self.state[parameter]
        zeros = partial(torch.zeros, dtype=torch.float32, device=parameter.device)
        state["step"] = torch.zeros((), dtype=torch.int64)
        if bits == 32:
            state.update({name: zeros(parameter.shape) for name in MOMENTS})
            return
        length = parameter.numel()
        pieces = Pieces.of(length, [(0, length)] if cuts is None and length else cuts or [])
        for name, signed in MOMENTS.items():
            zero = SIGNED.index(0) if signed else 0
            state[name] = torch.full(parameter.shape, zero, dtype=torch.uint8, device=parameter.device)
            state[f"{name}_absmax"] = zeros(sum(pieces.blocks))
        self._pieces[parameter] = pieces

    def absmax(self, parameter: torch.Tensor, slot: str, first: int, length: int) -> torch.Tensor | None:
        """The absmax of the blocks of the piece [first, first + length), a view; None of a slot of 32 bits."""
        if parameter not in self._pieces:
            return None
        begin = self._pieces[parameter].first_block[first]
        return self.state[parameter][f"{slot}_absmax"][begin : begin + blocks(length)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused with TypeError: torch's would cast codes and fp32 moments to the parameter's dtype, in silence."""
        raise TypeError(
            "AdamW has no load_state_dict: torch's casts 8-bit codes and fp32 moments to the parameters' dtype, and "
            "knows no pieces. Checkpoints go through Engine.pieces (checkpoint/save.py and load.py), which copy into "
            "the state that allocate_state made"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise TypeError("AdamW takes no closure: it looks at a gradient once")
        for group in self.param_groups:
            by_step: dict[int, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.allocate(parameter, group["bits"])
                    count = self.state[parameter]["step"].add_(1)
                    by_step[int(count)].append(parameter)
            update = self._update_by_pieces if group["bits"] == 8 else self._update
            for step, parameters in by_step.items():
                update(
                    parameters,
                    step=step,
                    lr=group["lr"],
                    betas=group["betas"],
                    epsilon=group["eps"],
                    weight_decay=group["weight_decay"],
                )

    def _update(self, parameters: list[torch.Tensor], **rule: Any) -> None:
        gradients = [parameter.grad for parameter in parameters]
        moments = ([self.state[parameter][name] for parameter in parameters] for name in MOMENTS)
        adamw(parameters, gradients, *moments, **rule)

    def _update_by_pieces(self, parameters: list[torch.Tensor], **rule: Any) -> None:
        values: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        states: list[State8bit] = []
        for parameter in parameters:
            pieces, state = self._pieces[parameter], self.state[parameter]
            values += pieces.split(parameter)
            gradients += pieces.split(parameter.grad.reshape(-1))
            slots = []
            for name in MOMENTS:
                slots += [pieces.split(state[name]), state[f"{name}_absmax"].split(pieces.blocks)]
            states += map(State8bit, *slots)
        adamw8bit(values, gradients, states, keep_second_moments=self.keep_second_moments, **rule)
