import io
import json
import math
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lite import log
from megatron_lite.config.logging import LoggingConfig
from megatron_lite.errors import ConfigError, UserError
from megatron_lite.monitor.console import ConsoleSink, count, duration, evaluation_line, step_line
from megatron_lite.monitor.histograms import histograms
from megatron_lite.monitor.sinks import Sinks, TensorBoardSink, open_sinks


@pytest.fixture(autouse=True)
def quiet_log():
    yield
    log.configure(0, 1)


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    first = TensorBoardSink(tmp_path)
    for step in range(1, 11):
        first.write({"step": step, "loss": 1.0, "lr": 0.1})
    first.histograms(8, histograms([("a", torch.ones(3))]))
    first.close()
    second = TensorBoardSink(tmp_path, resume_step=6)
    for step in range(7, 13):
        second.write({"step": step, "loss": 2.0})
    second.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, 1.0 if step <= 6 else 2.0) for step in range(1, 13)
    ]
    assert [event.step for event in events.Scalars("lr")] == list(range(1, 7))
    assert events.Histograms("weights/a") == []


def test_histograms_reach_tensorboard_with_their_moments(tmp_path):
    weight = torch.linspace(-1, 3, 1001)
    sinks = Sinks([TensorBoardSink(tmp_path)])
    sinks.histograms(5, histograms([("w", weight), ("odd", torch.tensor([math.nan]))], [("w", None)]))
    sinks.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["histograms"] == ["weights/w"]
    shown = events.Histograms("weights/w")[0]
    assert shown.step == 5
    value = shown.histogram_value
    assert (value.min, value.max, value.num) == (-1.0, 3.0, 1001)
    assert value.sum == pytest.approx(weight.double().sum().item())
    assert value.sum_squares == pytest.approx(weight.double().square().sum().item())
    assert sum(value.bucket) == 1001
    assert len(value.bucket) == len(value.bucket_limit) and value.bucket_limit[-1] == 3.0


class Failing:
    def __init__(self, steps):
        self.steps, self.taken = steps, []

    def write(self, record):
        if record["step"] in self.steps:
            raise OSError(28, "No space left on device")
        self.taken.append(record["step"])

    def flush(self):
        raise OSError("no")

    close = flush


def test_a_failing_sink_warns_once_and_the_others_go_on(capsys):
    failing, sound = Failing({2, 3, 4}), Failing(())
    sinks = Sinks([failing, sound])
    for step in range(1, 6):
        sinks.write({"step": step})
    assert failing.taken == [1, 5] and sound.taken == [1, 2, 3, 4, 5]
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1
    assert "Failing works again; 3 records are missing in it" in said
    sinks.close()


def test_ranks_other_than_the_first_write_nothing(tmp_path):
    sinks = open_sinks(LoggingConfig(), tmp_path / "run", rank=1, world_size=2, total_steps=3)
    sinks.write({"step": 1, "loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_the_sinks_of_a_run_folder(tmp_path, capsys):
    sinks = open_sinks(LoggingConfig(log_interval=2), tmp_path, rank=0, world_size=1, total_steps=2)
    for step in (1, 2):
        sinks.write({"step": step, "loss": float(step)})
    sinks.close()
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1.0, 2.0]
    assert list((tmp_path / "tensorboard").iterdir())
    assert "step 2/2 | loss 1.5000" in capsys.readouterr().err


def test_an_unwritable_run_folder_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another by --run-dir"):
        open_sinks(LoggingConfig(), tmp_path / "file", rank=0, world_size=1, total_steps=1)
    events = LoggingConfig(tensorboard_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match="choose another folder by --tensorboard-dir"):
        open_sinks(events, tmp_path / "run", rank=0, world_size=1, total_steps=1)


def test_a_missing_tensorboard_is_said_and_a_missing_wandb_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(log, "_said", set())
    open_sinks(LoggingConfig(), tmp_path, rank=0, world_size=1, total_steps=1).close()
    assert "tensorboard is not installed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_sinks(LoggingConfig(wandb_project="p"), tmp_path, rank=0, world_size=1, total_steps=1)


def test_weights_and_biases_goes_on_with_the_run_it_began(tmp_path, monkeypatch, capsys):
    begun, logged = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            pass

    wandb = types.SimpleNamespace(init=lambda **arguments: begun.append(arguments) or Run())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = LoggingConfig(wandb_project="p", wandb_exp_name="name", tensorboard_dir="none")
    for resume_step in (0, 3, 2, 0):
        sinks = open_sinks(config, tmp_path, rank=0, world_size=1, total_steps=9, resume_step=resume_step)
        sinks.write({"step": resume_step + 1, "lr": 0.5})
        if resume_step == 0:
            sinks.write({"step": 3, "lr": 0.5})
        sinks.close()
    identities = [arguments["id"] for arguments in begun]
    assert identities[0] == identities[1] == identities[2] != identities[3]
    assert begun[0]["name"] == "name" and begun[0]["dir"] == str(tmp_path)
    assert logged[0] == (1, {"lr": 0.5})
    assert capsys.readouterr().err.count("Weights & Biases keeps its values of steps 3 to 4") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_log_lines_above_it(capsys):
    screen = Terminal()
    console = ConsoleSink(10, resume_step=4, stream=screen)
    console.write({"step": 5, "loss": 3.25, "lr": 1e-3, "tokens_per_second": 12345.0})
    log.note("a checkpoint was written")
    console.write({"step": 5, "valid_loss": 3.0, "valid_perplexity": 20.1})
    console.close()
    shown = screen.getvalue()
    assert "5/10" in shown and "loss=3.2500, lr=1.00e-03, 12.3k tokens/s" in shown
    assert "a checkpoint was written\n" in shown and "validation loss 3.0000 | perplexity 20.10" in shown
    log.note("afterwards")
    assert "afterwards" in capsys.readouterr().err


def test_a_line_sums_up_the_steps_since_the_last_one():
    window = [
        {"step": 9, "loss": 4.0, "iteration_time": 1.0, "tokens_per_second": 1000.0},
        {
            "step": 10,
            "loss": 3.0,
            "lr": 3e-4,
            "grad_norm": 1.25,
            "iteration_time": 3.0,
            "tokens_per_second": 2000.0,
            "model_tflops": 0.5,
            "mfu": 0.25,
            "skipped_steps": 2,
        },
    ]
    assert step_line(window, 100) == (
        "step 10/100 | loss 3.5000 | lr 0.0003 | grad norm 1.25 | skipped 2 | 1.75k tokens/s | "
        "500 GFLOP/s (25.0% MFU) | 2 s/step | 3m00s left"
    )


def test_a_huge_perplexity_stays_on_its_line():
    record = {"step": 2, "valid_loss": 700.0, "valid_perplexity": 1e304}
    assert evaluation_line(record) == "step 2 | validation loss 700.0000 | perplexity 1e+304"


def test_human_numbers():
    assert [count(n) for n in (0.5, 999, 999.6, 12_345, 999_999, 7e9)] == ["0.5", "999", "1k", "12.3k", "1M", "7G"]
    assert [duration(s) for s in (4.4, 65, 3700, 90_000, math.inf)] == ["4s", "1m05s", "1h01m", "1d01h", "?"]
