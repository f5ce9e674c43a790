"""From a configuration to a finished run: assemble, resume or start anew, train, say how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_lite import log
from megatron_lite.checkpoint import store
from megatron_lite.checkpoint.find import Found, is_whole, search
from megatron_lite.checkpoint.load import load
from megatron_lite.checkpoint.remote import RemoteCopies, find_newest
from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.length_curriculum import LengthCurriculum
from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.stream import SampleStream
from megatron_lite.data.tokenizer_files import FOLDER as TOKENIZER_FOLDER
from megatron_lite.data.tokenizer_files import copy_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.data.vocabulary import resolve_vocabulary
from megatron_lite.errors import EXIT_ERROR, CheckpointDamaged, CheckpointError, MegatronLiteError
from megatron_lite.monitor import exit_file, rank_log
from megatron_lite.monitor.data_wait import DataWait
from megatron_lite.monitor.memory import MemoryMeter
from megatron_lite.monitor.metrics import Metrics
from megatron_lite.monitor.pace import Pace
from megatron_lite.monitor.sinks import open_sinks
from megatron_lite.monitor.versions import versions
from megatron_lite.optim.schedule import Schedule, schedule
from megatron_lite.parallel.failure import in_a_line, tell_traceback
from megatron_lite.parallel.launch import Launch, StopRequest, open_store
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.roll_call import RollCall, this_place
from megatron_lite.plan.devices import dense_peak_flops
from megatron_lite.plan.flops import flops_per_token
from megatron_lite.publish import publish
from megatron_lite.train import agreement, build, checkpoint_fit
from megatron_lite.train.batch_plan import BatchPlan, samples_of_run
from megatron_lite.train.dry_run import planned_peak
from megatron_lite.train.ending import Ending
from megatron_lite.train.engine import load_libraries
from megatron_lite.train.engine_interface import Engine
from megatron_lite.train.huggingface import begin_with
from megatron_lite.train.keeper import Keeper
from megatron_lite.train.loop import Run, train
from megatron_lite.train.progress import Progress
from megatron_lite.train.stretches import continued
from megatron_lite.train.watching import watch_for_hangs

#: What a run leaves behind that failed before it began.
_OF_NO_RUN = (".lock", exit_file.NAME, rank_log.FOLDER)


def run_folder(config: RunConfig) -> Path | None:
    """Where metrics, config and exit.json of a run go: --run-dir, else --save, else nowhere."""
    folder = config.logging.run_dir or config.checkpoint.save
    return None if folder is None else Path(folder)


def run_training(config: RunConfig, me: Launch, command: str) -> None:
    """Train as configured, on the ranks that were launched.

    `command` is how this run was started, for the line that says how to go on. Raises
    MegatronLiteError; a stop by request is no error.
    """
    stop = StopRequest(config.training.exit_signal_grace_seconds)
    stop.listen()
    timeout = config.parallel.distributed_timeout_minutes
    store = open_store(me, timeout)
    roll = RollCall(store, me.rank, me.world_size, keeper=None if me.store_is_there else 0)
    try:
        with Ending(me.rank, run_folder(config), command, roll).told():
            mesh = build.start_ranks(
                me,
                tensor=config.parallel.tensor_model_parallel_size,
                pipe=config.parallel.pipeline_model_parallel_size,
                context=config.parallel.context_parallel_size,
                timeout_minutes=timeout,
                store=store,
                before=lambda ranks: agreement.agree_on_launch(ranks, config),
            )
            roll.watch_neighbours(mesh.gather_json(this_place()))
        train_on(mesh, config, stop, command, roll)
    except MegatronLiteError:
        raise
    except Exception as error:
        roll.leave(in_a_line(error))
        tell_traceback(roll)
        raise SystemExit(EXIT_ERROR) from None
    finally:
        roll.leave()
        roll.close()
    stop.close()
    build.close_ranks()


def train_on(
    mesh: ProcessMesh, config: RunConfig, stop: StopRequest, command: str, roll: RollCall | None = None
) -> Run:
    """A run from its beginning, or from where it was left, to its end, on a live mesh.

    `roll` tells who is lost where ranks were launched; without it nobody is asked.
    """
    ending = Ending(mesh.global_rank, run_folder(config), command, roll)
    with contextlib.ExitStack() as held:
        # A folder that is refused is another run's, and its exit.json stays.
        with ending.told(but=MegatronLiteError):
            claim = _claim_folders(config, mesh, held)
        run = None
        try:
            build.prepare_kernels(config, mesh)
            build.together(mesh, lambda: load_libraries(config, mesh.device.type))
            agreement.agree(mesh, agreement.of_kernels(mesh.device))
            ending.watch = watch_for_hangs(config.parallel, mesh, run_folder(config), ending.tell_hang)
            if ending.watch is not None:
                held.callback(ending.watch.close)
            run = ending.run = _assemble(config, mesh, stop, MemoryMeter(mesh.device), claim)
            for resource in (run.sinks, run.train_loader, run.valid_loader):
                if resource is not None:
                    held.callback(resource.close)
            reason = train(run)
        except Exception as error:
            if run is not None:
                # Before the others hear of it: once called they end, and their part of the save with them.
                run.keeper.let_end(error)
            told = ending.tell_failure(error)
            if told is error:
                raise
            raise told from error
        ending.tell_end(run, reason)
    return run


def _claim_folders(config: RunConfig, mesh: ProcessMesh, held: contextlib.ExitStack) -> store.Claim | None:
    """Take the right to write in the run's folders, emptied first where --overwrite says so."""
    options, claim = config.checkpoint, None
    if options.save is not None:
        has_copies = options.save_copy_to is not None
        build.together(mesh, lambda: _insist(Path(options.save), options.resume, options.overwrite, has_copies))
        claim = held.enter_context(store.claim(options.save, mesh))
    build.together(mesh, lambda: _make_ready(config) if mesh.global_rank == 0 else None)
    return claim


def _make_ready(config: RunConfig) -> None:
    options, run_dir = config.checkpoint, run_folder(config)
    if options.save is not None and options.overwrite:
        _empty(Path(options.save))
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        exit_file.remove_exit(run_dir)


def _assemble(
    config: RunConfig, mesh: ProcessMesh, stop: StopRequest, memory: MemoryMeter, claim: store.Claim | None
) -> Run:
    copy_to = config.checkpoint.save_copy_to
    copies = build.together(mesh, lambda: RemoteCopies(copy_to) if copy_to else None)
    with build.alike():
        begin = _what_to_load(config, mesh, copies, values=False)
    data = build.together(mesh, lambda: _open_data(config, mesh))
    agreement.agree(mesh, agreement.of_data(data.facts))
    plan = data.plan
    config = plan.resolve(config, data.vocab_size)
    predicted_peak = build.together(mesh, lambda: planned_peak(config, mesh.size("data"), mesh.device.type))
    model = build.build_model_to_train(config, mesh, data.vocab_size)
    engine = build.build_engine(config, model, mesh)
    curve = schedule(config.optimizer, plan.total_iterations, plan.total_samples, config.model.hidden_size)
    stretches = continued({}, Progress(), config, data.facts["train_data"])
    start, family = _Start(Progress(), curve, config.training.seed, stretches), None
    if begin is not None:
        with build.alike():
            try:
                start = _load(config, mesh, engine, begin, start, data.facts)
            except CheckpointDamaged as error:
                log.warn(str(error))
                begin = _instead_of(begin, _what_to_load(config, mesh, copies, values=True))
                start = _load(config, mesh, engine, begin, start, data.facts)
        log.note(begin.told)
        family = begin.found.manifest.state.get("facts", {}).get("family")
    elif config.checkpoint.load_hf is not None:
        with build.alike():
            family = begin_with(config.checkpoint.load_hf, mesh, engine)
    if shortfall := start.schedule.shortfall(plan.total_iterations, plan.total_samples):
        log.warn(shortfall)
    device_name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    made_with = versions([device_name])
    run_dir = run_folder(config)
    build.together(mesh, lambda: _write_run_folders(config, made_with) if mesh.global_rank == 0 else None)
    curriculum = LengthCurriculum.of(config.data)
    lengths = [] if curriculum is None else [curriculum.describe()]
    for line in [*data.train_stream.describe(), *plan.lines(), *lengths]:
        log.note(line)
    sinks = build.together(
        mesh,
        lambda: open_sinks(
            config.logging,
            run_dir,
            rank=mesh.global_rank,
            world_size=mesh.world_size,
            total_steps=plan.total_iterations,
            resume_step=start.progress.step,
            settings=sources.plain(config),
        ),
    )
    peak = dense_peak_flops(device_name, config.precision.dtype)
    if peak is None:
        log.note(f"MFU: unknown device {device_name!r}, so it is not given")
    return Run(
        config=config,
        mesh=mesh,
        engine=engine,
        pipeline=build.build_pipeline(config, engine.module, mesh),
        plan=plan,
        schedule=start.schedule,
        progress=start.progress,
        dropout_seed=start.dropout_seed,
        curriculum=curriculum,
        train_stream=data.train_stream,
        train_loader=_open_loader(config, mesh, data, data.train_stream, "train"),
        valid_loader=data.valid_stream and _open_loader(config, mesh, data, data.valid_stream, "valid"),
        eval_batches=data.eval_batches,
        sinks=sinks,
        metrics=Metrics(),
        memory=memory,
        pace=Pace(
            [mesh.shape.coordinates(rank)["pipe"] for rank in range(mesh.world_size)],
            mesh.gather_json,
            config.logging.log_interval,
        ),
        data_wait=DataWait(config.data.num_workers),
        keeper=Keeper(
            root=Path(config.checkpoint.save) if config.checkpoint.save else None,
            claim=claim,
            mesh=mesh,
            config=config,
            schedule=start.schedule,
            dropout_seed=start.dropout_seed,
            facts=data.facts | {"family": family},
            stretches=start.stretches,
            versions=made_with,
            saved_step=start.saved_step,
            remote=copies,
        ),
        stop=stop,
        flops_per_token=flops_per_token(config.model, vocab_size=data.vocab_size, seq_length=config.data.seq_length),
        peak_flops=peak,
        run_dir=run_dir,
        predicted_peak=predicted_peak,
    )


@dataclasses.dataclass(frozen=True)
class _Data:
    """What is read, how it is cut into steps, and what identifies it."""

    tokenizer: Tokenizer | None
    vocab_size: int
    train_stream: SampleStream
    valid_stream: SampleStream | None
    eval_batches: int
    plan: BatchPlan
    facts: dict[str, Any]


def _open_data(config: RunConfig, mesh: ProcessMesh) -> _Data:
    tokenizer, vocab_size = resolve_vocabulary(config)
    first = mesh.global_rank == 0
    length = config.training, mesh.size("data"), config.data.seq_length
    total_samples = samples_of_run(*length)
    train_stream = build.open_stream(config, "train", vocab_size, tokenizer, scan=first, total_samples=total_samples)
    plan = BatchPlan.of(*length, train_stream.samples_per_epoch, train_stream.ends_after)
    if total_samples is not None and plan.total_samples < total_samples:
        log.note(
            f"the run ends after {plan.total_samples:,} samples instead of {total_samples:,}: the data are exhausted "
            f"then (--when-exhausted {config.data.when_exhausted})"
        )
    valid_stream, eval_batches = None, config.training.eval_iters
    if config.training.eval_interval and eval_batches:
        valid_stream = build.open_stream(config, "valid", vocab_size, tokenizer, scan=first)
        batch_size = plan.stages[-1].batch_size
        held = max(1, valid_stream.samples_per_epoch // batch_size)
        if held < eval_batches:
            log.note(
                f"validation is {held} batches instead of eval_iters={eval_batches}: the set holds "
                f"{valid_stream.samples_per_epoch:,} samples, a batch {batch_size:,}"
            )
            eval_batches = held
    facts = {
        "train_data": train_stream.fingerprint,
        "valid_data": valid_stream.fingerprint if valid_stream else None,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
    }
    return _Data(tokenizer, vocab_size, train_stream, valid_stream, eval_batches, plan, facts)


def _open_loader(config: RunConfig, mesh: ProcessMesh, data: _Data, stream: SampleStream, split: str) -> BatchLoader:
    return build.open_loader(config, stream, mesh, data.vocab_size, data.tokenizer, split=split)


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where a run begins."""

    progress: Progress
    schedule: Schedule
    dropout_seed: int
    stretches: list[dict[str, Any]]
    saved_step: int | None = None


@dataclasses.dataclass(frozen=True)
class _Beginning:
    """A checkpoint to begin from, and whether it is of this run (or only given by --load)."""

    found: Found
    is_own: bool
    told: str
    """What to say once it is loaded: until then it may turn out to be damaged."""


def _what_to_load(
    config: RunConfig, mesh: ProcessMesh, copies: RemoteCopies | None, *, values: bool
) -> _Beginning | None:
    """The checkpoint this run begins from, by --resume, --save and --load, its values checked or left to the load.

    Raises CheckpointError.
    """
    options = config.checkpoint
    # Megatron's scripts name one folder twice, to write to and to go on from: there is nothing else to load then.
    elsewhere = None if options.loads_what_it_saves else options.load
    own = None
    if options.save is not None and options.resume != "never":
        step = options.ckpt_step if elsewhere is None else None
        own = find_newest(options.save, mesh, step, copies, values=values)
        if own is None and copies is not None and options.resume == "must":
            raise CheckpointError(f"--resume must, but neither {options.save} nor {copies.url} holds a checkpoint")
    if own is not None:
        told = f"going on with this run from step {own.manifest.step} in {own.folder} (--resume {options.resume})"
        return _Beginning(own, True, told)
    if elsewhere is not None:
        given = search(elsewhere, mesh, options.ckpt_step, values=values)
        if given is None:
            wanted = "complete checkpoint" if options.ckpt_step is None else f"complete step {options.ckpt_step}"
            raise CheckpointError(f"--load {elsewhere} holds no {wanted}")
        return _Beginning(given, False, f"starting from {given.folder}")
    if options.save is not None and options.resume == "auto":
        log.note(f"{options.save} holds no checkpoint: starting from step 0 (--resume auto)")
    return None


def _instead_of(damaged: _Beginning, whole: _Beginning | None) -> _Beginning:
    """`whole`, if nothing would stay of what has been taken of `damaged`. Raises CheckpointError."""
    if whole is None:
        raise CheckpointError(f"{damaged.found.folder} is gone, and nothing else is there")
    before, after = damaged.found.manifest.tensors, whole.found.manifest.tensors
    if grown := [name for name in before.keys() & after.keys() if before[name].shape != after[name].shape]:
        raise CheckpointError(
            f"{damaged.found.folder} is damaged, and {whole.found.folder} has fewer rows of {min(grown)}, so that some "
            f"would stay as they were read; move {damaged.found.folder} away and start again"
        )
    return whole


def _insist(folder: Path, resume: str, overwrite: bool, has_copies: bool) -> None:
    """Refuse, before anything is written, a folder that --resume forbids. Raises CheckpointError."""
    if resume == "must" and not has_copies and not store.holds_checkpoint(folder):
        raise CheckpointError(
            f"--resume must, but {folder} holds no complete checkpoint; take --resume auto to start from step 0"
        )
    held = sorted(path.name for path in folder.iterdir() if path.name not in _OF_NO_RUN) if folder.is_dir() else []
    if resume != "never" or not held:
        return
    if not overwrite:
        raise CheckpointError(
            f"--resume never, but {folder} is not empty ({', '.join(held[:3])}{', ...' if len(held) > 3 else ''}); "
            f"choose another --save folder, --resume auto to go on, or --overwrite to empty it"
        )
    began = (folder / "config.yaml").is_file() and (folder / "versions.json").is_file()
    if not began and not store.holds_checkpoint(folder):
        raise CheckpointError(
            f"--overwrite would empty {folder}, which holds neither checkpoints nor the config.yaml and versions.json "
            f"of a run; empty it by hand if that is meant"
        )


def _empty(folder: Path) -> None:
    held = [path for path in folder.iterdir() if path.name not in (".lock", rank_log.FOLDER)]
    for path in held:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if held:
        log.note(f"emptied {folder} (--overwrite)")


def _load(
    config: RunConfig, mesh: ProcessMesh, engine: Engine, begin: _Beginning, fresh: _Start, facts: dict[str, Any]
) -> _Start:
    """Fill the engine from a checkpoint and say where the run begins."""
    options = config.checkpoint
    weights_only = options.finetune and not begin.is_own
    optimizer = not weights_only and not options.no_load_optim
    folder, manifest = begin.found
    if not weights_only and "progress" not in manifest.state:
        raise CheckpointError(
            f"{folder} holds weights that were imported, and no state of a run to go on with; begin a run with them by "
            "--load and --finetune"
        )
    checkpoint_fit.check_settings(folder, manifest, config.model, finetune=weights_only)
    build.together(
        mesh, lambda: checkpoint_fit.tell_changes(folder, manifest, config.data, facts, finetune=weights_only)
    )
    rows = checkpoint_fit.stored_rows(folder, manifest, engine.module.rows, positions_may_grow=weights_only)
    pieces = checkpoint_fit.within_stored_rows(engine.pieces(optimizer=optimizer), rows)
    # Imported weights have the dtype they came in; masters take them all exactly.
    state = load(folder, pieces, mesh, only="" if optimizer else "weight/", cast=weights_only, manifest=manifest)
    engine.refresh()
    if weights_only:
        log.note("took the weights alone (--finetune): step, data position and optimizer start anew")
        return fresh
    if optimizer:
        engine.load_state(state["engine"])
    curve = _choose_schedule(config, Schedule(**state["schedule"]), fresh.schedule, optimizer)
    seed = state["random"]["dropout_seed"]
    if options.no_load_rng:
        seed = fresh.dropout_seed
    progress = Progress.from_state(state["progress"])
    stretches = continued(state, progress, config, facts["train_data"])
    # What was not read may be damaged, and then the step is to be saved again.
    is_saved = begin.is_own and (optimizer or is_whole(begin.found, mesh))
    return _Start(progress, curve, seed, stretches, saved_step=progress.step if is_saved else None)


def _choose_schedule(config: RunConfig, saved: Schedule, asked: Schedule, take_saved: bool) -> Schedule:
    if not take_saved or saved == asked:
        return asked
    differs = [
        f"{field.name} {getattr(saved, field.name)} → {getattr(asked, field.name)}"
        for field in dataclasses.fields(Schedule)
        if getattr(saved, field.name) != getattr(asked, field.name)
    ]
    if config.optimizer.override_opt_param_scheduler:
        log.note(f"learning-rate schedule overridden by the flags: {', '.join(differs)}")
        return asked
    log.warn(
        f"the learning-rate schedule of the checkpoint is kept, which ends at {saved.floor:g} after {saved.decay:,g} "
        f"{saved.unit}; the flags would change {', '.join(differs)} (--override-opt_param-scheduler takes them)"
    )
    return saved


def _write_run_folders(config: RunConfig, made_with: dict[str, Any]) -> None:
    """Leave in the run's folders what starts it again, and what reads its checkpoints after a move."""
    if config.checkpoint.save is not None:
        copy_tokenizer(config.data, Path(config.checkpoint.save) / TOKENIZER_FOLDER)
    run_dir = run_folder(config)
    if run_dir is None:
        return
    own = {"--save": config.checkpoint.save, "--run-dir": config.logging.run_dir}
    head = (
        f"# This run, started in {Path.cwd()}, where relative paths begin. The same again, elsewhere:\n"
        f"# python pretrain_gpt.py --config {run_dir / 'config.yaml'}"
        f"{''.join(f' {flag} OTHER' for flag, folder in own.items() if folder is not None)}\n"
    )
    for name, text in (
        ("config.yaml", head + sources.dump(config)),
        ("versions.json", json.dumps(made_with, indent=2)),
    ):
        publish(run_dir / name, text + "\n")
