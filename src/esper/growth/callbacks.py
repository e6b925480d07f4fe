"""The owner's functions: tried before anything depends on them, and their answers checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import torch

from esper.growth.batch import num_samples
from esper.growth.reading import Decision
from esper.seeds.shadow import shadow_pass

if TYPE_CHECKING:
    from esper.growth.batch import Batch
    from esper.growth.policies import Policy
    from esper.growth.reading import Reading
    from esper.growth.run import GrowthRun

TAKES: Final[Mapping[str, tuple[str, ...]]] = {
    "compute_loss": ("model", "batch"),
    "evaluate": ("model",),
    "update": ("model", "optimizer", "batch"),
    "twin": (),
    "group_for": ("name", "parameter"),
}
"""What each of the owner's functions is called with, in order."""


def check_function(name: str, function: object) -> None:
    """Refuse what cannot be called as the Grower calls it.

    Args:
        name: One of :data:`TAKES`.
        function: What the owner gave.

    Raises:
        TypeError: It is no function, or does not take what it is called with.
    """
    takes = TAKES[name]
    if not callable(function):
        msg = f"{name} is a function; got {function!r} (a {type(function).__name__})"
        raise TypeError(msg)
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        msg = (
            f"{name} is called as {name}({', '.join(takes)}), which {function!r} with the "
            f"signature {signature} does not take: {error}"
        )
        raise TypeError(msg) from error


def _signature(function: Callable[..., object]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of some functions in C nobody knows it
        return None


def try_compute_loss(run: GrowthRun, batch: Batch) -> None:
    """Call the owner's loss once, on the first batch, without a trace in the run.

    Raises:
        TypeError: It does not return a tensor.
        ValueError: It returns no scalar, or one that no gradient can be taken of.
    """
    compute_loss = run.compute_loss
    if compute_loss is None:
        return
    try:
        apart = shadow_pass(run.model, functions=(compute_loss,), values=(batch,))
        with apart, torch.enable_grad():
            check_loss(compute_loss(run.model, batch))
    except Exception as error:
        error.add_note("(compute_loss was tried on the first batch that grower.step was given)")
        raise
    run.ledger.count_forward("evaluation", num_samples(batch))


def check_loss(loss: object) -> None:
    """Refuse what no kernel could be trained on.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is no scalar, or has no gradient.
    """
    expected = "compute_loss returns the training loss, a scalar tensor with a gradient"
    if not isinstance(loss, torch.Tensor):
        msg = f"{expected}; got {loss!r} (a {type(loss).__name__}); return the tensor itself"
        raise TypeError(msg)
    if loss.numel() != 1:
        msg = f"{expected}; got the shape {tuple(loss.shape)}; reduce it, as with .mean()"
        raise ValueError(msg)
    if not loss.requires_grad:
        msg = (
            f"{expected}; got one without: it was computed under no_grad, detached, or of a model "
            "with nothing to train"
        )
        raise ValueError(msg)


def asked(policy: Policy, reading: Reading) -> Decision:
    """Ask a policy whether to grow now.

    Raises:
        TypeError: It answers with something else than a decision.
    """
    decision: object = policy.decide(reading)
    if not isinstance(decision, Decision):
        msg = (
            f"{type(policy).__name__}.decide returns an esper.growth Decision(grow=..., "
            f"verdict=..., reason=...); got {decision!r} (a {type(decision).__name__})"
        )
        raise TypeError(msg)
    return decision
