"""A run that begins with a Hugging Face model: any layout holds its weights, and trains on from its loss."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from huggingface_folders import MAKERS, POSITIONS, VOCABULARY, add_tokenizer, save_folder, stored
from ranks import run_on_ranks
from safetensors.torch import save_file
from transformers_models import serial

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import cli, huggingface, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data.vocabulary import resolve_vocabulary
from megatron_lite.errors import CheckpointError, ConfigError, UserError
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build
from megatron_lite.train.compare import assemble
from megatron_lite.train.huggingface import begin_with
from megatron_lite.train.start import train_on

LAYOUTS = [
    ("gpt2", MeshShape(tensor=2, data=2), 3, {}),
    ("gpt2", MeshShape(pipe=2, data=2), 1, {}),
    ("llama", MeshShape(tensor=4), 0, {}),
    ("llama 3", MeshShape(pipe=2, tensor=2), 2, {}),
    ("qwen2", MeshShape(data=4), 3, {}),
    ("qwen3", MeshShape(tensor=2, context=2), 1, {}),
    # Ids beyond those of the folder.
    ("mistral", MeshShape(tensor=2, data=2), 2, {"vocab_size": 110}),
    ("gpt2", MeshShape(data=2, tensor=2), 1, {"vocab_size": 110, "max_position_embeddings": 32}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: str(save_folder(name, root / name.replace(" ", ""))) for name in MAKERS}


def config_of(folder: str, shape: MeshShape, zero: int, changes: dict) -> RunConfig:
    parallel = {
        "tensor_model_parallel_size": shape.tensor,
        "pipeline_model_parallel_size": shape.pipe,
        "context_parallel_size": shape.context,
        "zero_stage": zero,
    }
    fields = huggingface.overrides(folder)
    fields["model"] |= {"make_vocab_size_divisible_by": 8, "attention_dropout": 0.0, **changes}
    training = {"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 2, "eval_interval": 0}
    fields |= {
        "parallel": parallel,
        "training": training,
        "checkpoint": {"load_hf": folder},
        "data": {"mock_data": True, "seq_length": POSITIONS},
    }
    return sources.override(RunConfig(), fields)


def _weights(cases):
    found = []
    for folder, shape, zero, changes in cases:
        config, mesh = config_of(folder, shape, zero, changes), ProcessMesh.create(shape)
        rows = config.model.vocab_size
        engine = build.build_engine(config, build.build_model_to_train(config, mesh, rows), mesh)
        begin_with(folder, mesh, engine)
        model = {name: tensor.detach().clone() for name, tensor in engine.named_weights()}
        pieces = [
            dataclasses.replace(piece, tensor=piece.tensor.detach().clone()) for piece in engine.pieces(optimizer=False)
        ]
        found.append((pieces, model, {name: p.mesh_layout for name, p in engine.module.named_parameters()}))
    return found


def test_every_layout_holds_the_weights_of_the_folder(folders):
    from transformers import AutoModelForCausalLM

    cases = [(folders[name], shape, zero, changes) for name, shape, zero, changes in LAYOUTS]
    by_rank = run_on_ranks(_weights, 4, cases, timeout=300)
    for index, (folder, shape, zero, changes) in enumerate(cases):
        reference = serial(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        whole = assemble([piece for ranks in by_rank for piece in ranks[index][0]])
        assert whole.keys() == {f"weight/{name}" for name in reference}
        for name, expected in reference.items():
            found = whole[f"weight/{name}"]
            assert torch.equal(found[: len(expected)], expected), (folder, shape, zero, name)
            if changes and len(found) > len(expected):
                assert found[len(expected) :].abs().max() > 0, name
        if not changes:
            # The model's own weights too, padding of the vocabulary still zero.
            for rank in by_rank:
                _, model, layouts = rank[index]
                for name, tensor in model.items():
                    assert torch.equal(tensor.float(), layouts[name].cut(reference[name])), name


def test_training_goes_on_from_the_models_loss(folders, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    config = config_of(folders["qwen3"], MeshShape(), 0, {})
    config = sources.override(config, {"checkpoint": {"save": str(tmp_path / "run")}})
    mesh, stop = ProcessMesh.create(MeshShape()), StopRequest(None)
    train_on(mesh, config, stop, "python pretrain_gpt.py")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    stream = build.open_stream(config, "train", VOCABULARY)
    text = torch.stack([torch.from_numpy(stream[i].tokens) for i in range(4)])
    logits = AutoModelForCausalLM.from_pretrained(folders["qwen3"], dtype=torch.float32)(text[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert "starting from the weights of" in capsys.readouterr().err

    # The same command goes on with the run, not with the folder.
    longer = sources.override(config, {"training": {"train_iters": 3}})
    train_on(mesh, longer, stop, "python pretrain_gpt.py")
    said = capsys.readouterr().err
    assert "going on with this run from step 2" in said and "starting from the weights" not in said
    # And is of the family it began with, though others may have the same form.
    for step in (2, 3):
        assert read_manifest(tmp_path / "run" / f"step-{step:08d}").state["facts"]["family"] == "qwen3"
    stop.close()


def _refused(folder, config_folder):
    config, mesh = config_of(config_folder, MeshShape(tensor=2), 0, {}), ProcessMesh.create(MeshShape(tensor=2))
    engine = build.build_engine(config, build.build_model_to_train(config, mesh, VOCABULARY), mesh)
    with pytest.raises(CheckpointError) as raised:
        begin_with(folder, mesh, engine)
    return str(raised.value)


def test_a_folder_of_another_model_is_refused_by_all_ranks(folders):
    for said in run_on_ranks(_refused, 2, folders["llama"], folders["qwen3"]):
        assert "cannot be loaded" in said and "here" in said


def test_a_head_that_would_be_dropped_is_refused(tmp_path):
    source = save_folder("gpt2", tmp_path, shard_size="1GB")
    save_file(dict(stored(source)) | {"lm_head.weight": torch.ones(VOCABULARY, 32)}, source / "model.safetensors")
    with pytest.raises(UserError, match=r"has a lm_head.weight that differs from transformer.wte.weight"):
        begin_with(str(source), ProcessMesh(MeshShape(), 0), None)


def test_the_model_grows_by_the_tokens_that_its_tokenizer_has_added(tmp_path, capsys):
    add_tokenizer(save_folder("llama", tmp_path), ["<pad>", "<sep>"])
    assert resolve_vocabulary(cli.load(["--load-hf", str(tmp_path)])[0])[1] == VOCABULARY + 2
    assert f"the tokenizer has 105 ids and {tmp_path} 103: the model grows" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"vocab_size=104 is smaller than the tokenizer's 105; .* give at least 105"):
        resolve_vocabulary(cli.load(["--load-hf", str(tmp_path), "--vocab-size", "104"])[0])
