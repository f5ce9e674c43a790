"""tools/inspect_checkpoint.py: what it says of checkpoints and Hugging Face folders, and of two of them."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from huggingface_folders import save_folder, stored
from safetensors.torch import save_file
from tiny_run import load_tool, save_tiny_run

from megatron_lite.checkpoint.huggingface import HuggingFaceFolder
from megatron_lite.config import huggingface, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.train.imported import write_imported

main = load_tool("inspect_checkpoint").main


def inspect(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "saved"
    return folder, save_tiny_run(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder("llama 3", tmp_path_factory.mktemp("models") / "theirs")


def test_a_checkpoint_is_described(run, capsys):
    assert inspect("--load", run[0], "--tensors", "--verify") == 0
    said = capsys.readouterr().out
    for text in (
        "megatron_lite checkpoint",
        "step           7",
        "layout         tp=1",
        "steps there    7",
        "hidden_size=32",
    ):
        assert text in said
    assert "weight/layers.1.mlp.up.weight" in said and "128x32" in said
    assert "match their checksums" in said
    assert all(len(line) <= 140 for line in said.splitlines())


def test_json_has_it_all(run, capsys):
    root, model = run
    assert inspect("--load", root / "step-00000007", "--hashes", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 7 and facts["config"]["model"]["num_layers"] == 2
    for name, parameter in model.named_parameters():
        held = facts["tensors"][f"weight/{name}"]
        whole = parameter.detach()[: held["shape"][0]].contiguous()
        assert held["sha256"] == hashlib.sha256(whole.numpy().tobytes()).hexdigest()
        assert held["dtype"] == "F32" and held["bytes"] == whole.nbytes


def test_damage_is_found(run, tmp_path, capsys):
    copy = shutil.copytree(run[0], tmp_path / "copy")
    (file,) = copy.glob("step-*/rank-*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    assert inspect("--load", copy) == 0
    assert inspect("--load", copy, "--verify") == 2
    assert "do not match their checksum" in capsys.readouterr().err


def test_a_checkpoint_under_the_name_of_another_step_is_found(run, tmp_path, capsys):
    copy = shutil.copytree(run[0] / "step-00000007", tmp_path / "step-00000008")
    for folder in (copy, tmp_path):
        assert inspect("--load", folder, "--verify") == 2
        assert "step is 7, but the folder stands for 8" in capsys.readouterr().err
    assert inspect("--load", copy.rename(tmp_path / "mine"), "--verify") == 0


def test_steps_that_are_not_there_are_refused(run, folder, capsys):
    checkpoint = run[0] / "step-00000007"
    for arguments, said in (
        (["--load", checkpoint, "--diff-step", 3], "--diff-step 3 is of the other one, which --diff names"),
        (["--load", checkpoint, "--ckpt-step", 3], "is a checkpoint of step 7, not of step 3"),
        (["--load", folder, "--ckpt-step", 3], "is a Hugging Face folder, which has no steps"),
        (["--load", run[0], "--diff", run[0], "--diff-step", 3], "holds no checkpoint of step 3; it holds 7"),
    ):
        assert inspect(*arguments) == 2
        assert said in capsys.readouterr().err
    assert inspect("--load", checkpoint, "--ckpt-step", 7) == 0


def test_a_hugging_face_folder_is_described(folder, capsys):
    assert inspect("--load", folder, "--verify", "--tensors") == 0
    said = capsys.readouterr().out
    assert "Hugging Face folder" in said and "family         llama" in said and "rope_scaling_factor=8.0" in said
    assert "model.layers.0.self_attn.k_proj.weight" in said and "values finite; this format has no checksums" in said


def test_values_that_are_not_finite_are_found(folder, tmp_path, capsys):
    tensors = dict(stored(folder))
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert inspect("--load", tmp_path, "--verify") == 2
    assert "model.norm.weight holds values that are not finite" in capsys.readouterr().err
    assert inspect("--load", tmp_path, "--diff", folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)["differences"]
    assert found["tensors"] == {"model.norm.weight": {"largest": None, "relative": None}}


def test_two_runs_are_compared(run, tmp_path, capsys):
    assert inspect("--load", run[0], "--diff", shutil.copytree(run[0], tmp_path / "copy")) == 0
    assert "32 tensors are alike, and nothing differs" in capsys.readouterr().out
    save_tiny_run(tmp_path / "else", sample_stride=3)
    assert inspect("--load", run[0], "--diff", tmp_path / "else") == 1
    assert "data.sample_stride: None here, 3 there" in capsys.readouterr().out


def test_a_checkpoint_is_compared_with_the_folder_it_came_from(folder, tmp_path, capsys):
    with HuggingFaceFolder(folder) as source:
        config = sources.override(RunConfig(), huggingface.overrides(folder))
        write_imported(source, source.links, config, tmp_path / "run", tmp_path / "run")
        write_imported(source, source.links, config, tmp_path / "wide", tmp_path / "wide", torch.float32)
    assert inspect("--load", tmp_path / "run", "--diff", folder) == 0
    assert inspect("--load", folder, "--diff", tmp_path / "run") == 0
    assert "16 tensors are alike, and nothing differs" in capsys.readouterr().out
    assert inspect("--load", folder, "--diff", tmp_path / "wide") == 1
    said = capsys.readouterr().out
    assert "weight/final_norm.weight: dtype BF16 here, F32 there\n" in said
    tensors = dict(stored(folder))
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 64
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert inspect("--load", tmp_path / "run", "--diff", tmp_path) == 1
    said = capsys.readouterr().out
    assert "weight/layers.1.mlp.gate_up.weight: largest difference 64, relative" in said


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--load", "nowhere"), "holds neither checkpoints nor the config.json of a Hugging Face folder"),
        (("--load", "RUN", "--ckpt-step", "9"), "holds no checkpoint of step 9; it holds 7"),
        (("--load", "RUN", "--diff", "nowhere"), "holds neither checkpoints"),
    ],
)
def test_what_is_not_there_is_told(arguments, match, run, capsys):
    assert inspect(*(run[0] if word == "RUN" else word for word in arguments)) == 2
    assert match in capsys.readouterr().err
