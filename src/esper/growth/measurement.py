"""What the owner's ``evaluate`` returned, as one value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from esper.contracts.choices import Goal

Losses = NDArray[np.float64]

PARTS: Final = 3
"""One sample in three of the gate split is for the watch; the two between them are for verdicts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """The owner's measure, read once. Lower is better, whatever the owner's goal.

    Attributes:
        loss: Mean loss; may be non-finite where the model is.
        per_sample: float64, shape (samples,), in the owner's order; None where the owner
            returns a scalar.
        metrics: The owner's other figures by name, as returned (not negated).
    """

    loss: float
    per_sample: Losses | None
    metrics: dict[str, float]

    @property
    def verdicts_part(self) -> Measurement:
        """The two thirds of the samples that verdicts are read on, and nothing else is."""
        return self._part(watch=False)

    @property
    def watchs_part(self) -> Measurement:
        """The third that passengers, the watch, policies and pages read; no verdict does."""
        return self._part(watch=True)

    @property
    def told(self) -> float:
        """The loss that pages are told: the watch's part, or of all where one is not finite."""
        return self.watchs_part.loss if math.isfinite(self.loss) else self.loss

    def state_dict(self) -> dict[str, Any]:
        """Return the measurement as plain values, its losses as a tensor."""
        samples = self.per_sample
        return {
            "loss": self.loss,
            "per_sample": None if samples is None else torch.tensor(samples, dtype=torch.float64),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Measurement:
        """Return the measurement that :meth:`state_dict` was taken of."""
        samples = state["per_sample"]
        return cls(
            loss=state["loss"],
            per_sample=None if samples is None else samples.numpy().copy(),
            metrics=dict(state["metrics"]),
        )

    def _part(self, *, watch: bool) -> Measurement:
        """Return every third sample, or all others; a measure without samples stays as it is."""
        if self.per_sample is None or len(self.per_sample) < PARTS:
            return self
        chosen = (np.arange(len(self.per_sample)) % PARTS == PARTS - 1) == watch
        own = self.per_sample[chosen]
        return replace(self, loss=mean_of(own), per_sample=own)

    @property
    def num_not_finite(self) -> int:
        """How many per-sample losses are NaN or infinite; 0 where there are none."""
        if self.per_sample is None:
            return 0
        return int(np.count_nonzero(~np.isfinite(self.per_sample)))

    @property
    def blame(self) -> str:
        """Where to look for what is not finite, in a sentence."""
        if self.per_sample is None or not self.num_not_finite:
            return "look for NaN or infinity in the held-out data and in the model's weights"
        first = int(np.argmin(np.isfinite(self.per_sample)))
        return (
            f"{self.num_not_finite} of {len(self.per_sample)} held-out losses are not finite, the "
            f"first is that of sample {first}, and no graft can pass a gate while they are so; "
            "look for NaN or infinity in the held-out data and in the model's weights"
        )


def parse_measurement(result: object, *, goal: Goal = "min") -> Measurement:
    """Read what the owner's ``evaluate`` returned.

    Args:
        result: A number; one loss per sample (tensor, array or sequence of numbers); a dict
            whose first entry is either of these and decides; or a pair of either and a dict of
            further figures.
        goal: ``"max"`` where higher is better: the deciding figure is negated.

    Raises:
        TypeError: The result is none of these.
        ValueError: It is empty, has another shape than one loss per sample, or ``goal`` is
            unknown.
    """
    if goal not in ("min", "max"):
        msg = f"goal is 'min' or 'max', got {goal!r}"
        raise ValueError(msg)
    deciding, others = _split_result(result)
    sign = 1.0 if goal == "min" else -1.0
    values = sign * _as_float64(deciding, "evaluate")
    if values.ndim > 1 or values.size == 0:
        msg = (
            f"evaluate returned an array of shape {values.shape}; expected a number or one loss "
            "per sample, shape (samples,): reduce every other axis (a sequence's tokens to their "
            "mean, for example)"
        )
        raise ValueError(msg)
    metrics = {
        name: mean_of(_as_float64(value, f"metric {name!r} of evaluate"))
        for name, value in others.items()
    }
    per_sample = values if values.ndim == 1 else None
    return Measurement(loss=mean_of(values), per_sample=per_sample, metrics=metrics)


def mean_of(values: Losses | list[float]) -> float:
    """Return a mean; infinities of both signs make NaN, without numpy's warning."""
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.mean(values))


def _split_result(result: object) -> tuple[object, Mapping[str, object]]:
    """Part the deciding figure from the others."""
    if isinstance(result, Mapping):
        if not result:
            msg = "evaluate returned an empty dict; its first entry decides"
            raise ValueError(msg)
        name, *others = result
        return result[name], {str(other): result[other] for other in others}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result[0], {str(name): value for name, value in result[1].items()}
    return result, {}


def _as_float64(value: object, name: str) -> Losses:
    """Bring a figure of the owner's to a float64 array of its own."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        array = np.array(value)
    except ValueError as error:  # lists of several lengths
        msg = f"{name} returned a {type(value).__name__} that is no array of numbers: {error}"
        raise TypeError(msg) from error
    if array.dtype.kind not in "biuf":
        msg = (
            f"{name} returned {type(value).__name__}; expected a number, one loss per sample, "
            "a dict whose first entry is one of these, or a pair (losses, metrics)"
        )
        raise TypeError(msg)
    return array.astype(np.float64)
