#!/usr/bin/env bash
# torchrun.sh STAGE CONFIG [section.key=value ...]: one rank a GPU under torchrun, which restarts all ranks when one dies.
#
# Settings: (environment variables)
#   RANKS        ranks on this node; unset: its GPUs, or 1
#   RESTARTS     how often all ranks are started again after one has died (3)
#   NODES        number of nodes (1); start this script on each of them, with
#   NODE_RANK    0, 1, ... and
#   MASTER_ADDR  the host name of node 0, reached on MASTER_PORT (29500)

set -euo pipefail
# shellcheck source=launchers/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
need_master

# Time to save the state after a request to stop, in seconds; torchrun kills ranks that take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# A node that takes the place of a lost one must be able to serve the rendezvous on the same port.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

rendezvous=(--standalone)
if [ "$nodes" -gt 1 ]; then
    is_host=$([ "${NODE_RANK:-0}" -eq 0 ] && echo 1 || echo 0)
    rendezvous=(--nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --rdzv-backend c10d --rdzv-id "${JOB_ID:-privimage}"
        --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-conf "is_host=$is_host")
fi
# torchrun as a library: its own traceback would bury the one line that says what is wrong.
launch TERM python -c '
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except (ChildFailedError, SignalException):
    raise SystemExit(1)
' "${rendezvous[@]}" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-3}" --no-python privimage "$@"
