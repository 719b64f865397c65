# shellcheck shell=bash
# Sourced by the launchers: what they share. Each is called with STAGE CONFIG [section.key=value ...].

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$home/.venv/bin" ] && PATH="$home/.venv/bin:$PATH"

if [ $# -lt 2 ] || [ ! -f "$2" ]; then
    {
        [ $# -ge 2 ] && echo "$2: no such configuration file"
        echo "usage: $0 STAGE CONFIG [section.key=value ...]   (STAGE: run, or one of the stages that 'privimage --help' lists)"
        sed -n '/^# Settings:/,/^$/s/^# \{0,1\}//p' "$0"
    } >&2
    exit 2
fi

nodes=${NODES:-1}
ranks=${RANKS:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}
[ "$ranks" -ge 1 ] || ranks=1

# Launchers end with statuses of their own: the command leaves its own in this file.
status_file=${PRIVIMAGE_STATUS_FILE:-$(mktemp)}
: >"$status_file"
export PRIVIMAGE_STATUS_FILE=$status_file

need_master() {
    if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        echo "$0: NODES=$nodes needs MASTER_ADDR, the host name of the first node" >&2
        exit 2
    fi
}

# launch SIGNAL COMMAND...: run it, pass a request to stop on as SIGNAL, and end with PrivImage's own status where it left one.
launch() {
    local signal=$1 status=0 own
    shift
    set -m # the command and its children are a process group of their own: the signal reaches all of them, and only them
    "$@" &
    group=$!
    set +m
    trap 'kill -s '"$signal"' -- "-$group" 2>/dev/null' TERM INT USR2
    while true; do
        wait "$group" && status=0 || status=$?
        kill -0 -- "-$group" 2>/dev/null || break
        sleep 0.2 # a signal ended the wait, or ranks outlive the command that started them
    done
    read -r own <"$status_file" || own=$status
    [ "$status" -eq 0 ] || [ "$own" != 0 ] || own=$status
    rm -f "$status_file"
    exit "$own"
}
