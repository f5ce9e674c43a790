"""The rules between fields: each broken one is a sentence with its numbers and the way out."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config import check, sources
from megatron_lite.config.run import RunConfig


def config_of(**fields) -> RunConfig:
    overrides: dict = {}
    for name, value in {"train_iters": 10, "vocab_size": 100, **fields}.items():
        overrides.setdefault(sources.section_of()[name], {})[name] = value
    return sources.override(RunConfig(), overrides)


def problems(world_size: int = 1, **fields) -> list[str]:
    return check.problems(config_of(**fields), world_size)


def test_a_sound_configuration_has_no_problems():
    assert problems() == []
    assert problems(
        world_size=8,
        tensor_model_parallel_size=4,
        num_attention_heads=8,
        num_query_groups=2,
        sequence_parallel=True,
        global_batch_size=16,
        rampup_batch_size=(4, 4, 100),
        position_embedding_type="rope",
        lr_warmup_samples=10,
        lr_decay_samples=100,
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "world_size", "sentence"),
    [
        (
            {"tensor_model_parallel_size": 8},
            8,
            "tensor_model_parallel_size=8 does not divide num_attention_heads=12; choose 1, 2, 3, 4, 6 or 12.",
        ),
        (
            {"tensor_model_parallel_size": 4, "num_query_groups": 6},
            4,
            "tensor_model_parallel_size=4 neither divides num_query_groups=6 nor is a multiple of it; "
            "choose 1, 2, 3, 6 or 12.",
        ),
        (
            {"tensor_model_parallel_size": 4, "ffn_hidden_size": 2050},
            4,
            "tensor_model_parallel_size=4 does not divide ffn_hidden_size=2050; choose 1, 2, 5, 10, 25, 41, 50, 82, "
            "205, 410, 1025 or 2050.",
        ),
        (
            {"tensor_model_parallel_size": 4},
            6,
            "tensor_model_parallel_size=4 does not divide the number of ranks=6; choose 1, 2, 3 or 6.",
        ),
        (
            {"num_query_groups": 5},
            1,
            "num_query_groups=5 does not divide num_attention_heads=12; choose 1, 2, 3, 4, 6 or 12.",
        ),
        (
            {"hidden_size": 100},
            1,
            "num_attention_heads=12 does not divide hidden_size=100; choose a hidden_size of 96 or 108, or give "
            "--kv-channels.",
        ),
        (
            {"position_embedding_type": "rope", "rotary_percent": 0.55},
            1,
            "Rotary embedding turns pairs, but rotary_percent=0.55 of head size 64 is 35; choose a rotary_percent of "
            "0.53125 or another head size.",
        ),
        (
            {"seq_length": 1025, "sequence_parallel": True, "tensor_model_parallel_size": 2},
            2,
            "--sequence-parallel splits seq_length=1025 over tensor_model_parallel_size=2, which does not divide it; "
            "choose a seq_length of 1024 or 1026.",
        ),
        (
            {"max_position_embeddings": 512},
            1,
            "seq_length=1024 is longer than max_position_embeddings=512; shorten the one to 512 or raise the other to "
            "1024.",
        ),
        (
            {"recompute_granularity": "full", "recompute_num_layers": 13},
            1,
            "recompute_num_layers=13 is above num_layers=12; choose 1 to 12.",
        ),
        (
            {"global_batch_size": 10, "micro_batch_size": 2},
            4,
            "global_batch_size=10 is not a multiple of micro_batch_size x data size = 2 x 4 = 8; choose 8 or 16.",
        ),
        (
            {"global_batch_size": 3, "micro_batch_size": 2},
            4,
            "global_batch_size=3 is not a multiple of micro_batch_size x data size = 2 x 4 = 8; choose 8.",
        ),
        (
            {"global_batch_size": 16, "rampup_batch_size": (16, 4, 9)},
            1,
            "rampup_batch_size starts at 16, which is not below global_batch_size=16; start lower or leave the ramp-up "
            "out.",
        ),
        (
            {"global_batch_size": 16, "rampup_batch_size": (4, 5, 9)},
            1,
            "rampup_batch_size grows from 4 by 5, which does not reach global_batch_size=16; choose an increment that "
            "divides 12.",
        ),
        (
            {"global_batch_size": 16, "rampup_batch_size": (7, 3, 9)},
            1,
            None,
        ),
        (
            {"train_iters": None},
            1,
            "The length of the run is not given; give one of --train-iters, --train-samples, --train-tokens or "
            "--train-epochs.",
        ),
        (
            {"train_tokens": 9},
            1,
            "The length of the run is given 2 times, train_iters=10 and train_tokens=9; give one of --train-iters, "
            "--train-samples, --train-tokens or --train-epochs, or samples and tokens, of which the shorter counts.",
        ),
        ({"train_iters": None, "train_tokens": 9, "train_samples": 9}, 1, None),
        ({"global_batch_size": 16, "micro_batch_size": 2, "gradient_accumulation_steps": 2}, 4, None),
        (
            {"global_batch_size": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
            4,
            "global_batch_size=32 contradicts gradient_accumulation_steps=2: micro_batch_size x data size x steps = 2 "
            "x 4 x 2 = 16; leave one out, or give gradient_accumulation_steps=4.",
        ),
        ({"min_lr": 1e-3, "lr": 1e-4}, 1, "min_lr=0.001 is above lr=0.0001; give a min_lr of at most lr."),
        (
            {"lr_warmup_iters": 5, "lr_decay_samples": 9},
            1,
            "Warm-up and decay are given in iterations and in samples (lr_warmup_iters=5 and lr_decay_samples=9); "
            "give both in one unit.",
        ),
        (
            {"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1},
            1,
            "The warm-up is given twice (lr_warmup_iters=5, lr_warmup_fraction=0.1); give a length or a fraction.",
        ),
        (
            {"lr_warmup_iters": 9, "lr_decay_iters": 9},
            1,
            "lr_warmup_iters=9 leaves nothing of lr_decay_iters=9; give a warm-up below 9.",
        ),
        (
            {"lr_decay_style": "vaswani"},
            1,
            "lr_decay_style=vaswani needs a warm-up; give --lr-warmup-iters (4000 in the paper).",
        ),
        (
            {"lr_decay_style": "vaswani", "lr_warmup_samples": 9},
            1,
            "lr_decay_style=vaswani counts steps, but lr_warmup_samples is in samples; give --lr-warmup-iters.",
        ),
        ({"fp16": True, "bf16": True}, 1, "--fp16 and --bf16 are both given; choose one."),
        (
            {"initial_loss_scale": 1000.0},
            1,
            "initial_loss_scale=1000 is not a power of two of 1 or more; choose 1024.",
        ),
        ({"initial_loss_scale": 0.5}, 1, "initial_loss_scale=0.5 is not a power of two of 1 or more; choose 1."),
        ({"min_loss_scale": 1.5}, 1, "min_loss_scale=1.5 is not whole; choose 2."),
        ({"save_interval": 5}, 1, "save_interval=5 needs a folder; give --save DIR."),
        ({"resume": "must"}, 1, "--resume must needs the folder of the run to go on with; give --save DIR."),
        ({"finetune": True}, 1, "--finetune needs weights to start from; give --load DIR."),
        (
            {"overwrite": True},
            1,
            "--overwrite empties the run folder, but --resume is auto; give --resume never with it.",
        ),
        ({"load": "/none"}, 1, "load=/none is not a folder; give a folder of checkpoints."),
        ({"load": "/none/", "save": "/none"}, 1, None),
        (
            {"load": "/none", "save": "/none", "finetune": True},
            1,
            "--finetune begins a new run with the weights of load=/none, which is the folder this run saves to; give "
            "another --save DIR.",
        ),
        (
            {"load": "/tmp", "save": "/", "resume": "never", "overwrite": True},
            1,
            "--overwrite would empty save=/, where load=/tmp lies; give another --save DIR.",
        ),
        (
            {"run_dir": "/dev/null/deep"},
            1,
            "run_dir=/dev/null/deep cannot be a folder, since /dev/null is a file; give another.",
        ),
        (
            {"tensorboard_dir": "/dev/null"},
            1,
            "tensorboard_dir=/dev/null cannot be a folder, since /dev/null is a file; give another.",
        ),
        ({"tensorboard_dir": "none"}, 1, None),
        ({"deepspeed_config": "/none"}, 1, "deepspeed_config=/none is not a file; give the path of a DeepSpeed JSON."),
        (
            {"vocab_size": None},
            1,
            "The size of the vocabulary is unknown; give --tokenizer-type with its files, or --vocab-size.",
        ),
        (
            {"context_parallel_size": 2, "seq_length": 1022, "attention_dropout": 0.0},
            2,
            "context_parallel_size=2 cuts seq_length=1022 into 2 x 2 chunks, which do not divide it; choose a "
            "seq_length of 1020 or 1024.",
        ),
        (
            {"context_parallel_size": 2},
            2,
            "attention_dropout=0.1 does not go with cp_comm_type=p2p, which has no probabilities to drop; choose "
            "--attention-dropout 0, or --cp-comm-type a2a.",
        ),
        ({"context_parallel_size": 2, "cp_comm_type": "a2a"}, 2, None),
        (
            {"context_parallel_size": 4, "cp_comm_type": "a2a", "tensor_model_parallel_size": 2, "num_query_groups": 4},
            8,
            "cp_comm_type=a2a shares 6 query heads and 2 key/value heads of a tensor rank out over "
            "context_parallel_size=4 ranks, which do not divide them; choose 1, 2 or 6, or --cp-comm-type p2p.",
        ),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
                "seq_length": 1020,
                "attention_dropout": 0.0,
            },
            8,
            "--sequence-parallel splits what context_parallel_size=2 leaves of seq_length=1020, 510 tokens, over "
            "tensor_model_parallel_size=4, which does not divide it; choose a seq_length of 1016 or 1024.",
        ),
        (
            {"context_parallel_size": 3, "seq_length": 1536, "max_position_embeddings": 1536, "attention_dropout": 0.0},
            4,
            "tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = 1 x 1 x 3 = 3 does "
            "not divide the number of ranks=4; choose a context_parallel_size of 1, 2 or 4.",
        ),
        ({"zero_stage": 4}, 1, "zero_stage=4 does not exist; choose 0, 1, 2 or 3."),
        ({"hidden_dropout": 1.0}, 1, "hidden_dropout=1.0 is out of range; give a number from 0 to below 1."),
        ({"micro_batch_size": 0}, 1, "micro_batch_size=0 is too small; give 1 or more."),
        ({"lr": 0.0}, 1, "lr=0.0 is too small; give a number above 0."),
        ({"lr": math.nan}, 1, "lr=nan is not a finite number."),
        ({"min_loss_scale": math.inf}, 1, "min_loss_scale=inf is not a finite number."),
        ({"rotary_percent": 0.0}, 1, "rotary_percent=0.0 is out of range; give above 0 up to 1."),
        ({"rampup_batch_size": (0, 1, 1)}, 1, "rampup_batch_size has the value 0; give three numbers of 1 or more."),
    ],
)
def test_a_broken_rule_says_its_numbers_and_the_way_out(fields, world_size, sentence):
    assert problems(world_size, **fields) == ([] if sentence is None else [sentence])


def test_a_ramp_up_must_fit_the_layout():
    found = problems(2, global_batch_size=16, rampup_batch_size=(7, 9, 100), micro_batch_size=2)
    assert [sentence.split(";")[0] for sentence in found] == [
        "The start 7 of rampup_batch_size is not a multiple of micro_batch_size x data size = 2 x 2 = 4",
        "The increment 9 of rampup_batch_size is not a multiple of micro_batch_size x data size = 2 x 2 = 4",
    ]


def test_all_problems_are_said_at_once():
    assert (
        len(problems(8, tensor_model_parallel_size=8, hidden_dropout=2.0, train_iters=None, fp16=True, bf16=True)) == 4
    )


def test_every_number_has_a_range():
    numbers = {
        name
        for section in sources.field_types().values()
        for name, expected in section.items()
        if any(kind in (expected, *getattr(expected, "__args__", ())) for kind in (int, float))
    }
    ranged = {name for names in check._AT_LEAST.values() for name in names.split()}
    ranged |= {*check._ABOVE_ZERO.split(), *check._FRACTIONS.split(), "rotary_percent", "zero_stage"}
    ranged |= {"fim_rate", "fim_spm_rate"}
    assert numbers == ranged


@given(st.data())
def test_any_number_gives_sentences_and_never_an_exception(data):
    names = sorted({name for names in check._AT_LEAST.values() for name in names.split()})
    fields = {name: data.draw(st.integers(-2, 9)) for name in data.draw(st.lists(st.sampled_from(names), max_size=6))}
    for sentence in problems(data.draw(st.integers(1, 9)), **fields):
        assert sentence.endswith(".")


def test_choices_that_are_offered_are_accepted():
    for tensor in range(1, 13):
        found = problems(tensor, tensor_model_parallel_size=tensor, num_query_groups=4, hidden_size=768)
        legal = tensor in check.divisors(12) and (tensor % 4 == 0 or 4 % tensor == 0)
        assert (found == []) == legal


def test_notices_name_what_has_no_effect():
    assert check.notices(config_of()) == []
    assert "--sequence-parallel" in check.notices(config_of(sequence_parallel=True))[0]
    assert "--cp-comm-type a2a" in check.notices(config_of(cp_comm_type="a2a"))[0]
    assert "--deepspeed_config" in check.notices(config_of(deepspeed_config="a.json", zero_stage=0))[0]
    assert check.notices(config_of(deepspeed_config="a.json", zero_stage=0, bf16=True)) == []
    lean = {"memory_efficient_layer_norm": True}
    assert "--memory-efficient-layer-norm" in check.notices(config_of(**lean, norm_backend="torch"))[0]
    assert check.notices(config_of(**lean)) == check.notices(config_of(**lean, norm_backend="apex")) == []


def test_fp16_needs_a_device_that_has_it():
    assert check.precision_problems("fp16", "cuda", True) == check.precision_problems("bf16", "cpu", False) == []
    assert "cpu" in check.precision_problems("fp16", "cpu", False)[0]


def test_divisors():
    for number in range(1, 200):
        assert check.divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_sections_are_not_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().model.num_layers = 3
