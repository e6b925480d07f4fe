"""Which seeds of a plan are run as one. Asked when a seed changes its state, never in a forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from torch import nn
from torch.nn.modules.conv import _ConvNd

from esper.forward.fused_products import ACTIVATIONS, TwoProducts
from esper.forward.fused_runs import CHANNELS, FEATURES, StepByStep
from esper.forward.kernel_steps import KernelSteps, steps_of
from esper.state.seed_group import Grouping, RunTogether, SeedGroup

if TYPE_CHECKING:
    from collections.abc import Hashable

    from esper.state.seed_slot import Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """A way to run kernels as one, and when it was measured to be the shorter one.

    Attributes:
        takes: Whether kernels of a form can be run so.
        run: Makes what runs them.
        fewest: So many seeds at least.
        most_elements: Of one kernel's parameters; None: any number.
    """

    takes: Callable[[KernelSteps], bool]
    run: Callable[[Sequence[KernelSteps]], RunTogether]
    fewest: int
    most_elements: int | None = None


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
    if seed.guard == "always" or seed.takes is not None:
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
    num_elements = sum(p.numel() for p in kernels[0].kernel.parameters())
    if way.most_elements is not None and num_elements > way.most_elements:
        return None
    tables = tuple(table for kernel in kernels for table in kernel.tables())
    return SeedGroup(
        seeds=tuple(seed for seed, _ in found),
        run=way.run(kernels),
        hooks=tuple(table for kernel in kernels for table in kernel.hooks()),
        tables=tables,
        sizes=list(map(len, tables)),
        facts=tuple(fact for kernel in kernels for fact in kernel.facts()),
    )


def _is_two_products(kernel: KernelSteps) -> bool:
    ends, between = (kernel.steps[0], kernel.steps[-1]), kernel.steps[1:-1]
    is_chain = kernel.wiring == tuple((i,) for i in range(len(kernel.steps)))
    has_ends = ends[0] is not ends[1] and all(type(step) is nn.Linear for step in ends)
    is_known = all(type(step) in ACTIVATIONS for step in between) and len(between) < 2
    is_written_to = any(step.__dict__.get("inplace") for step in between)
    return is_chain and has_ends and is_known and not is_written_to


def _has_steps(kernel: KernelSteps, rules: dict[type[nn.Module], object], one: type) -> bool:
    classes = {type(step) for step in kernel.steps}
    if any(step.__dict__.get("inplace") for step in kernel.steps):
        return False
    if any(step.__dict__.get("padding_mode", "zeros") != "zeros" for step in kernel.steps):
        return False
    return classes <= rules.keys() and any(issubclass(cls, one) for cls in classes)


_WAYS: Final = (
    _Way(takes=_is_two_products, run=TwoProducts, fewest=6),
    _Way(
        takes=partial(_has_steps, rules=dict(CHANNELS), one=_ConvNd),
        run=partial(StepByStep, rules=CHANNELS),
        fewest=3,
    ),
    _Way(
        takes=partial(_has_steps, rules=dict(FEATURES), one=nn.Linear),
        run=partial(StepByStep, rules=FEATURES),
        fewest=6,
        most_elements=1 << 15,
    ),
)

_FEWEST: Final = min(way.fewest for way in _WAYS)
