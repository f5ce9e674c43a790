"""A model's configuration as Hugging Face's config.json says it, and back: GPT-2, LLaMA, Mistral, Qwen2, Qwen3.

What our model would compute otherwise is refused by name; what changes nothing in a forward pass is passed over. The
folder is another's, so nothing in it is trusted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.config.data import DataConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import CheckpointError

FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> class."""

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
_THEIR_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "squared_relu": "relu2"}
_MAX_INTEGER = 2**31
_MAX_NUMBER = 1e18
_MAX_LAYERS = 10_000
_MAX_JSON_BYTES = 64 * 2**20

CONFIG = "config.json"

_ROPE_KEYS = frozenset(
    "rope_theta rope_type type partial_rotary_factor factor low_freq_factor high_freq_factor "
    "original_max_position_embeddings".split()
)
"""What may be said of the rotary embedding."""

_TOKENIZERS: Mapping[str, Mapping[str, str]] = {
    "HuggingFaceTokenizer": {"tokenizer_model": "tokenizer.json"},
    "SentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
}
"""Tokenizer type -> field -> file, the best first."""


@dataclasses.dataclass(frozen=True)
class Described:
    """What a config.json describes."""

    family: str
    model: ModelConfig
    notes: tuple[str, ...] = ()
    """What is worth saying aloud."""
    window: int | None = None
    """Tokens that attention sees there, where they are fewer than the positions."""


def read_config(folder: str | Path) -> Described:
    """The model of a folder's config.json. Raises CheckpointError."""
    return describe(read_json(Path(folder), CONFIG), str(Path(folder) / CONFIG))


def overrides(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The fields of a RunConfig that go on from a folder's model: shape, tokenizer, a length that fits it."""
    model = read_config(folder).model
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    length = min(DataConfig().seq_length, model.max_position_embeddings)
    return {"model": fields, "data": {"seq_length": length, **tokenizer_fields(Path(folder))}}


def tokenizer_fields(folder: Path) -> dict[str, str]:
    """The fields of DataConfig that name a folder's tokenizer; none where it has none that is known.

    Raises CheckpointError for a link out of the folder.
    """
    for kind, files in _TOKENIZERS.items():
        if all(inside(folder, name).is_file() for name in files.values()):
            return {"tokenizer_type": kind} | {field: str(folder / name) for field, name in files.items()}
    return {}


def contradictions(model: ModelConfig, folder: str | Path) -> list[str]:
    """Where a model is not the one of a folder's config.json, one sentence each. A vocabulary may grow."""
    there = read_config(folder)
    before, now = there.model.computation, model.computation
    found = [
        f"{name}={now.get(name)} contradicts {Path(folder) / CONFIG}, by which {name} is {before.get(name)}; leave it "
        f"out, or give another --load-hf."
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if model.vocab_size is not None and model.vocab_size < there.model.vocab_size:
        found.append(
            f"vocab_size={model.vocab_size} is below the {there.model.vocab_size} of {Path(folder) / CONFIG}; a "
            f"vocabulary can grow, not shrink."
        )
    if there.window is not None and (longest := model.max_position_embeddings) and longest > there.window:
        found.append(
            f"max_position_embeddings={longest} is beyond the window of {there.window} tokens that attention has by "
            f"{Path(folder) / CONFIG}, and which is not in this version; give at most {there.window}."
        )
    return found


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of a folder that is not trusted. Raises CheckpointError."""
    path = inside(folder, name)
    try:
        if not path.is_file():
            raise CheckpointError(f"{folder / name} is not there, or no plain file")
        with open(path, "rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror or error}") from None
    if len(raw) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{folder / name} exceeds {_MAX_JSON_BYTES} bytes")
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} is not JSON: {str(error)[:200]}") from None


def inside(folder: Path, name: str) -> Path:
    """The file itself behind a plain name: it may be a link within the folder, or into the blobs of its hub cache.

    Raises CheckpointError for a link that leads elsewhere.
    """
    try:
        real, home = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder / name} cannot be followed: {error}") from None
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(place) for place in homes):
        raise CheckpointError(f"{folder / name} is a link out of its folder, to {real}; put the file itself there")
    return real


class _Reader:
    """Typed values of an untrusted mapping; what is wrong is collected."""

    def __init__(self, content: Mapping[str, Any]):
        self._content = content
        self.problems: list[str] = []

    def integer(self, *names: str, default: int | None = None, most: int = _MAX_INTEGER) -> int:
        value = self._first(names)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= most:
            self.problems.append(f"{names[0]} is {str(value)[:40]!r}, not a whole number from 1 to {most}")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        value = self._first((name,))
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 <= value <= _MAX_NUMBER:
            self.problems.append(f"{name} is {str(value)[:40]!r}, not a number from 0 to {_MAX_NUMBER:g}")
            return default
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._first((name,))
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{name} is {str(value)[:40]!r}, not true or false")
        return default if value is None else bool(value)

    def object(self, name: str) -> Mapping[str, Any]:
        value = self._first((name,))
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{name} is {str(value)[:40]!r}, not an object")
            return {}
        return value or {}

    def insist(self, name: str, *allowed: Any) -> None:
        """Refuse a value under which our model would compute something else."""
        value = self._first((name,))
        if value is not None and value not in allowed:
            self.problems.append(f"{name} is {str(value)[:60]!r}, and only {allowed[0]!r} is in this version")

    def insist_each(self, name: str, *allowed: Any) -> None:
        """As `insist`, of every entry of a list."""
        value = self._first((name,))
        for entry in value if isinstance(value, list) else [] if value is None else [value]:
            if entry not in allowed:
                self.problems.append(
                    f"{name} has {str(entry)[:60]!r}, and only {', '.join(allowed)} is in this version"
                )
                break

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        value = self._first((name,))
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            self.problems.append(f"{name} is {str(value)[:40]!r}, not of {', '.join(choices)}")
            return choices[default]
        return choices[value]

    def is_null(self, name: str) -> bool:
        """Whether it is said that there is none, rather than nothing."""
        return name in self._content and self._content[name] is None

    def has(self, name: str) -> bool:
        return self._first((name,)) is not None

    def _first(self, names: tuple[str, ...]) -> Any:
        return next((self._content[name] for name in names if self._content.get(name) is not None), None)


def describe(content: Any, source: str) -> Described:
    """The model of a config.json. Raises CheckpointError, with every reason, for one that is none of ours."""
    family = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type is {str(family)[:40]!r}, and only {', '.join(FAMILIES)} are in this version"
        )
    read = _Reader(content)
    if read.has("quantization_config"):
        read.problems.append("quantization_config says that the weights are quantized, which is not in this version")
    fields, notes, window = _gpt2(read) if family == "gpt2" else _llama_kind(read, family)
    fields["untie_embeddings_and_output_weights"] = not read.flag("tie_word_embeddings", family == "gpt2")
    fields["init_method_std"] = read.number("initializer_range", 0.02)
    if read.problems:
        raise CheckpointError(f"{source} cannot be read as a model of this version: {'; '.join(read.problems)}.")
    return Described(family, ModelConfig(**fields), tuple(notes), window)


_Fields = tuple[dict[str, Any], list[str], int | None]
"""Fields of our model, notes, and the window."""


def _gpt2(read: _Reader) -> _Fields:
    read.insist("scale_attn_weights", True)
    read.insist("scale_attn_by_inverse_layer_idx", False)
    read.insist("add_cross_attention", False)
    hidden = read.integer("n_embd", "hidden_size", default=768)
    heads = read.integer("n_head", "num_attention_heads", default=12)
    if hidden % heads:
        read.problems.append(f"n_head={heads} does not divide n_embd={hidden}")
    residual, embedding = read.number("resid_pdrop", 0.1), read.number("embd_pdrop", 0.1)
    notes = []
    if residual != embedding:
        notes.append(f"hidden_dropout is resid_pdrop={residual:g}; embd_pdrop={embedding:g} has no flag of its own")
    return (
        {
            "num_layers": read.integer("n_layer", "num_hidden_layers", default=12, most=_MAX_LAYERS),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "ffn_hidden_size": read.integer("n_inner", default=4 * hidden),
            "max_position_embeddings": read.integer("n_positions", "max_position_embeddings", default=1024),
            "vocab_size": read.integer("vocab_size", default=50257),
            "norm_epsilon": read.number("layer_norm_epsilon", 1e-5),
            "activation_func": read.choice("activation_function", _ACTIVATIONS, "gelu_new"),
            "hidden_dropout": residual,
            "attention_dropout": read.number("attn_pdrop", 0.1),
        },
        notes,
        None,
    )


def _llama_kind(read: _Reader, family: str) -> _Fields:
    read.insist("hidden_act", "silu")
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    groups = read.integer("num_key_value_heads", default=8 if family == "mistral" else heads)
    head_dim = read.integer("head_dim", default=128 if family == "qwen3" else max(1, hidden // heads))
    if heads % groups:
        read.problems.append(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    if head_dim % 2:
        read.problems.append(f"head_dim is {head_dim}, which is not even")
    biases = {"attention_bias": False, "mlp_bias": False}
    if family in ("llama", "qwen3"):
        biases["attention_bias"] = read.flag("attention_bias", False)
    if family == "llama":
        biases["mlp_bias"] = read.flag("mlp_bias", False)
    if biases["attention_bias"] != biases["mlp_bias"]:
        read.problems.append(
            " and ".join(f"{name} is {value}" for name, value in biases.items())
            + "; both, or neither, are in this version"
        )
    longest, window = _longest(read, family)
    notes = []
    if window is not None:
        notes.append(
            f"attention sees a window of {window:,} tokens there, and all tokens here: texts of up to that length are "
            f"the same, so max_position_embeddings is {window:,} instead of {longest:,}"
        )
    return (
        {
            "num_layers": read.integer("num_hidden_layers", most=_MAX_LAYERS),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": None if groups == heads else groups,
            "kv_channels": None if heads * head_dim == hidden else head_dim,
            "ffn_hidden_size": read.integer("intermediate_size"),
            "max_position_embeddings": window or longest,
            "vocab_size": read.integer("vocab_size"),
            "normalization": "RMSNorm",
            "norm_epsilon": read.number("rms_norm_eps", 1e-6),
            "position_embedding_type": "rope",
            "swiglu": True,
            "add_bias_linear": biases["mlp_bias"],
            "add_qkv_bias": family == "qwen2",
            "qk_layernorm": family == "qwen3",
            "hidden_dropout": 0.0,
            "attention_dropout": read.number("attention_dropout", 0.0),
            **_rope(read),
        },
        notes,
        window,
    )


def _longest(read: _Reader, family: str) -> tuple[int, int | None]:
    """Positions, and the window if it is shorter: attention here sees everything before a token."""
    longest = read.integer("max_position_embeddings", default={"llama": 2048, "mistral": 2**17}.get(family, 2**15))
    windowed = family == "mistral" or (family.startswith("qwen") and read.flag("use_sliding_window", False))
    windowed = windowed and not read.is_null("sliding_window")
    read.insist_each("layer_types", "full_attention", *(["sliding_attention"] if windowed else []))
    if not windowed:
        return longest, None
    window = read.integer("sliding_window", default=4096)
    return longest, window if window < longest else None


def _rope(read: _Reader) -> dict[str, Any]:
    stated, older = read.object("rope_parameters"), read.object("rope_scaling")
    if stated and older and stated != older:
        read.problems.append("rope_parameters and rope_scaling are both given, and differ")
    stated = stated or older
    rope = _Reader(stated)
    rope.problems += [
        f"the rotary embedding has {str(name)[:60]!r}: {str(value)[:60]}, which is not in this version"
        for name, value in stated.items()
        if name not in _ROPE_KEYS and value is not None
    ]
    base = rope.number("rope_theta", read.number("rope_theta", 10000.0))
    kind = stated.get("rope_type", stated.get("type", "default"))
    for values in (rope, read):
        values.insist("partial_rotary_factor", 1, 1.0)
    fields: dict[str, Any] = {"rotary_base": base}
    if kind == "llama3":
        # What is left out means one thing to one version of transformers and another, or nothing, to the next.
        length = "original_max_position_embeddings"
        rope.problems += [
            f"rope_type is llama3, and {name} is not given"
            for name in ("factor", "low_freq_factor", "high_freq_factor", length)
            if not rope.has(name)
        ]
        if read.has(length):
            read.insist(length, stated.get(length))
        fields |= {
            "use_rope_scaling": True,
            "rope_scaling_factor": rope.number("factor", 8.0),
            "rope_scaling_low_freq_factor": rope.number("low_freq_factor", 1.0),
            "rope_scaling_high_freq_factor": rope.number("high_freq_factor", 4.0),
            "rope_scaling_original_length": rope.integer(length, default=8192),
        }
        if not fields["rope_scaling_low_freq_factor"] < fields["rope_scaling_high_freq_factor"]:
            rope.problems.append("high_freq_factor is not above low_freq_factor")
    elif kind != "default":
        rope.problems.append(f"rope_type is {str(kind)[:40]!r}, and only 'default' and 'llama3' are in this version")
    if 0.0 in (base, fields.get("rope_scaling_factor")):
        rope.problems.append("rope_theta or factor is 0")
    read.problems += rope.problems
    return fields


def family_of(model: ModelConfig, preferred: Any = None) -> str:
    """The family whose form a model has: `preferred` if that is one. Raises CheckpointError with what fits none."""
    faults = {family: _unlike(model, family) for family in FAMILIES}
    fitting = [family for family, found in faults.items() if not found]
    if not fitting:
        nearest = min(faults, key=lambda family: len(faults[family]))
        raise CheckpointError(
            f"this model has the form of none of {', '.join(FAMILIES)}; for {nearest}, {'; '.join(faults[nearest])}"
        )
    return preferred if preferred in fitting else fitting[0]


def insist_on_family(model: ModelConfig, family: str) -> None:
    """Raise CheckpointError, with every reason, for a model that has not the form of a family."""
    if faults := _unlike(model, family):
        raise CheckpointError(f"this model cannot be written as {family}: {'; '.join(faults)}")


def _unlike(model: ModelConfig, family: str) -> list[str]:
    """What keeps a model from being one of a family."""
    wanted: dict[str, Any] = {
        "norm_position": "pre",
        "qk_layernorm": family == "qwen3",
        "normalization": "LayerNorm" if family == "gpt2" else "RMSNorm",
        "position_embedding_type": "learned_absolute" if family == "gpt2" else "rope",
        "swiglu": family != "gpt2",
    }
    if family == "gpt2":
        wanted |= {"add_bias_linear": True, "kv_heads": model.num_attention_heads}
        wanted["head_dim"] = model.hidden_size // model.num_attention_heads
    else:
        wanted |= {"rotary_percent": 1.0, "rotary_interleaved": False}
        if family != "llama":
            wanted["add_bias_linear"] = False
        if not model.add_bias_linear:
            wanted["add_qkv_bias"] = family == "qwen2"
    return [
        f"{name} is {getattr(model, name)}, not {value}"
        for name, value in wanted.items()
        if getattr(model, name) != value
    ]


def config_json(
    model: ModelConfig, family: str, *, vocab_size: int, positions: int, dtype: str, bos: int | None, eos: int | None
) -> dict[str, Any]:
    """The config.json of a model of a family, in keys that transformers 4 and 5 both read.

    `dtype` is "float32", "bfloat16" or "float16". Raises CheckpointError where the family has another form.
    """
    insist_on_family(model, family)
    shared = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "torch_dtype": dtype,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
    }
    if family == "gpt2":
        return shared | {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "n_positions": positions,
            "n_ctx": positions,
            "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": _THEIR_ACTIVATIONS[model.activation_func],
            "resid_pdrop": model.hidden_dropout,
            "embd_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
        }
    content = shared | {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "attention_dropout": model.attention_dropout,
    }
    if model.use_rope_scaling:
        content["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_scaling_low_freq_factor,
            "high_freq_factor": model.rope_scaling_high_freq_factor,
            "original_max_position_embeddings": model.rope_scaling_original_length,
        }
    if family == "llama":
        content |= {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
    if family == "mistral":
        content["sliding_window"] = None
    if family.startswith("qwen"):
        content |= {"use_sliding_window": False, "sliding_window": None}
    if family == "qwen3":
        content["attention_bias"] = False
    return content
