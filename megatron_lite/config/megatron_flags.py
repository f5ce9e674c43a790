"""What each flag of Megatron-LM's and Megatron-DeepSpeed's GPT scripts means here: one row a flag.

`megatron_argv.rewrite` acts on the table, docs/megatron_flags.md is written from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from megatron_lite.config.command_line import field_name

Kind = Literal["same", "mapped", "implied", "silent", "notice", "neutral", "refused"]

KINDS: Mapping[Kind, str] = {
    "same": "same name, same meaning",
    "mapped": "stands for another flag or value",
    "implied": "stands for another flag unless that one is given",
    "silent": "accepted without effect; launchers and scripts pass it",
    "notice": "accepted without effect; the run says why",
    "neutral": "accepted at the value that changes nothing, refused at others",
    "refused": "refused with the reason",
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of Megatron: how many values follow it and what it means here.

    `takes` is 0, 1 or None for any number. `becomes` is the argv in its place, where {} stands for
    the values and {samples} for a number of tokens as samples. `values` renames values;
    `refused_values` refuses some, `neutral` admits some alone.
    """

    name: str
    kind: Kind
    takes: int | None = 1
    becomes: tuple[str, ...] = ()
    reason: str = ""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused_values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    neutral: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        """The last column of the documentation."""
        parts = []
        if self.becomes and self.becomes[0] != self.name:
            becomes = " ".join(self.becomes).replace("{samples}", "TOKENS / seq_length").replace("{}", "VALUE")
            parts.append(f"`{becomes}`")
        parts += [f"`{old}` is `{new}`" for old, new in self.values.items()]
        for reason in dict.fromkeys(self.refused_values.values()):
            values = ", ".join(f"`{value}`" for value, why in self.refused_values.items() if why == reason)
            parts.append(f"refused at {values}: {reason}")
        if self.neutral:
            parts.append(f"only {' or '.join(f'`{value}`' for value in self.neutral)}")
        parts.append(self.reason)
        return "; ".join(part for part in parts if part)


def _same(names: str, takes: int | None = 1) -> list[Flag]:
    return [Flag(name, "same", takes) for name in names.split()]


def _mapped(name: str, becomes: str, takes: int = 0, reason: str = "", **kwargs) -> Flag:
    return Flag(name, "mapped", takes, tuple(becomes.split()), reason, **kwargs)


def _notice(names: str, reason: str, takes: int | None = 0) -> list[Flag]:
    return [Flag(name, "notice", takes, reason=reason) for name in names.split()]


def _refused(names: str, reason: str) -> list[Flag]:
    return [Flag(name, "refused", None, reason=reason) for name in names.split()]


def _neutral(names: str, values: str, reason: str, takes: int | None = 1) -> list[Flag]:
    return [Flag(name, "neutral", takes, reason=reason, neutral=tuple(values.split())) for name in names.split()]


_LATER = "not in this version"
_MOE = f"mixture of experts is {_LATER}"
_STAGES = "stages of unequal length are given by --pipeline-model-parallel-layout"
_CHUNKED = f"attention in chunks that are offloaded is {_LATER}; --context-parallel-size shortens activations"
_FP8 = f"fp8 is {_LATER}; use --bf16"
_FUSION = "fused kernels change speed alone, and are used wherever the device has them"
_SDPA = "torch picks the flash, memory-efficient or plain kernel that the device has"
_ATTENTION = "attention is chosen by --attention-backend"
_TENSORBOARD = "every metric is in metrics.jsonl and TensorBoard"
_OVERLAP = 'communication is DeepSpeed\'s; tune it by --deepspeed_config, "zero_optimization": {"overlap_comm": ...}'
_DEEPSPEED_ZERO = 'give it in --deepspeed_config, under "zero_optimization"'
_MMAP = "token files are always memory-mapped .bin/.idx pairs"
_ORDER = "the order of samples is computed from the seed, so there are no index files to place or cache"
_CURRICULUM = (
    "DeepSpeed's curriculum is in its JSON; here sequences grow by --curriculum-seq-length-min (min_difficulty), "
    "--curriculum-seq-length-samples (total_curriculum_step x the batch), --curriculum-seq-length-schedule "
    "(schedule_type), --curriculum-seq-length-step (difficulty_step) and --curriculum-seq-length-root (root_degree)"
)
_LATER_DROPPING = f"token dropping and index files of samples are {_LATER}"
_PROFILE = f"profiling is {_LATER}; DeepSpeed's flops_profiler can be set in --deepspeed_config"
_WSD = f"this decay style is {_LATER}"
_COUNTED = "losses and gradients are always divided by the number of target tokens of the whole batch"
_FP32_GRADIENTS = "gradients are always accumulated in fp32"
_ACTIVATIONS = "activations are divided over tensor ranks by --sequence-parallel"
_REPLICAS = "tensor ranks and tied embeddings are compared too, and any difference ends the run"
_STRAGGLERS = "the slowest rank is in metrics.jsonl, and said when it stays slow"
_HANGS = "a run that hangs is always noticed and ended; --hang-limit-minutes sets when"
_DEFAULT = "it is the default"
_INTERNAL = "it chooses Megatron's own code, and there is one implementation here"

_MODEL = [
    *_same(
        "--num-layers --hidden-size --num-attention-heads --num-query-groups --kv-channels --ffn-hidden-size "
        "--max-position-embeddings --norm-epsilon --rotary-base --rotary-percent --rope-scaling-factor "
        "--hidden-dropout --attention-dropout --init-method-std --vocab-size --make-vocab-size-divisible-by"
    ),
    *_same("--memory-efficient-layer-norm", 0),
    *_same(
        "--swiglu --add-qkv-bias --qk-layernorm --untie-embeddings-and-output-weights --rotary-interleaved "
        "--use-rope-scaling",
        0,
    ),
    _mapped("--normalization", "--normalization {}", 1, values={"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}),
    _mapped(
        "--position-embedding-type",
        "--position-embedding-type {}",
        1,
        refused_values={
            name: f"it is {_LATER}; use learned_absolute, rope or none"
            for name in ("relative", "yarn", "mrope", "alibi")
        },
    ),
    Flag(
        "--group-query-attention",
        "implied",
        0,
        ("--num-query-groups", "1"),
        "as in Megatron, one group unless --num-query-groups says more",
    ),
    _mapped("--encoder-num-layers", "--num-layers {}", 1),
    _mapped("--num-key-value-heads", "--num-query-groups {}", 1),
    _mapped("--layernorm-epsilon", "--norm-epsilon {}", 1),
    _mapped("--use-rotary-position-embeddings", "--position-embedding-type rope"),
    _mapped("--no-position-embedding", "--position-embedding-type none"),
    _mapped("--rotary-position-embeddings-theta", "--rotary-base {}", 1),
    _mapped("--disable-bias-linear", "--no-add-bias-linear"),
    _mapped("--squared-relu", "--activation-func squared_relu"),
    _mapped("--openai-gelu", "--activation-func gelu_tanh"),
    _mapped("--init-method-xavier-uniform", "--init-method xavier_uniform"),
    *_notice("--no-bias-gelu-fusion", f"{_FUSION}; the exact GELU is --activation-func gelu"),
    _mapped(
        "--attention-backend",
        "--attention-backend {}",
        1,
        _SDPA,
        values={"flash": "sdpa", "fused": "sdpa", "unfused": "fused_softmax", "local": "fused_softmax"},
    ),
    *(
        _mapped(name, "--attention-backend sdpa", reason=_SDPA)
        for name in ("--use-flash-attn", "--use-flash-attn-v1", "--use-flash-attn-v2", "--use-flash-attn-triton")
    ),
    _mapped("--use-flash-attn-builder", "--attention-backend sdpa", reason=_SDPA),
    *_notice("--no-create-attention-mask-in-dataloader", "causal masks are never made as tensors to train on"),
    *_notice("--transformer-impl", f"{_INTERNAL}; {_ATTENTION}", 1),
    _mapped("--disable-mem-efficient-ln", "--no-memory-efficient-layer-norm"),
    *_notice("--attention-softmax-in-fp32", "softmax is computed in fp32 always"),
    *_notice(
        "--no-query-key-layer-scaling --apply-query-key-layer-scaling",
        "attention scores are never scaled by the layer number, which changes rounding alone",
    ),
    *_notice(
        "--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
        "--no-persist-layer-norm --no-gradient-accumulation-fusion --cross-entropy-loss-fusion --bias-gelu-fusion "
        "--bias-dropout-fusion --cross-entropy-fusion",
        _FUSION,
    ),
    *_notice("--use-mcore-models --use-legacy-models --perform-initialization", _INTERNAL),
    *_notice("--use-cpu-initialization", "a weight is the same whatever device and layout it is drawn on"),
    *_refused("--apply-layernorm-1p", f"norm weights stored as gamma - 1 are {_LATER}; leave it out"),
    *_refused("--multi-latent-attention --mtp-num-layers --spec", f"this model choice is {_LATER}"),
    *_refused("--apply-residual-connection-post-layernorm", f"it is {_LATER}; --norm-position post is the nearest"),
    *_refused("--fp32-residual-connection", f"it is {_LATER}; the residual stream has the dtype of the model"),
    *_refused(
        "--rotary-seq-len-interpolation-factor",
        f"frequencies slowed down all alike are {_LATER}; --use-rope-scaling slows the slow ones",
    ),
]

_PARALLEL = [
    *_same("--tensor-model-parallel-size --zero-stage --deepspeed_config --distributed-timeout-minutes"),
    *_same("--sequence-parallel", 0),
    Flag("--local-rank", "silent", 1, reason="ranks are read from the environment that the launcher sets"),
    Flag("--deepspeed", "silent", 0, reason="DeepSpeed always runs the step"),
    *_notice("--deepspeed-mpi", "ranks are read from the environment that the launcher sets"),
    _mapped("--use-distributed-optimizer", "--zero-stage 1"),
    _mapped("--use-torch-fsdp2", "--zero-stage 3"),
    _mapped("--use-megatron-fsdp", "--zero-stage 3"),
    _mapped(
        "--data-parallel-sharding-strategy",
        "--zero-stage {}",
        1,
        values={"no_shard": "0", "optim": "1", "optim_grads": "2", "optim_grads_params": "3"},
    ),
    *_notice("--no-pipeline-parallel", "there is no other pipeline engine to turn off"),
    *_notice("--no-async-tensor-model-parallel-allreduce --tp-comm-overlap --use-ring-exchange-p2p", _OVERLAP),
    *_same("--overlap-grad-reduce", 0),
    *_same("--ddp-bucket-size"),
    *_notice("--overlap-param-gather --delay-grad-reduce --no-delay-grad-reduce", _OVERLAP),
    *_notice("--overlap-param-gather-with-optimizer-step --align-grad-reduce --no-align-param-gather", _OVERLAP),
    *_notice("--ddp-num-buckets", "gradients are summed in buckets of --ddp-bucket-size", 1),
    *_notice("--ddp-average-in-collective --calculate-per-token-loss", _COUNTED),
    *_notice("--grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32", _FP32_GRADIENTS),
    *_notice("--distributed-backend", "the backend follows the device: nccl on a GPU, gloo on a CPU", 1),
    *_same("--context-parallel-size"),
    _mapped(
        "--ds-sequence-parallel-size",
        "--context-parallel-size {}",
        1,
        "by all-to-all, as there, with --cp-comm-type a2a",
    ),
    _mapped(
        "--cp-comm-type",
        "--cp-comm-type {}",
        1,
        refused_values={name: f"it is {_LATER}; use p2p or a2a" for name in ("allgather", "a2a+p2p")},
    ),
    _mapped("--force-ds-sequence-parallel", "--cp-comm-type a2a"),
    *_neutral("--num-distributed-optimizer-instances", "1", f"a sharded group inside the data ranks is {_LATER}"),
    *_same(
        "--pipeline-model-parallel-size --num-layers-per-virtual-pipeline-stage "
        "--num-virtual-stages-per-pipeline-rank --pipeline-model-parallel-layout"
    ),
    _mapped("--enable-zbh1-pipeline", "--pipeline-schedule InterleavedZeroBubble"),
    *_notice("--enable-zbh1-exact-semantics", "gradients are always clipped by the exact norm, before the step"),
    *_notice("--overlap-p2p-communication", "stages always send and receive beside computing"),
    *_refused("--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers", _STAGES),
    *_refused("--pipeline-model-parallel-split-rank", "there is no encoder to split from a decoder"),
    *_refused(
        "--ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-chunk-size --ds-sequence-parallel-fpdt-offloading",
        _CHUNKED,
    ),
    *_refused(
        "--zero-contigious-gradients --zero-reduce-bucket-size --zero-allgather-bucket-size --zero-reduce-scatter "
        "--remote-device --use-pin-memory",
        _DEEPSPEED_ZERO,
    ),
    *_refused(
        "--cpu-optimizer --optimizer-cpu-offload --optimizer-offload-fraction",
        'offload by --deepspeed_config: "zero_optimization": {"offload_optimizer": {"device": "cpu"}}',
    ),
    *_neutral("--num-experts", "1", _MOE, None),
    *_neutral("--moe-expert-parallel-size --expert-model-parallel-size --expert-tensor-parallel-size", "1", _MOE),
    *_notice(
        "--moe-loss-coeff --moe-train-capacity-factor --moe-eval-capacity-factor --moe-min-capacity "
        "--moe-aux-loss-coeff --moe-z-loss-coeff --moe-token-dispatcher-type --moe-router-load-balancing-type "
        "--moe-router-topk",
        f"the model has no experts to apply it to; {_MOE}",
        1,
    ),
    *_notice(
        "--disable-moe-token-dropping --create-moe-param-group --use-tutel --moe-grouped-gemm",
        f"the model has no experts to apply it to; {_MOE}",
    ),
]

_PRECISION = [
    *_same("--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis"),
    *_same("--fp16 --bf16", 0),
    *_notice("--fp16-lm-cross-entropy", "the loss is always computed in fp32"),
    *_refused(
        "--fp8-format --fp8-hybrid --fp8-e4m3 --fp8-margin --fp8-interval --fp8-recipe --fp8-amax-history-len "
        "--fp8-amax-compute-algo --fp8-param-gather --no-fp8-wgrad --fp4-format",
        _FP8,
    ),
]

_OPTIMIZER = [
    *_same(
        "--lr --min-lr --lr-decay-iters --lr-decay-samples --lr-warmup-iters --lr-warmup-samples "
        "--lr-warmup-fraction --lr-warmup-init --weight-decay --adam-beta1 --adam-beta2 --adam-eps --sgd-momentum "
        "--clip-grad"
    ),
    _mapped(
        "--optimizer",
        "--optimizer {}",
        1,
        values={"adam": "adamw"},
        refused_values={name: f"this optimizer is {_LATER}; use adamw" for name in ("lion", "muon", "dist_muon")},
    ),
    _mapped("--lr-decay-style", "--lr-decay-style {}", 1, refused_values={"WSD": _WSD}),
    _mapped("--lr-decay-tokens", "--lr-decay-samples {samples}", 1, "rounded up to whole samples"),
    _mapped("--lr-warmup-tokens", "--lr-warmup-samples {samples}", 1, "rounded up to whole samples"),
    *_same("--override-opt_param-scheduler", 0),
    _mapped("--override-lr-scheduler", "--override-opt-param-scheduler"),
    *_notice("--use-checkpoint-opt_param-scheduler --use-checkpoint-lr-scheduler", _DEFAULT),
    *_neutral("--weight-decay-incr-style", "constant", f"a changing weight decay is {_LATER}"),
    *_refused("--start-weight-decay --end-weight-decay", f"a changing weight decay is {_LATER}; use --weight-decay"),
    *_refused("--lr-wsd-decay-style --lr-wsd-decay-iters --lr-wsd-decay-samples", _WSD),
    *_refused(
        "--decoupled-lr --decoupled-min-lr",
        f"a learning rate of its own for embedding and output head is {_LATER}; use --lr and --min-lr",
    ),
    *_refused(
        "--use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype",
        "masters and gradients are fp32; so is optimizer state, or 8 bits by --optimizer adamw8bit; others are "
        f"{_LATER}",
    ),
]

_DATA = [
    *_same("--data-path --train-data-path --valid-data-path --test-data-path", None),
    *_same("--split --seq-length --num-workers --vocab-file --merge-file --tokenizer-model"),
    *_same("--mock-data", 0),
    _mapped("--encoder-seq-length", "--seq-length {}", 1),
    _mapped(
        "--tokenizer-type",
        "--tokenizer-type {}",
        1,
        "preprocessing under the name `Llama2Tokenizer` begins each document with BOS, as Megatron does; Megatron's "
        "`HuggingFaceTokenizer` also adds what the tokenizer's post-processor adds (`--prepend-bos` here), and its "
        "plain `SentencePieceTokenizer` ends documents with an <EOD> of its own behind the model's pieces (here </s>)",
        values={
            "TikTokenizer": "TiktokenTokenizer",
            "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
            "Llama2Tokenizer": "SentencePieceTokenizer",
            "PretrainedFromHF": "HuggingFaceTokenizer",
            "HFTokenizer": "HuggingFaceTokenizer",
        },
        refused_values={
            "NullTokenizer": "no tokenizer is needed for token files: leave it out and give --vocab-size",
            "BertWordPieceLowerCase": "this is a tokenizer of BERT",
            "BertWordPieceCase": "this is a tokenizer of BERT",
        },
    ),
    _mapped("--tokenizer-name-or-path", "--tokenizer-model {}", 1),
    _mapped(
        "--tiktoken-pattern",
        "--tiktoken-pattern {}",
        1,
        refused_values={name: "give r50k, cl100k, o200k or the regular expression itself" for name in ("v1", "v2")},
    ),
    _mapped("--tiktoken-special-tokens", "--special-tokens {}", None),
    *_notice("--data-cache-path --data-cache-local-path", _ORDER, 1),
    *_notice("--mmap-warmup", _MMAP),
    *_neutral("--data-impl", "mmap infer", _MMAP),
    *_notice("--no-mmap-bin-files", _MMAP),
    *_notice("--legacy-tokenizer", _INTERNAL),
    *_neutral("--dataloader-type", "single", "a run reads every sample of an epoch once, in an order of its own"),
    *_neutral("--vocab-extra-ids --tiktoken-num-special-tokens", "0", "name the tokens by --special-tokens"),
    *_refused("--train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path", _ORDER),
    *_same("--data-args-path --per-split-data-args-path"),
    Flag(
        "--fim-data",
        "implied",
        0,
        ("--fim-rate", "0.5"),
        "as in Megatron unless --fim-rate says more; cuts are between tokens, not characters, and documents keep their "
        "length",
    ),
    *_same("--fim-rate --fim-spm-rate --fim-prefix-token --fim-middle-token --fim-suffix-token"),
    *_notice("--fim-pad-token --fim-eod-token", "nothing is padded, and the tokenizer says what ends a document", 1),
    *_refused("--fim-split-sample --fim-fragment-rate --fim-no-prefix", "documents are permuted whole; leave it out"),
    *_same("--reset-position-ids --reset-attention-mask --eod-mask-loss", 0),
    *_refused("--curriculum-learning-legacy --data-efficiency-curriculum-learning", _CURRICULUM),
    *_refused("--random-ltd --train-idx-path", _LATER_DROPPING),
]

_TRAINING = [
    *_same(
        "--micro-batch-size --global-batch-size --train-iters --train-samples --train-tokens --seed "
        "--recompute-granularity --recompute-method --recompute-num-layers --eval-interval --eval-iters "
        "--exit-interval --exit-duration-in-mins"
    ),
    *_same("--rampup-batch-size", None),
    _mapped("--checkpoint-activations", "--recompute-granularity full"),
    _mapped("--recompute-activations", "--recompute-granularity selective"),
    _mapped("--checkpoint-num-layers", "--recompute-num-layers {}", 1),
    *_notice("--deepspeed-activation-checkpointing", "recompute is set by --recompute-granularity"),
    *_notice("--manual-gc", "garbage collection is Python's own"),
    *_notice("--manual-gc-interval --manual-gc-eval --empty-unused-memory-level", "memory is left to torch", 1),
    *_notice("--exit-signal-handler", "a run always saves and stops on SIGTERM and SIGINT"),
    *_notice("--check-for-nan-in-loss-and-grad", "a loss that is not finite always stops the run"),
    *_refused("--no-check-for-nan-in-loss-and-grad", "a loss that is not finite always stops the run"),
    *_refused("--checkpoint-in-cpu", f"activations in host memory are {_LATER}; use --recompute-granularity full"),
    *_refused("--distribute-saved-activations --distribute-checkpointed-activations", _ACTIVATIONS),
    *_refused("--partition-activations --contigious-checkpointing --synchronize-each-layer", _ACTIVATIONS),
    *_refused("--recompute-modules", f"a choice of modules is {_LATER}; use --recompute-granularity selective"),
    *_refused("--step-batch-size-schedule", f"steps are {_LATER}; --rampup-batch-size grows the batch linearly"),
    *_refused("--decrease-batch-size-if-needed", "give a --global-batch-size that the layout divides"),
    *_refused("--skip-train --eval-only", "evaluate a checkpoint by tools/evaluate.py"),
    *_refused("--train-range --iterations-to-skip", "give the samples to leave out by --skip-samples A:B"),
]

_CHECKPOINT = [
    *_same("--save --save-interval --load --ckpt-step"),
    *_same("--finetune --no-load-optim --no-load-rng --no-save-optim", 0),
    _mapped("--exit-on-missing-checkpoint", "--resume must"),
    *_notice("--no-save-rng", "random states are a few bytes and are always saved"),
    *_notice("--ckpt-format --dist-ckpt-format --ckpt-convert-format", "checkpoints are safetensors files", 1),
    *_notice("--universal-checkpoint --use-dist-ckpt", "every checkpoint loads at another layout"),
    *_notice("--auto-detect-ckpt-format --ckpt-fully-parallel-save --ckpt-fully-parallel-load", _INTERNAL),
    *_notice("--ckpt-assume-constant-structure --no-ckpt-fully-parallel-save", _INTERNAL),
    _mapped("--async-save", "--async-save", reason=_DEFAULT),
    *_refused("--use-checkpoint-args", "start from the run folder's file: --config RUN/config.yaml"),
    *_refused("--pretrained-checkpoint", "give it by --load with --finetune"),
    _mapped("--save-retain-interval", "--keep-every {}", 1, "beside the newest, --keep-last N"),
    *_refused("--non-persistent-save-interval --non-persistent-ckpt-type", f"checkpoints in memory are {_LATER}"),
]

_LOGGING = [
    *_same("--log-interval --tensorboard-dir --wandb-project --wandb-exp-name --wandb-save-dir"),
    *_same("--log-num-zeros-in-grad", 0),
    *_notice(
        "--log-throughput --log-params-norm --log-batch-size-to-tensorboard --log-timers-to-tensorboard "
        "--log-validation-ppl-to-tensorboard --log-memory-to-tensorboard --log-world-size-to-tensorboard "
        "--log-learning-rate-to-tensorboard --no-log-learnig-rate-to-tensorboard --log-loss-scale-to-tensorboard "
        "--no-log-loss-scale-to-tensorboard --log-progress --log-optimizer-states-to-tensorboard",
        f"{_TENSORBOARD}; there are no switches for single ones",
    ),
    *_notice("--tensorboard-queue-size --tensorboard-log-interval", _TENSORBOARD, 1),
    *_notice("--timing-log-level --timing-log-option --logging-level", "console lines have one form", 1),
    _mapped("--check-weight-hash-across-dp-replicas-interval", "--check-weights-interval {}", 1, _REPLICAS),
    *_notice("--log-straggler --disable-straggler-on-startup", _STRAGGLERS),
    *_notice("--straggler-ctrlr-port --straggler-minmax-count", _STRAGGLERS, 1),
    *_notice("--enable-ft-package --calc-ft-timeouts", _HANGS),
    *_notice("--ft-num-warmup-iters", _HANGS, 1),
    *_refused("--wandb-entity", "set it where wandb reads it: the environment variable WANDB_ENTITY"),
    *_refused("--profile --profile-step-start --profile-step-end --profile-ranks --use-pytorch-profiler", _PROFILE),
    *_refused("--profile-backward --record-memory-history --memory-snapshot-path", _PROFILE),
]

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "Model": tuple(_MODEL),
    "Parallel layout": tuple(_PARALLEL),
    "Precision": tuple(_PRECISION),
    "Optimizer": tuple(_OPTIMIZER),
    "Data": tuple(_DATA),
    "Training": tuple(_TRAINING),
    "Checkpoints": tuple(_CHECKPOINT),
    "Logging": tuple(_LOGGING),
}


BY_NAME: Mapping[str, Flag] = {field_name(flag.name): flag for flags in GROUPS.values() for flag in flags}


def markdown() -> str:
    """The table as docs/megatron_flags.md."""
    lines = [
        "# Megatron's flags",
        "",
        "What each flag of Megatron-LM's and Megatron-DeepSpeed's GPT pretraining scripts does in `pretrain_gpt.py`.",
        "Dashes and underscores are alike. A flag that is neither here nor in `--help` is an error that names the",
        "nearest one. This file is written from `megatron_lite/config/megatron_flags.py` by",
        "`python -m megatron_lite.config.megatron_flags > docs/megatron_flags.md`.",
        "",
        *(f"- **{kind}**: {text}" for kind, text in KINDS.items()),
    ]
    for title, flags in GROUPS.items():
        same = ", ".join(f"`{flag.name}`" for flag in flags if flag.kind == "same")
        lines += ["", f"## {title}", "", f"same: {same}", "", "| flag | here | meaning |", "|---|---|---|"]
        lines += [
            f"| `{flag.name}` | {flag.kind} | {flag.meaning.replace('|', '/')} |"
            for flag in flags
            if flag.kind != "same"
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
