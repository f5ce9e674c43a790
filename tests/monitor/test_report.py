import math
import struct

import pytest

from megatron_lite.errors import UserError
from megatron_lite.monitor.history import JsonLinesSink
from megatron_lite.monitor.report import plot_loss, smooth


def test_a_straight_line_stays_where_it_is():
    line = [10.0 - 0.1 * i for i in range(100)]
    assert smooth(line, 9) == pytest.approx(line)
    noisy = [value + (-1) ** i for i, value in enumerate(line)]
    inner = slice(10, -10)
    assert max(abs(a - b) for a, b in zip(smooth(noisy, 9)[inner], line[inner], strict=True)) < 0.12


def test_the_picture_is_a_png_of_the_file(tmp_path):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    for step in range(1, 41):
        sink.write({"step": step, "loss": math.nan if step == 5 else 8 / step, "lr": 1e-3})
    sink.write({"step": 40, "valid_loss": 0.5})
    sink.close()
    picture = plot_loss(sink.path, tmp_path / "loss.png", {"unigram entropy": 5.1})
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24])[0] >= 1000
    assert {entry.name for entry in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_a_file_without_a_loss_is_a_users_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.1}\n')
    with pytest.raises(UserError, match="no finite loss"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
