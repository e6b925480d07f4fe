"""The owner's functions: tried before anything depends on them, and their answers checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from esper.growth.batch import num_elements, num_samples
from esper.growth.memory import saved_for_backward
from esper.growth.reading import Decision
from esper.resilience.attempt import Done, Failed, attempt
from esper.seeds.batch_rows import rows_of
from esper.seeds.fitting import Pass, device_of
from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import trainable_parameters
from esper.state.shortage import is_shortage

if TYPE_CHECKING:
    from esper.growth.batch import Batch
    from esper.growth.policies import Policy
    from esper.growth.reading import Reading
    from esper.growth.run import GrowthRun
    from esper.seeds.fitting import Cuts

TAKES: Final[Mapping[str, tuple[str, ...]]] = {
    "compute_loss": ("model", "batch"),
    "evaluate": ("model",),
    "update": ("model", "optimizer", "batch"),
    "twin": (),
    "group_for": ("name", "parameter"),
    "on_progress": ("row",),
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
    """Call the owner's loss once, on the first batch, and learn what an update takes.

    Raises:
        TypeError: It does not return a tensor.
        ValueError: It returns no scalar, or one that no gradient can be taken of.
    """
    try:
        forward_flops = measure_update(run, batch)
    except Exception as error:
        error.add_note("(compute_loss was tried on the first batch that grower.step was given)")
        raise
    if forward_flops is not None:
        run.host_cost = replace(run.host_cost, flops=forward_flops / max(num_samples(batch), 1))


def measure_update(run: GrowthRun, batch: Batch) -> int | None:
    """Measure what an update of the live model takes, by a pass beside the run.

    The pass has no trace in the run, and is counted itself. A model of which no gradient can be
    asked for in this way (a sharded one) is taken to need twice its forward for its backward.

    Returns:
        FLOPs of the forward; None where there is no ``compute_loss``, or no memory for the pass.

    Raises:
        TypeError: The owner's loss is no tensor.
        ValueError: It is no scalar, or one that no gradient can be taken of.
    """
    if run.compute_loss is None:
        return None

    def work() -> Pass[int]:
        return Pass(
            work="ranking",
            batch=batch,
            device=device_of(run.model),
            parted=lambda cuts, _: _measured_on_part(run, batch, cuts),
            measure=lambda *_: None,  # FLOPs are those of a part, times how many there are
            rules=run.update_rules,
        )

    try:
        with run.fits.in_use():
            return run.fits.run(lambda: _measured(run, batch, 1.0), work)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        run.ledger.update.learn(0, num_elements(batch))
        run.journal.warn(
            f"nothing can grow, since there is no memory to learn what an update takes: {error}"
        )
        return None


def _measured_on_part(run: GrowthRun, batch: Batch, cuts: Cuts) -> int:
    (start, stop), num = cuts[-1], cuts[-1][1]
    return _measured(run, rows_of(batch, start, stop), num / (stop - start))


def _measured(run: GrowthRun, batch: Batch, times: float) -> int:
    """Measure an update on a batch; what it keeps, and its forward, is as much so many times."""
    compute_loss, ledger = run.compute_loss, run.ledger
    assert compute_loss is not None, "it was looked for"
    apart = shadow_pass(run.model, functions=(compute_loss,), values=(batch,))
    with apart, torch.enable_grad(), saved_for_backward(run.model) as saved:
        with ledger.measured("evaluation") as forward:
            loss = compute_loss(run.model, batch)
        check_loss(loss)
        gradients_of = functools.partial(torch.autograd.grad, loss, allow_unused=True)
        with ledger.measured("evaluation") as backward:
            found = attempt(lambda: gradients_of(trainable_parameters(run.model)))
    run.activation_bytes = round(saved.size_bytes * times)
    if isinstance(found, Failed) and is_shortage(found.error):
        raise found.error
    is_known = isinstance(found, Done) and any(g is not None for g in found.value)
    backward_flops = backward.flops if is_known else 2 * forward.flops
    ledger.update.learn(forward.flops + backward_flops, num_elements(batch))
    return round(forward.flops * times)


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
