"""Rank, size and master address from the environment of whatever launcher started this process.

Read in this order: torchrun (and the deepspeed launcher, which sets the same variables), SLURM's srun, Open
MPI and PMI, and mpi4py where an MPI launcher is at work that sets none of those.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from privimage.errors import UserError

FIRST_PORT, PORTS = 20_000, 20_000  # where a port is derived from the job, it lies in this range


@dataclass(frozen=True)
class Place:
    """One rank's place among the others. `address` and `port` are where the main rank can be reached."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    def __post_init__(self) -> None:
        """Refuse what cannot be: a rank beyond the size, more local ranks than ranks. Raises UserError."""
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise UserError(
                f"{self.launcher}: rank {self.rank} of {self.size}, local rank {self.local_rank} of "
                f"{self.local_size} cannot be;"
                " check the variables that the launcher sets"
            )


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process. Alone, without a launcher, it is rank 0 of 1.

    Raises UserError, in one line, for a half-set or malformed set of variables.
    """
    # torchrun first: inside a SLURM job it starts ranks of its own, whose variables win.
    for launcher in (_torchrun, _slurm, _open_mpi, _pmi, _mpi4py):
        place = launcher(environ)
        if place is not None:
            return place
    return Place("no launcher", 0, 1, 0, 1, "127.0.0.1", 0)


def _number(environ: Mapping[str, str], launcher: str, name: str, default: int | None = None) -> int:
    value = environ.get(name, "")
    if not value and default is not None:
        return default
    if not value:
        raise UserError(
            f"{launcher}: {name} is not set; start every rank with the same launcher, or unset its other "
            "variables"
        )
    if not re.fullmatch(r"\d+", value):
        raise UserError(f"{launcher}: {name} must be a number, not {value!r}")
    return int(value)


def _master(
    environ: Mapping[str, str], launcher: str, address: str | None, port: int | None
) -> tuple[str, int]:
    # MASTER_ADDR and MASTER_PORT win over what was derived: a script may know a better interface.
    address = environ.get("MASTER_ADDR") or address
    if address is None:
        raise UserError(
            f"{launcher}: the ranks are on several nodes and MASTER_ADDR is not set; set it to the host "
            "name of rank 0's node"
        )
    port = _number(environ, launcher, "MASTER_PORT", port)
    if not 0 < port < 65_536:
        raise UserError(f"{launcher}: MASTER_PORT must be between 1 and 65535, not {port}")
    return address, port


def _port_of(job: str) -> int:
    # The same on all ranks of a job, and different for jobs that share a node.
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def _torchrun(environ: Mapping[str, str]) -> Place | None:
    if not any(environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    launcher = "torchrun's variables"
    size = _number(environ, launcher, "WORLD_SIZE")
    rank = _number(environ, launcher, "RANK")
    local_rank = _number(environ, launcher, "LOCAL_RANK")
    local_size = _number(
        environ, launcher, "LOCAL_WORLD_SIZE", _number(environ, launcher, "LOCAL_SIZE", size)
    )
    if size > 1 and not environ.get("MASTER_ADDR"):
        raise UserError(
            f"{launcher}: MASTER_ADDR is not set; start every rank with the same launcher, or unset its "
            "other variables"
        )
    return Place(
        launcher,
        rank,
        size,
        local_rank,
        local_size,
        *_master(environ, launcher, "127.0.0.1", None if size > 1 else FIRST_PORT),
    )


def _slurm(environ: Mapping[str, str]) -> Place | None:
    # SLURM_STEP_NUM_TASKS is set by srun only: inside a batch script, without srun, a command is alone.
    if not environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    launcher = "SLURM"
    size = _number(environ, launcher, "SLURM_STEP_NUM_TASKS")
    node = _number(environ, launcher, "SLURM_NODEID")
    tasks = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    if node >= len(tasks):
        raise UserError(
            f"{launcher}: SLURM_NODEID {node} is beyond SLURM_STEP_TASKS_PER_NODE "
            f"{environ['SLURM_STEP_TASKS_PER_NODE']!r}"
        )
    # Job, step and restart name the port: steps of one job may run at the same time.
    names = {"SLURM_JOB_ID": "", "SLURM_STEP_ID": "", "SLURM_RESTART_COUNT": "0"}
    job = ".".join(environ.get(name, default) for name, default in names.items())
    address = first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")) if len(tasks) > 1 else "127.0.0.1"
    rank, local_rank = _number(environ, launcher, "SLURM_PROCID"), _number(environ, launcher, "SLURM_LOCALID")
    return Place(
        launcher, rank, size, local_rank, tasks[node], *_master(environ, launcher, address, _port_of(job))
    )


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node from SLURM's short form: ``2(x3),1`` is [2, 2, 2, 1].

    Raises UserError for anything else.
    """
    # One entry per node, "2(x3)" stands for three nodes.
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM: SLURM_STEP_TASKS_PER_NODE is not understood: {text!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def first_host(nodes: str) -> str:
    """The first host name of SLURM's short form: ``gpu[007-012,020],login1`` starts with gpu007."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM: SLURM_STEP_NODELIST is not understood: {nodes!r}")
    return "".join(part or "" for part in match.groups())


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    if not environ.get("OMPI_COMM_WORLD_SIZE"):
        return None
    names = (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    )
    return _mpi(environ, "Open MPI", names, environ.get("PMIX_NAMESPACE", ""))


def _pmi(environ: Mapping[str, str]) -> Place | None:
    if not environ.get("PMI_SIZE"):
        return None
    return _mpi(
        environ,
        "PMI",
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        environ.get("PMI_JOBID", environ.get("PMI_FD", "")),
    )


def _mpi(environ: Mapping[str, str], launcher: str, names: tuple[str, str, str, str], job: str) -> Place:
    rank, size, local_rank, local_size = (_number(environ, launcher, name) for name in names)
    address = "127.0.0.1" if local_size == size else None
    return Place(
        launcher, rank, size, local_rank, local_size, *_master(environ, launcher, address, _port_of(job))
    )


def _mpi4py(environ: Mapping[str, str]) -> Place | None:
    # Importing mpi4py starts MPI, so a plain process does it only where an MPI launcher has left a trace.
    if not any(
        name.startswith(("PMI_", "PMIX_", "MPI_LOCALRANKID", "HYDI_", "PALS_", "MPIRUN_", "MV2_COMM_"))
        for name in environ
    ):
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"an MPI launcher is at work and mpi4py does not load ({error}); pip install "
            "'privimage[cluster]', or use torchrun"
        ) from None
    # An MPI without variables that we know: ask MPI itself, and agree on the main rank's address and port.
    everyone = MPI.COMM_WORLD
    if everyone.size == 1:
        return None
    # Ranks that share memory are on one node.
    local = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = everyone.bcast((MPI.Get_processor_name(), free_port()) if everyone.rank == 0 else None)
    return Place(
        "mpi4py",
        everyone.rank,
        everyone.size,
        local.rank,
        local.size,
        *_master(environ, "mpi4py", address, port),
    )


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
