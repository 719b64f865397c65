#!/usr/bin/env bash
# deepspeed.sh STAGE CONFIG [section.key=value ...]: one rank a GPU under the deepspeed launcher.
# The engine is a setting of its own: pretrain.engine=deepspeed.
#
# Settings: (environment variables)
#   RANKS        ranks on this node; unset: its GPUs, or 1
#   NODES        number of nodes (1); start this script on each of them, with
#   NODE_RANK    0, 1, ... and
#   MASTER_ADDR  the host name of node 0, reached on MASTER_PORT (29500)

set -euo pipefail
# shellcheck source=launchers/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
need_master

options=(--hostfile /dev/null --num_gpus "$ranks" --master_port "${MASTER_PORT:-$((20000 + RANDOM % 20000))}")
if [ "$nodes" -gt 1 ]; then
    hosts=$(mktemp)
    for ((node = 0; node < nodes; node++)); do echo "node$node slots=$ranks"; done >"$hosts"
    options=(--hostfile "$hosts" --no_ssh --node_rank "${NODE_RANK:-0}" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
launch TERM deepspeed "${options[@]}" --log_level warning --no_python --no_local_rank privimage "$@"
