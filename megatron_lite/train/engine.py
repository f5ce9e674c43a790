"""The engine on DeepSpeed ZeRO 1 to 3: the one file that imports deepspeed, and only when a stage is asked for."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.optim.build import is_torchs_own
from megatron_lite.optim.gradient_norm import clip_factor
from megatron_lite.parallel.layout import ParameterLayout
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.backward import Backward, ScheduledBackward, SharedWeight
from megatron_lite.train.deepspeed_config import for_own_gradients, read, schema_problems
from megatron_lite.train.deepspeed_mesh import MeshForDeepSpeed
from megatron_lite.train.engine_interface import Engine, StepOutcome
from megatron_lite.train.flat_gradients import FlatGradients
from megatron_lite.train.fragment import MasterFragment
from megatron_lite.train.replicas import Held


class ZeroEngine(Engine):
    """DeepSpeed ZeRO 1, 2 or 3 (Rajbhandari et al. 2020).

    Stage 1 adds micro-batches up in whole fp32 gradients and reduces once; stages 2 and 3 reduce every
    micro-batch into this rank's part, so that whole gradients are never held.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        mesh: ProcessMesh,
        optimizer: torch.optim.Optimizer,
        slots: tuple[str, ...],
        deepspeed_config: dict[str, Any],
        shared: SharedWeight | None = None,
        *,
        overlap_elements: int | None = None,
    ):
        deepspeed = _import_deepspeed()
        names = [(name, parameter, parameter.mesh_layout) for name, parameter in module.named_parameters()]
        own = for_own_gradients(deepspeed_config)
        bf16, fp16 = (deepspeed_config[dtype]["enabled"] for dtype in ("bf16", "fp16"))
        if bf16 or fp16:
            for _, parameter, _ in names:
                parameter.data = parameter.data.to(torch.bfloat16 if bf16 else torch.float16)
                if own is None:
                    # Autograd then adds micro-batches up in fp32; a bf16 gradient of ones stops at 256.
                    parameter.grad_dtype = torch.float32
        self._deepspeed, wrapped, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            mpu=MeshForDeepSpeed(mesh),
            config=own or deepspeed_config,
            dist_init_required=False,
        )
        super().__init__(module, mesh, wrapped.optimizer, slots, shared)
        self.forward = self._deepspeed
        if mesh.size("pipe") > 1:
            # ZeRO 3 would compare the order of layers of all ranks, to fetch ahead in it.
            self.forward = module.forward
        self.scales_loss = fp16
        self._zero = wrapped
        if fp16:
            # It would be asked to grow before the step, which then divides by what did not multiply its gradients.
            self._update_loss_scale = wrapped._update_scale
            wrapped._update_scale = lambda overflow: None
        self.stage = int(self._deepspeed.zero_optimization_stage())
        self._names = names
        self._clip_grad = deepspeed_config["gradient_clipping"]
        self._flat_gradients = None
        if own is not None:
            self._flat_gradients = FlatGradients(
                self._zero.bit16_groups_flat,
                self._zero.bit16_groups,
                mesh,
                forward_order=[parameter for _, parameter, _ in names],
                bucket_elements=overlap_elements,
            )
            if not bf16 and not self.scales_loss:
                self._make_weights_their_own_masters()
        elif mesh.size("pipe") > 1:
            self._reduce_norms_of_groups_at_once()
        groups = self._optimizer.param_groups
        if self.stage == 3:
            groups = [groups[self._zero.sub_group_to_group_id[part]] for part in range(len(self._masters()))]
        self._allocate_state(zip(self._masters(), groups, strict=True))

    def _make_weights_their_own_masters(self) -> None:
        """fp32 weights need no second fp32 copy: this rank's masters become views of them."""
        rank = self.mesh.rank(*REPLICAS)
        for master, parts in zip(self._masters(), self._zero.parallel_partitioned_bit16_groups, strict=True):
            master.data = parts[rank]
        for _, parameter, _ in self._names:
            if (link := parameter._hp_mapping) is not None:
                place, master = link.hp_fragment_address, self._masters()[link.param_group_index]
                link.hp_fragment = master.detach().narrow(0, place.start, place.numel)

    def _reduce_norms_of_groups_at_once(self) -> None:
        """Let DeepSpeed sum the gradient norm over stages and tensor ranks once, where it would do so for each
        parameter group: stages differ in how many they have, and would wait for one another."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero, name = self._zero, "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        norms_of_groups, over_ranks = getattr(zero, name), zero._model_parallel_all_reduce

        def norms():
            zero._model_parallel_all_reduce = lambda tensor, op: None
            here = norms_of_groups()
            zero._model_parallel_all_reduce = over_ranks
            square = combine_grad_norm_groups(here if self.stage == 3 else [here]).square()
            over_ranks(tensor=square, op=dist.ReduceOp.SUM)
            return [square.sqrt()] if self.stage == 3 else square.sqrt()

        setattr(zero, name, norms)

    @contextlib.contextmanager
    def gradients(self, count: int) -> Iterator[Backward]:
        self.holds_gradients = True
        done = 0
        # DeepSpeed averages over these ranks; our losses are shares of one global mean, to be summed.
        factor = 1 if self._flat_gradients is not None else self.mesh.size(*REPLICAS)

        def backward(loss: torch.Tensor) -> None:
            nonlocal done
            done += 1
            if self._flat_gradients is None:
                self._deepspeed.set_gradient_accumulation_boundary(done == count)
            elif done == count:
                self._flat_gradients.expect()
            self._deepspeed.backward(loss * factor)

        if self._flat_gradients is None:
            yield backward
            return
        with self._deepspeed.no_sync():
            yield backward
        self._zero.averaged_gradients.update(enumerate(self._flat_gradients.reduce()))

    @contextlib.contextmanager
    def scheduled_gradients(self) -> Iterator[ScheduledBackward]:
        self.holds_gradients = True
        if self._flat_gradients is not None:
            with self._deepspeed.no_sync():
                yield ScheduledBackward(self._deepspeed.scale, self._flat_gradients.take)
            if self._shared is not None:
                self._shared.join(self._flat_gradients.place_of(self._shared.parameter))
            self._zero.averaged_gradients.update(enumerate(self._flat_gradients.reduce()))
            return
        replicas = self.mesh.size(*REPLICAS)
        with self._deepspeed.coalesce_grad_reduction():
            yield ScheduledBackward(lambda share: self._deepspeed.scale(share * replicas))
            if self._shared is not None:
                self._shared.join(self._shared.parameter.grad)

    def step(self, learning_rate: float) -> StepOutcome:
        scale = float(self._zero.loss_scale)
        own_norm = None
        if self._flat_gradients is not None:
            own_norm = self._global_norm(self._flat_gradients.owned, REPLICAS, ("pipe", "tensor")) / scale
            if math.isfinite(own_norm):
                self._flat_gradients.multiply(clip_factor(own_norm, self._clip_grad))
            elif not self.scales_loss:
                return StepOutcome(own_norm, skipped=True, loss_scale=scale)
        self.holds_gradients = False
        self._set_learning_rate(learning_rate)
        self._deepspeed.set_gradient_accumulation_boundary(True)
        self._deepspeed.step()
        if self.scales_loss:
            self._update_loss_scale(self._zero.overflow)
        if self._zero.overflow:
            return StepOutcome(math.inf, skipped=True, loss_scale=scale)
        norm = self._deepspeed.get_global_grad_norm() if own_norm is None else own_norm
        return StepOutcome(math.nan if norm is None else float(norm), skipped=False, loss_scale=scale)

    def state(self) -> dict[str, Any]:
        scaler = self._zero.loss_scaler
        dynamic = {key: getattr(scaler, key) for key in _SCALER_FIELDS if hasattr(scaler, key)}
        return {**super().state(), "loss_scaler": dynamic}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        for key, value in state.get("loss_scaler", {}).items():
            setattr(self._zero.loss_scaler, key, value)

    def refresh(self) -> None:
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._masters())):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_grad

        if not self.holds_gradients:
            return
        for name, parameter, _ in self._names:
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                yield name, gradient.float() / self._zero.loss_scale

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter, _ in self._names:
            yield name, safe_get_full_fp32_param(parameter)

    def held(self) -> Iterator[Held]:
        if self.stage < 3:
            yield from super().held()
            return
        # Shared out over replicas, a weight is held alike by tensor ranks alone; but small ones are kept whole too.
        for name, parameter, layout in self._names:
            if parameter.ds_persist and parameter.numel() == parameter.ds_numel:
                yield Held(f"weight {name}", parameter, str(layout.boxes))
            else:
                # The padding of the last partition is whatever was in memory.
                length, replica = parameter.ds_tensor.numel(), self.mesh.rank(*REPLICAS)
                filled = parameter.ds_tensor[: max(0, min(length, parameter.ds_numel - replica * length))]
                yield Held(f"weight {name}", filled, f"{layout.boxes} {replica}")

    def _masters(self) -> list[torch.Tensor]:
        """The flat fp32 masters, of which each optimizer slot is a copy in shape."""
        return (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )

    def _fragments(self) -> Iterator[MasterFragment]:
        if self.stage == 3:
            yield from self._stage_3_fragments()
            return
        # DeepSpeed's own link from a parameter to its part of the flat fp32 master. Not a public
        # interface: tests/train/test_deepspeed_contract.py holds it.
        masters = self._masters()
        for name, parameter, layout in self._names:
            link = parameter._hp_mapping
            if link is not None:
                yield MasterFragment(
                    parameter,
                    name,
                    layout,
                    link.lp_fragment_address.start,
                    link.lp_fragment_address.numel,
                    masters[link.param_group_index],
                    link.hp_fragment_address.start,
                )

    def _stage_3_fragments(self) -> Iterator[MasterFragment]:
        for name, parameter, layout in self._names:
            group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            # Partitions are of equal length; the last one ends in padding.
            start = self.mesh.rank(*REPLICAS) * length
            held = max(0, min(length, parameter.ds_numel - start))
            if held:
                yield MasterFragment(parameter, name, layout, start, held, self._masters()[group], offset)


def build_partitioned(
    build: Callable[[], torch.nn.Module],
    value_of: Callable[[str, ParameterLayout], torch.Tensor],
    mesh: ProcessMesh,
    deepspeed_config: dict[str, Any],
) -> torch.nn.Module:
    """A module that never was whole on a rank: stage 3 takes each submodule apart as soon as it is built.

    `build` gives the module with empty parameters that carry `mesh_layout`; `value_of(name, layout)` is a
    parameter's initial value on this tensor rank, asked for on the first data rank alone, one at a time.
    """
    deepspeed = _import_deepspeed()
    with deepspeed.zero.Init(
        data_parallel_group=mesh.group(*REPLICAS), config_dict_or_path=deepspeed_config, mem_efficient_linear=False
    ):
        module = build()
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if mesh.rank(*REPLICAS) == 0:
                parameter.copy_(value_of(name, parameter.mesh_layout))
    return module


#: What the dynamic loss scaler remembers between steps.
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def load_libraries(config: RunConfig, device: str = "cpu") -> None:
    """Import what a run on such a device needs now, so that measures of time and memory from here on leave it out."""
    # What the collector ends in the midst of an import may import as well, and Python 3.11 fails in that.
    collects = gc.isenabled()
    gc.disable()
    try:
        _load(config, device)
    finally:
        if collects:
            gc.enable()


def _load(config: RunConfig, device: str) -> None:
    if config.parallel.pipeline_model_parallel_size > 1:
        import torch.distributed.pipelining
    recomputes, stage = config.training.recompute_granularity != "none", config.effective_zero_stage
    if recomputes or stage == 3 or is_torchs_own(config.optimizer, device):
        import torch._dynamo  # noqa: F401  70 MB that they would load when they are first used

    if stage > 0:
        _import_deepspeed()
        path = config.parallel.deepspeed_config
        if path and (problems := schema_problems(read(path), _schemas())):
            raise ConfigError(problems)


def _schemas() -> dict[str, type]:
    """DeepSpeed's own schemas of sections of its JSON, pydantic models."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monitors = {"tensorboard": TensorBoardConfig, "wandb": WandbConfig, "csv_monitor": CSVConfig, "comet": CometConfig}
    return {"zero_optimization": DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig, **monitors}


def _is_news(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warnings of what is so on purpose: a machine without a GPU, our own optimizers."""
    text = record.getMessage()
    no_gpu = "Setting accelerator to CPU" in text and not torch.cuda.is_available()
    return not (no_gpu or "ZeRO with an untested optimizer" in text)


def _import_deepspeed():
    """deepspeed, quiet and without what takes long to load or compile and is not used."""
    if "deepspeed" not in sys.modules:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        logging.getLogger("DeepSpeed").addFilter(_is_news)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"ZeRO needs deepspeed, which cannot be imported ({error}); `pip install deepspeed`, or --zero-stage 0 in "
            "fp32"
        ) from None
    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    # DeepSpeed insists on the variable, also where no launcher set it; this rank's device is set already.
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0))
    # DeepSpeed calls collectives by the names they had before torch 2.13, which warn every time.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    communication = sys.modules["deepspeed.comm.torch"]
    communication.build_shm_op = lambda: None
    # It would load torch's compiler, a second or more, for the functions of an optimizer that is not used.
    sys.modules["deepspeed.runtime.compiler"].compile = lambda: lambda function: function
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed
