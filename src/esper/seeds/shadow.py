"""Shadow passes: running a kernel in a model that does not have it, without leaving a trace."""

from __future__ import annotations

import random
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from esper.forward.class_change import choose_forward
from esper.forward.recompilation import put_back_compiled, set_aside_compiled
from esper.seeds.kernel_parts import refuse_shared_modules
from esper.seeds.slots import make_seed
from esper.state.layer_record import RECORD, record_of
from esper.state.seed_slot import no_hook
from esper.state.set_aside import set_aside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import LayerCall

_OBSERVATIONS: Final = ("seen", "last_error")
_COUNTERS: Final = (
    "native_count",
    "active_count",
    "kernel_execution_count",
    "num_faults",
    "num_skipped",
)

_in_shadow_pass: ContextVar[bool] = ContextVar("in_shadow_pass", default=False)


_examples: weakref.WeakKeyDictionary[nn.Module, dict[str, LayerCall]] = weakref.WeakKeyDictionary()
"""Kernels that have run in shadow, with a call of each layer by its name."""


def seen_example(layer: nn.Module, kernel: PreparedKernel) -> LayerCall | None:
    """Return a call with which a kernel has run in shadow at a layer of this name, or None."""
    return _examples.get(kernel.module, {}).get(record_of(layer).name)


def remember_call(layer: nn.Module, kernel: PreparedKernel, call: LayerCall) -> None:
    """Remember a call with which a kernel has run, so that a graft need not probe it again."""
    _examples.setdefault(kernel.module, {})[record_of(layer).name] = call


def in_shadow_pass() -> bool:
    """Return whether a shadow pass is running here; forward hooks may ask."""
    return _in_shadow_pass.get()


@contextmanager
def shadow_pass(
    model: nn.Module,
    *others: nn.Module,
    functions: Iterable[object] = (),
    values: Iterable[object] = (),
) -> Iterator[None]:
    """Run forwards that leave the model, the random state and the run as they were.

    Forwards inside write to clones of the buffers; the buffers themselves come back untouched,
    also where the forward raises, and so does what the seeds had observed of their calls. The
    random states of torch, numpy and Python are put back, and so is whatever modules and functions
    keep elsewhere, as far as :func:`~esper.state.set_aside.set_aside` can: the rest is named by a
    warning. What was compiled in place runs eagerly. Gradients are to be taken with
    ``torch.autograd.grad``.

    Args:
        model: The model whose buffers are set aside: unwrapped, not compiled.
        others: Modules beside it that run too.
        functions: Functions of the owner's that are called.
        values: What they are called with: a batch.
    """
    with set_aside(model, *others, functions=functions, values=values):
        yield from _pass_with_clones(model, *others)


def _pass_with_clones(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """Yield once, with clones of the buffers in their places and a random state that goes."""
    token = _in_shadow_pass.set(True)
    buffers = [kept for module in (model, *others) for kept in _set_aside_buffers(module)]
    observed = _set_aside_observations(model)
    compiled = set_aside_compiled(model.modules())
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=_device_indices(model), device_type=_device_type(model)),
            _differentiable_checkpoints(),
        ):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer  # noqa: SLF001 - past hooks and properties
        for holder, values in observed:
            vars(holder).update(values)
        put_back_compiled(compiled)
        _in_shadow_pass.reset(token)


@contextmanager
def _differentiable_checkpoints() -> Iterator[None]:
    """Let what a model checkpoints by a reentrant backward be asked for single gradients.

    Such a backward refuses ``torch.autograd.grad``, and ``backward`` would reach every parameter
    and whatever hangs on it. The other way to checkpoint runs the same numbers in the same memory.
    """
    names = vars(torch.utils.checkpoint)
    original = names["CheckpointFunction"]
    names["CheckpointFunction"] = _NotReentrant
    try:
        yield
    finally:
        names["CheckpointFunction"] = original


class _NotReentrant:
    """Stands for torch's ``CheckpointFunction`` in shadow passes; other threads get torch's own."""

    _original = torch.utils.checkpoint.CheckpointFunction

    @classmethod
    def apply(cls, function: Callable[..., object], preserve: bool, *args: object) -> object:  # noqa: FBT001 - torch's signature
        """Checkpoint a function without a reentrant backward."""
        if not in_shadow_pass():
            return cls._original.apply(function, preserve, *args)  # type: ignore[no-untyped-call] # torch has none
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve
        )


def _set_aside_observations(model: nn.Module) -> list[tuple[object, dict[str, object]]]:
    """Let seeds and layers count what comes as if it were the first; return what to put back.

    What a shadow kernel feeds to the seeds after it says nothing about them.
    """
    kept: list[tuple[object, dict[str, object]]] = []
    for module in model.modules():
        record = module.__dict__.get(RECORD)
        if record is None:
            continue
        kept.append((record, {name: getattr(record, name) for name in (*_COUNTERS, "in_shadow")}))
        record.in_shadow = True
        for seed in record.seeds.values():
            kept.append((seed, {name: getattr(seed, name) for name in _OBSERVATIONS}))
            seed.forget_calls()
    return kept


def _set_aside_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Put clones in the place of all buffers; a shared buffer stays shared."""
    clones: dict[int, Tensor] = {}
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001 - past hooks and properties
            if buffer is not None:
                kept.append((module, name, buffer))
                if id(buffer) not in clones:
                    clones[id(buffer)] = buffer.detach().clone()
    for module, name, buffer in kept:
        module._buffers[name] = clones[id(buffer)]  # noqa: SLF001 - as above
    return kept


def _accelerated(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")})


def _device_indices(model: nn.Module) -> list[int]:
    return sorted(device.index or 0 for device in _accelerated(model))


def _device_type(model: nn.Module) -> str:
    return next((device.type for device in _accelerated(model)), "cuda")


@contextmanager
def shadow(layer: nn.Module, seed_idx: int, kernel: PreparedKernel, alpha: float) -> Iterator[None]:
    """Let a kernel contribute at ``alpha`` while it is no part of the model.

    It is neither fenced nor guarded: its errors are the caller's to see. A kernel that stands in
    the same seed makes room meanwhile. Several layers may be in shadow at once.

    Raises:
        ValueError: ``seed_idx`` or ``alpha`` is out of range, the seed is in shadow already, or the
            kernel is, or holds, a module of the model.
    """
    refuse_shared_modules(layer, kernel)
    record = record_of(layer)
    record.layout.check_index(seed_idx)
    if not 0.0 < alpha <= 1.0:
        msg = f"alpha of a shadow seed must be in (0, 1], got {alpha}"
        raise ValueError(msg)
    if seed_idx in record.shadows:
        msg = f"seed {seed_idx} of layer {record.name!r} is in shadow already"
        raise ValueError(msg)
    seed = make_seed(layer, seed_idx, kernel, guard="off", is_shadow=True)
    seed.slot.set_alpha(alpha)
    record.shadows[seed_idx] = seed
    handle = layer.register_forward_hook(no_hook)  # turns fused paths off that bypass the layer
    choose_forward(layer)
    try:
        yield
        if seed.example is not None:
            remember_call(layer, kernel, seed.example)
    finally:
        handle.remove()
        del record.shadows[seed_idx]
        choose_forward(layer)
