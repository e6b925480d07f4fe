"""A model whose calls fit into memory, for measures of which nothing but the model is known."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from esper.seeds.batch_rows import joined_rows, num_rows, rows_of
from esper.seeds.fitting import Pass, device_of, fits_in_use, uneven
from esper.seeds.micro_batches import Watched, compared, looked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from esper.seeds.fitting import Cuts, Rule
    from esper.seeds.sameness import Groups

    Call = tuple[tuple[object, ...], dict[str, object]]
    _Forward = Callable[..., object]


@contextmanager
def calls_fitted(model: nn.Module, rules: dict[str, Rule]) -> Iterator[None]:
    """Let each call of a model be made in parts where it does not fit, and be joined.

    Hooks of the model itself see the whole call. A call that has no rows is made as it is.

    Args:
        model: The model, in evaluation mode under ``no_grad``.
        rules: What was measured before of its calls.
    """
    own = vars(model).get("forward")
    vars(model)["forward"] = _Fitted(model, rules)
    try:
        yield
    finally:
        if own is None:
            vars(model).pop("forward", None)
        else:
            vars(model)["forward"] = own


class _Fitted:
    """Stands for the forward of a model, with its signature; a copy of the model has its own."""

    def __init__(self, model: nn.Module, rules: dict[str, Rule]) -> None:
        self._model, self._rules = model, rules
        self._inner = model.forward
        functools.update_wrapper(self, self._inner)

    def __call__(self, *args: object, **kwargs: object) -> object:
        inner, call = self._inner, (args, kwargs)
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        return fits_in_use().run(
            lambda: inner(*args, **kwargs),
            lambda: Pass(
                work="evaluation",
                batch=call,
                device=device_of(self._model),
                parted=lambda cuts, _: _in_parts(inner, call, cuts),
                measure=functools.partial(_measure_calls, self._model, inner, call),
                rules=self._rules,
            ),
        )

    def __reduce__(self) -> tuple[Callable[[_Forward], _Forward], tuple[_Forward]]:
        return _as_it_is, (self._inner,)


def _as_it_is(forward: _Forward) -> _Forward:
    return forward


def _in_parts(function: Callable[..., Any], call: Call, parts: Cuts) -> Any:
    """Call a function part by part, and join what it gives.

    Raises:
        NoRowsError: What it gives cannot be joined.
    """
    found = []
    for start, stop in parts:
        args, kwargs = rows_of(call, start, stop)
        found.append(function(*args, **kwargs))
    return joined_rows(found, [stop - start for start, stop in parts])


def _measure_calls(
    model: nn.Module, inner: Callable[..., Any], call: Call, num: int, rule: Rule
) -> None:
    """Learn whether a model gives for samples in parts what it gives for them together."""

    def look(sample: Call) -> str:
        (args, kwargs), parts = sample, uneven(num_rows(sample), rule)
        with Watched(model) as watched:
            against = compared(
                model,
                lambda: _figures(inner(*args, **kwargs)),
                lambda: _figures(_in_parts(inner, sample, parts)),
            )
            return watched.drawn() or against  # what else changes is put back behind a reading

    rule.against = looked(look, call, num, rule)


def _figures(value: object) -> Groups:
    return [[t] for t in tree_leaves(value) if isinstance(t, Tensor)]
