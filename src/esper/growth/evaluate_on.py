"""``esper.evaluate_on``: a loader of held-out data as the measure that the Grower reads."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import data

from esper.continuity.replicas import bare
from esper.contracts.arguments import check_type
from esper.seeds.batch_rows import rows_of
from esper.seeds.fitting import Pass, device_of, fits_in_use
from esper.seeds.micro_batches import measure_losses

if TYPE_CHECKING:
    from typing import TypeAlias

    from esper.seeds.fitting import Rule

    Loss: TypeAlias = Literal["cross_entropy", "mse"] | Callable[[Any, Any], Tensor]

_LABELS: Final = "labels"
_IGNORED: Final = -100
_DRAWING: Final = (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)
_RELATIVE: Final = 1e-3  # a model's own loss is the mean of ours, rounding aside


def evaluate_on(
    loader: Iterable[Any],
    *,
    loss: Loss = "cross_entropy",
    device: torch.device | str | None = None,
) -> Callable[[nn.Module], Tensor]:
    """Return a function for ``Grower(evaluate=...)``: the loss of each sample that a loader gives.

    It goes through the loader anew at each call, in the loader's order. The Grower holds the model
    in evaluation mode meanwhile and restores its modes; who calls it otherwise does so himself.
    A batch that does not fit into memory is read in parts, in its order.

    Args:
        loader: A DataLoader that does not shuffle, or anything that can be gone through again. Its
            batches are pairs ``(inputs, targets)``, where a dict of inputs are keywords and a
            tuple or list are several arguments of the model; or dicts, the model's keywords with
            ``"labels"`` among them.
        loss: ``"cross_entropy"``: of outputs ``(samples, ..., classes)``, or as torch has it
            ``(samples, classes, ...)``, to classes ``(samples, ...)``, of which -100 is left out;
            or to probabilities. ``"mse"``: to targets of the output's shape. Both are means over
            what a sample has of tokens, pixels or values; a sample of which all is left out has
            loss 0. Or a function ``(output, target) -> (samples,)``, which gets the output as the
            model gave it.
        device: Where batches go; the model's own device where None.

    Returns:
        A function of the model that gives float32 losses of shape ``(samples,)``. The output that
        they are of is a tensor, or has one as its ``logits``. Where a model of sequences gives a
        loss of its own (``output.loss``), that says whether its labels are of the next token.

    Raises:
        TypeError: ``loader`` cannot be gone through, or ``loss`` is of the wrong type.
        ValueError: ``loader`` shuffles or can be gone through once only, or ``loss`` is unknown.
    """
    _check_loader(loader)
    if not callable(loss) and loss not in _LOSSES:
        msg = f"loss is 'cross_entropy', 'mse' or a function (output, target), got {loss!r}"
        raise ValueError(msg)

    rules_of: WeakKeyDictionary[nn.Module, dict[str, Rule]] = WeakKeyDictionary()

    @torch.no_grad()
    def evaluate(model: nn.Module) -> Tensor:
        where = torch.device(device or device_of(model))
        fits, rules = fits_in_use(), rules_of.setdefault(model, {})
        found = [
            fits.run(
                functools.partial(_losses, model, batch, loss),
                functools.partial(_pass, model, batch, loss, where, rules),
            )
            for batch in _on(loader, where)
        ]
        if not found:
            msg = "the loader of evaluate_on gave no batch: it is empty, or was gone through"
            raise ValueError(msg)
        return torch.cat(found)

    return evaluate


def _check_loader(loader: object) -> None:
    check_type("loader", loader, Iterable, "a DataLoader, or a list of batches")
    if isinstance(loader, Iterator):
        msg = (
            f"loader is a {type(loader).__name__}, which can be gone through once, and every "
            "evaluation goes through it: pass the DataLoader itself, or list(loader)"
        )
        raise ValueError(msg)  # noqa: TRY004 - the right type, but used up by one pass
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
        is_shuffled = isinstance(sampler, data.DistributedSampler) and sampler.shuffle
        if isinstance(sampler, _DRAWING) or is_shuffled:
            msg = (
                f"loader draws its samples at random ({type(sampler).__name__}), and losses are "
                "compared sample by sample: make it with shuffle=False"
            )
            raise ValueError(msg)


def _on(loader: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
    return (_moved(batch, device) for batch in loader)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(item, device) for item in value]
    return value


def _pass(
    model: nn.Module, batch: Any, loss: Loss, device: torch.device, rules: dict[str, Rule]
) -> Pass[Tensor]:
    """Return the reading of a batch, which may be made in parts."""

    def losses(part: Any) -> Tensor:
        return _losses(model, part, loss)

    return Pass(
        work="evaluation",
        batch=batch,
        device=device,
        parted=lambda parts, _: torch.cat([losses(rows_of(batch, *part)) for part in parts]),
        measure=lambda num, rule: measure_losses(model, losses, batch, num, rule),
        rules=rules,
    )


def _losses(model: nn.Module, batch: Any, loss: Loss) -> Tensor:
    """Return the loss of each sample of a batch."""
    output, target = _called(model, batch)
    if callable(loss):
        return _checked(loss(output, target), target)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        msg = (
            f"evaluate_on takes outputs that are tensors or have logits, and targets that are "
            f"tensors; got {type(output).__name__} and {type(target).__name__}: pass "
            "loss=, a function (output, target) that gives one loss a sample"
        )
        raise TypeError(msg)
    return _LOSSES[loss](logits, target, output)


def _called(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return what a model gives for a batch, and what it should have given."""
    if isinstance(batch, Mapping) and _LABELS in batch:
        takes = inspect.signature(bare(model).forward).parameters.values()
        with_labels = any(p.name == _LABELS or p.kind is p.VAR_KEYWORD for p in takes)
        given = {k: v for k, v in batch.items() if with_labels or k != _LABELS}
        with _undecided(model):
            return model(**given), batch[_LABELS]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        msg = (
            "a batch is a pair (inputs, targets), or a dict with 'labels' among the model's "
            f"keywords; got {_described(batch)}"
        )
        raise ValueError(msg)
    inputs, target = batch
    if isinstance(inputs, Mapping):
        return model(**inputs), target
    return (model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)), target


@contextmanager
def _undecided(model: nn.Module) -> Iterator[None]:
    """Leave to its owner what a classifier of transformers' concludes from the first labels.

    It writes that into its config, where a training that keeps labels to itself, as with label
    smoothing, would not have it.
    """
    config = getattr(bare(model), "config", None)
    is_undecided = getattr(config, "problem_type", "") is None
    try:
        yield
    finally:
        if is_undecided:
            config.problem_type = None  # type: ignore[union-attr] # it had one, as was seen above


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(map(repr, batch))}"
    size = f" of {len(batch)} parts" if isinstance(batch, (tuple, list)) else ""
    return f"a {type(batch).__name__}{size}"


def _checked(losses: Any, target: Any) -> Tensor:
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    num = len(target) if isinstance(target, Tensor) and target.ndim else None
    if not isinstance(losses, Tensor) or losses.ndim != 1 or num not in (None, len(losses)):
        expected = "(samples,)" if num is None else f"({num},)"
        msg = (
            f"loss gave {shape}, expected one loss for each sample, shape {expected}: use "
            "reduction='none' and the mean over all other axes"
        )
        raise ValueError(msg)
    return losses.detach().float()


def _cross_entropy(logits: Tensor, target: Tensor, output: Any) -> Tensor:
    if target.is_floating_point() and target.shape == logits.shape:
        return _per_sample(F.cross_entropy(logits.float(), target.float(), reduction="none"))
    own = getattr(output, "loss", None)
    if logits.ndim == 3 and isinstance(own, Tensor) and own.numel() == 1:
        return _as_the_model_does(logits, target, float(own))
    last, first = logits.shape[:-1] == target.shape, _classes_behind_samples(logits, target)
    if logits.ndim > 2 and last and first and logits is output:
        msg = (
            f"an output of shape {tuple(logits.shape)} may have its classes in its last axis or, "
            "as in torch, in its second: pass loss=, a function (output, target)"
        )
        raise ValueError(msg)
    if not (last or first):
        msg = (
            f"cross_entropy takes outputs (samples, ..., classes) and classes (samples, ...), got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}: pass loss='mse', or a function "
            "(output, target) that gives one loss a sample"
        )
        raise ValueError(msg)
    return _of_classes(logits.movedim(-1, 1) if last else logits, target)


def _classes_behind_samples(logits: Tensor, target: Tensor) -> bool:
    return logits.ndim > 1 and (logits.shape[0], *logits.shape[2:]) == tuple(target.shape)


def _as_the_model_does(logits: Tensor, target: Tensor, own: float) -> Tensor:
    """Compare with the same tokens or with the next ones, whichever gives the model's own loss.

    Raises:
        ValueError: Neither does.
    """
    pairs = {"same": (logits, target), "next": (logits[:, :-1], target[:, 1:])}
    fitting = {k: pair for k, pair in pairs.items() if pair[0].shape[:-1] == pair[1].shape}
    means = {
        name: float(F.cross_entropy(scores.float().movedim(-1, 1), labels, ignore_index=_IGNORED))
        for name, (scores, labels) in fitting.items()
    }
    apart = {name: _distance(mean, own) for name, mean in means.items()}
    best = min(apart, key=apart.__getitem__, default=None)
    if best is None or not apart[best] <= _RELATIVE * max(1.0, abs(own)):
        found = ", ".join(f"{mean:.4g} to the {name} tokens" for name, mean in means.items())
        msg = (
            f"the model gives a loss of {own:.4g}, which is not the cross entropy of its logits "
            f"({found or 'whose shape is another than the labels'}): pass loss=, a function "
            "(output, target) that gives one loss a sample"
        )
        raise ValueError(msg)
    scores, labels = fitting[best]
    return _of_classes(scores.movedim(-1, 1), labels)


def _distance(mean: float, own: float) -> float:
    """Return how far a mean is from the model's own loss; where nothing is counted both are NaN."""
    return 0.0 if math.isnan(mean) and math.isnan(own) else abs(mean - own)


def _of_classes(logits: Tensor, target: Tensor) -> Tensor:
    """Return means over what is not left out; classes are in the second axis."""
    each = F.cross_entropy(
        logits.float(), target.long(), reduction="none", ignore_index=_IGNORED
    ).reshape(len(target), -1)
    counted = (target != _IGNORED).reshape(len(target), -1).sum(dim=1)
    return each.sum(dim=1) / counted.clamp(min=1)


def _mse(output: Tensor, target: Tensor, _: Any) -> Tensor:
    if output.ndim == target.ndim + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape != target.shape:
        msg = (
            f"mse takes targets of the output's shape, got {tuple(output.shape)} and "
            f"{tuple(target.shape)}: reshape the targets, or pass a function (output, target)"
        )
        raise ValueError(msg)
    return _per_sample((output.float() - target.float()).square())


def _per_sample(each: Tensor) -> Tensor:
    return each.reshape(len(each), -1).mean(dim=1)


_LOSSES: Final[dict[str, Callable[[Tensor, Tensor, Any], Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "mse": _mse,
}
