"""What the ranks measured, as one measurement: of the same samples, or each of its own share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from esper.contracts.errors import GrowthError
from esper.growth.measurement import Measurement, mean_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.growth.measurement import Losses

_SAME: Final = 1e-3
"""Relative difference up to which losses are of the same samples where nothing else tells."""


def joined(of_ranks: Sequence[tuple[Measurement, str]]) -> Measurement:
    """Return what the ranks measured together.

    Ranks that read the same samples measured the same thing, running statistics that they keep
    apart aside: the first one's reading is that of all, since more copies of a sample are no more
    evidence. Ranks that read shares of their own have their samples put one behind the other.

    Args:
        of_ranks: What each rank measured, and a mark of the samples that it was measured on;
            empty where nobody knows.

    Raises:
        GrowthError: Some ranks read the same samples and others did not.
    """
    found = [measurement for measurement, _ in of_ranks]
    marks = {mark for _, mark in of_ranks}
    losses = [m.per_sample for m in found if m.per_sample is not None]
    if len(losses) < len(found):
        return _of_scalars(found, is_same=len(marks) == 1)
    are_same = len(marks) == 1 and ("" not in marks or _are_alike(losses))
    if are_same or _are_equal(losses):
        return found[0]
    if len(marks) not in (1, len(found)):
        msg = (
            f"evaluate(model) read {len(marks)} different sets of held-out samples on "
            f"{len(found)} ranks; expected the same samples on every rank, or a share of its own "
            "on each: give every rank all of them, or each rank every n-th one from its number on"
        )
        raise GrowthError(msg)
    whole = np.concatenate(losses)
    weights = [len(own) for own in losses]
    return Measurement(loss=mean_of(whole), per_sample=whole, metrics=_mean(found, weights))


def _of_scalars(found: Sequence[Measurement], *, is_same: bool) -> Measurement:
    """Return the mean of measures without samples, by which no gate passes."""
    if len(found) == 1 or is_same:
        return found[0]
    loss = mean_of([m.loss for m in found])
    return Measurement(loss=loss, per_sample=None, metrics=_mean(found, [1] * len(found)))


def _mean(found: Sequence[Measurement], weights: Sequence[int]) -> dict[str, float]:
    """Return the means of what every rank has a figure of."""
    names = [name for name in found[0].metrics if all(name in m.metrics for m in found)]
    total = sum(weights)
    return {
        name: sum(w * m.metrics[name] for w, m in zip(weights, found, strict=True)) / total
        for name in names
    }


def _are_equal(losses: Sequence[Losses]) -> bool:
    return all(np.array_equal(own, losses[0], equal_nan=True) for own in losses)


def _are_alike(losses: Sequence[Losses]) -> bool:
    return all(
        own.shape == losses[0].shape and np.allclose(own, losses[0], rtol=_SAME, equal_nan=True)
        for own in losses
    )
