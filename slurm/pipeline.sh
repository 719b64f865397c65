#!/usr/bin/env bash
# pipeline.sh CONFIG [section.key=value ...]: the stages that are not finished, from prepare to report, as chained jobs.
#
# What each job asks for is in the section `slurm` of CONFIG, or in the environment: NODES, GPUS, RANKS, CPUS, MEMORY, TIME
# for all stages, PRETRAIN_NODES, FINETUNE_TIME ... for one, and sbatch's own SBATCH_PARTITION, SBATCH_ACCOUNT ...
# Prints the ids of the jobs and their logs.
set -euo pipefail
# shellcheck source=slurm/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
exec privimage submit "$@"
