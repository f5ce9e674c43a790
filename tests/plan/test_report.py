import dataclasses

from megatron_lite.config.run import RunConfig
from megatron_lite.config.sources import override, read_preset
from megatron_lite.plan.memory import Moment
from megatron_lite.plan.report import dry_run_report, flops, memory_comparison, size


def report(*, adamw8bit=False, checkpoint=None, **training):
    config = override(RunConfig(), read_preset("gpt2-124m"))
    if adamw8bit:
        config = override(config, {"optimizer": {"optimizer": "adamw8bit"}})
    config = dataclasses.replace(
        override(config, {"checkpoint": checkpoint or {}}),
        parallel=dataclasses.replace(config.parallel, tensor_model_parallel_size=2),
        training=dataclasses.replace(config.training, micro_batch_size=4, global_batch_size=64, **training),
    )
    return dry_run_report(
        config,
        4,
        50257,
        device_type="cpu",
        batch_lines=["65,536 tokens a step = ..."],
        total_samples=64_000,
        samples_per_epoch=100_000,
    )


def test_the_report_says_what_was_chosen_and_what_it_comes_to():
    lines = report(train_iters=1000, recompute_granularity="full")
    text = "\n".join(lines)
    assert [line.split() for line in lines if line.startswith("  training.")] == [
        ["training.micro_batch_size", "4"],
        ["training.global_batch_size", "64"],
        ["training.train_iters", "1000"],
        ["training.recompute_granularity", "full"],
    ]
    assert "  65,536 tokens a step = ..." in lines
    assert "0.64 epochs = 64,000 of 100,000 sequences an epoch" in text
    assert ["total", "124,439,808"] in [line.split() for line in lines]
    assert "854 MFLOP" in text and "56.0 TFLOP = 854 MFLOP x 65,536 tokens; 14.0 TFLOP on each of 4 ranks" in text
    assert "50,257 tokens in 50,432 rows" in text
    assert "optimizer state is 8 bytes a parameter (2 fp32 slots), masters apart" in lines
    assert "a checkpoint is 1.39 GiB = 12 bytes x 124,439,808 parameters" in text
    assert max(map(len, lines)) <= 130


def test_host_memory_for_saves_is_told_where_a_run_saves_beside_training():
    assert not any("beside training" in line for line in report())
    lines = report(checkpoint={"save": "runs/there"})
    assert any(line.startswith("saves beside training take up to 359 MiB of host memory") for line in lines)
    assert not any("beside" in line for line in report(checkpoint={"save": "runs/there", "async_save": False}))


def test_8_bit_state_is_told_with_its_share():
    lines = report(adamw8bit=True)
    assert (
        "optimizer state is 2.03 bytes a parameter for 68.3% of 124,439,808 (8 bits, the layers' matrices), 8 for the "
        "rest, masters apart"
    ) in lines
    assert any(line.startswith("a checkpoint is 941 MiB = 7.926 bytes x 124,439,808") for line in lines)


def test_every_recompute_setting_is_shown_and_the_chosen_one_marked():
    rows = [line.split() for line in report(recompute_granularity="selective") if "backward of" in line]
    assert [row[:2] if row[0] == "*" else row[:1] for row in rows] == [["none"], ["*", "selective"], ["full"]]


def test_predicted_beside_measured():
    predicted = Moment("optimizer step", 2**30, 2**30, 0, 0, 0, 0)
    line = memory_comparison(predicted, 2**31 + 2**30, 2**32)
    assert "predicted 2.00 GiB (optimizer step), measured 3.00 GiB" in line and "67%" in line
    assert line.endswith("4.00 GiB")


def test_human_units():
    assert [size(n) for n in (512, 1024, 1.5 * 2**20, 2**30 - 1, 25 * 2**40)] == [
        "512 B", "1.00 KiB", "1.50 MiB", "1.00 GiB", "25.0 TiB",
    ]  # fmt: skip
    assert [flops(n) for n in (10, 854_438_400, 6.02e22)] == ["10 FLOP", "854 MFLOP", "60.2 ZFLOP"]
