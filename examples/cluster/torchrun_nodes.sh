#!/usr/bin/env bash
# Trains across nodes: to be started on each of them, with the same arguments, which go to pretrain_gpt.py.
#
#   NODES=2 MASTER_ADDR=node1 bash examples/cluster/torchrun_nodes.sh --config mine.yaml --save runs/mine
#
# NODES        how many
# MASTER_ADDR  the address of one of them, by which the others reach it; without NODE_RANK what `hostname` says there,
#              since torchrun compares that to see on which node it is to be met
# MASTER_PORT  a free port of that one: 29500
# NODE_RANK    which of them this is, 0 being MASTER_ADDR: the order of ranks is then that of the nodes (a static
#              rendezvous); without it nodes are numbered as they come (c10d)
# RANKS        processes a node: as many as there are GPUs, or 2
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
: "${NODES:?how many nodes}" "${MASTER_ADDR:?the address of the first node}"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))} port=${MASTER_PORT:-29500}

if [ -n "${NODE_RANK:-}" ]; then
    meeting=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
else
    meeting=(--rdzv-backend c10d --rdzv-id "pretrain-$port" --rdzv-endpoint "$MASTER_ADDR:$port")
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "$ranks" "${meeting[@]}" "$root/pretrain_gpt.py" "$@"
