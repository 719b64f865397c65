"""Each launcher's variables give the rank's place; wrong or half-set ones are told in one line."""

import pytest

from privimage.distributed.launch import Place, find_place, first_host, tasks_per_node
from privimage.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-12@1",
}
PMI = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}


def test_without_a_launcher_a_process_is_alone():
    assert find_place({}).size == 1


def test_inside_a_batch_script_without_srun_a_process_is_alone():
    assert (
        find_place({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}).size
        == 1
    )


def test_torchrun():
    assert find_place(TORCHRUN) == Place("torchrun's variables", 3, 4, 1, 2, "head", 29500)


def test_the_deepspeed_launcher_names_the_local_size_differently():
    environ = {**TORCHRUN, "LOCAL_SIZE": "2"}
    del environ["LOCAL_WORLD_SIZE"]
    assert find_place(environ).local_size == 2


def test_slurm():
    place = find_place(SLURM)
    assert (place.rank, place.size, place.local_rank, place.local_size, place.address) == (
        5,
        6,
        1,
        2,
        "gpu007",
    )


def test_all_ranks_of_a_slurm_step_find_the_same_port_and_a_requeued_one_another():
    other_rank = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    requeued = {**SLURM, "SLURM_RESTART_COUNT": "1"}
    assert find_place(SLURM).port == find_place(other_rank).port != find_place(requeued).port


def test_torchrun_inside_slurm_is_torchrun():
    assert find_place({**SLURM, **TORCHRUN}).rank == 3


def test_open_mpi_on_one_node_needs_no_master_address():
    place = find_place(OPEN_MPI)
    assert (place.rank, place.size, place.local_rank, place.local_size, place.address) == (
        1,
        2,
        1,
        2,
        "127.0.0.1",
    )
    assert (
        place.port
        == find_place({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}).port
    )


def test_pmi_on_two_nodes():
    assert find_place(PMI) == Place("PMI", 1, 2, 0, 1, "head", 1234)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({name: value for name, value in TORCHRUN.items() if name != "RANK"}, "RANK"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "MASTER_PORT"),
        ({"WORLD_SIZE": "4"}, "RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE"),
        ({**TORCHRUN, "MASTER_PORT": "123456"}, "MASTER_PORT"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
        ({**SLURM, "SLURM_PROCID": ""}, "SLURM_PROCID"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2x3"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({**PMI, "MPI_LOCALRANKID": ""}, "MPI_LOCALRANKID"),
    ],
)
def test_what_is_half_set_or_wrong_is_told_in_one_line(environ: dict[str, str], names: str):
    with pytest.raises(UserError) as told:
        find_place(environ)
    assert names in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("gpu7", "gpu7"),
        ("gpu[007-012,020],login1", "gpu007"),
        ("a-[3,5]-ib", "a-3-ib"),
        ("node2,node[4-5]", "node2"),
    ],
)
def test_the_first_host_of_a_node_list(text: str, host: str):
    assert first_host(text) == host


def test_tasks_of_each_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
