"""What the demo's reporter sees of an arm: the gate split on the way, the test split at the end.

The controller never gets at what is here.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from esper.growth.budget import count_parameters
from esper.growth.evaluation import measuring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from esper.services.digits import Digits, Split

LOOK_EVERY: Final = 25
"""Updates between two looks at the gate split."""
DIP_UPDATES: Final = 200
"""Updates after a switch in which a fall counts as its dip."""
TEST_EPOCHS: Final = 10
"""Epochs at the end of a run after each of which the test split is read."""

AT_ONCE: Final = 250
"""Images of a forward of a whole split: 500 at once took twice as long, out of the cache."""


@dataclass(slots=True, kw_only=True)
class Looks:
    """What was seen of one arm.

    Attributes:
        accuracy: Percent on the gate split, by update.
        parameters: Parameters of the model, by update.
        test: Percent on the test split after each of the last epochs, in order.
    """

    accuracy: dict[int, float] = field(default_factory=dict)
    parameters: dict[int, int] = field(default_factory=dict)
    test: list[float] = field(default_factory=list)

    def after_update(self, update: int, model: nn.Module, digits: Digits) -> None:
        """Look at the gate split where it is time to; modes and random state stay."""
        if update % LOOK_EVERY == 0:
            self.accuracy[update] = accuracy_on(digits.gate, model)
            self.parameters[update] = count_parameters(model)

    def after_epoch(self, epochs_left: int, model: nn.Module, digits: Digits) -> None:
        """Look at the test split if the epoch was one of the last; modes and random state stay."""
        if epochs_left < TEST_EPOCHS:
            self.test.append(accuracy_on(digits.test, model))

    @property
    def test_accuracy(self) -> float:
        """Mean of the looks at the test split, in percent.

        One look at a constant rate wobbles by more than a point between runs that are equal but
        for luck; the mean of ten does by half of that.
        """
        return statistics.fmean(self.test)

    @property
    def metrics(self) -> dict[str, float]:
        """The last look at the gate split, as a share; nothing before the first."""
        percent = next(reversed(self.accuracy.values()), None)
        return {} if percent is None else {"accuracy": percent / 100}

    def worst_dip(self, switches: Iterable[int]) -> float | None:
        """Return the largest fall of gate accuracy, in points, in the 200 updates after a switch.

        It is measured from the last look before the switch. None where nothing was switched.

        Args:
            switches: Updates after which the model was exchanged for another.
        """
        falls = [fall for switch in switches if (fall := self._fall_after(switch)) is not None]
        return max(falls, default=None)

    def _fall_after(self, switch: int) -> float | None:
        start = switch - switch % LOOK_EVERY
        window = [self.accuracy[u] for u in self.accuracy if start <= u <= start + DIP_UPDATES]
        return window[0] - min(window) if window else None


def measure_on(split: Split) -> Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]]:
    """Return the owner's measure on a split: per-sample Brier scores, and who was right.

    The Brier score, the squared error of the probabilities, follows what the arms are compared
    by, their accuracy; cross entropy is dominated by the few most overconfident errors.
    """

    def evaluate(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        logits_NC = logits_of(split, model)
        error_NC = logits_NC.softmax(1) - F.one_hot(split.y_N, logits_NC.shape[1])
        return error_NC.square().sum(1), {"accuracy": (logits_NC.argmax(1) == split.y_N).float()}

    return evaluate


def accuracy_on(split: Split, model: nn.Module) -> float:
    """Return the accuracy in percent; modes and random state stay."""
    with measuring(model):
        return 100 * float((logits_of(split, model).argmax(1) == split.y_N).float().mean())


def logits_of(split: Split, model: nn.Module) -> Tensor:
    """Return what a model says of a split, shape (samples, 10)."""
    return torch.cat([model(x_B1HW) for x_B1HW in torch.split(split.x_N1HW, AT_ONCE)])
