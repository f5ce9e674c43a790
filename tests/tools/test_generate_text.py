"""tools/generate_text.py: prompts by flag, file, pipe and terminal; what it prints; how it fails; by torchrun."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny_run import SEQ_LENGTH, TOKENIZER, TOOLS, TORCHRUN, load_tool, save_tiny_run, start_tool

from megatron_lite.generate.sampling import Sampling
from megatron_lite.generate.text import complete
from megatron_lite.parallel.mesh_shape import MeshShape
from megatron_lite.parallel.process_mesh import ProcessMesh

main = load_tool("generate_text").main
GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def no_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder / "saved", save_tiny_run(folder / "saved")


def expected(run, prompts, sampling=GREEDY, **options):
    mesh = ProcessMesh.create(MeshShape())
    done = complete(run[1], mesh, TOKENIZER, prompts, sampling, **{"max_new_tokens": 10, **options})
    return [prompt + completion.text for prompt, completion in zip(prompts, done, strict=True)]


def generate(run, *arguments):
    return main(["--load", str(run[0]), "--max-new-tokens", "10", *map(str, arguments)])


def test_one_prompt_is_streamed_behind_itself(run, capsys):
    text = expected(run, ["In the"])[0]
    for flags in ((), ("--no-cache",), ("--no-stream",)):
        assert generate(run, "--greedy", "--prompt", "In the", *flags) == 0
        printed = capsys.readouterr()
        assert printed.out == (f"--- 1 of 1\n{text}\n" if flags == ("--no-stream",) else f"{text}\n")
        assert "10 tokens in" in printed.err and "ended by length" in printed.err


def test_prompts_of_flags_and_a_file_as_json_lines(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("ä third\n\nfourth\n", encoding="utf-8")
    flags = ("--prompt", "a", "--prompt", "second one", "--prompts-file", tmp_path / "prompts.txt", "--json")
    sampling = ("--temperature", "0.8", "--top_k", "50", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "5")
    assert generate(run, *flags, *sampling) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prompts = ["a", "second one", "ä third", "fourth"]
    assert [line["prompt"] for line in lines] == prompts
    chosen = Sampling(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=5)
    assert [line["prompt"] + line["text"] for line in lines] == expected(run, prompts, chosen)
    assert lines[0].keys() == {"prompt", "sample", "text", "tokens", "reason"}


def test_samples_and_batches(run, capsys):
    outputs = []
    for batch_size in (1, 16):
        assert generate(run, "--prompt", "a", "--num-samples", 3, "--batch-size", batch_size) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("--- ") == 3 and "--- 2 of 3\na" in outputs[0]


def test_a_stop_text_ends_the_continuation(run, capsys):
    text = expected(run, ["In the"])[0]
    stop = text[-4:]
    assert generate(run, "--greedy", "--prompt", "In the", "--stop", "unmet", "--stop", stop) == 0
    printed = capsys.readouterr()
    assert printed.out == text[: text.index(stop, 6)] + "\n"
    assert "ended by stop" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a" * (SEQ_LENGTH + 3)], "prompt 1 of 1 has 35 tokens .* 32 positions; shorten it by 3"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["--prompt", "a", "--top-p", "1.5", "--top-k", "-1"], "2 problems"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0 is too small"),
        (["--prompt", "a", "--greedy", "--temperature", "0.7"], "--greedy contradicts --temperature 0.7"),
        (["--prompt", "a", "--greedy", "--num-samples", "2"], "--num-samples 2 asks for several"),
        (
            ["--prompt", "a", "b"],
            "--prompt takes one value, but 2 were given; put it in quotes, or give --prompt again",
        ),
        (["--prompt"], "--prompt takes one value, but 0 were given"),
        (["--prompts-file", "/absent"], "--prompts-file /absent cannot be read: No such file"),
        (["--prompts-file", "/dev/null"], "/dev/null holds no prompt"),
        (["--prompt", "a", "--load", "/absent"], "/absent"),
        (
            ["--prompt", "a", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "absent"],
            "--tokenizer-model absent: there is no such file",
        ),
    ],
)
def test_a_users_error_is_a_sentence_and_exit_code_2(run, capsys, arguments, message):
    assert generate(run, *arguments) == 2
    said = capsys.readouterr().err
    assert "error: " in said and re.search(message, said)


@pytest.mark.parametrize("text", ["-x", "--y", "a=b", "None"])
def test_a_prompt_may_look_like_a_flag(run, capsys, text):
    assert generate(run, "--greedy", f"--prompt={text}") == 0
    assert capsys.readouterr().out == expected(run, [text])[0] + "\n"


def test_prompts_in_another_encoding_are_refused(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert generate(run) == 2
    assert "standard input is not UTF-8 text: byte 2 is 0xff" in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer_says_how_to_name_one(tmp_path, capsys):
    save_tiny_run(tmp_path, tokenizer_type=None)
    assert main(["--load", str(tmp_path), "--prompt", "a"]) == 2
    assert "names no tokenizer; give --tokenizer-type" in capsys.readouterr().err
    dist.destroy_process_group()
    assert main(["--load", str(tmp_path), "--prompt", "a", "--tokenizer-type", "ByteTokenizer"]) == 0


def test_two_ranks_share_the_model_and_the_pipe_gives_the_prompts(run):
    done = start_tool(
        "generate_text",
        *("--load", run[0], "--max-new-tokens", 10, "--greedy", "--json"),
        launcher=TORCHRUN,
        input="In the\n\nbeginning\n",
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] + line["text"] for line in lines] == expected(run, ["In the", "beginning"])


def test_prompts_typed_on_a_terminal_are_answered_in_turn_until_its_end(run):
    mine, terminal = pty.openpty()
    command = [
        sys.executable,
        str(TOOLS / "generate_text.py"),
        "--load",
        str(run[0]),
        "--greedy",
        "--max-new-tokens",
        "10",
    ]
    os.write(mine, b"In the\n" + b"a" * 40 + b"\n\nbeginning\n\x04")
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60)
    os.close(mine)
    os.close(terminal)
    assert done.returncode == 0, done.stderr
    for text in expected(run, ["In the", "beginning"]):
        assert f"> {text}\n" in done.stdout
    assert "prompt 1 of 1 has 40 tokens" in done.stderr


def test_help_needs_no_torch():
    done = start_tool("generate_text", "--help", launcher=("-X", "importtime"))
    assert done.returncode == 0 and "--top-p" in done.stdout, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported and "torch" not in imported


def test_half_precision_on_request(run, capsys):
    assert generate(run, "--prompt", "In the", "--greedy", "--dtype", "bf16") == 0
    assert capsys.readouterr().out.startswith("In the")
    assert next(run[1].parameters()).dtype == torch.float32
