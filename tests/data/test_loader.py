"""Which samples a step trains on follows from the samples consumed, and from nothing else."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from numbered_stream import SEQ, Numbered

from megatron_lite.config.data import DataConfig
from megatron_lite.data.feed import build_stream
from megatron_lite.data.loader import BatchLoader
from megatron_lite.data.micro_batch import Assembly
from megatron_lite.data.stream import MockStream
from megatron_lite.errors import EXIT_ERROR, DataError, SamplesLost, UserError
from megatron_lite.monitor.supervisor import _End


def loader(stream, rank=0, size=1, micro=2, workers=0, vocab_size=10**6, **options):
    return BatchLoader(
        stream,
        data_rank=rank,
        data_size=size,
        micro_batch_size=micro,
        vocab_size=vocab_size,
        num_workers=workers,
        **options,
    )


@pytest.fixture
def opened():
    """`loader`, closed in the end."""
    made = []
    yield lambda *args, **options: made.append(loader(*args, **options)) or made[-1]
    for each in made:
        each.close()


def tokens_of_step(loaders, consumed, batch):
    """All ranks' micro-batches of a step in the order of their global numbers."""
    micro = sorted((b for each in loaders for b in each.step(consumed, batch)), key=lambda b: b.index)
    assert [b.index for b in micro] == list(range(len(micro)))
    return torch.cat([torch.cat([b.tokens, b.labels[:, -1:]], 1) for b in micro])


def readers() -> list[psutil.Process]:
    """The processes that read ahead for this one."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


LAYOUTS = [(size, micro, 0) for size in (1, 2, 4) for micro in (1, 2, 4)]


@pytest.mark.parametrize(("size", "micro", "workers"), [*LAYOUTS, (1, 4, 3), (2, 1, 1)])
def test_a_step_has_the_same_samples_on_any_layout(opened, size, micro, workers):
    stream = MockStream(SEQ, 100, "layout")
    loaders = [opened(stream, rank, size, micro, workers) for rank in range(size)]
    consumed = 48
    for batch in [16, 16, 32, 32, 16]:  # a growing and a shrinking batch
        expected = torch.from_numpy(np.stack([stream[k].tokens for k in range(consumed, consumed + batch)]))
        assert torch.equal(tokens_of_step(loaders, consumed, batch), expected)
        consumed += batch


def test_a_resumed_loader_goes_on_where_the_first_stopped(opened):
    stream = build_stream(DataConfig(mock_data=True, seq_length=SEQ), seed=3, split="train", vocab_size=50)
    first, second = opened(stream, workers=2), opened(stream, micro=4)
    first.step(0, 8)
    assert torch.equal(tokens_of_step([first], 8, 8), tokens_of_step([second], 8, 8))


def test_a_micro_batch(opened):
    batch = opened(Numbered(), rank=1, size=2).step(100, 8)[1]
    assert (batch.first_sample, batch.index) == (106, 3)
    assert batch.tokens.tolist() == [list(range(106, 112)), list(range(107, 113))]
    assert batch.labels.tolist() == [list(range(107, 113)), list(range(108, 114))]
    for field in (batch.tokens, batch.labels):
        assert field.dtype == torch.int64 and field.is_contiguous()
    assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_what_is_read_ahead_is_the_same_to_the_last_field(opened):
    """And stays so when the memory it came in is filled again."""
    documents = Assembly(reset_attention_mask=True, reset_position_ids=True)
    here = opened(Numbered(), assembly=documents)
    ahead = opened(Numbered(), workers=1, assembly=documents)
    pairs = [pair for at in range(0, 48, 8) for pair in zip(here.step(at, 8), ahead.step(at, 8), strict=True)]
    for one, other in pairs:
        assert (one.first_sample, one.index) == (other.first_sample, other.index)
        for name in ("tokens", "labels", "loss_mask", "begins", "positions"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_with_processes_no_sample_after_the_first_step_is_read_here(opened):
    stream = Numbered()
    each = opened(stream, rank=1, size=2, workers=2)
    for step in range(4):
        each.step(step * 8, 8)
    assert stream.read == [2, 3, 6, 7]


def test_going_back_and_ahead_reads_what_was_asked(opened):
    each = opened(Numbered(), workers=1)
    each.step(0, 4)
    each.step(4, 4)
    for consumed in (0, 40, 44, 4):
        assert [int(b.tokens[0, 0]) for b in each.step(consumed, 4)] == [consumed, consumed + 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "kind"), [(DataError("web.bin shrank"), DataError), (OSError(5, "Input/output error"), SamplesLost)]
)
def test_a_sample_that_cannot_be_read_is_named_in_the_step_that_wants_it(opened, error, kind, workers):
    each = opened(Numbered(bad=13, error=error), workers=workers)
    each.step(0, 8)
    with pytest.raises(kind, match=r"sample 13 cannot be read: .*(shrank|Input/output)"):
        each.step(8, 8)


def test_a_mistake_of_ours_keeps_its_type_and_names_the_sample(opened):
    with pytest.raises(ZeroDivisionError) as raised:
        opened(Numbered(bad=3, error=ZeroDivisionError("division"))).step(0, 4)
    assert raised.value.__notes__ == ["while sample 3 was read"]


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_an_id_beyond_the_vocabulary_is_named(opened, dtype):
    class Reaching(Numbered):
        def __getitem__(self, sample):
            found = super().__getitem__(sample)
            tokens = found.tokens.astype("i8") - (9 if sample == 6 else 0)
            return type(found)(tokens.astype(dtype), found.starts, found.counts)

    wanted = "65,535" if dtype == "<u2" else "-3"
    with pytest.raises(DataError, match=rf"sample 6 holds token id {wanted} and the vocabulary has ids 0 to 12"):
        opened(Reaching(), vocab_size=13).step(0, 8)
    with pytest.raises(DataError, match=r"sample 7 holds token id 13 and the vocabulary has ids 0 to 12"):
        opened(Numbered(), vocab_size=13).step(0, 8)


def test_a_lost_process_is_named_with_what_it_was_to_read(opened):
    each = opened(Numbered(stuck=13), workers=1)
    each.step(0, 8)
    (reader,) = readers()
    reader.kill()
    wanted = (
        rf"reads samples (8 to 9|10 to 11|12 to 13) ahead \(pid {reader.pid}\) was killed by signal 9; .*num-workers"
    )
    with pytest.raises(SamplesLost, match=wanted):
        each.step(8, 8)


def test_a_lost_sample_is_a_crash_and_no_mistake_of_the_users():
    """A supervisor starts again after it."""
    lost = SamplesLost("sample 13 cannot be read: Input/output error")
    assert not isinstance(lost, UserError) and lost.exit_code == EXIT_ERROR
    assert _End(lost.cause, lost.exit_code, str(lost)).may_pass


def test_a_mistake_of_ours_in_a_process_is_no_wait_for_ever(opened, capfd):
    each = opened(Numbered(bad=9, error=ZeroDivisionError("division")), workers=1)
    each.step(0, 8)
    with pytest.raises(SamplesLost, match=r"reads samples 8 to 9 ahead \(pid \d+\) ended; "):
        each.step(8, 8)
    said = capfd.readouterr().err
    assert "ZeroDivisionError" in said and "while sample 9 was read" in said


def test_a_launchers_signals_leave_them_to_a_rank_that_saves(opened):
    each = opened(Numbered(), workers=2)
    for consumed in (0, 8):
        each.step(consumed, 8)
    for reader in readers():
        reader.send_signal(signal.SIGTERM)
        reader.send_signal(signal.SIGINT)
    for consumed in (16, 24):
        assert int(each.step(consumed, 8)[0].tokens[0, 0]) == consumed


def test_close_ends_the_processes(opened):
    before = len(readers())
    each = opened(Numbered(), workers=2)
    each.step(0, 8)
    deadline = time.monotonic() + 60
    # One that was just forked has this process's command line still.
    while len(readers()) < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    each.close()
    assert len(readers()) == before


RANK = """
if __name__ == "__main__":
    import signal, sys, time, psutil
    # A shell's background jobs are started with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from megatron_lite.data.loader import BatchLoader
    from megatron_lite.data.stream import MockStream
    each = BatchLoader(
        MockStream(6, 100), data_rank=0, data_size=1, micro_batch_size=2, vocab_size=100, num_workers=2
    )
    for step in range(3):
        each.step(step * 8, 8)
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    if sys.argv[1:]:
        time.sleep(1000)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, None])
def test_they_end_with_their_parent_quietly(tmp_path, how):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, str(script), *(["stay"] if how else [])]
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    rank = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=place
    )
    pids = [int(pid) for pid in rank.stdout.readline().split()]
    children = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert len(pids) >= 2
    if how == signal.SIGINT:
        os.killpg(rank.pid, how)
    elif how:
        rank.kill()
    _, said = rank.communicate(timeout=60)
    assert said.count("Traceback") == (how == signal.SIGINT)
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left


def test_a_batch_that_does_not_divide_is_a_programmers_mistake(opened):
    with pytest.raises(ValueError, match="6 samples is no multiple of 4"):
        opened(Numbered(), size=2).step(0, 6)
