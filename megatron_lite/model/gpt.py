"""One GPT: GPT-2, LLaMA and what lies between, by configuration.

Shape suffixes, here and everywhere: B batch, S sequence on this rank, H hidden, N query heads,
K key/value heads, D head dim, V vocabulary (on this rank, padded), F feed-forward. Heads and F are
this rank's too. Between layers activations are [S, B, H].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lite.config.kernels import KernelsConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import UserError
from megatron_lite.model.block import Block
from megatron_lite.model.cache import KeyValueCache
from megatron_lite.model.documents import documents_of
from megatron_lite.model.forward_pass import ForwardPass, Site
from megatron_lite.model.init import initialize
from megatron_lite.model.norm import Norm
from megatron_lite.model.rotary import Rotation, rotary_of
from megatron_lite.parallel.context import ContextAxis
from megatron_lite.parallel.layout import replicated
from megatron_lite.parallel.linear import TensorAxis, empty_parameter, lay_out
from megatron_lite.parallel.pipeline.partition import Stage, whole_model
from megatron_lite.parallel.pipeline.relay import Relay
from megatron_lite.parallel.process_mesh import ProcessMesh
from megatron_lite.parallel.recompute import Recompute, run_layers
from megatron_lite.parallel.vocab import (
    VocabParallelEmbedding,
    VocabularyPart,
    gather_vocabulary,
    vocab_parallel_argmax,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocabulary_weight,
)

_BEFORE_LAYERS = -1
"""The layer number of the embedding's dropout."""


class GPT(nn.Module):
    """A decoder-only transformer on this rank of `mesh`.

    Parameters are named as in a serial model and carry `mesh_layout`. With `seed` they are initialised,
    without it left empty for `initialize` (and always on the meta device). A mesh without groups is
    enough to build it. Raises ValueError where the tensor size does not fit the shape.

    In a pipeline `stages` are all stages of the model and `placement` the pipe rank of each: this rank holds its own
    alone, and passes hidden states on. Where the output head is tied to the embedding of another rank, this rank
    has a copy of that weight, whose owner is the other.

    Ranks along the context axis are given whole sequences, of which each takes its part, by `context_exchange`.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ProcessMesh,
        *,
        vocab_size: int,
        seq_length: int,
        kernels: KernelsConfig | None = None,
        sequence_parallel: bool = False,
        context_exchange: Literal["p2p", "a2a"] = "p2p",
        recompute: Recompute | None = None,
        stages: Sequence[Stage] | None = None,
        placement: Sequence[int] = (0,),
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        self.kernels = kernels or KernelsConfig()
        self.vocabulary = VocabularyPart.of(vocab_size, config.make_vocab_size_divisible_by, mesh)
        self.max_positions = config.max_position_embeddings or seq_length
        self._axis = TensorAxis(mesh, sequence_parallel and mesh.size("tensor") > 1)
        self._context_exchange = context_exchange
        self._recompute = recompute or Recompute()
        self._rotary = rotary_of(config)

        stages = stages or whole_model(config.num_layers)
        self.relay = Relay(mesh, placement)
        self.stages = tuple(stage for stage in stages if placement[stage.index] == mesh.rank("pipe"))
        begins_here = any(stage.is_first for stage in self.stages)
        ends_here = any(stage.is_last for stage in self.stages)
        is_tied = not config.untie_embeddings_and_output_weights

        options = {"device": device, "dtype": dtype}
        self.embedding = None
        if begins_here:
            self.embedding = Embedding(config, mesh, self.vocabulary, self.max_positions, **options)
        elif ends_here and is_tied:
            self.embedding = nn.ModuleDict(
                {"word": VocabParallelEmbedding(self.vocabulary, config.hidden_size, mesh, **options)}
            )
            weight = self.embedding.word.weight
            lay_out(weight, dataclasses.replace(weight.mesh_layout, is_owner=False))
        recompute_core = self._recompute.granularity == "selective"
        # Groups are made by all ranks together, those whose stage has no layer too.
        mesh.subgroup("tensor", max(1, mesh.size("tensor") // config.kv_heads))
        self.layers = nn.ModuleDict(
            {
                str(n): Block(config, mesh, n, self.kernels, recompute_core=recompute_core, **options)
                for stage in self.stages
                for n in stage.layers
            }
        )
        self.final_norm = self.head = None
        if ends_here:
            if config.norm_position == "pre":
                self.final_norm = Norm(config, mesh, self.kernels, **options)
            # A tied head holds the embedding's own parameter, which keeps the embedding's name.
            if is_tied:
                head_weight = self.embedding.word.weight
            else:
                head_weight = vocabulary_weight(self.vocabulary, config.hidden_size, mesh, **options)
            self.head = Head(head_weight, self.vocabulary, mesh, self.kernels.loss_chunk_size)
        if seed is not None and torch.device(device or "cpu").type != "meta":
            initialize(self, config, seed)

    @property
    def shared_weight(self) -> nn.Parameter | None:
        """The embedding that the output head is tied to, where one of them is on another rank, here or there."""
        is_tied = not self.config.untie_embeddings_and_output_weights
        begins_here = any(stage.is_first for stage in self.stages)
        return self.embedding.word.weight if is_tied and begins_here != (self.head is not None) else None

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the whole model's parameters that have one for each token id or position, on all ranks alike."""
        found = {"embedding.word.weight": self.vocabulary.vocab_size}
        if self.config.position_embedding_type == "learned_absolute":
            found["embedding.position.weight"] = self.max_positions
        if self.config.untie_embeddings_and_output_weights:
            found["head.weight"] = self.vocabulary.vocab_size
        return found

    @property
    def _context(self) -> ContextAxis:
        return ContextAxis(self._axis.mesh.group("context"), self._context_exchange)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        loss_mask_BS: torch.Tensor,
        *,
        begins_BS: torch.Tensor | None = None,
        positions_BS: torch.Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> torch.Tensor:
        """The sum of this batch's token losses where the mask is 1: an fp32 scalar, equal on all tensor ranks.

        Where context ranks share the sequences, it is the sum over this one's tokens, and a ValueError is raised for a
        length that 2 c chunks do not divide.
        `begins_BS`, bool on the CPU, is true at tokens that see none before them, and `positions_BS` says their
        positions; by default sequences are whole, and positions are places in them.
        Label smoothing, z-loss and dropout belong to training mode. `dropout_seed` is `micro_batch_seed`'s;
        None is no dropout. The caller divides by the step's number of target tokens. In a pipeline, where this is
        not what is differentiated, it is 0 on all ranks but the last stage's.
        """
        run = self.plain_pass(tokens_BS.shape[1], dropout_seed, begins_BS=begins_BS, positions_BS=positions_BS)
        hidden_SBH = self._relayed(tokens_BS, run, positions_BS=positions_BS)
        if hidden_SBH is None:
            return torch.zeros((), device=tokens_BS.device)
        return self.loss(hidden_SBH, labels_BS, loss_mask_BS, run)

    def begin(
        self, tokens_BS: torch.Tensor, run: ForwardPass, start: int = 0, positions_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The hidden states before the first layer, [S, B, H]."""
        return self.embedding(tokens_BS, run, start, positions_BS)

    def through(self, stage: Stage, hidden_SBH: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        """`hidden_SBH` after the layers of a stage."""
        layers = tuple(self.layers[str(n)] for n in stage.layers)
        return run_layers(layers, hidden_SBH, self._recompute, run)

    def loss(
        self, hidden_SBH: torch.Tensor, labels_BS: torch.Tensor, loss_mask_BS: torch.Tensor, run: ForwardPass
    ) -> torch.Tensor:
        """What `forward` gives, from the hidden states behind the last layer."""
        loss_SB = self.head(
            self._entered(hidden_SBH, run),
            run.context.part(labels_BS, 1).t(),
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
            z_loss=self.config.z_loss if self.training else 0.0,
        )
        return (loss_SB * run.context.part(loss_mask_BS, 1).t()).sum()

    @torch.no_grad()
    def token_losses(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        *,
        begins_BS: torch.Tensor | None = None,
        positions_BS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, correct) of each token, without dropout, smoothing or z-loss.

        fp32 and bool [B, S], equal on all tensor ranks; `correct` says that the label has the largest logit. The others
        are as in `forward`.
        """
        length = tokens_BS.shape[1]
        # Lengths that cannot be shared out are gone through whole by every context rank.
        context = self._context if self._context.splits(length) else ContextAxis()
        run = self.plain_pass(length, None, context, begins_BS=begins_BS, positions_BS=positions_BS)
        hidden_SBH = self._relayed(tokens_BS, run, positions_BS=positions_BS)
        labels_BS = run.context.part(labels_BS, 1)
        if hidden_SBH is None:
            judged_BS = torch.zeros_like(labels_BS, dtype=torch.float32), torch.zeros_like(labels_BS, dtype=torch.bool)
        else:
            judged_BS = self._judged(self._entered(hidden_SBH, run), labels_BS)
        loss_BS, correct_BS = (run.context.join(self.relay.tell(judged), 1) for judged in judged_BS)
        return loss_BS, correct_BS

    def _judged(self, entered_SBH: torch.Tensor, labels_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each token, and whether its label has the largest logit, [B, S]."""
        labels_SB = labels_BS.t()
        # Without a gradient, some tokens' logits over the whole vocabulary take as little memory as a tile of it.
        chunk = self.kernels.loss_chunk_size or self.vocabulary.length
        tokens = math.ceil(labels_SB.numel() * chunk / self.vocabulary.length)
        pieces = zip(entered_SBH.flatten(0, 1).split(tokens), labels_SB.flatten().split(tokens), strict=True)
        judged = zip(*(self._judged_piece(*piece) for piece in pieces), strict=True)
        loss_SB, correct_SB = (torch.cat(parts).view(labels_SB.shape) for parts in judged)
        return loss_SB.t(), correct_SB.t()

    def _judged_piece(self, entered_TH: torch.Tensor, labels_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TV = self.head(entered_TH)
        guess_T = vocab_parallel_argmax(logits_TV, self.vocabulary, self._axis.group)
        return vocab_parallel_cross_entropy(logits_TV, labels_T, self.vocabulary, self._axis.group), guess_T == labels_T

    @torch.no_grad()
    def logits(
        self,
        tokens_BS: torch.Tensor,
        *,
        cache: KeyValueCache | None = None,
        left_padding_B: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """This rank's logits [B, S, V], padded vocabulary included, without dropout; `full_logits` joins them.

        With `cache`, the tokens come after those it holds, and are added to it. `left_padding_B` says how many
        tokens at the beginning of each row are padding: they are not attended to and positions begin
        after them. `last_only` gives [B, 1, V] of the last token.
        """
        start = cache.length if cache else 0
        stop = start + tokens_BS.shape[1]
        positions_BS = mask = None
        if left_padding_B is not None:
            order = torch.arange(stop, device=tokens_BS.device)
            positions_BS = (order[start:] - left_padding_B.unsqueeze(1)).clamp_(min=0)
            mask = _causal_mask(start, stop, left_padding_B)
        elif start and tokens_BS.shape[1] > 1:
            mask = _causal_mask(start, stop, torch.zeros_like(tokens_BS[:1, 0]))
        rotation = self._rotation(start, stop, tokens_BS.device, positions_BS)
        run = ForwardPass(TensorAxis(self._axis.mesh), rotation=rotation, mask=mask, cache=cache)
        hidden_SBH = self._relayed(tokens_BS, run, start, positions_BS)
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        if hidden_SBH is None:
            length, batch = 1 if last_only else tokens_BS.shape[1], tokens_BS.shape[0]
            dtype = next(self.parameters()).dtype
            logits_SBV = torch.zeros(length, batch, self.vocabulary.length, dtype=dtype, device=tokens_BS.device)
        else:
            logits_SBV = self.head(self._entered(hidden_SBH[-1:] if last_only else hidden_SBH, run))
        return self.relay.tell(logits_SBV).transpose(0, 1)

    def full_logits(self, logits_BSV: torch.Tensor) -> torch.Tensor:
        """The logits of the true vocabulary, joined over tensor ranks."""
        return gather_vocabulary(logits_BSV, self.vocabulary, self._axis.group)

    def plain_pass(
        self,
        length: int,
        dropout_seed: int | None,
        context: ContextAxis | None = None,
        *,
        begins_BS: torch.Tensor | None = None,
        positions_BS: torch.Tensor | None = None,
    ) -> ForwardPass:
        """A pass over sequences from their beginning, of `length` tokens, of which this rank has a part.

        `begins_BS` and `positions_BS` are those of whole sequences, as in `forward`.
        """
        context = context or self._context
        # A mode of memory, not of meaning: lengths that the ranks do not divide go without it.
        axis = self._axis if length // context.size % self._axis.size == 0 else TensorAxis(self._axis.mesh)
        seed = dropout_seed if self.training else None
        device = self._axis.mesh.device
        if positions_BS is None and context.size > 1:
            positions_BS = torch.arange(length, device=device).unsqueeze(0)
        here_BS = None if positions_BS is None else context.part(positions_BS, 1)
        return ForwardPass(
            axis,
            seed,
            self._rotation(0, length, device, here_BS),
            documents=None if begins_BS is None else documents_of(begins_BS, context, device),
            context=context,
        )

    def _rotation(
        self, start: int, stop: int, device: torch.device, positions_BS: torch.Tensor | None = None
    ) -> Rotation | None:
        if self._rotary is None:
            return None
        if positions_BS is None:
            return self._rotary.between(start, stop, device)
        return self._rotary.at(positions_BS.t(), stop)

    def _relayed(
        self, tokens_BS: torch.Tensor, run: ForwardPass, start: int = 0, positions_BS: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The hidden states behind the last layer, [S, B, H]; None where another rank has them.

        Between ranks no gradient flows.
        """
        hidden_SBH = None
        for stage in self.stages:
            if stage.is_first:
                hidden_SBH = self.begin(tokens_BS, run, start, positions_BS)
            else:
                batch, length = tokens_BS.shape
                parts = run.context.size * (run.axis.size if run.axis.sequence_parallel else 1)
                shape = (length // parts, batch, self.config.hidden_size)
                dtype = next(self.parameters()).dtype
                hidden_SBH = self.relay.receive(stage.index, shape, dtype)
            hidden_SBH = self.through(stage, hidden_SBH, run)
            if not stage.is_last:
                self.relay.send(stage.index, hidden_SBH)
        return hidden_SBH if self.head is not None else None

    def _entered(self, hidden_SBH: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        """The hidden states of this context rank's whole part, as the head takes them: [S, B, H]."""
        if self.final_norm is not None:
            hidden_SBH = self.final_norm(hidden_SBH, run.axis)
        return run.axis.enter(hidden_SBH)


class StageModule(nn.Module):
    """A stage of a GPT as a module of its own, around the same parameters, as a pipeline schedule calls it.

    The first stage takes token ids [B, S], the others hidden states [S, B, H] as `TensorAxis.leave` leaves them; the
    last one gives what `GPT.forward` gives, the others hidden states. Labels and loss mask, [B, S], reach every stage
    of the last one's rank. `dropout_seed` holds the micro-batch's seed, int64 [1] on the CPU; `begins_BS` and
    `positions_BS` are as in `GPT.forward`.
    """

    def __init__(self, model: GPT, stage: Stage, seq_length: int):
        super().__init__()
        # Held in a tuple: this module has the parameters of its stage alone.
        self._model = (model,)
        self._stage = stage
        self._seq_length = seq_length
        self.layers = nn.ModuleList(model.layers[str(n)] for n in stage.layers)
        self.embedding = model.embedding if stage.is_first else None
        self.final_norm = model.final_norm if stage.is_last else None
        self.head = model.head if stage.is_last else None

    def forward(
        self,
        received: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        begins_BS: torch.Tensor | None = None,
        positions_BS: torch.Tensor | None = None,
        dropout_seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        (model,) = self._model
        seed = None if dropout_seed is None else int(dropout_seed)
        run = model.plain_pass(self._seq_length, seed, begins_BS=begins_BS, positions_BS=positions_BS)
        hidden_SBH = model.begin(received, run, 0, positions_BS) if self._stage.is_first else received
        hidden_SBH = model.through(self._stage, hidden_SBH, run)
        return model.loss(hidden_SBH, labels, loss_mask, run) if self._stage.is_last else hidden_SBH


class Embedding(nn.Module):
    """Word vectors, plus learned position vectors where the model has them: [B, S] ids -> [S, B, H]."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: ProcessMesh,
        part: VocabularyPart,
        max_positions: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._dropout = config.hidden_dropout
        self.word = VocabParallelEmbedding(part, config.hidden_size, mesh, device=device, dtype=dtype)
        self.position = None
        if config.position_embedding_type == "learned_absolute":
            self.position = PositionEmbedding(max_positions, config.hidden_size, mesh, device=device, dtype=dtype)

    def forward(
        self, tokens_BS: torch.Tensor, run: ForwardPass, start: int = 0, positions_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden_SBH = self.word(run.context.part(tokens_BS, 1).t(), run.axis)
        if self.position is not None:
            stop, longest = start + tokens_BS.shape[1], self.position.weight.mesh_layout.global_shape[0]
            if stop > longest:
                raise UserError(
                    f"{stop} tokens for a model that learned {longest} positions; give it at most {longest}, or train "
                    f"with a larger max_position_embeddings"
                )
            if positions_BS is None:
                positions_BS = torch.arange(start, stop, device=tokens_BS.device).unsqueeze(0)
            hidden_SBH = hidden_SBH + self.position(run.context.part(positions_BS, 1).t(), run.axis)
        return run.dropout(hidden_SBH, self._dropout, _BEFORE_LAYERS, Site.EMBEDDING)


class PositionEmbedding(nn.Module):
    """Learned position vectors, replicated over tensor ranks: positions [S, B or 1] -> [S, B or 1, H].

    Under sequence parallelism each rank looks up its part of the sequence alone.
    """

    def __init__(
        self,
        max_positions: int,
        hidden_size: int,
        mesh: ProcessMesh,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        layout = replicated((max_positions, hidden_size), mesh.rank("tensor"))
        self.weight = empty_parameter(layout, device=device, dtype=dtype)

    def forward(self, positions: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
        return F.embedding(axis.part_of_sequence(positions), axis.shared(self.weight))


class Head(nn.Module):
    """The output layer, split over the vocabulary by its weight [V, H]: [S, B, H] -> [S, B, V], or to the loss.

    With `chunk_size` the loss is made of that many columns' logits at a time, and there are never more of them.
    """

    def __init__(self, weight: nn.Parameter, part: VocabularyPart, mesh: ProcessMesh, chunk_size: int):
        super().__init__()
        self.weight = weight
        self._part = part
        self._mesh = mesh
        self._chunk_size = chunk_size

    def forward(
        self,
        entered_SBH: torch.Tensor,
        labels_SB: torch.Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> torch.Tensor:
        """This rank's logits [S, B, V], or with labels the loss of each token [S, B] in fp32, equal on all ranks."""
        if labels_SB is None:
            return F.linear(entered_SBH, self.weight)
        place = labels_SB, self._part, self._mesh.group("tensor")
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        if 0 < self._chunk_size < self._part.length:
            return vocab_parallel_linear_cross_entropy(
                entered_SBH, self.weight, *place, columns=self._chunk_size, **options
            )
        return vocab_parallel_cross_entropy(F.linear(entered_SBH, self.weight), *place, **options)


def _causal_mask(start: int, stop: int, left_padding_B: torch.Tensor) -> torch.Tensor:
    """Which of `stop` keys each query from `start` on sees: bool [B, 1, S, stop].

    Every query sees itself, padding too: a row without any key has no softmax.
    """
    keys = torch.arange(stop, device=left_padding_B.device)
    queries = keys[start:].unsqueeze(1)
    seen = (keys <= queries) & (keys >= left_padding_B[:, None, None, None])
    return seen | (keys == queries)
