"""The command line: precedence, spelling, errors, and no torch."""

import subprocess
import sys

import pytest

from megatron_lite.config import cli
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def load(text: str) -> RunConfig:
    return cli.load(text.split())[0]


def test_no_flags_are_the_defaults():
    assert load("") == RunConfig()


def test_flags_win_over_the_file_over_the_preset_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {num_layers: 4, hidden_size: 64}\noptimizer: {lr: 2e-4}\nprecision: {bf16: true}\n")
    config = load(f"--model llama-1b --config {file} --hidden-size 128 --no-bf16")
    assert (config.model.num_layers, config.model.hidden_size, config.model.kv_heads) == (4, 128, 8)
    assert config.model.swiglu and config.optimizer.lr == 2e-4 and not config.precision.bf16
    assert load(f"--config={file} --num_query_groups None").model.num_query_groups is None


def test_dashes_and_underscores_are_alike():
    assert load("--num-layers 3") == load("--num_layers 3") == load("--num-layers=3") == load("--num_layers=3")


def test_launch_options_are_apart_from_the_configuration():
    config, launch = cli.load(["--dry-run", "--world-size", "64", "--model", "gpt2-355m"])
    assert launch == cli.LaunchOptions(model="gpt2-355m", dry_run=True, world_size=64)
    assert config == load("--model gpt2-355m")


def test_launchers_flags_are_accepted():
    for words in ("--local_rank 3", "--local-rank=3", "--deepspeed", "--deepspeed --local_rank=0"):
        assert load(words) == RunConfig()


def test_an_unknown_flag_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"--learning-rate is not a known flag; perhaps you meant --lr\.$"):
        cli.load(["--learning-rate", "1e-3"])
    with pytest.raises(ConfigError, match=r"--num-layer is not a known flag; perhaps you meant --num-layers"):
        load("--num-layer 3")
    with pytest.raises(ConfigError) as caught:
        load("--hiden_size 3 --zzz --fp8-format hybrid")
    assert len(caught.value.problems) == 3 and "perhaps you meant --hidden-size" in caught.value.problems[0]


@pytest.mark.parametrize("words", ["--num-layers x", "--bf16 yes", "stray", "--rampup-batch-size 1 2", "--num-layers"])
def test_a_value_of_a_wrong_type_is_an_error_that_names_it(words, capfd):
    with pytest.raises(ConfigError) as caught:
        load(words)
    assert words.split()[-1] in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_flag_that_lacks_a_dash_is_no_value():
    for words, meant in (
        ("--data-path a -seq-length 5", "-seq-length among its values; perhaps you meant --seq-length."),
        ("--data-path -no-bf16", "-no-bf16 among its values; perhaps you meant --no-bf16."),
        ("--micro-batch-size 4 -lr=2", "-lr=2 among its values; perhaps you meant --lr."),
        ("--data-path a -dry-run", "-dry-run among its values; perhaps you meant --dry-run."),
    ):
        with pytest.raises(ConfigError) as caught:
            load(words)
        assert str(caught.value) == f"{words.split()[0]} has {meant}"
    assert load("--data-path 0.5 -x 1 -").data.data_path == ("0.5", "-x", "1", "-")
    assert load("--rampup-batch-size -1 2 3").training.rampup_batch_size == (-1, 2, 3)


def test_a_switch_given_a_value_says_how_to_write_it():
    for words in ("--bf16 true", "--no-bf16 true"):
        with pytest.raises(ConfigError) as caught:
            load(words)
        assert str(caught.value) == "--bf16 takes no value, but 'true' was given; write --bf16 or --no-bf16."
    with pytest.raises(ConfigError, match="--no-lr is not a known flag"):
        load("--no-lr")


def test_a_number_is_what_it_is_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("training: {train_tokens: 3e11, rampup_batch_size: 1e1 2 3_000}\n")
    file = load(f"--config {tmp_path / 'run.yaml'}")
    assert load("--train-tokens 3e11 --rampup-batch-size 1e1 2 3_000") == file
    assert file.training.train_tokens == 300_000_000_000 and file.training.rampup_batch_size == (10, 2, 3000)
    assert load("--train-tokens=3e11 --train-tokens None --lr 1e-3").training.train_tokens is None
    assert load("--rampup-batch-size None").training.rampup_batch_size is None
    assert load("--data-path a None").data.data_path == ("a", "None")


def test_values_of_a_wrong_type_are_said_together():
    with pytest.raises(ConfigError) as caught:
        load("--num-layers x --train-iters 1.5 --lr big --resume maybe --rampup-batch-size 1 2 --bf16")
    assert caught.value.problems == [
        "--num-layers is 'x', but should be a whole number.",
        "--train-iters is '1.5', but should be a whole number.",
        "--lr is 'big', but should be a number.",
        "--resume is 'maybe', but should be one of auto, must, never.",
        "--rampup-batch-size is '1 2', but should be 3 values, not 2.",
    ]


def test_a_source_without_a_value_is_an_error():
    for words in ("--config", "--model --bf16", "--config="):
        with pytest.raises(ConfigError, match="needs a value"):
            load(words)


def test_help_comes_without_torch_and_lists_every_section():
    code = (
        "import sys\n"
        "import megatron_lite.config.check, megatron_lite.optim.schedule\n"
        "import megatron_lite.train.batch_plan, megatron_lite.train.deepspeed_config\n"
        "from megatron_lite.config.cli import load\n"
        "try:\n    load(['--help'])\n"
        "except SystemExit as stop:\n    print('code', stop.code, 'torch' in sys.modules, 'deepspeed' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "code 0 False False"
    for flag in ("--num-layers", "--zero-stage", "--bf16", "--lr", "--data-path", "--save", "--dry-run", "--model"):
        assert flag in done.stdout
