#!/usr/bin/env bash
# mpirun.sh STAGE CONFIG [section.key=value ...]: one rank a GPU under Open MPI. It is started once, on the first node.
#
# Settings: (environment variables)
#   RANKS        ranks on each node; unset: the GPUs of this one, or 1
#   HOSTS        nodes to run on, with commas (this one only); mpirun reaches them by ssh, or as its own settings say
#   MASTER_ADDR  where the ranks meet; unset: the first of HOSTS, on MASTER_PORT (derived from the process id)

set -euo pipefail
# shellcheck source=launchers/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

options=(--map-by "ppr:$ranks:node:oversubscribe" --bind-to none -x PATH -x PRIVIMAGE_STATUS_FILE)
if [ -n "${HOSTS:-}" ]; then
    nodes=$(tr ',' '\n' <<<"$HOSTS" | grep -c .)
    export MASTER_ADDR=${MASTER_ADDR:-${HOSTS%%,*}} MASTER_PORT=${MASTER_PORT:-$((20000 + $$ % 20000))}
    options+=(--host "$(sed "s/,/:$ranks,/g; s/\$/:$ranks/" <<<"$HOSTS")" -x MASTER_ADDR -x MASTER_PORT)
fi
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# mpirun kills the ranks at once when it is terminated itself, and passes USR2 on to them.
launch USR2 mpirun "${options[@]}" -n "$((nodes * ranks))" privimage "$@"
