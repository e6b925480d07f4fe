"""How many packages of a model were refused: luck is the model's, whoever grows it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

_SPENT: Final[weakref.WeakKeyDictionary[nn.Module, int]] = weakref.WeakKeyDictionary()


def tries_spent(model: nn.Module) -> int:
    """Return how many packages of a model were refused by a verdict, or rolled back."""
    return _SPENT.get(model, 0)


def spend_try(model: nn.Module) -> int:
    """Count a refusal; return how many there were."""
    _SPENT[model] = tries_spent(model) + 1
    return _SPENT[model]


def set_tries_spent(model: nn.Module, num: int) -> None:
    """Let a model have the refusals of the one that it was loaded from.

    Args:
        model: The model.
        num: How many there were, at least 0.
    """
    _SPENT[model] = num


def no_tries_left(model: nn.Module, tries: int) -> str:
    """Say why nothing more is tried in a model."""
    spent = tries_spent(model)
    one = "one package of this model was" if spent == 1 else f"{spent} packages of this model were"
    return (
        f"nothing more is tried: {one} refused or cut off, and tries={tries}; with each more the "
        "chance would rise that one is kept by luck"
    )
