"""Hugging Face folders read and written: names, bytes, memory, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from huggingface_folders import MAKERS, POSITIONS, VOCABULARY, assert_bitwise, save_folder, stored
from hypothesis import given
from hypothesis import strategies as st
from transformers_models import serial

from megatron_lite.checkpoint import huggingface, huggingface_names
from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.foreign import fill, fill_pieces, pieces_to_come
from megatron_lite.checkpoint.huggingface import INDEX, WEIGHTS, HuggingFaceFolder, load_weights
from megatron_lite.checkpoint.huggingface_export import export_weights
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.save import save
from megatron_lite.checkpoint.tensor_file import TensorFile, encode_header
from megatron_lite.errors import CheckpointError
from megatron_lite.plan.parameters import parameter_shapes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save_folder(name, root / name.replace(" ", "")) for name in MAKERS}


@pytest.mark.parametrize("name", MAKERS)
def test_every_parameter_is_linked_and_every_value_arrives(name, folders):
    from transformers import AutoModelForCausalLM

    reference = serial(AutoModelForCausalLM.from_pretrained(folders[name]))
    with HuggingFaceFolder(folders[name]) as folder:
        shapes = parameter_shapes(folder.described.model, vocab_size=VOCABULARY, seq_length=POSITIONS)
        assert folder.shapes == {shape.name: shape.shape for shape in shapes}
        for key, parts in folder.links.items():
            whole = torch.empty(folder.shapes[key], dtype=torch.bfloat16)
            fill(folder, parts, Rectangle((0,) * whole.dim(), tuple(whole.shape)), whole)
            assert torch.equal(whole, reference[key]), key
            # A rectangle that begins and ends inside parts, in a dtype that holds all values.
            start = tuple(length // 3 for length in whole.shape)
            shape = tuple(length - length // 2 for length in whole.shape)
            part = torch.empty(shape, dtype=torch.float32)
            fill(folder, parts, Rectangle(start, shape), part)
            slices = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
            assert torch.equal(part, reference[key][slices].float()), key


@pytest.mark.parametrize("name", MAKERS)
def test_the_way_there_and_back_changes_no_bit(name, folders, tmp_path, one_rank, no_fsync):
    with HuggingFaceFolder(folders[name]) as folder:
        described = folder.described
        save(
            tmp_path / "run",
            0,
            pieces_to_come(folder, folder.links),
            {},
            one_rank,
            layout="tp=1",
            config={},
            versions={},
        )
    checkpoint = tmp_path / "run" / "step-00000000"
    links = huggingface_names.links(described.model, described.family, vocab_size=VOCABULARY, positions=POSITIONS)
    for limit, several in ((10**9, False), (8000, True)):
        there = tmp_path / str(limit)
        there.mkdir()
        export_weights(checkpoint, read_manifest(checkpoint), links, there, max_file_bytes=limit)
        assert_bitwise(stored(there), stored(folders[name]))
        assert (there / INDEX).exists() == several and (there / WEIGHTS).exists() != several
        largest = max(file.stat().st_size for file in there.glob("*.safetensors"))
        assert not several or largest < 8000 + 4096
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    export_weights(checkpoint, read_manifest(checkpoint), links, rounded, dtype=torch.float16, max_file_bytes=10**9)
    assert_bitwise(stored(rounded), {key: tensor.half() for key, tensor in stored(folders[name]).items()})


def test_names_without_prefix_and_constants_of_old_are_read(folders, tmp_path):
    from safetensors.torch import save_file

    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored(folders["gpt2"]).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    tmp_path.joinpath("config.json").write_bytes((folders["gpt2"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / WEIGHTS)
    with HuggingFaceFolder(tmp_path) as folder:
        (part,) = folder.links["embedding.word.weight"]
        assert part.theirs == "wte.weight"


def test_a_tied_head_that_was_trained_apart_is_not_dropped(folders, tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(huggingface, "_COMPARED_NUMBERS", 100)
    (tmp_path / "config.json").write_bytes((folders["gpt2"] / "config.json").read_bytes())
    tensors = dict(stored(folders["gpt2"]))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for change, refused in ((0.0, False), (1.0, True)):
        tensors["lm_head.weight"][-1, -1] += change
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
        with HuggingFaceFolder(tmp_path) as folder:
            if not refused:
                folder.insist_on_tied_head()
                continue
            with pytest.raises(CheckpointError, match=r'lm_head.weight that differs .*"tie_word_embeddings": false'):
                folder.insist_on_tied_head()
    # What the error says to do gives both weights, as transformers has them.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, tensors["lm_head.weight"])
    content = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with HuggingFaceFolder(tmp_path) as folder:
        folder.insist_on_tied_head()
        (part,) = folder.links["head.weight"]
        assert part.theirs == "lm_head.weight"


def test_a_rank_reads_what_it_needs(tmp_path, monkeypatch):
    """Rows, and columns that are wide enough: no more than their bytes; and a few at most for narrow ones."""
    rows, columns, item = 64, 8192, 4
    values = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    raw = encode_header({"a": ("F32", (rows, columns))}, {}) + values.numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(raw)
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(n := preadv(*arguments)) or n)
    with TensorFile(tmp_path / "a.safetensors") as file:
        for rectangle in (Rectangle((16, 0), (16, columns)), Rectangle((0, 4096), (rows, 2048))):
            read.clear()
            into = torch.empty(rectangle.shape)
            file.read("a", rectangle, into)
            assert torch.equal(into, values[tuple(slice(a, a + n) for a, n in zip(*rectangle, strict=True))])
            assert sum(read) == rectangle.size * item


def test_pieces_that_fit_nothing_are_named(folders, one_rank):
    with HuggingFaceFolder(folders["llama"]) as folder:
        odd = Piece("weight/embedding.word.weight", (7, 32), (0, 0), torch.empty(7, 32), True)
        with pytest.raises(CheckpointError, match=r"embedding.word.weight is \[103, 32\] there and \[7, 32\] here"):
            load_weights(folder, [odd], one_rank)
        with pytest.raises(CheckpointError, match="nonsense is not there"):
            fill_pieces(folder, folder.links, [Piece("weight/nonsense", (7,), (0,), torch.empty(7), True)])


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders["llama"], tmp_path / "copy")


def _refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        HuggingFaceFolder(folder)


def _index(folder, **changes):
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(content | changes))
    return content["weight_map"]


def test_a_folder_without_safetensors_says_why(copy):
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    _refused(copy, "holds neither model.safetensors nor")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    _refused(copy, "pickles and are not read; convert them where they are trusted")


@pytest.mark.parametrize(
    "file",
    ["../else.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".x.safetensors", "model.bin", "x\0.safetensors"],
)
def test_an_index_names_plain_files(copy, file):
    _index(copy, weight_map={"a": file})
    _refused(copy, "is no plain name of a safetensors file")


def test_an_index_agrees_with_its_files(copy):
    weight_map = _index(copy)
    name = "model.norm.weight"
    assert list(weight_map.values()).count(weight_map[name]) > 1
    _index(copy, weight_map={key: file for key, file in weight_map.items() if key != name})
    _refused(copy, "differ on where")
    _index(copy, weight_map=[])
    _refused(copy, "has no weight_map")


def test_links_lead_nowhere_else(copy, tmp_path):
    file = next(iter(copy.glob("*.safetensors")))
    shutil.move(file, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    _refused(copy, "is a link out of its folder")
    # The cache of the hub keeps the files of a snapshot as links to blobs beside it.
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(copy, snapshot, symlinks=True)
    blob = tmp_path / "models--x" / "blobs" / "1234"
    blob.parent.mkdir()
    shutil.copy(tmp_path / "outside", blob)
    (snapshot / file.name).unlink()
    (snapshot / file.name).symlink_to(blob)
    HuggingFaceFolder(snapshot).close()
    os.mkfifo(blob.with_name("pipe"))
    (snapshot / file.name).unlink()
    (snapshot / file.name).symlink_to(blob.with_name("pipe"))
    _refused(snapshot, "cannot be read: not a regular file")


def test_tensors_are_those_of_the_configuration(copy):
    content = json.loads((copy / "config.json").read_text())
    for changes, match in (
        ({"num_hidden_layers": 3}, "9 tensors are missing"),
        ({"num_hidden_layers": 1}, "9 tensors belong to no part of this model"),
        ({"intermediate_size": 64}, r"gate_proj.weight is \[48, 32\]"),
        ({"vocab_size": 104}, "another shape than its configuration says"),
    ):
        (copy / "config.json").write_text(json.dumps(content | changes))
        _refused(copy, match)


def test_a_damaged_file_is_named(copy):
    file = sorted(copy.glob("*.safetensors"))[0]
    raw = file.read_bytes()
    for damaged, match in (
        (raw[:-1], "tensors end at byte"),
        (raw + b"\0", "tensors end at byte"),
        (raw[:100], "not a safetensors file, or is cut off"),
        (b"", "begin with a header length of 0"),
        (struct.pack("<Q", 2**63) + raw[8:], "header length"),
        (raw.replace(b"BF16", b"BF17", 1), "has the dtype 'BF17'"),
    ):
        file.write_bytes(damaged)
        _refused(copy, match)


def _header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "has 8 bytes by its shape"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, r"has shape \[-1\]"),
        ({"a": {"dtype": "F32", "shape": [2**60, 2**60], "data_offsets": [0, 8]}}, "has shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "has shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "begins at byte"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
          "b": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, "b begins at byte"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "has the dtype"),
        ({"a": [1]}, "has no dtype, shape and data_offsets"),
        ({"a\n": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, "is no name for a tensor"),
        ([], "not a JSON object"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(entries, match, tmp_path):
    (tmp_path / "x").write_bytes(_header(entries) + bytes(8))
    with pytest.raises(CheckpointError, match=match):
        TensorFile(tmp_path / "x")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "x"


_RAW = encode_header({"a": ("BF16", (3, 4)), "b": ("F32", (5,))}, {"format": "pt"}) + bytes(range(44))


@given(st.data())
def test_any_bytes_are_valid_or_refused(scratch, data):
    raw = bytearray(_RAW)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    scratch.write_bytes(raw)
    try:
        with TensorFile(scratch) as file:
            for name, tensor in file.tensors.items():
                if len(tensor.shape) in (1, 2):
                    whole = torch.empty(tensor.shape)
                    file.read(name, Rectangle((0,) * len(tensor.shape), tensor.shape), whole)
    except CheckpointError:
        pass
