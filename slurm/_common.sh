# shellcheck shell=bash
# Sourced by everything here: where PrivImage is, its environment, and the settings of the network.

PRIVIMAGE_HOME=${PRIVIMAGE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export PRIVIMAGE_HOME
[ -d "$PRIVIMAGE_HOME/.venv/bin" ] && export PATH="$PRIVIMAGE_HOME/.venv/bin:$PATH"

# Modules, a virtual environment elsewhere ...: the `setup` of the section `slurm`, or SETUP of who submitted.
if [ -n "${SETUP:-}" ]; then
    eval "$SETUP"
fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# One network interface for NCCL is the one for gloo as well: export NCCL_SOCKET_IFNAME=ib0 before submitting.
if [ -n "${NCCL_SOCKET_IFNAME:-}" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}
fi
# srun does not take the CPUs of a task from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
