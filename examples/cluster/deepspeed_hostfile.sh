#!/usr/bin/env bash
# Trains on the nodes of a hostfile, started from one of them by pdsh over ssh. Arguments go to pretrain_gpt.py.
#
#   HOSTFILE=hostfile bash examples/cluster/deepspeed_hostfile.sh --config mine.yaml --save runs/mine
#
# Wanted: ssh without a password from here to each node, pdsh here, and this folder, the Python environment and the run
# folder under the same paths everywhere.
#
# HOSTFILE     a line a node, as "node1 slots=8"
# MASTER_ADDR  the first node's address, where it is not to be the first that `hostname -I` gives there
# MASTER_PORT  a free port of the first node: 29500
# DEEPSPEED_OPTIONS  more options of deepspeed, such as "--no_ssh_check"
#
# What ranks on other nodes are to find in their environment goes into .deepspeed_env, here or in the home folder, a
# line each. Of use: NCCL_SOCKET_IFNAME=ib0 and GLOO_SOCKET_IFNAME=eth0, where the network between the nodes is not the
# one that leads to the first (gloo's is chosen so by itself), and DS_ACCELERATOR=cpu on nodes without GPUs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
hostfile=${HOSTFILE:-hostfile}
[ -f "$hostfile" ] || { # deepspeed itself would train on this machine alone
    echo "error: there is no $hostfile; name the file of nodes by HOSTFILE" >&2 && exit 2
}
master=(${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})

# In a process group of its own: a deepspeed that is killed leaves pdsh, whose connections are ended here, and each
# node's ranks then save and stop.
set -m
deepspeed --hostfile "$hostfile" --force_multi "${master[@]}" --master_port "${MASTER_PORT:-29500}" \
    ${DEEPSPEED_OPTIONS:-} "$root/pretrain_gpt.py" "$@" &
job=$!
trap 'kill -TERM $job' TERM INT
code=0
wait $job || code=$?
trap - TERM INT
wait $job 2>/dev/null || code=$? # a signal ends the first wait early
for left in $(pgrep -g $job); do
    pkill -TERM -P "$left" || true
    kill -TERM "$left" 2>/dev/null || true
done
exit "$code"
