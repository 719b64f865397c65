#!/usr/bin/env bash
# slurm_down.sh FOLDER: end what slurm_up.sh started there; only processes that it noted, and those inside its nodes.
set -uo pipefail
folder=$1

for file in "$folder"/run/slurmctld.pid "$folder"/run/slurmd.*.pid "$folder"/run/munged.pid; do
    [ -s "$file" ] || continue
    read -r pid <"$file"
    # The number may have been used again by now: end it only if it is ours by its command line.
    if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$folder/"; then kill -9 "$pid"; fi
    rm -f "$file"
done
for namespace in $(ip netns list 2>/dev/null | awk '/^pinode[0-9]+/ {print $1}'); do
    ip netns pids "$namespace" | xargs -r kill -9
    ip netns del "$namespace"
done
for link in $(ip -o link show 2>/dev/null | grep -oE 'piveth[0-9]+' | sort -u); do ip link del "$link" 2>/dev/null; done
ip link del pislurm 2>/dev/null
rm -rf "$folder"
exit 0
