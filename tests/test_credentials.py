"""Secrets of the environment, of flags and of addresses: nowhere in what a run or a tool prints, saves or sends."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import vault
from tiny_run import load_tool

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config import check, cli, sources
from megatron_lite.config.run import RunConfig
from megatron_lite.credentials import are_hidden, without_credentials
from megatron_lite.errors import ConfigError, HangError, LostRankError
from megatron_lite.monitor.exit_file import write_exit
from megatron_lite.monitor.hang_page import Seat
from megatron_lite.monitor.hang_watch import HangWatch, Limit
from megatron_lite.parallel.mesh_shape import MeshShape

TESTS = Path(__file__).resolve().parent
CANARY = "KanarienVogel"
SECRET_ADDRESS = f"vault://user:{CANARY}7@host/folder?token={CANARY}8&part=2"
SHOWN_ADDRESS = "vault://***@host/folder?token=***&part=2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SECRET_ADDRESS, SHOWN_ADDRESS),
        ("to s3://key:a/b+c@host/x, s3:/key:d@host/y", "to s3://***@host/x, s3:/***@host/y"),
        ("simplecache::ftp://:e@host:21/x", "simplecache::ftp://***@host:21/x"),
        ("https://token@host/x http://host:80/x@y", "https://***@host/x http://host:80/x@y"),
        ("redis://u:1234@host", "redis://***@host"),
        ("{'url': 'https://host/x?sig=a%2B&se=1#access=f'}", "{'url': 'https://host/x?sig=***&se=1#access=***'}"),
        ("abfs://container@account/x sftp://user@host", "abfs://container@account/x sftp://user@host"),
        ("gs://bucket/o#17 https://host/?a=true&b=12", "gs://bucket/o#17 https://host/?a=true&b=12"),
        ("C:/x and me@host.org, a=b ://", "C:/x and me@host.org, a=b ://"),
    ],
)
def test_addresses_lose_their_credentials_and_nothing_else(text, shown):
    assert without_credentials(text) == shown == without_credentials(shown)
    assert are_hidden(shown) == (text != shown) and not (are_hidden(text) and text != shown)


def test_what_is_shown_is_no_address_to_go_on_with():
    argv = ["--mock-data", "--vocab-size", "64", "--train-iters", "1", "--save", "x", "--save-copy-to"]
    given, _ = cli.load([*argv, SECRET_ADDRESS])
    assert not check.problems(given, 1)
    (notice,) = check.notices(given)
    assert "came with credentials" in notice
    saved = sources.override(RunConfig(), sources.parse(sources.dump(given), "config.yaml"))
    (problem,) = check.problems(saved, 1)
    assert SHOWN_ADDRESS in problem and "give it again with them" in problem
    again, _ = cli.load([*argv, "vault://host/folder"])
    assert not check.problems(again, 1) and not check.notices(again)


def test_errors_and_exit_json_show_none(tmp_path):
    for error in (LostRankError(f"rank 1: {SECRET_ADDRESS}"), ConfigError([SECRET_ADDRESS, "another"])):
        assert SHOWN_ADDRESS in str(error) and CANARY not in repr(error)
    path = write_exit(tmp_path, "error", 1, 3, "again", f"OSError: {SECRET_ADDRESS}")
    assert json.loads(path.read_bytes())["message"] == f"OSError: {SHOWN_ADDRESS}"


DOOR = """
import json, runpy, sys, types
sys.path.insert(0, {tests!r})
import vault
vault.register()

class Run:
    def log(self, values, step): open("sent.txt", "a").write(str(values))
    def finish(self): pass

def init(**arguments):
    open("sent.txt", "a").write(json.dumps(arguments) + " ".join(sys.argv))
    return Run()

sys.modules["wandb"] = types.SimpleNamespace(init=init)
sys.argv[0] = {door!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


STUCK = f"""
import os, sys, time
sys.path.insert(0, {str(TESTS.parent)!r})
from megatron_lite.data.loader import BatchLoader
step = BatchLoader.step

def stuck(self, consumed, batch_size):
    if consumed and os.environ["RANK"] == "1":
        time.sleep(600)
    return step(self, consumed, batch_size)

BatchLoader.step = stuck
"""
MODEL = "--mock-data --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --vocab-size 64".split()


def canaries(folder: Path) -> list[str]:
    """Files below a folder that have one in them, or in their names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in str(path)]


def test_a_run_leaves_no_secret_anywhere(tmp_path):
    """Two ranks, every sink, a copy behind an address that works once and fails once with the address in its error."""
    (tmp_path / "door.py").write_text(DOOR.format(tests=str(TESTS), door=str(TESTS.parent / "pretrain_gpt.py")))
    (tmp_path / "ds.json").write_text(json.dumps({"comet": {"enabled": False, "api_key": f"{CANARY}6"}}))
    run = "--train-iters 4 --save-interval 2 --eval-interval 0 --log-interval 1 --save run --wandb-project p"
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "COMET_API_KEY", "MY_PASSWORD")
    secrets = {name: f"{CANARY}{number}" for number, name in enumerate(names)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "door.py"]
    done = subprocess.run(
        [*launcher, *MODEL, *run.split(), "--save-copy-to", SECRET_ADDRESS, "--deepspeed_config", "ds.json"],
        cwd=tmp_path,
        env={**os.environ, **secrets, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert f"its copy to {SHOWN_ADDRESS} failed" in said and f"no answer from {SHOWN_ADDRESS}" in said
    assert CANARY not in said
    held = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*")}
    expected = {"config.yaml", "exit.json", "logs", "metrics.jsonl", "tensorboard", "versions.json", "wandb.json"}
    assert held >= expected | {"step-00000002", "step-00000004"}
    assert SHOWN_ADDRESS in (tmp_path / "sent.txt").read_text()
    assert read_manifest(tmp_path / "run" / "step-00000002").config["checkpoint"]["save_copy_to"] == SHOWN_ADDRESS
    assert canaries(tmp_path) == [str(tmp_path / "ds.json")]


def test_the_report_of_a_hang_shows_none(tmp_path, capfd):
    seats, told = [Seat("a", 1)], []
    watch = HangWatch(0, MeshShape.of_world(1), seats, ["a"], tmp_path / "hang", Limit(None, 1.0), told.append)
    watch.report(HangError(f"no answer from {SECRET_ADDRESS}"), OSError(SECRET_ADDRESS))
    assert (tmp_path / "hang" / "page.txt").exists() and canaries(tmp_path) == []
    assert SHOWN_ADDRESS in (tmp_path / "hang" / "rank-00000.json").read_text()
    assert SHOWN_ADDRESS in capfd.readouterr().err and CANARY not in told[0].text + told[0].gist


def test_a_hang_under_deepspeed_leaves_no_secret_anywhere(tmp_path):
    """Its launcher, with a file of the environment beside it; the words of the ranks, the page, torch's own record."""
    (tmp_path / "door.py").write_text(STUCK + DOOR.format(tests=str(TESTS), door=str(TESTS.parent / "pretrain_gpt.py")))
    (tmp_path / ".deepspeed_env").write_text(f"HUB_TOKEN={CANARY}1\n")
    (tmp_path / "tmp").mkdir()
    run = "--train-iters 9 --eval-interval 0 --zero-stage 1 --hang-limit-minutes 0.05 --save run --wandb-project p"
    secrets = {"MLFLOW_TRACKING_TOKEN": f"{CANARY}2", "PYTHON_KEY": f"{CANARY}3", "TORCH_TOKEN": f"{CANARY}4"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port]
    places = {
        "TMPDIR": str(tmp_path / "tmp"),
        "HOME": str(tmp_path),
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "tmp" / "trace"),
    }
    done = subprocess.run(
        [*launcher, "door.py", *MODEL, *run.split()],
        cwd=tmp_path,
        env={**os.environ, **secrets, **places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert "THIS RUN HANGS" in said and CANARY not in said
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["cause"] == "hang", said
    (report,) = (tmp_path / "run").glob("hang-*")
    assert {path.name for path in report.iterdir()} >= {"page.txt", "rank-00000.json"}
    assert canaries(tmp_path) == [str(tmp_path / ".deepspeed_env")]


@pytest.fixture
def addresses(monkeypatch):
    """A corpus behind an address with secrets in it, one that is refused, and one that is not there."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "https", vault.Vault)
    files = fsspec.filesystem("https")
    lines = "".join(json.dumps({"text": f"Text number {number}, which is long enough."}) + "\n" for number in range(20))
    for name in ("corpus.jsonl.gz", "refused.jsonl.gz"):  # known to be packed by the suffix before the query
        files.pipe_file(f"/host/{name}", gzip.compress(lines.encode()))
    yield tuple(
        f"https://user:{CANARY}7@host/{name}.jsonl.gz?token={CANARY}8" for name in ("corpus", "refused", "missing")
    )
    vault.Vault.store.clear()


def test_tools_that_read_text_leave_no_secret_anywhere(addresses, tmp_path, capfd):
    corpus, refused, missing = addresses
    out = str(tmp_path / "set")
    for tool, arguments, target in (
        ("preprocess_data", ["--tokenizer-type", "ByteTokenizer"], ["--output-prefix", out]),
        ("refine_data", ["--recipe", "none", "--keep-metadata", "all"], ["--output", str(tmp_path / "refined")]),
    ):
        main = load_tool(tool).main
        assert main(["--input", corpus, *arguments, *target]) == 0
        for address, why in ((refused, "403 Forbidden"), (missing, "cannot be read")):
            other = [target[0], f"{target[1]}-{why[:3]}"]
            assert main(["--input", address, *arguments, *other]) == 2
            said = capfd.readouterr()
            assert why in said.err and "https://***@host/" in said.err
            assert CANARY not in said.out + said.err
    assert canaries(tmp_path) == []
    # Kinds that take none would carry them along as a part of the path.
    assert (
        load_tool("preprocess_data").main(
            ["--input", f"memory://key:{CANARY}@bucket/x", "--tokenizer-type", "ByteTokenizer", "--output-prefix", out]
        )
        == 2
    )
    said = capfd.readouterr().err
    assert "addresses of this kind take none" in said and CANARY not in said
