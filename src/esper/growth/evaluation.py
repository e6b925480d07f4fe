"""Reading the owner's held-out measure without leaving a trace in the run."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from esper.continuity.snapshot import random_state, set_random_state
from esper.contracts.errors import GrowthError
from esper.forward.recompilation import uncompiled
from esper.growth.measurement import Measurement, mean_of, parse_measurement
from esper.seeds.split_calls import calls_fitted
from esper.state.layer_call import LayerCall
from esper.state.set_aside import set_aside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from esper.contracts.choices import Goal
    from esper.seeds.fitting import Rule


class Evaluator:
    """The owner's ``evaluate``, run under ``no_grad`` in evaluation mode, random state kept.

    The first call evaluates twice: per-sample losses that do not repeat in order would make every
    paired test meaningless.

    Attributes:
        num_readings: Readings made; the first call makes three.
        example: The first input that the model was given, without its data (on the device
            ``meta``); None before.
        mark: A digest of that input's data: of which samples the losses are; empty before.

    Args:
        evaluate: Takes the model; returns a scalar, per-sample losses, a dict whose first key
            decides, or ``(losses, metrics)``.
        goal: ``"min"`` where lower is better, ``"max"`` where higher is.
        functions: The owner's functions that train: what they keep is not the measure's to change.
    """

    def __init__(
        self,
        evaluate: Callable[[nn.Module], object],
        *,
        goal: Goal = "min",
        functions: Sequence[object] = (),
    ) -> None:
        self._evaluate = evaluate
        self._functions = functions
        self._goal = goal
        self._repeats = False
        self._rules: WeakKeyDictionary[nn.Module, dict[str, Rule]] = WeakKeyDictionary()
        self.num_readings = 0
        self.example: LayerCall | None = None
        self.mark = ""

    def __call__(self, model: nn.Module) -> Measurement:
        """Measure the model as it stands.

        Raises:
            GrowthError: The per-sample losses changed between two readings of one model.
        """
        if not self._repeats:
            self._check_order(model)
        return self._read(model)

    def state_dict(self) -> list[int]:
        """Return how many readings were made, and whether their order is known to repeat."""
        return [self.num_readings, int(self._repeats)]

    def load_state_dict(self, state: Sequence[int]) -> None:
        """Go on where another evaluator was: an order that repeated is not checked again."""
        self.num_readings, self._repeats = state[0], bool(state[1])

    def _read(self, model: nn.Module, *, random_seed: int | None = None) -> Measurement:
        """Read the measure; a call of the model that lacks memory is made in parts."""
        apart = measuring(model, measures=(self._evaluate,), functions=self._functions)
        fitted = calls_fitted(model, self._rules.setdefault(model, {}))
        with fitted, apart, _seeing(model, self._see):
            if random_seed is not None:
                torch.manual_seed(random_seed)
            result = parse_measurement(self._evaluate(model), goal=self._goal)
        self.num_readings += 1
        return result

    def _see(self, call: LayerCall) -> None:
        """Keep the shapes of the first call that was seen, and a digest of its tensors."""
        if self.example is None:
            self.mark = _digest(call.tensors())
            self.example = call.to(torch.device("meta"))

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
    with np.errstate(invalid="ignore", over="ignore"):  # a gate refuses what is not finite
        per_sample = np.mean(arrays, axis=0) if whole else None
    return Measurement(
        loss=mean_of([m.loss for m in measurements]),
        per_sample=per_sample,
        metrics=measurements[-1].metrics,
    )


@contextmanager
def measuring(
    model: nn.Module, *, measures: Sequence[object] = (), functions: Sequence[object] = ()
) -> Iterator[None]:
    """Hold the model in evaluation mode under ``no_grad``, and leave no trace in it.

    Modes, buffers, whatever else modules keep and the random state are put back; of the measures,
    their random generators. What was compiled in place runs eagerly, as in the shadow passes that
    it is compared with.

    Args:
        model: The model.
        measures: Functions of the owner's that read it; what they keep is the owner's.
        functions: Functions of the owner's that train it; what they keep is put back.
    """
    state = random_state(model)
    with set_aside(model, functions=functions, draws=measures, with_buffers=True):
        model.eval()
        try:
            with torch.no_grad(), uncompiled(model):
                yield
        finally:
            set_random_state(state)


def _digest(tensors: Sequence[Tensor]) -> str:
    made = hashlib.sha256()
    for tensor in tensors:
        if tensor.layout is torch.strided:
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            made.update(plain.view(torch.uint8).numpy().tobytes())
    return made.hexdigest() if tensors else ""


@contextmanager
def _seeing(model: nn.Module, see: Callable[[LayerCall], None]) -> Iterator[None]:
    """Let each call of the model be seen.

    Args:
        model: The model.
        see: Told of each of its calls.
    """

    def tell(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        see(LayerCall(args, kwargs))

    handle = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
