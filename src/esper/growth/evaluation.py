"""Reading the owner's held-out measure without leaving a trace in the run."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from esper.continuity.snapshot import random_state, set_random_state
from esper.contracts.errors import GrowthError
from esper.forward.recompilation import uncompiled
from esper.growth.batch import num_samples
from esper.growth.measurement import Measurement, parse_measurement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from esper.contracts.choices import Goal


class Evaluator:
    """The owner's ``evaluate``, run under ``no_grad`` in evaluation mode, random state kept.

    The first call evaluates twice: per-sample losses that do not repeat in order would make every
    paired test meaningless.

    Args:
        evaluate: Takes the model; returns a scalar, per-sample losses, a dict whose first key
            decides, or ``(losses, metrics)``.
        goal: ``"min"`` where lower is better, ``"max"`` where higher is.
    """

    def __init__(self, evaluate: Callable[[nn.Module], object], *, goal: Goal = "min") -> None:
        self._evaluate = evaluate
        self._goal = goal
        self._repeats = False
        self.samples_seen = 0

    def __call__(self, model: nn.Module) -> Measurement:
        """Measure the model as it stands.

        Raises:
            GrowthError: The per-sample losses changed between two readings of one model.
        """
        if not self._repeats:
            self._check_order(model)
        return self._read(model)

    def _read(self, model: nn.Module, *, random_seed: int | None = None) -> Measurement:
        with measuring(model), _counting(model) as counted:
            if random_seed is not None:
                torch.manual_seed(random_seed)
            result = parse_measurement(self._evaluate(model), goal=self._goal)
        self.samples_seen += counted[0]
        return result

    def _check_order(self, model: nn.Module) -> None:
        one, other = (self._read(model, random_seed=seed).per_sample for seed in range(2))
        same = (one is None and other is None) or (
            one is not None
            and other is not None
            and one.shape == other.shape
            and np.allclose(one, other, rtol=1e-3, atol=1e-6, equal_nan=True)
        )
        if not same:
            msg = (
                "evaluate(model) gave other per-sample losses when called twice on the same model: "
                "your loader shuffles, or drops samples at random. Expected the same samples in "
                "the same order every time; use shuffle=False for the held-out data"
            )
            raise GrowthError(msg)
        self._repeats = True


def averaged(measurements: Sequence[Measurement]) -> Measurement:
    """Return the mean of several measurements on one split, sample by sample.

    A run at a constant rate wobbles from update to update; the mean of a few looks is the model's
    level, and the gate compares levels.

    Args:
        measurements: At least one, all of the same samples; the metrics are those of the last.
    """
    arrays = [m.per_sample for m in measurements if m.per_sample is not None]
    whole = len(arrays) == len(measurements)
    return Measurement(
        loss=float(np.mean([m.loss for m in measurements])),
        per_sample=np.mean(arrays, axis=0) if whole else None,
        metrics=measurements[-1].metrics,
    )


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode under ``no_grad``; put modes and random state back.

    What was compiled in place runs eagerly, as in the shadow passes that it is compared with.
    """
    modes = [(module, module.training) for module in model.modules()]
    state = random_state(model)
    model.eval()
    try:
        with torch.no_grad(), uncompiled(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(state)


@contextmanager
def _counting(model: nn.Module) -> Iterator[list[int]]:
    """Count the samples that pass the model's forward, for the accounting of work."""
    counted = [0]

    def count(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        counted[0] += num_samples((*args, *kwargs.values()))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()
