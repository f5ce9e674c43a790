"""tools/evaluate.py: what it scores, what it says, how it fails; by python and by torchrun."""

import json
import math

import pytest
import torch.distributed as dist
from tiny_run import (
    SEQ_LENGTH,
    TEXTS,
    TOKENIZER,
    TORCHRUN,
    load_tool,
    save_tiny_run,
    start_tool,
    write_token_set,
)

from megatron_lite.data.documents import TokenWindows
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.eval.loss import score
from megatron_lite.eval.passage import passage_of_documents
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.train import build

main = load_tool("evaluate").main


@pytest.fixture(autouse=True)
def no_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    prefix = write_token_set(folder / "set")
    model = save_tiny_run(folder / "saved", data_path=(str(prefix),), split="50,30,20")
    return folder, model


def expected_score(model, prefix, stride=None, documents=None, **options):
    windows = TokenWindows(IndexedReader(prefix), SEQ_LENGTH, None, documents)
    passage = passage_of_documents("set", windows, TOKENIZER.vocab_size, TOKENIZER)
    return score(model, ProcessMesh.create(MeshShape()), passage, seq_length=SEQ_LENGTH, stride=stride, **options)


def evaluate(run, *arguments):
    path = run[0] / "result.json"
    assert main(["--load", str(run[0] / "saved"), "--json", str(path), *map(str, arguments)]) == 0
    return json.loads(path.read_text())


def test_the_numbers_of_a_data_path(run, capsys):
    result = evaluate(run, "--data-path", run[0] / "set")
    expected = expected_score(run[1], run[0] / "set")
    (row,) = result["passages"]
    assert (result["step"], result["seq_length"], result["stride"]) == (7, SEQ_LENGTH, SEQ_LENGTH)
    assert row["tokens"] == expected.tokens == sum(len(text.encode()) + 1 for text in TEXTS) - 1
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(expected.loss), rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert row["accuracy"] == expected.accuracy
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["tokens", "loss", "perplexity", "bits/byte", "accuracy"]
    assert table[1].split()[:3] == [str(run[0] / "set"), f"{row['tokens']:,}", f"{row['loss']:.4f}"]
    assert len(table) == 2


def test_documents_are_scored_as_the_run_trained_them(run, tmp_path):
    flags = {"reset_attention_mask": True, "reset_position_ids": True}
    model = save_tiny_run(tmp_path / "saved", data_path=(str(run[0] / "set"),), **flags)
    found = evaluate((tmp_path, model), "--data-path", run[0] / "set")["total"]
    expected = expected_score(model, run[0] / "set", **flags)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["tokens"] == expected_score(model, run[0] / "set").tokens
    assert abs(expected.loss - expected_score(model, run[0] / "set").loss) > 1e-3


def test_a_stride_gives_more_context_to_the_same_tokens(run):
    rows = [
        evaluate(run, "--data_path", run[0] / "set", "--stride", stride, "--local_rank=0")["passages"][0]
        for stride in (32, 8)
    ]
    assert rows[0]["tokens"] == rows[1]["tokens"]
    assert rows[1]["loss"] == pytest.approx(expected_score(run[1], run[0] / "set", stride=8).loss, rel=1e-6)
    assert rows[0]["loss"] != rows[1]["loss"]


def test_splits_of_the_runs_own_data_and_their_total(run, capsys):
    own = evaluate(run)["passages"]
    assert [row["name"] for row in own] == [f"{run[0] / 'set'} (valid)"]
    result = evaluate(run, "--split", "train", "valid", "test")
    sizes = [expected_score(run[1], run[0] / "set", documents=bounds).tokens for bounds in ((0, 6), (6, 10), (10, 12))]
    assert [row["tokens"] for row in result["passages"]] == sizes
    assert result["passages"][1] == own[0]
    assert result["total"]["tokens"] == sum(sizes)
    assert result["total"]["loss"] == pytest.approx(
        sum(row["loss"] * row["tokens"] for row in result["passages"]) / sum(sizes)
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith("total ")


def test_a_text_file_is_scored_whole(run, capsys):
    path = run[0] / "text.txt"
    path.write_text("Größe\n", encoding="utf-8")
    assert main(["--load", str(run[0] / "saved"), "--text", str(path), "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["passages"]
    assert (row["tokens"], row["text_bytes"]) == (8, 8)
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "{folder}/nowhere"], "{folder}/nowhere"),
        (["--load", "{folder}/saved", "--data-path", "{folder}/absent"], "absent.idx does not exist"),
        (["--load", "{folder}/saved", "--stride", "33"], "stride=33 is out of range"),
        (["--load", "{folder}/saved", "--stride", "0"], "stride=0 is too small"),
        (["--load", "{folder}/saved", "--seq-length", "64"], "seq_length=64 is longer than the 32 positions"),
        (["--load", "{folder}/saved", "--text", "{folder}/absent"], "absent cannot be read"),
        (
            ["--load", "{folder}/saved", "--json", "{folder}/text.txt/x"],
            "--json {folder}/text.txt/x cannot be written: Not",
        ),
        (["--load", "{folder}/nowhere", "--json", "{folder}"], "--json {folder} cannot be written: Is a directory"),
        (["--lod", "{folder}/saved", "--load", "x"], "--lod is not a known flag; perhaps you meant --load."),
        ([], "--load is needed"),
        (["--load", "{folder}/saved", "--ckpt-step", "8"], "no checkpoint of step 8"),
        (
            ["--load", "{folder}/saved", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "absent"],
            "--tokenizer-model absent: there is no such file",
        ),
        (["--load", "x", "--distributed-timeout-minutes", "0"], "distributed_timeout_minutes=0 is no time to wait"),
    ],
)
def test_a_users_error_is_a_sentence_and_exit_code_2(run, capsys, arguments, message):
    assert main([argument.format(folder=run[0]) for argument in arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and message.format(folder=run[0]) in said


def test_special_tokens_and_a_pattern_can_be_named(run):
    assert evaluate(run, "--special-tokens", "<new>", "<two>")["total"]["tokens"] > 0
    opening = load_tool("evaluate").OpeningConfig(load="x", tiktoken_pattern="p", special_tokens=("<new>",))
    assert opening.overrides == {"data": {"tiktoken_pattern": "p", "special_tokens": ("<new>",)}}


def test_ranks_wait_for_one_another_as_long_as_asked(run, monkeypatch):
    waited, start_ranks = [], build.start_ranks
    monkeypatch.setattr(
        build, "start_ranks", lambda *a, **o: waited.append(o["timeout_minutes"]) or start_ranks(*a, **o)
    )
    evaluate(run, "--distributed-timeout-minutes", "2.5")
    assert waited == [2.5]


def test_a_result_that_cannot_be_written_leaves_nothing(run, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    before = set(run[0].iterdir())
    assert main(["--load", str(run[0] / "saved"), "--json", str(run[0] / "new.json")]) == 2
    assert set(run[0].iterdir()) == before


def test_a_checkpoint_without_tokenizer_scores_tokens_but_no_bytes(run, tmp_path, capsys):
    save_tiny_run(tmp_path, data_path=(str(run[0] / "set"),), split="50,50", tokenizer_type=None)
    assert main(["--load", str(tmp_path), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["bits_per_byte"] is None
    assert main(["--load", str(tmp_path), "--text", __file__]) == 2
    assert "--text needs a tokenizer" in capsys.readouterr().err
    dist.destroy_process_group()
    assert main(["--load", str(tmp_path), "--json", "-", "--tokenizer-type", "ByteTokenizer"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["bits_per_byte"] > 0


def test_ranks_of_torchrun_give_the_numbers_of_one_process(run):
    arguments = ("--load", run[0] / "saved", "--data-path", run[0] / "set", "--micro-batch-size", "3", "--json", "-")
    expected = evaluate(run, "--data-path", run[0] / "set", "--micro-batch-size", "3")["total"]
    done = start_tool("evaluate", *arguments, "--tensor-model-parallel-size", "1", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    total = json.loads(done.stdout)["total"]
    assert total["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert (total["tokens"], total["accuracy"], total["text_bytes"]) == (
        expected["tokens"],
        expected["accuracy"],
        expected["text_bytes"],
    )


def test_help_needs_no_torch_and_an_error_shows_no_traceback(tmp_path):
    done = start_tool("evaluate", "--help", launcher=("-X", "importtime"))
    assert done.returncode == 0 and "--data-path" in done.stdout, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported and "torch" not in imported
    done = start_tool("evaluate", "--load", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "no complete checkpoint" in done.stderr
