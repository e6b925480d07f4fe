"""Which seeds of a plan are run as one. Asked when a seed changes its state, never in a forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import nn
from torch.nn.modules.conv import _ConvNd

from esper.forward.fused_runs import CHANNELS, FEATURES, Rules, StepByStep, are_norms_known
from esper.forward.kernel_steps import KernelSteps, steps_of
from esper.state.seed_group import Grouping, SeedGroup

if TYPE_CHECKING:
    from collections.abc import Hashable

    from esper.state.seed_slot import Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """A way to run kernels as one, and when it was measured to be the shorter one.

    Attributes:
        rules: How each step is run.
        layer: A step of this class is among them.
        fewest: So many seeds at least.
    """

    rules: Rules
    layer: type[nn.Module]
    fewest: int

    def takes(self, kernel: KernelSteps) -> bool:
        """Say whether kernels of a form can be run so."""
        if any(step.__dict__.get("inplace") for step in kernel.steps):
            return False
        if any(step.__dict__.get("padding_mode", "zeros") != "zeros" for step in kernel.steps):
            return False
        if not are_norms_known(kernel):
            return False
        classes = {type(step) for step in kernel.steps}
        return classes <= self.rules.keys() and any(issubclass(cls, self.layer) for cls in classes)


def grouping_of(plan: Sequence[Seed]) -> Grouping:
    """Return how the seeds of a plan are run.

    Args:
        plan: The seeds that contribute, in slot order.
    """
    others = Grouping(others=tuple(plan))
    if len(plan) < _FEWEST or any(seed.replaces or seed.is_shadow for seed in plan):
        return others
    alike: defaultdict[Hashable, list[tuple[Seed, KernelSteps]]] = defaultdict(list)
    for seed in plan:
        steps = _steps_to_fuse(seed)
        if steps is not None:
            alike[steps.form, seed.guard, seed.is_serial].append((seed, steps))
    groups = tuple(filter(None, map(_group, alike.values())))
    together = {seed for group in groups for seed in group.seeds}
    return Grouping(groups=groups, others=tuple(seed for seed in plan if seed not in together))


def _steps_to_fuse(seed: Seed) -> KernelSteps | None:
    """Return a seed's kernel as steps, or None where it runs by itself."""
    if seed.takes is not None:
        return None
    steps = steps_of(seed.slot.kernel)
    if steps is None or any(steps.hooks()) or not any(way.takes(steps) for way in _WAYS):
        return None
    return steps


def _group(found: Sequence[tuple[Seed, KernelSteps]]) -> SeedGroup | None:
    kernels = [steps for _, steps in found]
    way = next((way for way in _WAYS if way.takes(kernels[0])), None)
    if way is None or len(found) < way.fewest:
        return None
    tables = tuple(table for kernel in kernels for table in kernel.tables())
    facts = [fact for kernel in kernels for fact in kernel.facts()]
    return SeedGroup(
        seeds=tuple(seed for seed, _ in found),
        run=StepByStep(kernels, way.rules),
        hooks=tuple(table for kernel in kernels for table in kernel.hooks()),
        tables=tables,
        sizes=list(map(len, tables)),
        parameters=tuple(place for kernel in kernels for place in kernel.parameters()),
        places=tuple((table, key) for table, key, _ in facts),
        values=[value for _, _, value in facts],
    )


_WAYS: Final = (
    _Way(rules=CHANNELS, layer=_ConvNd, fewest=3),
    _Way(rules=FEATURES, layer=nn.Linear, fewest=4),
)

_FEWEST: Final = min(way.fewest for way in _WAYS)
