"""One twin of a trial, with what stands in it and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esper.growth.averaging import WeightAverage

if TYPE_CHECKING:
    from esper.growth.batch import Batch
    from esper.growth.ledger import Meter
    from esper.growth.live_kernel import LiveKernel
    from esper.growth.run import GrowthRun
    from esper.growth.twins import Twin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arm:
    """One twin of a trial.

    Attributes:
        name: ``"candidate"``, ``"null"``, or ``"equal 1"`` and so on.
        twin: The twin.
        meter: Counts its updates.
        kernels: What stands in it that the live run does not have.
        average: Its weights averaged over the second half of the trial.
    """

    name: str
    twin: Twin
    meter: Meter
    kernels: tuple[LiveKernel, ...] = ()
    average: WeightAverage = field(default_factory=WeightAverage)

    def update(self, run: GrowthRun, batches: list[Batch]) -> None:
        """Do the update that the live run has just done."""
        changes = run.fits.num_changes
        with self.meter.counted(batches):
            self.twin.update(batches, run.live_step())
        if run.fits.num_changes != changes:
            self.meter.forget()  # what did not fit was counted with it

    def set_alphas(self, num_updates: int, ramp_updates: int) -> None:
        """Let kernels that could not enter at alpha 1 rise to it."""
        for kernel in self.kernels:
            kernel.set_alpha(num_updates, ramp_updates)
