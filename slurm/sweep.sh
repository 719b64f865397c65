#!/usr/bin/env bash
# sweep.sh CONFIG [CONFIG ...] [section.key=value,value,... ...]: an array of whole pipelines, one task a combination.
#     slurm/sweep.sh configs/paper/cifar10-eps10.yaml privacy.epsilon=1,5,10
# or sweep.sh EXPERIMENT [section.key=value ...]: all runs of configs/experiments/*.yaml.
# Each gets a run.dir of its own. What a task asks for: see pipeline.sh.
set -euo pipefail
# shellcheck source=slurm/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
exec privimage submit --sweep "$@"
