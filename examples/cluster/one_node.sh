#!/usr/bin/env bash
# Trains on all GPUs of this machine; without one, on RANKS processes of the CPU. Arguments go to pretrain_gpt.py.
#
#   bash examples/cluster/one_node.sh --config mine.yaml --save runs/mine
#
# LAUNCHER     torchrun (the default) or deepspeed
# RANKS        how many: as many as there are GPUs, or 2
# MASTER_PORT  another one, where a second job runs on this machine: 29500
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))} port=${MASTER_PORT:-29500}
[ "$gpus" != 0 ] || export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

case ${LAUNCHER:-torchrun} in
torchrun) exec torchrun --nproc-per-node "$ranks" --master-addr 127.0.0.1 --master-port "$port" "$root/pretrain_gpt.py" "$@" ;;
deepspeed) exec deepspeed --num_accelerators "$ranks" --master_port "$port" "$root/pretrain_gpt.py" "$@" ;;
*) echo "error: LAUNCHER=$LAUNCHER is not known; choose torchrun or deepspeed" >&2 && exit 2 ;;
esac
