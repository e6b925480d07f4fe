"""A clone of everything a graft can change, taken at its admission and put back exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esper.continuity.following import averages_of
from esper.continuity.named_state import parameters_of
from esper.state.seed_slot import SeedSlot
from esper.state.shards import spread_like, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from esper.continuity.ensemble import AnyOptimizer


class RunSnapshot:
    """Weights, buffers, optimizer state and random state of a run at one update.

    Those of averages that follow the model are part of it (``esper.follow``).

    Values are cloned when the snapshot is taken and cloned again when it is restored, so that
    neither the run nor the snapshot ever holds the other's memory
    (``Optimizer.load_state_dict`` keeps references to what it is given). Learning rates are not
    part of it: they belong to the scheduler, which is not rolled back.

    It takes as much memory as what it clones (:func:`snapshot_bytes`), however long it is kept.

    Args:
        model: The model, whose kernels at this moment belong to the snapshot.
        optimizer: Its optimizer.
        update: Number of optimizer updates done.
    """

    def __init__(self, model: nn.Module, optimizer: AnyOptimizer, *, update: int) -> None:
        self.update = update
        models = [model, *averages_of(model)]
        parameters = _parameters(models, optimizer)
        self._values: dict[Tensor, Tensor] = {p: p.detach().clone() for p in parameters}
        state = optimizer.state
        self._state: dict[Tensor, dict[str, Any]] = {
            p: _cloned(state[p]) for p in parameters if p in state
        }
        self._buffers = [(m, name, b, b.detach().clone()) for m, name, b in _host_buffers(models)]
        self._random_state = random_state(model)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors that it holds, but for the random state's few thousand."""
        moments = (each for state in self._state.values() for each in state.values())
        buffers = (value for *_, value in self._buffers)
        return _bytes([*self._values.values(), *moments, *buffers])

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

    def state_dict(self, model: nn.Module, optimizer: AnyOptimizer) -> dict[str, Any]:
        """Return the snapshot by names, as plain values and tensors on the CPU.

        What has left the run since is not in it.

        Args:
            model: The model that it was taken of.
            optimizer: Its optimizer.
        """
        named = {id(p): name for name, p in parameters_by_name(model, optimizer).items()}
        held = {p: named[id(p)] for p in self._values if id(p) in named}
        places = {(id(m), own): name for name, m, own, _ in _buffers_by_name(model)}
        return {
            "update": self.update,
            "values": {name: on_cpu(self._values[p]) for p, name in held.items()},
            "state": {
                name: {key: on_cpu(value) for key, value in self._state[p].items()}
                for p, name in held.items()
                if p in self._state
            },
            "buffers": {
                places[id(m), own]: on_cpu(value)
                for m, own, _, value in self._buffers
                if (id(m), own) in places
            },
            "random_state": _random_state_dict(self._random_state),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], model: nn.Module, optimizer: AnyOptimizer
    ) -> RunSnapshot:
        """Return the snapshot that :meth:`state_dict` was taken of, for a run built anew.

        Args:
            state: What it returned.
            model: A model like the one that it was taken of.
            optimizer: What trains it.

        Raises:
            KeyError: A part is missing, or names what the model and the optimizer do not have.
        """
        made = cls.__new__(cls)
        named = parameters_by_name(model, optimizer)
        places = {name: (m, own, b) for name, m, own, b in _buffers_by_name(model)}
        made.update = int(state["update"])
        made._values = {  # noqa: SLF001 - of its own class
            named[name]: spread_like(value.to(named[name].device, copy=True), named[name])
            for name, value in state["values"].items()
        }
        made._state = {  # noqa: SLF001 - as above
            named[name]: _state_beside(named[name], own, optimizer)
            for name, own in state["state"].items()
        }
        made._buffers = [  # noqa: SLF001 - as above
            (*places[name], value.clone()) for name, value in state["buffers"].items()
        ]
        made._random_state = _random_state_from(state["random_state"])  # noqa: SLF001 - as above
        return made


def snapshot_bytes(model: nn.Module, optimizer: AnyOptimizer) -> int:
    """Return what a snapshot of a run would take: parameters, buffers, moments and averages.

    Args:
        model: The model.
        optimizer: What trains it, after its first step: its moments are counted as they are.
    """
    models = [model, *averages_of(model)]
    parameters = _parameters(models, optimizer)
    state = optimizer.state
    moments = (each for p in parameters if p in state for each in state[p].values())
    return _bytes([*parameters, *moments, *(buffer for *_, buffer in _host_buffers(models))])


def _parameters(models: list[nn.Module], optimizer: AnyOptimizer) -> list[Tensor]:
    """Return what models and the optimizer hold, each once."""
    own = (p for each in models for p in each.parameters())
    held = (p for group in optimizer.param_groups for p in group["params"])
    return list(dict.fromkeys([*own, *held]))


def _bytes(values: list[Any]) -> int:
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameters_by_name(model: nn.Module, optimizer: AnyOptimizer) -> dict[str, Tensor]:
    """Return every parameter of a run by a name that it has in a run built anew, too.

    Those of averages that follow the model have their number before their name; of what only the
    optimizer holds, group and place are the name.

    Args:
        model: The model.
        optimizer: What trains it.
    """
    found: dict[str, Tensor] = dict(parameters_of(model))
    for i, average in enumerate(averages_of(model)):
        found |= {f"average {i}: {name}": p for name, p in parameters_of(average).items()}
    known = set(map(id, found.values()))
    for i, group in enumerate(optimizer.param_groups):
        others = {f"group {i}: {at}": p for at, p in enumerate(group["params"])}
        found |= {name: p for name, p in others.items() if id(p) not in known}
    return found


def on_cpu(value: Any) -> Any:
    """Return a tensor's copy on the CPU, whole where it is in shards; anything else as it is."""
    return whole(value.detach()).to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _state_beside(p: Tensor, state: Mapping[str, Any], optimizer: AnyOptimizer) -> dict[str, Any]:
    """Return a parameter's state where the optimizer keeps such: a count of steps may be aside."""
    live = optimizer.state.get(p) or {}

    def placed(key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.shape == p.shape:
            value = spread_like(value, p)
        like = live.get(key)
        aside = torch.device("cpu") if value.ndim == 0 else p.device
        return value.to(like.device if isinstance(like, torch.Tensor) else aside, copy=True)

    return {key: placed(key, value) for key, value in state.items()}


def _buffers_by_name(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield every buffer that a snapshot may hold: its name, the module, its own name, and it."""
    for i, each in enumerate((model, *averages_of(model))):
        paths = {id(module): path for path, module in each.named_modules()}
        prefix = f"average {i - 1}: " if i else ""
        for module, own, buffer in _host_buffers([each]):
            yield f"{prefix}{paths[id(module)]}.{own}", module, own, buffer


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


def _random_state_dict(state: RandomState) -> dict[str, Any]:
    """Return a random state as plain values and tensors."""
    generator = state.numpy["state"]
    plain = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in generator.items()}
    return {
        "devices": {name: value.clone() for name, value in state.devices.items()},
        "python": state.python,
        "numpy": {**state.numpy, "state": plain},
    }


def _random_state_from(state: Mapping[str, Any]) -> RandomState:
    """Return the random state that was made plain."""
    version, internal, gauss = state["python"]
    generator = dict(state["numpy"]["state"])
    generator["key"] = np.array(generator["key"], dtype=np.uint32)
    return RandomState(
        devices={name: value.clone() for name, value in state["devices"].items()},
        python=(version, tuple(internal), gauss),
        numpy={**state["numpy"], "state": generator},
    )


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
