"""tools/import_megatron.py: folders in the form that Megatron's ranks write, of every layout; and what is refused."""

from __future__ import annotations

import argparse
import enum
import io
import random
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from tiny_run import config_of_printed_line, load_tool
from transformers_models import gpt2, llama, qwen2, qwen3, serial, shake

from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.open import open_on
from megatron_lite.train.start import train_on

main = load_tool("import_megatron").main
VOCABULARY, POSITIONS = 103, 24

#: Names by version: the one before Megatron-core, Megatron-core's own layers, Transformer Engine's.
LEGACY = {
    "stack": "language_model.encoder", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "qkv": "self_attention.query_key_value", "output": "self_attention.dense", "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h", "final": "final_layernorm",
}  # fmt: skip
CORE = {
    "stack": "decoder", "attention_norm": "input_layernorm", "mlp_norm": "pre_mlp_layernorm",
    "qkv": "self_attention.linear_qkv", "output": "self_attention.linear_proj", "up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2", "final": "final_layernorm", "query_norm": "self_attention.q_layernorm",
    "key_norm": "self_attention.k_layernorm",
}  # fmt: skip
ENGINE = CORE | {"attention_norm": "self_attention.linear_qkv.layer_norm", "mlp_norm": "mlp.linear_fc1.layer_norm"}


def settings_of(ours, **changes):
    fields = {
        "num_layers": ours.num_layers, "hidden_size": ours.hidden_size, "ffn_hidden_size": ours.ffn_size,
        "num_attention_heads": ours.num_attention_heads, "kv_channels": ours.head_dim,
        "num_query_groups": ours.kv_heads,
        "group_query_attention": ours.kv_heads != ours.num_attention_heads, "max_position_embeddings": POSITIONS,
        "normalization": ours.normalization, "norm_epsilon": ours.norm_epsilon, "rotary_base": int(ours.rotary_base),
        "position_embedding_type": ours.position_embedding_type, "swiglu": ours.swiglu, "vocab_size": None,
        "add_bias_linear": ours.add_bias_linear, "add_qkv_bias": ours.add_qkv_bias, "qk_layernorm": ours.qk_layernorm,
        "untie_embeddings_and_output_weights": ours.untie_embeddings_and_output_weights, "bias_gelu_fusion": True,
        "use_rope_scaling": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "params_dtype": torch.bfloat16,
        "padded_vocab_size": 128, "tokenizer_type": None, "window_size": None, "num_experts": None,
    }  # fmt: skip
    return argparse.Namespace(**(fields | changes))


def by_group(query, key, value, groups):
    """Each group's queries, its key, its value, one group after another."""
    parts = zip(*(tensor.chunk(groups) for tensor in (query, key, value)), strict=True)
    return torch.cat([torch.cat(part) for part in parts])


def state_of_rank(tensors, ours, names, layers, t, tensor_size, *, first, last):
    """The state dictionary of the layers `layers` on tensor rank `t`, all of it by Megatron's names and slices."""
    state = {}
    share = 128 // tensor_size

    def rows(tensor):
        return tensor.chunk(tensor_size)[t].clone()

    def padded(tensor):
        return torch.cat([tensor, torch.full((128 - len(tensor), tensor.shape[1]), 7.0)])[t * share : (t + 1) * share]

    legacy = names is LEGACY
    prefix = "language_model." if legacy else ""
    if first:
        state[f"{prefix}embedding.word_embeddings.weight"] = padded(tensors["embedding.word.weight"])
        if "embedding.position.weight" in tensors:
            state[f"{prefix}embedding.position_embeddings.weight"] = tensors["embedding.position.weight"]
    for n, layer in enumerate(layers):
        here, there = f"layers.{layer}", f"{names['stack']}.layers.{n}"
        for kind in ("weight", "bias"):
            joint = "_" if names is ENGINE else "."
            for norm in ("attention_norm", "mlp_norm"):
                if f"{here}.{norm}.{kind}" in tensors:
                    state[f"{there}.{names[norm]}{joint}{kind}"] = tensors[f"{here}.{norm}.{kind}"]
            if f"{here}.attention.query.{kind}" in tensors:
                query = tensors[f"{here}.attention.query.{kind}"]
                key, value = tensors[f"{here}.attention.key_value.{kind}"].chunk(2)
                local = [rows(part) for part in (query, key, value)]
                state[f"{there}.{names['qkv']}.{kind}"] = by_group(*local, ours.kv_heads // tensor_size)
            up = "gate_up" if ours.swiglu else "up"
            if f"{here}.mlp.{up}.{kind}" in tensors:
                parts = tensors[f"{here}.mlp.{up}.{kind}"].chunk(2 if ours.swiglu else 1)
                state[f"{there}.{names['up']}.{kind}"] = torch.cat([rows(part) for part in parts])
        for norm in ("query_norm", "key_norm"):
            if ours.qk_layernorm:
                state[f"{there}.{names[norm]}.weight"] = tensors[f"{here}.attention.{norm}.weight"]
        for name, key in (("output", "attention.output"), ("down", "mlp.down")):
            state[f"{there}.{names[name]}.weight"] = tensors[f"{here}.{key}.weight"].chunk(tensor_size, 1)[t].clone()
            if f"{here}.{key}.bias" in tensors:
                state[f"{there}.{names[name]}.bias"] = tensors[f"{here}.{key}.bias"]
        if names is ENGINE:
            state[f"{there}.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"scales")
    if last:
        for kind in ("weight", "bias"):
            if f"final_norm.{kind}" in tensors:
                state[f"{names['stack']}.{names['final']}.{kind}"] = tensors[f"final_norm.{kind}"]
        if "head.weight" in tensors:
            state[f"{prefix}output_layer.weight"] = padded(tensors["head.weight"])
        elif not first:
            copy = "word_embeddings_for_head.weight" if legacy else "output_layer.weight"
            state[copy] = padded(tensors["embedding.word.weight"])
    return nested(state) if legacy else state


def nested(state):
    """As before Megatron-core: a dictionary a module, but for the layers."""
    tree = {}
    for name, tensor in state.items():
        at = name.find(".layers.")
        path = name.split(".") if at < 0 else [*name[:at].split("."), name[at + 1 :]]
        here = tree
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = tensor
    return tree


def write(folder, model, ours, names, *, tensor=1, pipe=1, virtual=1, **changes):
    """A folder of all ranks' files, with what lies in them beside the weights."""
    tensors = {name: value.to(torch.bfloat16) for name, value in serial(model).items()}
    iteration = folder / "iter_0000250"
    (iteration).mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("250")
    stages = pipe * virtual
    each = ours.num_layers // stages
    for p in range(pipe):
        for t in range(tensor):
            chunks = []
            for v in range(virtual):
                stage = v * pipe + p
                layers = range(stage * each, (stage + 1) * each)
                ends = {"first": stage == 0, "last": stage == stages - 1}
                chunks.append(state_of_rank(tensors, ours, names, layers, t, tensor, **ends))
            content = {
                "args": settings_of(ours, **changes),
                "checkpoint_version": 3.0,
                "iteration": 250,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
                "rng_state": [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}],
            }
            content |= {"model": chunks[0]} if virtual == 1 else {f"model{v}": chunk for v, chunk in enumerate(chunks)}
            place = iteration / (f"mp_rank_{t:02d}" if pipe == 1 else f"mp_rank_{t:02d}_{p:03d}")
            place.mkdir()
            torch.save(content, place / "model_optim_rng.pt")
    return tensors


def make(name, **sizes):
    of_kv_heads = {"llama": 4, "grouped": 2}
    maker = {"gpt2": gpt2, "qwen2": qwen2, "qwen3": qwen3}.get(name, llama)
    sizes |= {"kv_heads": of_kv_heads[name]} if maker is llama else {}
    torch.manual_seed(2)
    model, ours = maker(VOCABULARY, POSITIONS, num_layers=4, **sizes)
    shake(model)
    return model, ours


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("name", "names", "layout"),
    [
        ("gpt2", LEGACY, {}),
        ("gpt2", LEGACY, {"tensor": 2, "pipe": 2}),
        ("gpt2", CORE, {"tensor": 4}),
        ("grouped", CORE, {"tensor": 2, "pipe": 2, "virtual": 2}),
        ("llama", ENGINE, {"tensor": 2}),
        ("qwen2", ENGINE, {"pipe": 4}),
        ("qwen3", ENGINE, {"tensor": 2, "pipe": 2}),
    ],
)
def test_every_layout_comes_together(name, names, layout, tmp_path, capsys):
    model, ours = make(name)
    tensors = write(tmp_path / "theirs", model, ours, names, **layout)
    assert run("--load", tmp_path / "theirs", "--save", tmp_path / "ours", "--trusted", "--vocab-size", VOCABULARY) == 0
    said = capsys.readouterr()
    assert "Megatron's checkpoints are pickles" in said.err and "--finetune" in said.out
    for key, tensor in tensors.items():
        assert torch.equal(read_tensor(tmp_path / "ours" / "step-00000000", f"weight/{key}"), tensor), key
    opened = open_on(ProcessMesh(MeshShape(), 0), tmp_path / "ours", dtype="fp32")
    tokens = torch.randint(0, VOCABULARY, (2, POSITIONS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = model(tokens).logits
    assert (opened.model.full_logits(opened.model.logits(tokens)) - expected).abs().max() <= 1e-5


def test_the_printed_line_begins_a_run(theirs, capsys):
    target = theirs.parent / "ours"
    assert run("--load", theirs, "--save", target, "--trusted", "--vocab-size", VOCABULARY) == 0
    stop = StopRequest(None)
    train_on(ProcessMesh(MeshShape(), 0), config_of_printed_line(capsys.readouterr().out), stop, "")
    said = capsys.readouterr().err
    assert "step 1/1" in said and "took the weights alone" in said and "the weights of" not in said
    stop.close()


def test_megatron_deepspeeds_files_are_read(tmp_path):
    model, ours = make("gpt2")
    tensors = write(tmp_path / "theirs", model, ours, LEGACY, tensor=2)
    there = tmp_path / "deepspeed" / "global_step250"
    there.mkdir(parents=True)
    (tmp_path / "deepspeed" / "latest").write_text("global_step250\n")
    for t in range(2):
        place = tmp_path / "theirs" / "iter_0000250" / f"mp_rank_{t:02d}" / "model_optim_rng.pt"
        with torch.serialization.safe_globals(load_tool("import_megatron")._STAND_INS):
            content = torch.load(place)
        content = {"module": content["model"], "args": settings_of(ours, add_position_embedding=True), "ds_config": {}}
        torch.save(content, there / f"mp_rank_{t:02d}_model_states.pt")
    arguments = ("--load", tmp_path / "deepspeed", "--save", tmp_path / "ours", "--trusted", "--vocab-size", VOCABULARY)
    assert run(*arguments) == 0
    for key, tensor in tensors.items():
        assert torch.equal(read_tensor(tmp_path / "ours" / "step-00000000", f"weight/{key}"), tensor), key


@pytest.fixture
def theirs(tmp_path):
    model, ours = make("gpt2")
    write(tmp_path / "theirs", model, ours, CORE, tensor=2)
    return tmp_path / "theirs"


def _refused(theirs, capsys, match, *arguments):
    target = theirs.parent / "ours"
    vocabulary = () if "--vocab-size" in arguments else ("--vocab-size", VOCABULARY)
    assert run("--load", theirs, "--save", target, "--trusted", *vocabulary, *arguments) == 2
    assert match in capsys.readouterr().err
    assert not target.exists()


def _change(theirs, change, rank=0):
    file = theirs / "iter_0000250" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace, *load_tool("import_megatron")._STAND_INS[1:]]):
        content = torch.load(file)
    content.pop("rng_state")
    change(content)
    torch.save(content, file)


def test_trust_is_asked_for(theirs, capsys):
    assert run("--load", theirs, "--save", theirs.parent / "ours") == 2
    assert "Say that you trust the files by --trusted" in capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_a_payload_is_refused_and_never_run(theirs, capsys, monkeypatch):
    monkeypatch.chdir(theirs)
    _change(theirs, lambda content: content.update(hook=Payload()))
    _refused(theirs, capsys, "is refused: it names exec")
    assert not (theirs / "ran").exists()


def test_an_unknown_class_is_refused_by_name(theirs, capsys, monkeypatch):
    module = types.ModuleType("megatron_else")
    module.Kind = enum.Enum("Kind", "A B", module="megatron_else")
    monkeypatch.setitem(sys.modules, "megatron_else", module)
    _change(theirs, lambda content: content.update(kind=module.Kind.A))
    _refused(theirs, capsys, "it names megatron_else.Kind, which is neither a tensor nor a plain value")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("args"), "holds no 'args'"),
        (lambda c: c.pop("model"), "holds no 'model'"),
        (lambda c: c.update(checkpoint_version=1.0), "has checkpoint_version 1.0; only 3.0 is read"),
        (lambda c: setattr(c["args"], "num_experts", 8), "num_experts is '8', which is not in this version"),
        (lambda c: setattr(c["args"], "num_layers", 6), "6 layers"),
        (lambda c: setattr(c["args"], "num_layers", 10**9), "and says num_layers=1000000000"),
        (lambda c: setattr(c["args"], "hidden_size", "32"), "hidden_size is '32', not of type int"),
        (lambda c: setattr(c["args"], "position_embedding_type", "alibi"), "position_embedding_type is 'alibi'"),
        (lambda c: c["model"].update(odd=torch.zeros(2)), "odd belongs to no part of a GPT of this version"),
        (lambda c: c["model"].pop("decoder.final_layernorm.bias"), "has no pipe 0 tensor 0 chunk 0:final_norm.bias"),
        (
            lambda c: c["model"].update({"decoder.layers.1.mlp.linear_fc2.weight": torch.zeros(32, 3)}),
            "1.down.weight is [32, 3], not [32, 64]",
        ),
    ],
)
def test_what_is_no_gpt_of_ours_is_named(change, match, theirs, capsys):
    _change(theirs, change)
    _refused(theirs, capsys, match if match != "6 layers" else "has no pipe 0 tensor 0 chunk 0:4.")


def test_folders_and_files_that_are_not_whole_are_named(theirs, capsys):
    _refused(
        theirs, capsys, "has 128 rows of token ids, padding among them, and says vocab_size=500", "--vocab-size", 500
    )
    file = theirs / "iter_0000250" / "mp_rank_01" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:1000])
    _refused(theirs, capsys, "model_optim_rng.pt is refused")
    file.unlink()
    file.symlink_to(theirs.parent / "outside.pt")
    shutil.move(theirs / "iter_0000250" / "mp_rank_00" / "model_optim_rng.pt", theirs.parent / "outside.pt")
    _refused(theirs, capsys, "holds no mp_rank_XX")
    (theirs / "latest_checkpointed_iteration.txt").write_text("../else")
    _refused(theirs, capsys, "which is no name of a folder")
    (theirs / "latest_checkpointed_iteration.txt").write_text("300")
    _refused(theirs, capsys, "holds no mp_rank_XX")
