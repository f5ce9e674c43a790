"""GPT-2's ids of JSON lines by datatrove's writer of Megatron's files, with the Python of an environment that has it.

    python datatrove_script.py INPUT.jsonl PREFIX TOKENIZER.json TASKS

Each task has a part of the input and writes files of its own, PREFIX/00000_tokens.bin and so on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer


def main(source: str, folder: str, tokenizer: str, tasks: int) -> None:
    data = Path(source).read_bytes()
    bounds = [0, *(data.index(b"\n", len(data) * part // tasks) + 1 for part in range(1, tasks)), len(data)]
    parts = Path(folder, "parts")
    parts.mkdir(parents=True)
    for part in range(tasks):
        (parts / f"{part:05d}.jsonl").write_bytes(data[bounds[part] : bounds[part + 1]])
    del data
    writer = MegatronDocumentTokenizer(folder, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>")
    LocalPipelineExecutor(
        [JsonlReader(str(parts)), writer], tasks=tasks, workers=tasks, logging_dir=f"{folder}/logs", start_method="fork"
    ).run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
