"""GPT checkpoints of Megatron-LM and Megatron-DeepSpeed: their settings, and where their ranks keep which of ours.

Each tensor and pipeline rank has a file. Queries, keys and values of a layer are one matrix, by query group: the
group's queries, its key, its value. A tensor rank has whole groups, its share of gate above its share of up, and rows
of a vocabulary that is padded. Layers count from the beginning of their model chunk. Nothing here reads a file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_lite.checkpoint.boxes import Rectangle
from megatron_lite.checkpoint.foreign import Link, by_ours, their_shapes
from megatron_lite.checkpoint.piece import DTYPE_NAMES
from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import CheckpointError

_STEM = re.compile(r"(module\.|language_model\.)*")
_LAYER = re.compile(r"(?:decoder|encoder|transformer)\.layers\.(\d+)\.(.+)")
_IDLE = re.compile(r".*(_extra_state|rotary_pos_emb\.inv_freq)|word_embeddings(_for_head)?\..*")
_OUTSIDE = {
    "embedding.word_embeddings.weight": "word",
    "embedding.position_embeddings.weight": "position",
    "output_layer.weight": "head",
    **{
        f"{stack}.final_{norm}.{kind}": f"final_norm.{kind}"
        for stack in ("decoder", "encoder", "transformer")
        for norm in ("layernorm", "norm")
        for kind in ("weight", "bias")
    },
}
_INSIDE = (
    (r"(?:input_layernorm\.|input_norm\.|self_attention\.linear_qkv\.layer_norm_)(weight|bias)", r"attention_norm.\1"),
    (r"(?:self_attention\.linear_qkv|(?:self_)?attention\.query_key_value)\.(weight|bias)", r"qkv.\1"),
    (r"(?:self_attention\.linear_proj|(?:self_)?attention\.dense)\.(weight|bias)", r"output.\1"),
    (r"self_attention\.q_layernorm\.(weight|bias)", r"query_norm.\1"),
    (r"self_attention\.k_layernorm\.(weight|bias)", r"key_norm.\1"),
    (
        r"(?:pre_mlp_layernorm\.|post_attention_layernorm\.|post_attention_norm\.|mlp\.linear_fc1\.layer_norm_)"
        r"(weight|bias)",
        r"mlp_norm.\1",
    ),
    (r"mlp\.(?:linear_fc1|dense_h_to_4h)\.(weight|bias)", r"up.\1"),
    (r"mlp\.(?:linear_fc2|dense_4h_to_h)\.(weight|bias)", r"down.\1"),
)
"""What their versions call a layer's tensors, and what they are."""

_ONLY = {
    "num_experts": (None, 0, 1, [1]),
    "apply_layernorm_1p": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "multi_latent_attention": (None, False),
    "mtp_num_layers": (None, 0),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "window_size": (None,),
    "fp32_residual_connection": (None, False),
}
"""Settings under which this model would compute something else."""

_MAX_HEADS = 2**14


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The part of the model that one file holds, or one of several where a pipeline rank has more than one stage."""

    pipe: int
    tensor: int
    virtual: int


def flatten(tree: Mapping[str, Any], chunk: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Dotted name and tensor of what nested dictionaries hold. What is no tensor is passed over."""
    for key, value in tree.items():
        name = f"{chunk}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")


class MegatronWeights:
    """All ranks' tensors under one set of names, as links to ours. A `foreign.Source`.

    `chunks` are flattened state dictionaries, tensor by name, of every chunk; `settings` are their command line's.
    Raises CheckpointError where settings or tensors are not those of a GPT of this version.
    """

    def __init__(
        self,
        name: str,
        chunks: Mapping[Chunk, Mapping[str, torch.Tensor]],
        settings: Mapping[str, Any],
        vocab_size: int | None,
    ):
        self.name = name
        sizes = [1 + max(getattr(chunk, axis) for chunk in chunks) for axis in ("tensor", "pipe", "virtual")]
        self._tensor, self._pipe, self._virtual = sizes
        missing = {
            Chunk(p, t, v) for p in range(self._pipe) for t in range(self._tensor) for v in range(self._virtual)
        } - chunks.keys()
        if missing:
            raise CheckpointError(
                f"{name} lacks {sorted(map(str, missing))[0]}, of {self._pipe} x {self._tensor} ranks"
            )
        self._tensors = {
            _place(chunk, known): tensor
            for chunk, tensors in chunks.items()
            for key, tensor in tensors.items()
            if (known := _known(key, name)) is not None
        }
        padded = sum(len(self._at(Chunk(0, t, 0), "word")) for t in range(self._tensor))
        stated = vocab_size or settings.get("vocab_size")
        if type(stated) is not int or not 0 < stated <= padded:
            raise CheckpointError(
                f"{name} has {padded} rows of token ids, padding among them, and says vocab_size={stated}; give the "
                "tokenizer, or --vocab-size"
            )
        self.model = _model(settings, stated, name)
        shared = {"num_query_groups": self.model.kv_heads, "ffn_hidden_size": self.model.ffn_size}
        for what, count in shared.items():
            if count % self._tensor:
                raise CheckpointError(f"{name}: {self._tensor} tensor ranks do not divide {what}={count}")
        if self.model.num_layers > len(self._tensors):
            raise CheckpointError(
                f"{name} has {len(self._tensors)} tensors, and says num_layers={self.model.num_layers}"
            )
        self.links = by_ours(self._links(stated, padded))
        self._check()

    def dtype(self, theirs: str) -> str:
        return DTYPE_NAMES[self._tensors[theirs].dtype]

    def read(self, theirs: str, rectangle: Rectangle, into: torch.Tensor) -> None:
        slices = tuple(slice(a, a + n) for a, n in zip(*rectangle, strict=True))
        into.copy_(self._tensors[theirs][slices])

    def _at(self, chunk: Chunk, known: str) -> torch.Tensor:
        if (place := _place(chunk, known)) not in self._tensors:
            raise CheckpointError(f"{self.name} has no {known} of {chunk}")
        return self._tensors[place]

    def _check(self) -> None:
        wanted = their_shapes(link for parts in self.links.values() for link in parts)
        for place, shape in wanted.items():
            if place not in self._tensors:
                raise CheckpointError(f"{self.name} has no {place}")
            there = tuple(self._tensors[place].shape)
            padded = place.endswith((":word", ":head"))
            if there[padded:] != shape[padded:] or there[0] < shape[0]:
                raise CheckpointError(f"{self.name}: {place} is {list(there)}, not {list(shape)}")
        for place in self._tensors.keys() - wanted.keys():
            chunk, _, known = place.partition(":")
            replica_of = f"{re.sub('tensor [0-9]+', 'tensor 0', chunk)}:{known}"
            # The last stage may have the embedding once more, for a tied head.
            if replica_of not in wanted and known not in ("head", "word"):
                raise CheckpointError(f"{self.name}: {place} belongs to no part of this model")

    def _links(self, vocab_size: int, padded: int) -> Iterator[Link]:
        model, first = self.model, Chunk(0, 0, 0)
        last_pipe, last_virtual = self._pipe - 1, self._virtual - 1
        hidden = model.hidden_size
        for known, ours, pipe, virtual in (
            ("word", "embedding.word.weight", 0, 0),
            ("head", "head.weight", last_pipe, last_virtual),
        ):
            if known == "head" and not model.untie_embeddings_and_output_weights:
                continue
            share = padded // self._tensor
            for t in range(self._tensor):
                if (held := min(share, vocab_size - t * share)) > 0:
                    place = _place(Chunk(pipe, t, virtual), known)
                    yield Link(ours, place, (held, hidden), (t * share, 0), (0, 0))
        if model.position_embedding_type == "learned_absolute":
            yield _all("embedding.position.weight", _place(first, "position"), model.max_position_embeddings, hidden)
        for kind in self._norm_kinds():
            end = Chunk(last_pipe, 0, last_virtual)
            yield _all(f"final_norm.{kind}", _place(end, f"final_norm.{kind}"), hidden)
        per_chunk, rest = divmod(model.num_layers, self._pipe * self._virtual)
        if rest:
            raise CheckpointError(
                f"{self.name}: {model.num_layers} layers in {self._pipe} x {self._virtual} stages of unequal length"
            )
        for layer in range(model.num_layers):
            stage, there = divmod(layer, per_chunk)
            virtual, pipe = divmod(stage, self._pipe)
            for t in range(self._tensor):
                yield from self._layer(f"layers.{layer}", Chunk(pipe, t, virtual), f"{there}.")

    def _norm_kinds(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.model.normalization == "LayerNorm" else ("weight",)

    def _layer(self, ours: str, chunk: Chunk, there: str) -> Iterator[Link]:
        model, t = self.model, chunk.tensor
        hidden, head_dim, groups = model.hidden_size, model.head_dim, model.kv_heads
        inner, query = model.ffn_size // self._tensor, model.num_attention_heads * head_dim
        is_first = t == 0

        def place(known: str) -> str:
            return _place(chunk, f"{there}{known}")

        for kind in self._norm_kinds() if is_first else ():
            norms = {"attention_norm": hidden, "mlp_norm": hidden}
            if model.qk_layernorm:
                norms |= {"query_norm": head_dim, "key_norm": head_dim}
            for norm, width in norms.items():
                home = "attention." if norm in ("query_norm", "key_norm") else ""
                yield _all(f"{ours}.{home}{norm}.{kind}", place(f"{norm}.{kind}"), width)
        for kind, width in (("weight", (hidden,)), ("bias", ())):
            none = (0,) * len(width)
            if kind == "weight" or model.has_qkv_bias:
                queries = model.num_attention_heads // groups * head_dim
                for g in range(groups // self._tensor):
                    group, row = t * (groups // self._tensor) + g, g * (queries + 2 * head_dim)
                    for name, our_row, length in (
                        ("query", group * queries, queries),
                        ("key_value", group * head_dim, head_dim),
                        ("key_value", (groups + group) * head_dim, head_dim),
                    ):
                        parameter = f"{ours}.attention.{name}.{kind}"
                        yield Link(parameter, place(f"qkv.{kind}"), (length, *width), (our_row, *none), (row, *none))
                        row += length
            if kind == "weight" or model.add_bias_linear:
                sections = 2 if model.swiglu else 1
                name = f"{ours}.mlp.{'gate_up' if model.swiglu else 'up'}.{kind}"
                for section in range(sections):
                    our_row = (section * self._tensor + t) * inner
                    start = (section * inner, *none)
                    yield Link(name, place(f"up.{kind}"), (inner, *width), (our_row, *none), start)
        share = query // self._tensor
        yield Link(f"{ours}.attention.output.weight", place("output.weight"), (hidden, share), (0, t * share), (0, 0))
        yield Link(f"{ours}.mlp.down.weight", place("down.weight"), (hidden, inner), (0, t * inner), (0, 0))
        if model.add_bias_linear and is_first:
            yield _all(f"{ours}.attention.output.bias", place("output.bias"), hidden)
            yield _all(f"{ours}.mlp.down.bias", place("down.bias"), hidden)


def _all(ours: str, theirs: str, *shape: int) -> Link:
    origin = (0,) * len(shape)
    return Link(ours, theirs, shape, origin, origin)


def _place(chunk: Chunk, known: str) -> str:
    return f"pipe {chunk.pipe} tensor {chunk.tensor} chunk {chunk.virtual}:{known}"


def _known(key: str, source: str) -> str | None:
    """What a tensor of theirs is, "3.qkv.weight" for one of the chunk's fourth layer; None for what is no weight."""
    stem = key[_STEM.match(key).end() :]
    if stem in _OUTSIDE:
        return _OUTSIDE[stem]
    if layer := _LAYER.fullmatch(stem):
        for pattern, known in _INSIDE:
            if found := re.fullmatch(pattern, layer[2]):
                return f"{layer[1]}.{found.expand(known)}"
    if _IDLE.fullmatch(stem):
        return None
    raise CheckpointError(f"{source}: {key[:100]} belongs to no part of a GPT of this version")


def _model(settings: Mapping[str, Any], vocab_size: int, source: str) -> ModelConfig:
    """Our configuration by their settings. Raises CheckpointError with every reason."""
    problems = [
        f"{name} is {str(settings[name])[:40]!r}, which is not in this version"
        for name, allowed in _ONLY.items()
        if settings.get(name) not in allowed
    ]

    def take(*names: str, kind: type, default: Any = None, most: int = 2**31) -> Any:
        value = next((settings[name] for name in names if settings.get(name) is not None), default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is int and not 0 < value <= most):
            problems.append(f"{names[0]} is {str(value)[:40]!r}, not of type {kind.__name__}")
            return kind(1)
        return value

    kind = settings.get("position_embedding_type")
    if take("use_rotary_position_embeddings", kind=bool, default=False):
        kind = "rope"
    elif not isinstance(kind, str):
        kind = "learned_absolute" if take("add_position_embedding", kind=bool, default=True) else "none"
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}.get(
        take("normalization", kind=str, default="LayerNorm").lower()
    )
    if kind not in ("learned_absolute", "rope", "none") or norm is None:
        problems.append(f"position_embedding_type is {kind!r} and normalization {settings.get('normalization')!r}")
    hidden, heads = take("hidden_size", kind=int), take("num_attention_heads", kind=int, most=_MAX_HEADS)
    groups = heads
    if take("group_query_attention", kind=bool, default=False):
        groups = take("num_query_groups", kind=int)
    elif settings.get("num_key_value_heads") is not None:
        groups = take("num_key_value_heads", kind=int)
    if heads % groups:
        problems.append(f"{groups} query groups do not divide num_attention_heads={heads}")
    activation = "gelu_tanh" if settings.get("openai_gelu") or settings.get("bias_gelu_fusion", True) else "gelu"
    if settings.get("squared_relu"):
        activation = "squared_relu"
    if problems:
        raise CheckpointError(f"{source} is not a model of this version: {'; '.join(problems)}.")
    fields = {
        "num_layers": take("num_layers", "encoder_num_layers", kind=int),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups if groups != heads else None,
        "kv_channels": take("kv_channels", kind=int, default=max(1, hidden // heads)),
        "ffn_hidden_size": take("ffn_hidden_size", kind=int, default=4 * hidden),
        "max_position_embeddings": take("max_position_embeddings", "seq_length", kind=int),
        "vocab_size": vocab_size,
        "normalization": norm,
        "norm_epsilon": take("norm_epsilon", "layernorm_epsilon", kind=float, default=1e-5),
        "position_embedding_type": kind,
        "rotary_base": take("rotary_base", "rope_theta", kind=float, default=10000.0),
        "rotary_percent": take("rotary_percent", kind=float, default=1.0),
        "rotary_interleaved": take("rotary_interleaved", kind=bool, default=False),
        "use_rope_scaling": take("use_rope_scaling", kind=bool, default=False),
        "rope_scaling_factor": take("rope_scaling_factor", kind=float, default=8.0),
        "swiglu": take("swiglu", kind=bool, default=False),
        "activation_func": activation,
        "add_bias_linear": take("add_bias_linear", kind=bool, default=True),
        "add_qkv_bias": take("add_qkv_bias", kind=bool, default=False),
        "qk_layernorm": take("qk_layernorm", kind=bool, default=False),
        "untie_embeddings_and_output_weights": take("untie_embeddings_and_output_weights", kind=bool, default=False),
        "hidden_dropout": take("hidden_dropout", kind=float, default=0.1),
        "attention_dropout": take("attention_dropout", kind=float, default=0.1),
        "init_method_std": take("init_method_std", kind=float, default=0.02),
    }
    if problems:
        raise CheckpointError(f"{source} is not a model of this version: {'; '.join(problems)}.")
    return ModelConfig(**fields)
