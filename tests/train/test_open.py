"""Trained models opened elsewhere: a vocabulary that grows, a folder that moves, a run started again."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.distributed as dist
from allocations import Allocations
from ranks import run_on_ranks
from tiny_run import TEXTS, load_tool, save_tiny_run, tiny_config
from train.layouts import LENGTH, VOCABULARY, Case, config_of

from megatron_lite.checkpoint.load import read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.save import save
from megatron_lite.config import cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.data import tokenizer as tokenizer_module
from megatron_lite.errors import CheckpointError, TokenizerError, UserError
from megatron_lite.model.gpt import GPT
from megatron_lite.model.init import initial_value
from megatron_lite.parallel.launch import StopRequest
from megatron_lite.parallel.layout import replicated
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train.open import open_on, weight_pieces
from megatron_lite.train.start import train_on

GROWN = VOCABULARY + 6
TARGETS = [Case(2, 1, 0), Case(1, 2, 2), Case(1, 2, 3), Case(2, 1, 3), Case(1, 2, 1, dtype="bf16")]
STEP = "step-00000002"


@pytest.fixture(autouse=True)
def no_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _config(case: Case, folder: Path, **changes) -> RunConfig:
    config = config_of(
        case,
        training={"train_iters": 2, "eval_interval": 0},
        checkpoint={"save": str(folder)},
        logging={"tensorboard_dir": "none"},
    )
    for name, value in changes.items():
        config = sources.override(config, {sources.section_of()[name]: {name: value}})
    return config


def _train(*configs: RunConfig) -> None:
    for config in configs:
        tensor = config.parallel.tensor_model_parallel_size
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        train_on(ProcessMesh.create(MeshShape(data=world_size // tensor, tensor=tensor)), config, StopRequest(), "test")


def _state(folder: Path, step: str = STEP) -> dict[str, torch.Tensor]:
    return {name: read_tensor(folder / step, name) for name in read_manifest(folder / step).tensors}


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]


def _drawn(name: str, rows: int, config: RunConfig) -> torch.Tensor:
    return initial_value(name, replicated((rows, config.model.hidden_size), 0), config.model, config.training.seed)


def test_a_vocabulary_grows_at_every_layout(tmp_path):
    """Loaded and saved again without a step: old rows are the stored ones, new ones drawn, their slots zero."""
    first, goes_on = tmp_path / "first", tmp_path / "goes on"
    targets = {tmp_path / str(case): dataclasses.replace(case, llama=True) for case in TARGETS}
    runs = [_config(Case(2, 1, 1, llama=True), folder) for folder in (first, goes_on)]
    for folder, case in targets.items():
        runs.append(_config(case, folder, load=str(first), vocab_size=GROWN))
    runs.append(_config(Case(2, 1, 1, llama=True), goes_on, vocab_size=GROWN, train_iters=3))
    run_on_ranks(_train, 2, *runs, timeout=300)
    stored = _state(first)
    for folder, case in targets.items():
        grown = _state(folder)
        assert grown.keys() == stored.keys()
        for name, tensor in grown.items():
            kind, _, parameter = name.partition("/")
            assert torch.equal(tensor[: len(stored[name])], stored[name]), (case, name)
            if parameter not in ("embedding.word.weight", "head.weight"):
                assert tensor.shape == stored[name].shape
                continue
            assert tensor.shape[0] == GROWN
            expected = torch.zeros(6, 32)
            if kind == "weight":
                expected = _drawn(parameter, GROWN, _config(case, folder))[VOCABULARY:]
                expected = expected.bfloat16().float() if case.dtype == "bf16" else expected
            assert torch.equal(tensor[VOCABULARY:], expected), (case, name)
    later = _state(goes_on, "step-00000003")
    assert later["exp_avg/head.weight"].shape[0] == GROWN and later["exp_avg/head.weight"][VOCABULARY:].any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one process that learned positions."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    _train(_config(Case(), folder))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 99},
            "101 token ids and this model 99: a vocabulary can grow, not shrink; give --vocab-size 101",
        ),
        ({"max_position_embeddings": 32}, "learned 16 positions and this model has 32; give .* 16, or --finetune"),
        ({"max_position_embeddings": 8, "seq_length": 8, "finetune": True}, "16 positions .* has 8; give [^,]* 16$"),
        ({"num_attention_heads": 8}, "num_attention_heads is 4 there and 8 here"),
        ({"norm_epsilon": 1e-6, "activation_func": "relu"}, "activation_func is gelu_tanh there .*, norm_epsilon is"),
        ({"num_layers": 3, "finetune": True}, "checkpoint holds 2 layers, this model 3"),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(trained, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        _train(_config(Case(), tmp_path / "other", load=str(trained), **changes))


def test_a_run_folder_of_another_model_is_not_gone_on_with(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"does not fit this model: kv_channels is 8 there and 16 here.*--save"):
        _train(_config(Case(), folder, kv_channels=16, train_iters=3))
    # A default spelled out, and what only training reads, are no difference.
    same = {"kv_channels": 8, "num_query_groups": 4, "rotary_base": 5.0, "hidden_dropout": 0.1, "init_method_std": 0.5}
    _train(_config(Case(), folder, **same, train_iters=3))
    assert read_manifest(folder / "step-00000003").step == 3


def test_finetune_learns_more_positions_and_warns_of_other_settings(trained, tmp_path, capsys):
    folder = tmp_path / "longer"
    changes = {"max_position_embeddings": 24, "seq_length": 24, "norm_epsilon": 1e-6}
    config = _config(Case(), folder, load=str(trained), finetune=True, **changes, train_iters=1, lr=1e-30)
    _train(config)
    positions = read_tensor(folder / "step-00000001", "weight/embedding.position.weight")
    assert torch.equal(positions[:LENGTH], read_tensor(trained / STEP, "weight/embedding.position.weight"))
    assert torch.equal(positions[LENGTH:], _drawn("embedding.position.weight", 24, config)[LENGTH:])
    said = capsys.readouterr().err
    assert "embedding.position.weight grows from 16 to 24 rows: 8 begin with their initial draw" in said
    assert "weights of " in said and "norm_epsilon is 1e-05 there and 1e-06 here" in said


def test_special_tokens_are_added_to_a_run_and_to_an_opened_model(tmp_path, capsys):
    folder, tokens = tmp_path / "run", ("<|user|>", "<|model|>")
    run = {"tokenizer_type": "ByteTokenizer", "vocab_size": None}
    _train(_config(Case(), folder, **run))
    with pytest.raises(CheckpointError, match="258 token ids and this model 257"):
        _train(_config(Case(), folder, tokenizer_type=None, vocab_size=257))
    capsys.readouterr()
    mesh = ProcessMesh.create(MeshShape())
    opened = open_on(mesh, folder, overrides={"data": {"special_tokens": tokens}})
    assert "embedding.word.weight grows from 258 to 260 rows" in capsys.readouterr().err
    assert opened.tokenizer.token_to_id("<|model|>") == 259
    weight = opened.model.embedding.word.weight[:260]
    assert torch.equal(weight[:258], read_tensor(folder / STEP, "weight/embedding.word.weight"))
    assert torch.equal(weight[258:], _drawn("embedding.word.weight", 260, opened.config)[258:])
    assert opened.model.logits(torch.tensor([[259, 65]])).isfinite().all()

    _train(_config(Case(), folder, **run, special_tokens=tokens, train_iters=3))
    said = capsys.readouterr().err
    assert "the tokenizer is the checkpoint's, but for the special tokens <|model|>, <|user|>" in said
    assert "grows from 258 to 260 rows" in said
    assert open_on(mesh, folder).tokenizer.vocab_size == 260


def test_rows_of_a_damaged_checkpoint_do_not_stay_in_the_one_before(tmp_path, capsys):
    folder, run = tmp_path / "run", {"tokenizer_type": "ByteTokenizer", "vocab_size": None}
    _train(_config(Case(), folder, **run))
    _train(_config(Case(), folder, **run, special_tokens=("<|user|>",), train_iters=3))
    shard = folder / "step-00000003" / "rank-00000.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"step-00000002 has fewer rows of .* away and start again"):
        _train(_config(Case(), folder, **run, special_tokens=("<|user|>",), train_iters=4))
    assert "going on with this run from step 3" not in capsys.readouterr().err, "it was not loaded"
    assert open_on(ProcessMesh.create(MeshShape()), folder).step == 2
    said = capsys.readouterr().err
    assert "step-00000003 cannot be loaded: rank 0: " in said and f"that can be used is {folder / STEP}" in said


@pytest.fixture
def tokenized(tmp_path):
    """A run, its tokenizer.json beside it in another folder."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    model = tmp_path / "made" / "tokenizer.json"
    model.parent.mkdir()
    library.save(str(model))
    model.with_name("tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>"}')
    data = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(model), "vocab_size": None}
    _train(_config(Case(), tmp_path / "run", **data, lr=0.1))
    return tmp_path / "run", model


def _generated(run: Path, capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = load_tool("generate_text").main(
        ["--load", str(run), "--prompt", "In the", "--greedy", "--max-new-tokens", "6", *arguments]
    )
    if dist.is_initialized():
        dist.destroy_process_group()
    return code, *capsys.readouterr()


def test_a_moved_run_folder_generates_the_same_text(tokenized, tmp_path, capsys):
    run, original = tokenized
    before = _generated(run, capsys)
    assert before[0] == 0 and before[1].startswith("In the")
    original.rename(tmp_path / "renamed.json")
    elsewhere = run.rename(tmp_path / "elsewhere")
    for load in (elsewhere, elsewhere / STEP):
        assert _generated(load, capsys)[:2] == before[:2]
    assert sorted(os.listdir(elsewhere / "tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]

    shutil.rmtree(elsewhere / "tokenizer")
    code, _, said = _generated(elsewhere, capsys)
    assert code == 2 and "there is no such file" in said and "Name its files by --tokenizer-model" in said
    assert _generated(elsewhere, capsys, "--tokenizer-model", str(tmp_path / "renamed.json"))[:2] == before[:2]


def test_another_tokenizer_is_refused_unless_it_is_asked_for(tokenized, capsys):
    run, original = tokenized
    before = _generated(run, capsys)
    copy = run / "tokenizer" / "tokenizer.json"
    content = json.loads(copy.read_text())
    content["model"]["vocab"]["a"], content["model"]["vocab"]["b"] = (content["model"]["vocab"][x] for x in "ba")
    copy.write_text(json.dumps(content))
    # The files that training read are still there and agree with the checkpoint.
    assert _generated(run, capsys)[:2] == before[:2]
    original.unlink()
    code, _, said = _generated(run, capsys)
    assert code == 2 and "the copy beside the checkpoint is another one now (fingerprint" in said
    code, _, said = _generated(run, capsys, "--tokenizer-model", str(copy))
    assert code == 0 and "is not the tokenizer of training" in said


def test_resume_with_another_tokenizer_is_said_and_the_copy_follows(tokenized, tmp_path, capsys):
    run, original = tokenized
    config = sources.override(RunConfig(), sources.read(run / "config.yaml"))
    vocab = json.loads(original.read_text())["model"]["vocab"]
    (tmp_path / "v").write_text(json.dumps({**vocab, "<|endoftext|>": 0}))
    (tmp_path / "m").write_text("#version: 0.2\n")
    data = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(tmp_path / "v"), "merge_file": str(tmp_path / "m")}
    capsys.readouterr()
    _train(sources.override(config, {"data": data, "training": {"train_iters": 3}}))
    assert f"the tokenizer is not the one {run / STEP} was trained with" in capsys.readouterr().err
    assert sorted(os.listdir(run / "tokenizer")) == ["merges.txt", "vocab.json"]


def test_a_runs_own_config_starts_it_again(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    ramp = {"rampup_batch_size": (2, 2, 8), "micro_batch_size": 2, "train_iters": None, "train_samples": 14}
    _train(_config(Case(), first, **ramp, hidden_dropout=0.1))
    assert "config.yaml --save OTHER\n" in (first / "config.yaml").read_text()
    config, _ = cli.load(["--config", str(first / "config.yaml"), "--save", str(again)])
    _train(config)
    assert _losses(again) == _losses(first) and len(_losses(first)) > 3


def _save_as(folder: Path, precision: dict, step: int = 1, **model) -> GPT:
    """A checkpoint of a random model said to be trained in some precision."""
    config = sources.override(tiny_config(), {"precision": precision, "model": model})
    mesh = ProcessMesh.create(MeshShape())
    made = GPT(config.model, mesh, vocab_size=config.model.vocab_size, seq_length=config.data.seq_length, seed=0)
    pieces = [dataclasses.replace(piece, owned=True) for piece in weight_pieces(made)]
    save(folder, step, pieces, {}, mesh, layout="tp=1", config=sources.plain(config), versions={})
    return made


def test_precision_is_that_of_training_but_fp32_on_a_cpu(tmp_path, capsys):
    made = _save_as(tmp_path, {"bf16": True})
    mesh = ProcessMesh.create(MeshShape())
    opened = {dtype: open_on(mesh, tmp_path, dtype=dtype).model for dtype in (None, "bf16")}
    assert capsys.readouterr().err.count("opened in fp32, not in bf16 as trained") == 1
    for (name, weight), default, half in zip(
        made.named_parameters(), opened[None].parameters(), opened["bf16"].parameters(), strict=True
    ):
        assert torch.equal(default, weight), name
        assert half.dtype == torch.bfloat16 and torch.equal(half, weight.bfloat16()), name


def test_opening_needs_no_more_memory_than_the_model(tmp_path):
    made = _save_as(tmp_path, {}, hidden_size=256, ffn_hidden_size=4096)
    mesh = ProcessMesh.create(MeshShape())
    open_on(mesh, tmp_path)
    with Allocations() as memory:
        memory.mark("begin")
        opened = open_on(mesh, tmp_path, dtype="bf16")
        memory.mark("end")
    size = sum(parameter.nbytes for parameter in opened.model.parameters())
    assert size * 2 == sum(parameter.nbytes for parameter in made.parameters())
    assert size <= memory.peak("begin", "end") <= 1.1 * size


def test_the_model_of_a_damaged_checkpoint_is_gone_before_the_next_one_is_made(tmp_path, monkeypatch):
    """Without the collector of cycles: two models at once may be more than there is memory for."""
    for step in (1, 2):
        _save_as(tmp_path, {}, step)
    shard = tmp_path / STEP / "rank-00000.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    made, alive = [], []

    def make(*arguments, **named):
        alive.append(sum(model() is not None for model in made))
        model = GPT(*arguments, **named)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr("megatron_lite.train.open.GPT", make)
    mesh = ProcessMesh.create(MeshShape())
    gc.collect()
    gc.disable()
    try:
        assert open_on(mesh, tmp_path).step == 1
    finally:
        gc.enable()
    assert alive == [0, 0]


def _open_with_one_blind_rank(folder: str, heads: str) -> list[str]:
    """What each rank is told when a tensor size does not fit, and when one rank cannot read the tokenizer."""
    mesh, told = ProcessMesh.create(MeshShape(tensor=2)), []
    assert open_on(mesh, folder).model.logits(torch.tensor([[65, 66]])).isfinite().all()
    for load in (heads, folder):
        try:
            if mesh.global_rank == 1:
                tokenizer_module._BUILDERS = {"ByteTokenizer": _unreadable}
            open_on(mesh, load)
        except UserError as error:
            told.append(str(error))
    return told


def _unreadable(data):
    raise TokenizerError("planted")


def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    save_tiny_run(tmp_path / "run")
    _save_as(tmp_path / "heads", {}, num_attention_heads=1)
    mine, theirs = run_on_ranks(_open_with_one_blind_rank, 2, str(tmp_path / "run"), str(tmp_path / "heads"))
    assert mine == theirs
    assert "tensor_model_parallel_size=2 does not divide num_attention_heads=1; choose 1" in mine[0]
    assert mine[1].startswith("rank 1: ") and "planted" in mine[1]
