"""What growth may cost: parameters, FLOPs and latency of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
from torch import nn

from esper.contracts.arguments import Bounds, checked_number
from esper.contracts.ports import Clock
from esper.growth.flops import counting

_SHARE: Final = Bounds(what="a share of the host", least=0, may_be_infinite=True)
_COUNT: Final = Bounds(what="a count", least=0)
_LIMITS: Final[dict[str, tuple[Bounds, type]]] = {
    "parameters": (_SHARE, float),
    "total_parameters": (_SHARE, float),
    "flops": (_SHARE, float),
    "latency": (_SHARE, float),
    "grafts": (_COUNT, int),
    "small_host": (_COUNT, int),
    "small_graft": (_COUNT, int),
}
"""What each limit of a budget may be."""

OVERHEAD: Final = 0.10
"""What growing may take where the owner does not say, as a ratio to the FLOPs of training."""
SMALL_HOST_OVERHEAD: Final = 1.0
"""The same for a small host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model costs, or what a graft adds to it.

    Attributes:
        parameters: Number of parameters.
        flops: FLOPs of a forward of one sample; None where not counted.
        latency_s: Seconds of a forward; None where not measured.
    """

    parameters: int
    flops: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits on what growth adds, as shares of the host; None lifts one.

    A host under ``small_host`` parameters has no relative limit: there the smallest useful
    kernel can be larger than the host, and each graft may have ``small_graft`` parameters. Growing
    may take 1.0 times the FLOPs of its training where the owner gives no ``overhead``.

    Attributes:
        parameters: Of one graft.
        total_parameters: Of all admitted grafts together.
        flops: Of all admitted grafts together, in a forward.
        latency: Of all admitted grafts together, in a forward, measured.
        grafts: How many may be admitted.
        small_host: Parameters under which a host is small.
        small_graft: Parameters of one graft in a small host.

    Raises:
        TypeError: A limit is no number.
        ValueError: A limit is negative or not a number.
    """

    parameters: float | None = 0.10
    total_parameters: float | None = 0.25
    flops: float | None = 0.25
    latency: float | None = 0.10
    grafts: int | None = 4
    small_host: int = 100_000
    small_graft: int = 10_000

    def __post_init__(self) -> None:
        """Refuse limits that limit nothing."""
        for name, (bounds, kind) in _LIMITS.items():
            limit, optional = getattr(self, name), not name.startswith("small_")
            if limit is None and optional:
                continue
            title = f"Budget({name}=...)"
            plain = checked_number(title, limit, bounds, kind=kind, optional=optional)
            object.__setattr__(self, name, plain)

    def check(
        self, *, host: Cost, candidate: Cost, admitted: Cost | None = None, grafts: int = 0
    ) -> str | None:
        """Say why a candidate does not fit, or None where it does.

        Figures that are None are not compared: parameters and FLOPs are known before an audition,
        latency after it, so a candidate is checked once more when it has been measured.

        Args:
            host: The model before any graft.
            candidate: What the candidate adds.
            admitted: What the admitted grafts add, together.
            grafts: How many were admitted.
        """
        if self.grafts is not None and grafts >= self.grafts:
            return f"{grafts} grafts were admitted, the budget has {self.grafts}"
        if host.parameters < self.small_host:
            if candidate.parameters <= self.small_graft:
                return None
            return (
                f"{candidate.parameters:,} parameters, at most {self.small_graft:,} in a host "
                f"of fewer than {self.small_host:,}"
            )
        held = admitted if admitted is not None else Cost(parameters=0, flops=0.0, latency_s=0.0)
        limits = (
            ("parameters", self.parameters, candidate.parameters, 0, host.parameters),
            (
                "parameters in all",
                self.total_parameters,
                candidate.parameters,
                held.parameters,
                host.parameters,
            ),
            ("FLOPs in all", self.flops, candidate.flops, held.flops, host.flops),
            ("latency in all", self.latency, candidate.latency_s, held.latency_s, host.latency_s),
        )
        return next((reason for limit in limits if (reason := _exceeds(*limit))), None)


def default_overhead(parameters: int, budget: Budget) -> float:
    """Return what growing may take where the owner does not say, as a ratio to training's FLOPs.

    What a trial costs follows from its number of updates, and runs of small hosts have few.

    Args:
        parameters: Parameters of the host.
        budget: Says which hosts are small.
    """
    return SMALL_HOST_OVERHEAD if parameters < budget.small_host else OVERHEAD


def forward_flops(model: nn.Module, *example: object) -> int:
    """Count the FLOPs of one forward (a multiply-add is two), in evaluation mode.

    The model is left as it was: modes, buffers and the random state.

    Args:
        model: Any module.
        example: Its inputs. Divide the result by their number of samples for one sample.
    """
    with _looking_only(model), counting() as counter:
        model(*example)
    return int(counter.get_total_flops())


def forward_latency_s(
    model: nn.Module, *example: object, clock: Clock, repeats: int = 15, warmup: int = 3
) -> float:
    """Measure the median time of a forward in seconds, in evaluation mode.

    Args:
        model: Any module; it is left as it was.
        example: Its inputs.
        clock: Clock to read.
        repeats: Forwards that are timed, at least 1.
        warmup: Forwards before them, at least 0.
    """
    with _looking_only(model):
        for _ in range(warmup):
            model(*example)
        return median(_time_once(model, example, clock) for _ in range(repeats))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a module, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _exceeds(
    what: str, limit: float | None, added: float | None, held: float | None, host: float | None
) -> str | None:
    """Say where ``held + added`` is over the share ``limit`` of the host's figure."""
    if limit is None or added is None or host is None:
        return None
    total = (held or 0.0) + added
    if total <= limit * host:
        return None
    share = total / host if host > 0 else math.inf
    return f"{what}: {share:+.1%} of the host, the budget has {limit:+.1%}"


def _time_once(model: nn.Module, example: tuple[object, ...], clock: Clock) -> float:
    synchronize()
    start = clock.now()
    model(*example)
    synchronize()
    return clock.now() - start


def synchronize() -> None:
    """Wait for the accelerator, where there is one: a launch is not a duration."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def _looking_only(model: nn.Module) -> Iterator[None]:
    """Evaluate without a gradient and without a trace in modes or random state."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training
