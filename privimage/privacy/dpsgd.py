"""The DP-SGD loop: T private steps on one module, by all ranks together; fine-tuning, audit and benchmarks
run it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from privimage.data.sensitive import StepData
from privimage.distributed.agreement import Ranks, gathered, require_equal
from privimage.privacy.account import charge_name
from privimage.privacy.gradients import PerImageGradients, trained_parameters
from privimage.privacy.identity import digest_of_tensors
from privimage.privacy.keys import RootKey
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.noise import NoiseStream
from privimage.privacy.optimizer import PrivateOptimizer, StepStatistics
from privimage.privacy.sampling import poisson_sample, share


class Losses(Protocol):
    """Losses of single images; see `privimage.families.base.ImageLosses`."""

    @property
    def draw(self) -> Callable[..., tuple[Tensor, ...]]:
        """A batch of the data set and the `seed` of a step -> the tensors (B, K, ...) of the losses."""

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """One loss for each of n images (n, ...)."""


@dataclass(frozen=True)
class Randomness:
    """Source of all random numbers of the steps.

    `computation` is the digest of everything that the steps depend on beside the weights
    (`privacy.identity.computation`). From it, the weights and its number each step has a name; sample, noise
    and draws of the step are derived from the secret key `root` and that name.
    """

    root: RootKey
    source: str
    computation: bytes


class PrivateSteps:
    """T steps of DP-SGD: Poisson sample, per-image gradients, clipping, sum, noise, update.

    Iterating yields one `StepStatistics` per step. Before a step computes anything it is charged:
    `charge(name)` is called on the main rank and returns whether the run may take it; if not, the iteration
    ends on all ranks. What happens between two steps (averages, a generator's own steps) is up to the caller
    and public: a step sees no more of it than the tensors of `state`.
    """

    def __init__(
        self,
        plan: DPSGD,
        gradients: PerImageGradients,
        losses: Losses,
        optimizer: torch.optim.Optimizer,
        data: StepData,
        ranks: Ranks,
        randomness: Randomness,
        *,
        physical: int,
        charge: Callable[[str], bool],
        state: Callable[[], Iterable[Tensor]],
        first: int = 0,
        stop_requested: Callable[[], bool] = lambda: False,
        noise_factor: float = 1.0,
    ):
        """Prepare the steps after the first `first`.

        Args:
            plan: sample rate, clipping bound, noise and number of steps.
            gradients: wraps the module that is trained.
            losses: per-image losses of the module.
            optimizer: updates the trained parameters of that module.
            data: the sensitive set.
            physical: units per rank that go through the network at once.
            charge: see the class.
            state: returns all tensors that the gradients of a step depend on: the weights of the module, and
                of networks that `losses` use.
            noise_factor: scales the noise, for an audit that breaks the guarantee on purpose.

        Raises ValueError if `optimizer` updates other parameters than those that require gradients.
        """
        self.plan, self.gradients, self.losses, self.data, self.ranks = plan, gradients, losses, data, ranks
        self.randomness, self.physical, self.charge, self.state, self.step = (
            randomness,
            physical,
            charge,
            state,
            first,
        )
        # Sum, noise and update must be of the same parameters, in the same order.
        trained = trained_parameters(gradients.module)
        updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if [id(parameter) for parameter in updated] != [id(parameter) for parameter in trained]:
            raise ValueError("the optimizer updates other parameters than those that require gradients")
        self.optimizer = PrivateOptimizer(optimizer, plan, ranks, None, stop_requested)
        if deviation := plan.rank_deviation(ranks.size) * noise_factor:
            self.optimizer.noise = _noise(ranks, randomness.source, self.optimizer.size, deviation)
        self.name = ""  # of the step that is going on

    def __iter__(self) -> Iterator[StepStatistics]:
        """The remaining steps; `step` is the number of those made when one is yielded."""
        # Opacus' manager cuts each logical batch into physical ones and tells the optimizer when it is
        # complete.
        loader = DataLoader(
            self.data, batch_sampler=cast(Sampler, _Batches(self)), collate_fn=lambda batch: batch
        )
        try:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=self.physical, optimizer=self.optimizer
            ) as batches:
                # An empty physical batch still ends a logical one: a rank without images takes part in the
                # sum.
                for *batch, indices in batches:
                    if len(indices):
                        tensors = self.losses.draw(*batch, indices, seed=self._seed("dp-sgd draws"))
                        self.optimizer.count_losses(self.gradients.backward(self.losses, *tensors))
                    # True when the logical batch is complete on this rank, and so on all of them.
                    if self.optimizer.step():
                        self.step += 1
                        assert self.optimizer.statistics is not None  # a logical batch was completed
                        yield self.optimizer.statistics
        finally:
            if self.optimizer.noise is not None:
                self.optimizer.noise.close()

    def begun(self) -> Iterator[list[int]]:
        """Begin each step in turn, and give the indices of this rank's share of its sample.

        A share may be empty.
        """
        randomness = self.randomness
        # Noise is drawn by a thread while gradients are computed; it is ready when the sum is.
        while self.step < self.plan.steps and self._may_begin():
            if self.optimizer.noise is not None:
                self.optimizer.noise.prepare(
                    randomness.root.derive("dp-sgd noise", self.name, self.ranks.rank)
                )
            # All ranks derive the same global sample, and take disjoint shares of it.
            key = randomness.root.derive("poisson sampling", self.name)
            count = len(self.data)  # type: ignore[arg-type]
            sample = poisson_sample(randomness.source, key, count, self.plan.sample_rate)
            indices = share(sample, self.ranks.rank, self.ranks.size)
            self.data.begin(indices, self.physical, self._seed("dp-sgd members"))
            yield indices

    def _may_begin(self) -> bool:
        """Name the next step and charge it, before anything of it is computed; equal on all ranks."""
        # A step is named by its weights too, so that repeating it from the same weights is the same step, and
        # from any others a new one.
        weights = digest_of_tensors(self.state())
        self.name = charge_name(
            self.randomness.root, self.randomness.computation, self.step.to_bytes(8, "big"), weights
        ).hex()
        # One all-reduce carries the digests, to find ranks that disagree, and the main rank's answer.
        allowed = self.charge(self.name) if self.ranks.rank == 0 else True
        answers = gathered(self.ranks, weights + bytes([allowed]))
        require_equal(
            [one[:-1] for one in answers],
            f"the weights before private step {self.step + 1}",
            "copy the run directory to them again",
        )
        return all(one[-1] for one in answers)

    def _seed(self, purpose: str) -> int:
        return int.from_bytes(self.randomness.root.derive(purpose, self.name, length=8), "big")


def _noise(ranks: Ranks, source: str, size: int, deviation: float) -> NoiseStream:
    # Beside a GPU the cores of a rank are free to draw; on a CPU they compute the gradients.
    return NoiseStream(source, size, deviation, ranks.cores if ranks.device.type == "cuda" else 1)


class _Batches:
    """The logical batches of one rank, for a DataLoader under Opacus' BatchMemoryManager, which asks for one
    when the last is done.
    """

    def __init__(self, steps: PrivateSteps):
        self.steps = steps

    def __iter__(self) -> Iterator[list[int]]:
        return self.steps.begun()

    def __len__(self) -> int:
        return max(1, self.steps.plan.steps - self.steps.step)
