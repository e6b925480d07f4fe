"""A clone of everything a graft can change, taken at its admission and put back exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esper.continuity.following import averages_of
from esper.state.seed_slot import SeedSlot

if TYPE_CHECKING:
    from torch import Tensor, nn

    from esper.continuity.ensemble import AnyOptimizer


class RunSnapshot:
    """Weights, buffers, optimizer state and random state of a run at one update.

    Those of averages that follow the model are part of it (``esper.follow``).

    Values are cloned when the snapshot is taken and cloned again when it is restored, so that
    neither the run nor the snapshot ever holds the other's memory
    (``Optimizer.load_state_dict`` keeps references to what it is given). Learning rates are not
    part of it: they belong to the scheduler, which is not rolled back.

    Args:
        model: The model, whose kernels at this moment belong to the snapshot.
        optimizer: Its optimizer.
        update: Number of optimizer updates done.
    """

    def __init__(self, model: nn.Module, optimizer: AnyOptimizer, *, update: int) -> None:
        self.update = update
        models = [model, *averages_of(model)]
        parameters = dict.fromkeys(p for each in models for p in each.parameters())
        parameters.update({p: None for group in optimizer.param_groups for p in group["params"]})
        self._values = {p: p.detach().clone() for p in parameters}
        state = optimizer.state
        self._state = {p: _cloned(state[p]) for p in parameters if p in state}
        self._buffers = [(m, name, b, b.detach().clone()) for m, name, b in _host_buffers(models)]
        self._random_state = random_state(model)

    def restore(self, optimizer: AnyOptimizer) -> None:
        """Put everything back; parameters that came later must have been removed before.

        Args:
            optimizer: The optimizer that the snapshot was taken of.
        """
        with torch.no_grad():
            for p, value in self._values.items():
                p.copy_(value)
                p.grad = None
            for module, name, buffer, value in self._buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer  # noqa: SLF001 - a forward may have put another there
        live = optimizer.state
        for p in self._values:
            live.pop(p, None)
        for p, state in self._state.items():
            live[p] = _cloned(state)
        set_random_state(self._random_state)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RandomState:
    """Where random numbers go on from.

    Attributes:
        devices: torch's state of the CPU and of each device of the model, by the device's name.
        python: That of the module ``random``.
        numpy: That of ``numpy.random``.
    """

    devices: dict[str, Tensor]
    python: tuple[Any, ...]
    numpy: dict[str, Any]


def random_state(model: nn.Module) -> RandomState:
    """Read the random state of torch, on the CPU and wherever the model is, numpy and Python."""
    devices: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}:
        devices[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return RandomState(
        devices=devices, python=random.getstate(), numpy=np.random.get_state(legacy=False)
    )


def set_random_state(state: RandomState) -> None:
    """Set what :func:`random_state` read."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    for name, value in state.devices.items():
        if name == "cpu":
            torch.set_rng_state(value)
        else:
            torch.get_device_module(torch.device(name)).set_rng_state(value, torch.device(name))


def seed_random_state(model: nn.Module, random_seed: int) -> None:
    """Start the generators of the CPU and of every device that the model is on.

    ``torch.manual_seed`` would do, but formats a stack trace per call where CUDA is not up yet
    (measured: 170 us, a tenth of a shadow pass of a small model).
    """
    torch.default_generator.manual_seed(random_seed)
    for device in {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}:
        torch.get_device_module(device).manual_seed(random_seed)


def _host_buffers(models: list[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that a training forward may write or replace; a seed's slot keeps its own."""
    return [
        (module, name, buffer)
        for model in models
        for module in model.modules()
        if not isinstance(module, SeedSlot)
        for name, buffer in module._buffers.items()  # noqa: SLF001 - past properties
        if buffer is not None
    ]


def _cloned(state: dict[str, object]) -> dict[str, object]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
