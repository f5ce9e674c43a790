#!/usr/bin/env python
"""Token sets looked at, checked, merged, joined and divided.

    python tools/dataset.py info data/web_text_document
    python tools/dataset.py head data/web_text_document --documents 3
    python tools/dataset.py verify data/*_text_document.idx
    python tools/dataset.py merge data/web_text_document data/code_text_document --output data/all_text_document
    python tools/dataset.py join data/qa_prompt_document data/qa_answer_document \\
        --context data/qa_prompt_document --output data/qa
    python tools/dataset.py divide data/web_text_document --by length --buckets 4

A set is named by its prefix; its .bin or .idx will do.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_lite import log
from megatron_lite.config.command_line import read
from megatron_lite.config.data import DataConfig
from megatron_lite.config.megatron_flags import BY_NAME
from megatron_lite.config.tokenizer import TokenizerFiles
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.provenance import Provenance, check_tokenizer, read_provenance
from megatron_lite.data.token_set_division import MOST_BUCKETS, Difficulty, divide
from megatron_lite.data.token_set_join import join
from megatron_lite.data.token_set_merge import merge
from megatron_lite.data.token_sets import describe, faults
from megatron_lite.data.tokenizer import build_tokenizer
from megatron_lite.data.tokenizer_interface import Tokenizer
from megatron_lite.errors import EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED, ConfigError, MegatronLiteError
from megatron_lite.publish import interrupts_awaited

_SUFFIXES = (".bin", ".idx")


def _bare(name: str) -> str:
    """The prefix of a set that is named by it or by one of its files."""
    return name[: -len(_SUFFIXES[0])] if name.endswith(_SUFFIXES) else name


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sets:
    prefix: tuple[str, ...]
    """Token sets; may be given without the flag, in front of all others."""

    @property
    def prefixes(self) -> list[str]:
        """Each set once, without the suffix of one of its files."""
        return list(dict.fromkeys(map(_bare, self.prefix)))

    @property
    def parts(self) -> list[str]:
        """The sets that are put together, each once. Raises ConfigError if one is named twice."""
        named = list(map(_bare, self.prefix))
        if repeated := {name for name in named if named.count(name) > 1}:
            raise ConfigError(
                f"{', '.join(sorted(repeated))} is named more than once, and a set is taken once; name each once (a "
                "weight of --data-path makes training read one more often)."
            )
        return self.prefixes

    def only(self, command: str) -> str:
        """The one set there should be."""
        if len(self.prefixes) != 1:
            raise ConfigError(f"{command} works on one set, and {len(self.prefixes)} are given.")
        return self.prefixes[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoOptions(_Sets):
    """What there is to say of token sets: counts, lengths of documents, tokenizer, inputs, recipe."""

    json: bool = False
    """One JSON object a set instead of text."""

    def run(self) -> int:
        for prefix in self.prefixes:
            found = describe(prefix)
            print(json.dumps(found) if self.json else "\n".join(_lines(found)), flush=True)
        return EXIT_DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions(_Sets):
    """Check token sets: index, token ids, and all files against their manifests. Exit code 1 if any is damaged."""

    vocab_size: int | None = None
    """Ids are below this; default: the manifest's."""

    def run(self) -> int:
        damaged = 0
        for prefix in self.prefixes:
            found = list(faults(prefix, self.vocab_size))
            damaged += bool(found)
            print("\n".join([f"{prefix}: {'damaged' if found else 'sound'}", *(f"  {fault}" for fault in found)]))
        return EXIT_ERROR if damaged else EXIT_DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOptions(TokenizerFiles, _Sets):
    """The text of a token set's first documents, by the tokenizer its manifest names or by one that is given."""

    documents: int = 5
    characters: int = 400
    """Of each document at most; 0: all."""
    tokenizer_type: str | None = None
    """With its files, where the manifest names none or they have moved."""

    def run(self) -> int:
        for name in ("documents", "characters"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)} is below 0; give 0 or more.")
        reader = IndexedReader(self.only("head"))
        facts = read_provenance(reader.prefix, reader.num_tokens)
        tokenizer = self._tokenizer(reader.prefix, facts)
        check_tokenizer(reader.prefix, facts, tokenizer)
        for document in range(min(self.documents, reader.num_documents)):
            start, stop = reader.document_token(document), reader.document_token(document + 1)
            print(f"--- document {document}: {stop - start:,} tokens")
            # A token is seldom less than a character.
            stop = min(stop, start + self.characters) if self.characters else stop
            text = tokenizer.decode(reader.tokens(start, stop).tolist(), skip_special=False)
            print(text[: self.characters or None], flush=True)
        return EXIT_DONE

    def _tokenizer(self, prefix: str, facts: Provenance | None) -> Tokenizer:
        names = [field.name for field in dataclasses.fields(TokenizerFiles)]
        if self.tokenizer_type is not None:
            kind = BY_NAME["tokenizer_type"].values.get(self.tokenizer_type, self.tokenizer_type)
            return build_tokenizer(DataConfig(tokenizer_type=kind, **{name: getattr(self, name) for name in names}))
        if facts is None:
            raise ConfigError(f"{prefix} has no manifest to name its tokenizer; give --tokenizer-type and its files.")
        named = {name: value for name, value in facts.tokenizer.items() if name in names}
        named["special_tokens"] = tuple(named.get("special_tokens", ()))
        return build_tokenizer(DataConfig(tokenizer_type=facts.tokenizer_type, **named))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions(_Sets):
    """One token set of several: their documents in the order given, the bytes of Megatron's merge_datasets."""

    output: str
    """Prefix of the merged set."""

    def run(self) -> int:
        output = _bare(self.output)
        with interrupts_awaited() as pause:
            documents, tokens = merge(self.parts, output, pause)
        print(f"{output}: {documents:,} documents, {tokens:,} tokens of {len(self.parts)} sets")
        return EXIT_DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinOptions(_Sets):
    """One token set whose documents are those of several, side by side: a prompt and its answer, for example."""

    output: str
    """Prefix of the joined set."""
    context: tuple[str, ...] = ()
    """Sets that are read and not predicted: the joined set gets a loss mask, OUTPUT.loss_mask, that training uses."""

    def run(self) -> int:
        output = _bare(self.output)
        with interrupts_awaited() as pause:
            documents, tokens, counted = join(self.parts, tuple(map(_bare, self.context)), output, pause)
        print(f"{output}: {documents:,} documents, {tokens:,} tokens, {counted:,} of them to be predicted")
        return EXIT_DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivideOptions(_Sets):
    """Divide a token set by difficulty: PREFIX_bucket0 (the easiest), PREFIX_bucket1, ..., of about as many tokens."""

    by: Difficulty
    """length: tokens, few are easy; compression: what share of its size a document's ids take deflated, little is easy;
    score: --scores or the set's own column, low is easy."""
    buckets: int = 4
    scores: str | None = None
    """A .npy file of a number for each document; default: PREFIX.scores.npy, as --score-key makes it."""
    descending: bool = False
    """High is easy: for scores that say how good a text is."""

    def run(self) -> int:
        if not 2 <= self.buckets <= MOST_BUCKETS:
            raise ConfigError(f"--buckets {self.buckets} is not possible; give 2 to {MOST_BUCKETS}.")
        if self.scores is not None and self.by != "score":
            raise ConfigError(f"--scores is for --by score, and --by {self.by} was given.")
        with interrupts_awaited() as pause:
            made = divide(self.only("divide"), self.by, self.buckets, self.scores, self.descending, pause)
        for bucket in made:
            print(
                f"{bucket.prefix}: {bucket.documents:,} documents, {bucket.tokens:,} tokens, "
                f"{self.by} {bucket.lowest:g} to {bucket.highest:g}"
            )
        return EXIT_DONE


_COMMANDS: Mapping[str, type] = {
    "info": InfoOptions,
    "head": HeadOptions,
    "verify": VerifyOptions,
    "merge": MergeOptions,
    "join": JoinOptions,
    "divide": DivideOptions,
}


def _number(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `describe` found, for a person."""
    yield (
        f"{found['prefix']}: {found['documents']:,} documents in {found['sequences']:,} sequences, {found['tokens']:,} "
        f"tokens of {found['dtype']}, {found['bytes']:,} bytes"
    )
    if lengths := found.get("document_lengths"):
        quantiles = ", ".join(f"{float(share):.0%} {value:,}" for share, value in lengths["quantiles"].items())
        yield f"  tokens of a document: mean {lengths['mean']:,.1f}; {quantiles}; {lengths['empty']:,} are empty"
    if mask := found["loss_mask"]:
        yield f"  loss mask {mask['prefix']}: {mask['targets']:,} tokens are predicted"
    facts = found["manifest"]
    if facts is None:
        yield "  no manifest"
        return
    files = ", ".join(f"{name} {value}" for name, value in facts["tokenizer"].items())
    yield (
        f"  tokenizer: {facts['tokenizer_type']} of {facts['vocab_size']:,} ids, fingerprint "
        f"{facts['tokenizer_fingerprint'][:12]}{f'; {files}' if files else ''}"
    )
    if facts["text_bytes"] is not None:
        share = facts["text_bytes"] / max(facts["tokens"], 1)
        yield f"  {facts['text_bytes']:,} bytes of text = {share:.3f} a token"
    yield f"  unigram entropy {facts['unigram_entropy']:.4f} nats a token; made by {facts['created_by']}"
    for entry in facts["inputs"]:
        sha256 = str(entry.get("sha256"))[:12]
        yield f"  input {entry.get('name')}: {_number(entry, 'read')} bytes read, SHA-256 {sha256}"
    if recipe := facts["recipe"]:
        kept, documents = _number(recipe, "kept"), _number(recipe, "documents")
        yield f"  recipe {recipe.get('name')}: kept {kept} of {documents} documents"
    for part in facts["parts"]:
        yield f"  part {part.get('prefix')}: {_number(part, 'documents')} documents, {_number(part, 'tokens')} tokens"
    for name in ("skipped", "shuffle_seed", "score_key", "difficulty"):
        if facts[name] not in (None, {}):
            yield f"  {name.replace('_', ' ')}: {facts[name]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help"):
            with log.reader_may_leave():
                print(__doc__)
            return EXIT_DONE
        command, *words = words
        if command not in _COMMANDS:
            raise ConfigError(f"{command} is no command; there are {', '.join(_COMMANDS)}, each with --help.")
        if words and not words[0].startswith("-"):
            words.insert(0, "--prefix")
        kind: Callable[..., Any] = _COMMANDS[command]
        with log.reader_may_leave():
            return read(kind, words, prog=f"dataset.py {command}", description=kind.__doc__).run()
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        log.note("stopped; no set was written")
        return EXIT_INTERRUPTED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
