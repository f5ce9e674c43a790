"""A run folder with the checkpoint of a tiny random GPT over bytes, a token set, and the tools that open them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from megatron_lite.checkpoint.save import save
from megatron_lite.config import cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.tokenizer_byte import ByteTokenizer
from megatron_lite.model.gpt import GPT
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

TOOLS = Path(__file__).parents[1] / "tools"
TOKENIZER = ByteTokenizer()
TEXTS = ["In the beginning was the word.", "Größe – ja", "日本語 text", "plain enough to be read"] * 3
SEQ_LENGTH = 32


def tiny_config(**data) -> RunConfig:
    """The configuration of the run; `data` replaces fields of its data section."""
    model = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "max_position_embeddings": SEQ_LENGTH,
        "vocab_size": TOKENIZER.vocab_size,
        "make_vocab_size_divisible_by": 8,
        "init_method_std": 0.3,
    }
    section = {"seq_length": SEQ_LENGTH, "tokenizer_type": "ByteTokenizer", **data}
    return sources.override(RunConfig(), {"model": model, "data": section})


def save_tiny_run(folder: Path, **data) -> GPT:
    """Write a checkpoint of step 7 under `folder`; the model that was saved."""
    from megatron_lite.train.open import weight_pieces

    config, mesh = tiny_config(**data), ProcessMesh.create(MeshShape())
    model = GPT(config.model, mesh, vocab_size=TOKENIZER.vocab_size, seq_length=SEQ_LENGTH, seed=0).eval()
    pieces = [dataclasses.replace(piece, owned=True) for piece in weight_pieces(model)]
    save(folder, 7, pieces, {}, mesh, layout="tp=1", config=sources.plain(config), versions={})
    return model


def write_token_set(prefix: Path, texts: list[str] = TEXTS) -> Path:
    """A token set of one document a text, each closed by end-of-document."""
    with IndexedWriter(prefix, vocab_size=TOKENIZER.vocab_size) as writer:
        for text in texts:
            writer.add_document([*TOKENIZER.encode(text), TOKENIZER.eod])
    return prefix


def config_of_printed_line(said: str) -> RunConfig:
    """What the command that an import prints asks for, with one step on mock data beside it."""
    line = next(line for line in said.splitlines() if line.startswith("python pretrain_gpt.py"))
    extra = "--mock-data --train-iters 1 --micro-batch-size 2 --global-batch-size 2 --eval-interval 0 --zero-stage 0"
    return cli.load([*shlex.split(line)[2:], *extra.split(), "--no-bf16"])[0]


@functools.cache
def load_tool(name: str) -> ModuleType:
    """A file of tools/ as a module, to call its `main` in this process."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def start_tool(name: str, *arguments: object, launcher: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    """A tool run by this Python, or by a launcher of it, to its end."""
    command = [sys.executable, *launcher, str(TOOLS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
