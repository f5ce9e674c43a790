"""The DeepSpeed JSON: derived from flags, merged with a user's, contradictions named on both sides."""

import dataclasses
import json
import re

import pytest

from megatron_lite.config import sources
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.train import deepspeed_config


def config_of(**fields) -> RunConfig:
    overrides: dict = {}
    for name, value in fields.items():
        overrides.setdefault(sources.section_of()[name], {})[name] = value
    return sources.override(RunConfig(), overrides)


def merged(user: dict, data_size: int = 2, **fields) -> dict:
    return deepspeed_config.merge(config_of(**fields), data_size, user)


@pytest.mark.parametrize(("zero", "overlaps"), [(1, None), (2, True), (3, True)])
def test_overlap_is_deepspeeds_where_it_reduces(zero, overlaps):
    derived = deepspeed_config.derive(config_of(overlap_grad_reduce=True, zero_stage=zero))
    assert derived["zero_optimization"].get("overlap_comm") is overlaps
    assert "overlap_comm" not in deepspeed_config.derive(config_of(zero_stage=zero))["zero_optimization"]


def refused(user: dict, data_size: int = 2, **fields) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        merged(user, data_size, **fields)
    return caught.value.problems


def test_flags_alone():
    assert deepspeed_config.derive(config_of(zero_stage=2, bf16=True, micro_batch_size=4, clip_grad=0.5)) == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_16_bit_gradients_travel_in_fp32_and_stage_1_adds_them_up_on_the_parameters():
    for dtype in ("bf16", "fp16"):
        stage_1 = deepspeed_config.derive(config_of(zero_stage=1, **{dtype: True}))
        assert stage_1["communication_data_type"] == "fp32" and "data_types" not in stage_1
    assert "communication_data_type" not in deepspeed_config.derive(config_of(zero_stage=2))


def test_the_loss_scale_of_fp16():
    dynamic = deepspeed_config.derive(config_of(fp16=True, initial_loss_scale=4096.0, hysteresis=3))["fp16"]
    assert dynamic == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 1000,
        "hysteresis": 3,
        "min_loss_scale": 1,
    }
    assert deepspeed_config.derive(config_of(fp16=True, loss_scale=128.0))["fp16"]["loss_scale"] == 128


def test_16_bit_weights_without_zero_run_as_zero_1():
    assert [config_of(zero_stage=s).effective_zero_stage for s in range(4)] == [0, 1, 2, 3]
    assert [config_of(zero_stage=s, bf16=True).effective_zero_stage for s in range(4)] == [1, 1, 2, 3]
    assert config_of(zero_stage=0, fp16=True).effective_zero_stage == 1


def test_an_empty_file_changes_nothing():
    assert merged({}) == deepspeed_config.derive(RunConfig())


def test_offload_communication_and_profilers_pass_through():
    user = {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "reduce_bucket_size": 1000,
            "stage3_param_persistence_threshold": 10,
        },
        "comms_logger": {"enabled": True, "verbose": False},
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "aio": {"block_size": 1048576},
        "steps_per_print": None,
        "communication_data_type": "fp32",
        "wall_clock_breakdown": True,
    }
    result = merged(user, zero_stage=3)
    zero = user.pop("zero_optimization")
    assert zero.items() <= result["zero_optimization"].items()
    assert {key: result[key] for key in user} == user


def test_a_file_that_agrees_is_accepted_and_accumulation_stays_ours():
    user = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale_window": 7},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": None,
    }
    flags = {"global_batch_size": 16, "micro_batch_size": 2, "bf16": True}
    assert merged(user, **flags) == deepspeed_config.derive(config_of(**flags))


def test_accumulation_steps_of_a_file_are_held_to_those_of_the_flags():
    flags = {"gradient_accumulation_steps": 4, "micro_batch_size": 2}
    merged({"gradient_accumulation_steps": 4, "train_batch_size": 16}, **flags)
    assert (
        "--global-batch-size 16 = --micro-batch-size 2 x 2 data ranks x 4"
        in (refused({"gradient_accumulation_steps": 8}, **flags)[0])
    )


def test_auto_is_ours_or_deepspeeds_default(tmp_path):
    user = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(user))
    assert deepspeed_config.build(config_of(deepspeed_config=str(tmp_path / "ds.json")), 2) == (
        deepspeed_config.derive(RunConfig())
    )


@pytest.mark.parametrize(
    ("user", "flags", "key", "flag"),
    [
        ({"zero_optimization": {"stage": 2}}, {}, "zero_optimization.stage is 2", "--zero-stage 1"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled is true", "--no-bf16"),
        ({"fp16": {"enabled": False}}, {"fp16": True}, "fp16.enabled is false", "--fp16"),
        ({"gradient_clipping": 0.3}, {}, "gradient_clipping is 0.3", "--clip-grad 1"),
        ({"train_micro_batch_size_per_gpu": 8}, {}, "per_gpu is 8", "--micro-batch-size 1"),
        ({"train_batch_size": 8}, {"global_batch_size": 4}, "train_batch_size is 8", "--global-batch-size 4"),
        ({"gradient_accumulation_steps": 3}, {"global_batch_size": 4}, "steps is 3", "--micro-batch-size 1 x 2"),
        ({"fp16": {"loss_scale_window": 5}}, {"fp16": True}, "window is 5", "--loss-scale-window 1000"),
        ({"fp16": {"loss_scale": 64}}, {"fp16": True}, "loss_scale is 64", "--loss-scale dynamic"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, 'grad_accum_dtype is "bf16"', "fp32"),
        (
            {"zero_optimization": {"overlap_comm": False}},
            {"overlap_grad_reduce": True},
            "overlap_comm is false",
            "--overlap-grad-reduce",
        ),
        ({"managed_gradient_accumulation": False}, {}, "managed_gradient_accumulation is false", "training step"),
    ],
)
def test_a_contradiction_names_both(user, flags, key, flag):
    (problem,) = refused(user, **flags)
    before, contradicts, after = problem.partition("which contradicts")
    assert contradicts and key in before and flag in after


def test_sections_that_would_act_beside_the_flags_are_refused():
    for section, instead in deepspeed_config.REFUSED.items():
        (problem,) = refused({section: {"enabled": True}})
        assert section in problem and instead in problem
        assert merged({section: {"enabled": False}}) == deepspeed_config.derive(RunConfig())


def test_8_bit_state_is_not_deepspeeds_to_move():
    def text(zero):
        problems = refused({"zero_optimization": zero}, zero_stage=3, optimizer="adamw8bit")
        return " ".join(problems)

    for offload in ({"device": "cpu", "ratio": 0.5}, {"device": "cpu", "super_offload": True}):
        merged({"zero_optimization": {"offload_optimizer": offload}}, zero_stage=3)
        last = list(offload)[-1]
        told = text({"offload_optimizer": offload})
        assert f"offload_optimizer.{last} does not go with --optimizer adamw8bit" in told
    assert "zenflow" in text({"zenflow": {"topk_ratio": 0.1}})
    merged({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, zero_stage=3, optimizer="adamw8bit")


def test_unknown_keys_suggest_the_nearest():
    assert "perhaps you meant zero_optimization" in refused({"zero_optimisation": {}})[0]
    assert "fp16.auto_cast cannot be set" in refused({"fp16": {"auto_cast": True}}, fp16=True)[0]
    param_dtype = {"data_types": {"param_dtype": "bf16"}}
    assert "data_types.param_dtype cannot be set" in refused(param_dtype, bf16=True, zero_stage=3)[0]


def test_all_problems_are_said_at_once():
    assert len(refused({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}, "zzz": 1})) == 3


def test_offload_needs_its_stage():
    offload = {"device": "cpu"}
    assert "--zero-stage 3" in refused({"zero_optimization": {"offload_param": offload}}, zero_stage=2)[0]
    assert "--zero-stage 1" in refused({"zero_optimization": {"offload_optimizer": offload}}, zero_stage=0)[0]


@pytest.mark.parametrize(
    ("zero", "sentence"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, 'offload_optimizer.device is "nvme".*choose "cpu"'),
        ({"offload_param": {"device": "nvme"}}, 'offload_param.device is "nvme".*choose "cpu"'),
        ({"mics_shard_size": 4}, "mics_shard_size is 4.*over all data ranks"),
        ({"zero_hpz_partition_size": 8}, "zero_hpz_partition_size is 8.*over all data ranks"),
        ({"cpu_offload": True}, "cpu_offload is an old spelling.*offload_optimizer"),
        ({"cpu_offload_param": True}, "cpu_offload_param is an old spelling.*offload_param"),
    ],
)
def test_what_checkpoints_cannot_follow_is_refused(zero, sentence):
    (problem,) = refused({"zero_optimization": zero}, zero_stage=3)
    assert re.search(sentence, problem)


def test_what_is_refused_may_say_no():
    without = {"mics_shard_size": -1, "zero_hpz_partition_size": 1, "cpu_offload": False}
    assert merged({"zero_optimization": without}, zero_stage=3)["zero_optimization"]["stage"] == 3


def test_stage_1_that_offloads_runs_as_stage_2(tmp_path, capfd):
    user = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    for dtype, sums in (({"bf16": True}, {"grad_accum_dtype": "fp32"}), ({}, None)):
        settings = merged(user, zero_stage=1, **dtype)
        assert settings["zero_optimization"]["stage"] == 2 and settings.get("data_types") == sums
    (tmp_path / "ds.json").write_text(json.dumps(user))
    for _ in range(2):
        deepspeed_config.build(config_of(deepspeed_config=str(tmp_path / "ds.json")), 1)
    assert "".join(capfd.readouterr()).count("offloaded runs as ZeRO 2") == 1


def test_a_file_is_read_and_merged(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"steps_per_print": 100}))
    assert deepspeed_config.build(config_of(deepspeed_config=str(file)), 1)["steps_per_print"] == 100
    for text, message in (("{", "not valid JSON"), ("[]", "must be a JSON object")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            deepspeed_config.read(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        deepspeed_config.read(tmp_path / "none.json")


def test_deepspeed_knows_every_key_that_is_derived():
    runtime = pytest.importorskip("deepspeed.runtime.config")
    derived = deepspeed_config.derive(config_of(fp16=True, zero_stage=2))
    made = runtime.DeepSpeedConfig(derived, mpu=None)
    assert made.gradient_accumulation_steps == 1 and made.grad_accum_dtype == "fp32"
    assert made.zero_config.stage == 2 and made.float16_config.initial_scale_power == 16


def test_stage_1_takes_gradients_that_are_reduced_unless_it_offloads():
    def own(user=None, **fields):
        return deepspeed_config.for_own_gradients(merged(user or {}, **fields))

    settings = own(zero_stage=1, clip_grad=0.5, bf16=True)
    assert settings["gradient_clipping"] == 0.0 and settings["zero_optimization"]["compute_grad_norm"] is False
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert own(zero_stage=2) is None
    assert own({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, zero_stage=1) is None
    assert own({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, zero_stage=1) is not None


def test_what_has_no_effect_in_stage_1_is_said(tmp_path, capfd):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}, "prescale_gradients": True}))
    deepspeed_config.build(config_of(zero_stage=1, deepspeed_config=str(file)), 1)
    said = "".join(capfd.readouterr())
    assert "prescale_gradients, zero_optimization.overlap_comm" in said and "no effect" in said
    deepspeed_config.build(config_of(zero_stage=2, deepspeed_config=str(file)), 1)
    assert "no effect" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("user", "sentence"),
    [
        ({"zero_optimization": 3}, "zero_optimization is 3 in the"),
        ({"zero_optimization": None}, "zero_optimization is null in the"),
        ({"bf16": True}, "bf16 is true in the"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, 'zero_optimization.offload_optimizer is "cpu" in the'),
        ({"flops_profiler": {"enabeld": True}}, "flops_profiler.enabeld is not a known key .* meant enabled"),
        ({"timers": {"all": 1}}, "timers.all is not a known key"),
        ({"aio": {"queue_depth": True}}, "aio.queue_depth is true .* should be a whole number"),
        ({"wall_clock_breakdown": "x"}, 'wall_clock_breakdown is "x" .* should be true or false'),
        ({"gradient_predivide_factor": "x"}, 'gradient_predivide_factor is "x" .* should be a number'),
        ({"communication_data_type": "fp33"}, 'communication_data_type is "fp33" .* one of fp32, bf16, fp16'),
    ],
)
def test_sections_are_objects_of_known_keys(user, sentence, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(user))
    config = config_of(deepspeed_config=str(tmp_path / "ds.json"))
    (problem,) = deepspeed_config.problems(config, 2)
    assert re.search(sentence, problem)
    with pytest.raises(ConfigError, match=sentence):
        deepspeed_config.build(config, 2)
    assert deepspeed_config.problems(dataclasses.replace(config, parallel=RunConfig().parallel), 2) == []


def test_a_number_out_of_range_is_left_to_its_own_message(tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    assert deepspeed_config.problems(config_of(deepspeed_config=str(tmp_path / "ds.json"), micro_batch_size=0), 2) == []


def test_sections_without_a_schema_are_those_deepspeed_reads_by_name():
    profiler = pytest.importorskip("deepspeed.profiling.config")
    aio = pytest.importorskip("deepspeed.runtime.swap_tensor.aio_config")
    known = {
        "flops_profiler": vars(profiler.DeepSpeedFlopsProfilerConfig({})).keys(),
        "aio": aio.get_aio_config({}).keys(),
    }
    for section, names in known.items():
        assert set(deepspeed_config.WITHOUT_SCHEMA[section]) == set(names)


def test_deepspeeds_own_schemas_say_what_else_is_wrong(tmp_path):
    pytest.importorskip("deepspeed")
    from megatron_lite.train.engine import load_libraries

    file = tmp_path / "ds.json"
    config = config_of(deepspeed_config=str(file))
    zero = {"stge": 1, "reduce_bucket_size": "many", "overlap_comm": "auto"}
    file.write_text(json.dumps({"zero_optimization": {**zero, "offload_optimizer": {"devcie": "cpu"}}}))
    with pytest.raises(ConfigError) as caught:
        load_libraries(config)
    told = sorted(caught.value.problems)
    assert told[0].startswith("zero_optimization.offload_optimizer.devcie is not a known") and "meant device" in told[0]
    assert told[1].startswith('zero_optimization.reduce_bucket_size is "many" in the') and "integer" in told[1]
    assert told[2].startswith("zero_optimization.stge is not a known key") and "perhaps you meant stage" in told[2]
    file.write_text(json.dumps({"zero_optimization": {"stage3_max_live_parameters": 7, "offload_optimizer": None}}))
    load_libraries(config)
