"""What reads files of others: each target makes a valid input, damages it by a seed, and reads it as the product does.

A target is a generator function of (folder, seeds): after each input it yields whether that was read, and else it was
refused. It runs in a process of its own, with bounded memory; see `hold.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.mutations import as_json, mutated_bytes, mutated_json, mutated_text

from megatron_lite.errors import ConfigError, MegatronLiteError

Target = Callable[[Path, Iterable[int]], Iterator[bool]]


def refuse(problems: list[str]) -> None:
    """Raise ConfigError for problems, as the door does."""
    if problems:
        raise ConfigError(problems)


def _is_read(action: Callable[[], object]) -> bool:
    """Whether an input was taken, or refused by an error that users see."""
    try:
        action()
    except MegatronLiteError as error:
        assert str(error).strip(), "an error without a word"
        return False
    return True


def _damaged_json(content: Any, seed: int) -> bytes:
    """The text of `content` with other values or another structure, or for every third seed with other bytes."""
    draw = random.Random(seed)
    return as_json(mutated_json(content, draw), draw) if seed % 3 else mutated_bytes(json.dumps(content).encode(), draw)


def manifest(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """Damage that the checksum of a manifest finds, and damage that was signed with a new one."""
    from megatron_lite.checkpoint.manifest import encode, parse

    files = {"rank-00000.safetensors": {"size": 1128, "header_size": 104, "header_crc32": 7}}
    tensors = {
        f"weight/layers.{layer}": {
            "dtype": "F32",
            "shape": [8, 16],
            "boxes": [
                {
                    "start": [row, 0],
                    "shape": [4, 16],
                    "file": "rank-00000.safetensors",
                    "bytes": [104 + 512 * layer + 64 * row, 104 + 512 * layer + 64 * row + 256],
                    "crc32": [1],
                }
                for row in (0, 4)
            ],
        }
        for layer in (0, 1)
    }
    whole = encode(3, "tp=1", {"a": {"b": [1, 2.5, None]}}, {"torch": "2"}, {"progress": {"step": 3}}, files, tensors)
    parse(whole, "manifest")
    content = {key: value for key, value in json.loads(whole).items() if key != "sha256"}
    for seed in seeds:
        draw = random.Random(seed)
        if seed % 4:
            changed = mutated_json(content, draw)
            body = as_json(changed, draw)
            if body.endswith(b"}") and len(body) > 2:
                body = body[:-1] + b","
            raw = body + b'\n"sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()
        else:
            raw = mutated_bytes(whole, draw)
        yield _is_read(lambda raw=raw: parse(raw, "manifest"))


def token_index(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """The .idx of a token set, and rarely its .bin; what opens must be readable to its last token."""
    from megatron_lite.data.documents import TokenWindows
    from megatron_lite.data.indexed import IndexedReader, IndexedWriter

    prefix = folder / "set"
    with IndexedWriter(prefix, vocab_size=1000) as writer:
        for length in (5, 0, 17, 1, 40):
            writer.add_document(np.arange(length))
    index, tokens = (prefix.with_suffix(suffix) for suffix in (".idx", ".bin"))
    whole_index, whole_tokens = index.read_bytes(), tokens.read_bytes()

    def use() -> None:
        windows = TokenWindows(IndexedReader(prefix), 8)
        windows.check_vocabulary(1000)
        for window in range(min(len(windows), 100)):
            assert len(windows[window].tokens) == 9
            assert sum(extent.tokens for extent in windows.extents(window)) == 9

    use()
    for seed in seeds:
        draw = random.Random(seed)
        index.write_bytes(mutated_bytes(whole_index, draw))
        tokens.write_bytes(mutated_bytes(whole_tokens, draw) if seed % 10 == 0 else whole_tokens)
        yield _is_read(use)


def shard(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """The files of a checkpoint: any change at all is found."""
    import torch

    from megatron_lite.checkpoint.find import verify
    from megatron_lite.checkpoint.manifest import FILE_NAME, shard_name
    from megatron_lite.checkpoint.piece import Piece
    from megatron_lite.checkpoint.save import save
    from megatron_lite.checkpoint.store import step_name
    from megatron_lite.parallel.mesh_shape import MeshShape
    from megatron_lite.parallel.process_mesh import ProcessMesh

    values = torch.arange(60, dtype=torch.float32).view(6, 10)
    pieces = [Piece("weight/a", (6, 10), (0, 0), values, True)]
    save(folder, 1, pieces, {}, ProcessMesh.create(MeshShape()), layout="tp=1", config={}, versions={})
    checkpoint = folder / step_name(1)
    paths = [checkpoint / FILE_NAME, checkpoint / shard_name(0)]
    wholes = [path.read_bytes() for path in paths]
    verify(checkpoint)
    for seed in seeds:
        draw = random.Random(seed)
        path, whole = draw.choice(list(zip(paths, wholes, strict=True)))
        damaged = mutated_bytes(whole, draw)
        path.write_bytes(damaged)
        taken = _is_read(lambda: verify(checkpoint))
        assert taken == (damaged == whole), f"{path.name} was changed and nobody noticed"
        path.write_bytes(whole)
        yield taken


def safetensors_file(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """A safetensors file that somebody else wrote: damaged bytes, and headers that say what is not so."""
    import torch
    from safetensors.torch import save

    from megatron_lite.checkpoint.boxes import Rectangle
    from megatron_lite.checkpoint.tensor_file import TensorFile

    whole = save({"a": torch.arange(24.0).view(4, 6), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(2, 2)})
    length = int.from_bytes(whole[:8], "little")
    content, values = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    path = folder / "model.safetensors"

    def use() -> None:
        with TensorFile(path) as file:
            for name, tensor in file.tensors.items():
                assert len(file.tensors) < 10 and tensor.nbytes <= len(values) + len(whole)
                into = torch.empty(tensor.shape)
                file.read(name, Rectangle((0,) * len(tensor.shape), tensor.shape), into)

    path.write_bytes(whole)
    use()
    for seed in seeds:
        draw = random.Random(seed)
        header = as_json(mutated_json(content, draw), draw)
        size = draw.choice((len(header),) * 9 + (0, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(size.to_bytes(8, "little") + header + values if seed % 4 else mutated_bytes(whole, draw))
        yield _is_read(use)


def huggingface_config(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """The config.json of a Hugging Face folder, and what the model it describes may be."""
    from megatron_lite.config import check, huggingface, sources
    from megatron_lite.config.run import RunConfig

    content = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    training = {"train_iters": 5, "global_batch_size": 4}
    given = sources.override(RunConfig(), {"training": training, "data": {"mock_data": True, "seq_length": 16}})
    path = folder / "config.json"

    def use() -> None:
        found = sources.override(given, huggingface.overrides(folder))
        refuse([*check.problems(found, 1), *huggingface.contradictions(found.model, folder)])

    for seed in seeds:
        draw = random.Random(seed)
        raw = json.dumps(content).encode()
        path.write_bytes(as_json(mutated_json(content, draw), draw) if seed % 5 else mutated_bytes(raw, draw))
        yield _is_read(use)


def config(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """A run's configuration: read, and every rule put to what was read."""
    from megatron_lite.config import check, sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.data import rules
    from megatron_lite.parallel.pipeline import rules as pipeline_rules
    from megatron_lite.train import deepspeed_config

    model = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    given = {"model": model, "data": {"mock_data": True}, "training": {"train_iters": 5}}
    sound = sources.override(RunConfig(), given)
    lines = sources.dump(sound).splitlines(keepends=True)
    path = folder / "config.yaml"

    def use() -> None:
        found = sources.override(sound, sources.read(path))
        check.notices(found)
        rooms = (check.problems, pipeline_rules.problems, deepspeed_config.problems)
        refuse([*(problem for room in rooms for problem in room(found, 8)), *rules.problems(found)])

    for seed in seeds:
        draw = random.Random(seed)
        some = "".join(line for line in lines if not line.startswith(" ") or draw.random() < 0.1)
        path.write_bytes(mutated_text(some.encode(), draw))
        yield _is_read(use)


def provenance(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """PREFIX.manifest.json, which is used or said to be of no use."""
    from megatron_lite.data.provenance import (
        Provenance,
        check_tokenizer,
        manifest_path,
        read_provenance,
        write_provenance,
    )
    from megatron_lite.data.tokenizer_byte import ByteTokenizer

    inputs = [{"name": "a.jsonl", "size": 10, "read": 10, "sha256": "0"}]
    facts = Provenance(
        "ByteTokenizer", "0" * 32, 257, True, 3, 40, 100, 1.5, {"empty": 1}, "test", inputs=inputs, parts=inputs
    )
    write_provenance(folder / "set", facts)
    path = manifest_path(folder / "set")
    content = json.loads(path.read_bytes())

    def use() -> None:
        found = read_provenance(folder / "set", 40)
        check_tokenizer(folder / "set", found, ByteTokenizer())
        if found is not None and found.text_bytes is not None:
            assert found.bytes_per_token == found.text_bytes / 40

    for seed in seeds:
        path.write_bytes(_damaged_json(content, seed))
        yield _is_read(use)


def deepspeed_json(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """A user's --deepspeed_config."""
    from megatron_lite.config import sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.train import deepspeed_config

    content = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 500_000, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": False,
    }
    path = folder / "ds.json"
    given = {
        "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
        "training": {"train_iters": 5, "global_batch_size": 8},
        "precision": {"bf16": True},
        "parallel": {"zero_stage": 1, "deepspeed_config": str(path)},
    }
    found = sources.override(RunConfig(), given)

    def use() -> None:
        refuse(deepspeed_config.problems(found, 2))
        deepspeed_config.build(found, 2)

    path.write_text(json.dumps(content))
    use()
    for seed in seeds:
        path.write_bytes(_damaged_json(content, seed))
        yield _is_read(use)


def schedule_csv(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    """A user's pipeline schedule."""
    from megatron_lite.config import sources
    from megatron_lite.config.run import RunConfig
    from megatron_lite.parallel.pipeline import rules

    path = folder / "schedule.csv"
    whole = b"0F0,0F1,,0B0,,0B1\n,1F0,1B0,1F1,1B1,\n"
    given = {
        "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
        "training": {"train_iters": 5, "global_batch_size": 2, "micro_batch_size": 1},
        "parallel": {"pipeline_model_parallel_size": 2, "pipeline_schedule": str(path)},
    }
    found = sources.override(RunConfig(), given)

    path.write_bytes(whole)
    assert not rules.problems(found, 2)
    for seed in seeds:
        path.write_bytes(mutated_text(whole, random.Random(seed)))
        yield _is_read(lambda: refuse(rules.problems(found, 2)))


def _tokenizer(
    folder: Path, seeds: Iterable[int], kind: str, whole: bytes, name: str, mutate, **fields
) -> Iterator[bool]:
    """A file of a tokenizer, in whatever library reads it: opened it must encode and decode."""
    from megatron_lite.config.data import DataConfig
    from megatron_lite.data.tokenizer import build_tokenizer

    path = folder / name
    data = DataConfig(tokenizer_type=kind, **{field: str(value or path) for field, value in fields.items()})

    def use() -> None:
        tokenizer = build_tokenizer(data)
        ids = tokenizer.encode("In the beginning, 123 — ß\n")
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)
        tokenizer.decode(ids)

    path.write_bytes(whole)
    use()
    for seed in seeds:
        path.write_bytes(mutate(random.Random(seed)))
        yield _is_read(use)


def huggingface_tokenizer(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator(["in the beginning was the word and the word was there"] * 9, trainer)
    made.add_special_tokens(["<|endoftext|>"])
    content = json.loads(made.to_str())

    def mutate(draw: random.Random) -> bytes:
        return as_json(mutated_json(content, draw), draw) if draw.random() < 0.8 else mutated_bytes(whole, draw)

    whole = json.dumps(content).encode()
    return _tokenizer(folder, seeds, "HuggingFaceTokenizer", whole, "tokenizer.json", mutate, tokenizer_model=None)


def sentencepiece_tokenizer(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    import io
    import pydoc_data.topics

    import sentencepiece

    model = io.BytesIO()
    text = list(pydoc_data.topics.topics.values())[:8]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=300, minloglevel=2, num_threads=1
    )
    whole = model.getvalue()
    mutate = lambda draw: mutated_bytes(whole, draw)  # noqa: E731
    return _tokenizer(folder, seeds, "SentencePieceTokenizer", whole, "tokenizer.model", mutate, tokenizer_model=None)


def tiktoken_tokenizer(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"in", b"th", b"the", b" the"]
    whole = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    mutate = lambda draw: (mutated_text if draw.random() < 0.5 else mutated_bytes)(whole, draw)  # noqa: E731
    return _tokenizer(
        folder,
        seeds,
        "TiktokenTokenizer",
        whole,
        "tokenizer.tiktoken",
        mutate,
        tokenizer_model=None,
        tiktoken_pattern="r50k",
    )


def tekken_tokenizer(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"in", b"th", b"the", b" the"]
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)]
    config = {"pattern": r"\w+|\W", "default_vocab_size": 266, "default_num_special_tokens": 6}
    specials = [{"rank": 5, "token_str": "[INST]", "is_control": True}]
    content = {"config": config, "vocab": vocab, "special_tokens": specials}
    whole = json.dumps(content).encode()

    def mutate(draw: random.Random) -> bytes:
        part = {"config": config, "special_tokens": specials} if draw.random() < 0.5 else content
        changed = mutated_json(part, draw)
        return as_json({"vocab": vocab, **changed} if isinstance(changed, dict) else changed, draw)

    return _tokenizer(folder, seeds, "TiktokenTokenizer", whole, "tekken.json", mutate, tokenizer_model=None)


def gpt2_tokenizer(folder: Path, seeds: Iterable[int]) -> Iterator[bool]:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: rank for rank, token in enumerate([*letters, "in", "th", "the", "<|endoftext|>"])}
    merges = b"#version: 0.2\ni n\nt h\nth e\n"
    whole = json.dumps(vocabulary).encode()
    (folder / "merges.txt").write_bytes(merges)

    def mutate(draw: random.Random) -> bytes:
        if draw.random() < 0.3:
            (folder / "merges.txt").write_bytes(mutated_text(merges, draw))
            return whole
        (folder / "merges.txt").write_bytes(merges)
        return as_json(mutated_json(vocabulary, draw), draw) if draw.random() < 0.7 else mutated_bytes(whole, draw)

    return _tokenizer(
        folder,
        seeds,
        "GPT2BPETokenizer",
        whole,
        "vocab.json",
        mutate,
        vocab_file=None,
        merge_file=folder / "merges.txt",
    )


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        manifest,
        shard,
        safetensors_file,
        huggingface_config,
        token_index,
        provenance,
        config,
        deepspeed_json,
        schedule_csv,
        huggingface_tokenizer,
        sentencepiece_tokenizer,
        tiktoken_tokenizer,
        tekken_tokenizer,
        gpt2_tokenizer,
    )
}
