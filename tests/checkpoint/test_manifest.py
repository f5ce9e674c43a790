"""What the manifest reader lets in: nothing that is not exactly right."""

import copy
import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint import manifest
from megatron_lite.checkpoint.manifest import config_differences, encode, merged_tensors, parse, read_manifest
from megatron_lite.errors import CheckpointError

FILES = {
    "rank-00000.safetensors": {"size": 8 + 32, "header_size": 8, "header_crc32": 1},
    "rank-00001.safetensors": {"size": 8 + 16 + 308, "header_size": 8, "header_crc32": 2},
}
TENSORS = {
    "weight/a": {
        "dtype": "F32",
        "shape": [4, 2],
        "boxes": [
            {"start": [0, 0], "shape": [2, 2], "file": "rank-00000.safetensors", "bytes": [8, 24], "crc32": [5]},
            {"start": [2, 0], "shape": [2, 2], "file": "rank-00001.safetensors", "bytes": [8, 24], "crc32": [6]},
        ],
    },
    "weight/b": {
        "dtype": "F64",
        "shape": [2],
        "boxes": [{"start": [0], "shape": [2], "file": "rank-00000.safetensors", "bytes": [24, 40], "crc32": [7]}],
    },
    # 300 codes in two blocks, each with an fp32 absmax.
    "exp_avg/c": {
        "dtype": "Q8S256",
        "shape": [300],
        "boxes": [{"start": [0], "shape": [300], "file": "rank-00001.safetensors", "bytes": [24, 332], "crc32": [8]}],
    },
}


def content():
    raw = encode(7, "tp=2", {"model": {"sizes": (1, 2)}}, {"torch": "2"}, {"lr": 0.1}, FILES, TENSORS)
    return json.loads(raw)


def signed(fields, last="sha256"):
    """`fields` as a manifest whose own hash is right, however wrong the rest."""
    body = json.dumps({key: value for key, value in fields.items() if key != last})[:-1].encode() + b","
    return body + b'\n"sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def test_round_trip():
    manifest = parse(signed(content()), "m")
    assert (manifest.step, manifest.layout, manifest.state) == (7, "tp=2", {"lr": 0.1})
    assert manifest.config == {"model": {"sizes": [1, 2]}}
    assert manifest.tensors["weight/a"].boxes[1].rectangle == ((2, 0), (2, 2))
    assert manifest.tensors["weight/b"].boxes[0].first_byte == 24


BOX = ("tensors", "weight/a", "boxes", 0)
REFUSED = [
    (("format",), "zip", "format is 'zip'"),
    (("format_version",), 2, "format_version is 2, and this code reads up to 1"),
    (("format_version",), True, "format_version is True"),
    (("step",), -1, "step is -1"),
    (("step",), 2**70, "step is 1180591620717411303424"),
    (("layout",), "a\nb", "layout is"),
    (("config",), {"model": 1}, "config_sha256 does not match"),
    (("versions",), {"torch": 2}, "versions.torch is 2"),
    (("state",), [], "state is []"),
    (("chunk_bytes",), 2**40, "chunk_bytes is"),
    (("chunk_bytes",), 12, "not a multiple of 8"),
    (("files", "../rank-00000.safetensors"), FILES["rank-00000.safetensors"], "not a name of the form"),
    (("files", "/etc/passwd"), FILES["rank-00000.safetensors"], "not a name of the form"),
    (("files", "rank-00000.safetensors", "size"), 48, "its boxes end at byte 40"),
    (("files", "rank-00000.safetensors", "header_size"), 0, "header_size is 0"),
    (("files", "rank-00000.safetensors", "header_size"), 16, "begin at byte 8"),
    (("files", "rank-00000.safetensors"), {"size": 2**40, "header_size": 2**39, "header_crc32": 1}, "to 100000000"),
    (("files", "rank-00000.safetensors", "mode"), 7, "unknown ones ['mode']"),
    (("tensors", "weight/a", "dtype"), "O", "dtype is 'O'"),
    (("tensors", "weight/a", "dtype"), ["F32"], "dtype is ['F32']"),
    (("tensors", "weight/a", "dtype"), "BF16", "is [8, 24], not a range of 8 bytes"),
    (("tensors", "exp_avg/c", "dtype"), "U8", "is [24, 332], not a range of 300 bytes"),
    (("tensors", "exp_avg/c", "boxes", 0, "bytes"), [24, 324], "not a range of 308 bytes"),
    (("tensors", "weight/a", "shape"), [4, 3], "element [0, 2] lies in no box"),
    (("tensors", "weight/a", "shape"), [4, 0], "shape is 0"),
    (("tensors", "weight/a", "shape"), [2**40, 2**40], "elements"),
    (("tensors", "weight/a", "shape"), [1] * 9, "at most 5"),
    ((*BOX, "start"), [-1, 0], "start is -1"),
    ((*BOX, "start"), [1, 0], "element [0, 0] lies in no box"),
    ((*BOX, "start"), [2, 0], "element [0, 0] lies in no box"),
    ((*BOX, "start"), [3, 0], "boxes[0].start is [3, 0] with shape [2, 2]: not inside a tensor of shape [4, 2]"),
    ((*BOX, "start"), [0], "not inside a tensor"),
    ((*BOX, "shape"), [2, 2.0], "is 2.0, not a whole number"),
    ((*BOX, "file"), "rank-00002.safetensors", "which files does not list"),
    ((*BOX, "file"), "../../x", "which files does not list"),
    ((*BOX, "bytes"), [-8, 8], "bytes is -8"),
    ((*BOX, "bytes"), [16, 32], "begin at byte 16 of rank-00000.safetensors, where byte 8 is the next"),
    ((*BOX, "bytes"), [24, 40], "where byte 8 is the next"),
    ((*BOX, "crc32"), [], "has 0 entries for 16 bytes"),
    ((*BOX, "crc32"), [2**32], "crc32 is 4294967296"),
    (("tensors", ""), TENSORS["weight/b"], "a name in tensors is ''"),
    (("surprise",), 1, "unknown ones ['surprise']"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[str(case[:2])[:70] for case in REFUSED])
def test_refused(path, value, message):
    fields = content()
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(CheckpointError) as caught:
        parse(signed(fields), "some/manifest.json")
    assert str(caught.value).startswith("some/manifest.json: ")
    assert message in str(caught.value)


def test_every_missing_field_is_named():
    def lacking(inner, trail):
        for key in list(inner):
            kept = inner.pop(key)
            with pytest.raises(CheckpointError, match=key):
                parse(signed(fields), "m")
            inner[key] = kept
            if isinstance(kept, dict) and key not in ("config", "versions", "state", "files", "tensors"):
                lacking(kept, (*trail, key))

    fields = content()
    fields.pop("sha256")
    lacking(fields, ())
    lacking(fields["files"]["rank-00001.safetensors"], ())
    lacking(fields["tensors"]["weight/b"], ())
    lacking(fields["tensors"]["weight/b"]["boxes"][0], ())


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"\xff" * 200, signed(content())[:-1], signed({"format": 1}), b"[" * 100_000],
    ids=["empty", "bare", "binary", "cut", "wrong", "deep"],
)
def test_not_a_manifest(raw):
    with pytest.raises(CheckpointError, match="some/file"):
        parse(raw, "some/file")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_numbers_that_json_does_not_have(number):
    body = signed(content()).replace(b"0.1", number.encode()).split(b'\n"sha256"')[0]
    with pytest.raises(CheckpointError, match="not JSON"):
        parse(body + b'\n"sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode(), "m")


def test_a_manifest_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 1000)
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="exceeds 1000 bytes"):
        read_manifest(tmp_path)


def test_deep_nesting_is_an_error_not_a_crash():
    body = signed(content()).replace(b"0.1", b"[" * 50_000 + b"]" * 50_000).split(b'\n"sha256"')[0]
    with pytest.raises(CheckpointError):
        parse(body + b'\n"sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode(), "m")


@given(st.data())
@settings(max_examples=200)
def test_any_flipped_bit_is_seen(data):
    raw = bytearray(signed(content()))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CheckpointError):
        parse(bytes(raw), "m")


leaves = st.one_of(st.none(), st.booleans(), st.integers(-5, 2**80), st.floats(), st.text(max_size=5), st.just("F32"))
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2))


@given(st.data())
@settings(max_examples=300)
def test_any_value_anywhere_is_an_error_or_valid(data):
    fields = copy.deepcopy(content())
    inner, key = fields, "format"
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            break
        holder, key = inner, data.draw(st.sampled_from(keys))
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or data.draw(st.booleans()):
            break
    holder[key] = data.draw(values)
    try:
        parse(signed(fields), "m")
    except CheckpointError as error:
        assert str(error).startswith("m: ")


def test_state_must_be_plain_json():
    for state in ({"best": float("inf")}, {"x": object()}, {"x": b"raw"}):
        with pytest.raises(CheckpointError, match="plain JSON"):
            encode(1, "tp=1", {}, {}, state, {}, {})


def test_ranks_that_differ_on_a_tensor():
    other = {"weight/b": {"dtype": "F32", "shape": [2], "boxes": []}}
    with pytest.raises(CheckpointError, match="ranks differ on weight/b"):
        merged_tensors([TENSORS, other])


def test_a_link_or_pipe_is_not_read(tmp_path):
    (tmp_path / "real").write_bytes(signed(content()))
    (tmp_path / "manifest.json").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_manifest(tmp_path)


def test_config_differences():
    stored = {"model": {"num_layers": 12, "hidden_size": 64}, "seed": 1}
    current = {"model": {"num_layers": 24, "hidden_size": 64}, "seed": 1, "lr": 0.1}
    assert config_differences(stored, current) == {"model.num_layers": (12, 24), "lr": (None, 0.1)}
    assert config_differences(stored, stored) == {}


def test_needs_no_torch():
    code = (
        "import sys; import megatron_lite.checkpoint.manifest, megatron_lite.checkpoint.store; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
