"""What is saved at one layout and loaded at another: the same bits, read no further than needed."""

import json
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_lite.checkpoint.find import find
from megatron_lite.checkpoint.load import load, read_tensor
from megatron_lite.checkpoint.manifest import CHUNK_BYTES, read_manifest
from megatron_lite.checkpoint.piece import DTYPES, Piece
from megatron_lite.checkpoint.save import save
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.layout import replicated, split

RUN = {"layout": "tp=1", "config": {"model": {"num_layers": 2}}, "versions": {"torch": torch.__version__}}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(shape, dtype, seed=0):
    """Any bit pattern, NaNs among them (but a bool is 0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def whole(name, tensor, owned=True):
    return Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, owned)


# A small model: its layouts by tensor rank and size.
def layouts(rank, size):
    return {
        "embedding.weight": split((30, 8), 0, rank, size, padded=32),
        "layers.0.qkv.weight": split((24, 8), 0, rank, size, sections=(8, 8, 8)),
        "layers.0.output.weight": split((8, 8), 1, rank, size),
        "layers.0.key.weight": split((8, 8), 0, rank, size, replicas=max(1, size // 2)),
        "layers.1.up.bias": split((16,), 0, rank, size),
        "norm.weight": replicated((8,), rank),
    }


def zero_pieces(tensors, rank, tensor_size, data_size, fill=True):
    """What ZeRO leaves rank `rank` of a tensor x data mesh: an even cut of all local values, laid end to end."""
    tensor_rank, data_rank = rank % tensor_size, rank // tensor_size
    mine = layouts(tensor_rank, tensor_size)
    total = sum(math.prod(layout.local_shape) for layout in mine.values())
    share = -(-total // data_size)
    flat_master = torch.zeros(share)
    pieces, offset = [], 0
    for name, layout in mine.items():
        length = math.prod(layout.local_shape)
        first = max(0, share * data_rank - offset)
        last = min(length, share * (data_rank + 1) - offset)
        for part in layout.fragments(first, last) if first < last else []:
            at = offset + part.flat_start - share * data_rank
            view = flat_master[at : at + math.prod(part.shape)].view(part.shape)
            piece = Piece(f"weight/{name}", layout.global_shape, part.global_start, view, layout.is_owner)
            if fill:
                view.copy_(tensors[piece.name][piece.rectangle.slices_in(whole("", tensors[piece.name]).rectangle)])
            pieces.append(piece)
        offset += length
    return pieces


@pytest.fixture(scope="module")
def model():
    shapes = {f"weight/{name}": layout.global_shape for name, layout in layouts(0, 1).items()}
    return {name: random_bits(shape, torch.float32, seed) for seed, (name, shape) in enumerate(shapes.items())}


def test_zero_at_any_layout_loads_at_any_other(as_ranks, model, tmp_path, no_fsync):
    meshes = [(tensor, data) for tensor in (1, 2, 4) for data in (1, 2, 3)]

    def save_at(ranks, mesh):
        root = tmp_path / f"tp{mesh[0]}-dp{mesh[1]}"
        return save(root, 5, zero_pieces(model, ranks.global_rank, *mesh), {"cursor": 9}, ranks, **RUN)

    def load_at(ranks, mesh, folder):
        pieces = zero_pieces(model, ranks.global_rank, *mesh, fill=False)
        assert load(folder, pieces, ranks) == {"cursor": 9}
        return pieces

    for mesh in meshes:
        folders = as_ranks(save_at, math.prod(mesh), mesh)
        assert len(set(folders)) == 1
        stored = sum(box.rectangle.size for t in read_manifest(folders[0]).tensors.values() for box in t.boxes)
        assert stored == sum(tensor.numel() for tensor in model.values())
        for other in meshes:
            for pieces in as_ranks(load_at, math.prod(other), other, folders[0]):
                for piece in pieces:
                    held = model[piece.name][piece.rectangle.slices_in(whole("", model[piece.name]).rectangle)]
                    assert torch.equal(bits(piece.tensor), bits(held)), (mesh, other, piece.name)


@st.composite
def cuts(draw, shape, ranks):
    """A random tiling of `shape`, each rectangle with the rank that owns it."""

    def divide(start, shape, depth):
        wide = [dim for dim, length in enumerate(shape) if length > 1]
        if not wide or not depth or not draw(st.booleans()):
            return [(start, shape, draw(st.integers(0, ranks - 1)))]
        dim = draw(st.sampled_from(wide))
        at = draw(st.integers(1, shape[dim] - 1))
        low = divide(start, (*shape[:dim], at, *shape[dim + 1 :]), depth - 1)
        beyond = (*start[:dim], start[dim] + at, *start[dim + 1 :])
        return low + divide(beyond, (*shape[:dim], shape[dim] - at, *shape[dim + 1 :]), depth - 1)

    return divide((0,) * len(shape), shape, 4)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tiling_loads_into_any_other(data, as_ranks, tmp_path_factory, no_fsync, monkeypatch):
    """Also when boxes span several chunks: here of 64 bytes."""
    monkeypatch.setattr("megatron_lite.checkpoint.manifest.CHUNK_BYTES", 64)
    monkeypatch.setattr("megatron_lite.checkpoint.shard.CHUNK_BYTES", 64)
    shape = data.draw(st.sampled_from([(), (1,), (67,), (13, 11), (5, 4, 7)]))
    dtype = data.draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    tensor = random_bits(shape, dtype, seed=len(shape))
    stored, wanted = data.draw(cuts(shape, 3)), data.draw(cuts(shape, 2))
    root = tmp_path_factory.mktemp("tiling")

    def pieces(source, tiling, rank=None):
        for start, extent, owner in tiling:
            if rank in (owner, None):
                view = source[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]
                yield Piece("weight/t", shape, start, view, owned=True)

    def save_part(ranks):
        return save(root, 1, list(pieces(tensor, stored, ranks.global_rank)), {}, ranks, **RUN)

    def load_part(ranks, target):
        return load(root / "step-00000001", list(pieces(target, wanted, ranks.global_rank)), ranks)

    assert as_ranks(save_part, 3) == [root / "step-00000001"] * 3
    target = torch.zeros_like(tensor)
    assert as_ranks(load_part, 2, target) == [{}, {}]
    assert torch.equal(bits(target), bits(tensor))
    assert torch.equal(bits(read_tensor(root / "step-00000001", "weight/t")), bits(tensor))


def test_safetensors_reads_what_is_written(as_ranks, tmp_path, no_fsync):
    tensors = {f"weight/{name}": random_bits((6, 4), dtype, 3) for name, dtype in DTYPES.items()}
    state = {"lr": 0.1, "none": None, "deep": [1, {"a": "ä"}]}

    def save_half(ranks):
        rows = slice(3 * ranks.global_rank, 3 * ranks.global_rank + 3)
        pieces = [Piece(name, (6, 4), (rows.start, 0), t[rows], True) for name, t in tensors.items()]
        if ranks.global_rank == 1:
            pieces.append(whole("weight/scalar", torch.tensor(2.5)))
        return save(tmp_path, 3, pieces, state, ranks, **RUN)

    folder = as_ranks(save_half, 2)[0]
    for rank in (0, 1):
        stored = load_file(folder / f"rank-{rank:05d}.safetensors")
        for name, tensor in tensors.items():
            half = stored[f"{name}[{3 * rank}:{3 * rank + 3},0:4]"]
            assert half.dtype == tensor.dtype
            assert torch.equal(bits(half), bits(tensor[3 * rank : 3 * rank + 3]))
    assert stored["weight/scalar"] == 2.5
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.state, manifest.layout) == (3, state, "tp=1")
    assert json.loads((folder / "manifest.json").read_text())["config"] == RUN["config"]


def test_only_the_chunks_a_rank_needs_are_read(one_rank, tmp_path, no_fsync, monkeypatch):
    rows, columns = 64, CHUNK_BYTES // 32
    tensor = random_bits((rows, columns), torch.float32)
    folder = save(tmp_path, 1, [whole("weight/big", tensor)], {}, one_rank, **RUN)
    read = []
    preadv = os.preadv
    monkeypatch.setattr("os.preadv", lambda fd, buffers, at: read.append(at) or preadv(fd, buffers, at))
    target = torch.zeros(3, columns)
    load(folder, [Piece("weight/big", (rows, columns), (20, 0), target, owned=False)], one_rank)
    assert torch.equal(bits(target), bits(tensor[20:23]))
    header = read_manifest(folder).files["rank-00000.safetensors"].header_size
    # Eight rows a chunk: rows 20 to 22 lie in the third.
    first, *others = read
    assert first == 0 and others[0] == header + 2 * CHUNK_BYTES and others[-1] < header + 3 * CHUNK_BYTES


def test_weights_alone(one_rank, tmp_path, no_fsync):
    stored = {name: torch.full((4,), 7.0) for name in ("weight/w", "exp_avg/w", "exp_avg_sq/w")}
    folder = save(tmp_path, 1, [whole(n, t) for n, t in stored.items()], {"step": 1}, one_rank, **RUN)
    weight, slot = torch.zeros(4), torch.zeros(4)
    load(folder, [whole("weight/w", weight), whole("exp_avg/w", slot)], one_rank, only="weight/")
    assert (weight == 7).all() and (slot == 0).all()
    bare = save(tmp_path, 2, [whole("weight/w", weight)], {}, one_rank, **RUN)
    with pytest.raises(CheckpointError, match=r"1 tensors of this model are not in it \(exp_avg/w\).*--no-load-optim"):
        load(bare, [whole("weight/w", weight), whole("exp_avg/w", slot)], one_rank)
    with pytest.raises(CheckpointError, match="holds no tensor 'exp_avg/w'; it holds weight/w"):
        read_tensor(bare, "exp_avg/w")


def layered(count, width=4, dtype=torch.float32):
    return [whole(f"weight/layers.{i}.w", torch.ones(width, dtype=dtype)) for i in range(count)]


@pytest.mark.parametrize(
    ("held", "wanted", "message"),
    [
        (layered(24), layered(12), "the checkpoint holds 24 layers, this model 12; 12 of its tensors are not in this"),
        (
            layered(2),
            layered(3),
            r"holds 2 layers, this model 3; 1 tensors of this model are not in it \(weight/layers.2",
        ),
        (layered(2), layered(2, 8), r"2 tensors differ \(weight/layers.0.w is F32 \[4\] there and F32 \[8\] here"),
        (layered(1), layered(1, dtype=torch.bfloat16), r"F32 \[4\] there and BF16 \[4\] here"),
    ],
)
def test_another_model_is_refused_on_every_rank(held, wanted, message, as_ranks, one_rank, tmp_path, no_fsync):
    folder = save(tmp_path, 1, held, {}, one_rank, **RUN)
    # Each rank wants a part, as on a pipeline: only together do they show what is missing or left over.
    outcomes = as_ranks(lambda ranks: load(folder, wanted[ranks.global_rank :: 2], ranks), 2)
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes), outcomes
    assert str(outcomes[0]) == str(outcomes[1])
    with pytest.raises(CheckpointError, match=message):
        raise outcomes[0]


def test_stages_load_their_own_parts(as_ranks, one_rank, tmp_path, no_fsync):
    folder = save(tmp_path, 1, layered(4), {"a": 1}, one_rank, **RUN)
    stages = [[whole(p.name, torch.zeros(4)) for p in layered(4)[i::2]] for i in range(2)]
    assert as_ranks(lambda ranks: load(folder, stages[ranks.global_rank], ranks), 2) == [{"a": 1}] * 2
    assert all((piece.tensor == 1).all() for stage in stages for piece in stage)


def test_a_piece_must_lie_in_its_tensor():
    for start, shape in (((3,), (2,)), ((-1,), (2,)), ((0, 0), (2,))):
        with pytest.raises(ValueError):
            Piece("weight/w", (4,), start, torch.zeros(shape), owned=True)
    with pytest.raises(ValueError, match="complex64"):
        Piece("weight/w", (4,), (0,), torch.zeros(4, dtype=torch.complex64), owned=True)


def test_a_folder_of_one_checkpoint_can_be_named_itself(one_rank, tmp_path, no_fsync):
    folder = save(tmp_path, 4, layered(1), {}, one_rank, **RUN)
    assert find(folder, one_rank) == folder
    assert find(folder, one_rank, step=4) == folder
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 5; it holds 4"):
        find(folder, one_rank, step=5)
