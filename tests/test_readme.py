"""README.md and docs/: every command parses, every flag exists, every file and test they name is there."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.config import cli, huggingface, sources
from megatron_lite.config.megatron_flags import BY_NAME
from megatron_lite.config.run import RunConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CAPABILITIES = (ROOT / "docs" / "CAPABILITIES.md").read_text(encoding="utf-8")

LAUNCHERS = {
    "deepspeed": {"--num_gpus", "--master_port", "--hostfile"},
    "torchrun": {"--nproc-per-node", "--master-port"},
    "sbatch": {"--nodes", "--ntasks-per-node", "--gpus-per-node"},
}
OTHERS = {"--index-url", "--no-build-isolation"}  # pip's
VARIABLE = re.compile(r"([A-Z_]+)=")
FLAG = re.compile(r"--[a-z][\w-]*")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@functools.cache
def help_of(program: str) -> str:
    return subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def flags_of(program: str) -> set[str]:
    return set(FLAG.findall(help_of(program)))


@pytest.fixture
def folder_of_the_reader(tmp_path, monkeypatch):
    """A folder with the README's own config in it, the run folder it leads to, and a model of Hugging Face's."""
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    config, _ = cli.load(["--config", str(tmp_path / "mine.yaml")])
    run = tmp_path / config.checkpoint.save
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(sources.dump(config))
    model = sources.override(RunConfig(), sources.read_preset("qwen3-0.6b")).model
    sizes = {"vocab_size": model.vocab_size, "positions": model.max_position_embeddings}
    described = huggingface.config_json(model, "qwen3", **sizes, dtype="bfloat16", bos=None, eos=None)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    (tmp_path / "models" / "qwen" / "config.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)


def test_it_opens_with_the_two_commands():
    assert [words[:2] for words in commands()[:2]] == [["bash", "examples/quickstart.sh"], ["bash", "tests/run.sh"]]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_understood(words, folder_of_the_reader):
    program = next(word for word in words if word.endswith((".py", ".sh", ".sbatch")))
    assert (ROOT / program).is_file()
    before, arguments = words[: words.index(program)], words[words.index(program) + 1 :]
    while VARIABLE.match(before[0]):
        assert VARIABLE.match(before[0])[1] in re.findall(r"^# ([A-Z_]+) ", (ROOT / program).read_text(), re.M)
        before.pop(0)
    assert before[0] in {"bash", "python", *LAUNCHERS}
    assert {word.partition("=")[0] for word in before if word.startswith("--")} <= LAUNCHERS.get(before[0], set())
    if program.startswith("examples/cluster/"):
        assert cli.load(arguments)[0] != RunConfig()
    elif before[0] == "bash":
        assert not arguments
    elif program != "pretrain_gpt.py":
        assert {word for word in arguments if word.startswith("--")} <= flags_of(program)
    elif arguments != ["--help"]:
        assert cli.load(arguments)[0] != RunConfig()


@pytest.mark.parametrize("text", [README, CAPABILITIES], ids=["README", "CAPABILITIES"])
def test_every_flag_exists(text):
    known = {row.name for row in BY_NAME.values()} | OTHERS | set().union(*LAUNCHERS.values())
    for program in ("pretrain_gpt.py", *(f"tools/{p.name}" for p in ROOT.glob("tools/*.py"))):
        known |= flags_of(program)
    known |= {flag.replace("-", "_").replace("__", "--", 1) for flag in known}
    assert not set(FLAG.findall(text)) - known


def test_the_table_of_megatrons_flags_is_right():
    rows = {row.name: row for row in BY_NAME.values()}
    lines = re.search(r"^\| Megatron \| here \|\n\|---\|---\|\n((?:\|.*\n)+)", README, re.M)[1].splitlines()
    assert len(lines) > 10
    for line in lines:
        theirs, here = line.strip("| ").split(" | ")
        for flag in FLAG.findall(theirs):
            row = rows[flag]
            if here.startswith("accepted"):
                assert row.kind == "notice" or "mmap" in row.neutral, line
            elif here.startswith("only 1"):
                assert row.kind == "neutral" and row.neutral == ("1",), line
            elif here.startswith("refused"):
                assert row.kind == "refused", line
            elif flag == "--optimizer":
                assert row.values["adam"] == "adamw", line
            else:
                assert row.kind == "mapped" and row.becomes[0] in FLAG.findall(here), line


def test_every_file_exists():
    for text, folder in ((README, ROOT), (CAPABILITIES, ROOT / "docs")):
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (folder / link).exists(), link
        for path in re.findall(r"`((?:tools|examples|megatron_lite|tests|docs)/[\w./]+)`", text):
            assert (ROOT / path).exists(), path


def test_every_capability_names_tests_that_exist():
    rows = [line for line in CAPABILITIES.splitlines() if line.startswith("| ") and not line.startswith("| **")]
    named = 0
    for row in rows[1:]:
        file = None
        for path, test in re.findall(r"`([\w/]*(?:test_\w+\.py)?)::(\w+)`", row):
            file = path or file
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
            named += 1
        assert file, f"no test holds: {row}"
    assert named > 40
