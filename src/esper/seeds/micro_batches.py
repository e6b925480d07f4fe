"""A training loss taken in parts whose gradients add up to those of the whole batch.

A loss that is the mean over its samples adds up by the samples of each part, one that is their sum
as it is. Which of the two it is, and whether either, is measured on a few samples. A loss that
weighs samples otherwise (by their tokens, say), or a model that looks at the batch, gives other
figures in parts: it is left whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esper.seeds.batch_rows import num_rows, rows_of, spread_rows
from esper.seeds.fitting import CHECKED_SAMPLES, Rule, uneven
from esper.seeds.same_draws import (
    SameDraws,
    UnknownDrawError,
    devices_of,
    set_torch_states,
    torch_states,
)
from esper.seeds.sameness import Groups, are_alike, lowest, precision_seen
from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import trainable_parameters
from esper.state.set_aside import set_aside
from esper.state.shortage import is_shortage

if TYPE_CHECKING:
    from esper.seeds.fitting import Cuts

Figures = list[Tensor]
Within = AbstractContextManager[None]

Batch = Any
"""What the owner's loader yields."""

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""``(model, batch)`` to the scalar loss that is trained on."""

LOOKS: Final = (
    "what the model gives for a sample depends on the others of the batch, or its loss weighs them "
    "otherwise than as a mean or a sum"
)
DRAWS: Final = "it draws random numbers in a way of which parts cannot have their share"
NOTHING_SEEN: Final = (
    "its loss was zero, or not finite, so that a mean over its samples could not be told from a sum"
)
TOO_FEW: Final = "no two samples fit at once, on which it could be measured whether parts add up"

_MOST_LOOKS: Final = 4
_PLAIN: Final = (bool, int, float, str, type(None))


class Part(NamedTuple):
    """A part of a pass.

    Attributes:
        rows: The first sample of it, and the first behind it.
        share: By what its loss is multiplied.
        within: In what it is run, forward and backward.
    """

    rows: tuple[int, int]
    share: float
    within: AbstractContextManager[None]


def parts_of(model: nn.Module, compute_loss: LossFunction, cuts: Cuts, rule: Rule) -> list[Part]:
    """Return the parts of a pass, to be run in their order from where the random state is now.

    What the loss keeps, as a count of its calls, is for each part what it was for the first, and
    behind the last what one call leaves.

    Args:
        model: What is run.
        compute_loss: ``(model, batch)`` to the loss of a part.
        cuts: Where they begin and end.
        rule: How they add up.
    """
    draws, num = SameDraws(model) if rule.draws else None, cuts[-1][1]
    return [
        Part(
            rows=(start, stop),
            share=1.0 if rule.is_sum else (stop - start) / num,
            within=_within(
                nullcontext() if stop == num else set_aside(functions=(compute_loss,)),
                nullcontext() if draws is None else draws.of((start, stop), num),
            ),
        )
        for start, stop in cuts
    ]


@contextmanager
def _within(kept: Within, drawing: Within) -> Iterator[None]:
    with kept, drawing:
        yield


def gradients_of_parts(
    model: nn.Module,
    compute_loss: LossFunction,
    batch: Batch,
    inputs: Sequence[Tensor],
    cuts: Cuts,
    rule: Rule,
) -> list[Tensor | None]:
    """Return the gradients of a loss that is taken in parts; None for what none reaches."""
    added: list[Tensor | None] = [None] * len(inputs)
    for part in parts_of(model, compute_loss, cuts, rule):
        found: list[Tensor | None]
        with part.within:
            loss = compute_loss(model, rows_of(batch, *part.rows)) * part.share
            found = [*torch.autograd.grad(loss, list(inputs), allow_unused=True)]
        added = [
            own if g is None else g if own is None else own + g
            for own, g in zip(added, found, strict=True)
        ]
    return added


def batch_norm_in_training(model: nn.Module) -> str:
    """Say that a model has batch norms that look at the batch; empty where it has none."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return f"{name or 'the model'} is a batch norm in training mode"
    return ""


def measure_loss(
    model: nn.Module,
    compute_loss: LossFunction,
    batch: Batch,
    num: int,
    rule: Rule,
    *,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Learn whether a loss and its gradients of parts add up to the whole; no trace is left.

    Args:
        model: The model, outside DDP and ``torch.compile``.
        compute_loss: ``(model, batch)`` to the scalar loss.
        batch: Some batch, with at least ``num`` samples.
        num: Samples that are looked at, at least 2; fewer where they do not fit.
        rule: Where it is written down.
        inputs: Of what gradients are taken; None: of every trainable parameter.
    """
    wanted = trainable_parameters(model) if inputs is None else list(inputs)

    def figures(part: Batch, within: Within) -> tuple[Figures, str]:
        return _loss_and_gradients(model, compute_loss, part, wanted, within)

    rule.against = batch_norm_in_training(model) or looked(
        lambda sample: _added_up(model, figures, sample, rule), batch, num, rule
    )


def looked(look: Callable[[Any], str], batch: Any, num: int, rule: Rule) -> str:
    """Return what looks at samples from all over a batch say; at fewer at a time if need be.

    Where few fit at once, there are several looks: so few may be alike where others are not.

    Args:
        look: Says why parts of some samples do not add up; empty where they do.
        batch: Some batch, with at least ``num`` samples.
        num: At how many it looks first, at least 2.
        rule: What was known before, and as often as it was used others are looked at.
    """
    while num >= 2:
        num_looks = min(_MOST_LOOKS, CHECKED_SAMPLES // num, -(-num_rows(batch) // num))
        seeds = range(_MOST_LOOKS * rule.num_uses, _MOST_LOOKS * rule.num_uses + num_looks)
        samples = (spread_rows(batch, num, random_seed=seed) for seed in seeds)
        try:
            return next(filter(None, map(look, samples)), "")
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            num = max(2, num // 2) if num > 2 else 0
    return TOO_FEW


def compared(model: nn.Module, whole: Callable[[], Groups], parts: Callable[[], Groups]) -> str:
    """Say why figures of parts are not those of the whole; empty where they are."""
    with precision_seen(model) as precisions:
        found = whole(), parts()
    own = [t.dtype for group in found[0] for t in group if t.is_floating_point()]
    is_alike = are_alike(model, found, lowest([*precisions, *own]), whole)
    return "" if is_alike else LOOKS


def _added_up(
    model: nn.Module,
    figures: Callable[[Batch, Within], tuple[Figures, str]],
    sample: Batch,
    rule: Rule,
) -> str:
    """Say why parts of some samples do not add up, or write down how they do.

    Args:
        model: What the figures are of.
        figures: Returns those of some samples, each time from the same random state and within a
            context, and what of the model's changes by it; empty where nothing does.
        sample: The samples, at least 2.
        rule: Where it is written down.
    """
    num = num_rows(sample)
    with precision_seen(model) as precisions:
        whole, changed = figures(sample, nullcontext())
    rule.draws = rule.draws or changed == DRAWS
    if changed and changed != DRAWS:
        return changed
    means: Figures = []
    sums: Figures = []
    for start, stop in uneven(num, rule):
        drawing = SameDraws(model).of((start, stop), num) if rule.draws else nullcontext()
        try:
            part, _ = figures(rows_of(sample, start, stop), drawing)
        except UnknownDrawError:
            return DRAWS
        if [t.shape for t in part] != [t.shape for t in whole]:
            return LOOKS
        weight = (stop - start) / num
        means = _plus(means, [weight * figure.double() for figure in part])
        sums = _plus(sums, [figure.double() for figure in part])
    precision = lowest([*precisions, *(t.dtype for t in whole if t.is_floating_point())])

    def again() -> Groups:
        loss, *gradients = figures(sample, nullcontext())[0]
        return [[loss], gradients]

    is_mean, rule.is_sum = (
        are_alike(model, ([whole[:1], whole[1:]], [added[:1], added[1:]]), precision, again)
        for added in (means, sums)
    )
    if is_mean and rule.is_sum:
        return NOTHING_SEEN
    if is_mean or rule.is_sum:
        return ""
    return f"{LOOKS}; or {DRAWS}" if rule.draws else LOOKS


def _plus(one: Figures, other: Figures) -> Figures:
    return [a + b for a, b in zip(one, other, strict=True)] if one else other


def _loss_and_gradients(
    model: nn.Module,
    compute_loss: LossFunction,
    batch: Batch,
    inputs: Sequence[Tensor],
    within: Within,
) -> tuple[Figures, str]:
    """Return a loss and its gradients, taken without a trace, and what a forward changes."""
    with (
        shadow_pass(model, functions=(compute_loss,), values=(batch,)),
        torch.enable_grad(),
        Watched(model) as watched,
        within,
    ):
        loss = compute_loss(model, batch)
        given: list[Tensor | None]
        given = [*torch.autograd.grad(loss, list(inputs), allow_unused=True)]
        gradients = [
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True)
        ]
        return [loss.detach(), *gradients], watched.changed()


def measure_losses(
    model: nn.Module,
    losses: Callable[[Batch], Tensor],
    batch: Batch,
    num: int,
    rule: Rule,
) -> None:
    """Learn whether losses of samples in parts are those of the samples together.

    Args:
        model: The model, held as it is to be measured, under ``no_grad``.
        losses: Returns one loss a sample.
        batch: Some batch, with at least ``num`` samples.
        num: Samples that are looked at, at least 2; fewer where they do not fit.
        rule: Where it is written down.
    """
    rule.against = looked(
        lambda sample: _same_losses(model, losses, sample, rule), batch, num, rule
    )


def _same_losses(
    model: nn.Module, losses: Callable[[Batch], Tensor], sample: Batch, rule: Rule
) -> str:
    parts = uneven(num_rows(sample), rule)

    def of_parts() -> Groups:
        return [[torch.cat([losses(rows_of(sample, *part)) for part in parts])]]

    with Watched(model) as watched:
        against = compared(model, lambda: [[losses(sample)]], of_parts)
        return watched.drawn() or against  # what else changes is put back behind a reading


class Watched:
    """Looks at whether a pass draws random numbers or changes what a model keeps.

    Use as a context manager around the pass; behind it the random states are as they were.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> Watched:
        self._devices = devices_of(self._model)
        self._states = torch_states(self._devices)
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._kept = _kept_by(self._model)
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = {}
        set_torch_states(self._devices, self._states)
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    def changed(self) -> str:
        """Say what stands against making the pass in parts; empty where nothing was seen."""
        now = _kept_by(self._model)
        for name in {**self._kept, **now}:
            if self._kept.get(name) != now.get(name):
                return f"a forward changes {name}, and parts are a forward each"
        return self.drawn()

    def drawn(self) -> str:
        """Say that random numbers were drawn; empty where none were."""
        is_moved = repr(self._numpy) != repr(np.random.get_state())
        if is_moved or self._python != random.getstate():
            return "it draws from the generators of Python or numpy, which parts would move further"
        states = zip(self._states, torch_states(self._devices), strict=True)
        return "" if all(torch.equal(before, after) for before, after in states) else DRAWS


def _kept_by(model: nn.Module) -> dict[str, Any]:
    """Return what changes where a buffer is written to, and plain attributes, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_ours = type(module).__module__.startswith("esper.")
        for own, value in () if is_ours else vars(module).items():
            if isinstance(value, _PLAIN) and own != "training":
                found[f"{name}.{own}".lstrip(".")] = value
        for own, buffer in module._buffers.items():  # noqa: SLF001 - past hooks and properties
            if buffer is not None and not buffer.is_inference():
                version = buffer._version  # noqa: SLF001 - torch has no other name for it
                found[f"{name}.{own}".lstrip(".")] = (id(buffer), version)
    return found
