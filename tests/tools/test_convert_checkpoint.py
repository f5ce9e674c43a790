"""tools/convert_checkpoint.py: what goes there and back, what it says, and that it insists on agreement."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_folders import POSITIONS, add_tokenizer, assert_bitwise, save_folder, stored
from safetensors.torch import save_file
from small_tokenizers import ENGLISH, GPT2, make_tokenizers
from tiny_run import config_of_printed_line, load_tool, save_tiny_run

from megatron_lite.checkpoint import huggingface_names
from megatron_lite.config import sources
from megatron_lite.config.data import DataConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.monitor.memory import MemoryMeter
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import against_transformers
from megatron_lite.train.imported import arriving
from megatron_lite.train.open import open_on
from megatron_lite.train.start import train_on

main = load_tool("convert_checkpoint").main


def convert(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3"])
def test_there_and_back(name, tmp_path, capsys):
    source = save_folder(name, tmp_path / "source")
    assert convert("--load-hf", source, "--save", tmp_path / "run") == 0
    said = capsys.readouterr()
    assert "transformers agrees: largest difference of logits" in said.out and "--finetune" in said.out
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "there", "--max-file-gb", "0.00001") == 0
    assert "transformers agrees" in capsys.readouterr().out
    assert_bitwise(stored(tmp_path / "there"), stored(source))
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "rounded", "--dtype", "fp16") == 0
    assert "transformers agrees" in capsys.readouterr().out
    assert_bitwise(stored(tmp_path / "rounded"), {key: value.half() for key, value in stored(source).items()})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_trained_run_is_exported_rounded_with_its_window_of_positions(tmp_path, capsys):
    save_tiny_run(tmp_path / "run")
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "there", "--dtype", "bf16") == 0
    said = capsys.readouterr()
    assert "transformers agrees" in said.out and "step 7" in said.out
    assert "there is no Hugging Face form of ByteTokenizer" in said.err and "other ids" not in said.err
    assert {tensor.dtype for tensor in stored(tmp_path / "there").values()} == {torch.bfloat16}
    content = json.loads((tmp_path / "there" / "config.json").read_text())
    assert content["torch_dtype"] == "bfloat16" and content["vocab_size"] == 258 and content["n_positions"] == 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = make_tokenizers(folder)
    vocab = {token: id for token, id in json.loads(Path(GPT2.vocab_file).read_bytes()).items() if id < 500}
    merges = [line for line in Path(GPT2.merge_file).read_text().splitlines()[1:] if line.replace(" ", "") in vocab]
    (folder / "encoder.json").write_text(json.dumps(vocab))
    (folder / "vocab.bpe").write_text("\n".join(merges))
    files = {"vocab_file": str(folder / "encoder.json"), "merge_file": str(folder / "vocab.bpe")}
    return kinds | {"gpt2": DataConfig(tokenizer_type="GPT2BPETokenizer", **files)}


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_the_tokenizer_goes_along(kind, made, tmp_path, capsys):
    from transformers import AutoTokenizer

    from megatron_lite.data.tokenizer import build_tokenizer

    data, source = made[kind], tmp_path / "source"
    save_tiny_run(tmp_path / "run", **{k: v for k, v in dataclasses.asdict(data).items() if v})
    assert convert("--load", tmp_path / "run", "--save-hf", source, "--no-verify") == 0
    assert "logits were not compared" in capsys.readouterr().err
    ours, theirs = build_tokenizer(data), AutoTokenizer.from_pretrained(source)
    text = ENGLISH[3][:2000]
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    # And from that folder into a checkpoint, which keeps a copy of its own.
    assert convert("--load-hf", source, "--save", tmp_path / "imported", "--no-verify") == 0
    shutil.rmtree(source)
    opened = open_on(ProcessMesh(MeshShape(), 0), tmp_path / "imported")
    assert opened.tokenizer.encode(text) == ours.encode(text)


def test_a_tokenizer_that_transformers_reads_otherwise_is_told(made, tmp_path, capsys):
    """A SentencePiece model with a normalizer: transformers takes any for LLaMA's, which has none."""
    fields = {k: v for k, v in dataclasses.asdict(made["sentencepiece-bpe"]).items() if v}
    save_tiny_run(tmp_path / "run", **fields)
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "there") == 0
    assert "transformers' tokenizer gives other ids" in capsys.readouterr().err


def test_added_special_tokens_keep_their_ids(made, tmp_path):
    from transformers import AutoTokenizer

    fields = {k: v for k, v in dataclasses.asdict(made["bpe"]).items() if v}
    save_tiny_run(tmp_path / "run", **fields, special_tokens=("<|user|>", "<|system|>"))
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "there", "--no-verify") == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "there")
    assert theirs.convert_tokens_to_ids(["<|user|>", "<|system|>"]) == [700, 701]
    assert theirs.encode("<|user|>", add_special_tokens=False) == [700]


def test_the_family_can_be_chosen(tmp_path, capsys):
    convert("--load-hf", save_folder("llama", tmp_path / "source"), "--save", tmp_path / "run", "--no-verify")
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "there", "--family", "mistral") == 0
    assert "transformers agrees" in capsys.readouterr().out
    assert json.loads((tmp_path / "there" / "config.json").read_text())["sliding_window"] is None
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "else", "--family", "qwen3") == 2
    assert "cannot be written as qwen3: qk_layernorm is False, not True" in capsys.readouterr().err


def test_a_family_that_is_not_the_models_is_refused_as_such(tmp_path, capsys):
    save_tiny_run(tmp_path / "run")
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "there", "--family", "llama") == 2
    said = capsys.readouterr().err
    assert "cannot be written as llama: normalization is LayerNorm, not RMSNorm" in said
    assert "does not hold the model of its configuration" not in said


def test_an_import_goes_back_as_what_it_was(tmp_path):
    source = save_folder("mistral", tmp_path / "source")
    assert convert("--load-hf", source, "--save", tmp_path / "run", "--no-verify") == 0
    assert convert("--load", tmp_path / "run", "--save-hf", tmp_path / "there", "--no-verify") == 0
    assert json.loads((tmp_path / "there" / "config.json").read_text())["model_type"] == "mistral"


def test_a_head_that_would_be_dropped_is_refused(tmp_path, capsys):
    source = save_folder("gpt2", tmp_path / "source", shard_size="1GB")
    save_file(dict(stored(source)) | {"lm_head.weight": torch.ones(103, 32)}, source / "model.safetensors")
    assert convert("--load-hf", source, "--save", tmp_path / "run", "--no-verify") == 2
    assert "has a lm_head.weight that differs from transformer.wte.weight" in capsys.readouterr().err


def test_models_that_differ_are_not_written(tmp_path, monkeypatch, capsys):
    """As a mistake in the table of names would be found: gate and up in each other's place."""
    source, links = save_folder("llama", tmp_path / "source"), huggingface_names.links

    def mistaken(*arguments, **options):
        for link in links(*arguments, **options):
            names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            part = next((name for name in names if name in link.theirs), None)
            yield link if part is None else dataclasses.replace(link, theirs=link.theirs.replace(part, names[part]))

    monkeypatch.setattr(huggingface_names, "links", mistaken)
    assert convert("--load-hf", source, "--save", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "the models differ: largest difference of logits" in said and "nothing was written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_transformers_it_is_said_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(against_transformers, "is_installed", lambda: False)
    source = save_folder("qwen2", tmp_path / "source")
    assert convert("--load-hf", source, "--save", tmp_path / "run") == 0
    assert "transformers is not installed, so logits were NOT compared" in capsys.readouterr().err


def test_the_printed_line_begins_a_run(tmp_path, capsys):
    """Of the folder's shape, with a tokenizer that has more ids than the model; without --finetune it is refused."""
    source = save_folder("mistral", tmp_path / "source")
    add_tokenizer(source, ["<pad>"])
    assert convert("--load-hf", source, "--save", tmp_path / "a run", "--no-verify") == 0
    mesh, stop = ProcessMesh(MeshShape(), 0), StopRequest(None)
    config = config_of_printed_line(capsys.readouterr().out)
    unlike = sources.override(config, {"checkpoint": {"finetune": False}})
    with pytest.raises(CheckpointError, match=r"holds weights that were imported.* by --load and --finetune"):
        train_on(mesh, unlike, stop, "")
    train_on(mesh, sources.override(config, {"checkpoint": {"save": str(tmp_path / "trained")}}), stop, "")
    said = capsys.readouterr().err
    assert "step 1/1" in said and "embedding.word.weight grows from 103 to 104 rows" in said
    assert "the weights of" not in said
    stop.close()
    # And what it trains goes back as what was imported.
    assert convert("--load", tmp_path / "trained", "--save-hf", tmp_path / "there", "--no-verify") == 0
    assert json.loads((tmp_path / "there" / "config.json").read_text())["model_type"] == "mistral"


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """96 MB of weights, 16 MB of them the largest: there and back on less than three of those."""
    largest, count = 16 * 2**20, 4096 * 1024
    names = {f"model.layers.{i}.{part}": shape for i in range(4) for part, shape in _LAYER.items()}
    names |= {"model.embed_tokens.weight": (4096, 1024), "model.norm.weight": (1024,)}
    assert max(torch.Size(shape).numel() for shape in names.values()) == count
    source = tmp_path / "source"
    source.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(_CONFIG))
    assert sum(file.stat().st_size for file in source.iterdir()) > 5.9 * largest
    convert("--load-hf", source, "--save", tmp_path / "warm", "--no-verify")
    for arguments in (
        ("--load-hf", source, "--save", tmp_path / "run"),
        ("--load", tmp_path / "run", "--save-hf", tmp_path / "there"),
    ):
        meter = MemoryMeter()
        assert convert(*arguments, "--no-verify") == 0
        assert meter.peak().process < 3 * largest


_LAYER = {
    "self_attn.q_proj.weight": (1024, 1024),
    "self_attn.k_proj.weight": (256, 1024),
    "self_attn.v_proj.weight": (256, 1024),
    "self_attn.o_proj.weight": (1024, 1024),
    "mlp.gate_proj.weight": (1024, 1024),
    "mlp.up_proj.weight": (1024, 1024),
    "mlp.down_proj.weight": (1024, 1024),
    "input_layernorm.weight": (1024,),
    "post_attention_layernorm.weight": (1024,),
}
_CONFIG = {
    "model_type": "llama", "hidden_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 1,
    "num_hidden_layers": 4, "intermediate_size": 1024, "vocab_size": 4096, "tie_word_embeddings": True,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "Give --load-hf DIR and --save DIR to import, or --load DIR and --save-hf DIR to export"),
        (("--load", "x", "--load-hf", "y", "--save", "z"), "Give --load-hf DIR and --save DIR"),
        (("--load", "x", "--save", "y"), "--load needs --save-hf DIR to write to"),
        (("--load-hf", "x", "--save", "y", "--family", "llama"), "--family goes with --load; leave it out"),
        (("--load", "x", "--save-hf", "y", "--max-file-gb", "0"), "max_file_gb=0 is no size"),
        (("--load", "nowhere", "--save-hf", "y"), "holds no complete checkpoint"),
        (("--load-hf", "nowhere", "--save", "y"), "config.json is not there"),
    ],
)
def test_what_cannot_be_is_told(arguments, match, capsys):
    assert convert(*arguments) == 2
    assert match in capsys.readouterr().err


def test_a_folder_of_the_other_kind_is_told(tmp_path, capsys):
    save_tiny_run(tmp_path / "run")
    assert convert("--load-hf", tmp_path / "run", "--save", tmp_path / "x") == 2
    assert "is a folder of checkpoints, which --load reads" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert convert("--load", tmp_path, "--save-hf", tmp_path / "x") == 2
    assert "(it is a Hugging Face folder, which --load-hf reads)" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path, capsys):
    source = save_folder("qwen2", tmp_path / "source")
    assert convert("--load-hf", source, "--save", source, "--no-verify") == 2
    assert "is there already and not an empty folder" in capsys.readouterr().err


def test_the_folder_one_is_in_is_not_replaced(tmp_path, monkeypatch, capsys):
    save_tiny_run(tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", tmp_path / "here"):
        assert convert("--load", tmp_path / "run", "--save-hf", name, "--no-verify") == 2
        assert f"{name} is the folder that you are in" in capsys.readouterr().err


def test_what_a_kill_left_is_swept_and_what_is_being_made_is_not(tmp_path):
    dead, alive, other = (tmp_path / name for name in (".x.0123abcd.tmp", ".x.0123abce.tmp", ".y.0123abcd.tmp"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "a").touch()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with arriving(tmp_path / "x") as first:
        with pytest.raises(ZeroDivisionError), arriving(tmp_path / "x"):
            assert not dead.exists() and alive.exists() and other.exists() and first.exists()
            raise ZeroDivisionError
        assert {path.name for path in tmp_path.iterdir()} == {first.name, alive.name, other.name}
    os.close(lock)


def test_all_of_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    durable, rename = set(), os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: durable.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name))

    def renamed(source, target):
        if Path(target) == tmp_path / "x":
            assert {"config.json", "inner", "model.safetensors", Path(source).name} <= durable
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    with arriving(tmp_path / "x") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "model.safetensors").touch()
        (temporary / "config.json").touch()
    assert tmp_path.name in durable


@pytest.mark.parametrize("part", ["load", "run"])
def test_whatever_transformers_raises_is_told(part, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    def fail(*arguments, **options):
        raise KeyError("full_attention")

    source = save_folder("llama", tmp_path / "source")
    monkeypatch.setattr(
        *{"load": (AutoModelForCausalLM, "from_pretrained"), "run": (LlamaForCausalLM, "forward")}[part], fail
    )
    assert convert("--load-hf", source, "--save", tmp_path / "run") == 2
    words = {"load": "transformers cannot load", "run": "the model that transformers makes of"}[part]
    said = capsys.readouterr().err
    assert words in said and "KeyError: 'full_attention'" in said and not (tmp_path / "run").exists()
