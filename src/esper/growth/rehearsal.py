"""A twin is tried before anything depends on it: can the run be copied, and is it left alone?"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn

from esper.continuity.snapshot import random_state
from esper.contracts.errors import GrowthError
from esper.growth.live_step import LiveStep
from esper.growth.twins import Twin
from esper.resilience.attempt import Failed, attempt
from esper.state.layer_record import RECORD
from esper.state.shards import here

if TYPE_CHECKING:
    from esper.growth.batch import Batch
    from esper.growth.run import GrowthRun

_LOOKED_INTO: Final = 1000
"""Items of a container that are part of the digest of what a module keeps."""
_BY_TORCH: Final = frozenset(vars(nn.Module())) | {RECORD}
_CURE: Final = (
    "give the Grower twin=, a function that builds the module anew, or trial='shadow', which makes "
    "no copy"
)


def rehearse(run: GrowthRun, batches: list[Batch]) -> str | None:
    """Copy the run, let the copy do one update, and say what stands against twins, or None.

    Args:
        run: The run, after its first update.
        batches: The batches of that update.
    """
    before = run_digest(run)
    made = attempt(lambda: Twin(run))
    if isinstance(made, Failed):
        return str(made.error)
    twin = made.value
    called: list[nn.Module] = []
    weights = [p.detach().clone() for p in twin.model.parameters()]
    with ExitStack() as stack:
        stack.callback(twin.close)
        handle = run.model.register_forward_pre_hook(lambda module, _: called.append(module))
        stack.callback(handle.remove)
        outcome = attempt(lambda: twin.update(batches, LiveStep(settings=run.watcher.settings)))
    if isinstance(outcome, Failed):
        if isinstance(outcome.error, GrowthError):
            raise outcome.error
        return f"a copy of the model could not be trained ({outcome}); {_CURE}"
    if called:
        return (
            "compute_loss (or update) calls the model in training in place of the one that it is "
            "given: use its argument, compute_loss(model, batch)"
        )
    changed = _first_difference(before, run_digest(run))
    if changed is not None:
        return f"an update of a copy of the model changes the live run ({changed}); {_CURE}"
    pairs = zip(weights, twin.model.parameters(), strict=True)
    if all(torch.equal(own, p) for own, p in pairs):
        return "an update of a copy of the model changed none of its weights: does the loss use it?"
    return None


def run_digest(run: GrowthRun) -> dict[str, str]:
    """Return a digest of every part of a run, by name: what a trial must leave alone.

    Parts are parameters, buffers and other attributes of each module, the optimizer's state by
    parameter, and the random state.
    """
    found: dict[str, str] = {}
    for name, module in run.model.named_modules():
        for kind in ("_parameters", "_buffers"):
            for own, value in vars(module)[kind].items():
                found[f"{name}.{own}".lstrip(".")] = _digest(value)
        for own, value in vars(module).items():
            if own not in _BY_TORCH:
                found[f"{name}.{own}".lstrip(".")] = _digest(value)
        found[f"hooks of {name or 'the model'}"] = _digest(
            [len(vars(module)["_forward_hooks"]), len(vars(module)["_forward_pre_hooks"])]
        )
    for i, (_, state) in enumerate(run.optimizer.state.items()):
        found[f"optimizer state {i}"] = _digest(state)
    state = random_state(run.model)
    found["random state"] = _digest([*state.devices.values(), state.python, state.numpy])
    return found


def _first_difference(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    names = [*before, *(name for name in after if name not in before)]
    return next((name for name in names if before.get(name) != after.get(name)), None)


def _digest(value: object) -> str:
    digest = hashlib.sha256()
    for part in _bytes_of(value, depth=0):
        digest.update(part)
    return digest.hexdigest()


def _bytes_of(value: object, depth: int) -> Iterator[bytes]:
    """Yield what a value consists of; objects of classes of the owner's by their attributes."""
    if isinstance(value, Tensor):
        yield from _bytes_of_tensor(here(value))
    elif isinstance(value, np.ndarray):
        yield np.ascontiguousarray(value).tobytes()
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield repr(value).encode()
    elif depth > 4 or isinstance(value, nn.Module) or callable(value):
        return
    elif isinstance(value, Mapping):
        for key, item in list(value.items())[:_LOOKED_INTO]:
            yield repr(key).encode()
            yield from _bytes_of(item, depth + 1)
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield str(len(value)).encode()
        yield from _bytes_of_items(value, depth)
    else:
        yield from _bytes_of(getattr(value, "__dict__", None), depth + 1)


def _bytes_of_items(items: Iterable[object], depth: int) -> Iterator[bytes]:
    for item in list(items)[:_LOOKED_INTO]:
        yield from _bytes_of(item, depth + 1)


def _bytes_of_tensor(value: Tensor) -> Iterator[bytes]:
    yield str((value.dtype, tuple(value.shape))).encode()
    if value.layout is torch.strided and not value.is_meta and value.numel():
        plain = value.detach().cpu().contiguous()
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
