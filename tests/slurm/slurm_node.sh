#!/usr/bin/env bash
# slurm_node.sh FOLDER NUMBER: start (again) the slurmd of one node of slurm_up.sh, inside the node's network and names.
set -euo pipefail
folder=$1 node=node$2
mkdir -p "$folder/spool.$node"
# shellcheck disable=SC2016 # the inner shell expands
exec nsenter --net="/run/netns/pi$node" unshare --uts --mount sh -c '
    hostname "$2" && mount --bind "$1/etc/hosts" /etc/hosts && mount --bind "$1/etc/nsswitch.conf" /etc/nsswitch.conf &&
    exec slurmd -f "$1/etc/slurm.conf" -N "$2"' sh "$folder" "$node"
