"""The section `slurm` of the settings: resources of the jobs of a run."""

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import Field, field_validator

from privimage.config.section import Section, nearest, on
from privimage.config.stages import STAGES
from privimage.errors import UserError


class Job(Section):
    """Resources of one SLURM job."""

    affects = on()

    nodes: int | None = Field(None, ge=1, description="nodes; unset: 1")
    gpus: int | None = Field(None, ge=0, description="GPUs per node; unset: none")
    ranks: int | None = Field(None, ge=1, description="ranks per node; unset: one per GPU, or one")
    cpus: int | None = Field(
        None, ge=1, description="CPU cores per rank; unset: the cluster's default, as for memory and time"
    )
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="memory per node, as 200G")
    time: str | None = Field(
        None,
        pattern=r"^(\d+-)?\d+(:\d+){0,2}$",
        description="limit of one job, as 2-00:00:00; what is unfinished is queued again",
    )

    @field_validator("time", mode="before")
    @classmethod
    def _not_a_number(cls, value: object) -> object:
        # 2:00:00 without quotes is 7200 in YAML 1.1, which SLURM would take for minutes.
        if isinstance(value, int):
            raise ValueError("put it in quotes: YAML takes hours:minutes:seconds for a number")
        return value


class Slurm(Job):
    """Jobs of slurm/pipeline.sh and slurm/sweep.sh.

    What all stages ask for, and what single ones ask for instead.
    """

    options: tuple[str, ...] = Field(
        (), description="more options of sbatch, as --partition=gpu --account=NAME --constraint=a100"
    )
    srun: tuple[str, ...] = Field(
        (),
        description="more options of srun, as --mpi=none; of pyxis, as --container-image=privimage.sqsh",
    )
    setup: str = Field(
        "",
        description="shell commands before a stage, on its first node: module load ..., source .../activate",
    )
    container: str = Field(
        "", description="words in front of the command of each rank: apptainer exec --nv image.sif"
    )
    stages: dict[str, Job] = Field(
        {}, description="single stages, as pretrain: {nodes: 2, gpus: 4, time: 2-00:00:00}"
    )

    def of(self, stage: str, environ: Mapping[str, str] = MappingProxyType({})) -> Job:
        """What the job of a stage asks for.

        STAGE_NODES and the like in the environment, then what the configuration says of the stage, then
        NODES, then what it says of all stages: what is said of one stage goes before what is said of all.

        Raises UserError that names a variable whose value cannot be.
        """
        fields: dict[str, object] = {}
        single = self.stages.get(stage)
        for name in Job.model_fields:
            wanted = [
                environ.get(f"{stage}_{name}".upper()),
                getattr(single, name, None),
                environ.get(name.upper()),
                getattr(self, name),
            ]
            fields[name] = next((value for value in wanted if value not in (None, "")), None)
        try:
            return Job.model_validate(fields)
        except ValueError:
            asked = ", ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
            raise UserError(f"{stage}: what is asked for cannot be: {asked}") from None

    @field_validator("stages")
    @classmethod
    def _are_known(cls, stages: dict[str, Job]) -> dict[str, Job]:
        for name in stages:
            if name not in STAGES:
                raise ValueError(f"unknown stage {name!r}{nearest(name, STAGES)}")
        return stages
