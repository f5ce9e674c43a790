"""Every row of the table of Megatron's flags does what it says, and the documentation is the table."""

import dataclasses
import functools
import typing
from pathlib import Path

import pytest
import yaml

from megatron_lite import log
from megatron_lite.config import cli, sources
from megatron_lite.config.megatron_argv import rewrite
from megatron_lite.config.megatron_flags import BY_NAME, GROUPS, KINDS, Flag, field_name, markdown
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = sources.values_of(RunConfig())
READ_AT_ONCE = ("load_hf", "data_args_path", "per_split_data_args_path")
"""Fields that name a file which the command line itself reads."""
ROWS = [flag for flags in GROUPS.values() for flag in flags]
PRETRAIN_FLAGS = """
adam-beta1 adam-beta2 apply-layernorm-1p attention-backend attention-dropout bf16 calculate-per-token-loss
checkpoint-activations checkpoint-in-cpu ckpt-format clip-grad context-parallel-size cpu-optimizer
create-moe-param-group cross-entropy-loss-fusion data-cache-path data-efficiency-curriculum-learning data-impl
data-path decoupled-lr decoupled-min-lr deepspeed deepspeed-activation-checkpointing deepspeed_config
disable-bias-linear disable-moe-token-dropping distributed-backend distributed-timeout-minutes
ds-sequence-parallel-fpdt ds-sequence-parallel-fpdt-chunk-size ds-sequence-parallel-fpdt-offloading
ds-sequence-parallel-size empty-unused-memory-level enable-zbh1-exact-semantics enable-zbh1-pipeline eval-interval
eval-iters exit-duration-in-mins exit-interval ffn-hidden-size fp16 fp8-amax-compute-algo fp8-amax-history-len
fp8-format fp8-param-gather global-batch-size grad-reduce-in-bf16 group-query-attention hidden-dropout hidden-size
hysteresis init-method-std kv-channels load log-batch-size-to-tensorboard log-interval
log-optimizer-states-to-tensorboard log-throughput log-timers-to-tensorboard log-validation-ppl-to-tensorboard
loss-scale lr lr-decay-iters lr-decay-samples lr-decay-style lr-decay-tokens lr-warmup-fraction lr-warmup-iters
lr-warmup-samples lr-warmup-tokens make-vocab-size-divisible-by manual-gc max-position-embeddings merge-file
micro-batch-size min-lr mock-data moe-eval-capacity-factor moe-expert-parallel-size moe-loss-coeff moe-min-capacity
moe-train-capacity-factor no-async-tensor-model-parallel-allreduce no-create-attention-mask-in-dataloader
no-masked-softmax-fusion no-mmap-bin-files no-pipeline-parallel no-query-key-layer-scaling normalization
num-attention-heads num-experts num-key-value-heads num-layers num-query-groups num-workers optimizer
overlap-grad-reduce overlap-param-gather override-opt_param-scheduler pipeline-model-parallel-size
position-embedding-type profile profile-step-end profile-step-start rampup-batch-size random-ltd
recompute-granularity recompute-method recompute-num-layers rotary-base rotary-percent
rotary-position-embeddings-theta save save-interval seed seq-length sequence-parallel split step-batch-size-schedule
swiglu tensor-model-parallel-size tensorboard-dir tensorboard-queue-size tiktoken-pattern timing-log-level
tokenizer-model tokenizer-type train-doc-idx-path train-iters train-sample-idx-path train-samples
train-shuffle-idx-path train-tokens universal-checkpoint untie-embeddings-and-output-weights
use-distributed-optimizer use-flash-attn use-flash-attn-triton use-flash-attn-v2 use-mcore-models
use-rotary-position-embeddings vocab-file vocab-size wandb-exp-name wandb-project wandb-save-dir weight-decay
zero-stage
"""
"""The flags that the GPT pretraining scripts of Megatron-LM and Megatron-DeepSpeed pass."""

SCRIPT = """
--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 2 --init-method-std
0.006 --lr-decay-tokens 300000000000 --lr-warmup-tokens 375000000 --micro-batch-size 4 --exit-duration-in-mins
30000000 --global-batch-size 256 --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048
--max-position-embeddings 2048 --train-tokens 300000000000 --lr 3e-4 --min-lr 1e-6 --lr-decay-style cosine --split
949,50,1 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 1000 --weight-decay 0.1 --clip-grad
1.0 --hysteresis 2 --num-workers 0 --fp16 --load ckpt --save ckpt --tensorboard-queue-size 1
--log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tb
--no-pipeline-parallel --data-path my_data --data-impl mmap --vocab-file v.json --merge-file m.txt --num-experts 1
--moe-loss-coeff 0.01 --deepspeed --deepspeed_config ds.json --zero-stage 2 --pipeline-model-parallel-size 1
--checkpoint-activations --deepspeed-activation-checkpointing
"""
"""Arguments as the launch scripts of Megatron-DeepSpeed pass them."""


def load(*argv: str) -> dict:
    return sources.values_of(cli.load(argv)[0])


def rewritten(*argv: str) -> list[str]:
    return rewrite(argv, DEFAULTS)


def rows(*kinds: str):
    assert set(kinds) <= set(KINDS)
    return pytest.mark.parametrize("row", [row for row in ROWS if row.kind in kinds], ids=lambda row: row.name)


def example(field: str) -> tuple[str, ...]:
    """Words that give a field a value other than its default."""
    expected = sources.field_types()[sources.section_of()[field]][field]
    arguments = [argument for argument in typing.get_args(expected) if argument is not type(None)]
    if typing.get_origin(expected) is tuple or (arguments and typing.get_origin(arguments[0]) is tuple):
        return ("3", "4", "5")
    if typing.get_origin(expected) is typing.Literal or (
        arguments and typing.get_origin(arguments[0]) is typing.Literal
    ):
        choices = arguments if typing.get_origin(expected) is typing.Literal else typing.get_args(arguments[0])
        return (str(next(choice for choice in choices if choice != DEFAULTS[field])),)
    return () if expected is bool else ("3",)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "once", lines.append)
    return lines


def test_every_flag_of_the_pretraining_scripts_has_a_row():
    assert [flag for flag in PRETRAIN_FLAGS.split() if field_name(f"--{flag}") not in BY_NAME] == []


def test_no_flag_has_two_rows():
    assert len(BY_NAME) == len(ROWS)


def test_the_documentation_is_the_table():
    assert (ROOT / "docs" / "megatron_flags.md").read_text(encoding="utf-8") == markdown()


@rows("same")
def test_same(row: Flag, said):
    field = field_name(row.name)
    if field in READ_AT_ONCE:
        assert rewritten(row.name, "paths") == [row.name, "paths"]
        return
    assert load(row.name, *example(field))[field] != DEFAULTS[field]
    assert row.takes == 0 or example(field)
    assert said == []


@functools.cache
def all_different() -> str:
    """A configuration file, as text, in which every field has another value than its default."""
    document: dict[str, dict] = {}
    for field, section in sources.section_of().items():
        words = example(field)
        value = (not DEFAULTS[field]) if sources.field_types()[section][field] is bool else " ".join(words)
        document.setdefault(section, {})[field] = value
    return yaml.safe_dump(document)


def test_every_field_can_differ_from_its_default():
    values = sources.values_of(sources.override(RunConfig(), sources.parse(all_different(), "all")))
    assert [name for name, value in values.items() if value == DEFAULTS[name]] == []


@rows("mapped")
def test_mapped(row: Flag, said, tmp_path):
    """From the defaults and from their opposite, so that a flag which asks for a default is seen to do so."""
    target = field_name(row.becomes[0])
    field = target if target in DEFAULTS else target.removeprefix("no_")
    plain = next(iter(row.values), None) or " ".join(example(field))
    given = () if row.takes == 0 else (plain,)
    document = yaml.safe_load(all_different())
    for name in READ_AT_ONCE:
        del document[sources.section_of()[name]][name]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(document))
    other = ("--config", str(tmp_path / "all.yaml"))
    before, after = load(*other), load(*other, row.name, *given)
    changed = load(row.name, *given)
    assert field in DEFAULTS and said == []
    assert changed[field] == after[field], "what it sets does not depend on what was there"
    for base, result in ((DEFAULTS, changed), (before, after)):
        assert {name for name, value in result.items() if value != base[name]} <= {field}
    assert changed[field] != DEFAULTS[field] or after[field] != before[field], "it sets something"
    for old, new in row.values.items():
        assert str(load(row.name, old)[field]) == new
    for value in row.refused_values:
        with pytest.raises(ConfigError, match="is refused"):
            rewritten(row.name, value)


@rows("implied")
def test_implied(row: Flag):
    field = field_name(row.becomes[0])
    assert str(load(row.name)[field]) == row.becomes[1]
    assert load(row.name, row.becomes[0], "3")[field] == load(row.becomes[0], "3", row.name)[field] == 3


@rows("silent", "notice")
def test_accepted_without_effect(row: Flag, said):
    assert rewritten(row.name, *["1"] * (row.takes or 0)) == []
    assert len(said) == (row.kind == "notice")
    assert not said or (row.reason in said[0] and row.name in said[0])
    with pytest.raises(ConfigError, match="takes"):
        rewritten(row.name, *["1"] * (1 - row.takes))


@rows("neutral")
def test_neutral(row: Flag, said):
    for value in row.neutral:
        assert rewritten(row.name, value) == rewritten(f"{row.name}={value}") == []
    with pytest.raises(ConfigError) as caught:
        rewritten(row.name, "16")
    assert row.reason in str(caught.value) and f"{row.name} 16" in str(caught.value)


@rows("refused")
def test_refused(row: Flag):
    for values in ((), ("16",)):
        with pytest.raises(ConfigError) as caught:
            rewritten(row.name, *values)
        assert row.reason in str(caught.value) and row.name in str(caught.value)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_complete(row: Flag):
    assert row.kind in ("same", "mapped", "implied") or row.reason
    assert bool(row.becomes) == (row.kind in ("mapped", "implied"))
    assert bool(row.neutral) == (row.kind == "neutral")
    # A flag of our own must not be taken away by the table.
    assert row.kind in ("same", "mapped") or field_name(row.name) not in DEFAULTS | vars(cli.LaunchOptions())


def test_tokens_become_samples_by_the_sequence_length(tmp_path):
    assert load("--lr-decay-tokens", "10241", "--seq-length", "512")["lr_decay_samples"] == 21
    assert load("--encoder-seq-length", "512", "--lr-warmup-tokens", "10240")["lr_warmup_samples"] == 20
    assert load("--seq_length=512", "--lr-warmup-tokens", "10240")["lr_warmup_samples"] == 20
    file = tmp_path / "run.yaml"
    file.write_text("data: {seq_length: 256}")
    assert load("--lr-decay-tokens", "512", "--config", str(file))["lr_decay_samples"] == 2
    with pytest.raises(ConfigError, match="whole numbers"):
        load("--lr-decay-tokens", "many")


@pytest.mark.parametrize(
    "words",
    [
        "--use-distributed-optimizer --zero-stage 3",
        "--zero-stage 3 --use-distributed-optimizer",
        "--use-rotary-position-embeddings --position-embedding-type none",
        "--position-embedding-type none --use-rotary-position-embeddings",
        "--disable-bias-linear --add-bias-linear",
        "--num-key-value-heads 2 --num-query-groups 4",
    ],
)
def test_flags_that_contradict_each_other_are_both_named(words):
    with pytest.raises(ConfigError, match="contradict each other") as caught:
        load(*words.split())
    assert all(word in str(caught.value) for word in words.split() if word.startswith("--"))


def test_flags_that_agree_and_repeated_flags_are_accepted():
    assert rewritten("--zero-stage", "1", "--use-distributed-optimizer") == ["--zero-stage", "1"] * 2
    assert load("--lr", "1", "--lr", "2")["lr"] == 2
    assert not load("--bf16", "--no-bf16")["bf16"]


def test_a_group_query_script_keeps_the_groups_of_its_file():
    argv = rewrite(["--group-query-attention"], DEFAULTS | {"num_query_groups": 8})
    assert argv == []


def test_a_whole_script_of_megatron_deepspeed(said):
    config, _ = cli.load(SCRIPT.split())
    assert config.optimizer.lr_decay_samples == -(-300_000_000_000 // 2048)
    assert config.optimizer.override_opt_param_scheduler and config.precision.fp16
    assert config.training.recompute_granularity == "full" and config.parallel.zero_stage == 2
    assert config.data.data_path == ("my_data",) and len(said) == 7


def test_rows_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROWS[0].kind = "refused"
