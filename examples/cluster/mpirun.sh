#!/usr/bin/env bash
# Trains across nodes by Open MPI's mpirun over ssh. Arguments go to pretrain_gpt.py.
#
#   HOSTS=node1:8,node2:8 bash examples/cluster/mpirun.sh --config mine.yaml --save runs/mine
#
# MPI starts the ranks and carries nothing else: they talk by nccl and gloo. This folder, the Python environment and
# the run folder are wanted under the same paths on each node.
#
# HOSTS          nodes, each with its number of ranks
# MASTER_ADDR    the first node's address: its name in HOSTS
# MASTER_PORT    a free port of it: 29500
# STOP_SECONDS   how long ranks may take to save once they are told to stop, and mpirun to end once a rank has died: 30
# MPIRUN_OPTIONS more options, such as "-x NCCL_SOCKET_IFNAME=ib0"
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
: "${HOSTS:?nodes and ranks, as node1:8,node2:8}"
first=${HOSTS%%,*}
export MASTER_ADDR="${MASTER_ADDR:-${first%%:*}}" MASTER_PORT="${MASTER_PORT:-29500}"

# mpirun itself would leave ranks one second.
exec mpirun --host "$HOSTS" --bind-to none --mca odls_base_sigkill_timeout "${STOP_SECONDS:-30}" \
    -x MASTER_ADDR -x MASTER_PORT -x PATH ${OMP_NUM_THREADS:+-x OMP_NUM_THREADS} ${MPIRUN_OPTIONS:-} \
    "$(command -v python)" "$root/pretrain_gpt.py" "$@"
