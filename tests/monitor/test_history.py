import json
import math
import resource
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.monitor import history
from megatron_lite.monitor.history import JsonLinesSink, decode, encode, read_history


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@given(st.dictionaries(st.sampled_from(["loss", "lr", "grad_norm"]), st.floats(), max_size=3))
def test_every_record_is_strict_json_and_comes_back(record):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = encode({"step": 3, **record})
    json.loads(line, parse_constant=refuse)
    back = decode(line)
    assert back.keys() == {"step", *record}
    for name, value in record.items():
        assert back[name] == value or (math.isnan(value) and math.isnan(back[name]))


def test_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonLinesSink(path)
    for step in range(1, 8):
        sink.write({"step": step, "loss": 1.0 / step})
    sink.write({"step": 4, "valid_loss": 2.0})
    sink.close()
    with open(path, "a") as file:
        file.write('{"step": 8, "los')
    sink = JsonLinesSink(path, resume_step=4)
    sink.write({"step": 5, "loss": 9.0})
    sink.close()
    assert steps(path) == [1, 2, 3, 4, 4, 5]
    assert read_history(path)[-1]["loss"] == 9.0
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_an_unfinished_last_line_that_happens_to_parse_is_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2}')
    JsonLinesSink(path, resume_step=2).write({"step": 3})
    assert steps(path) == [1, 3]


def test_a_start_from_scratch_takes_everything_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    JsonLinesSink(path).close()
    assert path.read_text() == ""


def test_a_crash_while_taking_back_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(history.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        JsonLinesSink(path, resume_step=1)
    assert steps(path) == [1, 2]


def test_each_line_is_in_the_file_before_the_next_step(tmp_path):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1})
    assert steps(tmp_path / "metrics.jsonl") == [1]


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limit on this system")
def test_a_full_disk_leaves_whole_lines_and_the_sink_goes_on_when_there_is_room(tmp_path):
    # In a process of its own: the limit holds for every file of a process.
    script = """
        import resource, signal, sys
        from megatron_lite.monitor.history import JsonLinesSink
        from megatron_lite.monitor.sinks import Sinks
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sinks = Sinks([JsonLinesSink(sys.argv[1])])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
        for step in range(1, 6):
            sinks.write({"step": step, "lr": 0.5})
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sinks.write({"step": 6, "lr": 0.5})
    """
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path], capture_output=True, text=True, check=True
    )
    assert steps(path) == [1, 6]
    assert done.stderr.count("warning: JsonLinesSink failed") == 1
    assert "works again; 4 records are missing" in done.stderr
