"""8-bit codes in a checkpoint: the same at the same cut, the nearest at another, fp32 and back, never damaged."""

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_lite.checkpoint import arrival, manifest, shard
from megatron_lite.checkpoint.arrival import shared_blocks
from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.find import verify
from megatron_lite.checkpoint.load import load, read_tensor
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.piece import Piece
from megatron_lite.checkpoint.save import save
from megatron_lite.errors import CheckpointError
from megatron_lite.kernels.code_maps import SIGNED, UNSIGNED
from megatron_lite.kernels.quantize_blockwise import dequantize_blockwise, keep_above_zero, quantize_blockwise

RUN = {"layout": "tp=1", "config": {}, "versions": {}}
SHAPE = (12, 320)
KINDS = {"exp_avg": True, "exp_avg_sq": False}


def numbers(signed, seed=0):
    """Values over many decades; no second moment is below 0."""
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) ** 5
    return drawn if signed else drawn**2


def coded(name, rectangle, values, owned=True, keep=True):
    signed = KINDS[name.split("/")[0]]
    codes, absmax = quantize_blockwise(values, signed=signed)
    return Piece(
        name,
        SHAPE,
        rectangle.start,
        codes,
        owned,
        absmax=absmax,
        signed=signed,
        keeps_above_zero=keep and not signed,
    )


def decoded(piece):
    return dequantize_blockwise(piece.tensor, piece.absmax, signed=piece.signed)


def rows_cut(*ends):
    """Whole rows from one end to the next."""
    return [Rectangle((a, 0), (b - a, SHAPE[1])) for a, b in itertools.pairwise((0, *ends, SHAPE[0]))]


def columns_cut(*ends):
    return [Rectangle((0, a), (SHAPE[0], b - a)) for a, b in itertools.pairwise((0, *ends, SHAPE[1]))]


CUTS = {
    "whole": rows_cut(),
    "rows": rows_cut(3, 7),
    "four rows": rows_cut(4, 8),
    "columns": columns_cut(256),
    "odd columns": columns_cut(97, 256, 257),
    "in a row": [
        Rectangle((0, 0), (5, 320)),
        Rectangle((5, 0), (1, 256)),
        Rectangle((5, 256), (1, 64)),
        Rectangle((6, 0), (6, 320)),
    ],
}


def pieces_of(cut, values_of):
    return [
        coded(f"{kind}/w", rectangle, values_of[kind][rectangle.slices_in(Rectangle((0, 0), SHAPE))])
        for kind in KINDS
        for rectangle in CUTS[cut]
    ]


@pytest.fixture
def small_chunks(monkeypatch):
    """Boxes of a few chunks, whose absmax end in the middle of one."""
    for module in (manifest, shard):
        monkeypatch.setattr(module, "CHUNK_BYTES", 80)


@st.composite
def rectangles(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    found = []
    for _ in range(2):
        starts = [draw(st.integers(0, length - 1)) for length in shape]
        found.append(
            Rectangle(
                tuple(starts), tuple(draw(st.integers(1, length - a)) for a, length in zip(starts, shape, strict=True))
            )
        )
    return found


@settings(max_examples=300)
@given(rectangles())
def test_shared_blocks_are_those_of_the_same_elements_in_the_same_order(pair):
    def blocks_of(rectangle):
        places = list(itertools.product(*(range(a, a + n) for a, n in zip(*rectangle, strict=True))))
        return [places[i : i + 4] for i in range(0, len(places), 4)]

    piece, box = pair
    with mock.patch.object(arrival, "BLOCK", 4):
        here, there = shared_blocks(piece, box)
    ours, theirs = blocks_of(piece), blocks_of(box)
    assert list(zip(here.tolist(), there.tolist(), strict=True)) == [
        (i, theirs.index(block)) for i, block in enumerate(ours) if block in theirs
    ]


@pytest.mark.parametrize(("before", "after"), itertools.product(CUTS, CUTS))
def test_any_cut_loads_at_any_other(before, after, one_rank, tmp_path, no_fsync, small_chunks):
    saved = pieces_of(before, {kind: numbers(signed) for kind, signed in KINDS.items()})
    folder = save(tmp_path, 1, saved, {}, one_rank, **RUN)
    stored = {kind: torch.full(SHAPE, math.nan) for kind in KINDS}
    for piece in saved:
        where = piece.rectangle.slices_in(Rectangle((0, 0), SHAPE))
        stored[piece.name.split("/")[0]][where] = decoded(piece)
    for kind in KINDS:
        assert torch.equal(read_tensor(folder, f"{kind}/w"), stored[kind])
    wanted = pieces_of(after, {kind: torch.ones(SHAPE) for kind in KINDS})
    load(folder, wanted, one_rank)
    for piece in wanted:
        values = stored[piece.name.split("/")[0]][piece.rectangle.slices_in(Rectangle((0, 0), SHAPE))]
        codes, absmax = quantize_blockwise(values, signed=piece.signed)
        codes = codes if piece.signed else keep_above_zero(codes, values)
        codes = codes.flatten()
        for box in saved:
            if box.name == piece.name:
                for here, there in zip(*shared_blocks(piece.rectangle, box.rectangle), strict=True):
                    codes[256 * here : 256 * here + 256] = box.tensor.flatten()[256 * there : 256 * there + 256]
                    absmax[here] = box.absmax[there]
        assert torch.equal(piece.tensor.flatten(), codes) and torch.equal(piece.absmax, absmax)
        assert_near(piece, values)
    # A rank that wants the end of a box alone needs what stands at its beginning.
    last = wanted[-1]
    alone = coded(last.name, last.rectangle, torch.ones(last.rectangle.shape))
    load(folder, [alone], one_rank, only="exp_avg_sq/")
    assert torch.equal(alone.tensor, last.tensor) and torch.equal(alone.absmax, last.absmax)
    if before == after:
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(saved, wanted, strict=True))


def test_nearest_codes_stay_the_nearest_when_they_are_made_anew(one_rank, tmp_path, no_fsync):
    values = numbers(False)
    folder = save(tmp_path, 1, [coded("exp_avg_sq/w", CUTS["whole"][0], values)], {}, one_rank, **RUN)
    stored = read_tensor(folder, "exp_avg_sq/w")
    for keep in (False, True):
        rectangle = CUTS["odd columns"][0]
        piece = coded("exp_avg_sq/w", rectangle, torch.ones(rectangle.shape), keep=keep)
        load(folder, [piece], one_rank)
        here = stored[rectangle.slices_in(Rectangle((0, 0), SHAPE))]
        nearest, _ = quantize_blockwise(here, signed=False)
        assert ((nearest == 0) & (here > 0)).any()
        assert torch.equal(piece.tensor, keep_above_zero(nearest, here) if keep else nearest)


def assert_near(piece, values):
    """At most half the distance of two codes from `values`; the smallest code above 0 stands for all down to 0."""
    absmax = piece.absmax.repeat_interleave(256)[: values.numel()].view(values.shape).double()
    share = values.double() / absmax
    map = torch.tensor(SIGNED if piece.signed else UNSIGNED, dtype=torch.float64)
    above = torch.searchsorted(map, share).clamp(1, 255)
    half_gap = (map[above] - map[above - 1]) / 2
    bound = torch.where(share < map[0], map[0] - share, half_gap)
    if not piece.signed:
        bound = torch.where((share > 0) & (share < map[1]), map[1] - share, bound)
    assert ((map[piece.tensor.int()] - share).abs() <= bound * (1 + 1e-6) + 1e-12).all()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), after=st.sampled_from(sorted(CUTS)))
def test_fp32_becomes_codes_and_codes_fp32(seed, after, one_rank, tmp_path_factory, no_fsync, small_chunks):
    values = {f"{kind}/w": numbers(signed, seed) for kind, signed in KINDS.items()}
    plain = [Piece(name, SHAPE, (0, 0), tensor, True) for name, tensor in values.items()]
    folder = save(tmp_path_factory.mktemp("plain"), 1, plain, {}, one_rank, **RUN)
    wanted = pieces_of(after, {kind: torch.ones(SHAPE) for kind in KINDS})
    load(folder, wanted, one_rank)
    for piece in wanted:
        held = values[piece.name][piece.rectangle.slices_in(Rectangle((0, 0), SHAPE))]
        codes, absmax = quantize_blockwise(held, signed=piece.signed)
        assert torch.equal(piece.tensor, codes if piece.signed else keep_above_zero(codes, held))
        assert torch.equal(piece.absmax, absmax)
    folder = save(tmp_path_factory.mktemp("codes"), 1, wanted, {}, one_rank, **RUN)
    back = [Piece(name, SHAPE, (0, 0), torch.empty(SHAPE), True) for name in values]
    load(folder, back, one_rank)
    for piece in wanted:
        (whole,) = (other for other in back if other.name == piece.name)
        assert torch.equal(whole.tensor[piece.rectangle.slices_in(whole.rectangle)], decoded(piece))


@pytest.mark.parametrize("to_codes", [True, False])
def test_what_is_converted_is_said(to_codes, one_rank, tmp_path, capsys):
    plain = Piece("exp_avg/w", SHAPE, (0, 0), torch.zeros(SHAPE), True)
    codes = coded("exp_avg/w", plain.rectangle, plain.tensor)
    before, after = (plain, codes) if to_codes else (codes, plain)
    folder = save(tmp_path, 1, [before], {}, one_rank, **RUN)
    load(folder, [before], one_rank)
    assert "becomes" not in capsys.readouterr().err
    load(folder, [after], one_rank)
    said = f"fp32 state of {folder} becomes 8-bit" if to_codes else f"what {folder} holds in 8 bits becomes fp32"
    assert said in capsys.readouterr().err


def test_maps_and_other_dtypes_are_not_mixed(one_rank, tmp_path):
    whole = Rectangle((0, 0), SHAPE)
    folder = save(tmp_path, 1, [coded("exp_avg/w", whole, numbers(True))], {}, one_rank, **RUN)
    other = coded("exp_avg_sq/w", whole, numbers(False))
    for tensor, absmax, text in (
        (other.tensor, other.absmax, "exp_avg/w is Q8S256 .* there and Q8U256"),
        (other.tensor, None, "exp_avg/w is Q8S256 .* there and U8"),
    ):
        with pytest.raises(CheckpointError, match=text):
            load(folder, [Piece("exp_avg/w", SHAPE, (0, 0), tensor, True, absmax=absmax)], one_rank)
    with pytest.raises(ValueError, match=r"absmax torch.float32 \(3,\)"):
        Piece("exp_avg/w", SHAPE, (0, 0), other.tensor, True, absmax=torch.zeros(3))


def test_others_can_read_the_file_and_damage_is_found(one_rank, tmp_path):
    piece = coded("exp_avg/w", Rectangle((0, 0), SHAPE), numbers(True))
    folder = save(tmp_path, 1, [piece], {}, one_rank, **RUN)
    path = folder / "rank-00000.safetensors"
    raw = load_file(path)["exp_avg/w"]
    assert torch.equal(raw[:60].clone().view(torch.float32), piece.absmax)
    assert torch.equal(raw[60:].view(SHAPE), piece.tensor)
    box = read_manifest(folder).tensors["exp_avg/w"].boxes[0]
    whole = path.read_bytes()
    for at in (box.first_byte, box.first_byte + 59, box.first_byte + 60, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for read in (lambda: verify(folder), lambda: load(folder, [piece], one_rank)):
            with pytest.raises(CheckpointError, match="do not match their checksum"):
                read()
