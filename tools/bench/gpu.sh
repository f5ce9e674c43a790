#!/usr/bin/env bash
# The GPU tests and the GPU benchmarks, on a machine that has a GPU, no network and no .venv of this checkout.
#
#   tools/bench/gpu.sh [--cpu] [--only tests|bfloat16|float32|steps] [SITE]
#
# SITE is a folder of installed packages (pip install --target) put first on Python's path, where the machine's own
# Python lacks some. Results go to $OUT, else to tools/bench/results. --cpu is the same with tiny sizes on the CPU, to
# try this script. $PYTHON names the interpreter. All parts run, whatever fails; the exit code tells. --only runs one of
# four parts, of some minutes each: the tests, the kernels of a dtype, whole training steps.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
on_cpu='' only='' failed=()
while (($#)); do
    case $1 in
        --cpu) on_cpu=1 ;;
        --only) only=${2:?--only tests, bfloat16, float32 or steps}; shift ;;
        -*) echo "unknown option $1; the options are --cpu and --only tests|bfloat16|float32|steps" >&2; exit 2 ;;
        *) export PYTHONPATH=$1${PYTHONPATH:+:$PYTHONPATH} ;;
    esac
    shift
done
case $only in
    ''|tests|bfloat16|float32|steps) ;;
    *) echo "--only $only: it is tests, bfloat16, float32 or steps" >&2; exit 2 ;;
esac
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
OUT=${OUT:-tools/bench/results}
mkdir -p "$OUT" || exit 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1

part() { # name, command
    printf '\n== %s\n' "$1"
    "${@:2}" || failed+=("$1")
}

"$PYTHON" - "$on_cpu" <<'EOF' || exit 2
import sys

import torch

missing = []
for name in ("deepspeed", "tyro", "numpy", "safetensors", "transformers", "pytest", "hypothesis"):
    try:
        __import__(name)
    except ImportError as error:
        missing.append(f"{name} ({error})")
if missing:
    sys.exit("this Python lacks " + ", ".join(missing) + "; give a folder that has them: tools/bench/gpu.sh SITE")
if not torch.cuda.is_available() and not sys.argv[1]:
    sys.exit("torch sees no GPU; --cpu tries this script without one")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {device}")
EOF
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

wanted() { [[ -z $only || $only == "$1" ]]; }

if [[ -n $on_cpu ]]; then
    kernels=(--threads 1 --rows 64 --rounds 3 --groups norms softmax activations) device=smoke
    native=(--shapes gpt2-tiny --turns 2 --steps 1) step=(--bf16 --shapes gpt2-tiny --turns 2 --steps 1)
else
    # 64 MB a tensor or more: less fits into the card's cache.
    kernels=(--device cuda --rows 32768 --hidden 1024 2048 4096 8192 16384 --rounds 11) device=gpu
    native=(--precisions bf16) step=()
fi
if wanted tests; then
    part 'GPU tests' "$PYTHON" -m pytest tests/gpu -rs --durations=5 ${on_cpu:+--on-cpu} --junitxml "$OUT/gpu-tests.xml"
fi
for dtype in bfloat16 float32; do
    if wanted $dtype; then
        part "kernels in $dtype" "$PYTHON" tools/bench/kernels.py "${kernels[@]}" --dtypes $dtype \
            --output "$OUT/kernels-$device-$dtype.json"
    fi
done
if wanted steps; then
    part 'native step' "$PYTHON" tools/bench/native_step.py "${native[@]}" --output "$OUT/native_step-$device.json"
    part 'training step' "$PYTHON" tools/bench/train_step.py "${step[@]}" --output "$OUT/train_step-$device.json"
fi

if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "${failed[*]}" >&2
    exit 1
fi
printf '\nall parts passed; results in %s\n' "$OUT"
