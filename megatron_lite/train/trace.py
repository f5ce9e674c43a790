"""A few steps of training and what they computed on this rank, as pieces of global tensors.

Names, shapes and, but for rounding, values of those tensors do not depend on the layout (see `compare.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.piece import Piece, pieces_of
from megatron_lite.checkpoint.save import save
from megatron_lite.config import sources
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.data.micro_batch import MicroBatch
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.context import ContextAxis
from megatron_lite.parallel.mesh_shape import REPLICAS
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.random import micro_batch_seed
from megatron_lite.train import build
from megatron_lite.train.batch_plan import samples_of_run
from megatron_lite.train.engine import load_libraries
from megatron_lite.train.engine_interface import Engine
from megatron_lite.train.reading import count_targets, read
from megatron_lite.train.step import train_step

_ADAM_EPS = 1e-4


@dataclasses.dataclass(frozen=True)
class Trace:
    """What this rank saw of a short training run."""

    curve: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    pieces: list[Piece]
    """Copies on the CPU, fp32: `output/LAYER` [samples, S, ...] of the first step, `gradient/PARAMETER` of the first
    step that was not skipped, before clipping, and `weight/PARAMETER` after the last step."""


def comparable(config: RunConfig, steps: int) -> tuple[RunConfig, list[str]]:
    """`config` for a trace of so many steps, and what it does not take from the given one, one sentence each."""
    told = []
    length = {"train_iters": steps, "train_samples": None, "train_tokens": None, "train_epochs": None}
    changes: sources.Overrides = {"training": {**length, "rampup_batch_size": None, "eval_interval": 0}}
    if config.model.attention_dropout:
        changes["model"] = {"attention_dropout": 0.0}
        told.append(f"attention_dropout is 0, not {config.model.attention_dropout:g}: each rank draws its own masks")
    if config.optimizer.adam_eps < _ADAM_EPS and config.optimizer.optimizer.startswith("adam"):
        changes["optimizer"] = {"adam_eps": _ADAM_EPS}
        told.append(
            f"adam_eps is {_ADAM_EPS:g}, not {config.optimizer.adam_eps:g}, with which the rounding of zero gradients "
            "becomes steps"
        )
    if not (config.data.mock_data or config.data.data_path or config.data.train_data_path):
        changes["data"] = {"mock_data": True}
        told.append("no data are named, so tokens are generated (--mock-data)")
    return sources.override(dataclasses.replace(config, checkpoint=CheckpointConfig()), changes), told


def serial_of(config: RunConfig, data_size: int) -> RunConfig:
    """The same training in one process: without recompute, with as little of ZeRO as there can be, and in the same
    micro-batches, whose dropout masks are their own."""
    batch = {
        "global_batch_size": config.training.batch_size(data_size),
        "gradient_accumulation_steps": None,
        "recompute_granularity": "none",
    }
    parallel = ParallelConfig(zero_stage=0 if config.precision.dtype == "fp32" else 1)
    return sources.override(dataclasses.replace(config, parallel=parallel), {"training": batch})


def trace(
    config: RunConfig, mesh: ProcessMesh, vocab_size: int, tokenizer: Tokenizer | None = None, *, steps: int
) -> Trace:
    """Train so many steps from the beginning, at the peak learning rate, and tell what they computed.

    Raises what training does.
    """
    load_libraries(config, mesh.device.type)
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, vocab_size), mesh)
    pipeline = build.build_pipeline(config, engine.module, mesh)
    total_samples = samples_of_run(config.training, mesh.size("data"), config.data.seq_length)
    stream = build.open_stream(config, "train", vocab_size, tokenizer, total_samples=total_samples)
    loader = build.open_loader(config, stream, mesh, vocab_size, tokenizer)
    batch_size, seed = config.training.batch_size(mesh.size("data")), config.training.seed
    outputs = _Outputs(config, mesh)
    curve: list[tuple[float, float]] = []
    gradients: list[Piece] = []
    is_taken = False

    def take_gradients(engine: Engine) -> None:
        gradients[:] = _gradients(engine)

    with contextlib.closing(loader):
        for step in range(steps):
            batches, (tokens,) = read(
                loader, mesh, step * batch_size, batch_size, lambda found: [count_targets(found, mesh)]
            )
            called = [engine.module] if pipeline is None else pipeline.modules
            with outputs.recorded(engine.module, called, batches) if step == 0 else contextlib.nullcontext():
                result = train_step(
                    engine,
                    mesh,
                    batches,
                    target_tokens=int(tokens),
                    step=step + 1,
                    seed=seed,
                    learning_rate=config.optimizer.lr,
                    pipeline=pipeline,
                    look=None if is_taken else take_gradients,
                )
            is_taken |= not result.outcome.skipped
            curve.append((result.loss, result.outcome.grad_norm))
    weights = [dataclasses.replace(p, tensor=_kept(p.tensor)) for p in engine.pieces(optimizer=False)]
    return Trace(curve, [*outputs.pieces, *gradients, *weights])


def save_trace(found: Trace, folder: Path, mesh: ProcessMesh, config: RunConfig) -> None:
    """Write all ranks' traces into `folder`, as the one checkpoint there. Raises what a save does."""
    curve = [[value if math.isfinite(value) else None for value in point] for point in found.curve]
    with store.claim(folder, mesh):
        save(
            folder,
            len(curve),
            found.pieces,
            {"curve": curve},
            mesh,
            layout=str(mesh.shape),
            config=sources.plain(config),
            versions={},
        )


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _gradients(engine: Engine) -> Iterator[Piece]:
    layouts = {name: parameter.mesh_layout for name, parameter in engine.module.named_parameters()}
    tells = engine.mesh.rank(*REPLICAS) == 0
    for name, gradient in engine.named_gradients():
        layout = layouts[name]
        yield from pieces_of(f"gradient/{name}", layout, _kept(gradient), owned=layout.is_owner and tells)


class _Outputs:
    """What the layers of this rank give for each micro-batch of a step."""

    def __init__(self, config: RunConfig, mesh: ProcessMesh):
        self.pieces: list[Piece] = []
        self._mesh = mesh
        self._context = ContextAxis(mesh.group("context"))
        self._shape = (config.training.batch_size(mesh.size("data")), config.data.seq_length)
        self._seed = config.training.seed
        self._first_samples: dict[int, int] = {}
        self._first_sample: int | None = None

    @contextlib.contextmanager
    def recorded(self, model: GPT, called: Iterable[nn.Module], batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Record in here, where the first step is made of `batches` by calling `called` with their dropout seeds."""
        self._first_samples = {micro_batch_seed(self._seed, 1, batch.index): batch.first_sample for batch in batches}
        layers = {f"layers.{number}": layer for number, layer in model.layers.items()}
        layers |= {name: getattr(model, name) for name in ("embedding", "final_norm", "head")}
        with contextlib.ExitStack() as hooks:
            for module in called:
                hooks.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._end).remove)
            for name, layer in layers.items():
                if layer is not None:
                    hooks.callback(layer.register_forward_hook(self._taker(name)).remove)
            yield

    def _begin(self, _module, _arguments, options) -> None:
        # Pipelines hand the seed's 64 bits on as a signed number.
        self._first_sample = self._first_samples[int(options["dropout_seed"]) % (1 << 64)]

    def _end(self, *_) -> None:
        self._first_sample = None

    def _taker(self, name: str):
        return lambda _module, _arguments, output: self._take(name, output)

    def _take(self, name: str, output: torch.Tensor) -> None:
        """Keep what a layer gave, [S, B, ...]; not what it gives when it is run again in backward."""
        if self._first_sample is None:
            return
        samples, length = self._shape
        held = output.shape[0]
        parts = length // self._context.size // held
        begin = self._mesh.rank("tensor") * held if parts > 1 else 0
        owned = parts > 1 or self._mesh.rank("tensor") == 0
        place = 0
        for tokens, first in self._context.spans(begin, begin + held, parts * held):
            part = _kept(output[place : place + tokens].transpose(0, 1))
            start = (self._first_sample, first, *(0 for _ in part.shape[2:]))
            self.pieces.append(Piece(f"output/{name}", (samples, length, *part.shape[2:]), start, part, owned))
            place += tokens
