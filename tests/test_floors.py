"""The house rules that import-linter cannot see: doors, torch-free rooms, environment, pickle, names, paths."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOORS = sorted([ROOT / "pretrain_gpt.py", *ROOT.glob("tools/**/*.py"), *ROOT.glob("examples/*.py")])
MODULES = sorted(ROOT.glob("megatron_lite/**/*.py"))
SOURCES = DOORS + MODULES

TORCH_FREE = (
    *(f"config.{path.stem}" for path in sorted(ROOT.glob("megatron_lite/config/*.py"))),
    *(f"plan.{path.stem}" for path in sorted(ROOT.glob("megatron_lite/plan/*.py"))),
    *(f"parallel.{name}" for name in ("layout_line", "mesh_shape")),
    *("checkpoint.manifest", "kernels.build", "kernels.host", "kernels.sources"),
    *(f"data.refine.{path.stem}" for path in sorted(ROOT.glob("megatron_lite/data/refine/*.py"))),
    *(f"data.{name}" for name in ("indexed", "order", "documents", "blend", "rules", "tokenizer", "tokenize_corpus")),
    *(f"data.{name}" for name in ("token_sets", "token_set_merge", "token_set_division", "corpus_recipe")),
)

IMPORTER = "tools/import_megatron.py"
"""The one file that reads pickles, and takes nothing but tensors and plain values of them."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """Every module an import statement names, lazy and type-only ones included; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}:{node.lineno} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; what is not a plain name in front is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_there_is_something_to_look_at():
    assert (ROOT / "pretrain_gpt.py") in DOORS
    assert len(DOORS) > 3 and len(MODULES) > 50


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nobody_imports_a_door(path):
    stems = {door.stem for door in DOORS} | {"tools", "tests", "examples"}
    assert not {module for module in imports(path) if module.split(".")[0] in stems}


@pytest.mark.parametrize("path", DOORS, ids=name)
def test_a_door_knows_no_deepspeed(path):
    assert not {module for module in imports(path) if module.split(".")[0] == "deepspeed"}


def test_rooms_that_need_no_torch_work_without_it():
    script = f"""
import importlib, sys
sys.modules["torch"] = sys.modules["deepspeed"] = None
for module in {TORCH_FREE!r}:
    importlib.import_module("megatron_lite." + module)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_environment_is_read_where_ranks_start_and_kernels_are_compiled(path):
    """os.environ and os.getenv belong to two files; elsewhere a default may be set for a library."""
    if name(path) in ("megatron_lite/parallel/launch.py", "megatron_lite/kernels/build.py"):
        return
    writes = [
        node.func.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and dotted(node.func) == "os.environ.setdefault"
    ]
    reads = [
        f"{name(path)}:{node.lineno}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv") and node not in writes
    ]
    assert not reads
    assert not imports(path) & {"os.environ", "os.getenv"}


def pickles(path: Path) -> set[str]:
    """What a file uses that is pickle: it runs what it reads; torch.load, torch.save and the object collectives are."""
    of_torch = re.compile(r"(torch(\.serialization)?\.(load|save)|.*\.\w+_object(_list)?)$")
    names = {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)} | imports(path)
    banned = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    return {used for used in names if of_torch.match(used) or used.split(".")[0] in banned}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_pickled(path):
    assert pickles(path) <= ({"torch.load"} if name(path) == IMPORTER else set())
    allowed = [
        f"{name(path)}:{node.value.lineno}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True)
    ]
    assert not allowed


def test_tests_pickle_what_they_made_themselves():
    """Values handed from one process to another, and files that stand for another project's."""
    makers = {
        *("tests/ranks.py", "tests/tools/test_import_megatron.py", "tests/checkpoint/test_huggingface.py"),
        *("tests/data/test_document_starts.py", "tests/data/test_ordered_workers.py"),
    }
    assert {name(path) for path in ROOT.glob("tests/**/*.py") if pickles(path)} <= makers


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "import torch\ntorch.serialization.load(f)",
        "from torch.distributed import all_gather_object",
        "import torch.distributed as dist\ndist.broadcast_object_list(x)",
        "from joblib import load",
    ],
)
def test_a_pickle_is_seen(text, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert pickles(path)


def test_the_importer_of_pickles_takes_weights_only():
    calls = [n for n in ast.walk(tree(ROOT / IMPORTER)) if isinstance(n, ast.Call) and dotted(n.func) == "torch.load"]
    assert calls
    for call in calls:
        assert [k.value.value for k in call.keywords if k.arg == "weights_only"] == [True]


def test_names_say_what_a_file_holds():
    vague = {"utils", "util", "common", "core", "helpers", "helper", "legacy", "misc"}
    assert not [name(path) for path in SOURCES if vague & set(re.split(r"[/.]", name(path)))]


def test_packages_are_plain():
    folders = {path.parent for path in MODULES}
    inits = {folder / "__init__.py" for folder in folders}
    assert not [name(path) for path in inits if not path.exists()]
    assert not [name(path) for path in inits if path.read_text().strip()]


def test_files_stay_readable():
    looked_at = {*SOURCES, *ROOT.glob("tests/**/*.py"), ROOT / "setup.py"}
    assert ROOT / "tests" / "ranks.py" in looked_at
    long = {name(path): len(path.read_text().splitlines()) for path in looked_at}
    assert not {path: lines for path, lines in long.items() if lines > 500}


def test_no_path_of_a_developers_machine():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    private = re.compile(r"(?<![\w./~-])/(home|root|Users|mnt|opt|work|scratch)/\w")
    found = []
    for file in filter(None, files.split("\0")):
        try:
            lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{file}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if private.search(line)]
    assert not found
